"""Training checkpoint to safetensors and back."""
import argparse
import json
import math
import os
from pathlib import Path
from typing import Dict, NamedTuple, Optional

import torch
from safetensors.torch import save_file

from pst_timm.metrics.agreement import compare_logits
from pst_timm.models.digest import without_digest
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import check_output, write_whole

from .building import build_model, open_checkpoint
from .reading import FACTS_KEY, HEADER_KEY, SAFETENSORS, Checkpoint, has_weights_ending

__all__ = ['DTYPES', 'Conversion', 'convert', 'save_safetensors']

DTYPES = ('float32', 'float16', 'bfloat16')
IMAGES, PIXELS = 16, 3 * 512 * 512  # random ones for the comparison, and the values in one of them


class Conversion(NamedTuple):
    """What `convert` did."""
    path: Path
    """File written."""
    ema: bool
    """Whether the weights are the moving average."""
    difference: float
    """Largest difference of the logits to those of the source, as a share of the largest logit."""
    agreement: float
    """Share of the inputs for which both have the same top-1."""


def save_safetensors(weights: Dict[str, torch.Tensor], path: Path, facts: Dict[str, object]) -> None:
    """Write weights as a safetensors file, whole or not at all.

    Args:
        weights: State dict.
        path: File to write.
        facts: What is known about the weights, kept in the header as JSON.
    """
    tensors = {k: v.contiguous().clone() for k, v in weights.items()}
    metadata = {'format': 'pt', HEADER_KEY: json.dumps(facts)}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata))


def _save_pickle(checkpoint: Checkpoint, path: Path) -> None:
    facts = checkpoint.facts()
    content = {
        'arch': checkpoint.arch, 'state_dict': checkpoint.weights, 'version': 2,
        FACTS_KEY: {k: facts[k] for k in ('arch', 'model_args', 'pretrained_cfg', 'recipe', 'ema') if k in facts},
        **{k: facts[k] for k in ('epoch', 'metric') if k in facts},
    }
    if checkpoint.args:
        content['args'] = argparse.Namespace(**checkpoint.args)
    write_whole(path, lambda temporary: torch.save(content, temporary))


def convert(
        source: os.PathLike,
        target: os.PathLike,
        dtype: str = 'float32',
        use_ema: Optional[bool] = None,
        arch: Optional[str] = None,
        overwrite: bool = False,
) -> Conversion:
    """Write the weights of a checkpoint in the other format, or in another precision.

    What is known about them (architecture, arguments of the run, epoch, metric) goes along: in the header of a
    safetensors file, in the entries of a training checkpoint. The optimizer's state does not.

    Args:
        source: What `read_checkpoint` reads.
        target: File to write: .safetensors, or a training checkpoint .pth.tar, .pth or .pt.
        dtype: 'float32', 'float16' or 'bfloat16', for all floating-point tensors.
        use_ema: See `read_checkpoint`.
        arch: Architecture of a file, where it does not tell it or another one is meant; said if they differ.
        overwrite: Whether a target that is there may be replaced; never the source.

    Returns:
        What was written, and how far its logits are from those of the source, for random images, 16 of a usual size.

    Raises:
        PSTError: If the source cannot be read, does not fit its architecture, has NaN weights, or the target cannot
            be written; then nothing is written.
    """
    target = Path(target)
    if dtype not in DTYPES:
        raise PSTError(f'dtype must be one of {", ".join(DTYPES)}, got {dtype!r}.')
    if not has_weights_ending(target):
        raise PSTError(f'The target {target} must end with .safetensors, or with .pth.tar or .pth.')
    check_output(target, overwrite, [source])
    checkpoint = open_checkpoint(source, arch, use_ema)
    check_output(target, overwrite, [checkpoint.path])  # that of a folder
    model = build_model(checkpoint)
    kind = getattr(torch, dtype)
    weights = {k: v.to(kind) if v.is_floating_point() else v for k, v in checkpoint.weights.items()}
    overflown = [k for k, v in weights.items() if not torch.isfinite(v).all()]
    if overflown:
        raise PSTError(f'{overflown[0]} has values too large for {dtype}: use bfloat16 or float32.')

    size = model.pretrained_cfg['input_size']
    count = max(1, min(IMAGES, IMAGES * PIXELS // math.prod(size)))  # large ones would not fit into memory together
    x = torch.randn(count, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model.float()(x)
        model.load_state_dict(weights)
        got = model(x)
    # their checksum, where they have one, is that of the source
    written = Checkpoint(**{
        **vars(checkpoint), 'weights': weights, 'pretrained_cfg': without_digest(checkpoint.pretrained_cfg)})
    if target.suffix == SAFETENSORS:
        save_safetensors(weights, target, written.facts())
    else:
        _save_pickle(written, target)
    agreement = compare_logits(got, expected)
    return Conversion(target, bool(checkpoint.ema), agreement.difference, agreement.top1)
