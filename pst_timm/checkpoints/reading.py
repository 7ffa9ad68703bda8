"""From whatever holds a trained model to weights, what is known about them, and the model; no code in it is run."""
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
from timm.models import (
    clean_state_dict,
    get_pretrained_cfg,
    load_model_config_from_hf,
    parse_model_name,
    split_model_name_tag,
)
from timm.models._hub import load_model_config_from_path  # timm exports it from here alone

from pst_timm.utils.errors import PSTError

__all__ = ['HEADER_KEY', 'Checkpoint', 'check_finite', 'read_checkpoint']

_logger = logging.getLogger(__name__)

HEADER_KEY = 'pst_timm'  # entry of a safetensors header that holds what is known about the weights, as JSON
PREFERRED = ('model_best.pth.tar', 'last.pth.tar')  # in the folder of a run
DATA_KEYS = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
PICKLES = ('.tar', '.pth', '.pt', '.bin', '.ckpt')
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


def read_checkpoint(path: PathLike, use_ema: Optional[bool] = None) -> Checkpoint:
    """Read weights and what is known about them.

    Args:
        path: Folder of a training run (its best checkpoint), training checkpoint, .safetensors file, or folder with
            timm's config.json.
        use_ema: Whether to take the moving average of a training checkpoint; None takes it where there is one.

    Raises:
        PSTError: If there is no such thing, it is damaged, or it holds more than tensors and plain values.
    """
    path = _find_file(Path(path))
    checkpoint = _read_safetensors(path) if path.suffix == '.safetensors' else _read_pickle(path, use_ema)
    if not checkpoint.weights or not all(isinstance(v, torch.Tensor) for v in checkpoint.weights.values()):
        raise PSTError(f'{path} holds no weights: a mapping of names to tensors was expected.')
    if checkpoint.arch:
        _resolve_origin(checkpoint)
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
    if path.suffix not in ('.safetensors', *PICKLES):
        raise PSTError(f'{path} is not a checkpoint: expected .safetensors, {", ".join(PICKLES)}, or a folder.')
    return path


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        with safe_open(path, 'pt') as file:
            header = file.metadata() or {}
        weights = load_file(path)
        facts = json.loads(header.get(HEADER_KEY, '{}'))
        checkpoint = Checkpoint(path, weights, **facts)
    except (SafetensorError, OSError, TypeError, ValueError) as e:
        raise PSTError(f'{path} is truncated or not a safetensors file ({e}): fetch or write it again.') from None
    if checkpoint.arch is None and (path.parent / 'config.json').is_file():
        try:
            cfg, checkpoint.arch, checkpoint.model_args = load_model_config_from_path(path.parent)
        except (OSError, ValueError, KeyError) as e:
            raise PSTError(f'{path.parent / "config.json"} is not a config.json of timm ({e!r}).') from None
        checkpoint.pretrained_cfg = {k: v for k, v in cfg.items() if k not in ('file', 'source')}
    return checkpoint


def _read_pickle(path: Path, use_ema: Optional[bool]) -> Checkpoint:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:  # whatever a damaged or malicious file may raise
        reason = str(e).split('\n')[0]
        raise PSTError(
            f'{path} cannot be read as a checkpoint: it is damaged, or holds more than tensors and plain values, so '
            f'that loading it could run code ({reason}). Nothing in it was run. Use another file.') from None
    if not isinstance(content, dict):
        raise PSTError(f'{path} holds a {type(content).__name__}, no checkpoint or state dict.')
    keys = [k for k in ('state_dict_ema', 'model_ema') if use_ema is not False] + ['state_dict', 'model']
    key = next((k for k in keys if isinstance(content.get(k), dict)), None)
    args = content.get('args')
    facts = (content.get('facts') if key else None) or {'arch': content.get('arch') if key else None}
    return Checkpoint(
        path,
        clean_state_dict(content[key] if key else content),
        args=vars(args) if isinstance(args, argparse.Namespace) else {},
        epoch=content.get('epoch') if key else None,
        metric=content.get('metric') if key else None,
        **facts,
        ema=key in ('state_dict_ema', 'model_ema') if key else None,
    )


def _resolve_origin(checkpoint: Checkpoint) -> None:
    """Name the architecture, and take over the preprocessing of published weights that the run began with.

    Such a run has noted 'arch.tag' or 'hf-hub:org/name' as its architecture.
    """
    model_args: Dict[str, Any] = {}
    try:
        source, name = parse_model_name(checkpoint.arch)
        if source is not None:
            load = load_model_config_from_hf if source == 'hf-hub' else load_model_config_from_path
            cfg, name, model_args = load(name)
        else:
            named = get_pretrained_cfg(name) if '.' in name or checkpoint.args.get('pretrained') else None
            cfg = named.to_dict() if named is not None else {}
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        reason = str(e).split('\n')[0]
        raise PSTError(
            f'{checkpoint.path} was trained from {checkpoint.arch}, which cannot be looked up ({reason}).') from e
    checkpoint.arch = split_model_name_tag(name)[0]
    # the run may have had other classes and channels
    kept = {k: v for k, v in model_args.items() if k not in ('num_classes', 'in_chans', 'global_pool')}
    checkpoint.model_args = {**kept, **checkpoint.model_args}
    checkpoint.pretrained_cfg = {**{k: cfg[k] for k in DATA_KEYS if k in cfg}, **checkpoint.pretrained_cfg}


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
