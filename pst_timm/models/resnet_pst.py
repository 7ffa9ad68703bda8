"""ResNet-PST: a ResNet whose last two stages are fused by a Pyramid Sparse Transformer.

Paper: `Pyramid Sparse Transformer: Enhancing Multi-Scale Feature Fusion with Dynamic Token Selection`
    - https://arxiv.org/abs/2505.12772

The trunk is timm's own ResNet, so that timm's ResNet weights load into it unchanged (`pst_timm.load_trunk`). With
C4 = layer3 and C5 = layer4 the rest of the network is, at fusion width w:

    P = PST(C4, C5)                   stride 16, w channels
    D = SiLU(bn(conv3x3([P ; C4])))   to the stride of C5, w channels
    F = SiLU(bn(conv1x1([D ; C5])))   stride 32, w channels: the output of `forward_features`
    logits = fc(dropout(pool(SiLU(bn(conv1x1(F))))))

Where this departs from the published code: its trunk puts SiLU inside the bottlenecks, and what it calls ResNet-18 is
the Bottleneck 2,2,2,2 trunk, named `resnet26_pst` here beside the true `resnet18_pst`.
"""
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Type, Union

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerType, create_classifier, get_device_dtype, to_2tuple
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import feature_take_indices  # timm exports it from here alone
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from pst_timm.layers import (
    FINE_FUSIONS,
    Concat,
    ConvNorm,
    PyramidSparseAttention,
    PyramidSparseTransformer,
    attention_set,
)

from .digest import check_digest, drop_digest

__all__ = ['ResNetPST']

WEIGHTS = Path(__file__).resolve().parent / 'weights'


