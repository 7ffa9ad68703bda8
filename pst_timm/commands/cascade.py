"""`pst-timm cascade`: a cheap model for most images, a dearer one for those it is not sure of."""
import argparse
import csv
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple

from .common import (
    FINE_FUSIONS,
    SOURCE_HELP,
    ArgumentParser,
    add_output,
    add_overwrite,
    at_least,
    points,
    positive,
    run,
)

if TYPE_CHECKING:
    from pst_timm.deploy.cascade_fit import Fit

ACTIONS = {
    'fit': 'choose what each stage answers, for a budget or for a floor under the accuracy',
    'run': 'the classes of images, and which stage told them',
}
COSTS = ('latency', 'macs')


def main(argv: Optional[Sequence[str]] = None) -> int:
    """`pst-timm cascade`; returns the exit code."""
    parser = ArgumentParser(
        prog='pst-timm cascade', formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Confidence-routed inference: a cheap model answers what it is sure of, a dearer one the rest.',
        epilog='\n'.join(f'  {name:6}{what}' for name, what in ACTIONS.items())
               + '\n\npst-timm cascade ACTION --help tells the flags of an action; pst-timm validate --checkpoint '
                 'cascade.json\nmeasures a cascade as any other model.')
    parser.add_argument('action', choices=[*ACTIONS], help='see below')
    parser.add_argument('words', nargs=argparse.REMAINDER, metavar='...', help='flags of the action')
    args = parser.parse_args(argv)
    return {'fit': _main_fit, 'run': _main_run}[args.action](args.words)


def _main_fit(words: Sequence[str]) -> int:
    parser = ArgumentParser(
        prog='pst-timm cascade fit', intermixed=True,
        description='Run two or three models over held-out images, calibrate them, choose the confidence above which '
                    'each answers, and write all that as a file for pst_timm.Cascade and pst-timm validate.')
    parser.add_argument('stages', nargs='+', metavar='STAGE', help=f'the cheapest first: {SOURCE_HELP}, exported file')
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument(
        '--max-cost', type=_budget, metavar='X',
        help='most mean cost of an image, in the measure of --cost; 0.5x for half of what the last stage costs')
    goal.add_argument(
        '--max-drop', type=points, metavar='POINTS',
        help='most points of accuracy below the last stage alone, guaranteed at 95%% by an exact test on held-out '
             'images')
    parser.add_argument(
        '--data-dir', required=True, metavar='DIR',
        help='labelled images that no stage was trained on, and no accuracy is reported on')
    parser.add_argument('--split', default='train', help='split of the data (default: %(default)s)')
    parser.add_argument(
        '--part', type=_share, metavar='SHARE',
        help='share of the split to take, drawn with --seed (default: 0.2 of a training split, else all)')
    parser.add_argument('--seed', type=at_least(0), default=0, help='(default: 0)')
    parser.add_argument(
        '--img-sizes', type=at_least(16), nargs='+', metavar='N',
        help="height and width of each stage, or of all (default: the models')")
    parser.add_argument(
        '--topk', type=at_least(0), nargs='+', metavar='K',
        help="coarse tokens that each head selects, 0 for none, for each stage or for all (default: the models')")
    parser.add_argument(
        '--fine-fusion', '--fusion', choices=FINE_FUSIONS,
        help="how fine attention is added where --topk sets it (default: the models')")
    parser.add_argument(
        '--reparam', action='store_true', help='fold the stages for inference (default: as they are)')
    parser.add_argument(
        '--cost', choices=COSTS, default='latency',
        help='milliseconds of an image, measured in turn, or billions of multiply-adds (default: %(default)s)')
    parser.add_argument(
        '--cost-batch-size', type=at_least(1), default=1, metavar='N',
        help='images of a batch that is timed (default: %(default)s)')
    parser.add_argument('--rounds', type=at_least(3), default=30, help='timed rounds (default: %(default)s)')
    parser.add_argument('--device', default='', help='cpu, cuda, cuda:1, mps, ... (default: the best there is)')
    parser.add_argument('-b', '--batch-size', type=at_least(1), default=64, help='images at a time (default: 64)')
    parser.add_argument(
        '-j', '--workers', type=at_least(0), default=0,
        help='processes that read images, 0 for the one that computes (default: 0)')
    parser.add_argument(
        '--plot', action=argparse.BooleanOptionalAction, default=True,
        help='draw accuracy against cost beside the file, as .png (default: yes)')
    add_output(parser, 'file to write (default: %(default)s)', default=Path('cascade.json'))
    add_overwrite(parser, 'a cascade')
    args = parser.parse_args(words)
    if not 2 <= len(args.stages) <= 3:
        parser.error(f'a cascade has two or three stages, got {len(args.stages)}')
    return run(parser.prog, _fit, args)


def _budget(text: str) -> Tuple[float, bool]:
    """A cost, and whether it is a multiple of that of the last stage."""
    return positive(text.removesuffix('x')), text.endswith('x')


