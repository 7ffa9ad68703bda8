"""`pst-timm publish`: a checkpoint to the Hub."""
import argparse
import logging
from pathlib import Path
from typing import Optional, Sequence

from .common import ArgumentParser, add_attention_flags, add_ema_flag, add_overwrite, add_source, at_least, run


def main(argv: Optional[Sequence[str]] = None) -> int:
    """`pst-timm publish`; returns the exit code."""
    parser = ArgumentParser(
        prog='pst-timm publish',
        description='Publish a checkpoint on the Hub: weights as safetensors, config.json and a model card.')
    add_source(parser, 'checkpoint', names=False)
    parser.add_argument('--repo-id', required=True, metavar='ORG/NAME', help='repository, made if there is none')
    parser.add_argument('--private', action='store_true', help='make a new repository private')
    parser.add_argument('--revision', help='branch, made if there is none (default: the main one)')
    parser.add_argument('--dry-run', action='store_true', help='write the folder to look at, and stop')
    parser.add_argument('--folder', help='where to write the files (default in a dry run: output/publish/NAME)')
    parser.add_argument('--results', help='what validate.py --results-file wrote for these weights')
    add_attention_flags(parser, default='as the checkpoint has it')
    parser.add_argument('--data-set', help='name of the data set, for the card')
    parser.add_argument('--class-names', type=Path,
                        help='text file, one name a line (default: the names in the checkpoint)')
    parser.add_argument('--license', default='apache-2.0', help='licence of the weights (default: %(default)s)')
    parser.add_argument('--model', dest='arch', help='architecture of a file that does not tell it')
    parser.add_argument(
        '--timeout', type=at_least(1), default=60, metavar='SECONDS',
        help='how long to wait for an answer of the Hub (default: %(default)s)')
    add_ema_flag(parser)
    add_overwrite(parser, 'the files of an earlier publication in --folder')
    return run(parser.prog, _publish, parser.parse_args(argv))


def _publish(args: argparse.Namespace) -> None:
    from timm.utils import setup_default_logging

    from pst_timm.hub.publishing import publish
    from pst_timm.utils.files import read_class_names

    setup_default_logging(logging.WARNING)
    flags = {k: v for k, v in vars(args).items() if k not in ('checkpoint', 'repo_id', 'class_names')}
    done = publish(args.checkpoint, args.repo_id, class_names=read_class_names(args.class_names), **flags)
    print(f'Weights: {"the moving average (EMA)" if done.ema else "no EMA"}. Loaded again, they give the same logits.')
    if done.accuracy is None:
        print('The card tells no accuracy: none was measured for these weights (see --results).')
    if done.folder is not None:
        print(f'Written: {done.folder}')
    print(f'Published: {done.url}' if done.url else 'A dry run: nothing was published.')