class ResNetPST(ResNet):
    """ResNet with a PST neck over its last two stages and a widened classification head.

    FX keeps the attention whole, as `timm.models.create_feature_extractor` asks it to; torchvision's function of that
    name does so with `tracer_kwargs=dict(leaf_modules=timm.layers.get_notrace_modules(),
    autowrap_functions=timm.layers.get_notrace_functions())`, and without them is refused.

    What training and validation have to know of a model beside timm's interface, it says itself. Any timm model may
    offer these methods, and a caller uses those that it finds:

    * `set_train_step(seed, step)`: place the model's own random decisions in a sequence that all ranks share.
    * `inference_settings()`: what the model has beside its weights, as arguments of `timm.create_model`.
    * `with_settings(**settings)`: a context in which these are others.
    * `sweep_settings(topks)`: the settings that are worth a comparison, each for `with_settings`.
    * `settings_columns(setting, img_size)`: what a table of results says of one of these.
    * `tokens(img_size)`: how many tokens there are to select from; a k above it is that many.
    """

    def __init__(
            self,
            block: Union[Type[BasicBlock], Type[Bottleneck], List[Union[Type[BasicBlock], Type[Bottleneck]]]],
            layers: Tuple[int, ...],
            num_classes: int = 1000,
            in_chans: int = 3,
            output_stride: int = 32,
            global_pool: str = 'avg',
            pst_width: int = 256,
            pst_depth: int = 1,
            pst_head_dim: int = 32,
            pst_mlp_ratio: float = 2.,
            pst_pos_enc: bool = True,
            pst_zero_init: bool = False,
            pst_act_layer: LayerType = nn.SiLU,
            topk: int = 0,
            fine_fusion: str = 'gate',
            train_topk: int = 0,
            train_fine_prob: float = 1.0,
            head_hidden_size: int = 1280,
            head_skip: bool = False,
            norm_layer: LayerType = nn.BatchNorm2d,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            zero_init_last: bool = True,
            device=None,
            dtype=None,
            **trunk_kwargs: Any,
    ):
        """
        Args:
            block: Residual block of the trunk, or one for each stage.
            layers: Blocks in each of the four stages.
            num_classes: Number of classes, 0 for no classifier.
            in_chans: Number of input channels.
            output_stride: Stride of C5 and F: 32, 16 or 8. C4 never has a larger one.
            global_pool: Pooling before the classifier, '' (with `num_classes=0`) for none.
            pst_width: Fusion width w; half of it must be a multiple of `pst_head_dim`.
            pst_depth: Number of PST blocks. 0 keeps the fusion convolutions and drops attention, for ablations.
            pst_head_dim: Channels per attention head.
            pst_mlp_ratio: Hidden channels of the blocks' MLP over their width.
            pst_pos_enc: Whether the attention has its position encoding; without it for ablations.
            pst_zero_init: Start the residual branches of the PST blocks at zero, as `zero_init_last` does the trunk's.
            pst_act_layer: Activation of the PST, the fusion and the head.
            topk: See `PyramidSparseAttention`, as for the next three.
            fine_fusion: How coarse and fine attention are combined, 'gate' or 'joint'.
            train_topk: Coarse tokens selected in training, 0 for coarse-only training.
            train_fine_prob: Share of the training steps in which the fine branch runs.
            head_hidden_size: Channels of the convolution before the pooling.
            head_skip: Let the classifier read C5 too, pooled beside them; `forward_features` then gives [F ; C5].
            norm_layer: Norm of trunk, PST, fusion and head.
            drop_rate: Dropout probability before the classifier.
            drop_path_rate: Stochastic depth, linear over the trunk; the PST blocks take the rate itself.
            zero_init_last: Start the trunk's residual branches at zero.
            trunk_kwargs: Further arguments of `timm.models.resnet.ResNet`.

        Raises:
            ValueError: If a size or an option is out of its range.
        """
        dd = {'device': device, 'dtype': dtype}
        if output_stride not in (8, 16, 32):
            raise ValueError(f'output_stride must be 8, 16 or 32, got {output_stride!r}.')
        if len(layers) != 4:
            raise ValueError(f'layers must give the blocks of four stages, got {layers!r}.')
        super().__init__(
            block,
            layers,
            num_classes=0,  # the classifier is made below, on this model's own head
            in_chans=in_chans,
            output_stride=output_stride,
            norm_layer=norm_layer,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            zero_init_last=zero_init_last,
            **trunk_kwargs,
            **dd,
        )
        c4, c5 = self.feature_info[3], self.feature_info[4]
        conv_kwargs = dict(norm_layer=norm_layer, act_layer=pst_act_layer, **dd)
        self.pst = PyramidSparseTransformer(
            c4['num_chs'],
            c5['num_chs'],
            pst_width,
            depth=pst_depth,
            mlp_ratio=pst_mlp_ratio,
            head_dim=pst_head_dim,
            topk=topk,
            fine_fusion=fine_fusion,
            train_topk=train_topk,
            train_fine_prob=train_fine_prob,
            pos_enc=pst_pos_enc,
            zero_init=pst_zero_init,
            drop_path=drop_path_rate,
            **conv_kwargs,
        )
        self.pst_cat = Concat()
        self.fuse_down = ConvNorm(
            pst_width + c4['num_chs'], pst_width, 3, stride=c5['reduction'] // c4['reduction'], **conv_kwargs)
        self.merge_cat = Concat()
        self.fuse_merge = ConvNorm(pst_width + c5['num_chs'], pst_width, 1, **conv_kwargs)
        self.feature_info[3] = dict(c4, num_chs=pst_width + c4['num_chs'], module='pst_cat')
        self.feature_info[4] = dict(c5, num_chs=pst_width, module='fuse_merge')
        self.last_level = 4
        self.coarse_stride = c5['reduction']

        self.head_skip = head_skip
        skipped = c5['num_chs'] if head_skip else 0
        self.num_features = pst_width + skipped
        self.conv_head = ConvNorm(pst_width, head_hidden_size, 1, **conv_kwargs)
        self._set_classifier(num_classes, global_pool, head_hidden_size + skipped, **dd)
        for module in (self.pst, self.fuse_down, self.fuse_merge, self.conv_head):
            for m in module.modules():
                if isinstance(m, nn.Conv2d):  # as the trunk's
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

    @torch.jit.ignore
    def _attentions(self) -> List[PyramidSparseAttention]:
        return self.pst.attentions() if self.last_level >= 3 else []  # a model pruned below has no PST

    @torch.jit.ignore
    def set_topk(self, topk: int, fusion: Optional[str] = None) -> None:
        """Change the fine attention used at inference; weights are not touched.

        Works on a scripted model too; one that was saved, frozen or traced keeps what it had then. Not while other
        threads run the model, which would see it change between its blocks: give each setting a model of its own, or
        look with `pst_timm.inspect_tokens`, which leaves the model as it is.

        Args:
            topk: Coarse tokens selected per image and head, 0 for coarse attention alone; more than there are
                selects all.
            fusion: 'gate' or 'joint', unchanged if None.

        Raises:
            ValueError: If `topk` is negative or not an integer, or the fusion is unknown.
        """
        for attn in self._attentions():
            attn.set_topk(topk, fusion)

    @torch.jit.ignore
    def set_train_step(self, seed: int, step: int = 0) -> None:
        """Seed the draws of `train_fine_prob` and place them at a training step.

        Call it alike on all ranks. A run that calls it at the start of every epoch can be resumed at any of them.

        Args:
            seed: Seed of the sequence of draws.
            step: Index of the next training step.
        """
        for attn in self._attentions():
            attn.set_fine_step(seed, step)

    set_fine_step = set_train_step  # as the layers call it

    @torch.jit.ignore
    def inference_settings(self) -> Dict[str, Any]:
        """`topk` and `fine_fusion` as they are now; empty for a model without attention."""
        attentions = self._attentions()
        return {'topk': attentions[0].topk, 'fine_fusion': attentions[0].fine_fusion} if attentions else {}

    @torch.jit.ignore
    @contextmanager
    def with_settings(self, topk: Optional[int] = None, fine_fusion: Optional[str] = None) -> Iterator[None]:
        """Set the fine attention for a while; afterwards it is as it was, also after an error.

        Not while other threads run the model, see `set_topk`.

        Args:
            topk: Coarse tokens selected per image and head, unchanged if None.
            fine_fusion: 'gate' or 'joint', unchanged if None; 'coarse' is what tables call `topk=0`.

        Raises:
            ValueError: If `topk` is negative or not an integer, or the fusion is unknown or does not go with it.
        """
        if fine_fusion == 'coarse':
            if topk != 0:
                raise ValueError(f"fine_fusion='coarse' is attention with topk=0, got topk={topk!r}.")
            fine_fusion = None
        with attention_set(self._attentions(), topk, fine_fusion):
            yield

    @torch.jit.ignore
    def sweep_settings(self, topks: Sequence[int]) -> List[Dict[str, Any]]:
        """Settings to compare, for `with_settings`, each once.

        Args:
            topks: Coarse tokens to select; 0 is coarse attention alone.

        Returns:
            `topk` and `fine_fusion` of each: 'coarse' for k = 0, 'gate' and then 'joint' for every other k. A model
            without attention has one setting, the coarse one.
        """
        if not self._attentions():
            topks = [0]
        return [
            {'topk': k, 'fine_fusion': fusion}
            for k in dict.fromkeys(topks) for fusion in (FINE_FUSIONS if k else ('coarse',))]

    @torch.jit.ignore
    def settings_columns(self, setting: Dict[str, Any], img_size: Union[int, Tuple[int, int]]) -> Dict[str, Any]:
        """The columns of a table of results that tell a setting.

        Args:
            setting: One of `sweep_settings`.
            img_size: Height and width of the images, or one number for both.

        Returns:
            `topk` and `fine_fusion` as they are there, and how many tokens are then `selected`.
        """
        return {**setting, 'selected': min(setting['topk'], self.tokens(img_size))}

    @torch.jit.ignore
    def tokens(self, img_size: Union[int, Tuple[int, int]]) -> int:
        """How many coarse tokens there are to select from, 0 in a model without attention.

        Args:
            img_size: Height and width of the images, or one number for both.
        """
        height, width = (-(-side // self.coarse_stride) for side in to_2tuple(img_size))  # every stage rounds up
        return height * width if self._attentions() else 0

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Patterns that order the parameters stem, trunk, PST, fusion; what they leave (the head) comes last."""
        return dict(
            stem=r'^(?:conv1|bn1|maxpool)',
            blocks=r'^layer(\d+)' if coarse else r'^layer(\d+)\.(\d+)',
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

        The five levels are the stem, layer1, layer2, [P ; C4] and F, at strides 2, 4, 8, 16 and 32.

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
        take_indices, max_index = feature_take_indices(5, indices)
        if max_index > self.last_level:
            raise ValueError(f'Level {max_index} was pruned from this model, the last one kept is {self.last_level}.')
        last = max_index if stop_early else self.last_level
        intermediates = []

        x = self.act1(self.bn1(self.conv1(x)))
        if 0 in take_indices:
            intermediates.append(x)
        for i, layer in ((1, self.layer1), (2, self.layer2)):
            if last < i:
                break
            x = self._stage(layer, self.maxpool(x) if i == 1 else x)
            if i in take_indices:
                intermediates.append(x)
        if last >= 3:
            c4 = self._stage(self.layer3, x)
            c5 = self._stage(self.layer4, c4)
            p_c4 = self.pst_cat(self._pst(c4, c5), c4)
            # a reparameterized model goes on without the concatenation, so that it is made only where it is asked for
            x = torch.cat(p_c4, dim=1) if isinstance(p_c4, tuple) and (last == 3 or 3 in take_indices) else p_c4
            if 3 in take_indices:
                intermediates.append(x)
            if last >= 4:
                x = self.fuse_merge(self.merge_cat(self.fuse_down(p_c4), c5))
                if 4 in take_indices:
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

        Level 3 needs layer4 and the PST, the levels below it neither.

        Args:
            indices: Indices of intermediate levels to keep.
            prune_norm: Ignored, the levels have no separate norm.
            prune_head: Whether to prune the convolution before the pooling, and the classifier.

        Returns:
            List of indices that were kept.
        """
        take_indices, max_index = feature_take_indices(5, indices)
        drop = []
        if max_index < 4:
            drop += ['fuse_down', 'merge_cat', 'fuse_merge']
        if max_index < 3:
            drop += ['layer3', 'layer4', 'pst', 'pst_cat']
        if max_index < 2:
            drop += ['layer2']
        if max_index < 1:
            drop += ['layer1', 'maxpool']
        for name in drop:
            setattr(self, name, nn.Identity())
        self.last_level = max_index
        if prune_head or max_index < 4:
            self.num_features = self.feature_info[max_index]['num_chs']
            # the head was sized for what `forward_features` gives
            self.conv_head = nn.Identity()
            self.head_skip = False
            self._set_classifier(0, '', self.num_features)
        return take_indices

    def _stage(self, stage: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)

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
            if self.last_level < 4:
                return self.forward_intermediates(x, [self.last_level], stop_early=True, intermediates_only=True)[0]
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq([self.layer1, self.layer2], x, flatten=True)
            c4 = checkpoint_seq(self.layer3, x)
            c5 = checkpoint_seq(self.layer4, c4)
        else:
            x = self.layer2(self.layer1(x))
            c4 = self.layer3(x)
            c5 = self.layer4(c4)
        p_c4 = self.pst_cat(self._pst(c4, c5), c4)
        return self._skip(self.fuse_merge(self.merge_cat(self.fuse_down(p_c4), c5)), c5)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Output of `forward_features` to logits (B, num_classes), or to what the classifier reads if `pre_logits`."""
        if self.head_skip:
            x = torch.cat([self.conv_head(x[:, :self.pst.out_chs]), x[:, self.pst.out_chs:]], dim=1)
        else:
            x = self.conv_head(x)
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)


def _create_resnet_pst(variant: str, pretrained: bool = False, **kwargs) -> ResNetPST:
    feature_cls = kwargs.get('feature_cls', 'getter')
    if kwargs.get('features_only') and feature_cls in ('list', 'dict'):
        raise ValueError(
            f"feature_cls='{feature_cls}' runs a model as a chain of modules, which {variant} is not: "
            f"use 'getter' (the default), 'hook' or 'fx'.")
    if pretrained:
        _check_weights_exist(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    elif not kwargs.get('pretrained_cfg'):
        # weights that were not asked for decide neither class count nor input size
        kwargs['pretrained_cfg'] = 'untrained'
    model = build_model_with_cfg(
        ResNetPST,
        variant,
        pretrained,
        pretrained_filter_fn=check_digest,
        feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), feature_cls='getter'),
        **kwargs,
    )
    drop_digest(model)
    return model


def _check_weights_exist(variant: str, pretrained_cfg: Any, pretrained_cfg_overlay: Optional[Dict[str, Any]]) -> None:
    """Raise a RuntimeError that says what to do where timm's own says only that there are no weights."""
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    if cfg.has_weights or cfg.state_dict:
        return
    name, tags = '.'.join(filter(None, (variant, cfg.tag))), timm.list_pretrained(f'{variant}.*')
    missing = f'{name}, only for {", ".join(tags)}' if tags else f'{variant} yet'
    raise RuntimeError(
        f'No pretrained weights exist for {missing}. The ways on are pst_timm.load_trunk for the weights of a plain '
        f'ResNet in its trunk, pst_timm.register_weights for your own, or the name of a published model, '
        f"'hf-hub:org/name'.")


def _cfg(url: str = '', **kwargs) -> Dict[str, Any]:
    return {
        'url': url,
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.95, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1', 'classifier': 'fc',
        'license': 'apache-2.0', 'paper_ids': 'arXiv:2505.12772',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'resnet18_pst.untrained': _cfg(),
    'resnet26_pst.untrained': _cfg(),
    'resnet50_pst.untrained': _cfg(),
    'resnet101_pst.untrained': _cfg(),
    'test_resnet_pst.untrained': _cfg(
        input_size=(3, 160, 160), pool_size=(5, 5), first_conv='conv1.0'),
    'test_resnet_pst.digits': _cfg(
        file=str(WEIGHTS / 'test_resnet_pst.digits.safetensors'),
        num_classes=10, label_names=tuple('0123456789'),
        input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0, first_conv='conv1.0'),
})


@register_model
def resnet18_pst(pretrained: bool = False, **kwargs) -> ResNetPST:
    """ResNet-18 with PST, the basic-block trunk; the paper's ResNet-18 is `resnet26_pst`."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2))
    return _create_resnet_pst('resnet18_pst', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet26_pst(pretrained: bool = False, **kwargs) -> ResNetPST:
    """ResNet-26 with PST: the Bottleneck 2,2,2,2 trunk that the authors' code calls ResNet-18."""
    model_args = dict(block=Bottleneck, layers=(2, 2, 2, 2))
    return _create_resnet_pst('resnet26_pst', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50_pst(pretrained: bool = False, **kwargs) -> ResNetPST:
    """ResNet-50 with PST."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3))
    return _create_resnet_pst('resnet50_pst', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet101_pst(pretrained: bool = False, **kwargs) -> ResNetPST:
    """ResNet-101 with PST, fused at 512 channels."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3), pst_width=512)
    return _create_resnet_pst('resnet101_pst', pretrained, **dict(model_args, **kwargs))


@register_model
def test_resnet_pst(pretrained: bool = False, **kwargs) -> ResNetPST:
    """A tiny model for tests and demos, in the spirit of timm's `test_resnet`; its weights read digits."""
    model_args = dict(
        block=[BasicBlock, BasicBlock, Bottleneck, BasicBlock], layers=(1, 1, 1, 1), stem_width=16,
        stem_type='deep', channels=(32, 48, 48, 96),
        pst_width=64, pst_head_dim=16, head_hidden_size=128)
    return _create_resnet_pst('test_resnet_pst', pretrained, **dict(model_args, **kwargs))
