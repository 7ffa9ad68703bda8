"""Measure what the necks of a detector cost: PST pyramids in turn with FPN and PAN, over several trunks and sizes.

    python -m scripts.measure_necks --output results/detection

On one thread, whose processor time is counted: what else a shared machine does then hardly shows. Weights are random;
norms are folded into the convolutions, as for deployment. `--quick` is for a look.
"""
import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence, Tuple

import torch

from pst_timm.benchmark import Setting, benchmark_necks
from pst_timm.utils.files import write_csv, write_json
from pst_timm.utils.tables import format_table

__all__ = ['TRUNKS', 'main']

TRUNKS = ('resnet18:128', 'resnet50:256', 'mobilenetv4_conv_small:128', 'convnext_atto:128')


def _trunk(text: str) -> Tuple[str, int]:
    name, _, width = text.partition(':')
    return name, int(width or 128)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Print the table, and write it with how it was measured."""
    parser = argparse.ArgumentParser(
        prog='python -m scripts.measure_necks', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--trunks', nargs='+', type=_trunk, default=[_trunk(t) for t in TRUNKS], metavar='NAME:WIDTH')
    parser.add_argument('--sizes', nargs='+', type=int, default=[320, 640], metavar='PX')
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--quick', action='store_true', help='one trunk, small images, three rounds')
    parser.add_argument('--output', type=Path, help='folder for cost.csv and cost.json')
    args = parser.parse_args(argv)
    if args.quick:
        args.trunks, args.sizes, args.rounds = args.trunks[:1], [128], 3
    torch.set_num_threads(1)
    setting = Setting(batch_size=1, img_size=0, reparam=True, repeats=args.rounds)
    rows = benchmark_necks(args.trunks, args.sizes, setting)
    described = f'{setting.describe()}; processor time'
    print(described)
    print(format_table(rows, decimals=3))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        write_csv(args.output / 'cost.csv', rows)
        write_json(args.output / 'cost.json', {'setting': described})
    return 0


if __name__ == '__main__':
    sys.exit(main())
