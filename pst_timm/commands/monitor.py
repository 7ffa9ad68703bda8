"""`pst-timm monitor`: whether the images that a model meets are still those it was made for."""
import argparse
from pathlib import Path
from typing import Any, List, Optional, Sequence, Tuple

from pst_timm.utils.errors import PSTError

from .common import (
    ArgumentParser,
    add_overwrite,
    add_reading_flags,
    add_source,
    files_of,
    open_subject_of,
    run,
)

ALERT = 3  # exit code, so that a cron job can act
ACTIONS = {
    'fit': 'write what later images are compared with',
    'check': f'compare new images with it; exit code {ALERT} on an alert',
    'recalibrate': 'refit the temperature of a model on new labelled images',
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """`pst-timm monitor`; returns the exit code."""
    parser = ArgumentParser(
        prog='pst-timm monitor', formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Notice when the images that a model meets are no longer those it was made for.',
        epilog='\n'.join(f'  {name:13}{what}' for name, what in ACTIONS.items())
               + '\n\npst-timm monitor ACTION --help tells the flags of an action.')
    parser.add_argument('action', choices=[*ACTIONS], help='see below')
    parser.add_argument('words', nargs=argparse.REMAINDER, metavar='...', help='flags of the action')
    args = parser.parse_args(argv)
    if args.action == 'recalibrate':
        from . import recalibrate

        return recalibrate.main(args.words)
    return {'fit': _main_fit, 'check': _main_check}[args.action](args.words)


def _main_fit(words: Sequence[str]) -> int:
    parser = ArgumentParser(
        prog='pst-timm monitor fit', description=f'{_sentence("fit")} No image and no path is in the file.')
    add_source(parser)
    _add_data(parser, required=True)
    parser.add_argument(
        '-o', '--output', type=Path, default=Path('reference.safetensors'),
        help='file to write (default: %(default)s)')
    add_reading_flags(parser)
    add_overwrite(parser)
    return run(parser.prog, _fit, parser.parse_args(words))


def _main_check(words: Sequence[str]) -> int:
    parser = ArgumentParser(prog='pst-timm monitor check', description=_sentence('check'))
    parser.add_argument('reference', type=Path, help='what `pst-timm monitor fit` wrote')
    add_source(parser, nargs='?')
    _add_data(parser)
    parser.add_argument(
        '--answers', type=Path, metavar='FILE',
        help='instead of model and images: .csv file with the columns confidence, predicted and maybe label')
    parser.add_argument(
        '--alpha', type=_rate, default=0.01,
        help='chance of an alert, over all tests, where nothing has moved (default: %(default)s)')
    parser.add_argument(
        '-o', '--output', type=Path, action='append', default=[], metavar='FILE',
        help='.json or .html file to write; may be given twice')
    add_reading_flags(parser)
    add_overwrite(parser)
    args = parser.parse_args(words)
    if (args.answers is None) == (args.data_dir is None):
        parser.error('name the new images with --data-dir, or a file with --answers')
    if args.answers is not None and args.source is not None:
        parser.error('with --answers no model is needed: leave it out')
    if args.data_dir is not None and args.source is None:
        parser.error('name the model after the reference, as in `monitor check reference.safetensors MODEL`')
    if args.answers is not None and args.labels is not None:
        parser.error('--labels and --no-labels are for --data-dir: a file of answers has a column label, or none')
    return run(parser.prog, _check, args)


def _sentence(action: str) -> str:
    return f'{ACTIONS[action][:1].upper()}{ACTIONS[action][1:]}.'


def _add_data(parser: argparse.ArgumentParser, required: bool = False) -> None:
    parser.add_argument('--data-dir', type=Path, required=required, help='images, in class folders or loose')
    parser.add_argument(
        '--split', default='validation', help='folder below --data-dir, where there is one (default: %(default)s)')
    parser.add_argument(
        '--labels', action=argparse.BooleanOptionalAction, default=None,
        help='whether the folders are the true classes (default: where all are called as classes of the model)')


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.
    if not 1e-4 <= rate <= 0.5:
        raise argparse.ArgumentTypeError(f'expected a number from 0.0001 to 0.5, got {text!r}')
    return rate


def _fit(args: argparse.Namespace) -> None:
    from timm.utils import setup_default_logging

    from pst_timm.review.answers import Outputs, answers
    from pst_timm.review.monitor import FEW, fit, open_images, write_reference
    from pst_timm.utils.files import check_output

    setup_default_logging()
    if args.output.suffix != '.safetensors':
        raise PSTError(f'{args.output} must be called .safetensors.')
    check_output(args.output, args.overwrite, [args.data_dir, *files_of(args.source)])
    subject = open_subject_of(args, args.source)
    samples = open_images(subject, args.data_dir, args.split, args.labels)
    outputs = Outputs.gather(answers(subject, samples, args.batch_size, args.workers))
    reference = fit(subject, outputs, samples.class_names)
    write_reference(args.output, reference)
    summary = reference.summary
    print(f'Written: {args.output} ({args.output.stat().st_size / 2 ** 10:.0f} KiB, {summary.images} images).')
    if reference.accuracy is None:
        print('No labels: accuracy will neither be estimated nor compared (with --labels, the folders must be the '
              'classes of the model).')
    else:
        print(f'Accuracy {100 * reference.accuracy:.1f}%, calibration error {reference.ece:.3f}, temperature '
              f'{reference.temperature:.3f}.')
    if summary.images < 10 * FEW:
        print(f'{summary.images} images are few for a reference: what is compared with them moves more by chance.')


def _check(args: argparse.Namespace) -> int:
    from timm.utils import setup_default_logging

    from pst_timm.review.monitor import check, read_reference
    from pst_timm.review.page import check_plots, render
    from pst_timm.utils.files import check_output, write_json, write_text
    from pst_timm.utils.markdown import plain

    setup_default_logging()
    read = [args.reference, *filter(None, [args.data_dir, args.answers])]
    for path in args.output:
        if path.suffix not in ('.json', '.html'):
            raise PSTError(f'{path} must be called .json or .html.')
        check_output(path, args.overwrite, [*read, *(files_of(args.source) if args.source else [])])
    if any(path.suffix == '.html' for path in args.output):
        check_plots()
    reference = read_reference(args.reference)
    batch, logits, broken = _new_images(args, reference)
    report = check(reference, batch, args.alpha, logits)
    report.notes += [f'{broken} image(s) could not be read, and were left out.'] if broken else []
    for path in args.output:
        if path.suffix == '.json':
            write_json(path, report.as_json())
        else:
            write_text(path, render(report, reference, batch))
    _tell(report)
    for note in report.notes:
        print(plain(note, 500))
    for path in args.output:
        print(f'Written: {path}')
    return ALERT if report.alert else 0


def _new_images(args: argparse.Namespace, reference: Any) -> Tuple[Any, Any, int]:
    """Answers to the new images, logits where they are known, and how many images could not be read."""
    from pst_timm.review.answers import Outputs, answers
    from pst_timm.review.monitor import batch_of, check_subject, open_images, read_answers

    if args.answers is not None:
        return read_answers(args.answers, reference.class_names), None, 0
    subject = check_subject(reference, open_subject_of(args, args.source))
    samples = open_images(subject, args.data_dir, args.split, args.labels)
    outputs = Outputs.gather(answers(subject, samples, args.batch_size, args.workers))
    return batch_of(outputs), outputs.logits, len(outputs.broken)


def _tell(report: Any) -> None:
    from pst_timm.utils.tables import format_table

    print(format_table([
        {'test': result.name, 'method': result.method, 'statistic': f'{result.statistic:.4g}', 'p': f'{result.p:.4g}',
         'corrected': f'{result.corrected:.4g}', 'alert': 'ALERT' if result.alert else ''}
        for result in report.tests]))
    told: List[str] = []
    accuracy, calibration = report.accuracy, report.calibration
    if accuracy['reference'] is not None:
        told.append(f'reference {100 * accuracy["reference"]:.1f}%')
    if accuracy['estimated'] is not None:
        told.append(f'estimated without labels {100 * accuracy["estimated"]:.1f}%')
    if accuracy['measured'] is not None:
        low, high = accuracy['interval']
        told.append(f'measured {100 * accuracy["measured"]:.1f}% (95% interval {100 * low:.1f} to {100 * high:.1f})')
    if told:
        print(f'Accuracy: {", ".join(told)}.')
    if calibration['ece'] is not None:
        fresh = calibration['temperature']
        print(f'Calibration error {calibration["ece"]:.3f}' + (
            f', fresh temperature {fresh:.3f}' if fresh is not None else '') + '.')
    moved = [result.name for result in report.tests if result.alert]
    print(f'ALERT: {", ".join(moved)} moved.' if moved else (
        f'No alert among {report.images} images, at a false-alarm rate of {report.alpha:g} or less.'))
