"""`pst-timm benchmark`: models in turn with their plain twins, the attention alone, time by part."""
import argparse
import csv
import sys
from dataclasses import replace
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import timm
import torch

from pst_timm.benchmark.models import (
    UNREAD,
    Row,
    Setting,
    benchmark_figures,
    benchmark_layers,
    benchmark_models,
    benchmark_parts,
    plain_twin,
    plot,
)
from pst_timm.utils.errors import did_you_mean
from pst_timm.utils.files import write_csv, write_json
from pst_timm.utils.tables import format_table


def _read_accuracy(path: str) -> Dict[str, float]:
    with open(path, newline='') as f:
        return {row['model']: float(row['top1']) for row in csv.DictReader(f)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='pst-timm benchmark',
        description='Measure models in turn with their plain ResNet twins. Without models: the headline figures.')
    parser.add_argument('models', nargs='*', default=[], help='PST models, for example resnet50_pst')
    parser.add_argument('--baselines', nargs='+', help='one for each model (default: its plain ResNet)')
    parser.add_argument('--layers', action='store_true', help='measure the attention alone against the plain formula')
    parser.add_argument('--parts', action='store_true', help='show where the time of the models goes')
    parser.add_argument('--sizes', type=int, nargs='+', default=[14, 40, 80, 160], help='fine maps of --layers')
    parser.add_argument('--device', help='cpu, cuda, ... (default: the best present)')
    parser.add_argument('-b', '--batch-size', type=int, help='images (default: 8; 2 with --layers)')
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('--dtype', choices=('float32', 'bfloat16', 'float16'), default='float32')
    parser.add_argument('--topk', type=int, help='selected tokens (default: 0; 0 and 8 with --layers)')
    parser.add_argument('--fine-fusion', choices=('gate', 'joint'), default='gate')
    parser.add_argument('--reparam', action='store_true', help='fold with pst_timm.reparameterize')
    parser.add_argument('--compile', action='store_true', help='torch.compile both sides')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--train', action='store_true', help='time a training step')
    parser.add_argument('--repeats', type=int, default=20, help='timed rounds')
    parser.add_argument('--results-file', help='CSV with columns model and top1, as validate.py writes it')
    parser.add_argument('--output', type=Path, help='folder for CSV, JSON and PNG')
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """`pst-timm benchmark`; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    for name in (*args.models, *(args.baselines or ())):
        if not timm.is_model(name):
            parser.error(f'unknown model {name!r}.{did_you_mean(name, timm.list_models())}')
    if args.baselines and len(args.baselines) != len(args.models):
        parser.error(f'{len(args.models)} models but {len(args.baselines)} --baselines; give one for each')
    if any(s < 2 or s % 2 for s in args.sizes):
        parser.error(f'--sizes must be even and at least 2, got {args.sizes}')
    if args.parts and not args.models:
        parser.error('--parts needs the models to take apart')
    if args.reparam and args.train:
        parser.error('--reparam folds batch norms away, which --train needs')
    if min(args.repeats, args.img_size) < 1 or (args.batch_size is not None and args.batch_size < 1):
        parser.error('--repeats, --batch-size and --img-size must be at least 1')
    if args.topk is not None and args.topk < 0:
        parser.error(f'--topk must not be negative, got {args.topk}')
    kind = 'layers' if args.layers else 'parts' if args.parts else 'models' if args.models else 'figures'
    unread = [f for f in UNREAD[kind] if getattr(args, f) != parser.get_default(f)]
    if unread:
        parser.error(f'{unread[0].replace("_", "-")} has no say in the benchmark of {kind}')
    try:
        best = torch.accelerator.current_accelerator(check_available=True) or 'cpu'
        device = torch.empty(0, device=args.device or best).device
        if device.type == 'cuda':
            torch.cuda.set_device(device)  # the timer waits for the current one
        accuracy = _read_accuracy(args.results_file) if args.results_file else None
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, AssertionError) as e:
        parser.error(f'--device {args.device} cannot be used here: {str(e).splitlines()[0]}')
    except (KeyError, ValueError) as e:
        parser.error(f'{args.results_file} must have the columns model and top1, a number: {e!r}')
    except OSError as e:
        parser.error(str(e))
    setting = Setting(
        device=device,
        batch_size=args.batch_size or (2 if args.layers else 8),
        img_size=0 if args.layers else args.img_size,
        dtype=getattr(torch, args.dtype),
        reparam=args.reparam,
        compile=args.compile,
        channels_last=args.channels_last,
        train=args.train,
        topk=args.topk or 0,
        fine_fusion=args.fine_fusion,
        repeats=args.repeats,
    )
    if args.layers:
        topks = [args.topk] if args.topk is not None else [0, 8]
        settings = [(k, fusion) for k in topks for fusion in (('gate', 'joint') if k else ('gate',))]
        rows, name = benchmark_layers(args.sizes, settings, setting=setting), 'layers'
    elif args.parts:
        rows = [dict(model=m, **row) for m in args.models for row in benchmark_parts(m, setting)]
        name = 'parts'
    elif args.models:
        try:
            pairs = list(zip(args.models, args.baselines or [plain_twin(m) for m in args.models]))
        except ValueError as e:
            parser.error(str(e))
        rows, name = benchmark_models(pairs, setting, accuracy), 'benchmark'
    else:
        rows, name = benchmark_figures(setting), 'figures'
        setting = replace(setting, reparam=True, channels_last=True)
    print(setting.describe())
    print(format_table(_rounded(rows)))
    if args.output:
        _write(rows, setting, args.output, name)
        if name == 'benchmark':
            try:
                plot(rows, args.output / 'benchmark.png')
            except ImportError as e:
                print(f"No picture, {e}: pip install 'pst_timm[train]' brings what draws it.", file=sys.stderr)
        print(f'Written to {args.output}/')
    return 0


def _rounded(rows: Sequence[Row]) -> List[Row]:
    def cell(value):
        return '-' if value is None else f'{value:.3f}' if isinstance(value, float) else value
    return [{k: cell(v) for k, v in row.items()} for row in rows]


def _write(rows: Sequence[Row], setting: Setting, folder: Path, name: str) -> None:
    write_csv(folder / f'{name}.csv', rows)
    write_json(folder / f'{name}.json', {'setting': setting.describe()})
