"""Models as ONNX files that tell about themselves."""
from typing import Any, Dict, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from .errors import PSTError

__all__ = ['METADATA', 'onnx_bytes']

METADATA = 'pst_timm.json'  # under which exported files carry what their users need to know
MOST_ONNX = 2 ** 31 - 2 ** 24  # bytes of weights: protocol buffers end at 2 GiB, and the graph wants room


@torch.no_grad()
def onnx_bytes(
        model: nn.Module,
        x: torch.Tensor,
        info: str,
        output_names: Sequence[str],
        shapes: Optional[Tuple[Dict[int, Any], ...]] = None,
        advice: str = 'use a smaller model',
) -> bytes:
    """A model of one image batch as the content of an ONNX file.

    Args:
        model: The model, in eval mode.
        x: Example of its input, which is called 'image'.
        info: JSON that the file is to carry under `METADATA`.
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
    size = sum(t.nbytes for t in model.state_dict().values())
    if size > MOST_ONNX:
        raise PSTError(
            f'The weights take {size / 2 ** 30:.1f} GiB, an ONNX file holds at most 2: {advice}.')
    program = torch.onnx.export(
        model, (x,), dynamo=True, dynamic_shapes=shapes, input_names=['image'], output_names=list(output_names),
        verbose=False)
    program.model.metadata_props[METADATA] = info
    return program.model_proto.SerializeToString()
