"""What a model with PST looks at: the tokens it attends to and selects, and what that does to its answer."""
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn

from pst_timm.layers import PyramidSparseAttention, SparseTokens

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

    Every number comes from the layers themselves, which run as they always do. The model is not touched: what is set
    and hooked is a twin of it that shares its weights, so that other threads may run the model meanwhile.

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
    twin = _twin(model, {})
    layers = [m for m in twin.modules() if isinstance(m, PyramidSparseAttention)]
    settings = [(layer.topk if topk is None else topk, fusion) for layer in layers]
    for layer in layers:
        layer.set_topk(0)
    coarse = twin(x)
    for layer, setting in zip(layers, settings):
        layer.set_topk(*setting)
    with _recorded(layers) as blocks:
        fine = twin(x)
    return Inspection(coarse, fine, blocks)


def _twin(module: nn.Module, made: Dict[nn.Module, nn.Module]) -> nn.Module:
    """A module of the same weights, whose settings and hooks are its own, as are those of the modules in it.

    Args:
        module: The module.
        made: The twins made so far, as a module may be in two places.
    """
    if module not in made:
        twin = made[module] = object.__new__(type(module))
        own = {name: copy(value) for name, value in vars(module).items() if 'hooks' in name}
        # a compiled forward would run the module itself, past the hooks
        vars(twin).update(vars(module), **own, _compiled_call_impl=None)
        twin._modules = {name: None if child is None else _twin(child, made) for name, child in module._modules.items()}
    return made[module]


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
