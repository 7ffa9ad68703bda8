"""From whatever holds trained weights to the weights and what is known about them; no code in it is run."""
import argparse
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Optional, Union

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import clean_state_dict
from timm.models._hub import load_model_config_from_path  # timm exports it from here alone

from pst_timm.utils.errors import PSTError

__all__ = [
    'FACTS_KEY', 'HEADER_KEY', 'PICKLES', 'Checkpoint', 'check_finite', 'has_weights_ending', 'is_file_name',
    'pick_weights', 'read_checkpoint',
]

_logger = logging.getLogger(__name__)

HEADER_KEY = 'pst_timm'  # entry of a safetensors header that holds what is known about the weights, as JSON
FACTS_KEY = 'facts'  # entry of a training checkpoint that holds the same, see `facts`
PREFERRED = ('model_best.pth.tar', 'last.pth.tar')  # in the folder of a run
AVERAGED = ('state_dict_ema', 'model_ema')  # where training scripts keep a moving average
TRAINED = ('state_dict', 'model')
SAFETENSORS = '.safetensors'
PICKLES = ('.tar', '.pth', '.pt', '.bin', '.ckpt', '.pkl')  # read as data, or refused
PathLike = Union[str, os.PathLike]


@dataclass
class Checkpoint:
    """Weights and what is known about them."""
    path: Path
    """File the weights were read from."""
    weights: Dict[str, torch.Tensor]
    """State dict of the model."""
    arch: Optional[str] = None
    """Name of the architecture in timm, None if the file does not tell."""
    args: Dict[str, Any] = field(default_factory=dict)
    """Arguments of the training run."""
    model_args: Dict[str, Any] = field(default_factory=dict)
    """Arguments of `timm.create_model` that the weights need."""
    pretrained_cfg: Dict[str, Any] = field(default_factory=dict)
    """Preprocessing and class names, as in timm's config.json."""
    recipe: Dict[str, Any] = field(default_factory=dict)
    """Flags of the training run that differ from their defaults and make it what it was."""
    epoch: Optional[int] = None
    metric: Optional[float] = None
    """Value of the run's evaluation metric at that epoch."""
    ema: Optional[bool] = None
    """Whether the weights are the moving average; None if the file does not tell."""

    def facts(self) -> Dict[str, Any]:
        """All but path and weights, fit for JSON."""
        facts = {k: v for k, v in vars(self).items() if k not in ('path', 'weights') and v not in (None, {})}
        return json.loads(json.dumps(facts, default=str))


def is_file_name(source: PathLike) -> bool:
    """Whether a source that does not exist can only be meant as a file of weights."""
    return isinstance(source, os.PathLike) or has_weights_ending(source)


def has_weights_ending(path: PathLike) -> bool:
    """Whether a file is named as files of weights are."""
    return Path(path).suffix in (SAFETENSORS, *PICKLES)


def read_checkpoint(path: PathLike, use_ema: Optional[bool] = None) -> Checkpoint:
    """Read weights and what is known about them.

    Args:
        path: Folder of a training run (its best checkpoint), training checkpoint, .safetensors file, or folder with
            timm's config.json.
        use_ema: Whether to take the moving average of a training checkpoint; None takes it where there is one.

    Raises:
        PSTError: If there is no such thing, it is damaged, holds more than tensors and plain values, or does not have
            the weights that are asked for.
    """
    path = _find_file(Path(path))
    checkpoint = _read_safetensors(path) if path.suffix == SAFETENSORS else _read_pickle(path, use_ema)
    if not checkpoint.weights or not all(isinstance(v, torch.Tensor) for v in checkpoint.weights.values()):
        raise PSTError(f'{path} holds no weights: a mapping of names to tensors was expected.')
    if use_ema is not None and use_ema != bool(checkpoint.ema):
        found, flag = ('no', '--use-ema') if use_ema else ('only the', '--no-use-ema')
        raise PSTError(f'{path} holds {found} moving average (EMA): leave out {flag} to take the weights it has.')
    if checkpoint.ema is not None:
        _logger.info(f'{path}: {"the moving average (EMA)" if checkpoint.ema else "the weights as trained, no EMA"}.')
    return checkpoint


