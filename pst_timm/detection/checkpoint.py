"""From a checkpoint to a detector and back: its arguments are plain data, and what a file says is checked first.

Also where a detector begins: with the weights of another one, or with the trunk of a classifier.
"""
import inspect
import logging
import os
from typing import Any, Dict, List, Mapping, Optional, Union

import torch
import torch.nn as nn

from pst_timm.checkpoints import Checkpoint, create_model, load_trunk, load_weights, read_checkpoint
from pst_timm.checkpoints.facts import as_plain, set_attention
from pst_timm.checkpoints.reading import PathLike, is_file
from pst_timm.checkpoints.rules import Unfit, each, either, flag, mapping, printable, real, short, text, whole
from pst_timm.checkpoints.trust import check_origin
from pst_timm.layers import PANPyramid, PSTPyramid, PyramidSparseAttention, PyramidSparseTransformer
from pst_timm.layers.module import PyramidSparseBlock
from pst_timm.models import PSTModel
from pst_timm.utils.devices import check_device
from pst_timm.utils.errors import PSTError
from pst_timm.utils.fitting import COUNTER, check_fit

from .models import Detector, create_detector

__all__ = ['check_stored', 'describe', 'load_initial', 'load_trunk_weights', 'open_detector']

_logger = logging.getLogger(__name__)

TRUNK = 'backbone.trunk.'
# what tells the classes apart in the heads
CLASSES = 'head.classification_head.cls_logits.'
# of the arguments of a neck, those that are not for a file to say
FIXED = {'self', 'in_chs', 'upper_chs', 'out_chs', 'dim', 'num_heads', 'extra_levels', 'device', 'dtype'}
MOST_DEPTH = 64  # blocks of a neck that a file describes
MOST_POOL = 64  # side of the squares of keys that it averages
WRAPPERS = ('', TRUNK, 'trunk.', 'body.', 'backbone.', 'model.')  # before the names of a trunk within another model


def describe(model: Detector) -> Dict[str, Any]:
    """The facts of a detector for its checkpoints, as plain values."""
    arguments = {**model.arguments, **model.inference_settings()}
    return dict(detector=as_plain(arguments), pretrained_cfg=as_plain(model.pretrained_cfg))


def open_detector(
        source: PathLike,
        use_ema: Optional[bool] = None,
        topk: Optional[int] = None,
        fine_fusion: Optional[str] = None,
        device: Union[str, torch.device] = '',
        **settings: Any,
) -> Detector:
    """A trained detector, with its weights, the names of its classes and its image size.

    Args:
        source: What `pst_timm.checkpoints.read_checkpoint` reads: a checkpoint, or the folder of a run.
        use_ema: Whether to take the moving average; None takes it where there is one.
        topk: Coarse tokens to select, as it was trained if None.
        fine_fusion: 'gate' or 'joint', likewise.
        device: Where it is to be, the best there is if empty.
        settings: `img_size`, `score_thresh`, `nms_thresh` or `detections_per_img`, instead of those it was trained
            with; None where they stay.

    Returns:
        The detector in eval mode; `class_names`, `img_size`, `arguments` and `pretrained_cfg` tell about it, and
        `checkpoint_ema` whether its weights are the moving average.

    Raises:
        PSTError: If the source is no detector, is damaged, or says of itself what cannot be.
    """
    checkpoint = read_checkpoint(source, use_ema)
    if not checkpoint.detector:
        what = f'a classifier ({short(checkpoint.arch)})' if checkpoint.arch else 'weights that it tells nothing about'
        raise PSTError(
            f'{checkpoint.path} holds {what}, no object detector: name a checkpoint that pst-timm detect train wrote.')
    arguments = _checked_arguments(checkpoint.detector, checkpoint.weights, checkpoint.path)
    arguments.update({k: v for k, v in settings.items() if v is not None})
    cfg = checkpoint.pretrained_cfg
    arguments.update(mean=_channels(cfg.get('mean')), std=_channels(cfg.get('std')), class_names=_names(checkpoint))
    hint = 'It was made with other arguments than the checkpoint tells.'
    fit = f'{checkpoint.path} is not a checkpoint of the detector that it describes'
    try:
        with torch.device('meta'):  # before anything is made that could be larger than memory
            plan = create_detector(**arguments)
        check_fit(plan.state_dict(), checkpoint.weights, fit, hint)
        model = create_detector(**arguments)
    except PSTError as e:
        raise e if str(e).startswith(str(checkpoint.path)) else PSTError(f'{checkpoint.path}: {e}') from None
    except Exception as e:  # whatever arguments may lead to that nobody foresaw
        reason = printable((str(e).splitlines() or [type(e).__name__])[0][:300])
        raise PSTError(f'{checkpoint.path} describes no detector that can be made ({reason}).') from e
    load_weights(model, checkpoint.weights, fit, hint)
    if topk is not None or fine_fusion is not None:
        if not model.attentions() and (topk or fine_fusion is not None):
            raise PSTError(
                f'{checkpoint.path} holds a detector without attention (neck {model.arguments["neck"]}): leave out '
                f'topk and fine_fusion.')
        set_attention(model, topk, fine_fusion)
    model.checkpoint_ema = checkpoint.ema
    return model.to(check_device(device) if isinstance(device, str) else device).eval()


