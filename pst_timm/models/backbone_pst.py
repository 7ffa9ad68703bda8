"""PST over the last two levels of any timm model.

Paper: `Pyramid Sparse Transformer: Enhancing Multi-Scale Feature Fusion with Dynamic Token Selection`
    - https://arxiv.org/abs/2505.12772

The trunk is a timm model as it is, under the name `trunk`, without what follows its level at stride 32; what stands in
place of that is in `fusion.py`, the same as for the ResNets. The fusion is as wide as the trunk can bear, with at most
a tenth of the multiply-adds of the plain model (`fitting_width`), and the head as wide as that of the plain model.
"""
import copy
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple, Union

import timm
import torch
import torch.fx
import torch.nn as nn
from timm.layers import LayerType, get_notrace_functions, get_notrace_modules, to_2tuple
from timm.models import generate_default_cfgs, is_model_pretrained, register_model, split_model_name_tag
from torch.func import functional_call
from torchvision.models.feature_extraction import NodePathTracer

from pst_timm.utils.cost import count_gmacs
from pst_timm.utils.errors import did_you_mean

from .fusion import PSTModel, build_pst, pst_cfg
from .trunk import PRETRAINED_TRUNK, pretrained_name

__all__ = ['BackbonePST', 'create_pst', 'fitting_width']

MOST_ADDED = 0.1  # of the plain model's multiply-adds
WIDEST = 512
# what `timm.create_model` reads weights by; a config.json could name them
PLACES = {'cache_dir', 'checkpoint_path', 'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay'}
CROPPED = 80  # pixels: five tokens at stride 16, of which a trunk that rounds down leaves two at stride 32


