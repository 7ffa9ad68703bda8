"""What a checkpoint knows of itself beside its weights, told when it is written and completed when it is read."""
import os
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple

import torch.nn as nn
from timm.models import get_pretrained_cfg, parse_model_name, split_model_name_tag

from pst_timm.models import PRETRAINED_TRUNK
from pst_timm.utils.errors import PSTError

from .fetching import fetch
from .reading import Checkpoint
from .trust import check_origin, read_model_config

__all__ = [
    'DATA_KEYS', 'as_plain', 'attention_settings', 'complete', 'describe', 'first_line', 'inference_settings',
    'look_up', 'resolve_origin', 'set_attention',
]

DATA_KEYS = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
# what a run gives a model by itself, whatever the weights it began with came with
OF_THE_RUN = ('num_classes', 'in_chans', 'global_pool')


def inference_settings(model: nn.Module) -> Dict[str, Any]:
    """The settings that a model has beside its weights, such as `topk`; empty for a model that offers none."""
    return dict(model.inference_settings()) if hasattr(model, 'inference_settings') else {}


def attention_settings(model: nn.Module) -> Dict[str, Any]:
    """`topk` and `fine_fusion` of a model; 0 and None for one without sparse attention."""
    return {'topk': 0, 'fine_fusion': None, **inference_settings(model)}


def set_attention(
        model: nn.Module,
        topk: Optional[int] = None,
        fine_fusion: Optional[str] = None,
        source: str = 'The model',
) -> None:
    """Set what is given of the attention of a model.

    Args:
        model: The model.
        topk: Coarse tokens that each head selects, 0 for none.
        fine_fusion: How fine attention is added: 'gate' or 'joint'.
        source: What the model is called, for messages.

    Raises:
        PSTError: If the model has no attention to set, or a value does not fit.
    """
    if topk is None and fine_fusion is None:
        return
    if not hasattr(model, 'set_topk'):
        if topk or fine_fusion is not None:
            raise PSTError(f'{source} has no fine attention to set: leave out topk and fine_fusion, or give topk 0.')
        return
    try:
        model.set_topk(attention_settings(model)['topk'] if topk is None else topk, fine_fusion)
    except ValueError as e:
        raise PSTError(str(e)) from None


def describe(
        model: nn.Module,
        name: str,
        model_kwargs: Dict[str, Any],
        data_config: Dict[str, Any],
        class_names: Optional[Sequence[str]] = None,
) -> Dict[str, Any]:
    """The facts of a model that is being trained, as plain values for its checkpoints.

    Args:
        model: The model.
        name: The name it was created by: an architecture, 'architecture.tag', 'hf-hub:org/name' or 'local-dir:path'.
        model_kwargs: Arguments it was created with, beside those that its weights tell.
        data_config: Preprocessing, from `timm.data.resolve_data_config`.
        class_names: Names of the classes in the order of the outputs, if known.

    Raises:
        PSTError: If the name cannot be looked up.
    """
    arch, origin_args, _ = look_up(name)
    cfg = {k: data_config[k] for k in DATA_KEYS if k in data_config}
    cfg['num_classes'] = model.num_classes
    if class_names:
        cfg['label_names'] = list(class_names)
    model_args = {
        **_kept(origin_args), **getattr(model, 'own_args', {}), **model_kwargs, **inference_settings(model)}
    model_args.pop(PRETRAINED_TRUNK, None)  # the checkpoint has weights of its own
    return dict(arch=arch, model_args=as_plain(model_args), pretrained_cfg=as_plain(cfg))


def look_up(
        name: str,
        pretrained: bool = False,
        cache_dir: Optional[os.PathLike] = None,
) -> Tuple[str, Dict[str, Any], Dict[str, Any]]:
    """Architecture, model arguments and configuration behind a model's name, which a user has typed.

    What the config.json of a repository or folder says is a stranger's word, and is checked as such.

    Args:
        name: Name of a model, 'hf-hub:org/name' or 'local-dir:path'.
        pretrained: Whether a name without a tag means its published weights.
        cache_dir: See `fetch`.

    Raises:
        PSTError: If they cannot be had, or are not what such a file may say.
    """
    try:
        source, plain = parse_model_name(name)
        if source == 'local-dir':
            cfg, arch, model_args = read_model_config(Path(plain))
            return arch, model_args, dict(cfg, source=source, file=plain)
        if source is not None:
            cfg, arch, model_args = read_model_config(fetch(plain, 'config.json', cache_dir).parent)
            return arch, model_args, dict(cfg, source=source, hf_hub_id=plain)
        named = get_pretrained_cfg(plain) if '.' in plain or pretrained else None
        return split_model_name_tag(plain)[0], {}, named.to_dict() if named is not None else {}
    except PSTError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError) as e:
        raise PSTError(f'{name} cannot be looked up ({first_line(e)}).') from e


def first_line(error: Exception) -> str:
    """What an exception says, without the further lines that the Hub's client has; its type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def resolve_origin(checkpoint: Checkpoint) -> None:
    """Complete what a checkpoint without facts of its own tells, from the published weights that its run began with.

    timm's script notes 'arch.tag' as the architecture of such a run, which is known here; or 'hf-hub:org/name', which
    is for the user to say.

    Raises:
        PSTError: If its architecture is none that is known here.
    """
    if not checkpoint.arch:
        return
    name = checkpoint.arch
    checkpoint.arch, _ = check_origin(checkpoint.path, name, {})
    if any(key in checkpoint.pretrained_cfg for key in DATA_KEYS):  # it told all itself
        return
    try:
        complete(checkpoint, *look_up(name, bool(checkpoint.args.get('pretrained'))))
    except PSTError as e:
        raise PSTError(f'{checkpoint.path} was trained from {e}') from e


def complete(checkpoint: Checkpoint, arch: str, model_args: Dict[str, Any], cfg: Dict[str, Any]) -> None:
    """Give a checkpoint the architecture, and what else it does not tell itself, of what was looked up."""
    checkpoint.arch = arch
    checkpoint.model_args = {**_kept(model_args), **checkpoint.model_args}
    checkpoint.pretrained_cfg = {**{k: cfg[k] for k in DATA_KEYS if k in cfg}, **checkpoint.pretrained_cfg}


def _kept(model_args: Dict[str, Any]) -> Dict[str, Any]:
    return {k: v for k, v in model_args.items() if k not in OF_THE_RUN}


def as_plain(value: Any) -> Any:
    """The same value made of plain ones alone: a checkpoint may hold no others."""
    if isinstance(value, dict):
        return {str(k): as_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
