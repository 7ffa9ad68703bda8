"""torchvision's FCOS and RetinaNet over a pyramid of ours, or of torchvision, on any timm trunk.

Heads, losses, anchors, box transforms and NMS are torchvision's. What is here: which levels of a trunk are taken, the
neck over them, anchors that follow the levels, and full precision where boxes are reckoned with.
"""
import re
from collections import OrderedDict
from functools import partial
from itertools import pairwise
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple, Union

import timm
import torch
import torch.nn as nn
from timm.layers import to_2tuple
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

from pst_timm.checkpoints import create_model
from pst_timm.layers import PANPyramid, PSTPyramid, PyramidSparseAttention
from pst_timm.models import PSTModel
from pst_timm.models.settings import AttentionSettings
from pst_timm.utils.errors import PSTError, did_you_mean

__all__ = ['KINDS', 'NECKS', 'Detector', 'create_detector']

KINDS = ('fcos', 'retinanet', 'retinanet_v2')
NECKS = ('pst', 'pan', 'fpn')
HEAD_CONVS = 4  # of torchvision's heads; RetinaNet's has no other number
GROUPS = 32  # of the group norms in the heads
WRAPPERS = ('model', 'body', 'trunk')  # modules that hold the trunk itself, in feature extractors and models with PST


class PyramidTrunk(nn.Module):
    """A trunk and a neck: images (B, 3, H, W) to an ordered dict of maps of the same width, finest first."""

    def __init__(self, trunk: nn.Module, neck: nn.Module, width: int, levels: Sequence[int], channels_last: bool):
        """
        Args:
            trunk: Feature extractor, gives a list of maps.
            neck: Pyramid over an ordered dict of them.
            width: Channels of the neck's maps.
            levels: Strides of the trunk's maps.
            channels_last: Whether the trunk's maps are (B, H, W, C).
        """
        super().__init__()
        self.trunk = trunk
        self.neck = neck
        self.out_channels = width  # torchvision's name
        self.levels = tuple(levels)
        self.channels_last = channels_last

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        maps = self.trunk(x)
        if self.channels_last:
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        return self.neck(OrderedDict((str(i), m) for i, m in enumerate(maps)))


class FloatAnchors(AnchorGenerator):
    """Anchors in full precision, whatever that of the maps: bfloat16 counts pixels beyond 256 in twos."""

    def forward(self, image_list: ImageList, feature_maps: List[torch.Tensor]) -> List[torch.Tensor]:
        # sizes and device alone are read of the maps
        return super().forward(image_list, [m[:1, :1].float() for m in feature_maps])


class FloatFCOSHead(FCOSHead):
    """torchvision's head with outputs in full precision, for losses and boxes."""

    def forward(self, x: List[torch.Tensor]) -> Dict[str, torch.Tensor]:
        return {k: v.float() for k, v in super().forward(x).items()}


class FloatRetinaNetHead(RetinaNetHead):
    """torchvision's head with outputs in full precision, for losses and boxes."""

    def forward(self, x: List[torch.Tensor]) -> Dict[str, torch.Tensor]:
        return {k: v.float() for k, v in super().forward(x).items()}


