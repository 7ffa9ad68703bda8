"""Pyramid sparse attention: coarse cross-level attention, then fine attention over a few selected tokens.

Paper: `Pyramid Sparse Transformer: Enhancing Multi-Scale Feature Fusion with Dynamic Token Selection`
    - https://arxiv.org/abs/2505.12772

Shapes used throughout: B images, C channels in `heads` heads of d = C / heads; the fine map has N = H * W tokens
(queries), the upper, coarser map M = h * w tokens (keys). Nothing of size N x M is ever stored.
"""
import numbers
import random
from contextlib import contextmanager
from typing import Final, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerType, register_notrace_function, register_notrace_module, use_fused_attn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .conv_norm import ConvNorm

__all__ = ['FINE_FUSIONS', 'HasAttention', 'PyramidSparseAttention', 'SparseTokens', 'attention_set']

FINE_FUSIONS = ('gate', 'joint')

UNTRACED = (
    'PyramidSparseAttention decides by sizes, settings and mode what it runs, which a traced graph cannot follow: keep '
    'it whole. timm.models.create_feature_extractor does; for others pass '
    'tracer_kwargs=dict(leaf_modules=timm.layers.get_notrace_modules(), '
    'autowrap_functions=timm.layers.get_notrace_functions()).')


class SparseTokens(NamedTuple):
    """What one attention layer looks at; tokens are numbered row by row."""
    fine_size: Tuple[int, int]
    """Height H and width W of the fine map."""
    coarse_size: Tuple[int, int]
    """Height h and width w of the coarse map, after pooling if the layer has `kv_pool`."""
    attention: torch.Tensor
    """Coarse attention (B, heads, H * W, h * w): what each query gives to each coarse token, 1 in all."""
    scores: torch.Tensor
    """Selection scores of the coarse tokens (B, heads, h * w)."""
    selected: torch.Tensor
    """Selected coarse tokens (B, heads, k), the best first; k is 0 for coarse attention alone."""
    children: torch.Tensor
    """Fine tokens below the selected ones (B, heads, k, 4), or 1 for equal maps; -1 where an odd edge has none.

    With `kv_pool` = p there are p * p times as many.
    """


def as_topk(value: int, name: str = 'topk') -> int:
    """Validate a number of selected tokens.

    Raises:
        ValueError: If the value is negative or not an integer.
    """
    # a bool is an Integral, but topk=True is a mistake rather than a count
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 0:
        raise ValueError(f'{name} must be a non-negative integer (0 turns fine attention off), got {value!r}.')
    return int(value)


def as_fine_fusion(value: str) -> str:
    """Validate the name of a fusion.

    Raises:
        ValueError: If the fusion is not one of `FINE_FUSIONS`.
    """
    if value not in FINE_FUSIONS:
        raise ValueError(f'fine_fusion must be one of {FINE_FUSIONS}, got {value!r}.')
    return value


def as_kv_pool(value: int) -> int:
    """Validate the side of the pooled squares.

    Raises:
        ValueError: If the value is not a positive integer.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f'kv_pool must be a positive integer (1 pools nothing), got {value!r}.')
    return int(value)


def as_probability(value: float, name: str) -> float:
    """Validate a probability.

    Raises:
        ValueError: If the value is not a number from 0 to 1.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0. <= value <= 1.:
        raise ValueError(f'{name} must be a number from 0 to 1, got {value!r}.')
    return float(value)


@torch.fx.wrap  # a shape is no condition on the values, so a traced graph may go past it
@register_notrace_function
def check_maps(x: torch.Tensor, channels: int, upper: torch.Tensor, upper_channels: int) -> None:
    """Check that x is a (B, channels, H, W) map and upper a (B, upper_channels, h, w) map of the same images.

    Raises:
        ValueError: If one is not, or they hold different numbers of images.
    """
    for name, t, chs in (('x', x, channels), ('upper', upper, upper_channels)):
        if t.ndim != 4 or t.shape[1] != chs:
            raise ValueError(f'{name} has shape {list(t.shape)}, expected (batch, {chs}, height, width).')
    if x.shape[0] != upper.shape[0]:
        raise ValueError(
            f'x holds {x.shape[0]} images and upper {upper.shape[0]}: both must be maps of the same batch.')


