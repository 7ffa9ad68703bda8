"""Models as ONNX files that tell about themselves."""
from typing import TYPE_CHECKING, Any, Callable, Dict, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from .cost import weight_bytes
from .errors import PSTError

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ['METADATA', 'onnx_bytes', 'onnx_graph', 'onnx_session', 'pack_onnx']

METADATA = 'pst_timm.json'  # under which exported files carry what their users need to know
MOST_ONNX = 2 ** 31 - 2 ** 24  # bytes of weights: protocol buffers end at 2 GiB, and the graph wants room


@torch.no_grad()
def onnx_graph(
        model: nn.Module,
        x: torch.Tensor,
        output_names: Sequence[str],
        shapes: Optional[Tuple[Dict[int, Any], ...]] = None,
        advice: str = 'use a smaller model',
) -> 'ModelProto':
    """A model of one image batch as an ONNX graph, whose nodes tell which module they come from.

    Args:
        model: The model, in eval mode.
        x: Example of its input, which is called 'image'.
        output_names: Names of its outputs.
        shapes: Dimensions of the input that are not fixed, as `torch.export.export` takes them.
        advice: What to do about weights that are too large.

    Raises:
        PSTError: If what writes ONNX is not installed, or the weights do not fit into a file.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as e:
        raise PSTError(f"ONNX files cannot be written ({e}): pip install 'pst_timm[export]'.") from None
    size = weight_bytes(model)
    if size > MOST_ONNX:
        raise PSTError(
            f'The weights take {size / 2 ** 30:.1f} GiB, an ONNX file holds at most 2: {advice}.')
    program = torch.onnx.export(
        model, (x,), dynamo=True, dynamic_shapes=shapes, input_names=['image'], output_names=list(output_names),
        verbose=False)
    return program.model_proto


def pack_onnx(graph: 'ModelProto', info: str) -> bytes:
    """The content of an ONNX file; what the exporter noted of its work, places on this machine among it, is dropped.

    Args:
        graph: The graph, which is changed.
        info: JSON that the file is to carry under `METADATA`.
    """
    parts = [graph.graph, *graph.functions]
    for part in parts:
        for item in (part, *part.node, *part.value_info, *getattr(part, 'initializer', ())):
            del item.metadata_props[:]
            item.doc_string = ''
    del graph.metadata_props[:]
    graph.metadata_props.add(key=METADATA, value=info)
    return graph.SerializeToString()


def onnx_bytes(
        model: nn.Module,
        x: torch.Tensor,
        info: str,
        output_names: Sequence[str],
        shapes: Optional[Tuple[Dict[int, Any], ...]] = None,
        advice: str = 'use a smaller model',
) -> bytes:
    """A model as the content of an ONNX file that carries `info`; for the rest see `onnx_graph`."""
    return pack_onnx(onnx_graph(model, x, output_names, shapes, advice), info)


def onnx_session(data: bytes) -> Tuple[Callable[[torch.Tensor], torch.Tensor], Dict[str, str]]:
    """An ONNX file, ready to run with as many threads as torch takes.

    Args:
        data: Its content, which has been looked through if it is a stranger's.

    Returns:
        A function of a batch of images to the first output, and the metadata.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(data, options, providers=['CPUExecutionProvider'])

    def call(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {'image': x.numpy()})[0])
    return call, session.get_modelmeta().custom_metadata_map
