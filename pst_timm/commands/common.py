"""What the commands share: how they parse, how they end, and the flags that mean the same in all of them."""
import argparse
import math
import os
import re
import signal
import sys
import tempfile
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, List, Optional, Sequence, Tuple

from pst_timm.utils.errors import PSTError
from pst_timm.utils.markdown import plain
from pst_timm.utils.parsing import ArgumentParser
from pst_timm.utils.streams import flush_output, forgive_letters

if TYPE_CHECKING:
    from pst_timm.review.answers import Subject

__all__ = [
    'CHECKPOINT_HELP',
    'DTYPES',
    'FINE_FUSIONS',
    'IMPORTANCES',
    'INTERRUPTED',
    'SOURCE_HELP',
    'ArgumentParser',
    'add_attention_flags',
    'add_ema_flag',
    'add_load_flags',
    'add_output',
    'add_overwrite',
    'add_reading_flags',
    'add_round_to',
    'add_source',
    'at_least',
    'fail',
    'files_of',
    'not_negative',
    'open_subject_of',
    'plain_export_errors',
    'points',
    'positive',
    'run',
    'share',
    'split_words',
]

CHECKPOINT_HELP = 'training checkpoint, run folder, .safetensors file, or folder with config.json'
SOURCE_HELP = f'model name, hf-hub:org/name, {CHECKPOINT_HELP}'
INTERRUPTED = 130  # what shells say of a command that Ctrl-C ended
PIPE_CLOSED = 141  # and of one whose reader has gone, as in `| head`
# also in rooms that need torch, which a parser does not wait for
DTYPES = ('float32', 'float16', 'bfloat16')
FINE_FUSIONS = ('gate', 'joint')
IMPORTANCES = ('l2', 'bn', 'taylor')


def run(prog: str, work: Callable[..., Optional[int]], *args: Any) -> int:
    """Do the work of a command, and end as all commands do.

    Args:
        prog: How the command is called, for messages.
        work: The work; returns an exit code, None if all is well.
        args: What it is called with.

    Returns:
        The exit code: that of the work, of its `PSTError`, or 130 after Ctrl-C. Either is told in one sentence, and so
        is any other exception, unless PST_TIMM_DEBUG is set: then it is left to Python.
    """
    forgive_letters()
    try:
        import pst_timm.models  # noqa: F401  (registers them; the help of a command does not wait for it)

        code = work(*args) or 0
        return code if flush_output() else PIPE_CLOSED
    except PSTError as e:
        return fail(prog, e)
    except KeyboardInterrupt:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends the process as it winds up, in silence
        print(f'\n{prog}: stopped before the end.', file=sys.stderr)
        return INTERRUPTED
    except Exception as e:
        if isinstance(e, BrokenPipeError) and not flush_output():
            return PIPE_CLOSED
        if os.environ.get('PST_TIMM_DEBUG'):
            raise
        return _unexpected(prog, e)


def _unexpected(prog: str, error: Exception) -> int:
    """Tell of an exception that nobody foresaw in one sentence, with the traceback in a file; returns the exit code."""
    first = (str(error).strip().splitlines() or [''])[0]
    where = 'PST_TIMM_DEBUG=1 shows the traceback'
    try:
        handle, log = tempfile.mkstemp(prefix='pst-timm-', suffix='.log')
        with open(handle, 'w', encoding='utf-8', errors='backslashreplace') as file:
            file.write(''.join(traceback.format_exception(error)))
        where = f'the traceback is in {log}'
    except OSError:  # no folder for temporary files, or a full one
        pass
    return fail(prog, PSTError(
        f'{prog} ended with an unexpected {type(error).__name__}{f" ({first})" if first else ""}: {where}. '
        f'Please report it with that, and the command.'))


def fail(prog: str, error: Exception) -> int:
    """Print an error; returns the exit code."""
    # a name in a file must not move the cursor
    told = re.sub(r'[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]', '?', str(error))
    print(f'{prog}: error: {told}', file=sys.stderr)
    return getattr(error, 'exit_code', 1)


def run_parsed(
        prog: str,
        parse: Callable[[Optional[Sequence[str]], str], argparse.Namespace],
        argv: Optional[Sequence[str]],
        work: Callable[[argparse.Namespace], Optional[int]],
) -> int:
    """Run a command whose parser raises a PSTError; returns the exit code.

    Args:
        prog: Name of the command.
        parse: From its words and its name to its arguments.
        argv: The words, `sys.argv` if None.
        work: What it does with the arguments.
    """
    try:
        args = parse(argv, prog)
    except PSTError as e:
        return fail(prog, e)
    return run(prog, work, args)


@contextmanager
def plain_export_errors() -> Iterator[None]:
    """Turn what the exporters of torch, ONNX Runtime and OpenVINO raise into one sentence.

    Raises:
        PSTError: If the work within raises any of it.
    """
    try:
        yield
    except PSTError:  # a ValueError too, with an exit code of its own
        raise
    except (ValueError, RuntimeError, AssertionError, OSError, ImportError) as e:
        raise PSTError(plain(e, 500)) from e


def split_words(argv: Optional[Sequence[str]]) -> Tuple[List[str], List[str]]:
    """The words of a command (`sys.argv` if None) before the first `--`, and those of another command after it."""
    words = list(sys.argv[1:] if argv is None else argv)
    at = words.index('--') if '--' in words else len(words)
    return words[:at], words[at + 1:]


