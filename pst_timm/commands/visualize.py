"""`pst-timm visualize`: what PST looks at, drawn."""
import argparse
from pathlib import Path
from typing import Optional, Sequence

from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import read_class_names
from pst_timm.utils.markdown import plain

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
)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """`pst-timm visualize`; returns the exit code."""
    parser = ArgumentParser(
        prog='pst-timm visualize', description='Draw what PST looks at in an image, or in the images of a folder.')
    parser.add_argument('source', type=Path, metavar='IMAGE_OR_FOLDER')
    parser.add_argument('--model', help='model name or hf-hub:org/name; of a checkpoint that does not tell it')
    add_source(parser, '--checkpoint', names=False, type=Path)
    add_ema_flag(parser)
    add_attention_flags(parser, default='the model\'s, or 8 and at most half of all where that is 0')
    parser.add_argument('--img-size', type=at_least(32), help='height and width (default: the model\'s)')
    parser.add_argument('--num-classes', type=at_least(1), help='default: that of the weights')
    parser.add_argument('--class-names', type=Path, help='text file, one name a line (default: the model\'s)')
    parser.add_argument('--block', type=int, default=-1, help='PST block, counted from 0 (default: the last)')
    add_output(parser, '.png, .pdf or .svg file (default: the image\'s name + -pst.png)')
    parser.add_argument(
        '--limit', type=at_least(1), default=12, help='most images of a folder, evenly spaced (default: 12)')
    parser.add_argument('--each', action='store_true', help='of a folder, also the figure of each image')
    add_overwrite(parser)
    args = parser.parse_args(argv)
    if args.topk is not None and args.topk < 1:
        parser.error(f'--topk must be at least 1, got {args.topk}')
    if args.model is None and args.checkpoint is None:
        parser.error('name a model with --model, or a checkpoint with --checkpoint')
    return run(parser.prog, _visualize, args)


def _visualize(args: argparse.Namespace) -> None:
    from timm.utils import setup_default_logging

    from pst_timm.checkpoints import attention_settings, load_model, preprocessing
    from pst_timm.data.images import find_images
    from pst_timm.utils.cost import check_image_memory
    from pst_timm.visualize.view import check_outputs, visualize

    setup_default_logging()
    if not args.source.exists():
        raise PSTError(f'There is no image or folder {args.source}.')
    output = args.output or Path(f'{args.source.resolve().stem}-pst.png')
    read = [*files_of(str(args.checkpoint or args.model)), *filter(None, [args.class_names])]
    check_outputs(output, args.source, args.limit, args.each, args.overwrite, read)
    names = read_class_names(args.class_names)
    if args.img_size:
        check_image_memory(args.img_size)
    model = load_model(
        args.checkpoint or args.model, arch=args.model if args.checkpoint else None, num_classes=args.num_classes,
        use_ema=args.use_ema)
    preprocessing(model, args.checkpoint or args.model, {'img_size': args.img_size})  # says where they differ
    topk = args.topk or attention_settings(model)['topk'] or 8
    if not args.topk and hasattr(model, 'tokens'):
        # half of the tokens at most, so that there is something to choose
        topk = max(1, min(topk, model.tokens(args.img_size or model.pretrained_cfg['input_size'][-2:]) // 2))
    try:
        written = visualize(
            args.source, model, output, args.limit, args.each, args.overwrite, topk=topk, fusion=args.fine_fusion,
            img_size=args.img_size, class_names=names, block=args.block)
    except (ValueError, RuntimeError, OSError) as e:  # the layers' and torch's own
        raise PSTError(plain(e, 500)) from e
    if args.source.is_dir():
        shown, found = find_images(args.source, args.limit)
        print(f'{len(shown)} of {found} images drawn.')
    for path in written:
        print(f'Written: {path}')
