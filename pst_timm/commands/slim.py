"""`pst-timm slim`: a model made small and fast in one command."""
import argparse
import logging
from dataclasses import fields
from pathlib import Path
from typing import Optional, Sequence

from .common import (
    IMPORTANCES,
    ArgumentParser,
    add_overwrite,
    add_round_to,
    add_source,
    at_least,
    not_negative,
    points,
    run,
    share,
    split_words,
)

BACKENDS = ('onnxruntime', 'openvino')  # also in a room that needs torch


def main(argv: Optional[Sequence[str]] = None) -> int:
    """`pst-timm slim`; returns the exit code."""
    words, train_flags = split_words(argv)
    parser = ArgumentParser(
        prog='pst-timm slim',
        usage='%(prog)s SOURCE (--data-dir DATA | --no-data) -o FOLDER [flags] [-- flags of pst-timm train]',
        description='Prune a model, fine-tune it with the original as its teacher, quantise it, and let the original '
                    'answer what the small one is unsure of: each step as far as the accuracy on images that are set '
                    'aside allows. A command that was stopped goes on where it was.')
    add_source(parser, metavar='SOURCE')
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument('--data-dir', help='folder with the splits the model was trained and validated on')
    data.add_argument(
        '--no-data', action='store_true', help='the structure and its latency alone: nothing is trained or measured')
    parser.add_argument('-o', '--output', type=Path, required=True, metavar='FOLDER', help='folder to write to')
    parser.add_argument(
        '--max-drop', type=points, default=1., metavar='POINTS',
        help='most points of top-1 that may be lost on the images set aside (default: %(default)g)')
    parser.add_argument(
        '--ratio', type=share, nargs='+', default=[0.5],
        help='share of the multiply-adds to remove; of several the first that is accurate enough (default: 0.5)')
    parser.add_argument(
        '--importance', choices=IMPORTANCES, default='l2', help='what tells which channels matter (default: l2)')
    parser.add_argument(
        '--global', dest='scope', action='store_const', const='global', default='uniform',
        help='compare the channels of all layers (default: cut the same share of each)')
    add_round_to(parser)
    parser.add_argument(
        '--backend', choices=BACKENDS, default=BACKENDS[0], help='what runs the int8 model (default: %(default)s)')
    parser.add_argument(
        '--cascade-cost', type=not_negative, default=0.9, metavar='SHARE',
        help='most mean latency of the cascade, as a share of that of its last stage, the original in the same numbers '
             'as the small model; 0 for no cascade (default: %(default)s)')
    parser.add_argument('--train-split', default='train', help='split to fine-tune on (default: %(default)s)')
    parser.add_argument(
        '--val-split', default='validation', help='split of the final numbers, empty for none (default: %(default)s)')
    parser.add_argument(
        '--held-out', type=share, default=0.2, metavar='SHARE',
        help='share of the training images that is set aside to decide, at most 0.5 (default: 0.2)')
    parser.add_argument(
        '--images', type=at_least(8), default=256,
        help='training images for the ranges of int8 and the statistics of batch norms (default: 256)')
    parser.add_argument('-b', '--batch-size', type=at_least(1), default=64, help='images at a time (default: 64)')
    parser.add_argument('-j', '--workers', type=at_least(0), default=0, help='processes that read images (default: 0)')
    parser.add_argument('--seed', type=at_least(0), default=0, help='seed of all draws (default: 0)')
    parser.add_argument('--rounds', type=at_least(1), default=30, help='rounds of the timing (default: 30)')
    add_overwrite(parser, 'what an earlier call made')
    args = parser.parse_args(words)
    args.train_flags = train_flags
    if args.no_data and args.train_flags:
        parser.error('flags after -- are for the fine-tuning, which needs --data-dir')
    return run(parser.prog, _slim, args)


def _slim(args: argparse.Namespace) -> None:
    from timm.utils import setup_default_logging

    from pst_timm.deploy.finetune import finetune_flags
    from pst_timm.deploy.slim import REPORT, Settings, slim
    from pst_timm.utils.tables import format_table

    setup_default_logging(logging.WARNING)
    logging.getLogger('pst_timm').setLevel(logging.INFO)  # and not of what exporters do
    flags = {} if args.no_data else finetune_flags(args.train_flags, args.source)
    settings = Settings(tuple(args.ratio), **{
        field.name: getattr(args, field.name) for field in fields(Settings) if hasattr(args, field.name)})
    report = slim(args.source, args.output, args.data_dir, settings, flags, args.overwrite)
    print(format_table(report.rows(), 3))
    for step in report.steps:
        if step.path:
            print(f'Written: {args.output / step.path}')
    print(f'Written: {args.output / REPORT}')