def _find_file(path: Path) -> Path:
    if path.is_dir():
        names = [*PREFERRED, 'model.safetensors']
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise PSTError(
                f'{path} has neither config.json with model.safetensors nor a checkpoint of a training run '
                f'({", ".join(PREFERRED)}): name the file itself.')
        return found[0]
    if not path.is_file():
        raise PSTError(f'There is no checkpoint {path}.')
    if path.suffix and not has_weights_ending(path):
        raise PSTError(f'{path} is not a checkpoint: expected {SAFETENSORS}, {", ".join(PICKLES)}, or a folder.')
    return path


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        with safe_open(path, 'pt') as file:
            header = file.metadata() or {}
        weights = load_file(path)
        facts = json.loads(header.get(HEADER_KEY, '{}'))
        checkpoint = Checkpoint(path, weights, **facts)
    except (SafetensorError, OSError, TypeError, ValueError) as e:
        raise PSTError(
            f'{path} cannot be read: it is truncated or not a safetensors file ({e}). Fetch it, or write it, again.'
        ) from None
    if checkpoint.arch is None and (path.parent / 'config.json').is_file():
        try:
            cfg, checkpoint.arch, checkpoint.model_args = load_model_config_from_path(path.parent)
        except (OSError, ValueError, KeyError) as e:
            raise PSTError(f'{path.parent / "config.json"} is not a config.json of timm ({e!r}).') from None
        checkpoint.pretrained_cfg = {k: v for k, v in cfg.items() if k not in ('file', 'source')}
    return checkpoint


def pick_weights(content: Dict[str, Any], use_ema: Optional[bool] = None) -> Optional[str]:
    """The entry of a training checkpoint that holds the weights, None if they are not one level down.

    Args:
        content: What the checkpoint holds.
        use_ema: See `read_checkpoint`.
    """
    keys = TRAINED if use_ema is False else (*AVERAGED, *TRAINED)
    return next((k for k in keys if isinstance(content.get(k), dict)), None)


def _read_pickle(path: Path, use_ema: Optional[bool]) -> Checkpoint:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:  # whatever a damaged or malicious file may raise
        reason = str(e).split('\n')[0]
        raise PSTError(
            f'{path} cannot be read as a checkpoint: it is damaged, or holds more than tensors and plain values, so '
            f'that loading it could run code ({reason}). Nothing in it was run. Use another file, or turn one you '
            f'trust into .safetensors.') from None
    if not isinstance(content, dict):
        raise PSTError(f'{path} cannot be read as a checkpoint: it holds a {type(content).__name__}.')
    key = pick_weights(content, use_ema)
    if key is None:
        return Checkpoint(path, clean_state_dict(content))
    args = content.get('args')
    args = vars(args) if isinstance(args, argparse.Namespace) else {}
    known = dict(args=args, epoch=content.get('epoch'), metric=content.get('metric'), ema=key in AVERAGED)
    facts = content.get(FACTS_KEY, {'arch': content.get('arch')})
    try:
        return Checkpoint(path, clean_state_dict(content[key]), **{**known, **facts})
    except TypeError as e:
        raise PSTError(f'{path}: what it tells about its weights is garbled ({e}). Use another checkpoint.') from None


def check_finite(checkpoint: Checkpoint) -> None:
    """Make sure that all weights are numbers.

    Raises:
        PSTError: If a weight is NaN or infinite; names the first tensor.
    """
    broken = [k for k, v in checkpoint.weights.items() if not torch.isfinite(v).all()]
    if broken:
        raise PSTError(
            f'{checkpoint.path} has NaN or infinite weights in {len(broken)} tensors, the first is {broken[0]}: the '
            f'training diverged. Use an earlier checkpoint.')