def check_stored(model: Detector) -> None:
    """Make sure, before a training, that its checkpoints can be opened again: a file may not say all that a user may.

    Raises:
        PSTError: If an argument of trunk or neck is none that a file may give.
    """
    try:
        _checked_arguments(describe(model)['detector'], model.state_dict(), 'Its file')
    except PSTError as e:
        raise PSTError(
            f'A checkpoint of this detector could not be opened again. {str(e).rstrip(".")}: leave that out of '
            f'--trunk-kwargs or --neck-kwargs.') from None


def _checked_arguments(
        detector: Mapping[str, Any],
        weights: Mapping[str, torch.Tensor],
        path: PathLike,
) -> Dict[str, Any]:
    """Arguments of `create_detector` that a file tells, each as far as a file may give it."""
    told = dict(detector)
    missing = [k for k in ('kind', 'trunk', 'neck', 'num_classes') if k not in told]
    if missing:
        raise PSTError(f'{path} does not tell the {missing[0]} of its detector: use another file.')
    told['trunk'], told['trunk_kwargs'] = check_origin(path, told['trunk'], told.get('trunk_kwargs') or {}, weights)
    try:
        told['neck_kwargs'] = mapping(_neck_rules(told['neck']), _refuse)(told.get('neck_kwargs') or {})
    except Unfit as e:
        raise PSTError(
            f'{path}: what it tells about its neck is garbled at {short(".".join(e.path))}: expected '
            f'{e.expected}. Use another file.') from None
    return told


def _neck_rules(neck: str) -> Dict[str, Any]:
    """Rules for what a file may give to a neck: numbers, words and switches under the names that it has."""
    classes = {
        'pst': (PSTPyramid, PyramidSparseTransformer, PyramidSparseBlock, PyramidSparseAttention),
        'pan': (PANPyramid,),
        'fpn': (),
    }[neck]
    names = {n for cls in classes for n, p in inspect.signature(cls).parameters.items() if p.kind is not p.VAR_KEYWORD}
    rule = either(flag, either(real(0, MOST_DEPTH), text(50, r'\w*')))
    others = {'head_dim': real(0, 4096), 'kv_pool': either(whole(1, MOST_POOL), each(whole(1, MOST_POOL), 1, 3))}
    return {n: real(0, 1e6) if n.endswith('topk') else others.get(n, rule) for n in names - FIXED}


def _refuse(value: Any) -> Any:
    raise Unfit('an argument that this neck has')


def _channels(values: Any) -> Optional[List[float]]:
    """Three values, of a mean or standard deviation that a file tells as one or three; None where it does not."""
    if values is None:
        return None
    values = list(values) if isinstance(values, (list, tuple)) else [values]
    return values * 3 if len(values) == 1 else values[:3] if len(values) == 3 else None


def _names(checkpoint: Checkpoint) -> List[str]:
    """Names of the classes, numbers where the file has none for each."""
    count = checkpoint.detector['num_classes']
    names = [str(n) for n in checkpoint.pretrained_cfg.get('label_names') or ()]
    return names if len(names) == count else [str(i) for i in range(count)]


def load_initial(model: Detector, source: PathLike, use_ema: Optional[bool] = None) -> None:
    """Load the weights of another detector; what tells the classes keeps its fresh weights where there are others.

    Args:
        model: The detector.
        source: What `read_checkpoint` reads.
        use_ema: See `read_checkpoint`.

    Raises:
        PSTError: If there is none, or anything else does not fit; nothing is changed then.
    """
    weights, own = dict(read_checkpoint(source, use_ema).weights), model.state_dict()
    fresh = [k for k in weights if k.startswith(CLASSES) and k in own and own[k].shape != weights[k].shape]
    for key in fresh:
        del weights[key]
    if fresh:
        _logger.info(f'{source} is for another number of classes: {", ".join(fresh)} start anew.')
    load_weights(
        model, weights, f'--initial-checkpoint: {source} is of another detector',
        'Check --detector, --trunk, --neck and --neck-width.', optional=fresh)


