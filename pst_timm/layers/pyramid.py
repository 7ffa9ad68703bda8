"""Necks over the levels of a trunk: `PSTPyramid`, which fuses them by PST, and `PANPyramid`, its plain twin.

With the maps C1 (finest) to CL, each half as large as the one before (2n or 2n - 1 tokens over n), `PSTPyramid` is

    PL = CL
    Pi = PST([up(Pi+1) ; Ci], Ci+1)                      i = L - 1 ... 1, nearest upsampling
    N1 = P1
    Ni = SiLU(bn(conv1x1([down(Ni-1) ; Pi])))            i = 2 ... L, down = SiLU(bn(conv3x3 stride 2))

so for C3, C4, C5 of a detector: P4 = PST([up(C5) ; C4], C5), P3 = PST([up(P4) ; C3], C4), N4 = conv([down(P3) ; P4]),
N5 = conv([down(N4) ; C5]). Without `bottom_up` the outputs are the Pi, with PL = SiLU(bn(conv1x1(CL))) in the place of
CL. `PANPyramid` (Path Aggregation Network, https://arxiv.org/abs/1803.01534) has convolutions and sums instead:

    TL = bn(conv1x1(CL)),  Ti = bn(conv1x1(Ci)) + up(Ti+1)
    Pi = SiLU(bn(conv3x3(Ti)))
    N1 = P1,  Ni = SiLU(bn(conv3x3(down(Ni-1) + Pi)))

Extra levels above NL are as torchvision's: pooled (`LastLevelMaxPool`) or convolved (`LastLevelP6P7`).
"""
from collections import OrderedDict
from typing import Any, List, Optional, Sequence, Set, Union

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerType, register_notrace_function
from torch.utils.checkpoint import checkpoint

from .attention import HasAttention, PyramidSparseAttention
from .conv_norm import ConvNorm, MergeNorm, upsample_as
from .module import PyramidSparseTransformer

__all__ = ['PANPyramid', 'PSTPyramid']


def check_widths(in_chs: Sequence[int], out_chs: int) -> None:
    """Check the widths that a pyramid is made for.

    Raises:
        ValueError: If there are fewer than two levels, or a width is not positive.
    """
    if len(in_chs) < 2:
        raise ValueError(f'A pyramid needs two levels or more, got in_chs={list(in_chs)}.')
    if min(in_chs) < 1 or out_chs < 1:
        raise ValueError(f'Widths must be positive, got in_chs={list(in_chs)} and out_chs={out_chs}.')


@torch.fx.wrap  # a shape is no condition on the values, so a traced graph may go past it
@register_notrace_function
def check_levels(maps: List[torch.Tensor], names: List[str], in_chs: List[int]) -> None:
    """Check that maps are the levels that a pyramid was made for, the finest first.

    Raises:
        ValueError: If there is another number of them, or one has other channels, images or a size that does not fit.
    """
    if len(maps) != len(in_chs):
        raise ValueError(f'Got {len(maps)} maps, expected {len(in_chs)} with {in_chs} channels, the finest first.')
    for i, chs in enumerate(in_chs):
        shape = maps[i].shape
        if len(shape) != 4 or shape[1] != chs:
            raise ValueError(
                f'Map {names[i]} has shape {list(shape)}, expected (batch, {chs}, height, width): the maps of this '
                f'pyramid have {in_chs} channels, the finest first.')
        if i > 0:
            fine = maps[i - 1].shape
            if shape[0] != fine[0]:
                raise ValueError(f'Map {names[i]} holds {shape[0]} images and map {names[i - 1]} {fine[0]}.')
            if (fine[2] + 1) // 2 != shape[2] or (fine[3] + 1) // 2 != shape[3]:
                raise ValueError(
                    f'Map {names[i - 1]} is {fine[2]}x{fine[3]} and map {names[i]} is {shape[2]}x{shape[3]}: the '
                    f'finest comes first, and each side of a map must be 2n or 2n - 1 for a side n of the next.')


