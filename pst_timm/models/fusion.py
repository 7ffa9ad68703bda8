"""What all models with PST share: fusion and head over the last two levels of a trunk, settings, timm's habits.

With C4 and C5 the last two levels of the trunk, at strides 16 and 32, the rest of the network is, at fusion width w:

    P = PST(C4, C5)                   stride 16, w channels
    D = SiLU(bn(conv3x3([P ; C4])))   to the stride of C5, w channels
    F = SiLU(bn(conv1x1([D ; C5])))   stride 32, w channels: the output of `forward_features`
    logits = fc(dropout(pool(SiLU(bn(conv1x1(F))))))
"""
from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple, Type, Union

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerType, create_classifier, get_device_dtype, to_2tuple
from timm.models import build_model_with_cfg, checkpoint, resolve_pretrained_cfg
from timm.models._features import feature_take_indices  # timm exports it from here alone

from pst_timm.layers import Concat, ConvNorm, PyramidSparseAttention, PyramidSparseTransformer
from pst_timm.utils.errors import unknown_tag
from pst_timm.utils.fitting import misfits

from .digest import check_digest, drop_digest
from .settings import AttentionSettings
from .trunk import adopt_preprocessing, load_pretrained_trunk, pretrained_name

__all__ = ['PSTModel', 'build_pst', 'own_location', 'pst_cfg']

# what tells in a pretrained configuration where weights are; timm takes the first that is there
LOCATIONS = ('state_dict', 'file', 'hf_hub_id', 'url')


