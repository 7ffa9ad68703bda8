"""A checksum that travels with published weights, so that damaged ones are noticed when they are loaded."""
import hashlib
from typing import Any, Dict, Mapping

import torch
import torch.nn as nn

__all__ = ['check_digest', 'digest_note', 'drop_digest', 'without_digest']

PREFIX = 'weights sha256 '  # in the notes of a pretrained configuration, which timm keeps and passes on


def digest_note(weights: Dict[str, torch.Tensor]) -> str:
    """The entry for the notes of a pretrained configuration that `check_digest` compares weights with."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f'{name} {tensor.dtype} {list(tensor.shape)}\n'.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return PREFIX + digest.hexdigest()


def check_digest(weights: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Compare weights with the notes of the configuration they came with; timm calls this before it loads them.

    Raises:
        RuntimeError: If they are not the weights that were published.
    """
    cfg = model.pretrained_cfg
    expected = [note for note in cfg.get('notes') or () if note.startswith(PREFIX)]
    if expected and digest_note(weights) not in expected:
        source = cfg.get('hf_hub_id') or cfg.get('file')
        raise RuntimeError(
            f'The weights of {source} are not the ones that were published: the file was damaged or replaced. Delete '
            f'it from the cache (or the folder) and fetch it again; those of the package come with its installation.')
    return weights


def without_digest(cfg: Mapping[str, Any]) -> Dict[str, Any]:
    """A pretrained configuration for other weights than those that were published with it."""
    notes = tuple(note for note in cfg.get('notes') or () if not note.startswith(PREFIX))
    return {k: v for k, v in cfg.items() if k != 'notes'} | ({'notes': notes} if notes else {})


def drop_digest(model: nn.Module) -> None:
    """Forget the checksum of a model that was loaded, since training will change its weights."""
    kept = without_digest(model.pretrained_cfg)
    model.pretrained_cfg.clear()
    model.pretrained_cfg.update(kept)
