"""`pst-timm export`: a model written for deployment."""
import argparse
import os
import sys
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import torch

from pst_timm.checkpoints.building import attention_settings, load_model
from pst_timm.deploy.export import FORMATS, TOLERANCE, check_export, export
from pst_timm.utils.files import read_class_names


def main(argv: Optional[Sequence[str]] = None) -> int:
    """`pst-timm export`; returns the exit code."""
    parser = argparse.ArgumentParser(prog='pst-timm export', description='Write a model for deployment.')
    parser.add_argument('source', help='model name, hf-hub:org/name, folder with config.json, or training checkpoint')
    parser.add_argument('--format', choices=tuple(FORMATS), default='onnx')
    parser.add_argument('--output', type=Path, help='file to write (default: the source\'s name)')
    parser.add_argument('--pretrained', action='store_true', help='published weights of a model name')
    parser.add_argument('--num-classes', type=int, help='classes of a model name')
    parser.add_argument('--dynamic', action='store_true', help='any batch size, height and width')
    parser.add_argument('--dtype', choices=('float32', 'float16', 'bfloat16'), default='float32')
    parser.add_argument('--topk', type=int, help='selected coarse tokens (default: as the source has it)')
    parser.add_argument('--fine-fusion', choices=('gate', 'joint'))
    parser.add_argument('--img-size', type=int, help='height and width (default: the model\'s)')
    parser.add_argument('--class-names', type=Path, help='text file, one name a line')
    parser.add_argument('--no-reparam', action='store_true', help='keep batch norms and concatenations')
    parser.add_argument('--check', action='store_true', help='run the result beside the eager model')
    parser.add_argument('--images', nargs='+', default=[], help='photographs to check with (default: noise)')
    args = parser.parse_args(argv)
    kwargs: Dict[str, Any] = {'pretrained': True} if args.pretrained else {}
    if args.num_classes is not None:
        kwargs['num_classes'] = args.num_classes
    missing = [p for p in args.images if not os.path.isfile(p)]
    if missing:
        parser.error(f'no image at {missing[0]}')
    if args.img_size is not None and args.img_size < 1:
        parser.error(f'--img-size must be at least 1, got {args.img_size}')
    path = args.output or Path(Path(args.source.split(':')[-1]).name.split('.')[0] + FORMATS[args.format])
    try:
        model = load_model(args.source, **kwargs)
        if args.topk is not None or args.fine_fusion is not None:
            if not hasattr(model, 'set_topk'):
                raise ValueError(f'{args.source} has no sparse attention to set --topk or --fine-fusion on.')
            topk = args.topk if args.topk is not None else attention_settings(model)['topk']
            model.set_topk(topk, args.fine_fusion)
        names = read_class_names(args.class_names)
        exported = export(
            model, path, args.format, args.dynamic, getattr(torch, args.dtype), args.img_size, not args.no_reparam,
            names)
        print(f'Written: {path} ({path.stat().st_size / 2 ** 20:.1f} MiB)')
        if not args.check:
            return 0
        rows = check_export(exported, path, args.format, args.dynamic, args.img_size, args.images)
    except (ValueError, RuntimeError, AssertionError, OSError, ImportError) as e:
        print(f'pst-timm export: error: {e}', file=sys.stderr)
        return 1
    return 0 if _report(rows, args.dtype) else 1


def _report(rows: Sequence[Dict[str, Any]], dtype: str) -> bool:
    """Print the rows of `check_export`; returns whether all differences are small enough."""
    for row in rows:
        print(f'{row["shape"]:>16}  difference to eager {row["difference"]:.1e}')
    # max would pass over a nan
    worst = torch.tensor([row['difference'] for row in rows]).max().item()
    # half precision carries three digits
    limit = TOLERANCE if dtype == 'float32' else 5e-2
    print(f'largest difference {worst:.1e}, relative to the largest logit; allowed {limit:.0e}')
    return worst <= limit
