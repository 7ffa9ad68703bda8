"""From a checkpoint, or whatever else names a model, to the model with its weights and preprocessing."""
from pathlib import Path
from typing import Any, Dict, List, Optional

import timm
import torch
import torch.nn as nn
from timm.data import resolve_input_data_config
from timm.models import get_pretrained_cfg_value

from pst_timm.models.digest import check_digest, drop_digest
from pst_timm.utils.errors import PSTError, did_you_mean

from .reading import Checkpoint, PathLike, read_checkpoint


def data_config(checkpoint: Checkpoint, model: nn.Module) -> Dict[str, Any]:
    """Preprocessing that the weights were validated with: that of the run, where it differs from the model's own."""
    try:
        return resolve_input_data_config(model, args=checkpoint.args)
    except ValueError as e:
        raise PSTError(f'The arguments in {checkpoint.path} do not fit its weights: {e}') from e


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
        PSTError: If the architecture is unknown, or the weights are those of another one.
    """
    arch, weights = checkpoint.arch, checkpoint.weights
    if not arch or not timm.is_model(arch):
        raise PSTError(
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
        raise PSTError(f'{checkpoint.path}: cannot create {arch} with {kwargs}: {e}') from e
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
        raise PSTError(f'{checkpoint.path}: {e}') from None
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
    raise PSTError(
        f'{checkpoint.path} is not a checkpoint of {checkpoint.arch}: {"; ".join(found)}. It was made by another '
        f'architecture, or with other arguments than the checkpoint tells.')


def load_model(source: PathLike, **model_kwargs: Any) -> nn.Module:
    """Build a model with its weights from whatever holds them.

    Args:
        source: A timm model name (random weights unless `pretrained=True` is passed), 'hf-hub:org/name',
            'local-dir:path', or what `read_checkpoint` reads.
        model_kwargs: Passed to `timm.create_model`.

    Raises:
        PSTError: If the source is none of these, or does not hold a model.
    """
    path = Path(source)
    if path.exists():
        return build_model(read_checkpoint(path), **model_kwargs)
    source = str(source)
    if source.startswith(('local-dir:', 'hf-hub:', 'hf_hub:')):
        return timm.create_model(source, pretrained=True, **model_kwargs)
    if not timm.is_model(source.split('.')[0]):
        raise PSTError(f'{source!r} is neither a model, a file nor a folder.{did_you_mean(source, timm.list_models())}')
    return timm.create_model(source, **model_kwargs)


def label_names(model: nn.Module) -> list:
    """Names of a classifier's classes in the order of its outputs; empty where they are not known."""
    known = list(model.pretrained_cfg.get('label_names') or ())
    # a classifier that was replaced has other classes
    return known if len(known) == model.num_classes else []
