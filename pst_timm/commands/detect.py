"""`pst-timm detect`: object detectors over a PST pyramid."""
import argparse
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple, Union

from .common import (
    ArgumentParser,
    add_attention_flags,
    add_ema_flag,
    add_output,
    add_overwrite,
    add_source,
    at_least,
    files_of,
    run,
    run_parsed,
)

ACTIONS = {
    'train': 'train a detector',
    'validate': 'evaluate one: average precision, and that of each class',
    'predict': 'draw the boxes in images, or write them as JSON',
    'export': 'write one for deployment',
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """`pst-timm detect`; returns the exit code."""
    parser = ArgumentParser(
        prog='pst-timm detect', formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Object detection by FCOS or RetinaNet over a PST pyramid, on any timm trunk.',
        epilog='\n'.join(f'  {name:10}{what}' for name, what in ACTIONS.items())
               + '\n\npst-timm detect ACTION --help tells the flags of an action.')
    parser.add_argument('action', choices=[*ACTIONS], help='see below')
    parser.add_argument('words', nargs=argparse.REMAINDER, metavar='...', help='flags of the action')
    args = parser.parse_args(argv)
    return {
        'train': _main_train, 'validate': _main_validate, 'predict': _main_predict, 'export': _main_export,
    }[args.action](args.words)


def _main_train(words: Sequence[str]) -> int:
    from pst_timm.detection.flags import parse_train_args

    return run_parsed('pst-timm detect train', parse_train_args, words, _train)


def _train(args: Namespace) -> None:
    from timm.utils import setup_default_logging

    from pst_timm.detection.job import train

    setup_default_logging()
    result = train(args)
    if result.best_checkpoint is not None:
        print(f'Best checkpoint: {result.best_checkpoint}')


def _main_validate(words: Sequence[str]) -> int:
    from pst_timm.detection.flags import parse_validate_args

    return run_parsed('pst-timm detect validate', parse_validate_args, words, _validate)


def _validate(args: Namespace) -> None:
    import json

    from timm.utils import setup_default_logging

    from pst_timm.detection.validation import validate
    from pst_timm.utils.tables import format_table

    setup_default_logging()
    rows = validate(args)
    print(format_table([_readable(row) for row in rows]))
    # the marker that timm's own tools look for
    print(f'--result\n{json.dumps(rows[0] if len(rows) == 1 else rows, indent=4)}')


def _readable(row: Mapping[str, Any]) -> Dict[str, Any]:
    """What a person wants to see of a row of results."""
    hidden = ('param_count', 'checkpoint', 'ema', 'selected', 'images')
    return {k: round(v, 1) if isinstance(v, float) else v for k, v in row.items() if k not in hidden}


def _main_predict(words: Sequence[str]) -> int:
    parser = ArgumentParser(
        prog='pst-timm detect predict', intermixed=True,
        description='Draw the boxes that a detector finds in images, or write them as JSON.')
    add_source(parser, names=False)
    parser.add_argument(
        'images', nargs='+', metavar='IMAGE', help='image, or folder with images in it and in the folders below')
    add_output(parser, 'folder for the images with boxes drawn on them')
    parser.add_argument('--json', type=Path, metavar='FILE', help="file for the boxes, as COCO's list of results")
    parser.add_argument(
        '--threshold', type=_share, default=0.5, metavar='SCORE', help='least score of a box (default: %(default)s)')
    _add_detector_flags(parser)
    add_overwrite(parser)
    args = parser.parse_args(words)
    if args.output is None and args.json is None:
        parser.error('say where the boxes go: --output FOLDER for pictures, --json FILE for data')
    return run(parser.prog, _predict, args)


def _predict(args: Namespace) -> None:
    from timm.utils import setup_default_logging

    from pst_timm.detection.predict import predict
    from pst_timm.utils.files import check_output

    setup_default_logging()
    if args.json is not None:
        check_output(args.json, args.overwrite, [*files_of(args.source), *args.images])
    found = predict(
        args.source, args.images, args.output, args.json, args.threshold, args.batch_size, args.overwrite,
        use_ema=args.use_ema, topk=args.topk, fine_fusion=args.fine_fusion, img_size=args.img_size, device=args.device)
    boxes = sum(len(prediction.scores) for prediction in found)
    print(f'{boxes} boxes with a score of {args.threshold:g} or more in {len(found)} image(s).')
    for path in filter(None, (args.output, args.json)):
        print(f'Written: {path}')


def _main_export(words: Sequence[str]) -> int:
    parser = ArgumentParser(
        prog='pst-timm detect export',
        description='Write a detector as ONNX, with its suppression of overlapping boxes.')
    add_source(parser, names=False)
    add_output(parser, '.onnx file to write', required=True)
    add_ema_flag(parser)
    add_attention_flags(parser)
    parser.add_argument(
        '--img-size', type=_height_and_width, metavar='SIDE|HxW',
        help="height and width of the images, as 240x320, or one number for both (default: the detector's longer side)")
    parser.add_argument(
        '--reparam', action=argparse.BooleanOptionalAction, default=True,
        help='fold the detector for inference (default: yes)')
    parser.add_argument(
        '--check', action='store_true', help='write what gives the boxes of the detector in ONNX Runtime, or nothing')
    parser.add_argument(
        '--images', nargs='+', default=[], type=Path, metavar='IMAGE',
        help='photographs to check with (default: noise)')
    add_overwrite(parser)
    args = parser.parse_args(words)
    missing = [p for p in args.images if not p.is_file()]
    if missing:
        parser.error(f'no image at {missing[0]}')
    if args.output.suffix.lower() != '.onnx':
        parser.error(f'--output {args.output} must end with .onnx, which is what is written')
    if args.images and not args.check:
        parser.error('--images are for --check: give that too')
    return run(parser.prog, _export, args)


def _export(args: Namespace) -> None:
    from timm.utils import setup_default_logging

    from pst_timm.detection.checkpoint import open_detector
    from pst_timm.detection.export import export_detector
    from pst_timm.utils.files import check_output

    setup_default_logging()
    check_output(args.output, args.overwrite, [*files_of(args.source), *args.images])
    detector = open_detector(args.source, args.use_ema, args.topk, args.fine_fusion, 'cpu')
    rows = export_detector(
        detector, args.output, args.img_size, args.reparam, args.check, args.images, args.overwrite)
    for row in rows:
        print(f'{row["image"]}: {row["boxes"]} boxes above {row["score_thresh"]:g}, largest difference '
              f'{row["pixels"]:.1e} px, of scores {row["score"]:.1e}')
    print(f'Written: {args.output} ({args.output.stat().st_size / 2 ** 20:.1f} MiB)')


def _height_and_width(text: str) -> Union[int, Tuple[int, int]]:
    """The `type` of a flag that takes '320' or '240x320'."""
    sides = tuple(int(part) if part.isdecimal() else 0 for part in text.split('x'))
    if len(sides) > 2 or min(sides) < 32:
        raise argparse.ArgumentTypeError(f'expected a side of at least 32, or HEIGHTxWIDTH, got {text!r}')
    return sides[0] if len(sides) == 1 else sides


def _add_detector_flags(parser: argparse.ArgumentParser) -> None:
    """Add what says how a detector looks at images, as the classifiers' commands have it."""
    add_ema_flag(parser)
    add_attention_flags(parser)
    parser.add_argument('--img-size', type=at_least(32), help="longer side of the images (default: the detector's)")
    parser.add_argument('--device', default='', help='cpu, cuda, cuda:1, mps, ... (default: the best there is)')
    parser.add_argument('-b', '--batch-size', type=at_least(1), default=8, help='images at a time (default: 8)')


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f'expected a number from 0 to 1, got {text!r}')
    return share