def check_names(names: List[str], extra: List[str]) -> None:
    """Check that no map has the name of an extra level, which would take its place in the answer.

    Raises:
        ValueError: If one has.
    """
    for name in extra:
        if name in names:
            raise ValueError(
                f'Map {name!r} has the name of an extra level, which would take its place: give the maps other '
                f'names, or a list.')


class ExtraLevels(nn.Module):
    """Levels above the last: convolved as torchvision's `LastLevelP6P7`, or one pooled as its `LastLevelMaxPool`."""

    def __init__(self, chs: int, levels: Union[int, str], device=None, dtype=None):
        """
        Args:
            chs: Channels of the last level and of the extra ones.
            levels: Number of convolved levels, or 'pool' for one pooled level.

        Raises:
            ValueError: If it is neither.
        """
        super().__init__()
        if levels != 'pool' and (isinstance(levels, bool) or not isinstance(levels, int) or levels < 0):
            raise ValueError(
                f"extra_levels must be a number of convolved levels (0 for none) or 'pool', got {levels!r}.")
        self.pool = levels == 'pool'
        self.names: List[str] = ['pool'] if self.pool else [f'p{6 + i}' for i in range(int(levels))]
        self.convs = nn.ModuleList([
            nn.Conv2d(chs, chs, 3, stride=2, padding=1, device=device, dtype=dtype)
            for _ in range(0 if self.pool else len(self.names))])

    def forward(self, x: torch.Tensor) -> List[torch.Tensor]:
        """The last level (B, C, H, W) to the extra ones, each half as large, rounded up, as the one before."""
        outs: List[torch.Tensor] = []
        if self.pool:
            outs.append(F.max_pool2d(x, kernel_size=1, stride=2))
        for i, conv in enumerate(self.convs):
            x = conv(F.relu(x) if i > 0 else x)
            outs.append(x)
        return outs


class Pyramid(nn.Module):
    """What the necks share: maps in and out as a list or a dict, extra levels, initial weights."""

    def __init__(self, in_chs: Sequence[int], out_chs: int, extra_levels: Union[int, str], device=None, dtype=None):
        super().__init__()
        check_widths(in_chs, out_chs)
        self.in_chs: List[int] = list(in_chs)
        self.out_chs = out_chs
        self.out_channels = out_chs  # torchvision's name for it
        self.extra = ExtraLevels(out_chs, extra_levels, device=device, dtype=dtype)
        self.num_levels = len(self.in_chs) + len(self.extra.names)
        self.grad_checkpointing = False

    def _init_weights(self) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d):  # as the trunk's
                nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')
        for conv in self.extra.convs:  # as torchvision's
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute again in the backward pass, instead of keeping it, what lies within each PST, or within a PAN."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Names of the gates, if any: where training does not run them, decay is all that would move them."""
        return {name for name, _ in self.named_parameters() if '.attn.gate.' in name}

    def _levels(self, maps: List[torch.Tensor]) -> List[torch.Tensor]:
        raise NotImplementedError

    def forward(self, maps: List[torch.Tensor]) -> List[torch.Tensor]:
        """
        Args:
            maps: Maps (B, in_chs[i], H, W), the finest first, each half as large, rounded up, as the one before: a
                list, a tuple or a dict in this order. A scripted pyramid takes a list.

        Returns:
            Maps (B, out_chs, H, W) of the same sizes and the extra levels after them: a list, or an `OrderedDict` for
            a dict, with the names of the maps and 'p6', 'p7' ... or 'pool' for the extra levels.

        Raises:
            ValueError: If their number, channels, batch or sizes do not fit, or a name is that of an extra level.
        """
        if not torch.jit.is_scripting():
            if isinstance(maps, dict):
                names = list(maps)
                check_levels(list(maps.values()), [repr(name) for name in names], self.in_chs)
                check_names(names, self.extra.names)
                outs = self._outputs(list(maps.values()))
                return OrderedDict(zip(names + self.extra.names, outs))
        check_levels(maps, [str(i) for i in range(len(maps))], self.in_chs)
        return self._outputs(maps)

    def _outputs(self, maps: List[torch.Tensor]) -> List[torch.Tensor]:
        outs = self._levels(maps)
        return outs + self.extra(outs[-1])