def at_least(least: int) -> Callable[[str], int]:
    """The `type` of a flag that takes whole numbers from `least` on."""
    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f'expected a whole number of at least {least}, got {text!r}')
        return number
    return convert


def positive(text: str) -> float:
    """The `type` of a flag that takes finite numbers above zero."""
    try:
        number = float(text)
    except ValueError:
        number = 0.
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f'expected a number above 0, got {text!r}')
    return number


def share(text: str) -> float:
    """The `type` of a flag that takes numbers between zero and one, without these."""
    number = positive(text)
    if number >= 1:
        raise argparse.ArgumentTypeError(f'expected a number between 0 and 1, got {text!r}')
    return number


def not_negative(text: str) -> float:
    """The `type` of a flag that takes finite numbers from zero on."""
    try:
        number = float(text)
    except ValueError:
        number = -1.
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f'expected a number from 0 on, got {text!r}')
    return number


def points(text: str) -> float:
    """The `type` of a flag that takes percentage points, from 0 to 100."""
    try:
        number = not_negative(text)
    except argparse.ArgumentTypeError:
        number = math.inf
    if number > 100:
        raise argparse.ArgumentTypeError(f'expected percentage points from 0 to 100, got {text!r}')
    return number


def add_source(parser: argparse.ArgumentParser, name: str = 'source', names: bool = True, **kwargs: Any) -> None:
    """Add what a model is taken from.

    Args:
        parser: The parser.
        name: 'source', or a flag such as '--checkpoint'.
        names: Whether names of models will do as well as files and folders.
        kwargs: For `add_argument`.
    """
    parser.add_argument(name, **{'help': SOURCE_HELP if names else CHECKPOINT_HELP, **kwargs})


def add_ema_flag(parser: argparse.ArgumentParser) -> None:
    """Add --use-ema and --no-use-ema as `use_ema`, None where neither is given."""
    parser.add_argument(
        '--use-ema', action=argparse.BooleanOptionalAction, default=None,
        help='the moving average (EMA) of the weights, or those as trained (default: the average if there is one)')
    parser.add_argument('--no-ema', dest='use_ema', action='store_false', default=None, help=argparse.SUPPRESS)


def add_load_flags(parser: argparse.ArgumentParser) -> None:
    """Add --pretrained and --model: what a name or a bare file of weights leaves open."""
    parser.add_argument(
        '--pretrained', action=argparse.BooleanOptionalAction,
        help='published weights of a model name, or random ones (default: published where there are any)')
    parser.add_argument('--model', help='architecture of a file that does not tell it')


def add_attention_flags(
        parser: argparse.ArgumentParser,
        topk: Optional[int] = None,
        default: str = "the model's",
        **kwargs: Any,
) -> None:
    """Add --topk and --fine-fusion as `topk` and `fine_fusion`.

    Args:
        parser: The parser.
        topk: The number of tokens where the flag is not given, None for that of the model.
        default: What the help says of it, where it is None.
        kwargs: For `add_argument`.
    """
    parser.add_argument(
        '--topk', type=at_least(0), default=topk, metavar='K',
        help=f'coarse tokens that each head selects, 0 for none (default: {default if topk is None else topk})',
        **kwargs)
    parser.add_argument(
        '--fine-fusion', '--fusion', choices=FINE_FUSIONS, help="how fine attention is added (default: the model's)",
        **kwargs)


def add_output(parser: argparse.ArgumentParser, what: str = 'file to write', **kwargs: Any) -> None:
    """Add -o and --output, a path."""
    parser.add_argument('-o', '--output', type=Path, help=what, **kwargs)


def add_overwrite(parser: argparse.ArgumentParser, what: str = 'a file') -> None:
    """Add --overwrite."""
    parser.add_argument(
        '--overwrite', action='store_true', help=f'replace {what} that is there already (default: refuse to)')


def add_round_to(parser: argparse.ArgumentParser) -> None:
    """Add --round-to, of the widths of a pruned model."""
    parser.add_argument(
        '--round-to', type=at_least(1), default=16, metavar='N',
        help='widths become multiples of this (default: %(default)s)')


def add_reading_flags(parser: argparse.ArgumentParser) -> None:
    """Add what says how a model answers to images: which weights, attention, size, device and batches."""
    add_ema_flag(parser)
    add_attention_flags(parser)
    parser.add_argument('--img-size', type=at_least(32), help="height and width (default: the model's)")
    parser.add_argument('--device', default='', help='cpu, cuda, cuda:1, mps, ... (default: the best there is)')
    parser.add_argument('-b', '--batch-size', type=at_least(1), default=64, help='images at a time (default: 64)')
    parser.add_argument(
        '-j', '--workers', type=at_least(0), default=0,
        help='processes that read images, 0 for the one that computes (default: 0)')


def open_subject_of(args: argparse.Namespace, source: str) -> 'Subject':
    """The model that is to answer, as the flags of `add_reading_flags` say; errors as in `open_subject`."""
    from pst_timm.review.answers import open_subject

    return open_subject(
        source, use_ema=args.use_ema, topk=args.topk, fine_fusion=args.fine_fusion, img_size=args.img_size,
        device=args.device)


def files_of(source: str) -> List[Path]:
    """The files that a source of a model may be read from: what must not be written over."""
    from pst_timm.checkpoints.reading import PREFERRED

    path = Path(source.removeprefix('local-dir:'))
    return [path, *(path / name for name in (*PREFERRED, 'model.safetensors', 'config.json'))]
