"""From whatever holds a trained model to weights, what is known about them, and the model; no code in it is run."""
import argparse
import json
import logging
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Union

import timm
import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.data import resolve_input_data_config
from timm.models import (
    clean_state_dict,
    get_pretrained_cfg,
    get_pretrained_cfg_value,
    load_model_config_from_hf,
    parse_model_name,
    split_model_name_tag,
)
from timm.models._hub import load_model_config_from_path  # timm exports it from here alone

from pst_timm.models.digest import check_digest, drop_digest

from .errors import HubError, did_you_mean

__all__ = [
    'HEADER_KEY', 'Checkpoint', 'attention_settings', 'build_model', 'check_finite', 'data_config', 'load_model',
    'read_checkpoint', 'write_whole',
]

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
    epoch: Optional[int] = None
    metric: Optional[float] = None
    """Value of the run's evaluation metric at that epoch."""
    ema: Optional[bool] = None
    """Whether the weights are the moving average; None if the file does not tell."""

    def facts(self) -> Dict[str, Any]:
        """All but path and weights, fit for JSON."""
        facts = {k: v for k, v in vars(self).items() if k not in ('path', 'weights') and v not in (None, {})}
        return json.loads(json.dumps(facts, default=str))


def read_checkpoint(path: PathLike, use_ema: bool = True) -> Checkpoint:
    """Read weights and what is known about them.

    Args:
        path: Folder of a training run (its best checkpoint), training checkpoint, .safetensors file, or folder with
            timm's config.json.
        use_ema: Whether to take the moving average of a training checkpoint, if there is one.

    Raises:
        HubError: If there is no such thing, it is damaged, or it holds more than tensors and plain values.
    """
    path = _find_file(Path(path))
    checkpoint = _read_safetensors(path) if path.suffix == '.safetensors' else _read_pickle(path, use_ema)
    if not checkpoint.weights or not all(isinstance(v, torch.Tensor) for v in checkpoint.weights.values()):
        raise HubError(f'{path} holds no weights: a mapping of names to tensors was expected.')
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
            raise HubError(
                f'{path} has neither config.json with model.safetensors nor a checkpoint of a training run '
                f'({", ".join(PREFERRED)}): name the file itself.')
        return found[0]
    if not path.is_file():
        raise HubError(f'There is no checkpoint {path}.')
    if path.suffix not in ('.safetensors', *PICKLES):
        raise HubError(f'{path} is not a checkpoint: expected .safetensors, {", ".join(PICKLES)}, or a folder.')
    return path


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        with safe_open(path, 'pt') as file:
            header = file.metadata() or {}
        weights = load_file(path)
        facts = json.loads(header.get(HEADER_KEY, '{}'))
        checkpoint = Checkpoint(path, weights, **facts)
    except (SafetensorError, OSError, TypeError, ValueError) as e:
        raise HubError(f'{path} is truncated or not a safetensors file ({e}): fetch or write it again.') from None
    if checkpoint.arch is None and (path.parent / 'config.json').is_file():
        try:
            cfg, checkpoint.arch, checkpoint.model_args = load_model_config_from_path(path.parent)
        except (OSError, ValueError, KeyError) as e:
            raise HubError(f'{path.parent / "config.json"} is not a config.json of timm ({e!r}).') from None
        checkpoint.pretrained_cfg = {k: v for k, v in cfg.items() if k not in ('file', 'source')}
    return checkpoint


