"""`pst-timm publish`: a checkpoint to the Hub."""
import argparse
import logging
from pathlib import Path
from typing import Optional, Sequence

from timm.utils import setup_default_logging

from pst_timm.hub.publishing import publish
from pst_timm.layers.attention import FINE_FUSIONS
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import read_class_names

from .common import CHECKPOINT_HELP, add_ema_flag, fail


def main(argv: Optional[Sequence[str]] = None) -> int:
    """`pst-timm publish`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='pst-timm publish',
        description='Publish a checkpoint on the Hub: weights as safetensors, config.json and a model card.')
    parser.add_argument('checkpoint', help=CHECKPOINT_HELP)
    parser.add_argument('--repo-id', required=True, metavar='ORG/NAME', help='repository, made if there is none')
    parser.add_argument('--private', action='store_true', help='make a new repository private')
    parser.add_argument('--revision', help='branch, made if there is none (default: the main one)')
    parser.add_argument('--dry-run', action='store_true', help='write the folder to look at, and stop')
    parser.add_argument('--folder', help='where to write the files (default in a dry run: output/publish/NAME)')
    parser.add_argument('--results', help='what validate.py --results-file wrote for these weights')
    parser.add_argument('--topk', type=int, help='fine attention the accuracy was measured with')
    parser.add_argument('--fine-fusion', choices=FINE_FUSIONS)
    parser.add_argument('--data-set', help='name of the data set, for the card')
    parser.add_argument('--class-names', type=Path, help='text file, one name a line')
    parser.add_argument('--license', default='apache-2.0', help='licence of the weights (default: %(default)s)')
    add_ema_flag(parser)
    args = parser.parse_args(argv)
    setup_default_logging(logging.WARNING)
    try:
        done = publish(
            args.checkpoint, args.repo_id, private=args.private, revision=args.revision, dry_run=args.dry_run,
            folder=args.folder, use_ema=args.use_ema is not False, topk=args.topk, fine_fusion=args.fine_fusion,
            results=args.results, class_names=read_class_names(args.class_names), data_set=args.data_set,
            license=args.license)
    except PSTError as e:
        return fail(parser.prog, e)
    print(f'Weights: {"the moving average (EMA)" if done.ema else "no EMA"}. Loaded again, they give the same logits.')
    if done.accuracy is None:
        print('The card tells no accuracy: none was measured for these weights (see --results).')
    if done.folder is not None:
        print(f'Written: {done.folder}')
    print(f'Published: {done.url}' if done.url else 'A dry run: nothing was published.')
    return 0
