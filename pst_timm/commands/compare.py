"""`pst-timm compare`: whether a new model may replace an old one."""
import argparse
import logging
from typing import TYPE_CHECKING, Optional, Sequence

from .common import (
    ArgumentParser,
    add_output,
    add_overwrite,
    add_reading_flags,
    add_source,
    at_least,
    files_of,
    open_subject_of,
    points,
    positive,
    run,
)

if TYPE_CHECKING:
    from pst_timm.review.compare import Comparison

WORSE = 3  # the exit code
SHOWN = 10  # classes


def main(argv: Optional[Sequence[str]] = None) -> int:
    """`pst-timm compare`; returns the exit code, 3 if the new model is worse."""
    parser = ArgumentParser(
        prog='pst-timm compare',
        description='Compare two models on the same labelled images, image by image. '
                    'Exit code 3: the new one is worse.')
    add_source(parser, 'old', metavar='OLD')
    add_source(parser, 'new', metavar='NEW')
    parser.add_argument('--data-dir', required=True, metavar='DIR', help='labelled images: a folder of class folders')
    parser.add_argument('--split', default='validation', help='split of the data (default: %(default)s)')
    parser.add_argument(
        '--tolerance', type=points, metavar='POINTS',
        help='loss of accuracy that is accepted, in percentage points (default: what chance may bring)')
    parser.add_argument(
        '--per-class', action=argparse.BooleanOptionalAction, default=True,
        help='whether losses of single classes count (default: yes)')
    parser.add_argument(
        '--max-latency-ratio', type=positive, metavar='R', help='most time of an image, as a multiple of the old one')
    parser.add_argument(
        '--repeats', type=at_least(0), default=30, help='timed rounds, 0 for none (default: %(default)s)')
    add_output(parser, '.json file with everything, or .csv file with the images whose answers have changed')
    add_overwrite(parser)
    add_reading_flags(parser)
    args = parser.parse_args(argv)
    if args.output is not None and args.output.suffix not in ('.json', '.csv'):
        parser.error(f'--output {args.output} must end with .json or .csv')
    if args.max_latency_ratio is not None and not args.repeats:
        parser.error('--max-latency-ratio needs times: leave out --repeats 0')
    return run(parser.prog, _compare, args)


def _compare(args: argparse.Namespace) -> int:
    from timm.utils import setup_default_logging

    from pst_timm.review.compare import Flip, compare, judge, report, verdict
    from pst_timm.utils.files import check_output, write_csv, write_json

    setup_default_logging(logging.WARNING)
    if args.output is not None:
        check_output(args.output, args.overwrite, [*files_of(args.old), *files_of(args.new)])
    old, new = (open_subject_of(args, source) for source in (args.old, args.new))
    found = compare(old, new, args.data_dir, args.split, args.repeats, args.batch_size, args.workers)
    reasons = judge(found, args.tolerance, args.per_class, args.max_latency_ratio)
    print(_shown(found))
    print(f'\n{verdict(found, reasons)}')
    if args.output is not None:
        if args.output.suffix == '.json':
            write_json(args.output, report(found, reasons))
        else:
            write_csv(args.output, [flip._asdict() for flip in found.flips], Flip._fields)
        print(f'Written: {args.output}')
    return WORSE if reasons else 0


def _shown(found: 'Comparison') -> str:
    """A comparison for people."""
    from pst_timm.utils.markdown import plain
    from pst_timm.utils.tables import format_table

    old, new = found.old, found.new
    rows = [
        {'': 'model', 'old': plain(old.model, 30), 'new': plain(new.model, 30)},
        {'': 'image size', **{k: 'x'.join(map(str, side.img_size)) for k, side in (('old', old), ('new', new))}},
        {'': 'accuracy (%)', 'old': f'{old.accuracy:.2f}', 'new': f'{new.accuracy:.2f}',
         'change': f'{found.difference:+.2f}'},
        {'': 'loss', 'old': f'{old.loss:.4f}', 'new': f'{new.loss:.4f}', 'change': f'{new.loss - old.loss:+.4f}'},
        {'': 'calibration error (%)', 'old': f'{old.ece:.2f}', 'new': f'{new.ece:.2f}',
         'change': f'{new.ece - old.ece:+.2f}'},
    ]
    if found.latency_ratio is not None:
        rows.append({'': 'time of an image (ms)', 'old': f'{old.latency_ms:.2f}', 'new': f'{new.latency_ms:.2f}',
                     'change': f'x {found.latency_ratio:.2f}'})
    rows += [
        {'': 'parameters (million)', 'old': f'{old.parameters / 1e6:.2f}', 'new': f'{new.parameters / 1e6:.2f}',
         'change': f'x {new.parameters / max(old.parameters, 1):.2f}'},
        {'': 'weights (MiB)', 'old': f'{old.weights_mib:.1f}', 'new': f'{new.weights_mib:.1f}',
         'change': f'x {new.weights_mib / max(old.weights_mib, 1e-9):.2f}'},
    ]
    low, high = found.interval
    other = len(found.flips) - found.lost - found.gained
    lines = [
        f'{found.images:,} images of {found.classes} class{"" if found.classes == 1 else "es"}\n',
        format_table(rows),
        f'\nOther images may bring a change of accuracy from {low:+.2f} to {high:+.2f} points (95%).',
        f'Answers: {found.lost} from right to wrong (negative flip rate {found.negative_flip_rate:.2f}%), '
        f'{found.gained} from wrong to right, {other} wrong in another way.',
        f'Exact McNemar test: p = {found.test.different:.2g}; that the new one is worse: p = {found.test.worse:.2g}.',
    ]
    if found.fallen:
        lines += [f'\nClasses with fewer right answers ({len(found.fallen)} of {found.classes}), p by Holm over all:\n']
        lines.append(format_table([
            {'class': plain(c.name, 30), 'images': c.images, 'old': c.old, 'new': c.new, 'lost': c.lost,
             'gained': c.gained, 'p': f'{c.p:.2g}'} for c in found.fallen[:SHOWN]]))
        if len(found.fallen) > SHOWN:
            lines.append(f'... and {len(found.fallen) - SHOWN} more (--output has them all)')
    return '\n'.join(lines)
