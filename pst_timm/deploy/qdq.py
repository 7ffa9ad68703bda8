"""Int8 models for ONNX Runtime: its static quantisation, on the nodes that bear it, as QDQ.

QDQ is float ONNX with pairs of quantise and dequantise nodes; a runtime puts integer kernels in the place of what is
between them. Weights are int8 with a scale for each channel, activations uint8: the pair that processors with dot
products of bytes multiply fastest.
"""
import ast
import contextlib
import fnmatch
import io
import os
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn as nn

from pst_timm.layers import PyramidSparseAttention
from pst_timm.utils.errors import PSTError, did_you_mean
from pst_timm.utils.onnx_file import onnx_graph

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = [
    'METHODS', 'Graph', 'Ranges', 'any_batch', 'calibrate', 'chosen_nodes', 'layers_like', 'quantized_graph', 'trace']

METHODS = ('minmax', 'percentile', 'entropy')
WEIGHTED = ('Conv', 'Gemm', 'MatMul')
KINDS = (*WEIGHTED, 'Add', 'Clip', 'Concat', 'GlobalAveragePool', 'MaxPool', 'Relu')
SCOPES = 'pkg.torch.onnx.name_scopes'  # under which torch's exporter notes the modules around a node
MOST_IMAGES = 4096  # of a batch

Ranges = Any
"""`onnxruntime.quantization.TensorsData`: the lowest and highest value of each tensor."""


class Graph(NamedTuple):
    """A folded model as an ONNX graph, and what of it can be quantised."""
    proto: 'ModelProto'
    scopes: Dict[str, Tuple[str, ...]]
    """Modules around each node that can be quantised, the innermost last, by name of the node."""
    layers: List[str]
    """Names of the modules with weights among them, in order."""


def any_batch(model: nn.Module, input_size: Sequence[int]) -> Tuple[torch.Tensor, Tuple[Dict[int, Any], ...]]:
    """An example input of a model, and what leaves its batch open, as `torch.export.export` takes them."""
    like = next(model.parameters())
    x = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0)).to(like.dtype)
    return x, ({0: torch.export.Dim('batch', min=1, max=MOST_IMAGES)},)


def trace(model: nn.Module, input_size: Sequence[int]) -> Graph:
    """A folded model as a graph that takes any number of images.

    Args:
        model: The model, in eval mode.
        input_size: Channels, height and width.

    Raises:
        PSTError: See `onnx_graph`.
    """
    x, shapes = any_batch(model, input_size)
    proto = onnx_graph(model, x, ['logits'], shapes)
    attention = {name for name, module in model.named_modules() if isinstance(module, PyramidSparseAttention)}
    constant = {tensor.name for tensor in proto.graph.initializer}
    scopes, layers = {}, {}
    for node in proto.graph.node:
        if node.op_type not in KINDS or (node.op_type == 'MatMul' and node.input[1] not in constant):
            continue
        scope = _scope(node)
        # products by head have weights in three dimensions, and the mask of `joint` holds -inf; what does not tell
        # where it comes from may be of these
        if node.op_type != 'Conv' and (scope is None or attention.intersection(scope)):
            continue
        scope = scope or ()
        scopes[node.name] = scope
        if node.op_type in WEIGHTED and scope:
            layers[scope[-1]] = None
    return Graph(proto, scopes, list(layers))


def _scope(node: Any) -> Optional[Tuple[str, ...]]:
    """Names of the modules around a node, without the model itself and the operation; None if it does not tell."""
    for entry in node.metadata_props:
        if entry.key == SCOPES:
            return tuple(ast.literal_eval(entry.value)[1:-1])
    return None


def layers_like(graph: Graph, patterns: Iterable[str]) -> List[str]:
    """The layers with weights that are named, or within a module that is.

    Args:
        graph: The graph.
        patterns: Names of modules; `*` stands for anything.

    Raises:
        PSTError: If nothing is called so.
    """
    found: Dict[str, None] = {}
    for pattern in patterns:
        mine = {
            scope[-1] for scope in graph.scopes.values() if scope and fnmatch.filter(scope, pattern)}
        mine = [layer for layer in graph.layers if layer in mine]
        if not mine:
            known = sorted({name for scope in graph.scopes.values() for name in scope})
            raise PSTError(
                f'No layer that is quantised is called {pattern!r}.{did_you_mean(pattern, known)} The layers are those '
                f'of the folded model, such as {", ".join(graph.layers[:3])}; * stands for anything.')
        found.update(dict.fromkeys(mine))
    return list(found)


