"""`pst-timm convert`: training checkpoint to safetensors and back."""
import argparse
import logging
from typing import Optional, Sequence

from .common import DTYPES, ArgumentParser, add_ema_flag, add_overwrite, add_source, run


def main(argv: Optional[Sequence[str]] = None) -> int:
    """`pst-timm convert`; returns the exit code."""
    parser = ArgumentParser(
        prog='pst-timm convert',
        description='Write the weights of a checkpoint as .safetensors, or back as a training checkpoint.')
    add_source(parser, names=False)
    parser.add_argument('target', help='file to write: .safetensors or .pth.tar')
    parser.add_argument('--dtype', choices=DTYPES, default='float32', help='precision (default: %(default)s)')
    parser.add_argument('--model', help='architecture of a file that does not tell it')
    add_ema_flag(parser)
    add_overwrite(parser)
    return run(parser.prog, _convert, parser.parse_args(argv))


def _convert(args: argparse.Namespace) -> None:
    from timm.utils import setup_default_logging

    from pst_timm.checkpoints import convert

    setup_default_logging(logging.WARNING)
    done = convert(args.source, args.target, args.dtype, args.use_ema, args.model, args.overwrite)
    print(f'Written: {done.path} ({done.path.stat().st_size / 2 ** 20:.1f} MiB, {args.dtype}, '
          f'{"moving average (EMA)" if done.ema else "no EMA"}).')
    print(f'Logits differ from the source by {done.difference:.1e} of the largest one, top-1 agrees for '
          f'{done.agreement:.0%} of a few random images.')