class Detector(AttentionSettings, nn.Module):
    """What the detectors here have beside torchvision's interface; made by `create_detector`.

    Called as torchvision's are: with a list of images (3, H, W) in [0, 1] and, in training, a list of targets with
    `boxes` (n, 4) in pixels and `labels` (n,) from 0 on. In training it gives a dict of losses and takes images in the
    size they have; in evaluation it brings their longer side to `img_size` and gives a dict of `boxes`, `labels` and
    `scores` for each image, in pixels of the image as it was given.
    """
    arguments: Dict[str, Any]
    """Arguments of `create_detector` that make the same detector again, plain values."""
    pretrained_cfg: Dict[str, Any]
    """Mean and standard deviation of the pixels, image size, and names of the classes as `label_names`."""
    num_classes: int
    img_size: int

    @property
    def class_names(self) -> List[str]:
        """Names of the classes in the order of the labels; empty where they are not known."""
        return list(self.pretrained_cfg.get('label_names') or ())

    @property
    def strides(self) -> Tuple[int, ...]:
        """Strides of the maps that the heads read."""
        return level_strides(self.backbone.levels, self.arguments['extra_levels'])

    def attentions(self) -> List[PyramidSparseAttention]:
        """The attention layers, those of a trunk with PST first."""
        return [m for m in self.modules() if isinstance(m, PyramidSparseAttention)]

    def tokens(self, img_size: Union[int, Tuple[int, int]]) -> int:
        """How many tokens the finest attention selects from, 0 without attention."""
        stride = 2 * self.backbone.levels[0]
        height, width = (-(-side // stride) for side in to_2tuple(img_size))
        return height * width if self.attentions() else 0

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations of trunk and neck in the backward pass, where they can."""
        for part in (self.backbone.trunk, self.backbone.neck):
            if hasattr(part, 'set_grad_checkpointing'):
                part.set_grad_checkpointing(enable)

    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Patterns that order the parameters trunk, neck, head.

        The trunk is the group of blocks, in the order of its modules: its stem is the first of them.
        """
        return dict(
            stem=rf'^backbone\.trunk\.(?:(?:{"|".join(WRAPPERS)})\.)*(?:stem|conv1|bn1|conv_stem|patch_embed)',
            blocks=r'^backbone\.trunk' if coarse else [
                (rf'^{re.escape(name)}(?:\.|$)', (i,)) for i, name in enumerate(self._trunk_parts())],
            neck=r'^backbone\.neck',
            head=r'^head',
        )

    def _trunk_parts(self) -> List[str]:
        """Names of the modules of the trunk in order: its children, and theirs where they are sequences or wrappers."""
        def parts(module: nn.Module, prefix: str) -> List[str]:
            found = []
            for name, child in module.named_children():
                if name in WRAPPERS or (isinstance(child, nn.Sequential) and len(child)):
                    inner = [f'{prefix}{name}.{n}' for n, _ in child.named_children()]
                    found += parts(child, f'{prefix}{name}.') if name in WRAPPERS else inner
                else:
                    found.append(f'{prefix}{name}')
            return found

        return parts(self.backbone.trunk, 'backbone.trunk.')

    def no_weight_decay(self) -> Set[str]:
        """Names of the gates, and of what the trunk keeps from decay."""
        gates = {n for n, _ in self.named_parameters() if '.attn.gate.' in n}
        trunk = getattr(self.backbone.trunk, 'no_weight_decay', set)()
        return gates | {f'backbone.trunk.{n}' for n in trunk}


class FCOSDetector(Detector, FCOS):
    """FCOS over a pyramid."""


class RetinaNetDetector(Detector, RetinaNet):
    """RetinaNet over a pyramid."""


def create_detector(
        kind: str = 'fcos',
        trunk: str = 'resnet18',
        neck: str = 'pst',
        *,
        num_classes: int,
        neck_width: int = 128,
        levels: Sequence[int] = (8, 16, 32),
        extra_levels: int = 2,
        head_convs: int = HEAD_CONVS,
        img_size: int = 320,
        topk: int = 0,
        fine_fusion: str = 'gate',
        train_topk: int = 0,
        train_fine_prob: float = 1.,
        neck_kwargs: Optional[Mapping[str, Any]] = None,
        trunk_kwargs: Optional[Mapping[str, Any]] = None,
        pretrained_trunk: bool = False,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.6,
        detections_per_img: int = 100,
        topk_candidates: int = 1000,
        mean: Optional[Sequence[float]] = None,
        std: Optional[Sequence[float]] = None,
        class_names: Optional[Sequence[str]] = None,
) -> Detector:
    """A detector with fresh weights in neck and heads.

    Args:
        kind: 'fcos'; 'retinanet'; or 'retinanet_v2', with group norm in its heads and the GIoU loss.
        trunk: Name of a timm model, with or without a tag of published weights.
        neck: 'pst' or 'pan', see `pst_timm.layers`; or 'fpn', torchvision's.
        num_classes: Number of classes; there is none for the background.
        neck_width: Channels of neck and heads.
        levels: Strides of the trunk's maps, finest first, each twice the one before.
        extra_levels: Coarser maps made of the last one: 0, 1 (pooled) or 2 (convolved).
        head_convs: Convolutions of each head before the last; RetinaNet has 4.
        img_size: Longer side of the images at inference, in pixels.
        topk: Coarse tokens selected per image and head at inference, 0 for coarse attention alone.
        fine_fusion: How coarse and fine attention are combined, 'gate' or 'joint'.
        train_topk: Coarse tokens selected in training, 0 for coarse-only training.
        train_fine_prob: Share of the training steps in which the fine branch runs.
        neck_kwargs: More arguments of the neck.
        trunk_kwargs: More arguments of `timm.create_model` for the trunk.
        pretrained_trunk: Begin with the published weights of the trunk.
        score_thresh: Boxes of a lower score are left out.
        nms_thresh: Of two boxes of a class that overlap more, the better one stays.
        detections_per_img: Boxes in an image, at most.
        topk_candidates: Boxes of a level that are looked at, at most.
        mean: Mean of the pixels in [0, 1], from the trunk if None.
        std: Standard deviation, likewise.
        class_names: Names of the classes in the order of the labels.

    Raises:
        PSTError: If an argument does not fit; says which, and what was expected.
    """
    given = {k: v for k, v in locals().items() if k not in ('pretrained_trunk', 'mean', 'std', 'class_names')}
    _check_choice('detector', kind, KINDS)
    _check_choice('neck', neck, NECKS)
    levels = tuple(levels)
    neck_kwargs, trunk_kwargs = dict(neck_kwargs or {}), dict(trunk_kwargs or {})
    _check_numbers(kind, num_classes, neck_width, levels, extra_levels, head_convs, img_size)
    body, in_chs, cfg = _create_trunk(trunk, levels, trunk_kwargs, pretrained_trunk)
    fine = dict(topk=topk, fine_fusion=fine_fusion, train_topk=train_topk, train_fine_prob=train_fine_prob)
    pyramid = _create_neck(neck, in_chs, neck_width, extra_levels, fine, neck_kwargs)
    backbone = PyramidTrunk(body, pyramid, neck_width, levels, _gives_channels_last(body))

    strides = level_strides(levels, extra_levels)
    shared = dict(
        min_size=img_size,
        max_size=img_size,
        image_mean=list(mean or cfg['mean']),
        image_std=list(std or cfg['std']),
        size_divisible=max(32, levels[-1]),
        score_thresh=score_thresh,
        nms_thresh=nms_thresh,
        detections_per_img=detections_per_img,
        topk_candidates=topk_candidates,
        _skip_resize=True,  # in training, where the loader has chosen the size
    )
    if kind == 'fcos':
        anchors = FloatAnchors(tuple((s,) for s in strides), ((1.,),) * len(strides))
        head = FloatFCOSHead(neck_width, 1, num_classes, head_convs)
        model = FCOSDetector(backbone, num_classes, anchor_generator=anchors, head=head, **shared)
    else:
        sizes = tuple(tuple(int(4 * s * 2 ** (i / 3)) for i in range(3)) for s in strides)
        anchors = FloatAnchors(sizes, ((0.5, 1., 2.),) * len(strides))
        norm = partial(nn.GroupNorm, GROUPS) if kind == 'retinanet_v2' else None
        head = FloatRetinaNetHead(neck_width, anchors.num_anchors_per_location()[0], num_classes, norm_layer=norm)
        if kind == 'retinanet_v2':
            head.regression_head._loss_type = 'giou'  # as torchvision's own v2 sets it
        model = RetinaNetDetector(backbone, num_classes, anchor_generator=anchors, head=head, **shared)

    # a trunk with PST takes part in the settings of the neck
    for attn in model.attentions():
        attn.set_topk(topk, fine_fusion)
    model.arguments = dict(
        given, levels=list(levels), neck_kwargs=neck_kwargs, trunk_kwargs=trunk_kwargs)
    model.num_classes, model.img_size = num_classes, img_size
    model.pretrained_cfg = dict(
        input_size=[3, img_size, img_size], mean=shared['image_mean'], std=shared['image_std'],
        num_classes=num_classes, **(dict(label_names=list(class_names)) if class_names else {}))
    return model


def level_strides(levels: Sequence[int], extra_levels: int) -> Tuple[int, ...]:
    """Strides of all maps that the heads read, from those of the trunk."""
    return (*levels, *(levels[-1] * 2 ** (i + 1) for i in range(extra_levels)))


def _check_choice(what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise PSTError(f'Unknown {what} {value!r}.{did_you_mean(str(value), known)} There are {", ".join(known)}.')


def _check_numbers(
        kind: str,
        num_classes: int,
        neck_width: int,
        levels: Sequence[int],
        extra_levels: int,
        head_convs: int,
        img_size: int,
) -> None:
    if num_classes < 1:
        raise PSTError(f'A detector needs one class or more, got num_classes={num_classes}.')
    if not 2 <= len(levels) <= 4 or any(b != 2 * a for a, b in pairwise(levels)):
        raise PSTError(f'levels must be two to four strides, each twice the one before, such as 8 16 32; got '
                       f'{" ".join(map(str, levels))}.')
    if extra_levels not in (0, 1, 2):
        raise PSTError(f'extra_levels must be 0, 1 or 2, got {extra_levels}.')
    # a group of one channel is one value on a map of 1x1, which torch refuses to normalise
    if kind != 'retinanet' and (neck_width % GROUPS or neck_width == GROUPS):
        raise PSTError(f'The heads of {kind} have group norms of {GROUPS} groups: neck_width must be a multiple of '
                       f'{GROUPS} above it, got {neck_width}.')
    if kind != 'fcos' and head_convs != HEAD_CONVS:
        raise PSTError(f"torchvision's RetinaNet has {HEAD_CONVS} convolutions in each head, got "
                       f'head_convs={head_convs}: leave it out, or use fcos.')
    if img_size < levels[-1]:
        raise PSTError(f'img_size={img_size} is less than the largest stride, {levels[-1]}.')


def _create_trunk(
        name: str,
        levels: Sequence[int],
        kwargs: Dict[str, Any],
        pretrained: bool,
) -> Tuple[nn.Module, List[int], Dict[str, Any]]:
    """The feature extractor, the channels of its maps, and its preprocessing."""
    for key in ('features_only', 'out_indices', 'num_classes', 'pretrained', 'in_chans'):
        if key in kwargs:
            raise PSTError(f'The trunk of a detector cannot be given {key}: leave it out.')
    try:
        with torch.device('meta'):
            shape = create_model(name, features_only=True, **kwargs)
    except PSTError as e:
        if timm.is_model(name.split('.')[0]) and 'weights' not in str(e):
            raise PSTError(f'{name} is no trunk for a detector: timm makes no feature maps of it with these arguments '
                           f'({str(e).rstrip(".")}). Choose another trunk.') from e
        raise
    # the last of each stride
    found = {entry['reduction']: i for i, entry in enumerate(_all_levels(shape.feature_info))}
    missing = [s for s in levels if s not in found]
    if missing:
        raise PSTError(
            f'{name} has no maps of stride {", ".join(map(str, missing))}, it has those of stride '
            f'{", ".join(map(str, sorted(found)))}: choose other levels, or another trunk.')
    _check_sizes(name, shape.eval(), levels[-1])
    if pretrained and isinstance(getattr(shape, 'model', shape), PSTModel) and not re.search('[.:]', name):
        # a model with PST has weights of ImageNet in its trunk alone, unless a tag or a repository is named
        pretrained, kwargs = False, dict(kwargs, pretrained_trunk=True)
    body = create_model(
        name, pretrained=pretrained, features_only=True, out_indices=tuple(found[s] for s in levels), **kwargs)
    cfg = {**_cfg_of(name), **{k: v for k, v in (getattr(body, 'pretrained_cfg', None) or {}).items() if v}}
    return body, list(body.feature_info.channels()), cfg


def _check_sizes(name: str, shape: nn.Module, stride: int) -> None:
    """Make sure that a trunk on the meta device takes images that are not square, and of another size than its own."""
    try:
        shape(torch.zeros(1, 3, 3 * stride, 2 * stride, device='meta'))
    except NotImplementedError:  # needs numbers to run
        return
    except (AssertionError, RuntimeError, ValueError) as e:
        raise PSTError(
            f'{name} does not take images of any size, as a trunk of a detector has to '
            f'({" ".join(str(e).split())[:200].rstrip(".")}): choose another trunk, or give it what lifts that with '
            f'--trunk-kwargs, such as strict_img_size=False for Swin.') from e


def _all_levels(info: Any) -> List[Dict[str, Any]]:
    """What timm knows of every map of a trunk, whether it was asked for or not."""
    return [entry if isinstance(entry, dict) else vars(entry) for entry in info.info]


def _cfg_of(name: str) -> Dict[str, Any]:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.models import get_pretrained_cfg

    cfg = None if ':' in name else get_pretrained_cfg(name)
    found = cfg.to_dict() if cfg is not None else {}
    return dict(mean=found.get('mean') or IMAGENET_DEFAULT_MEAN, std=found.get('std') or IMAGENET_DEFAULT_STD)


def _gives_channels_last(trunk: nn.Module) -> bool:
    return str(getattr(trunk, 'output_fmt', 'NCHW')).endswith('NHWC')


def _create_neck(
        kind: str,
        in_chs: Sequence[int],
        width: int,
        extra_levels: int,
        fine: Dict[str, Any],
        kwargs: Dict[str, Any],
) -> nn.Module:
    try:
        if kind == 'fpn':
            extra = {0: None, 1: LastLevelMaxPool(), 2: LastLevelP6P7(width, width)}[extra_levels]
            return FeaturePyramidNetwork(list(in_chs), width, extra, **kwargs)
        kwargs = dict(kwargs, extra_levels='pool' if extra_levels == 1 else extra_levels)
        return PANPyramid(in_chs, width, **kwargs) if kind == 'pan' else PSTPyramid(in_chs, width, **fine, **kwargs)
    except (TypeError, ValueError, AssertionError) as e:
        raise PSTError(f'Cannot make the neck {kind} of width {width}: {e}') from e
