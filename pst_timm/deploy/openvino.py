"""Int8 models for OpenVINO, calibrated by NNCF: a pair of files, an .xml of the graph and a .bin of the weights.

Both are read into memory and looked through before OpenVINO sees them: what is in the graph, and that every constant is
within the weights. OpenVINO then gets bytes, never a path.
"""
import contextlib
import io
import logging
import os
import re
import tempfile
import xml.parsers.expat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, List, NoReturn, Optional, Sequence, Tuple

import torch

from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import write_whole

from .qdq import Graph, chosen_nodes

if TYPE_CHECKING:
    import openvino

__all__ = ['check_installed', 'compiled', 'float_ir', 'open_ir', 'quantized_ir', 'write_ir']

METADATA = 'pst_timm'  # under which the graph carries what its users need to know
MOST_XML = 2 ** 26  # bytes; the largest model here has a hundredth of it
MOST_DEPTH = 12  # of elements in each other
MOST_IN_NAME = 10_000  # characters of an attribute but for our own
# elements of a graph, outside `rt_info`; bodies of loops and conditions are none that a model here has
ELEMENTS = ('net', 'layers', 'layer', 'data', 'input', 'output', 'port', 'dim', 'edges', 'edge', 'rt_info')
VERSIONS = re.compile(r'opset\d{1,2}')
# state, bodies, and what a plug-in may bring
REFUSED = ('Assign', 'If', 'Loop', 'ReadValue', 'TensorIterator')

Call = Callable[[torch.Tensor], torch.Tensor]


def check_installed() -> None:
    """Make sure, before the work, that OpenVINO and NNCF are there.

    Raises:
        PSTError: If they are not.
    """
    os.environ.setdefault('NNCF_CI', '1')  # else NNCF tells its makers of every call
    try:
        import nncf  # noqa: F401
        import openvino  # noqa: F401
    except ImportError as e:
        raise PSTError(f"The backend openvino is not installed ({e}): pip install 'pst_timm[openvino]'.") from None


def float_ir(graph: Graph) -> 'openvino.Model':
    """A graph as OpenVINO has it, in float32.

    The shapes of biases, which it works out from the maps, become constants: left open, OpenVINO 2026.4 ran int8 with
    fine attention wrong by a third of the logits, without a word.
    """
    import openvino
    from openvino import passes

    model = openvino.Core().read_model(graph.proto.SerializeToString())
    manager = passes.Manager()
    manager.register_pass(passes.ConstantFolding())
    manager.run_passes(model)
    return model


def quantized_ir(graph: Graph, images: Sequence[torch.Tensor], float_layers: Iterable[str] = ()) -> 'openvino.Model':
    """A graph in int8.

    Args:
        graph: The graph.
        images: Batches to calibrate by.
        float_layers: Layers that stay as they are.
    """
    import nncf

    model = float_ir(graph)
    chosen = set(chosen_nodes(graph, float_layers))
    if not chosen:
        return model
    known = {node.name for node in graph.proto.graph.node}
    # OpenVINO makes several operations of a node, and names them after it
    ignored = [name for name in (operation.get_friendly_name() for operation in model.get_ops())
               if name.split('/')[0] in known - chosen]
    rows = [row[None].numpy() for batch in images for row in batch]
    log = logging.getLogger('nncf')
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # bars, in lines of their own
            return nncf.quantize(
                model,
                nncf.Dataset(rows),
                preset=nncf.QuantizationPreset.MIXED,  # activations below zero have ranges of their own
                target_device=nncf.TargetDevice.CPU,
                subset_size=len(rows),
                ignored_scope=nncf.IgnoredScope(names=ignored, validate=False),
            )
    finally:
        log.setLevel(before)


def compiled(model: 'openvino.Model') -> Call:
    """A model, ready to run with as many threads as torch takes; what is float stays float32."""
    import openvino

    run = openvino.Core().compile_model(model, 'CPU', {
        'INFERENCE_NUM_THREADS': torch.get_num_threads(),
        'INFERENCE_PRECISION_HINT': 'f32',
        'PERFORMANCE_HINT': 'LATENCY',
    })
    return lambda x: torch.from_numpy(run([x.numpy()])[0].copy())


