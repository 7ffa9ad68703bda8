"""Write a model for deployment: ONNX, TorchScript or an exported program, and check that it answers alike."""
import copy
import io
import json
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm.data import create_transform, resolve_data_config

from pst_timm.checkpoints import attention_settings, label_names
from pst_timm.data.images import open_image
from pst_timm.metrics.agreement import compare_logits
from pst_timm.models import reparameterize
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import check_output, write_whole
from pst_timm.utils.onnx_file import METADATA, onnx_bytes

from .loading import load_exported

__all__ = ['FORMATS', 'check_export', 'export', 'metadata', 'serialized', 'tolerance']

FORMATS = {'onnx': '.onnx', 'torchscript': '.pt', 'exported-program': '.pt2'}
MIN_SIDE = 33  # below, the last stage has one row or column, which torch.export treats as a case of its own


def tolerance(dtype: torch.dtype) -> float:
    """Largest difference between an export and its eager model that passes, relative to the largest logit."""
    return 1e-4 if dtype == torch.float32 else 5e-2  # half precision carries three digits


def metadata(
        model: nn.Module,
        class_names: Optional[Sequence[str]] = None,
        img_size: Optional[int] = None,
        dtype: torch.dtype = torch.float32,
        batch_size: Optional[int] = None,
) -> Dict[str, Any]:
    """What whoever runs the exported model needs to know: preprocessing, classes, attention, how it takes images."""
    config = resolve_data_config({'img_size': img_size} if img_size else {}, model=model)
    return {
        'architecture': model.pretrained_cfg.get('architecture'),
        'num_classes': model.num_classes,
        'class_names': list(class_names or label_names(model)),
        'dtype': str(dtype).removeprefix('torch.'),
        'batch_size': batch_size,
        **{k: config[k] for k in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')},
        **attention_settings(model),
    }


def export(
        model: nn.Module,
        path: os.PathLike,
        format: str = 'onnx',
        dynamic: bool = False,
        dtype: torch.dtype = torch.float32,
        img_size: Optional[int] = None,
        reparam: bool = True,
        class_names: Optional[Sequence[str]] = None,
        overwrite: bool = False,
) -> nn.Module:
    """Write a model for deployment, with its preprocessing constants and class names as metadata.

    Args:
        model: A classifier; `set_topk` decides its attention before the call.
        path: File to write.
        format: 'onnx', 'torchscript' or 'exported-program'.
        dynamic: Accept any batch size, and any height and width of at least 33 (TorchScript always does).
        dtype: Type of weights and input.
        img_size: Height and width of the example, the model's own if None; fixed unless `dynamic`.
        reparam: Fold the model first.
        class_names: Names of the classes, in order.
        overwrite: Whether a file that is there may be replaced.

    Returns:
        The model as it was exported, folded and cast, to compare with.

    Raises:
        PSTError: If the file cannot be written, or must not be, or the model cannot be exported so; what was there
            before is untouched.
        ValueError: If the format is unknown, or the class names do not fit the classifier.
    """
    check_output(path, overwrite)
    if format not in FORMATS:
        raise ValueError(f'format must be one of {tuple(FORMATS)}, got {format!r}.')
    if class_names and len(class_names) != model.num_classes:
        raise ValueError(f'{len(class_names)} class names for a model of {model.num_classes} classes.')
    if dynamic and format != 'torchscript' and getattr(model, 'rounds_down', False):
        raise PSTError(
            'The trunk of this model rounds sizes down, which torch.export cannot follow where sizes are left open: '
            'leave out --dynamic, or choose --format torchscript.')
    any_batch = dynamic or format == 'torchscript'
    info = json.dumps(metadata(model, class_names, img_size, dtype, None if any_batch else 1))
    model = reparameterize(model) if reparam else copy.deepcopy(model)
    model = model.eval().to(dtype)
    channels, side, _ = resolve_data_config({}, model=model)['input_size']
    side = img_size or side
    x = torch.randn(1, channels, side, side, dtype=dtype)
    shapes = None
    if dynamic:
        # unequal sizes, none of them 1, so that nothing dynamic is taken for a constant
        x = torch.randn(2, channels, side + 1, side + 34, dtype=dtype)
        shapes = ({
            0: torch.export.Dim('batch', min=1, max=4096),
            2: torch.export.Dim('height', min=MIN_SIDE, max=16384),
            3: torch.export.Dim('width', min=MIN_SIDE, max=16384),
        },)
    with torch.no_grad():
        data = serialized(model, x, format, shapes, info)
    # the native writers abort the process, or leave half a file, where the disk is full
    write_whole(path, lambda name: Path(name).write_bytes(data))
    return model


def serialized(
        model: nn.Module,
        x: torch.Tensor,
        format: str,
        shapes: Optional[Tuple[Dict[int, Any], ...]],
        info: str,
) -> bytes:
    """The exported file, in memory."""
    file = io.BytesIO()
    if format == 'torchscript':
        torch.jit.save(torch.jit.script(model), file, _extra_files={METADATA: info})
    elif format == 'exported-program':
        torch.export.save(
            torch.export.export(model, (x,), dynamic_shapes=shapes), file, extra_files={METADATA: info})
    else:
        return onnx_bytes(
            model, x, info, ['logits'], shapes, 'choose --dtype float16, or --format exported-program')
    return file.getvalue()


@torch.no_grad()
def check_export(
        model: nn.Module,
        path: os.PathLike,
        format: str,
        dynamic: bool = False,
        img_size: Optional[int] = None,
        images: Sequence[os.PathLike] = (),
) -> List[Dict[str, Any]]:
    """Run an exported model beside the eager one.

    Args:
        model: What `export` returned.
        path: The exported file.
        format: Its format.
        dynamic: Whether it takes any size; then three sizes (one odd) and three batch sizes are run, else three
            batches of the one size.
        img_size: The size exported at, the model's own if None.
        images: Photographs to run; noise if none are given.

    Returns:
        A row for each run: its shape and the largest absolute difference relative to the largest absolute logit.
    """
    run, _ = load_exported(path, format)
    config = resolve_data_config({}, model=model)
    side = img_size or config['input_size'][1]
    dtype = next(model.parameters()).dtype
    sizes = [(1, side, side)] * 3
    if dynamic or format == 'torchscript':
        sizes = [(1, side, side), (3, side + 1, side + 33), (2, max(MIN_SIDE, side // 2), side)]
    rows = []
    for batch, height, width in sizes:
        x = _inputs(batch, (height, width), config, images).to(dtype)
        expected, got = model(x), run(x)
        rows.append({
            'shape': 'x'.join(map(str, x.shape)),
            'difference': compare_logits(got, expected).difference,
        })
    return rows


def _inputs(batch: int, size: Tuple[int, int], config: Dict[str, Any], images: Sequence[os.PathLike]) -> torch.Tensor:
    channels = config['input_size'][0]
    if not images:
        return torch.randn(batch, channels, *size)
    transform = create_transform(**{**config, 'input_size': (channels, *size)})
    return torch.stack([
        transform(open_image(images[i % len(images)], 'L' if channels == 1 else 'RGB')) for i in range(batch)])