def _share(text: str) -> float:
    number = positive(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f'expected a share above 0 and up to 1, got {text!r}')
    return number


def _fit(args: argparse.Namespace) -> None:
    from timm.utils import setup_default_logging

    from pst_timm.deploy.cascade_fit import fit

    setup_default_logging(logging.WARNING)
    flags = {k: v for k, v in vars(args).items() if k not in ('stages', 'max_cost', 'output', 'data_dir', 'split')}
    max_cost, relative = args.max_cost or (None, False)
    done = fit(args.stages, args.output, args.data_dir, args.split, max_cost=max_cost, relative=relative, **flags)
    print(_shown(done))
    for path in filter(None, (done.path, done.plot)):
        print(f'Written: {path}')
    print(f'Measure it on other images: pst-timm validate --checkpoint {done.path} --data-dir ...', file=sys.stderr)


def _shown(done: 'Fit') -> str:
    """A fit for people."""
    from pst_timm.utils.tables import format_table

    unit, last = done.cascade.unit, done.singles[-1]
    rows: List[Dict[str, Any]] = []
    for i, (stage, single) in enumerate(zip(done.cascade.stages, done.singles)):
        passed = f'{stage.passed / stage.reached:.1%}' if stage.reached and i < len(done.singles) - 1 else None
        rows.append({
            '': f'stage {i + 1} alone', **_columns(stage.name, single, unit, last.cost),
            'px': 'x'.join(map(str, dict.fromkeys(stage.input_size[1:]))), 'temperature': f'{stage.temperature:.3g}',
            'answers above': f'{stage.threshold:.4g}' if passed else None, 'passes on': passed})
    rows.append({'': 'cascade', **_columns('', done.measured, unit, last.cost)})
    facts = done.cascade.facts
    lines = [
        f'Fitted on {facts["images"]:,} images of the {facts["split"]!r} split: report no accuracy on them.\n',
        format_table([{k: row.get(k) for k in rows[0]} for row in rows]), '']
    drop = last.accuracy - done.measured.accuracy
    if done.goal.max_drop is not None:
        lines += [
            f'Measured on the {done.images:,} of the images that chose no candidate.',
            f'Guaranteed at 95%: on images drawn like these, the accuracy of the cascade is less than '
            f'{done.goal.max_drop:g} points below that of its last stage alone (measured here: {drop:.2f}).']
    else:
        lines += [
            f'{abs(drop):.2f} points {"below" if drop > 0 else "above"} the last stage alone, on the {done.images:,} '
            f'images that chose the thresholds, which flatters the cascade a little; nothing is guaranteed for others.']
    better = [
        i + 1 for i, single in enumerate(done.singles)
        if single.accuracy >= done.measured.accuracy and single.cost <= done.measured.cost]
    if better:
        lines.append(f'Stage {better[0]} alone is as accurate, and costs no more: this cascade brings nothing.')
    return '\n'.join(lines)


def _columns(name: str, measured: Any, unit: str, dearest: float) -> Dict[str, Any]:
    from pst_timm.utils.markdown import plain

    auroc = measured.failure_auroc
    return {
        'model': plain(name, 30), f'cost ({unit})': f'{measured.cost:.4g}',
        'times cheaper': f'{dearest / measured.cost:.2f}', 'top-1 (%)': f'{measured.accuracy:.2f}',
        'calibration error (%)': f'{100 * measured.ece:.2f}',
        'failure AUROC': None if auroc is None else f'{auroc:.3f}'}


def _main_run(words: Sequence[str]) -> int:
    parser = ArgumentParser(
        prog='pst-timm cascade run', intermixed=True,
        description='Tell the most probable class of images, its probability, and which stage told it, as CSV.')
    parser.add_argument('cascade', type=Path, help='what `pst-timm cascade fit` wrote')
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='image, or folder with images')
    parser.add_argument('--device', default='', help='cpu, cuda, cuda:1, mps, ... (default: the best there is)')
    parser.add_argument('-b', '--batch-size', type=at_least(1), default=64, help='images at a time (default: 64)')
    parser.add_argument(
        '-j', '--workers', type=at_least(0), default=0,
        help='processes that read images, 0 for the one that computes (default: 0)')
    add_output(parser, '.csv file to write, instead of standard output')
    add_overwrite(parser)
    return run(parser.prog, _run, parser.parse_args(words))


def _run(args: argparse.Namespace) -> None:
    from timm.utils import setup_default_logging

    from pst_timm.deploy.cascade import Cascade
    from pst_timm.deploy.cascade_run import COLUMNS, run_cascade
    from pst_timm.utils.files import check_output, write_csv

    setup_default_logging(logging.WARNING)
    if args.output is not None:
        check_output(args.output, args.overwrite, [args.cascade, *args.images])
    cascade = Cascade.from_file(args.cascade)
    rows, summary = run_cascade(cascade, args.images, args.device, args.batch_size, args.workers)
    if args.output is not None:
        write_csv(args.output, rows, COLUMNS)
    else:
        writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    print(summary, file=sys.stderr)
