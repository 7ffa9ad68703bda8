"""Count what PST adds to each trunk: parameters and multiply-adds of the models of the zoo and of some others.

    python -m scripts.measure_trunks

Nothing is run but shapes, so that the counts are the same on every machine.
"""
import argparse
import sys
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import timm
import torch

import pst_timm
from pst_timm.utils.cost import count_gmacs
from pst_timm.utils.files import write_csv, write_json

__all__ = ['OTHERS', 'SETTING', 'main', 'trunk_row']

ZOO = timm.list_models('*_pst', exclude_filters=['backbone_pst', 'test_*'])
OTHERS = (
    'mobilenetv3_small_100', 'ghostnet_100', 'densenet121', 'repvgg_a0', 'mobileone_s0', 'regnetx_002',
    'edgenext_xx_small', 'fastvit_t8', 'efficientvit_b0', 'resnest14d', 'dla34', 'hardcorenas_a', 'mobilevit_xxs',
    'convnextv2_atto', 'poolformer_s12', 'pvt_v2_b0', 'swin_tiny_patch4_window7_224',
)
SETTING = '1000 classes, coarse attention, multiply-adds of convolutions and matrix products for one image'


def trunk_row(trunk: str) -> Dict[str, Any]:
    """What a plain model and the model with PST over it take.

    Args:
        trunk: Name of the plain model.
    """
    with torch.device('meta'):
        plain, model = timm.create_model(trunk), pst_timm.create_pst(trunk)
    size = plain.pretrained_cfg['input_size']
    gmacs = [count_gmacs(m, size) for m in (plain, model)]
    parameters = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (plain, model)]
    return {
        'trunk': trunk,
        'px': size[-1],
        'width': model.pst.out_chs,
        'M parameters': f'{parameters[0]:.3f}',
        'with PST': f'{parameters[1]:.3f}',
        'GMACs': f'{gmacs[0]:.3f}',
        'GMACs with PST': f'{gmacs[1]:.3f}',
        'added': f'{gmacs[1] / gmacs[0] - 1:+.1%}',
    }


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Write `zoo.csv` and `others.csv`; returns the exit code."""
    parser = argparse.ArgumentParser(prog='python -m scripts.measure_trunks', description=__doc__.split('\n')[0])
    parser.add_argument('--output', type=Path, default=Path('results/trunks'), help='folder to write')
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, trunks in (('zoo', [name.removesuffix('_pst') for name in ZOO]), ('others', OTHERS)):
        rows = sorted((trunk_row(trunk) for trunk in trunks), key=lambda row: float(row['GMACs']))
        write_csv(args.output / f'{name}.csv', rows)
        write_json(args.output / f'{name}.json', {'setting': SETTING})
    return 0


if __name__ == '__main__':
    sys.exit(main())
