"""Models in every form and runtime, as files that are made once: what `scripts/measure_deploy.py` measures."""
from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple

import torch
import torch.nn as nn

from pst_timm.checkpoints.folder import save_folder
from pst_timm.deploy.export import export
from pst_timm.deploy.latency import AS_IT_IS, Form, in_form
from pst_timm.deploy.runtime import open_source

__all__ = ['EAGER', 'FORMS', 'INT8', 'INT8_OF', 'ONNX', 'RUNTIMES', 'Candidate', 'make', 'pruned']

EAGER = 'eager float32'
FORMS = {
    EAGER: AS_IT_IS,
    'folded': Form(reparam=True),
    'folded, channels_last': Form(reparam=True, channels_last=True),
    'compiled': Form(reparam=True, compile=True),
    'bfloat16': Form(reparam=True, channels_last=True, dtype='bfloat16'),
}
ONNX, OPENVINO = 'ONNX Runtime float32', 'OpenVINO float32'
INT8 = {'ONNX Runtime int8': 'onnxruntime', 'OpenVINO int8': 'openvino'}
INT8_OF = dict(zip(INT8, (ONNX, OPENVINO)))
RUNTIMES = (*FORMS, ONNX, OPENVINO, *INT8)


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
        **kwargs: Any,
) -> Candidate:
    """A model in a form or runtime; its file is made where there is none.

    Args:
        source: What `open_source` takes.
        runtime: One of `RUNTIMES`.
        folder: Where its files are.
        images: Gives preprocessed images (N, C, H, W) to calibrate on.
        kwargs: For `open_source`.
    """
    if runtime in FORMS:
        return Candidate(str(source), FORMS[runtime], kwargs)
    folder.mkdir(parents=True, exist_ok=True)
    model = Candidate(str(source), kwargs=kwargs).open
    path = folder / {
        ONNX: 'model.onnx', OPENVINO: 'model.xml', 'ONNX Runtime int8': 'model.int8.onnx',
        'OpenVINO int8': 'model.int8.xml'}[runtime]
    if not path.is_file():
        if runtime in INT8:
            from pst_timm.deploy.quantize import quantize
            quantize(model(), path, images(), backend=INT8[runtime])
        elif runtime == ONNX:
            export(model(), path, dynamic=True)
        else:
            raise NotImplementedError(runtime)
    return Candidate(str(path))


def pruned(source: str, ratio: float, folder: Path, **kwargs: Any) -> str:
    """A model with a share of its multiply-adds removed, not fine-tuned, as a folder that is made where there is none.

    Args:
        source: What `open_source` takes.
        ratio: The share.
        folder: The folder.
        kwargs: For `open_source`.
    """
    if not folder.is_dir():
        from pst_timm.deploy.prune import prune
        save_folder(prune(Candidate(str(source), kwargs=kwargs).open(), ratio=ratio), folder)
    return str(folder)
