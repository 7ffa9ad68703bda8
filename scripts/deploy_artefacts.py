"""Models in every form and runtime, as files that are made once: what `scripts/measure_deploy.py` measures."""
import json
from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple, Optional

import torch
import torch.nn as nn
from timm.data import resolve_data_config

from pst_timm.checkpoints.folder import save_folder
from pst_timm.deploy import openvino as ir
from pst_timm.deploy import qdq
from pst_timm.deploy.export import metadata
from pst_timm.deploy.latency import AS_IT_IS, Form, in_form
from pst_timm.deploy.prune import prune
from pst_timm.deploy.quantize import SUFFIXES, quantize
from pst_timm.deploy.runtime import open_source
from pst_timm.models import reparameterize
from pst_timm.utils.files import write_whole
from pst_timm.utils.onnx_file import pack_onnx

__all__ = ['EAGER', 'FORMS', 'INT8', 'INT8_OF', 'ONNX', 'RUNTIMES', 'Candidate', 'make', 'pruned']

EAGER = 'eager float32'
FORMS = {
    EAGER: AS_IT_IS,
    'folded': Form(reparam=True),
    'folded, channels_last': Form(reparam=True, channels_last=True),
    'compiled': Form(reparam=True, compile=True),
}
BFLOAT16 = 'bfloat16'
ONNX, OPENVINO = 'ONNX Runtime float32', 'OpenVINO float32'
INT8 = {'ONNX Runtime int8': 'onnxruntime', 'OpenVINO int8': 'openvino'}
INT8_OF = dict(zip(INT8, (ONNX, OPENVINO)))
RUNTIMES = (*FORMS, BFLOAT16, ONNX, OPENVINO, *INT8)
FILES = {  # the report of an int8 file has its name but for the ending
    BFLOAT16: f'model{SUFFIXES["bfloat16"]}', ONNX: 'model.onnx', OPENVINO: 'model.xml',
    **{runtime: f'{backend}{SUFFIXES[backend]}' for runtime, backend in INT8.items()}}


class Candidate(NamedTuple):
    """A model as it is deployed; another process can open it too."""
    source: str
    """What `open_source` takes."""
    form: Form = AS_IT_IS
    kwargs: Mapping[str, Any] = {}
    """For `open_source`, plain values."""

    def open(self) -> nn.Module:
        """The model, ready to run."""
        torch.manual_seed(0)  # of the weights of a name
        return in_form(open_source(self.source, **self.kwargs), self.form)


def make(
        source: str,
        runtime: str,
        folder: Path,
        images: Callable[[], torch.Tensor],
        img_size: Optional[int] = None,
        **kwargs: Any,
) -> Candidate:
    """A model in a form or runtime; its file is made where there is none.

    Args:
        source: What `open_source` takes.
        runtime: One of `RUNTIMES`.
        folder: Where its files are.
        images: Gives preprocessed images (N, C, H, W) to calibrate on.
        img_size: Height and width, the model's own if None.
        kwargs: For `open_source`.
    """
    if runtime in FORMS:
        return Candidate(str(source), FORMS[runtime], kwargs)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILES[runtime]
    if not path.is_file():
        model = Candidate(str(source), kwargs=kwargs).open()
        if runtime in (ONNX, OPENVINO):
            write_float(model, path, img_size)
        else:
            numbers = dict(level='bfloat16') if runtime == BFLOAT16 else dict(
                images=images().split(16), backend=INT8[runtime])
            quantize(model, path, **numbers, img_size=img_size, timing=False, overwrite=True, show=False)
    return Candidate(str(path))


def write_float(model: nn.Module, path: Path, img_size: Optional[int] = None) -> None:
    """Write the graph that int8 files are made from, in float32, so that nothing but the numbers differs."""
    size = resolve_data_config({'img_size': img_size} if img_size else {}, model=model)['input_size']
    graph, info = qdq.trace(reparameterize(model), size), json.dumps(metadata(model, img_size=img_size))
    if path.suffix == '.xml':
        ir.write_ir(ir.float_ir(graph), path, info)
    else:
        data = pack_onnx(graph.proto, info)
        write_whole(path, lambda name: Path(name).write_bytes(data))


def pruned(source: str, ratio: float, folder: Path, options: Mapping[str, Any], **kwargs: Any) -> str:
    """A model with a share of its multiply-adds removed, not trained further, as a folder that is made once.

    Args:
        source: What `open_source` takes.
        ratio: The share.
        folder: The folder.
        options: For `prune`.
        kwargs: For `open_source`.
    """
    if not folder.is_dir():
        save_folder(prune(Candidate(str(source), kwargs=kwargs).open(), ratio=ratio, **options), folder)
    return str(folder)