def level_ratio(fine_size: Tuple[int, int], coarse_size: Tuple[int, int]) -> int:
    """How many fine tokens a coarse token spans along each side: 2, or 1 for equal maps.

    Args:
        fine_size: Height and width of the fine map, in tokens.
        coarse_size: Height and width of the coarse map, in tokens.

    Returns:
        1 where the sizes are equal, 2 where each fine side is twice its coarse side, or one less.

    Raises:
        ValueError: For any other pair of sizes.
    """
    H, W = fine_size
    h, w = coarse_size
    if not torch.jit.is_scripting():
        # under export with dynamic sizes a plain == would record that the sizes differ as a condition on the input;
        # torch.jit.trace has tensors for sizes, which only a plain == can compare
        if not torch.jit.is_tracing() and statically_known_true(H == h) and statically_known_true(W == w):
            return 1
    # a stride 2 stage rounds up, so both 2h and 2h - 1 rows come down to h
    if (H + 1) // 2 == h and (W + 1) // 2 == w:
        return 2
    if H == h and W == w:
        return 1
    raise ValueError(
        f'x is {H}x{W} and upper is {h}x{w}: each side of x must be 2n or 2n - 1 for a side n of upper, '
        f'or both maps must have the same size.')


def divides(p: int, h: int, w: int) -> bool:
    """Whether p is known to divide both sizes; under export with dynamic sizes it is not."""
    if not torch.jit.is_scripting():
        if not torch.jit.is_tracing():
            return statically_known_true(h % p == 0) and statically_known_true(w % p == 0)
    return h % p == 0 and w % p == 0