def calibrate(graph: Graph, batches: Sequence[torch.Tensor], method: str = 'minmax') -> Ranges:
    """The range of every tensor that may be quantised.

    Nodes with a tensor that is not finite are taken off the graph's list: no scale fits them.

    Args:
        graph: The graph.
        batches: Images, prepared.
        method: 'minmax' takes the largest values, the other two leave out rare ones.
    """
    ranges = _collect(graph, batches[:1], 'minmax')  # what has no end would stop a histogram
    _drop_endless(graph, ranges)
    ranges = _collect(graph, batches, method)
    _drop_endless(graph, ranges)
    return ranges


def _collect(graph: Graph, batches: Sequence[torch.Tensor], method: str) -> Ranges:
    from onnx import save
    from onnxruntime.quantization import calibrate as kinds

    kind, options = {
        'minmax': (kinds.MinMaxCalibrater, {}),
        'percentile': (kinds.PercentileCalibrater, dict(num_bins=2048, percentile=99.999)),
        'entropy': (kinds.EntropyCalibrater, {}),
    }[method]
    wanted = set(_tensors(graph))

    class Calibrater(kind):
        def select_tensors_to_calibrate(self, model: 'ModelProto') -> Tuple[set, Dict[str, Any]]:
            found, infos = super().select_tensors_to_calibrate(model)
            return found & wanted, infos

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'model.onnx'
        save(graph.proto, path)
        calibrater = Calibrater(path, KINDS, os.fspath(Path(folder) / 'augmented.onnx'), **options)
        calibrater.augment_graph()
        calibrater.create_inference_session()
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
            for batch in batches:  # one by one, as histograms keep every value until the reader ends
                calibrater.collect_data(_Reader(batch))
            return calibrater.compute_data()


class _Reader:
    """A batch as ONNX Runtime reads it: once."""

    def __init__(self, batch: torch.Tensor):
        self.inputs: Iterator[Mapping[str, Any]] = iter([{'image': batch.numpy()}])

    def get_next(self) -> Any:
        return next(self.inputs, None)


def _tensors(graph: Graph) -> Iterator[str]:
    for node in graph.proto.graph.node:
        if node.name in graph.scopes:
            yield from node.input
            yield from node.output


def _drop_endless(graph: Graph, ranges: Ranges) -> None:
    endless = {name for name in ranges.keys() if not np.isfinite(ranges[name].range_value).all()}
    for node in graph.proto.graph.node:
        if endless.intersection((*node.input, *node.output)):
            graph.scopes.pop(node.name, None)


def chosen_nodes(graph: Graph, float_layers: Iterable[str] = ()) -> List[str]:
    """Names of the nodes to quantise: those of the other layers, and what works on their results.

    Args:
        graph: The graph.
        float_layers: Layers that stay as they are.
    """
    kept = set(float_layers)
    chosen, made = [], set()
    for node in graph.proto.graph.node:  # each after those whose results it takes
        scope = graph.scopes.get(node.name)
        if scope is None or kept.intersection(scope):
            continue
        if node.op_type in WEIGHTED or made.intersection(node.input):
            chosen.append(node.name)
            made.update(node.output)
    return chosen


def quantized_graph(graph: Graph, ranges: Ranges, float_layers: Iterable[str] = ()) -> 'ModelProto':
    """The graph in int8.

    Args:
        graph: The graph.
        ranges: From `calibrate`.
        float_layers: Layers that stay as they are.
    """
    from onnxruntime.quantization import QDQQuantizer, QuantType

    nodes = chosen_nodes(graph, float_layers)
    quantizer = QDQQuantizer(
        deepcopy(graph.proto), True, False, QuantType.QInt8, QuantType.QUInt8, ranges, nodes, [], KINDS,
        {'MatMulConstBOnly': True})
    if nodes:  # an empty list would mean all of them
        quantizer.quantize_model()
    proto = quantizer.model.model
    del proto.graph.value_info[:]  # runtimes infer them, and those of before are not all true any more
    return proto
