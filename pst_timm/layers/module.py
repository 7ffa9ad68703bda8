"""PST block and module: two neighbouring levels of a pyramid in, the finer one out."""
from inspect import signature
from typing import Any, List, Optional

import torch
import torch.fx
import torch.nn as nn
from timm.layers import DropPath, LayerType

from .attention import HasAttention, PyramidSparseAttention, check_maps
from .conv_norm import ConvNorm

__all__ = ['PyramidSparseBlock', 'PyramidSparseTransformer']

torch.fx.wrap('check_maps')  # FX wants it said in every file that calls it


class PyramidSparseBlock(nn.Module):
    """Residual pyramid sparse attention followed by a residual MLP of two 1x1 convolutions (paper, section 3)."""

    def __init__(
            self,
            dim: int,
            num_heads: int,
            mlp_ratio: float = 2.,
            zero_init: bool = False,
            drop_path: float = 0.,
            act_layer: LayerType = nn.SiLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            device=None,
            dtype=None,
            **attn_kwargs: Any,
    ):
        """
        Args:
            dim: Channels of both maps.
            num_heads: Number of heads, a divisor of `dim`.
            mlp_ratio: Hidden channels of the MLP over `dim`.
            zero_init: Start both residual branches at zero, by the weight of their last norm.
            drop_path: Probability of dropping each residual branch in training.
            act_layer: Activation of the MLP.
            norm_layer: Norm of every convolution.
            attn_kwargs: Options of `PyramidSparseAttention`, such as `topk=8`.

        Raises:
            TypeError: If there is no such option.
            ValueError: If the MLP would have no hidden channel, or an option is out of its range.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        hidden = int(dim * mlp_ratio)
        if hidden < 1:
            raise ValueError(f'mlp_ratio={mlp_ratio} leaves the MLP of {dim} channels no hidden channel.')
        self.attn = PyramidSparseAttention(dim, num_heads, norm_layer=norm_layer, **dd, **attn_kwargs)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.mlp = nn.Sequential(
            ConvNorm(dim, hidden, 1, norm_layer=norm_layer, act_layer=act_layer, **dd),
            ConvNorm(hidden, dim, 1, norm_layer=norm_layer, apply_act=False, **dd),
        )
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        if zero_init:
            for last in (self.attn.proj, self.mlp[1]):
                if getattr(last.bn, 'weight', None) is not None:
                    nn.init.zeros_(last.bn.weight)

    def forward(self, x: torch.Tensor, upper: torch.Tensor, fine: Optional[bool] = None) -> torch.Tensor:
        """Fine map (B, C, H, W) and coarse map (B, C, h, w) in, fine map out; see `PyramidSparseAttention.forward`."""
        x = x + self.drop_path1(self.attn(x, upper, fine))
        x = x + self.drop_path2(self.mlp(x))
        return x


class PyramidSparseTransformer(HasAttention, nn.Module):
    """Fuses a fine map and the coarser map above it into one map at the fine resolution (paper, section 3).

    Both maps are brought to a hidden width, the fine one passes through `depth` blocks that attend to the coarse one,
    and a 1x1 convolution reads the block inputs and the outputs of all blocks together.
    """

    def __init__(
            self,
            in_chs: int,
            upper_chs: int,
            out_chs: int,
            depth: int = 1,
            expansion: float = 0.5,
            head_dim: int = 32,
            act_layer: LayerType = nn.SiLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            device=None,
            dtype=None,
            **block_kwargs: Any,
    ):
        """
        Args:
            in_chs: Channels of the fine map.
            upper_chs: Channels of the coarse map.
            out_chs: Channels of the output.
            depth: Number of blocks. 0 leaves the convolutions on the fine map alone: nothing reads the coarse map.
            expansion: Width of the blocks over `out_chs`; the width must be a multiple of `head_dim`.
            head_dim: Channels per head.
            act_layer: Activation of the convolutions and the MLPs.
            norm_layer: Norm of every convolution.
            block_kwargs: Options of `PyramidSparseBlock` and of the attention in it, such as `mlp_ratio=3., topk=8`.

        Raises:
            TypeError: If there is no such option.
            ValueError: If the width of the blocks is not a multiple of `head_dim`, or an option is out of its range.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        hidden = int(expansion * out_chs)
        if hidden < 1 or head_dim < 1 or hidden % head_dim != 0:
            raise ValueError(
                f'The width of the blocks, expansion * out_chs = {expansion} * {out_chs} = {hidden}, '
                f'must be a multiple of head_dim={head_dim}.')
        if depth < 0:
            raise ValueError(f'depth must not be negative, got {depth}.')
        self.in_chs = in_chs
        self.upper_chs = upper_chs
        self.out_chs = out_chs
        self.depth = depth

        conv_kwargs = dict(norm_layer=norm_layer, act_layer=act_layer, **dd)
        self.conv_in = ConvNorm(in_chs, hidden, 1, **conv_kwargs)
        # without blocks nothing would read it, and an unused parameter stops DDP
        self.conv_upper = ConvNorm(upper_chs, hidden, 1, **conv_kwargs) if depth > 0 else nn.Identity()
        self.blocks = nn.ModuleList([
            PyramidSparseBlock(hidden, hidden // head_dim, **conv_kwargs, **block_kwargs)
            for _ in range(depth)
        ])
        if depth == 0:
            # values that nothing reads may be anything, a name that there is not is a mistake still
            known = {name for cls in (PyramidSparseBlock, PyramidSparseAttention) for name in signature(cls).parameters}
            if unknown := sorted(set(block_kwargs) - known):
                raise TypeError(f'{unknown[0]!r} is an option neither of PyramidSparseBlock nor of its attention.')
        self.conv_out = ConvNorm((depth + 1) * hidden, out_chs, 1, **conv_kwargs)

    @torch.jit.ignore
    def attentions(self) -> List[PyramidSparseAttention]:
        """The attention of each block, in the order in which they run."""
        # a loop over the list of a scripted module gives the blocks that it was scripted from
        return [block.attn for block in self.blocks.children()]

    def forward(self, x: torch.Tensor, upper: torch.Tensor, fine: Optional[bool] = None) -> torch.Tensor:
        """
        Args:
            x: Fine map (B, in_chs, H, W).
            upper: Coarse map (B, upper_chs, h, w); H is 2h, 2h - 1 or h, and W accordingly.
            fine: In training with `train_topk`, whether this step runs the fine branch; None draws it.

        Returns:
            The fused map (B, out_chs, H, W).

        Raises:
            ValueError: If the channels, the batch or the sizes of the two maps do not fit.
        """
        check_maps(x, self.in_chs, upper, self.upper_chs)
        return self._run(self.conv_in(x), upper, fine)

    def _run(self, x: torch.Tensor, upper: torch.Tensor, fine: Optional[bool]) -> torch.Tensor:
        """All that follows `conv_in`."""
        upper = self.conv_upper(upper)
        outs = [x]
        for block in self.blocks:
            x = block(x, upper, fine)
            outs.append(x)
        return self.conv_out(torch.cat(outs, dim=1))
