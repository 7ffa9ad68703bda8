"""`pst-timm visualize`: what PST looks at, drawn."""
import argparse
import logging
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import timm
import torch
from timm.models import get_pretrained_cfg
from timm.utils import setup_default_logging

from pst_timm.checkpoints import build_model, load_model, read_checkpoint
from pst_timm.data.images import find_images
from pst_timm.layers import FINE_FUSIONS
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import read_class_names
from pst_timm.visualize.view import FORMATS, MIN_SIDE, check_output, visualize

from .common import CHECKPOINT_HELP, fail

_logger = logging.getLogger(__name__)


def _open_model(
        model: Optional[str],
        checkpoint: Optional[Path],
        num_classes: Optional[int],
        use_ema: Optional[bool],
) -> torch.nn.Module:
    """The model of the command, in eval mode: from a checkpoint, or by name with its weights if it has any."""
    kwargs: Dict[str, Any] = {} if num_classes is None else {'num_classes': num_classes}
    if checkpoint is not None:
        weights = read_checkpoint(checkpoint, use_ema is not False)
        weights.arch = weights.arch or model
        if model is not None and weights.arch != model.split('.')[0]:
            raise PSTError(f'{checkpoint} is a checkpoint of {weights.arch}, not of {model}.')
        return build_model(weights, **kwargs)
    if model is None:
        raise PSTError('Name a model with --model, or a checkpoint with --checkpoint.')
    if timm.is_model(model.split('.')[0]):
        cfg = get_pretrained_cfg(model)
        kwargs['pretrained'] = cfg is not None and cfg.has_weights
        if kwargs['pretrained'] and num_classes not in (None, cfg.num_classes):
            raise PSTError(f'The weights of {model} know {cfg.num_classes} classes, not {num_classes}.')
        if not kwargs['pretrained']:
            _logger.warning(f'{model} has no published weights, so these are random ones: see --checkpoint.')
    return load_model(model, **kwargs).eval()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='pst-timm visualize', description='Draw what PST looks at in an image, or in the images of a folder.')
    parser.add_argument('source', type=Path, metavar='IMAGE_OR_FOLDER')
    parser.add_argument('--model', help='model name, hf-hub:org/name, or folder with config.json')
    parser.add_argument('--checkpoint', type=Path, help=CHECKPOINT_HELP)
    parser.add_argument(
        '--use-ema', action=argparse.BooleanOptionalAction,
        help='the moving average of a training checkpoint (default: where there is one)')
    parser.add_argument('--topk', type=int, default=8, help='coarse tokens that each head selects (default: 8)')
    parser.add_argument('--fusion', '--fine-fusion', choices=FINE_FUSIONS, help='default: the model\'s')
    parser.add_argument('--img-size', type=int, help='height and width (default: the model\'s)')
    parser.add_argument('--num-classes', type=int, help='default: that of the weights')
    parser.add_argument('--class-names', type=Path, help='text file, one name a line')
    parser.add_argument('--block', type=int, default=-1, help='PST block, counted from 0 (default: the last)')
    parser.add_argument('--output', type=Path, help=f'{", ".join(FORMATS)} (default: the image\'s name + -pst.png)')
    parser.add_argument('--limit', type=int, default=12, help='most images of a folder, evenly spaced (default: 12)')
    parser.add_argument('--each', action='store_true', help='of a folder, also the figure of each image')
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """`pst-timm visualize`; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.img_size is not None and args.img_size < MIN_SIDE:
        parser.error(f'--img-size must be at least {MIN_SIDE}, the side of a coarse token, got {args.img_size}')
    for flag, value in (('--topk', args.topk), ('--limit', args.limit)):
        if value < 1:
            parser.error(f'{flag} must be at least 1, got {value}')
    setup_default_logging()
    try:
        return _run(args)
    except (PSTError, ValueError, RuntimeError, OSError) as e:  # timm, too, has a sentence for those who misname a tag
        return fail(parser.prog, e)


def _run(args: argparse.Namespace) -> int:
    if not args.source.exists():
        raise PSTError(f'There is no image or folder {args.source}.')
    output = args.output or Path(f'{args.source.resolve().stem}-pst.png')
    check_output(output, args.source)
    names = read_class_names(args.class_names)
    model = _open_model(args.model, args.checkpoint, args.num_classes, args.use_ema)
    written = visualize(
        args.source, model, output, args.limit, args.each, topk=args.topk, fusion=args.fusion,
        img_size=args.img_size, class_names=names, block=args.block)
    if args.source.is_dir():
        shown, found = find_images(args.source, args.limit)
        print(f'{len(shown)} of {found} images drawn.')
    for path in written:
        print(f'Written: {path}')
    return 0
