"""ResNet-PST: a ResNet whose last two stages are fused by a Pyramid Sparse Transformer.

Paper: `Pyramid Sparse Transformer: Enhancing Multi-Scale Feature Fusion with Dynamic Token Selection`
    - https://arxiv.org/abs/2505.12772

The trunk is timm's own ResNet, so that timm's ResNet weights load into it unchanged (`pst_timm.load_trunk`); C4 is
layer3 and C5 is layer4, and what follows them is in `fusion.py`.

Where this departs from the published code: its trunk puts SiLU inside the bottlenecks, and what it calls ResNet-18 is
the Bottleneck 2,2,2,2 trunk, named `resnet26_pst` here beside the true `resnet18_pst`; and the residual branches of the
PST blocks start at zero.
"""
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.layers import LayerType
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from .fusion import PSTModel, build_pst, pst_cfg

__all__ = ['ResNetPST']

WEIGHTS = Path(__file__).resolve().parent / 'weights'


class ResNetPST(PSTModel, ResNet):
    """ResNet with a PST neck over its last two stages and a widened classification head, see `PSTModel`.

    The five levels are the stem, layer1, layer2, [P ; C4] and F, at strides 2, 4, 8, 16 and 32.
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
            pst_zero_init: bool = True,
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
            pst_zero_init: Start the residual branches of the PST blocks at zero, as `zero_init_last` does the trunk's;
                False: as published.
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
        self._add_fusion(
            pst_width,
            head_hidden_size,
            head_skip,
            num_classes,
            global_pool,
            act_layer=pst_act_layer,
            norm_layer=norm_layer,
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
            **dd,
        )

    def _trunk(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq([self.layer1, self.layer2], x, flatten=True)
            c4 = checkpoint_seq(self.layer3, x)
            c5 = checkpoint_seq(self.layer4, c4)
        else:
            x = self.layer2(self.layer1(x))
            c4 = self.layer3(x)
            c5 = self.layer4(c4)
        return c4, c5

    @torch.jit.ignore
    def _trunk_levels(self, x: torch.Tensor, indices: Sequence[int]) -> List[torch.Tensor]:
        x = self.act1(self.bn1(self.conv1(x)))
        levels = [x] if 0 in indices else []
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)[:max(indices)]
        for i, stage in enumerate(stages, start=1):
            x = self.maxpool(x) if i == 1 else x
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            if i in indices:
                levels.append(x)
        return levels

    @torch.jit.ignore
    def _prune_trunk(self, last: int) -> None:
        for name in ('maxpool', 'layer1', 'layer2', 'layer3', 'layer4')[0 if last < 1 else last + 1:]:
            setattr(self, name, nn.Identity())

    @torch.jit.ignore
    def _trunk_groups(self, coarse: bool) -> Dict[str, Any]:
        return dict(
            stem=r'^(?:conv1|bn1|maxpool)',
            blocks=r'^layer(\d+)' if coarse else r'^layer(\d+)\.(\d+)',
        )


def _create_resnet_pst(variant: str, pretrained: bool = False, **kwargs) -> ResNetPST:
    return build_pst(ResNetPST, variant, variant.removesuffix('_pst'), pretrained, **kwargs)


def tin200_cfg() -> Dict[str, Any]:
    """What configurations of weights of Tiny ImageNet share: its 200 classes, by WordNet id and in words."""
    lines = Path(WEIGHTS, 'tin200_classes.tsv').read_text(encoding='utf-8').splitlines()
    words = dict(line.split('\t') for line in lines)
    return dict(num_classes=len(words), label_names=tuple(words), label_descriptions=words)


default_cfgs = generate_default_cfgs({
    'resnet18_pst.untrained': pst_cfg(),
    'resnet18_pst.tin200': pst_cfg(
        file=str(WEIGHTS / 'resnet18_pst.tin200.safetensors'), **tin200_cfg(),
        notes=('weights sha256 5a21f6ab8d397edd912605d31a7c1cf04afe3c5a403295a6048d67a58ede75b1',),
        input_size=(3, 128, 128), test_input_size=(3, 160, 160), pool_size=(4, 4), crop_pct=1.0),
    'resnet26_pst.untrained': pst_cfg(),
    'resnet34_pst.untrained': pst_cfg(),
    'resnet50_pst.untrained': pst_cfg(),
    'resnext50_32x4d_pst.untrained': pst_cfg(),
    'resnet101_pst.untrained': pst_cfg(),
    'test_resnet_pst.untrained': pst_cfg(
        input_size=(3, 160, 160), pool_size=(5, 5), first_conv='conv1.0'),
    'test_resnet_pst.digits': pst_cfg(
        file=str(WEIGHTS / 'test_resnet_pst.digits.safetensors'),
        notes=('weights sha256 797e522bce26f96fb206b41cd6827a43394681f584ae15c5892b0f321007498b',),
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
def resnet34_pst(pretrained: bool = False, **kwargs) -> ResNetPST:
    """ResNet-34 with PST."""
    model_args = dict(block=BasicBlock, layers=(3, 4, 6, 3))
    return _create_resnet_pst('resnet34_pst', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50_pst(pretrained: bool = False, **kwargs) -> ResNetPST:
    """ResNet-50 with PST."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3))
    return _create_resnet_pst('resnet50_pst', pretrained, **dict(model_args, **kwargs))


@register_model
def resnext50_32x4d_pst(pretrained: bool = False, **kwargs) -> ResNetPST:
    """ResNeXt-50 32x4d with PST: the trunk of grouped convolutions."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4)
    return _create_resnet_pst('resnext50_32x4d_pst', pretrained, **dict(model_args, **kwargs))


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
