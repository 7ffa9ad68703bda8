"""What the commands share: how they end in an error, and the words that mean the same in all of them."""
import argparse
import sys

__all__ = ['CHECKPOINT_HELP', 'add_ema_flag', 'fail']

CHECKPOINT_HELP = 'training checkpoint, run folder, .safetensors file, or folder with config.json'


def fail(prog: str, error: Exception) -> int:
    """Print an error as one sentence; returns the exit code."""
    print(f'{prog}: error: {error}', file=sys.stderr)
    return getattr(error, 'exit_code', 1)


def add_ema_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--use-ema', action=argparse.BooleanOptionalAction,
        help='the moving average in a checkpoint, or the weights as trained (default: the average where there is one)')
    parser.add_argument('--no-ema', dest='use_ema', action='store_false', help=argparse.SUPPRESS)  # its old spelling