@register_notrace_module  # sizes decide which tokens exist, so FX keeps the layer whole
class PyramidSparseAttention(nn.Module):
    """Attention from a fine map to the coarser map above it, refined on the children of the best coarse tokens.

    Every coarse token owns the 2 x 2 (or, for equal maps, 1 x 1) fine tokens below it. Each head scores the coarse
    tokens by their mean logit over all queries, keeps the `topk` best and attends to their children as well.

    `fine_fusion` says how the two meet:

    * 'gate' (paper): `g * fine + (1 - g) * coarse`, with g a sigmoid of a linear map of both. The map starts at zero
      (an even mix), where the published code leaves it at random values that coarse-only training never changes.
    * 'joint' (ours, no parameters): one softmax over the unselected coarse tokens and the children of the selected
      ones, each child's logit lowered by the log of how many siblings share its parent (itself included). Children
      that equal their parent then reproduce coarse attention exactly.

    `kv_pool` = p attends to a smaller coarse map (ours): keys and values are averaged over p x p coarse tokens, so that
    coarse attention costs p * p times less. The means take the tokens' place in all that is said above: they are what
    is scored and selected, and each owns the 2p x 2p fine tokens below it, whose keys and values are not pooled. A mean
    of fewer tokens, at an edge that p does not divide, weighs that much less (the log of their share in its logit):
    equal tokens then give the same with and without pooling. The position encoding still reads all coarse values.

    Training is coarse-only unless `train_topk` is set: the fine branch does not run. Where training does not run the
    gate, its gradient is zero, so that every parameter has one; kept from weight decay, it then stays as it is.
    Inference is deterministic, where the published code perturbs the selection there too.
    """
    fused_attn: Final[bool]
    sparse_kv: Final[bool]
    pos_enc: Final[bool]

    def __init__(
            self,
            dim: int,
            num_heads: int,
            topk: int = 0,
            fine_fusion: str = 'gate',
            train_topk: int = 0,
            train_fine_prob: float = 1.0,
            pos_enc: bool = True,
            kv_pool: int = 1,
            norm_layer: LayerType = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: Channels of both maps.
            num_heads: Number of heads, a divisor of `dim`.
            topk: Coarse tokens selected per image and head at inference, 0 for coarse attention alone.
            fine_fusion: How coarse and fine attention are combined, 'gate' or 'joint'.
            train_topk: Coarse tokens selected in training, 0 for coarse-only training.
            train_fine_prob: Share of the training steps in which the fine branch runs, if `train_topk` is set.
            pos_enc: Whether to add the position encoding; without it for ablations.
            kv_pool: Side of the squares of coarse tokens whose keys and values are averaged, 1 for none.
            norm_layer: Norm of every projection. With anything but a batch norm, the keys and values of the fine
                branch are projected on the whole map at inference too, as such a norm may depend on it.

        Raises:
            ValueError: If `dim` is not a positive multiple of `num_heads`, or an option is out of its range.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if dim < 1 or num_heads < 1 or dim % num_heads != 0:
            raise ValueError(f'dim must be a positive multiple of num_heads, got dim={dim} and num_heads={num_heads}.')
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim ** -0.5
        self.topk = as_topk(topk)
        self.fine_fusion = as_fine_fusion(fine_fusion)
        self.train_fusion = self.fine_fusion  # set_topk must not change what a run trains
        self.train_topk = as_topk(train_topk, 'train_topk')
        self.train_fine_prob = as_probability(train_fine_prob, 'train_fine_prob')
        self.kv_pool = as_kv_pool(kv_pool)
        self.fine_seed = 0
        self.fine_step = 0
        self.fused_attn = use_fused_attn()

        conv_kwargs = dict(apply_act=False, norm_layer=norm_layer, **dd)
        self.q = ConvNorm(dim, dim, 1, **conv_kwargs)
        self.kv = ConvNorm(dim, 2 * dim, 1, **conv_kwargs)  # per head: d keys, then d values
        self.proj = ConvNorm(dim, dim, 1, **conv_kwargs)
        self.pos_enc = pos_enc
        self.pe = ConvNorm(dim, dim, 7, groups=dim, **conv_kwargs) if pos_enc else nn.Identity()
        self.gate = nn.Linear(2 * self.head_dim, self.head_dim, **dd)  # shared by all heads
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self.sparse_kv = self.kv.can_fold()

    @torch.jit.ignore
    def set_topk(self, topk: int, fusion: Optional[str] = None) -> None:
        """Change the fine attention used at inference; parameters and training are not touched.

        Not while another thread runs the layer, which reads it as it goes.

        Args:
            topk: Coarse tokens selected per image and head, 0 for coarse attention alone.
            fusion: 'gate' or 'joint', unchanged if None.

        Raises:
            ValueError: If `topk` is negative or not an integer, or the fusion is unknown.
        """
        topk = as_topk(topk)
        if fusion is not None:
            self.fine_fusion = as_fine_fusion(fusion)
        self.topk = topk

    @torch.jit.ignore
    def set_fine_step(self, seed: int, step: int = 0) -> None:
        """Place the layer in the sequence of training steps that `draw_fine` walks through.

        Args:
            seed: Seed of the sequence, the same on all ranks.
            step: Index of the next training step.
        """
        self.fine_seed, self.fine_step = int(seed), int(step)

    @torch.jit.ignore
    def draw_fine(self) -> bool:
        """Decide whether the next training step runs the fine branch, with probability `train_fine_prob`.

        The draw depends on (seed, step) of `set_fine_step` alone, not on torch's generators, which differ from rank
        to rank: all ranks agree without talking to each other, and a resumed run continues the same sequence.
        """
        if not self.training or self.train_topk == 0 or self.train_fine_prob <= 0.:
            return False
        return self.train_fine_prob >= 1. or self._draw()

    @torch.compiler.disable
    def _draw(self) -> bool:
        draw = random.Random(f'{self.fine_seed}:{self.fine_step}').random()
        self.fine_step += 1
        return draw < self.train_fine_prob

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, heads * n, H, W) -> (B, heads, H * W, n), a view of token-major memory, as channels_last already is."""
        # heads laid out one after the other would cost a copy each way, and give the gradient of a single image strides
        # that batch norm misreads on the CPU (batch_norm_backward, seen with torch 2.15)
        x = x.permute(0, 2, 3, 1).contiguous()
        B, H, W, C = x.shape
        # no -1, which an empty batch leaves open
        return x.reshape(B, H * W, self.num_heads, C // self.num_heads).transpose(1, 2)

    def _map(self, x: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
        """(B, heads, H * W, d) -> (B, C, H, W), the inverse of `_heads`."""
        return x.transpose(1, 2).reshape(x.shape[0], size[0], size[1], self.dim).permute(0, 3, 1, 2)

    def _attend(
            self,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            bias: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """softmax(q k^T / sqrt(d) + bias) v: (B, heads, N, d) queries, (B, heads, S, d) keys, (B, heads, 1, S) bias."""
        if self.fused_attn:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        logits = (q * self.scale) @ k.transpose(-2, -1)
        if bias is not None:
            logits = logits + bias
        return logits.softmax(dim=-1) @ v

    def _keys(self, kv: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor], Tuple[int, int]]:
        """What coarse attention reads.

        Args:
            kv: Keys and values of the coarse map (B, 2C, h, w).

        Returns:
            Keys and values (B, heads, M, d), what is added to the logits (B, heads, 1, M) if anything, and the height
            and width of their map: the coarse one, or that of its means.
        """
        h, w, p = kv.shape[2], kv.shape[3], self.kv_pool
        bias: Optional[torch.Tensor] = None
        if p > 1:
            partial = not divides(p, h, w)
            if partial:  # what ceil_mode would do, which export with dynamic sizes does not get past
                kv = F.pad(kv, (0, p - 1, 0, p - 1))
            kv = F.avg_pool2d(kv, p)
            if partial:
                # the share of each mean in a full square
                rows = (h - p * torch.arange(kv.shape[2], device=kv.device)).clamp(max=p)
                cols = (w - p * torch.arange(kv.shape[3], device=kv.device)).clamp(max=p)
                share = (rows.unsqueeze(1) * cols).to(kv.dtype) / (p * p)
                kv = kv / share
                bias = share.log().flatten().expand(kv.shape[0], self.num_heads, 1, -1)
        k, v = self._heads(kv).chunk(2, dim=-1)
        return k, v, bias, (kv.shape[2], kv.shape[3])

    def _scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Mean logit of each coarse token over all queries (B, heads, M)."""
        q, k = q.detach(), k.detach()
        # the mean of the logits is the logit of the mean query: s = (mean_n Q_n) K^T / sqrt(d)
        return ((q.mean(dim=2, keepdim=True) * self.scale) @ k.transpose(-2, -1)).squeeze(2)

    def _select(self, q: torch.Tensor, k: torch.Tensor, topk: int) -> torch.Tensor:
        """Indices (B, heads, topk) of the coarse tokens with the highest scores."""
        scores = self._scores(q, k)
        if self.training:
            scores = scores - torch.empty_like(scores).exponential_().log()  # plus Gumbel noise
        return scores.topk(topk, dim=-1)[1]

    def _children(
            self,
            parents: torch.Tensor,
            fine_size: Tuple[int, int],
            coarse_size: Tuple[int, int],
            ratio: int,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Fine tokens owned by the selected coarse tokens.

        Args:
            parents: Indices into the coarse map (B, heads, k).
            fine_size: Height and width of the fine map.
            coarse_size: Height and width of the coarse map.
            ratio: Fine tokens per coarse token along each side.

        Returns:
            Indices into the fine map, and whether such a token exists, both (B, heads, k, ratio ** 2). A token beyond
            an odd edge does not exist and carries the index of a neighbour that does.
        """
        H, W = fine_size
        offset = torch.arange(ratio * ratio, device=parents.device)
        i = parents // coarse_size[1]
        j = parents - i * coarse_size[1]  # a remainder by a dynamic size has no ONNX translation
        row = i.unsqueeze(-1) * ratio + offset // ratio
        col = j.unsqueeze(-1) * ratio + offset % ratio
        exists = (row < H) & (col < W)
        return row.clamp(max=H - 1) * W + col.clamp(max=W - 1), exists

    def _fine_kv(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Keys and values (B, heads, S, 2d) of the fine tokens at index (B, heads, S)."""
        B, heads, S = index.shape
        if self.sparse_kv:
            if not self.training:
                # a 1x1 convolution and a batch norm act on each token alone: one small product per head, of the
                # head's own tokens with the head's own rows of the weight
                weight, bias = self.kv.folded()
                image = torch.arange(B, device=index.device).reshape(B, 1, 1)
                rows = (index + image * (x.shape[2] * x.shape[3])).transpose(0, 1).flatten()
                tokens = x.permute(0, 2, 3, 1).reshape(-1, self.dim).index_select(0, rows)
                kv = torch.baddbmm(
                    bias.reshape(heads, 1, 2 * self.head_dim),
                    tokens.reshape(heads, B * S, self.dim),
                    weight.reshape(heads, 2 * self.head_dim, self.dim).transpose(1, 2),
                )
                return kv.reshape(heads, B, S, 2 * self.head_dim).transpose(0, 1)
        # in training on the whole map, so that batch statistics do not depend on the selection
        return self._heads(self.kv(x)).gather(2, index.unsqueeze(-1).expand(-1, -1, -1, 2 * self.head_dim))

    def _fine(
            self,
            x: torch.Tensor,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            coarse_bias: Optional[torch.Tensor],
            coarse_size: Tuple[int, int],
            ratio: int,
            topk: int,
    ) -> torch.Tensor:
        """Coarse and fine attention combined (B, heads, N, d)."""
        parents = self._select(q, k, min(topk, k.shape[2]))
        index, exists = self._children(parents, (x.shape[2], x.shape[3]), coarse_size, ratio)
        fine_k, fine_v = self._fine_kv(x, index.flatten(2)).chunk(2, dim=-1)
        fusion = self.train_fusion if self.training else self.fine_fusion
        if fusion == 'joint':
            # log of one over the number of siblings, and -inf for a child that does not exist
            share = exists.to(q.dtype)
            share = (share / share.sum(dim=-1, keepdim=True)).log()
            weight = torch.zeros_like(k[..., 0])
            if coarse_bias is not None:
                weight = coarse_bias.squeeze(2)
                share = share + weight.gather(2, parents).unsqueeze(-1)
            bias = torch.cat([weight.scatter(2, parents, float('-inf')), share.flatten(2)], dim=2)
            return self._attend(q, torch.cat([k, fine_k], dim=2), torch.cat([v, fine_v], dim=2), bias.unsqueeze(2))
        coarse = self._attend(q, k, v, coarse_bias)
        missing = torch.zeros_like(exists, dtype=q.dtype).masked_fill(~exists, float('-inf'))
        fine = self._attend(q, fine_k, fine_v, missing.flatten(2).unsqueeze(2))
        gate = self.gate(torch.cat([coarse, fine], dim=-1)).sigmoid()
        return torch.lerp(coarse, fine, gate)  # g * fine + (1 - g) * coarse

    def forward(self, x: torch.Tensor, upper: torch.Tensor, fine: Optional[bool] = None) -> torch.Tensor:
        """
        Args:
            x: Fine map (B, C, H, W), the queries.
            upper: Coarse map (B, C, h, w), the keys and values; H is 2h, 2h - 1 or h, and W accordingly.
            fine: In training with `train_topk`, whether this step runs the fine branch; None draws it.

        Returns:
            The attended map (B, C, H, W).

        Raises:
            ValueError: If the channels, the batch or the sizes of the two maps do not fit.
        """
        if not torch.jit.is_scripting():
            if isinstance(x, torch.fx.Proxy):
                raise torch.fx.proxy.TraceError(UNTRACED)
        check_maps(x, self.dim, upper, self.dim)
        H, W = x.shape[2], x.shape[3]
        h, w = upper.shape[2], upper.shape[3]
        ratio = level_ratio((H, W), (h, w))
        topk = self.topk
        if self.training:
            topk = 0  # a scripted model trains coarse-only
            if not torch.jit.is_scripting():
                topk = self.train_topk if (self.draw_fine() if fine is None else fine) else 0

        q = self._heads(self.q(x))
        kv = self.kv(upper)
        k, v, bias, size = self._keys(kv)
        if topk > 0:
            out = self._fine(x, q, k, v, bias, size, ratio * self.kv_pool, topk)
        else:
            out = self._attend(q, k, v, bias)
        if self.training:
            # the gate takes part, with no effect, in steps that do not run it: DDP wants every parameter used
            out = out + 0. * (self.gate.weight.sum() + self.gate.bias.sum())

        out = self._map(out, (H, W))
        if self.pos_enc:
            if self.kv_pool > 1:
                v = self._heads(kv).chunk(2, dim=-1)[1]
            pe = self.pe(self._map(v, (h, w)))
            out = out + F.interpolate(pe, size=(H, W), mode='bilinear', align_corners=False)
        return self.proj(out)

    def inspect(self, x: torch.Tensor, upper: torch.Tensor, fine: Optional[bool] = None) -> SparseTokens:
        """What the layer, in eval mode, looks at when it is called with these maps.

        The coarse attention is held whole, N x M numbers per head, which `forward` never does.

        Args:
            x: See `forward`, as for the next two.
            upper: Coarse map.
            fine: Only training reads it.

        Raises:
            ValueError: If the channels, the batch or the sizes of the two maps do not fit.
        """
        check_maps(x, self.dim, upper, self.dim)
        fine_size = (x.shape[2], x.shape[3])
        ratio = level_ratio(fine_size, (upper.shape[2], upper.shape[3])) * self.kv_pool
        q = self._heads(self.q(x))
        k, _, bias, coarse_size = self._keys(self.kv(upper))
        M = k.shape[2]
        # attending to unit vectors gives the weights
        attention = self._attend(q, k, torch.eye(M, device=k.device, dtype=k.dtype).expand(*k.shape[:2], M, M), bias)
        selected = self._select(q, k, min(self.topk, M))
        index, exists = self._children(selected, fine_size, coarse_size, ratio)
        return SparseTokens(
            fine_size, coarse_size, attention, self._scores(q, k), selected, index.masked_fill(~exists, -1))


class HasAttention:
    """A module with attention layers inside, which are set together."""

    @torch.jit.ignore
    def attentions(self) -> List[PyramidSparseAttention]:
        """The attention layers, in the order in which they run."""
        raise NotImplementedError

    @torch.jit.ignore
    def set_topk(self, topk: int, fusion: Optional[str] = None) -> None:
        """Change the fine attention used at inference; weights and training are not touched.

        Works on a scripted module too; one that was saved, frozen or traced keeps what it had then. Not while other
        threads run it, which would see it change between its layers.

        Args:
            topk: Coarse tokens selected per image and head, 0 for coarse attention alone; more than there are
                selects all.
            fusion: 'gate' or 'joint', unchanged if None.

        Raises:
            ValueError: If `topk` is negative or not an integer, or the fusion is unknown.
        """
        for attn in self.attentions():
            attn.set_topk(topk, fusion)

    @torch.jit.ignore
    def set_fine_step(self, seed: int, step: int = 0) -> None:
        """Seed the draws of `train_fine_prob` and place them at a training step.

        Call it alike on all ranks. A run that calls it at the start of every epoch can be resumed at any of them.

        Args:
            seed: Seed of the sequence of draws.
            step: Index of the next training step.
        """
        for attn in self.attentions():
            attn.set_fine_step(seed, step)

    @torch.jit.ignore
    def draw_fine(self) -> bool:
        """Draw for all layers, which walk through the same sequence; see `PyramidSparseAttention.draw_fine`."""
        draws = [attn.draw_fine() for attn in self.attentions()]  # a list, as every layer has to take its draw
        return any(draws)


@contextmanager
def attention_set(
        layers: Sequence[PyramidSparseAttention],
        topk: Optional[int] = None,
        fusion: Optional[str] = None,
) -> Iterator[None]:
    """Set the fine attention of some layers for a while; afterwards each of them is as it was, also after an error.

    Args:
        layers: The layers.
        topk: Coarse tokens selected per image and head, as each layer is set if None.
        fusion: 'gate' or 'joint', as each layer is set if None.

    Raises:
        ValueError: If `topk` is negative or not an integer, or the fusion is unknown.
    """
    before = [(layer.topk, layer.fine_fusion) for layer in layers]
    try:
        for layer in layers:
            layer.set_topk(layer.topk if topk is None else topk, fusion)
        yield
    finally:
        for layer, settings in zip(layers, before):
            layer.set_topk(*settings)