class PyramidLevel(PyramidSparseTransformer):
    """PST([up(above) ; x], upper): the module over a map to which the level above it has been added."""

    def __init__(self, above_chs: int, in_chs: int, upper_chs: int, out_chs: int, **kwargs: Any):
        """
        Args:
            above_chs: Channels of the fused level above.
            in_chs: Channels of the fine map.
            upper_chs: Channels of the coarse map that is attended to.
            out_chs: Channels of the output.
            kwargs: See `PyramidSparseTransformer`.
        """
        super().__init__(above_chs + in_chs, upper_chs, out_chs, **kwargs)
        self.conv_in = MergeNorm(
            above_chs, in_chs, self.conv_in.out_channels,
            **{name: kwargs[name] for name in ('norm_layer', 'act_layer', 'device', 'dtype')})

    def forward(
            self,
            above: torch.Tensor,
            x: torch.Tensor,
            upper: torch.Tensor,
            fine: Optional[bool] = None,
    ) -> torch.Tensor:
        """Fused level above (B, above_chs, h, w), fine map (B, in_chs, H, W) and coarse map (B, upper_chs, h, w)."""
        x = self.conv_in(above, x)
        if not self.training:
            # laid out as the attention reads it: one copy here saves several of large maps
            x = x.contiguous(memory_format=torch.channels_last)
        return self._run(x, upper, fine)