def _read_pickle(path: Path, use_ema: bool) -> Checkpoint:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:  # whatever a damaged or malicious file may raise
        reason = str(e).split('\n')[0]
        raise HubError(
            f'{path} cannot be read as a checkpoint: it is damaged, or holds more than tensors and plain values, so '
            f'that loading it could run code ({reason}). Nothing in it was run. Use another file.') from None
    if not isinstance(content, dict):
        raise HubError(f'{path} holds a {type(content).__name__}, no checkpoint or state dict.')
    keys = [k for k in ('state_dict_ema', 'model_ema') if use_ema] + ['state_dict', 'model']
    key = next((k for k in keys if isinstance(content.get(k), dict)), None)
    args = content.get('args')
    return Checkpoint(
        path,
        clean_state_dict(content[key] if key else content),
        arch=content.get('arch') if key else None,
        args=vars(args) if isinstance(args, argparse.Namespace) else {},
        epoch=content.get('epoch') if key else None,
        metric=content.get('metric') if key else None,
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
        raise HubError(
            f'{checkpoint.path} was trained from {checkpoint.arch}, which cannot be looked up ({reason}).') from e
    checkpoint.arch = split_model_name_tag(name)[0]
    # the run may have had other classes and channels
    kept = {k: v for k, v in model_args.items() if k not in ('num_classes', 'in_chans', 'global_pool')}
    checkpoint.model_args = {**kept, **checkpoint.model_args}
    checkpoint.pretrained_cfg = {**{k: cfg[k] for k in DATA_KEYS if k in cfg}, **checkpoint.pretrained_cfg}


def check_finite(checkpoint: Checkpoint) -> None:
    """Make sure that all weights are numbers.

    Raises:
        HubError: If a weight is NaN or infinite; names the first tensor.
    """
    broken = [k for k, v in checkpoint.weights.items() if not torch.isfinite(v).all()]
    if broken:
        raise HubError(
            f'{checkpoint.path} has NaN or infinite weights in {len(broken)} tensors, the first is {broken[0]}: the '
            f'training diverged. Use an earlier checkpoint.')


def data_config(checkpoint: Checkpoint, model: nn.Module) -> Dict[str, Any]:
    """Preprocessing that the weights were validated with: that of the run, where it differs from the model's own."""
    try:
        return resolve_input_data_config(model, args=checkpoint.args)
    except ValueError as e:
        raise HubError(f'The arguments in {checkpoint.path} do not fit its weights: {e}') from e


def attention_settings(model: nn.Module) -> Dict[str, Any]:
    """`topk` and `fine_fusion` that a model has now; 0 and None for one without sparse attention."""
    attention = next((m for m in model.modules() if hasattr(m, 'fine_fusion')), None)
    return {'topk': getattr(attention, 'topk', 0), 'fine_fusion': getattr(attention, 'fine_fusion', None)}


def build_model(checkpoint: Checkpoint, **model_kwargs: Any) -> nn.Module:
    """The model with its weights, class count, input channels and preprocessing.

    Args:
        checkpoint: From `read_checkpoint`.
        model_kwargs: Passed to `timm.create_model`, before what the checkpoint says.

    Raises:
        HubError: If the architecture is unknown, or the weights are those of another one.
    """
    arch, weights = checkpoint.arch, checkpoint.weights
    if not arch or not timm.is_model(arch):
        raise HubError(
            f'{checkpoint.path} does not name a known architecture (arch: {arch!r}). Use a training checkpoint, or a '
            f'.safetensors file beside its config.json.')
    kwargs = {
        'num_classes': _size(weights, get_pretrained_cfg_value(arch, 'classifier'), 0),
        'in_chans': _size(weights, get_pretrained_cfg_value(arch, 'first_conv'), 1),
        'global_pool': checkpoint.args.get('gp'),
        **checkpoint.model_args,
        **(checkpoint.args.get('model_kwargs') or {}),
        **model_kwargs,
    }
    try:
        model = timm.create_model(arch, **kwargs)
    except (TypeError, ValueError, RuntimeError) as e:
        raise HubError(f'{checkpoint.path}: cannot create {arch} with {kwargs}: {e}') from e
    _check_fit(checkpoint, model)
    model.load_state_dict(weights)
    cfg = {**model.pretrained_cfg, **checkpoint.pretrained_cfg}
    cfg.pop('tag', None)  # these are not the weights of that name
    model.pretrained_cfg = model.default_cfg = cfg
    size = tuple(cfg['input_size'])
    cfg.update(data_config(checkpoint, model), num_classes=model.num_classes)
    if tuple(cfg['input_size']) != size:
        cfg['pool_size'] = None
    try:
        check_digest(weights, model)
    except RuntimeError as e:
        raise HubError(f'{checkpoint.path}: {e}') from None
    drop_digest(model)
    return model.eval()


def _size(weights: Dict[str, torch.Tensor], layer: Optional[str], dim: int) -> Optional[int]:
    weight = weights.get(f'{layer}.weight')
    return weight.shape[dim] if weight is not None else None


def _check_fit(checkpoint: Checkpoint, model: nn.Module) -> None:
    own = model.state_dict()
    weights = checkpoint.weights
    missing = [k for k in own if k not in weights]
    surplus = [k for k in weights if k not in own]
    differ = [k for k in own if k in weights and own[k].shape != weights[k].shape]
    if not (missing or surplus or differ):
        return
    found: List[str] = []
    if missing:
        found.append(f'{len(missing)} tensors are missing (the first: {missing[0]})')
    if surplus:
        found.append(f'{len(surplus)} are unknown to it (the first: {surplus[0]})')
    if differ:
        found.append(
            f'{len(differ)} have another shape (the first: {differ[0]}, {tuple(weights[differ[0]].shape)} where '
            f'{tuple(own[differ[0]].shape)} was expected)')
    raise HubError(
        f'{checkpoint.path} is not a checkpoint of {checkpoint.arch}: {"; ".join(found)}. It was made by another '
        f'architecture, or with other arguments than the checkpoint tells.')


def load_model(source: PathLike, **model_kwargs: Any) -> nn.Module:
    """Build a model with its weights from whatever holds them.

    Args:
        source: A timm model name (random weights unless `pretrained=True` is passed), 'hf-hub:org/name',
            'local-dir:path', or what `read_checkpoint` reads.
        model_kwargs: Passed to `timm.create_model`.

    Raises:
        HubError: If the source is none of these, or does not hold a model.
    """
    path = Path(source)
    if path.exists():
        return build_model(read_checkpoint(path), **model_kwargs)
    source = str(source)
    if source.startswith(('local-dir:', 'hf-hub:', 'hf_hub:')):
        return timm.create_model(source, pretrained=True, **model_kwargs)
    if not timm.is_model(source.split('.')[0]):
        hint = did_you_mean(source, timm.list_models()) or '.'
        raise HubError(f'{source!r} is neither a model, a file nor a folder{hint}')
    return timm.create_model(source, **model_kwargs)


def write_whole(path: Path, write: Callable[[str], Any]) -> None:
    """Have a file written beside its place and moved there when it is complete.

    Args:
        path: The file.
        write: Called with the name to write to.

    Raises:
        HubError: If the file cannot be written; what was there before is untouched.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    except OSError as e:
        raise HubError(f'Cannot write {path}: {e.strerror}.') from None
    try:
        os.close(handle)
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as e:  # torch reports a full disk as a RuntimeError
        raise HubError(f'Cannot write {path}: {e}.') from e
    finally:
        Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
