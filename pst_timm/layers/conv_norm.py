"""Convolution + batch norm, on one map or on two concatenated, and their folded forms for inference."""
from typing import Any, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import ConvNormAct
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ['Concat', 'ConvNorm', 'FusedConvAct', 'MergeAct', 'MergeNorm', 'Pair', 'SplitConvAct', 'upsample_as']


class FusedConvAct(nn.Module):
    """A `ConvNorm` whose norm has been folded into the convolution: `act(conv(x))`."""

    def __init__(self, conv: nn.Conv2d, act: nn.Module):
        super().__init__()
        self.conv = conv
        self.act = act

    @property
    def out_channels(self) -> int:
        return self.conv.out_channels

    def folded(self) -> Tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the convolution, see `ConvNorm.folded`."""
        bias = self.conv.bias
        assert bias is not None  # narrows the type for TorchScript, folding always leaves a bias
        return self.conv.weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.conv(x))


class ConvNorm(ConvNormAct):
    """timm's `ConvNormAct` (same arguments, same state-dict names) that knows how to fold its norm.

    `timm.models.reparameterize_model` finds `fuse()` and puts a `FusedConvAct` in this layer's place.
    """

    def can_fold(self) -> bool:
        """Whether the norm is a batch norm with running statistics, a per-channel affine map at inference."""
        # some norms keep a running variance alone, which they do not use as a batch norm does
        return getattr(self.bn, 'running_mean', None) is not None and self.bn.weight is not None

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The inference form of this layer, or the layer itself where the norm has no running statistics."""
        if not self.can_fold():
            return self
        # the running statistics are folded whatever mode the layer is in, as timm's other fuse() methods do
        training = self.training
        conv = fuse_conv_bn_eval(self.conv.eval(), self.bn.eval())
        self.train(training)
        return FusedConvAct(conv, self.bn.act).train(training)

    def folded(self) -> Tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the single convolution that equals conv + norm at inference (activation left out).

        Returns:
            Weight (out, in / groups, kh, kw) and bias (out,).
        """
        scale = self.bn.weight * torch.rsqrt(self.bn.running_var + self.bn.eps)
        mean = self.bn.running_mean
        conv_bias = self.conv.bias
        if conv_bias is not None:
            mean = mean - conv_bias
        return self.conv.weight * scale.reshape(-1, 1, 1, 1), self.bn.bias - mean * scale


class Concat(nn.Module):
    """Channel concatenation as a module, so that feature hooks and FX can name its output."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.cat([a, b], dim=1)


class Pair(nn.Module):
    """Takes the place of a `Concat` in front of a `SplitConvAct`."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        return a, b


class SplitConvAct(nn.Module):
    """A `FusedConvAct` over two maps that need not be concatenated: conv([a ; b]) = conv_a(a) + conv_b(b)."""

    def __init__(self, fused: FusedConvAct, in_channels_a: int):
        """
        Args:
            fused: The convolution to split.
            in_channels_a: Channels of the first map.
        """
        super().__init__()
        conv = fused.conv
        self.conv_a = self._part(conv, 0, in_channels_a)
        self.conv_b = self._part(conv, in_channels_a, conv.in_channels)
        self.conv_b.bias = conv.bias
        self.act = fused.act

    @staticmethod
    def _part(conv: nn.Conv2d, start: int, end: int) -> nn.Conv2d:
        part = nn.Conv2d(
            end - start, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, bias=False,
            device='meta')
        part.weight = nn.Parameter(conv.weight.detach()[:, start:end].clone())
        return part

    def forward(self, x: Tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return self.act(self.conv_a(x[0]).add_(self.conv_b(x[1])))


def upsample_as(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Nearest upsampling of x (B, C, h, w) to the size of a map of 2h or 2h - 1 rows and 2w or 2w - 1 columns."""
    return F.interpolate(x, size=(like.shape[2], like.shape[3]), mode='nearest')


class MergeNorm(ConvNorm):
    """`act(norm(conv1x1([up(a) ; b])))` of a coarse or equal map a and a fine map b, with nothing concatenated.

    A 1x1 convolution of a concatenation is the sum of one on each map, and it commutes with nearest upsampling: each
    map is convolved at its own size. The state-dict names are those of a `ConvNorm` over the concatenation.
    """

    def __init__(self, in_channels_a: int, in_channels_b: int, out_channels: int, **kwargs: Any):
        """
        Args:
            in_channels_a: Channels of the first map.
            in_channels_b: Channels of the second map.
            out_channels: Channels of the output.
            kwargs: Options of `ConvNorm` for norm and activation.
        """
        super().__init__(in_channels_a + in_channels_b, out_channels, 1, **kwargs)
        self.in_channels_a = in_channels_a

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """See `ConvNorm.fuse`."""
        fused = super().fuse()
        return MergeAct(fused, self.in_channels_a).train(self.training) if isinstance(fused, FusedConvAct) else self

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Maps a (B, in_a, h, w) and b (B, in_b, H, W) to (B, out, H, W), where h is H / 2 rounded up, or H."""
        weight = self.conv.weight
        a = F.conv2d(a, weight[:, :self.in_channels_a])
        b = F.conv2d(b, weight[:, self.in_channels_a:])
        return self.bn(upsample_as(a, b) + b)


class MergeAct(SplitConvAct):
    """A `MergeNorm` whose norm has been folded into its convolution."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        b = self.conv_b(b)
        return self.act(b.add_(upsample_as(self.conv_a(a), b)))