class BackbonePST(PSTModel):
    """Any timm model with strides 16 and 32, with a PST neck over these levels and a widened head, see `PSTModel`.

    The levels are those of the trunk up to stride 32, with [P ; C4] and F in the places of the last two. Where a trunk
    rounds down (as ConvNeXt does), the last row or column of C4 that no token of C5 stands for is left out.
    """

    def __init__(
            self,
            trunk: str,
            num_classes: int = 1000,
            in_chans: int = 3,
            output_stride: int = 32,
            global_pool: str = 'avg',
            pst_width: Optional[int] = None,
            pst_depth: int = 1,
            pst_head_dim: int = 32,
            pst_mlp_ratio: float = 2.,
            pst_pos_enc: bool = True,
            pst_zero_init: bool = True,
            pst_act_layer: LayerType = nn.SiLU,
            pst_norm_layer: LayerType = nn.BatchNorm2d,
            topk: int = 0,
            fine_fusion: str = 'gate',
            train_topk: int = 0,
            train_fine_prob: float = 1.0,
            head_hidden_size: Optional[int] = None,
            head_skip: bool = False,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
            **trunk_kwargs: Any,
    ):
        """
        Args:
            trunk: Name of a timm model, without a tag.
            num_classes: Number of classes, 0 for no classifier.
            in_chans: Number of input channels.
            output_stride: Stride of C5 and F, where the trunk offers another than 32.
            global_pool: Pooling before the classifier, '' (with `num_classes=0`) for none.
            pst_width: Fusion width w; half of it must be a multiple of `pst_head_dim`. None for `fitting_width`.
            pst_depth: Number of PST blocks. 0 keeps the fusion convolutions and drops attention, for ablations.
            pst_head_dim: Channels per attention head.
            pst_mlp_ratio: Hidden channels of the blocks' MLP over their width.
            pst_pos_enc: Whether the attention has its position encoding; without it for ablations.
            pst_zero_init: Start the residual branches of the PST blocks at zero; False: as published.
            pst_act_layer: Activation of the PST, the fusion and the head.
            pst_norm_layer: Norm of the PST, the fusion and the head.
            topk: See `PyramidSparseAttention`, as for the next three.
            fine_fusion: How coarse and fine attention are combined, 'gate' or 'joint'.
            train_topk: Coarse tokens selected in training, 0 for coarse-only training.
            train_fine_prob: Share of the training steps in which the fine branch runs.
            head_hidden_size: Channels of the convolution before the pooling, those that the classifier of the plain
                model reads if None.
            head_skip: Let the classifier read C5 too, pooled beside them; `forward_features` then gives [F ; C5].
            drop_rate: Dropout probability before the classifier.
            drop_path_rate: Stochastic depth of trunk and PST blocks; with 0 the trunk has its own.
            trunk_kwargs: Further arguments of the trunk, such as `img_size`.

        Raises:
            TypeError: If the trunk does not take an argument, `output_stride` among them.
            ValueError: If there is no such trunk, it has no two levels to fuse, or an option is out of its range.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.plain_name = trunk
        # what makes the plain model again
        self.trunk_kwargs = dict(
            trunk_kwargs,
            in_chans=in_chans,
            **({'output_stride': output_stride} if output_stride != 32 else {}),
            **({'drop_path_rate': drop_path_rate} if drop_path_rate else {}),
        )
        self.trunk, self.feature_info = _make_trunk(trunk, output_stride, {**self.trunk_kwargs, **dd})
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        found = _look_at(trunk, self.trunk, len(self.feature_info), in_chans, trunk_kwargs.get('img_size'))
        self.rounds_down = found.rounds_down
        if head_hidden_size is None:
            head_hidden_size = getattr(self.trunk, 'head_hidden_size', None) or self.feature_info[-1]['num_chs']
        pst_kwargs = dict(depth=pst_depth, mlp_ratio=pst_mlp_ratio, head_dim=pst_head_dim, pos_enc=pst_pos_enc)
        if pst_width is None:
            gmacs = count_gmacs(self.trunk, found.input_size)
            pst_width = fitting_width(gmacs, self.feature_info[-2:], found.sizes, head_hidden_size, **pst_kwargs)
        self.trunk.prune_intermediate_layers(list(range(len(self.feature_info))), prune_norm=True, prune_head=True)
        self.own_args = {'pst_width': pst_width, 'head_hidden_size': head_hidden_size}
        self._model_args = dict(self.own_args)  # timm adds what it is given, and writes them to config.json
        self._add_fusion(
            pst_width,
            head_hidden_size,
            head_skip,
            num_classes,
            global_pool,
            act_layer=pst_act_layer,
            norm_layer=pst_norm_layer,
            topk=topk,
            fine_fusion=fine_fusion,
            train_topk=train_topk,
            train_fine_prob=train_fine_prob,
            zero_init=pst_zero_init,
            drop_path=drop_path_rate,
            **pst_kwargs,
            **dd,
        )

    @torch.jit.ignore
    def _last_two(self) -> List[int]:
        return [len(self.feature_info) - 2, len(self.feature_info) - 1]

    def _trunk(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        if torch.jit.is_scripting():
            levels = self.trunk(x)  # see `__prepare_scriptable__`
        else:
            levels = _Levels.run(self.trunk, x, self._last_two())
        return self._cropped(levels[0], levels[1]), levels[1]

    def _cropped(self, c4: torch.Tensor, c5: torch.Tensor) -> torch.Tensor:
        return c4[:, :, :2 * c5.shape[2], :2 * c5.shape[3]] if self.rounds_down else c4

    @torch.jit.ignore
    def _trunk_levels(self, x: torch.Tensor, indices: Sequence[int]) -> List[torch.Tensor]:
        levels = _Levels.run(self.trunk, x, indices)
        if list(indices[-2:]) == self._last_two():
            levels[-2] = self._cropped(levels[-2], levels[-1])
        return levels

    @torch.jit.ignore
    def _prune_trunk(self, last: int) -> None:
        self.trunk.prune_intermediate_layers(list(range(last + 1)), prune_norm=True, prune_head=True)

    @torch.jit.ignore
    def _trunk_groups(self, coarse: bool) -> Dict[str, Any]:
        def nested(pattern: str) -> str:
            return rf'^trunk\.(?:{pattern.removeprefix("^")})'

        groups: Dict[str, Any] = {}
        matcher = getattr(self.trunk, 'group_matcher', None)
        patterns = matcher(coarse=coarse) if matcher is not None else {}
        if not isinstance(patterns, dict):  # a function of names, as Inception-v3 has: the trunk is one group
            patterns = {}
        for name, spec in patterns.items():
            if spec is not None:
                groups[name] = nested(spec) if isinstance(spec, str) else [(nested(p), *rest) for p, *rest in spec]
        return dict(groups, trunk=r'^trunk\.')  # what the trunk's own patterns leave

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Names of the gates, and of what the trunk names itself."""
        trunks = self.trunk.no_weight_decay() if hasattr(self.trunk, 'no_weight_decay') else set()
        return super().no_weight_decay() | {f'trunk.{name}' for name in trunks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the trunk and the PST again in the backward pass, instead of keeping what they compute."""
        self.trunk.set_grad_checkpointing(enable)
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Start the trunk anew, where it can."""
        if hasattr(self.trunk, 'init_weights'):
            self.trunk.init_weights()

    @torch.jit.ignore
    def tokens(self, img_size: Union[int, Tuple[int, int]]) -> int:
        """How many coarse tokens there are to select from, see `PSTModel.tokens`."""
        if not self.attentions():
            return super().tokens(img_size)
        height, width = _level_shapes(self.trunk, self._last_two(), (self.in_chans, *to_2tuple(img_size)))[1][2:]
        return height * width

    def __prepare_scriptable__(self) -> 'BackbonePST':
        """What `torch.jit.script` takes in place of this model: one whose trunk is a graph.

        Some of timm's models take their levels in a way that TorchScript does not know.
        """
        if self.last_level < self.levels - 1:
            raise ValueError('A model that was pruned cannot be scripted: export or compile it.')
        twin = copy.copy(self)
        twin._modules = dict(self._modules, trunk=_as_graph(self.trunk, self._last_two()))
        return twin


class _Levels(nn.Module):
    """A trunk as a function of images to some of its levels, in NCHW."""

    def __init__(self, trunk: nn.Module, indices: Sequence[int]):
        super().__init__()
        self.trunk = trunk
        self.indices = list(indices)

    @staticmethod
    def run(trunk: nn.Module, x: torch.Tensor, indices: Sequence[int]) -> List[torch.Tensor]:
        return trunk.forward_intermediates(
            x, indices=list(indices), stop_early=True, output_fmt='NCHW', intermediates_only=True)

    def forward(self, x: torch.Tensor) -> List[torch.Tensor]:
        return self.run(self.trunk, x, self.indices)


class _Fusion(PSTModel):
    """Fusion and head alone, over two maps of given sizes; for their cost."""

    def __init__(self, infos: Sequence[Dict[str, Any]], sizes: Sequence[Tuple[int, int]], *args: Any, **kwargs: Any):
        super().__init__()
        self.feature_info = list(infos)
        self.shapes = [(1, info['num_chs'], *size) for info, size in zip(infos, sizes)]
        self.drop_rate = 0.
        self.grad_checkpointing = False
        self._add_fusion(*args, act_layer=nn.SiLU, norm_layer=nn.BatchNorm2d, **kwargs)

    def _trunk(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        c4, c5 = (x.new_empty(shape) for shape in self.shapes)
        return c4, c5


class _Found(NamedTuple):
    """What a trunk is like."""
    input_size: Tuple[int, int, int]
    sizes: List[Tuple[int, int]]
    rounds_down: bool


def fitting_width(
        gmacs: float,
        infos: Sequence[Dict[str, Any]],
        sizes: Sequence[Tuple[int, int]],
        head_hidden_size: int,
        head_dim: int = 32,
        **pst_kwargs: Any,
) -> int:
    """The fusion width for a trunk: the largest with which what follows it costs at most a tenth of the plain model.

    In multiply-adds, at the input size of the trunk. Tried are the even multiples of the width of an attention head, up
    to 512; the least of them is taken in any case.

    Args:
        gmacs: Multiply-adds of the plain model, in billions.
        infos: C4 and C5 as in `feature_info`.
        sizes: Height and width of C4 and C5.
        head_hidden_size: Channels of the convolution before the pooling.
        head_dim: Channels per attention head.
        pst_kwargs: Further arguments of `PyramidSparseTransformer`.
    """
    widths = range(2 * head_dim, max(WIDEST, 2 * head_dim) + 1, 2 * head_dim)
    fitting = widths[0]
    for width in widths:
        with torch.device('meta'):
            fusion = _Fusion(infos, sizes, width, head_hidden_size, False, 0, 'avg', head_dim=head_dim, **pst_kwargs)
        if count_gmacs(fusion, (1, 1, 1)) > MOST_ADDED * gmacs:
            break
        fitting = width
    return fitting


def _check_name(trunk: str) -> None:
    if not isinstance(trunk, str) or '.' in trunk or ':' in trunk or not timm.is_model(trunk):
        hint = did_you_mean(trunk.split('.')[0], timm.list_models()) if isinstance(trunk, str) else ''
        raise ValueError(f'trunk={trunk!r} is no model of timm, named without a tag.{hint}')


def _make_trunk(name: str, output_stride: int, kwargs: Dict[str, Any]) -> Tuple[nn.Module, List[Dict[str, Any]]]:
    """A plain model, and its levels up to the output stride."""
    _check_name(name)
    places = sorted(PLACES & set(kwargs))
    if places:
        raise TypeError(
            f'{places[0]!r} is no argument of a trunk: begin it with pretrained_trunk, or fill it with '
            f'pst_timm.load_trunk.')
    try:
        trunk = timm.create_model(name, num_classes=0, **kwargs)
    except (TypeError, NotImplementedError, AssertionError) as e:
        kind = TypeError if isinstance(e, TypeError) else ValueError
        raise kind(f'{name} cannot be made as a trunk with {_told(kwargs)}: {e}') from e
    if isinstance(trunk, PSTModel):
        raise ValueError(f'{name} has its PST already: use it as it is, or the plain model as the trunk.')
    if not hasattr(trunk, 'forward_intermediates') or not hasattr(trunk, 'feature_info'):
        raise ValueError(f'{name} does not offer its levels (features_only) and cannot be a trunk.')
    info = trunk.feature_info
    infos = [dict(i) for i in (info if isinstance(info, list) else info.info)]
    strides = [i['reduction'] for i in infos]
    last = max((i for i, stride in enumerate(strides) if stride == output_stride), default=0)
    finer = (16,) if output_stride == 32 else (output_stride // 2, output_stride)
    if last == 0 or strides[last - 1] not in finer:
        raise ValueError(
            f'{name} cannot be a trunk: PST fuses a level at stride {finer[0]} with one at stride {output_stride}, and '
            f'it has levels at {", ".join(map(str, dict.fromkeys(strides)))} only.')
    return trunk, [dict(i, module=f'trunk.{i["module"]}') for i in infos[:last + 1]]


def _told(kwargs: Dict[str, Any]) -> str:
    return ', '.join(f'{k}={v!r}' for k, v in kwargs.items() if v is not None)


def _look_at(
        name: str,
        trunk: nn.Module,
        levels: int,
        in_chans: int,
        img_size: Optional[Union[int, Tuple[int, int]]],
) -> _Found:
    """Run a trunk on shapes alone.

    Raises:
        ValueError: If its last two levels do not fit each other.
    """
    size = tuple(trunk.pretrained_cfg['input_size'][1:]) if img_size is None else to_2tuple(img_size)
    last_two = [levels - 2, levels - 1]
    sizes = [tuple(shape[2:]) for shape in _level_shapes(trunk, last_two, (in_chans, *size))]
    if not all(H in (2 * h - 1, 2 * h, 2 * h + 1, h) for H, h in zip(*sizes)):
        (H, W), (h, w) = sizes
        raise ValueError(
            f'{name} cannot be a trunk: at {size[0]} x {size[1]} px its last two levels are {H}x{W} and {h}x{w}, where '
            f'the sides of one should be twice those of the other, give or take one.')
    looked = [sizes]
    try:
        looked.append([shape[2:] for shape in _level_shapes(trunk, last_two, (in_chans, CROPPED, CROPPED))])
    except Exception:  # a trunk of fixed size, which is never asked for another
        pass
    rounds_down = any(H > 2 * h for fine, coarse in looked for H, h in zip(fine, coarse))
    return _Found((in_chans, *size), [tuple(min(H, 2 * h) for H, h in zip(*sizes)), sizes[1]], rounds_down)


@torch.no_grad()
def _level_shapes(trunk: nn.Module, indices: Sequence[int], input_size: Sequence[int]) -> List[torch.Size]:
    """Shapes of some levels, for images (channels, height, width), without computing them."""
    levels = _Levels(trunk, indices)
    training = trunk.training
    state = {k: v.to('meta') for kind in (levels.named_parameters(), levels.named_buffers()) for k, v in kind}
    dtype = next(trunk.parameters()).dtype
    try:
        levels.eval()
        with torch.device('meta'):  # for what a trunk makes on the way
            return [y.shape for y in functional_call(levels, state, torch.empty(1, *input_size, dtype=dtype))]
    finally:
        trunk.train(training)


def _as_graph(trunk: nn.Module, indices: Sequence[int]) -> nn.Module:
    """A trunk as a traced graph of images to levels, under the same names.

    Raises:
        ValueError: If it cannot be traced.
    """
    tracer = NodePathTracer(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions())
    try:
        graph = tracer.trace(_Levels(trunk, indices))
    except (torch.fx.proxy.TraceError, RuntimeError, TypeError) as e:
        raise ValueError(
            f'{type(trunk).__name__} cannot be traced, which TorchScript needs here: {e}. Use torch.export, or '
            f'torch.jit.trace.') from e
    for node in graph.nodes:
        if node.op in ('call_module', 'get_attr'):
            node.target = node.target.removeprefix('trunk.')
    return torch.fx.GraphModule(trunk, graph).train(trunk.training)


def create_pst(
        name: str,
        pst_width: Optional[int] = None,
        pretrained_trunk: Union[bool, str] = False,
        **kwargs: Any,
) -> nn.Module:
    """A timm model with PST over its last two levels.

        model = pst_timm.create_pst('mobilenetv3_large_100', pretrained_trunk=True, num_classes=10)

    Where this package has the model as an architecture of its own (`resnet50_pst`), it is that; else it is
    `timm.create_model('backbone_pst', trunk=name, ...)`, which is how its checkpoints know it.

    Args:
        name: Name of a timm model that has levels at strides 16 and 32; with a tag, the weights that
            `pretrained_trunk=True` means.
        pst_width: Fusion width. None for that of the architecture, or else the largest with which PST, fusion and head
            take at most a tenth of the multiply-adds of the plain model, see `fitting_width`.
        pretrained_trunk: Whether the trunk begins with the weights that timm has for the plain model, or their tag.
        kwargs: Further arguments of `timm.create_model`, of `BackbonePST` and of the trunk.

    Raises:
        ValueError: If there is no such model, it has no such levels, or an option is out of its range.
    """
    arch, tag = split_model_name_tag(name)
    if tag and pretrained_trunk is True:
        pretrained_trunk = tag
    kwargs.update(pst_width=pst_width, pretrained_trunk=pretrained_trunk or None)
    if timm.is_model(f'{arch}_pst'):
        return timm.create_model(f'{arch}_pst', **kwargs)
    return timm.create_model('backbone_pst', trunk=arch, **kwargs)


def _create_backbone_pst(variant: str, trunk: str, pretrained: bool = False, **kwargs: Any) -> BackbonePST:
    if kwargs.get('features_only') and 'out_indices' not in kwargs:
        given = {k: v for k, v in kwargs.items() if k in ('img_size', 'output_stride')}
        with torch.device('meta'):
            kwargs['out_indices'] = tuple(range(len(_make_trunk(trunk, given.get('output_stride', 32), given)[1])))
    return build_pst(BackbonePST, variant, trunk, pretrained, trunk=trunk, **kwargs)


default_cfgs = generate_default_cfgs({
    'mobilenetv4_conv_small_pst.untrained': pst_cfg(first_conv='trunk.conv_stem'),
    'efficientnet_b0_pst.untrained': pst_cfg(first_conv='trunk.conv_stem'),
    'regnety_008_pst.untrained': pst_cfg(first_conv='trunk.stem.conv'),
    'convnext_atto_pst.untrained': pst_cfg(first_conv='trunk.stem.0'),
    'backbone_pst.untrained': pst_cfg(first_conv='trunk.conv_stem'),
})


@register_model
def mobilenetv4_conv_small_pst(pretrained: bool = False, **kwargs) -> BackbonePST:
    """MobileNetV4-Conv-Small with PST, the smallest trunk."""
    model_args = dict(trunk='mobilenetv4_conv_small', pst_width=64)
    return _create_backbone_pst('mobilenetv4_conv_small_pst', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def efficientnet_b0_pst(pretrained: bool = False, **kwargs) -> BackbonePST:
    """EfficientNet-B0 with PST: inverted bottlenecks with squeeze-and-excite."""
    model_args = dict(trunk='efficientnet_b0', pst_width=128)
    return _create_backbone_pst('efficientnet_b0_pst', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def regnety_008_pst(pretrained: bool = False, **kwargs) -> BackbonePST:
    """RegNetY-800MF with PST: grouped convolutions with squeeze-and-excite."""
    model_args = dict(trunk='regnety_008', pst_width=128)
    return _create_backbone_pst('regnety_008_pst', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def convnext_atto_pst(pretrained: bool = False, **kwargs) -> BackbonePST:
    """ConvNeXt-Atto with PST: large depthwise kernels, layer norm over channels that come last."""
    model_args = dict(trunk='convnext_atto', pst_width=128)
    return _create_backbone_pst('convnext_atto_pst', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def backbone_pst(pretrained: bool = False, **kwargs) -> BackbonePST:
    """PST over the trunk that `trunk` names, see `pst_timm.create_pst`; MobileNetV4-Conv-Small if it is not said."""
    model_args = dict(trunk='mobilenetv4_conv_small')
    kwargs = dict(model_args, **kwargs)
    _check_name(kwargs['trunk'])
    # registered weights know their own preprocessing
    if not kwargs.get('pretrained_cfg') and not (pretrained and is_model_pretrained('backbone_pst')):
        trunk, which = kwargs['trunk'], kwargs.get(PRETRAINED_TRUNK)
        kwargs['pretrained_cfg_overlay'] = {
            **_cfg_of(pretrained_name(trunk, which) if which else trunk),
            **(kwargs.get('pretrained_cfg_overlay') or {})}
    return _create_backbone_pst('backbone_pst', pretrained=pretrained, **kwargs)


def _cfg_of(trunk: str) -> Dict[str, Any]:
    """What the weights of a plain model tell of preprocessing, for a model that may begin with them."""
    cfg = timm.get_pretrained_cfg(trunk)
    if cfg is None:
        return {}
    fields = ('input_size', 'pool_size', 'fixed_input_size', 'crop_pct', 'interpolation', 'mean', 'std')
    convs = (cfg.first_conv,) if isinstance(cfg.first_conv, str) else tuple(cfg.first_conv or ())
    found = {k: getattr(cfg, k) for k in fields if getattr(cfg, k, None) is not None}
    return {**found, 'first_conv': tuple(f'trunk.{name}' for name in convs)}
