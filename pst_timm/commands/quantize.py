"""`pst-timm quantize`: a model in smaller numbers, measured beside the one it was."""
import argparse
import logging
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import check_output, read_class_names

from .common import (
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
    points,
    run,
)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """`pst-timm quantize`; returns the exit code."""
    parser = ArgumentParser(
        prog='pst-timm quantize',
        description='Write a model in int8, calibrated by images of the training split, or in bfloat16, and measure it '
                    'beside the float model: answers, size, time.')
    add_source(parser)
    parser.add_argument('--data-dir', metavar='DIR', help='images: a folder of splits (int8 needs it)')
    parser.add_argument('--train-split', default='train', help='split to calibrate by (default: %(default)s)')
    parser.add_argument(
        '--val-split', help='split to report the accuracy on; nothing is decided by it (default: validation, if there)')
    parser.add_argument(
        '--no-labels', action='store_true', help='the folders are no classes of the model: go by its own answers')
    parser.add_argument(
        '--level', choices=('int8', 'bfloat16'), default='int8', help='numbers to use (default: %(default)s)')
    parser.add_argument(
        '--backend', choices=('onnxruntime', 'openvino'), default='onnxruntime',
        help='what is to run int8 (default: %(default)s)')
    parser.add_argument(
        '--images', type=at_least(1), default=128, metavar='N', help='images to calibrate by (default: %(default)s)')
    parser.add_argument(
        '--method', choices=('minmax', 'percentile', 'entropy'), default='minmax',
        help='how ONNX Runtime finds ranges (default: %(default)s)')
    parser.add_argument(
        '--float', nargs='+', default=[], metavar='LAYER', dest='float_layers',
        help='layers, or modules around them, that stay in float; * stands for anything')
    parser.add_argument(
        '--max-drop', type=points, metavar='POINTS',
        help='leave the most sensitive layers in float until no more accuracy is lost, on training images held out')
    parser.add_argument(
        '--held-out', type=at_least(1), default=1000, metavar='N',
        help='training images to check with, at most (default: %(default)s)')
    parser.add_argument(
        '--val-images', type=at_least(0), default=2000, metavar='N',
        help='validation images to report on, 0 for all (default: %(default)s)')
    parser.add_argument('--seed', type=at_least(0), default=0, help='of the images drawn (default: %(default)s)')
    add_attention_flags(parser, default='as the source has it')
    parser.add_argument('--img-size', type=at_least(1), help="height and width (default: the source's)")
    add_load_flags(parser)
    parser.add_argument('--class-names', type=Path, help="text file, one name a line (default: the source's)")
    add_ema_flag(parser)
    parser.add_argument('--no-timing', action='store_true', help='do not time the forms of the model')
    parser.add_argument('-b', '--batch-size', type=at_least(1), default=16, help='images at a time (default: 16)')
    parser.add_argument(
        '-j', '--workers', type=at_least(0), default=0,
        help='processes that read images, 0 for the one that computes (default: 0)')
    add_output(parser, "file to write (default: the source's name); a report goes beside it, to .json")
    add_overwrite(parser)
    args = parser.parse_args(argv)
    if args.level == 'int8' and not args.data_dir:
        parser.error('int8 is calibrated by images of the training data: name them with --data-dir')
    return run(parser.prog, _quantize, args)


def _quantize(args: argparse.Namespace) -> None:
    with plain_export_errors():
        _quantize_and_print(args)


def _quantize_and_print(args: argparse.Namespace) -> None:
    from timm.utils import setup_default_logging

    from pst_timm.checkpoints import load_model, preprocessing, set_attention
    from pst_timm.deploy.quantize import default_output, quantize, report_of
    from pst_timm.utils.cost import check_image_memory
    from pst_timm.utils.devices import choose_threads
    from pst_timm.utils.tables import format_table

    setup_default_logging(logging.WARNING)
    path = args.output or default_output(args.source, args.level, args.backend)
    inputs = [*files_of(args.source), *filter(None, [args.class_names])]
    for file in (path, report_of(path), *([path.with_suffix('.bin')] if args.backend == 'openvino' else [])):
        check_output(file, args.overwrite, inputs)
    choose_threads()
    if args.img_size:
        check_image_memory(args.img_size)
    names = read_class_names(args.class_names)
    model = load_model(args.source, arch=args.model, pretrained=args.pretrained, use_ema=args.use_ema)
    if model.num_classes == 0:
        raise PSTError(f'{args.source} has no classifier: name one that has.')
    config = preprocessing(model, args.source, {'img_size': args.img_size})
    set_attention(model, args.topk, args.fine_fusion, args.source)
    done = quantize(
        model, path, level=args.level, backend=args.backend, method=args.method, float_layers=args.float_layers,
        max_drop=args.max_drop, img_size=args.img_size, class_names=names, timing=not args.no_timing,
        overwrite=args.overwrite, **_images(args, model, config))

    print(f'Written: {done.path} ({done.bytes / 2 ** 20:.2f} MiB, {done.bytes / done.float_bytes:.3f} of the '
          f'{done.float_bytes / 2 ** 20:.1f} MiB of weights in float32)')
    if done.float_layers:
        print(f'In float: {", ".join(done.float_layers)}')
    rows = []
    for title, found in (('training, held out', done.held_out), ('validation', done.validation)):
        if found is not None:
            tops = {name: '-' if top is None else f'{top:.2f}%' for name, top in (
                ('float32', found.top1_float), (args.level, found.top1))}
            rows.append({'images': f'{found.images} {title}', **tops, 'same answer': f'{found.agreement:.2f}%'})
    if rows:
        print(f'\n{format_table(rows)}')
    if done.latency:
        print('\n' + format_table([
            {'one image': name, 'ms': f'{1e3 * latency.seconds:.2f}', 'times as fast': f'{latency.ratio:.2f}'}
            for name, latency in done.latency.items()]))
    for warning in done.warnings:
        print(f'\nWarning: {warning}')
    print(f'\nReport: {report_of(done.path)}')


def _images(args: argparse.Namespace, model: Any, config: Dict[str, Any]) -> Dict[str, Any]:
    """The arguments of `quantize` about images, and what the report says of them."""
    from pst_timm.deploy.calibration import ImageBatches, draw_images, drawn_subset, open_images

    if not args.data_dir:
        return {}
    samples = open_images(model, config, args.data_dir, args.train_split, not args.no_labels)
    drawn = draw_images(samples, args.images, args.held_out, args.seed, args.batch_size, args.workers)
    found = {
        'images': drawn.calibration,
        'held_out': drawn.held_out if len(drawn.held_out) else None,
        'facts': {'train_split': args.train_split, 'seed': args.seed},
    }
    try:
        others = open_images(model, config, args.data_dir, args.val_split or 'validation', not args.no_labels)
    except PSTError:
        if args.val_split:
            raise
        return found
    if others.paths is not None and others.paths == samples.paths:  # data without splits
        if args.val_split:
            raise PSTError(f'{args.data_dir} has no split {args.val_split!r} beside {args.train_split!r}.')
        return found
    if args.val_images:
        others = drawn_subset(others, args.val_images, args.seed)
    return {**found, 'validation': ImageBatches(others, args.batch_size, args.workers)}