def load_trunk_weights(model: Detector, source: PathLike, use_ema: Optional[bool] = None) -> List[str]:
    """Load the trunk of a classifier, or of another detector, into a detector.

    Everything is compared before anything is copied.

    Args:
        model: The detector.
        source: A timm model name with published weights, or what `read_checkpoint` reads; a model with PST may give its
            trunk to a plain one.
        use_ema: See `read_checkpoint`.

    Returns:
        Names of the tensors of the source that have no place in the trunk.

    Raises:
        PSTError: If the source cannot be read, or is of another trunk; names the first tensor that differs.
    """
    where = f'--trunk-checkpoint {source}'
    trunk = model.backbone.trunk
    try:
        if is_file(source):
            weights = read_checkpoint(source, use_ema).weights
        else:
            weights = create_model(os.fspath(source), pretrained=True).state_dict()
        if isinstance(getattr(trunk, 'model', trunk), PSTModel) and not any('.attn.pe.' in k for k in weights):
            ignored = load_trunk(trunk, weights).ignored
        else:
            weights, ignored = _match(trunk, weights, model.arguments)
            trunk.load_state_dict(weights, strict=False)
    except (ValueError, RuntimeError, OSError) as e:
        raise (type(e) if isinstance(e, PSTError) else PSTError)(f'{where}: {e}') from e
    _logger.info(f'Trunk from {source}: {len(trunk.state_dict())} tensors, {len(ignored)} of the source have no place.')
    return ignored


def _match(
        trunk: nn.Module,
        weights: Dict[str, torch.Tensor],
        arguments: Dict[str, Any],
) -> tuple:
    """Weights under the names of a feature extractor, which timm changes, and the names of what is left over."""
    own = trunk.state_dict()
    name = arguments['trunk']
    wanted = {_plain_name(k): k for k in own}
    # a trunk within another model has its names behind that of the module
    prefix = max(WRAPPERS, key=lambda p: sum(_plain_name(k[len(p):]) in wanted for k in weights if k.startswith(p)))
    source = {k[len(prefix):]: v for k, v in weights.items() if k.startswith(prefix)}
    offered = {_plain_name(k): k for k in source}
    missing = [k for n, k in wanted.items() if n not in offered and not k.endswith(COUNTER)]
    if missing:
        raise PSTError(
            f'The source is not a {name}: the trunk has {missing[0]}, which the source has not ({len(missing)} of '
            f'{len(own)} tensors are missing). Use weights of the same model.')
    with torch.device('meta'):
        whole = {_plain_name(k) for k in create_model(name, **arguments['trunk_kwargs']).state_dict()}
    tops = {k.split('.')[0] for k in _module_names(trunk)}
    surplus = [k for n, k in offered.items()
               if n not in wanted and n not in whole and k.split('.')[0] in tops]
    if surplus:
        raise PSTError(
            f'The source is not a {name}: it has {printable(surplus[0][:200])}, which the trunk has not '
            f'({len(surplus)} tensors too many). Use weights of the same model.')
    matched = {k: source[offered[n]] for n, k in wanted.items() if n in offered}
    for k, v in matched.items():
        if v.shape != own[k].shape or v.is_floating_point() != own[k].is_floating_point():
            raise PSTError(
                f'The source is not a {name}: {k} is {tuple(v.shape)} of {v.dtype} in the source and '
                f'{tuple(own[k].shape)} of {own[k].dtype} in the trunk. Use weights of the same width.')
    taken = {prefix + offered[n] for n in wanted if n in offered}
    return matched, [k for k in weights if k not in taken]


def _module_names(trunk: nn.Module) -> List[str]:
    """Names of the tensors of a feature extractor as the model itself has them."""
    names = [k.removeprefix('model.').removeprefix('body.') for k in trunk.state_dict()]
    # 'stages_0' of the extractor is 'stages.0' of the model
    flat = {n for n, m in trunk.named_children() if n.rpartition('_')[2].isdigit()}
    return [k.split('.')[0].rpartition('_')[0] if k.split('.')[0] in flat else k for k in names]


def _plain_name(key: str) -> str:
    return key.removeprefix('model.').removeprefix('body.').replace('.', '_')