def write_ir(model: 'openvino.Model', path: os.PathLike, info: str) -> None:
    """Write a model as a pair of files.

    Args:
        model: The model, which is changed.
        path: That of the graph, which ends with '.xml'.
        info: JSON that it is to carry.

    Raises:
        PSTError: If a file cannot be written.
    """
    import openvino

    model.set_rt_info(info, METADATA)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / 'model.xml'
        openvino.serialize(model, made, made.with_suffix('.bin'))
        for suffix in ('.bin', '.xml'):
            content = made.with_suffix(suffix).read_bytes()
            write_whole(Path(path).with_suffix(suffix), lambda name, content=content: Path(name).write_bytes(content))


def open_ir(graph: bytes, weights: bytes) -> Tuple[Call, str]:
    """A model from the content of its two files, which may be a stranger's, and the JSON it carries.

    Raises:
        PSTError: If there is more in them than a model.
    """
    import openvino

    _check_graph(graph, len(weights))
    core = openvino.Core()
    model = core.read_model(model=graph, weights=weights)
    return compiled(model), model.get_rt_info(METADATA).astype(str)


def _refuse(what: str) -> NoReturn:
    raise PSTError(f'it holds {what}, which pst-timm quantize does not write.')


def _check_graph(graph: bytes, room: int) -> None:
    """Make sure that a graph is made of standard operations, within the weights, and that its XML defines nothing."""
    if len(graph) > MOST_XML:
        _refuse(f'a graph of more than {MOST_XML >> 20} MiB')
    if b'\0' in graph:
        _refuse('text in UTF-16')  # what looks through it and what reads it are to see the same
    parser = xml.parsers.expat.ParserCreate()
    above: List[str] = []
    constants: List[bool] = []

    def start(name: str, attributes: Dict[str, str]) -> None:
        if len(above) >= MOST_DEPTH:
            _refuse(f'elements {MOST_DEPTH} deep')
        inside = 'rt_info' in above
        if not inside and name not in ELEMENTS:
            _refuse(f'an element {name[:80]!r}')
        longest = max((len(value) for value in attributes.values()), default=0)
        if longest > MOST_IN_NAME and not (inside and name == METADATA):
            _refuse(f'an attribute of {longest} characters')
        if 'path' in name.lower() or any('path' in key.lower() for key in attributes):
            _refuse(f'a path, in an element {name[:80]!r}')
        if name == 'layer' and not inside:
            kind, version = attributes.get('type', ''), attributes.get('version', '')
            if not VERSIONS.fullmatch(version) or kind in REFUSED:
                _refuse(f'an operation {kind[:80]!r} of {version[:80]!r}')
            constants.append(kind == 'Const')
        if name == 'data' and constants and constants[-1] and not inside:
            begin, size = (_whole(attributes.get(key, '')) for key in ('offset', 'size'))
            if begin + size > room:
                _refuse(f'a constant of {size} bytes from {begin} on, where there are {room} bytes of weights')
        above.append(name)

    def refuse(*args: Any) -> None:
        _refuse('definitions of its own (DTD)')

    def declare(version: str, encoding: Optional[str], standalone: int) -> None:
        if encoding is not None and encoding.lower() != 'utf-8':
            _refuse(f'text in {encoding[:80]!r}')

    parser.XmlDeclHandler = declare
    parser.StartElementHandler = start
    parser.EndElementHandler = lambda name: above.pop()
    for event in ('StartDoctypeDecl', 'EntityDecl', 'UnparsedEntityDecl', 'ExternalEntityRef', 'NotationDecl',
                  'ProcessingInstruction'):
        setattr(parser, f'{event}Handler', refuse)
    parser.Parse(graph, True)


def _whole(text: str) -> int:
    if not re.fullmatch(r'\d{1,12}', text):
        _refuse(f'a constant at {text[:80]!r}')
    return int(text)
