"""What sparsity training is worth before pruning: a run for each weight of the penalty and each seed, each model pruned
to the same cost, then fine-tuned.

    python -m scripts.measure_sparsity --data-dir flowers --work runs/sparsity --output results/deploy

Started again, it goes on where it stopped. Every weight is reported, and the last epoch of each run is what is
evaluated: the validation images choose nothing.
"""
import argparse
import logging
import statistics
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import timm
import torch
import torch.nn as nn

from pst_timm.checkpoints import load_model
from pst_timm.checkpoints.folder import save_folder
from pst_timm.deploy.finetune import finetune
from pst_timm.deploy.importance import Batch
from pst_timm.deploy.prune import prune
from pst_timm.deploy.prune_folder import training_batches
from pst_timm.engine import train, train_args
from pst_timm.utils.cost import count_gmacs
from pst_timm.utils.devices import hardware_name
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import write_csv, write_json
from pst_timm.utils.tables import format_table

__all__ = ['main', 'measure', 'summary']

MODEL, SIZE, EPOCHS, TUNED = 'test_resnet_pst', 64, 12, 3
WEIGHTS = (0., 3e-3, 1e-2)
RATIO = 0.7
SEEDS = (0, 1)
ROUND_TO, IMAGES = 8, 256
CUTS: Dict[str, Dict[str, str]] = {
    'l2, uniform': dict(importance='l2', scope='uniform'),
    'l2, global': dict(importance='l2', scope='global'),
    'bn, global': dict(importance='bn', scope='global'),
}
RECIPE: Dict[str, Any] = dict(
    img_size=SIZE, crop_pct=1., interpolation='bilinear', batch_size=64, opt='sgd', weight_decay=1e-4,
    sched_on_updates=True, smoothing=0.1, scale=[0.35, 1.], color_jitter=0., train_interpolation='bilinear', amp=True,
    amp_dtype='bfloat16', channels_last=True, data_on_device=True, stored_size=80, workers=0, device='cpu',
    checkpoint_hist=1, log_interval=1000, val_split='')


def train_one(data: Path, work: Path, weight: float, seed: int) -> Path:
    """The last checkpoint of a run with a weight of the penalty, 0 for none; trained unless that has been done."""
    name = f'train-{weight:g}-{seed}'
    args = train_args(
        # started as when it was measured
        **RECIPE, model=MODEL, model_kwargs=dict(pst_zero_init=False), data_dir=str(data), epochs=EPOCHS, lr=0.1,
        warmup_epochs=1, seed=seed, sparsity_weight=weight, output=str(work), experiment=name, resume='auto')
    train(args)
    return work / name / 'last.pth.tar'


@torch.inference_mode()
def accuracy(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Top-1 in percent."""
    right = torch.cat([model(images).argmax(dim=1) == labels for images, labels in batches])
    return 100 * right.double().mean().item()


def measure(data: Path, work: Path, split: str) -> List[Dict[str, Any]]:
    """A row for each weight and seed: multiply-adds that are left, and accuracy (%) whole, cut, and tuned.

    Nothing is chosen: models are cut in all the ways of `CUTS`, and tuned after the first of them, the default one.
    """
    rows = []
    for seed in SEEDS:
        for weight in WEIGHTS:
            model = load_model(train_one(data, work, weight, seed))
            seen, others = (
                training_batches(model, MODEL, dict(data_dir=str(data), train_split=name), images)
                for name, images in (('train', IMAGES), (split, sys.maxsize)))
            cut = {name: prune(model, RATIO, **how, round_to=ROUND_TO, images=seen) for name, how in CUTS.items()}
            folder, first = work / f'cut-{weight:g}-{seed}', next(iter(cut.values()))
            save_folder(first, folder)
            tuned = finetune(
                folder, dict(data_dir=str(data)), work=work / f'tuned-{weight:g}-{seed}', **RECIPE, epochs=TUNED,
                lr=0.02, seed=seed)
            rows.append(dict(
                weight=weight, seed=seed, whole=accuracy(model, others), tuned=accuracy(load_model(tuned), others),
                cut={name: accuracy(smaller, others) for name, smaller in cut.items()},
                left=count_gmacs(first, (3, SIZE, SIZE)) / count_gmacs(model, (3, SIZE, SIZE))))
            print(rows[-1], flush=True)
    return rows


def summary(rows: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """The means over the seeds, with their lowest and highest value."""
    def told(found: Sequence[float]) -> str:
        return f'{statistics.mean(found):.1f} ({min(found):.1f} to {max(found):.1f})'

    table = []
    for weight in sorted({row['weight'] for row in rows}):
        same = [row for row in rows if row['weight'] == weight]
        table.append({
            'sparsity weight': f'{weight:g}',
            'multiply-adds removed': f'{100 * (1 - statistics.mean(row["left"] for row in same)):.0f}%',
            'before': told([row['whole'] for row in same]),
            **{name: told([row['cut'][name] for row in same]) for name in CUTS},
            f'{next(iter(CUTS))}, then {TUNED} epochs': told([row['tuned'] for row in same])})
    return table


def setting(data: Path, split: str) -> str:
    """In a sentence, how it was measured."""
    train_images, images = (sum(path.is_file() for path in (data / name).rglob('*')) for name in ('train', split))
    return (
        f'Top-1 in percent on {images:,} photographs of five classes of flowers, after training on {train_images:,}: '
        f'`{MODEL}` from scratch at {SIZE} px, {EPOCHS} epochs of SGD with the sparsity weight (0: without), then '
        f'{RATIO:.0%} of the multiply-adds cut by `pst-timm prune` (widths in multiples of {ROUND_TO}), batch-norm '
        f'statistics estimated again on {IMAGES} training images, then {TUNED} epochs of fine-tuning without the '
        f'penalty; mean over seeds {" and ".join(map(str, SEEDS))} (lowest to highest), the last epoch of every run; '
        f'{hardware_name(torch.device("cpu"))}, bfloat16; torch {torch.__version__}, timm {timm.__version__}')


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Measure, and write the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--data-dir', type=Path, required=True, help='photographs: folder with the two splits')
    parser.add_argument('--val-split', default='val', help='split to report on (default: %(default)s)')
    parser.add_argument('--work', type=Path, required=True, help='folder of the runs')
    parser.add_argument('--output', type=Path, required=True, help='folder for sparsity.csv and sparsity.json')
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    try:
        rows = measure(args.data_dir, args.work, args.val_split)
        args.output.mkdir(parents=True, exist_ok=True)
        write_csv(args.output / 'sparsity.csv', summary(rows))
        write_json(args.output / 'sparsity.json', dict(setting=setting(args.data_dir, args.val_split), runs=rows))
    except PSTError as e:
        print(f'error: {e}', file=sys.stderr)
        return e.exit_code
    print(format_table(summary(rows)))
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
