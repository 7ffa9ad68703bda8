"""`pst-timm export`: a model written for deployment."""
import argparse
import logging
from pathlib import Path
from typing import Optional, Sequence

from pst_timm.utils.files import check_output, read_class_names

from .common import (
    DTYPES,
    ArgumentParser,
    add_attention_flags,
    add_ema_flag,
    add_load_flags,
    add_output,
    add_overwrite,
    add_source,
    at_least,
    files_of,
    plain_export_errors,
    run,
)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """`pst-timm export`; returns the exit code."""
    parser = ArgumentParser(prog='pst-timm export', description='Write a model for deployment.')
    add_source(parser)
    parser.add_argument('--format', choices=('onnx', 'torchscript', 'exported-program'), default='onnx')
    add_output(parser, 'file to write (default: the source\'s name)')
    add_load_flags(parser)
    parser.add_argument(
        '--num-classes', type=at_least(1), help='classes of a model name (default: those of the weights)')
    parser.add_argument('--dynamic', action='store_true', help='any batch size, height and width')
    parser.add_argument('--dtype', choices=DTYPES, default='float32', help='precision (default: %(default)s)')
    add_attention_flags(parser, default='as the source has it')
    parser.add_argument('--img-size', type=at_least(1), help='height and width (default: the source\'s)')
    parser.add_argument('--class-names', type=Path, help='text file, one name a line (default: the source\'s)')
    parser.add_argument(
        '--reparam', action=argparse.BooleanOptionalAction, default=True,
        help='fold the model for inference (default: yes)')
    parser.add_argument('--check', action='store_true', help='run the result beside the eager model')
    parser.add_argument('--images', nargs='+', default=[], type=Path, help='photographs to check with (default: noise)')
    add_ema_flag(parser)
    add_overwrite(parser)
    args = parser.parse_args(argv)
    missing = [p for p in args.images if not p.is_file()]
    if missing:
        parser.error(f'no image at {missing[0]}')
    return run(parser.prog, _export, args)


def _export(args: argparse.Namespace) -> int:
    with plain_export_errors():
        return _export_and_check(args)


def _export_and_check(args: argparse.Namespace) -> int:
    import torch
    from timm.utils import setup_default_logging

    from pst_timm.checkpoints import load_model, preprocessing, set_attention
    from pst_timm.deploy.export import FORMATS, check_export, export, tolerance
    from pst_timm.utils.cost import check_image_memory

    setup_default_logging(logging.WARNING)
    path = args.output or Path(Path(args.source.split(':')[-1]).name.split('.')[0] + FORMATS[args.format])
    check_output(path, args.overwrite, [*files_of(args.source), *args.images, *filter(None, [args.class_names])])
    dtype = getattr(torch, args.dtype)
    names = read_class_names(args.class_names)
    if args.img_size:
        check_image_memory(args.img_size)
    model = load_model(
        args.source, arch=args.model, pretrained=args.pretrained, num_classes=args.num_classes, use_ema=args.use_ema)
    preprocessing(model, args.source, {'img_size': args.img_size})  # says where they differ
    set_attention(model, args.topk, args.fine_fusion, args.source)
    exported = export(
        model, path, args.format, args.dynamic, dtype, args.img_size, args.reparam, names, args.overwrite)
    print(f'Written: {path} ({path.stat().st_size / 2 ** 20:.1f} MiB)')
    if not args.check:
        return 0
    rows = check_export(exported, path, args.format, args.dynamic, args.img_size, args.images)
    for row in rows:
        print(f'{row["shape"]:>16}  difference to eager {row["difference"]:.1e}')
    # max would pass over a NaN
    worst = torch.tensor([row['difference'] for row in rows]).max().item()
    print(f'largest difference {worst:.1e}, relative to the largest logit; allowed {tolerance(dtype):.0e}')
    return 0 if worst <= tolerance(dtype) else 1