class PSTModel(AttentionSettings, nn.Module):
    """A trunk with a PST neck over its last two levels and a widened classification head.

    A model of this kind makes its trunk and lists its levels in `feature_info`, calls `_add_fusion`, and says how the
    trunk is run and shortened: `_trunk`, `_trunk_levels`, `_prune_trunk`, `_trunk_groups`.

    FX keeps the attention whole, as `timm.models.create_feature_extractor` asks it to; torchvision's function of that
    name does so with `tracer_kwargs=dict(leaf_modules=timm.layers.get_notrace_modules(),
    autowrap_functions=timm.layers.get_notrace_functions())`, and without them is refused.

    Beside `AttentionSettings` a model may have `own_args`: arguments of `timm.create_model` that it worked out itself,
    so that a checkpoint can tell them.
    """
    plain_name: str = ''
    """Name of the timm model that the trunk is, where it is known."""

    def _add_fusion(
            self,
            width: int,
            head_hidden_size: int,
            head_skip: bool,
            num_classes: int,
            global_pool: str,
            act_layer: LayerType,
            norm_layer: LayerType,
            device=None,
            dtype=None,
            **pst_kwargs: Any,
    ) -> None:
        """Add PST, fusion and head over the last two levels in `feature_info`, and tell there what becomes of them.

        Args:
            width: Fusion width w.
            head_hidden_size: Channels of the convolution before the pooling.
            head_skip: Whether the classifier reads C5 too.
            num_classes: Number of classes, 0 for no classifier.
            global_pool: Pooling before the classifier.
            act_layer: Activation of PST, fusion and head.
            norm_layer: Norm of PST, fusion and head.
            pst_kwargs: Further arguments of `PyramidSparseTransformer`.
        """
        dd = {'device': device, 'dtype': dtype}
        conv_kwargs = dict(norm_layer=norm_layer, act_layer=act_layer, **dd)
        c4, c5 = self.feature_info[-2:]
        self.pst = PyramidSparseTransformer(c4['num_chs'], c5['num_chs'], width, **pst_kwargs, **conv_kwargs)
        self.pst_cat = Concat()
        self.fuse_down = ConvNorm(
            width + c4['num_chs'], width, 3, stride=c5['reduction'] // c4['reduction'], **conv_kwargs)
        self.merge_cat = Concat()
        self.fuse_merge = ConvNorm(width + c5['num_chs'], width, 1, **conv_kwargs)
        self.feature_info[-2:] = [
            dict(c4, num_chs=width + c4['num_chs'], module='pst_cat'), dict(c5, num_chs=width, module='fuse_merge')]
        self.levels = len(self.feature_info)
        self.last_level = self.levels - 1
        self.coarse_stride = c5['reduction']

        self.fused_chs = width
        self.head_skip = head_skip
        skipped = c5['num_chs'] if head_skip else 0
        self.num_features = width + skipped
        self.conv_head = ConvNorm(width, head_hidden_size, 1, **conv_kwargs)
        self._set_classifier(num_classes, global_pool, head_hidden_size + skipped, **dd)
        for module in (self.pst, self.fuse_down, self.fuse_merge, self.conv_head):
            for m in module.modules():
                if isinstance(m, nn.Conv2d):  # as those of a ResNet
                    nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')

    def _set_classifier(self, num_classes: int, global_pool: str, in_features: int, device=None, dtype=None) -> None:
        if num_classes > 0 and not global_pool:
            raise ValueError(
                f"global_pool='' leaves a map, which the classifier of {num_classes} classes cannot read: "
                f"use num_classes=0 as well, or a pooling such as 'avg'.")
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(
            in_features, num_classes, pool_type=global_pool, device=device, dtype=dtype)
        self.head_hidden_size = in_features * self.global_pool.feat_mult()

    # the trunk

    def _trunk(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Images to C4 and C5, also in TorchScript."""
        raise NotImplementedError

    @torch.jit.ignore
    def _trunk_levels(self, x: torch.Tensor, indices: Sequence[int]) -> List[torch.Tensor]:
        """Images to the trunk's own maps at some levels, in their order; nothing beyond the last of them is run."""
        raise NotImplementedError

    @torch.jit.ignore
    def _prune_trunk(self, last: int) -> None:
        """Drop what is above a level."""
        raise NotImplementedError

    @torch.jit.ignore
    def _trunk_groups(self, coarse: bool) -> Dict[str, Any]:
        """The trunk's part of `group_matcher`."""
        raise NotImplementedError

    # settings

    @torch.jit.ignore
    def attentions(self) -> List[PyramidSparseAttention]:
        """The attention layers, in the order in which they run; none in a model that was pruned below them."""
        return self.pst.attentions() if self.last_level >= self.levels - 2 else []

    @torch.jit.ignore
    def tokens(self, img_size: Union[int, Tuple[int, int]]) -> int:
        """How many coarse tokens there are to select from, 0 in a model without attention.

        Args:
            img_size: Height and width of the images, or one number for both.
        """
        height, width = (-(-side // self.coarse_stride) for side in to_2tuple(img_size))  # every stage rounds up
        return height * width if self.attentions() else 0

    @torch.jit.ignore
    def unprunable(self) -> List[str]:
        """Names of the modules that must keep their width: the attention layers, whose heads share it."""
        attentions = self.attentions()
        return [name for name, module in self.named_modules() if any(module is attention for attention in attentions)]

    @torch.jit.ignore
    def record_widths(self) -> None:
        """Take the widths of the maps from the layers, some of whose channels were cut."""
        self.pst.out_chs = self.pst.conv_out.out_channels
        self.fused_chs = self.fuse_merge.out_channels
        self.pst.in_chs = self.fuse_down.in_channels - self.pst.out_chs
        self.pst.upper_chs = self.fuse_merge.in_channels - self.fuse_down.out_channels

    # timm's habits

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Patterns that order the parameters stem, trunk, PST, fusion; what they leave (the head) comes last."""
        return dict(
            **self._trunk_groups(coarse),
            pst=r'^pst' if coarse else [
                (r'^pst\.conv_(?:in|upper)', (-1,)),
                (r'^pst\.blocks\.(\d+)', None),
                (r'^pst\.conv_out', (99999,)),
            ],
            fuse=r'^fuse_(?:down|merge)',
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Names of the gates: where training does not run them, decay is all that would move them."""
        return {n for n, _ in self.named_parameters() if n.startswith('pst.blocks.') and '.attn.gate.' in n}

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> Union[str, nn.Module]:
        """The classifier, or its name."""
        return 'fc' if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: Number of classes, 0 for no classifier.
            global_pool: Pooling type, '' (with `num_classes=0`) for none. None leaves it as it is, but for a
                classifier on a model without pooling, which gets 'avg'.

        Raises:
            ValueError: If classes without pooling are asked for.
        """
        if global_pool is None:
            global_pool = self.global_pool.pool_type or ('avg' if num_classes > 0 else '')
        in_features = self.head_hidden_size // self.global_pool.feat_mult()
        self._set_classifier(num_classes, global_pool, in_features, **get_device_dtype(self))
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward features that returns intermediates.

        The levels are those of the trunk, with [P ; C4] and F in the places of the last two.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Take last n levels if int, all if None, select matching indices if sequence.
            norm: Ignored, the levels have no separate norm.
            stop_early: Stop at the last level asked for; the final features returned are then that level.
            output_fmt: Shape of the levels, 'NCHW'.
            intermediates_only: Only return the levels.

        Returns:
            Final features and list of levels, or the list alone.

        Raises:
            ValueError: If a level was pruned from the model.
        """
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        take_indices, max_index = feature_take_indices(self.levels, indices)
        if max_index > self.last_level:
            raise ValueError(f'Level {max_index} was pruned from this model, the last one kept is {self.last_level}.')
        last = max_index if stop_early else self.last_level
        fine, coarse = self.levels - 2, self.levels - 1
        wanted = sorted({i for i in take_indices if i < fine} | ({fine, coarse} if last >= fine else {last}))
        levels = self._trunk_levels(x, wanted)
        x = levels[-1]
        intermediates = [level for i, level in zip(wanted, levels) if i in take_indices and i < fine]
        if last >= fine:
            c4, c5 = levels[-2:]
            p_c4 = self.pst_cat(self._pst(c4, c5), c4)
            # a reparameterized model goes on without the concatenation, so that it is made only where it is asked for
            asked = last == fine or fine in take_indices
            x = torch.cat(p_c4, dim=1) if isinstance(p_c4, tuple) and asked else p_c4
            if fine in take_indices:
                intermediates.append(x)
            if last >= coarse:
                x = self.fuse_merge(self.merge_cat(self.fuse_down(p_c4), c5))
                if coarse in take_indices:
                    intermediates.append(x)
                x = self._skip(x, c5)

        if intermediates_only:
            return intermediates

        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Prune layers not required for specified intermediates.

        The last level but one needs all of the trunk and the PST, the levels below it neither.

        Args:
            indices: Indices of intermediate levels to keep.
            prune_norm: Ignored, the levels have no separate norm.
            prune_head: Whether to prune the convolution before the pooling, and the classifier.

        Returns:
            List of indices that were kept.
        """
        take_indices, max_index = feature_take_indices(self.levels, indices)
        drop = []
        if max_index < self.levels - 1:
            drop += ['fuse_down', 'merge_cat', 'fuse_merge']
        if max_index < self.levels - 2:
            drop += ['pst', 'pst_cat']
            self._prune_trunk(max_index)
        for name in drop:
            setattr(self, name, nn.Identity())
        self.last_level = max_index
        if prune_head or max_index < self.levels - 1:
            self.num_features = self.feature_info[max_index]['num_chs']
            # the head was sized for what `forward_features` gives
            self.conv_head = nn.Identity()
            self.head_skip = False
            self._set_classifier(0, '', self.num_features)
        return take_indices

    def _pst(self, c4: torch.Tensor, c5: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            # drawn outside, so that the recomputation repeats the step it belongs to
            return checkpoint(self.pst, c4, c5, self.pst.draw_fine())
        return self.pst(c4, c5)

    def _skip(self, fused: torch.Tensor, c5: torch.Tensor) -> torch.Tensor:
        return torch.cat([fused, c5], dim=1) if self.head_skip else fused

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_chans, H, W) to the fused map F (B, num_features, H / 32, W / 32).

        With `head_skip` it is [F ; C5]. A model pruned to a lower level gives that level.
        """
        if not torch.jit.is_scripting():
            if self.last_level < self.levels - 1:
                return self.forward_intermediates(x, [self.last_level], stop_early=True, intermediates_only=True)[0]
        c4, c5 = self._trunk(x)
        p_c4 = self.pst_cat(self._pst(c4, c5), c4)
        return self._skip(self.fuse_merge(self.merge_cat(self.fuse_down(p_c4), c5)), c5)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Output of `forward_features` to logits (B, num_classes), or to what the classifier reads if `pre_logits`."""
        if self.head_skip:
            x = torch.cat([self.conv_head(x[:, :self.fused_chs]), x[:, self.fused_chs:]], dim=1)
        else:
            x = self.conv_head(x)
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def build_pst(
        model_cls: Type[PSTModel],
        variant: str,
        plain: str,
        pretrained: bool = False,
        pretrained_trunk: Union[bool, str] = False,
        levels: int = 5,
        **kwargs: Any,
) -> PSTModel:
    """`timm.models.build_model_with_cfg` for a model with PST.

    Args:
        model_cls: Class of the model.
        variant: Name of the architecture.
        plain: Name of the timm model that the trunk is.
        pretrained: Whether it comes with published weights.
        pretrained_trunk: Whether the trunk begins with published weights of the plain model, or their tag.
        levels: How many levels it has.
        kwargs: All other arguments of the entry point.

    Raises:
        ValueError: If an argument asks for what these models cannot be.
        RuntimeError: If there are no such weights.
    """
    feature_cls = kwargs.get('feature_cls', 'getter')
    if kwargs.get('features_only') and feature_cls in ('list', 'dict'):
        raise ValueError(
            f"feature_cls='{feature_cls}' runs a model as a chain of modules, which {variant} is not: "
            f"use 'getter' (the default), 'hook' or 'fx'.")
    tag = kwargs.get('pretrained_cfg')
    tags = timm.models.get_arch_pretrained_cfgs(variant)
    if isinstance(tag, str) and tag and f'{variant}.{tag}' not in tags:
        raise RuntimeError(unknown_tag(f'{variant}.{tag}', tags))
    if pretrained and pretrained_trunk:
        raise ValueError('pretrained=True brings weights of the whole model: leave pretrained_trunk out.')
    if pretrained:
        kwargs['pretrained_cfg_overlay'] = own_location(kwargs.get('pretrained_cfg_overlay') or {})
        _check_weights_exist(variant, kwargs.get('pretrained_cfg'), kwargs['pretrained_cfg_overlay'])
    given = kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay')
    if not pretrained and not kwargs.get('pretrained_cfg'):
        # weights that were not asked for decide neither class count nor input size
        kwargs['pretrained_cfg'] = 'untrained'
    model = build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=partial(
            _check_weights, features_only=kwargs.get('features_only', False),
            strict=kwargs.get('pretrained_strict', True)),
        feature_cfg=dict(out_indices=tuple(range(levels)), feature_cls='getter'),
        **kwargs,
    )
    drop_digest(model)
    getattr(model, 'model', model).plain_name = plain  # features_only wraps the network
    if pretrained_trunk:
        load_pretrained_trunk(model, plain, pretrained_trunk, kwargs.get('cache_dir'))
        adopt_preprocessing(model, pretrained_name(plain, pretrained_trunk), *given)
    return model


def own_location(overlay: Dict[str, Any]) -> Dict[str, Any]:
    """An overlay of a pretrained configuration; one that names weights hides the default ones and their checksum."""
    named = [key for key in LOCATIONS if overlay.get(key)]
    if not named:
        return overlay
    return {'notes': (), 'source': '', **dict.fromkeys(LOCATIONS[:LOCATIONS.index(named[0])]), **overlay}


def _check_weights(
        weights: Dict[str, torch.Tensor],
        model: PSTModel,
        features_only: bool,
        strict: bool,
) -> Dict[str, torch.Tensor]:
    """Raise a RuntimeError unless weights are those that were published, and fit but for what timm adapts."""
    check_digest(weights, model)
    cfg = model.pretrained_cfg
    new_classifier = features_only or model.num_classes != cfg['num_classes']
    adapted = {f'{cfg.get("classifier")}.{kind}' for kind in ('weight', 'bias')} if new_classifier else set()
    own = {k: v for k, v in model.state_dict().items() if k not in adapted}
    given = {k: v for k, v in weights.items() if k not in adapted}
    for name in own.keys() & given.keys():  # the channels of an image
        if own[name].dim() == 4 == given[name].dim() and own[name][:, 0].shape == given[name][:, 0].shape:
            given[name] = own[name]
    if strict and (found := misfits(own, given)):
        name = '.'.join(filter(None, (cfg['architecture'], cfg.get('tag'))))
        raise RuntimeError(
            f'The weights {name} do not fit the arguments that the model was given: {"; ".join(found)}. Leave out what '
            f'changes its layers, or pretrained=True: pst_timm.load_trunk brings the trunk of such weights into any '
            f'model with that trunk.')
    return weights


def _check_weights_exist(variant: str, pretrained_cfg: Any, pretrained_cfg_overlay: Optional[Dict[str, Any]]) -> None:
    """Raise a RuntimeError that says what to do where timm's own says only that there are no weights."""
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    if cfg.has_weights or cfg.state_dict:
        return
    tags = timm.list_pretrained(f'{variant}.*')
    name = '.'.join(filter(None, (variant, cfg.tag))) if tags else f'{variant} yet'
    others = ', '.join(tags or timm.list_pretrained('*_pst.*'))
    raise RuntimeError(
        f'No pretrained weights exist for {name}, only for {others}: the ways on are pretrained_trunk=True or '
        f'pst_timm.load_trunk for the weights of the plain model in its trunk, pst_timm.register_weights for your own, '
        f"or the name of a published model, 'hf-hub:org/name'.")


def pst_cfg(url: str = '', **kwargs) -> Dict[str, Any]:
    """The pretrained configuration of a model with PST, where nothing else is said."""
    return {
        'url': url,
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.95, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1', 'classifier': 'fc',
        'license': 'apache-2.0', 'paper_ids': 'arXiv:2505.12772',
        **kwargs,
    }
