"""Write a model for deployment: ONNX, TorchScript or an exported program, and check that it answers alike."""
import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm.data import create_transform, resolve_data_config

from pst_timm import reparameterize
from pst_timm.hub import attention_settings, load_model
from pst_timm.hub.commands import read_class_names

__all__ = ['FORMATS', 'check_export', 'export', 'load_exported', 'main']

FORMATS = {'onnx': '.onnx', 'torchscript': '.pt', 'exported-program': '.pt2'}
METADATA = 'pst_timm.json'
MIN_SIDE = 33  # below, the last stage has one row or column, which torch.export treats as a case of its own
TOLERANCE = 1e-4


def metadata(model: nn.Module, class_names: Optional[Sequence[str]] = None) -> Dict[str, Any]:
    """What whoever runs the exported model needs to know: preprocessing, classes, attention."""
    config = resolve_data_config({}, model=model)
    return {
        'architecture': model.pretrained_cfg.get('architecture'),
        'num_classes': model.num_classes,
        'class_names': list(class_names or model.pretrained_cfg.get('label_names') or []),
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

    Returns:
        The model as it was exported, folded and cast, to compare with.

    Raises:
        ValueError: If the format is unknown, or the class names do not fit the classifier.
    """
    if format not in FORMATS:
        raise ValueError(f'format must be one of {tuple(FORMATS)}, got {format!r}.')
    if class_names and len(class_names) != model.num_classes:
        raise ValueError(f'{len(class_names)} class names for a model of {model.num_classes} classes.')
    info = json.dumps(metadata(model, class_names))
    model = reparameterize(model) if reparam else model
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
    path = os.fspath(path)
    with torch.no_grad():
        if format == 'torchscript':
            torch.jit.save(torch.jit.script(model), path, _extra_files={METADATA: info})
        elif format == 'exported-program':
            program = torch.export.export(model, (x,), dynamic_shapes=shapes)
            torch.export.save(program, path, extra_files={METADATA: info})
        else:
            program = torch.onnx.export(
                model, (x,), dynamo=True, dynamic_shapes=shapes, input_names=['image'], output_names=['logits'],
                verbose=False)
            program.model.metadata_props[METADATA] = info
            program.save(path)
    return model


def load_exported(path: os.PathLike, format: str) -> Tuple[Callable[[torch.Tensor], torch.Tensor], Dict[str, Any]]:
    """Load what `export` wrote, ready to run.

    Returns:
        A function of a batch of images, and the metadata.
    """
    path = os.fspath(path)
    files = {METADATA: ''}
    if format == 'torchscript':
        module = torch.jit.load(path, _extra_files=files)
        return module, json.loads(files[METADATA])
    if format == 'exported-program':
        module = torch.export.load(path, extra_files=files).module()
        return module, json.loads(files[METADATA])
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    info = session.get_modelmeta().custom_metadata_map[METADATA]
    return lambda x: torch.from_numpy(session.run(None, {'image': x.numpy()})[0]), json.loads(info)


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
        expected, got = model(x).float(), run(x).float()
        rows.append({
            'shape': 'x'.join(map(str, x.shape)),
            'difference': ((got - expected).abs().max() / expected.abs().max()).item(),
        })
    return rows


def _inputs(batch: int, size: Tuple[int, int], config: Dict[str, Any], images: Sequence[os.PathLike]) -> torch.Tensor:
    channels = config['input_size'][0]
    if not images:
        return torch.randn(batch, channels, *size)
    from PIL import Image

    transform = create_transform(**{**config, 'input_size': (channels, *size)})
    return torch.stack([
        transform(Image.open(images[i % len(images)]).convert('L' if channels == 1 else 'RGB')) for i in range(batch)])


def main(argv: Optional[Sequence[str]] = None) -> int:
    """`pst-timm export`; returns the exit code."""
    parser = argparse.ArgumentParser(prog='pst-timm export', description='Write a model for deployment.')
    parser.add_argument('source', help='model name, hf-hub:org/name, folder with config.json, or training checkpoint')
    parser.add_argument('--format', choices=tuple(FORMATS), default='onnx')
    parser.add_argument('--output', type=Path, help='file to write (default: the source\'s name)')
    parser.add_argument('--pretrained', action='store_true', help='published weights of a model name')
    parser.add_argument('--num-classes', type=int, help='classes of a model name')
    parser.add_argument('--dynamic', action='store_true', help='any batch size, height and width')
    parser.add_argument('--dtype', choices=('float32', 'float16', 'bfloat16'), default='float32')
    parser.add_argument('--topk', type=int, help='selected coarse tokens (default: as the source has it)')
    parser.add_argument('--fine-fusion', choices=('gate', 'joint'))
    parser.add_argument('--img-size', type=int, help='height and width (default: the model\'s)')
    parser.add_argument('--class-names', type=Path, help='text file, one name a line')
    parser.add_argument('--no-reparam', action='store_true', help='keep batch norms and concatenations')
    parser.add_argument('--check', action='store_true', help='run the result beside the eager model')
    parser.add_argument('--images', nargs='+', default=[], help='photographs to check with (default: noise)')
    args = parser.parse_args(argv)
    kwargs: Dict[str, Any] = {'pretrained': True} if args.pretrained else {}
    if args.num_classes is not None:
        kwargs['num_classes'] = args.num_classes
    missing = [p for p in args.images if not os.path.isfile(p)]
    if missing:
        parser.error(f'no image at {missing[0]}')
    if args.img_size is not None and args.img_size < 1:
        parser.error(f'--img-size must be at least 1, got {args.img_size}')
    path = args.output or Path(Path(args.source.split(':')[-1]).name.split('.')[0] + FORMATS[args.format])
    try:
        model = load_model(args.source, **kwargs)
        if args.topk is not None or args.fine_fusion is not None:
            if not hasattr(model, 'set_topk'):
                raise ValueError(f'{args.source} has no sparse attention to set --topk or --fine-fusion on.')
            topk = args.topk if args.topk is not None else attention_settings(model)['topk']
            model.set_topk(topk, args.fine_fusion)
        names = read_class_names(args.class_names)
        exported = export(
            model, path, args.format, args.dynamic, getattr(torch, args.dtype), args.img_size, not args.no_reparam,
            names)
        print(f'Written: {path} ({path.stat().st_size / 2 ** 20:.1f} MiB)')
        if not args.check:
            return 0
        rows = check_export(exported, path, args.format, args.dynamic, args.img_size, args.images)
    except (ValueError, RuntimeError, AssertionError, OSError, ImportError) as e:
        print(f'pst-timm export: error: {e}', file=sys.stderr)
        return 1
    return 0 if _report(rows, args.dtype) else 1


def _report(rows: Sequence[Dict[str, Any]], dtype: str) -> bool:
    """Print the rows of `check_export`; returns whether all differences are small enough."""
    for row in rows:
        print(f'{row["shape"]:>16}  difference to eager {row["difference"]:.1e}')
    # max would pass over a nan
    worst = torch.tensor([row['difference'] for row in rows]).max().item()
    # half precision carries three digits
    limit = TOLERANCE if dtype == 'float32' else 5e-2
    print(f'largest difference {worst:.1e}, relative to the largest logit; allowed {limit:.0e}')
    return worst <= limit


if __name__ == '__main__':
    sys.exit(main())
