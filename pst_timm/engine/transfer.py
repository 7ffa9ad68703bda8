"""Which part of a model starts from other weights, and which part stays as it is."""
import logging
import re
from argparse import Namespace
from typing import List, Set

import torch.nn as nn

from pst_timm.checkpoints.trunk import load_trunk
from pst_timm.utils.errors import PSTError, did_you_mean

__all__ = ['Frozen', 'apply_transfer']

_logger = logging.getLogger(__name__)


class Frozen:
    """The modules of a model that do not train; their batch-norm statistics and dropout stay at rest too."""

    def __init__(self, model: nn.Module, names: Set[str]):
        """
        Args:
            model: The model, whose parameters are switched off here.
            names: Names of modules or parameters, with everything below them.
        """
        self.model, self.names = model, names
        self.parameters = [p for n, p in model.named_parameters() if _below(n, names)]
        for p in self.parameters:
            p.requires_grad_(False)

    def rest(self) -> None:
        """Put the frozen modules into inference mode; call it after every `train()`."""
        for name, module in self.model.named_modules():  # found anew: those of --sync-bn take the place of others
            if _below(name, self.names):
                module.eval()


def _below(name: str, names: Set[str]) -> bool:
    parts = name.split('.')
    return any('.'.join(parts[:i]) in names for i in range(1, len(parts) + 1))


def _groups(model: nn.Module, *groups: str) -> Set[str]:
    """Names of the modules and parameters in groups of timm's `group_matcher`."""
    matcher = model.group_matcher(coarse=True)
    patterns = [matcher[g] for g in groups if g in matcher]
    patterns = [p for ps in patterns for p in ([ps] if isinstance(ps, str) else [q for q, *_ in ps])]
    names = [n for n, _ in model.named_modules()] + [n for n, _ in model.named_parameters()]
    return {n for n in names if any(re.match(p, n) for p in patterns)}


def _named(model: nn.Module, names: List[str]) -> Set[str]:
    modules = {n for n, _ in model.named_modules() if n}
    chosen = set()
    for name in names:
        if name in modules:
            chosen.add(name)
        elif name in model.group_matcher(coarse=True):
            chosen |= _groups(model, name)
        else:
            known = [n for n, _ in model.named_children()] + list(model.group_matcher(coarse=True))
            raise PSTError(
                f'--freeze {name}: the model has no such module.{did_you_mean(name, {*known, *modules})} '
                f'Its parts are {", ".join(dict.fromkeys(known))}.')
    return chosen


def _all_but(model: nn.Module, kept: nn.Module) -> Set[str]:
    trained = {id(p) for p in kept.parameters()}
    modules = {n for n, m in model.named_modules() if n and not any(x is kept for x in m.modules())}
    return modules | {n for n, p in model.named_parameters() if id(p) not in trained}


def apply_transfer(args: Namespace, model: nn.Module) -> Frozen:
    """Freeze what --freeze, --freeze-trunk and --linear-probe name, and load the trunk of --trunk-checkpoint.

    Raises:
        PSTError: If a name is not part of the model, or the trunk cannot be had or does not fit.
    """
    names = _named(model, args.freeze or [])
    if args.freeze_trunk:
        names |= _groups(model, 'stem', 'blocks', 'trunk')
    if args.linear_probe:
        names |= _all_but(model, model.get_classifier())
    frozen = Frozen(model, names)
    if not any(p.requires_grad for p in model.parameters()):
        raise PSTError('Nothing is left to train: freeze less.')
    if args.trunk_checkpoint:
        load_start(model, args.trunk_checkpoint)
    return frozen


def load_start(model: nn.Module, source: str) -> None:
    """Load the trunk of a model, see `load_trunk`; errors as in `apply_transfer`."""
    try:
        _logger.info(f'Trunk from {source}: {load_trunk(model, source)}.')
    except (ValueError, RuntimeError, OSError) as e:
        error = type(e) if isinstance(e, PSTError) else PSTError
        raise error(f'--trunk-checkpoint {source}: {e}') from e
