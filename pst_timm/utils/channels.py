"""Which channels of a network hang together: what leaves one layer and enters another can only be cut in all of them.

The graph is Torch-Pruning's (DepGraph, https://arxiv.org/abs/2301.12900); the channels are followed one by one here.
"""
import copy
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence, Set, Tuple

import torch
import torch.nn as nn

from .errors import PSTError

__all__ = ['Group', 'Member', 'channel_groups']

# what mixes the channels of its input, or has their number in its code: they stay whole
MIXING = ('bmm', 'scaleddotproduct', 'softmax', 'einsum')
WHOLE = ('SPLIT', 'SLICE', 'UNBIND', 'EXPAND', 'OUTPUT', 'EMBED', 'LSTM', 'MHA')


class Member(NamedTuple):
    """Channels of one layer that belong to a group."""
    name: str
    """Name of the module; or of a parameter that is no convolution's, linear layer's or norm's."""
    side: str
    """'in' or 'out': whether they enter the layer or leave it. What has as many of both by its nature, such as a norm,
    has 'out' alone; a grouped convolution has both."""
    indices: torch.Tensor
    """Channels of each unit (units, channels of a unit), in rising order."""


class Group(NamedTuple):
    """Units of the same kind: each is a set of channels that can only be cut together, and from the others apart."""
    members: List[Member]

    @property
    def units(self) -> int:
        """How many units there are."""
        return len(self.members[0].indices)


def channel_groups(model: nn.Module, example: torch.Tensor, keep: Sequence[str] = ()) -> List[Group]:
    """The channels of a network that can be cut, as groups of units.

    Channels of the output are not among them, nor what attention, a split or a slice of channels reads. A grouped
    convolution can be cut by whole groups.

    Args:
        model: The network, with whatever of it that is switchable switched to what can be traced.
        example: An input (B, channels, height, width); only its shape is read.
        keep: Names of modules that must stay as wide as they are, on both sides.

    Raises:
        PSTError: If Torch-Pruning is not installed, or cannot follow the network.
    """
    try:
        import torch_pruning
    except ImportError as e:
        raise PSTError(f"Channels cannot be followed ({e}): pip install 'pst_timm[prune]'.") from None
    twin = copy.deepcopy(model).to('meta').eval().requires_grad_(True)
    dtype = next(twin.parameters()).dtype
    graph = torch_pruning.DependencyGraph()
    try:
        with torch.enable_grad():
            graph.build_dependency(twin, torch.empty(example.shape, dtype=dtype, device='meta'), verbose=False)
    except Exception as e:  # whatever it meets in a network that nobody tried
        reason = ' '.join(str(e).split())[:300] or type(e).__name__
        raise PSTError(f'The channels of {type(model).__name__} cannot be followed: {reason}') from e
    return _Channels(graph, twin, keep).groups()


