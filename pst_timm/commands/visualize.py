"""`pst-timm visualize`: what PST looks at, drawn."""
import argparse
import sys
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import timm
import torch
from timm.models import get_pretrained_cfg

from pst_timm.checkpoints.building import build_model, load_model
from pst_timm.checkpoints.reading import read_checkpoint
from pst_timm.deploy.export import MIN_SIDE
from pst_timm.utils.files import read_class_names
from pst_timm.visualize.view import check_output, find_images, visualize


def load_source(model: Optional[str], checkpoint: Optional[Path], num_classes: Optional[int]) -> torch.nn.Module:
    """The model of the command, in eval mode: from a checkpoint, or by name with its weights if it has any.

    Raises:
        ValueError: If neither is given, they contradict each other, or there is no such model.
    """
    kwargs: Dict[str, Any] = {} if num_classes is None else {'num_classes': num_classes}
    if checkpoint is not None:
        weights = read_checkpoint(checkpoint)
        weights.arch = weights.arch or model
        if model is not None and weights.arch != model.split('.')[0]:
            raise ValueError(f'{checkpoint} is a checkpoint of {weights.arch}, not of {model}.')
        return build_model(weights, **kwargs)
    if model is None:
        raise ValueError('Name a model with --model, or a checkpoint with --checkpoint.')
    if timm.is_model(model.split('.')[0]):
        cfg = get_pretrained_cfg(model)
        kwargs['pretrained'] = cfg is not None and cfg.has_weights
        if kwargs['pretrained'] and num_classes not in (None, cfg.num_classes):
            raise ValueError(f'The weights of {model} know {cfg.num_classes} classes, not {num_classes}.')
        if not kwargs['pretrained']:
            print(f'{model} has no published weights, so these are random ones: see --checkpoint.', file=sys.stderr)
    return load_model(model, **kwargs).eval()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='pst-timm visualize', description='Draw what PST looks at in an image, or in the images of a folder.')
    parser.add_argument('source', type=Path, metavar='IMAGE_OR_FOLDER')
    parser.add_argument('--model', help='model name, hf-hub:org/name, or folder with config.json')
    parser.add_argument('--checkpoint', type=Path, help='training checkpoint, its folder, or a .safetensors file')
    parser.add_argument('--topk', type=int, default=8, help='coarse tokens that each head selects (default: 8)')
    parser.add_argument('--fusion', '--fine-fusion', choices=('gate', 'joint'), help='default: the model\'s')
    parser.add_argument('--img-size', type=int, help='height and width (default: the model\'s)')
    parser.add_argument('--num-classes', type=int, help='default: that of the weights')
    parser.add_argument('--class-names', type=Path, help='text file, one name a line')
    parser.add_argument('--block', type=int, default=-1, help='PST block, counted from 0 (default: the last)')
    parser.add_argument('--output', type=Path, help='.png, .pdf or .svg file (default: the image\'s name + -pst.png)')
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
    try:
        return _run(args)
    except (ValueError, RuntimeError, OSError, ImportError) as e:
        print(f'pst-timm visualize: error: {" ".join(str(e).split())}', file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    if not args.source.exists():
        raise ValueError(f'There is no image or folder {args.source}.')
    output = args.output or Path(f'{args.source.resolve().stem}-pst.png')
    check_output(output, args.source)
    names = read_class_names(args.class_names)
    model = load_source(args.model, args.checkpoint, args.num_classes)
    written = visualize(
        args.source, model, output, args.limit, args.each, topk=args.topk, fusion=args.fusion,
        img_size=args.img_size, class_names=names, block=args.block)
    if args.source.is_dir():
        shown, found = find_images(args.source, args.limit)
        print(f'{len(shown)} of {found} images drawn.')
    for path in written:
        print(f'Written: {path}')
    return 0
