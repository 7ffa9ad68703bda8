"""The fast form of a model for inference, derived from the readable one."""
from collections import Counter
from copy import deepcopy

import torch.fx
import torch.nn as nn
from timm.layers import FrozenBatchNormAct2d, get_notrace_functions, get_notrace_modules
from timm.models import reparameterize_model
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.feature_extraction import NodePathTracer

from pst_timm.layers import FusedConvAct, Pair, SplitConvAct

from .fusion import PSTModel

__all__ = ['reparameterize']

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNormAct2d)


def reparameterize(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Fold a convolutional model for inference.

    What `timm.models.reparameterize_model` does, and beyond it: batch norms of the trunk are folded into their
    convolutions too, and a model with PST convolves the two halves of its concatenations apart instead of copying them
    together. A plain timm model is folded in the same way, which makes it a fair baseline. The answers are the same
    but for rounding; `set_topk`, `features_only`, scripting, tracing, compilation and export still work.

    Args:
        model: Any timm model that torch.fx can trace, not wrapped by DDP, an EMA or torch.compile.
        inplace: Change the model itself rather than a copy.

    Returns:
        The folded model, in eval mode.

    Raises:
        ValueError: If the model is wrapped or cannot be traced, or a module that is replaced has forward hooks.
    """
    for wrapped in ('module', '_orig_mod'):
        if isinstance(getattr(model, wrapped, None), nn.Module):
            raise ValueError(f'{type(model).__name__} wraps the model to fold: pass its .{wrapped}.')
    if inplace:
        reparameterize(model)  # a copy, so that an error leaves the model as it is
    else:
        model = deepcopy(model)
    hooked = {name: m for name, m in model.named_modules() if m._forward_hooks}
    model = reparameterize_model(model.eval(), inplace=True)
    _fold_batch_norms(model)
    for module in model.modules():
        if isinstance(module, PSTModel):
            _split_concatenations(module)
    kept = dict(model.named_modules())
    lost = [name for name, m in hooked.items() if kept.get(name) is not m]
    if lost:
        # feature_cls='hook' would go on without these levels
        raise ValueError(
            f'{lost[0]} is replaced in the folded model and would lose its forward hooks: '
            f"remove them first, or take features with feature_cls='getter'.")
    return model


def _fold_batch_norms(model: nn.Module) -> None:
    """Fold each batch norm that follows a convolution, and it alone, in the traced graph."""
    tracer = NodePathTracer(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions())
    try:
        graph = tracer.trace(model)
    except (torch.fx.proxy.TraceError, RuntimeError, TypeError) as e:
        raise ValueError(
            f'{type(model).__name__} cannot be traced, so its batch norms cannot be folded: {e}. '
            f'timm.models.reparameterize_model folds what the model itself offers.') from e
    calls = Counter(node.target for node in graph.nodes if node.op == 'call_module')
    modules = dict(model.named_modules())
    for node in graph.nodes:
        if node.op != 'call_module' or not isinstance(modules[node.target], NORMS):
            continue
        norm, source = modules[node.target], node.args[0]
        if norm.running_var is None or source.op != 'call_module' or len(source.users) > 1:
            continue
        conv = modules[source.target]
        # a subclass may do more than convolve with its weight
        if type(conv) is not nn.Conv2d or calls[source.target] > 1 or calls[node.target] > 1:
            continue
        model.set_submodule(source.target, fuse_conv_bn_eval(conv, norm))
        # timm's norms may carry an activation
        model.set_submodule(node.target, getattr(norm, 'act', nn.Identity()))


def _split_concatenations(model: PSTModel) -> None:
    """Give `fuse_down` and `fuse_merge` a convolution for each of their two inputs."""
    firsts = getattr(model.pst, 'out_chs', 0), getattr(model.fuse_down, 'out_channels', 0)
    for concat, conv, first in zip(('pst_cat', 'merge_cat'), ('fuse_down', 'fuse_merge'), firsts):
        fused = getattr(model, conv)
        if isinstance(fused, FusedConvAct):  # a model without its last levels has none
            setattr(model, concat, Pair())
            setattr(model, conv, SplitConvAct(fused, first))