class PSTPyramid(HasAttention, Pyramid):
    """A pyramid whose top-down steps are Pyramid Sparse Transformers, followed by strided convolutions bottom-up.

    State-dict names: `top_down.{i}` is a `PyramidSparseTransformer` over the concatenation, with its names, from the
    coarsest level (P4 of three) to the finest; `down.{i}` and `merge.{i}` run from the finest to the coarsest.
    """

    def __init__(
            self,
            in_chs: Sequence[int],
            out_chs: int,
            depth: int = 1,
            expansion: float = 0.5,
            head_dim: int = 32,
            extra_levels: Union[int, str] = 0,
            bottom_up: bool = True,
            kv_pool: Union[int, Sequence[int]] = 1,
            act_layer: LayerType = nn.SiLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            device=None,
            dtype=None,
            **block_kwargs: Any,
    ):
        """
        Args:
            in_chs: Channels of the maps, the finest first.
            out_chs: Channels of all outputs.
            depth: Blocks in each PST.
            expansion: Width of the blocks over `out_chs`; the width must be a multiple of `head_dim`.
            head_dim: Channels per head.
            extra_levels: Number of convolved levels above the last one, or 'pool' for one pooled level.
            bottom_up: Whether the strided convolutions follow; without them the outputs are those of the PSTs.
            kv_pool: See `PyramidSparseAttention`: one for all PSTs, or one for each, that of the finest first.
            act_layer: Activation of the convolutions and the MLPs.
            norm_layer: Norm of every convolution but the extra levels', which have none.
            block_kwargs: Options of `PyramidSparseBlock` and of the attention in it, such as `topk=8, drop_path=0.1`.

        Raises:
            TypeError: If there is no such option.
            ValueError: If there are fewer than two levels, the width of the blocks is not a multiple of `head_dim`, or
                an option is out of its range.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(in_chs, out_chs, extra_levels, **dd)
        conv_kwargs = dict(norm_layer=norm_layer, act_layer=act_layer, **dd)
        levels = range(len(in_chs))
        pools = list(kv_pool) if isinstance(kv_pool, Sequence) else [kv_pool] * (len(in_chs) - 1)
        if len(pools) != len(in_chs) - 1:
            raise ValueError(
                f'kv_pool must be one number, or one for each of the {len(in_chs) - 1} PSTs, got {kv_pool!r}.')
        # in the order in which they run, the coarsest first
        self.top_down = nn.ModuleList([
            PyramidLevel(
                in_chs[i + 1] if i == len(in_chs) - 2 else out_chs, in_chs[i], in_chs[i + 1], out_chs, depth=depth,
                expansion=expansion, head_dim=head_dim, kv_pool=pools[i], **conv_kwargs, **block_kwargs)
            for i in reversed(levels[:-1])])
        self.conv_top = nn.Identity() if bottom_up else ConvNorm(in_chs[-1], out_chs, 1, **conv_kwargs)
        self.down = nn.ModuleList([
            ConvNorm(out_chs, out_chs, 3, stride=2, **conv_kwargs) for _ in levels[1:] if bottom_up])
        self.merge = nn.ModuleList([
            MergeNorm(out_chs, in_chs[i] if i == len(in_chs) - 1 else out_chs, out_chs, **conv_kwargs)
            for i in levels[1:] if bottom_up])
        self._init_weights()

    @torch.jit.ignore
    def attentions(self) -> List[PyramidSparseAttention]:
        """The attention of each block, in the order in which they run."""
        return [attn for level in self.top_down.children() for attn in level.attentions()]

    def _levels(self, maps: List[torch.Tensor]) -> List[torch.Tensor]:
        x = maps[-1]
        outs = [self.conv_top(x)]
        for i, level in enumerate(self.top_down):
            fine, upper = maps[len(maps) - 2 - i], maps[len(maps) - 1 - i]
            if self.grad_checkpointing and not torch.jit.is_scripting():
                # drawn outside, so that the recomputation repeats the step it belongs to
                x = checkpoint(level, x, fine, upper, level.draw_fine(), use_reentrant=False)
            else:
                x = level(x, fine, upper)
            outs.insert(0, x)
        for i, (down, merge) in enumerate(zip(self.down, self.merge)):
            x = merge(down(x), outs[i + 1])
            outs[i + 1] = x
        return outs


class PANPyramid(Pyramid):
    """The plain twin of `PSTPyramid`: the same maps in and out, convolutions and sums alone."""

    def __init__(
            self,
            in_chs: Sequence[int],
            out_chs: int,
            extra_levels: Union[int, str] = 0,
            act_layer: LayerType = nn.SiLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        """
        Args:
            in_chs: Channels of the maps, the finest first.
            out_chs: Channels of all outputs.
            extra_levels: Number of convolved levels above the last one, or 'pool' for one pooled level.
            act_layer: Activation of the convolutions.
            norm_layer: Norm of every convolution but the extra levels', which have none.

        Raises:
            ValueError: If there are fewer than two levels, or an option is out of its range.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(in_chs, out_chs, extra_levels, **dd)
        conv_kwargs = dict(norm_layer=norm_layer, act_layer=act_layer, **dd)
        upper_chs = self.in_chs[1:]
        self.lateral = nn.ModuleList([ConvNorm(chs, out_chs, 1, apply_act=False, **conv_kwargs) for chs in in_chs])
        self.top_down = nn.ModuleList([ConvNorm(out_chs, out_chs, 3, **conv_kwargs) for _ in in_chs])
        self.down = nn.ModuleList([ConvNorm(out_chs, out_chs, 3, stride=2, **conv_kwargs) for _ in upper_chs])
        self.merge = nn.ModuleList([ConvNorm(out_chs, out_chs, 3, **conv_kwargs) for _ in upper_chs])
        self._init_weights()

    def _levels(self, maps: List[torch.Tensor]) -> List[torch.Tensor]:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(self._run, maps, use_reentrant=False)
        return self._run(maps)

    def _run(self, maps: List[torch.Tensor]) -> List[torch.Tensor]:
        sums = [lateral(maps[i]) for i, lateral in enumerate(self.lateral)]
        for i in range(len(sums) - 1, 0, -1):
            sums[i - 1] = sums[i - 1] + upsample_as(sums[i], sums[i - 1])
        outs = [conv(sums[i]) for i, conv in enumerate(self.top_down)]
        x = outs[0]
        for i, (down, merge) in enumerate(zip(self.down, self.merge)):
            x = merge(down(x) + outs[i + 1])
            outs[i + 1] = x
        return outs
