"""What a model with PST looks at: the tokens it attends to and selects, and what that does to its answer."""
from contextlib import ExitStack, contextmanager
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn

from pst_timm.layers import PyramidSparseAttention, SparseTokens, attention_set

__all__ = ['Inspection', 'inspect_tokens']


class Inspection(NamedTuple):
    """What a model looks at in a batch of images, and what it answers."""
    coarse: Any
    """Output of the model with coarse attention alone; logits (B, num_classes) for a classifier."""
    fine: Any
    """Output of the model with fine attention over the selected tokens as well."""
    blocks: List[SparseTokens]
    """Tokens of each PST block, in the order in which they run; seen with fine attention on."""


@torch.no_grad()
def inspect_tokens(
        model: nn.Module,
        x: torch.Tensor,
        topk: Optional[int] = None,
        fusion: Optional[str] = None,
) -> Inspection:
    """Look at the tokens that a model attends to and selects.

    Every number comes from the layers themselves, which run as they always do; their settings are as before afterwards.

    Args:
        model: A model with PST in eval mode, folded or not; also one that holds it as a part.
        x: Images (B, in_chans, H, W), normalised as the model expects them.
        topk: Coarse tokens to select per image and head, as the model is set if None. With 0 none are selected and
            both outputs are those of coarse attention.
        fusion: 'gate' or 'joint', as the model is set if None.

    Raises:
        ValueError: If the model has no PST attention, is in training mode or compiled, the images are no batch, or
            `topk` or `fusion` is out of its range.
    """
    if hasattr(model, '_orig_mod'):
        # a compiled graph runs past the hooks
        raise ValueError(f'{type(model).__name__} is a compiled model: pass its ._orig_mod.')
    layers = [m for m in model.modules() if isinstance(m, PyramidSparseAttention)]
    if not layers:
        raise ValueError(
            f'{type(model).__name__} has no PST attention to look at: it needs a model such as resnet18_pst with '
            f'pst_depth of at least 1, not scripted, and not pruned below the PST.')
    if any(m.training for m in (model, *layers)):
        raise ValueError('The model is in training mode, in which it selects at random or not at all: call eval().')
    if x.ndim != 4:
        raise ValueError(f'x has shape {tuple(x.shape)}, expected a batch of images (B, in_chans, H, W).')
    with attention_set(layers, 0):
        coarse = model(x)
    with attention_set(layers, topk, fusion), _recorded(layers) as blocks:
        fine = model(x)
    return Inspection(coarse, fine, blocks)


@contextmanager
def _recorded(layers: List[PyramidSparseAttention]) -> Iterator[List[SparseTokens]]:
    """A list that fills with what the layers look at as they run."""
    seen: List[SparseTokens] = []

    def record(layer: nn.Module, args: Tuple[Any, ...], kwargs: Dict[str, Any], output: torch.Tensor) -> None:
        seen.append(layer.inspect(*args, **kwargs))

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(record, with_kwargs=True))
        yield seen