class _Channels:
    """Slots are (node, side, channel); those that hang together are united."""

    def __init__(self, graph: Any, model: nn.Module, keep: Sequence[str]):
        self.graph = graph
        self.names = {id(module): name for name, module in model.named_modules()}
        self.names.update((id(p), name) for name, p in model.named_parameters())
        self.nodes = list(graph.module2node.values())
        self.number = {id(node): i for i, node in enumerate(self.nodes)}
        self.pruners = [graph.get_pruner_of_module(node.module) for node in self.nodes]
        self.keep = tuple(keep)
        self.slots: Dict[Tuple[int, int, int], int] = {}
        self.parent: List[int] = []
        self.followed: Set[Tuple[int, int, int]] = set()
        self.whole = [self._is_whole(node) for node in self.nodes]

    def groups(self) -> List[Group]:
        """All that can be cut."""
        for i, node in enumerate(self.nodes):
            if isinstance(node.module, (nn.modules.conv._ConvNd, nn.Linear)):
                self._follow(i, self.pruners[i].get_out_channels(node.module))
                self._unite_groups(i)
        units: Dict[int, Dict[Tuple[str, str], List[int]]] = {}
        dropped = set()
        for (i, side, channel), slot in self.slots.items():
            root = self._find(slot)
            if self.whole[i] or (side == 0 and not self.nodes[i].outputs):  # nothing follows the network's output
                dropped.add(root)
            for member in self._members(i, side):
                units.setdefault(root, {}).setdefault(member, []).append(channel)
        alike: Dict[Tuple[Tuple[str, str, int], ...], List[Dict[Tuple[str, str], List[int]]]] = {}
        for root, unit in units.items():
            if root not in dropped:
                signature = tuple(sorted((*member, len(set(found))) for member, found in unit.items()))
                alike.setdefault(signature, []).append(unit)
        return [self._group(signature, found) for signature, found in alike.items()]

    def _group(
            self,
            signature: Sequence[Tuple[str, str, int]],
            units: Sequence[Dict[Tuple[str, str], List[int]]],
    ) -> Group:
        # the order of the layers that they come from
        units = sorted(units, key=lambda unit: sorted(unit[signature[0][:2]]))
        return Group([
            Member(name, side, torch.tensor([sorted(set(unit[name, side])) for unit in units]))
            for name, side, _ in signature])

    def _is_whole(self, node: Any) -> bool:
        """Whether channels that come here are not to be cut."""
        module = node.module
        if node.type.name in WHOLE:
            return True
        if node.type.name == 'ELEMENTWISE':
            operation = node.grad_fn.name().lower() if hasattr(node.grad_fn, 'name') else ''
            return any(word in operation for word in MIXING)
        name = self.names.get(id(module), '')
        if any(name == kept or name.startswith(f'{kept}.') for kept in self.keep):
            return True
        if isinstance(module, nn.GroupNorm):
            return module.num_groups > 1
        return node.type.name == 'DEPTHWISE_CONV' and module.in_channels != module.out_channels

    def _side(self, i: int, function: Callable) -> int:
        """0 for what leaves a node, 1 for what enters it; nodes with one kind of channels have 0 alone."""
        return 0 if function == self.pruners[i].prune_out_channels else 1

    def _members(self, i: int, side: int) -> Iterator[Tuple[str, str]]:
        """What a slot is called in a group; nothing for operations without weights."""
        node = self.nodes[i]
        name = self.names.get(id(node.module))
        if name is None:
            return
        yield name, ('out', 'in')[side]
        if node.type.name == 'DEPTHWISE_CONV':
            yield name, 'in'

    def _follow(self, start: int, channels: int) -> None:
        """Unite the channels that leave a layer with all that they become."""
        waiting = [(start, 0, list(range(channels)))]
        for channel in range(channels):
            self._slot((start, 0, channel))
        while waiting:
            i, side, found = waiting.pop()
            found = [channel for channel in found if (i, side, channel) not in self.followed]
            self.followed.update((i, side, channel) for channel in found)
            for dependency in self.nodes[i].dependencies:
                if not found or self._side(i, dependency.trigger) != side:
                    continue
                target = self.number[id(dependency.target)]
                other = self._side(target, dependency.handler)
                pairs = self._mapped(dependency, found)
                for source, channel in pairs:
                    self._unite(self._slot((i, side, source)), self._slot((target, other, channel)))
                waiting.append((target, other, [channel for _, channel in pairs]))

    def _mapped(self, dependency: Any, channels: Sequence[int]) -> List[Tuple[int, int]]:
        """Pairs of a channel before a dependency, and what it is after it."""
        from torch_pruning._helpers import _HybridIndex

        indices = [_HybridIndex(idx=channel, root_idx=channel) for channel in channels]
        for mapping in dependency.index_mapping:
            if mapping is not None:
                indices = mapping(indices)
        return [(index.root_idx, index.idx) for index in indices if index.root_idx is not None]

    def _unite_groups(self, i: int) -> None:
        """Unite what a grouped convolution convolves together."""
        conv = self.nodes[i].module
        groups = getattr(conv, 'groups', 1)
        if groups == 1 or self.nodes[i].type.name == 'DEPTHWISE_CONV':
            return
        for side, channels in ((0, conv.out_channels), (1, conv.in_channels)):
            size = channels // groups
            for channel in range(channels):
                self._unite(self._slot((i, 0, channel // size * (conv.out_channels // groups))),
                            self._slot((i, side, channel)))

    def _slot(self, key: Tuple[int, int, int]) -> int:
        if key not in self.slots:
            self.slots[key] = len(self.parent)
            self.parent.append(self.slots[key])
        return self.slots[key]

    def _find(self, slot: int) -> int:
        while self.parent[slot] != slot:
            self.parent[slot] = slot = self.parent[self.parent[slot]]
        return slot

    def _unite(self, a: int, b: int) -> None:
        self.parent[self._find(a)] = self._find(b)
