"""`pst-timm prune`: a model with fewer channels."""
import argparse
from typing import Dict, Optional, Sequence

from .common import (
    IMPORTANCES,
    ArgumentParser,
    add_attention_flags,
    add_ema_flag,
    add_load_flags,
    add_output,
    add_overwrite,
    add_round_to,
    add_source,
    at_least,
    positive,
    run,
    share,
    split_words,
)

BY = ('macs', 'channels')  # also in a room that needs torch


def main(argv: Optional[Sequence[str]] = None) -> int:
    """`pst-timm prune`; returns the exit code."""
    words, train_words = split_words(argv)
    parser = ArgumentParser(
        prog='pst-timm prune',
        usage='%(prog)s SOURCE -o FOLDER [--data-dir DATA] [flags] [-- flags of pst-timm train]',
        description='Cut whole channels out of a model, so that it computes less on any processor, and train what is '
                    'left further. What comes out is an ordinary model. A command that was stopped goes on where it '
                    'was.')
    add_source(parser, metavar='SOURCE')
    add_output(parser, 'folder to write: config.json and model.safetensors', required=True, metavar='FOLDER')
    how_much = parser.add_mutually_exclusive_group()
    how_much.add_argument(
        '--ratio', type=share, default=0.5, help='share of the multiply-adds to remove (default: %(default)s)')
    how_much.add_argument(
        '--target-latency', type=_latency, metavar='LATENCY', default={},
        help='milliseconds for an image, or as 0.6x a share of what the model takes now: prune until it is measured')
    parser.add_argument(
        '--by', choices=BY, default=BY[0], help='what the ratio is a share of (default: %(default)s, multiply-adds)')
    parser.add_argument(
        '--importance', choices=IMPORTANCES, default=IMPORTANCES[0],
        help='what tells how much a channel matters: its weights, its batch-norm scales (after a training with '
             '--sparsity-weight), or the change of the loss without it, which needs images (default: %(default)s)')
    scope = parser.add_mutually_exclusive_group()
    scope.add_argument(
        '--uniform', dest='scope', action='store_const', const='uniform', default='uniform',
        help='cut the same share of every layer (default)')
    scope.add_argument(
        '--global', dest='scope', action='store_const', const='global', help='compare the channels of all layers')
    parser.add_argument(
        '--steps', type=at_least(1), default=1, help='cut in so many steps, with training after each (default: 1)')
    add_round_to(parser)
    parser.add_argument('--data-dir', help='folder with the images the model was trained on; without it nothing is '
                                           'trained')
    parser.add_argument('--train-split', default='train', help='split to train on (default: %(default)s)')
    parser.add_argument(
        '--val-split', default='', help='split to tell the accuracy on while it trains; it decides nothing (default: '
                                        'none)')
    parser.add_argument(
        '--images', type=at_least(1), default=512,
        help='training images for the importance and the statistics of batch norms (default: %(default)s)')
    parser.add_argument('--seed', type=at_least(0), default=0, help='seed of their draw (default: 0)')
    parser.add_argument(
        '--finetune', action=argparse.BooleanOptionalAction, default=True,
        help='train after each step, where there are images (default: yes)')
    parser.add_argument(
        '--distill', action=argparse.BooleanOptionalAction, default=True,
        help='let the training imitate the model as it was, unless -- --kd-model-name names another (default: yes)')
    add_load_flags(parser)
    add_attention_flags(parser, default='as the source has it')
    add_ema_flag(parser)
    add_overwrite(parser, 'what an earlier call made')
    args = parser.parse_args(words)
    args.train_words = train_words
    if args.data_dir is None:
        if args.importance == 'taylor':
            parser.error('--importance taylor needs images: name them with --data-dir')
        if args.train_words:
            parser.error('flags after -- are for the training, which needs --data-dir')
    elif args.train_words and not args.finetune:
        parser.error('flags after -- are for the training, which --no-finetune leaves out')
    if args.target_latency and args.by != 'macs':
        parser.error('--target-latency finds a share of the multiply-adds: leave out --by')
    return run(parser.prog, _prune, args)


def _latency(text: str) -> Dict[str, float]:
    return {'share': share(text[:-1])} if text.endswith('x') else {'milliseconds': positive(text)}


def _prune(args: argparse.Namespace) -> None:
    import logging

    from timm.utils import setup_default_logging

    from pst_timm.checkpoints import attention_settings
    from pst_timm.deploy.prune_folder import prune_to_folder
    from pst_timm.utils.errors import PSTError
    from pst_timm.utils.tables import format_table

    setup_default_logging(logging.INFO)
    data = {'data_dir': args.data_dir, 'train_split': args.train_split, 'val_split': args.val_split}
    train_flags = {}
    if args.data_dir is not None and args.finetune:
        from pst_timm.deploy.finetune import finetune_flags

        train_flags = finetune_flags(args.train_words, args.source)
    teacher = args.source if args.distill and not train_flags.get('kd_model_name') else None
    try:
        done = prune_to_folder(
            args.source, args.output, args.ratio, args.target_latency, data if args.data_dir else None, args.images,
            args.seed, args.finetune, teacher, train_flags, args.overwrite,
            dict(arch=args.model, pretrained=args.pretrained, use_ema=args.use_ema, topk=args.topk,
                 fine_fusion=args.fine_fusion),
            importance=args.importance, scope=args.scope, round_to=args.round_to, by=args.by, steps=args.steps)
    except PSTError:  # a ValueError too, with an exit code of its own
        raise
    except ValueError as e:
        raise PSTError(str(e)) from e
    print(format_table([
        dict(what='multiply-adds (G)', **{key: f'{value:.3f}' for key, value in done.gmacs.items()}),
        dict(what='parameters', **{key: f'{value:,}' for key, value in done.params.items()}),
    ]))
    removed = 1 - done.gmacs['after'] / done.gmacs['before']
    settings = attention_settings(done.model)
    at = f' (at topk={settings["topk"]})' if settings['topk'] else ''
    print(f'\n{removed:.1%} of the multiply-adds{at} removed. Written: {args.output}')
    if done.checkpoint is None:
        print('It was not trained since, so its accuracy is not what it was: train it further, with --data-dir here or '
              f'with pst-timm train --model local-dir:{args.output} --pretrained.')
    else:
        print(f'Trained further in {done.checkpoint.parent}. Its accuracy on images it has not seen: pst-timm validate '
              f'--checkpoint {args.output} --data-dir {args.data_dir}.')
