"""What the flags for lopsided classes are worth: a long-tailed subset of a balanced data set, a run for each flag and
seed, and the accuracy of frequent and rare classes on balanced validation images.

    python -m scripts.measure_long_tail --data-dir tiny-imagenet-200 --work runs/long_tail --output results/data

Started again, it goes on where it stopped. The settings were chosen beforehand, and nothing on the validation images:
what is evaluated is the last epoch.
"""
import argparse
import json
import logging
import statistics
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import timm
import torch
import yaml

from pst_timm.commands import audit
from pst_timm.data.images import EXTENSIONS, scan_folder
from pst_timm.data.readers import in_order
from pst_timm.engine import train, train_args
from pst_timm.review.answers import Outputs, answers, open_labelled, open_subject
from pst_timm.utils.devices import hardware_name
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import write_csv, write_json, write_text
from pst_timm.utils.tables import format_table

__all__ = ['CELLS', 'class_sizes', 'main', 'make_subset', 'summary']

CLASSES, LARGEST, IMBALANCE, CHOICE = 20, 500, 50, 0
# in the order in which they are run, seed by seed
CELLS: Dict[str, Dict[str, Any]] = {
    'plain': {},
    'balanced': dict(sampler='balanced'),
    'sqrt': dict(sampler='sqrt'),
    'logit-adjust': dict(logit_adjust=1.),
    'effective': dict(sampler='effective'),
    'hard-loss': dict(hard_loss_fraction=0.5),
    # the weights are those of an audit by models that have not seen the images they weigh
    'hard-examples': dict(hard_examples='weights.csv'),
    # which the images on the device cannot do
    'rare-aa': dict(rare_aa='rand-m7-mstd0.5-inc1', rare_below=60, data_on_device=False),
}
RECIPE = dict(
    # as all of this was started when it was measured
    model_kwargs=dict(pst_zero_init=False),
    model='test_resnet_pst', device_modules=['pst_timm'], img_size=64, crop_pct=1., interpolation='bilinear',
    val_split='validation', batch_size=64, epochs=30, opt='adamw', lr=2e-3, weight_decay=0.05, warmup_epochs=2,
    sched_on_updates=True, smoothing=0.1, scale=[0.35, 1.], color_jitter=0., train_interpolation='bilinear', amp=True,
    amp_dtype='bfloat16', channels_last=True, data_on_device=True, workers=0, device='cpu', checkpoint_hist=1,
    log_interval=1000)
PARTS = {'head': slice(0, 7), 'middle': slice(7, 13), 'tail': slice(13, 20)}


def class_sizes() -> List[int]:
    """Training images of the classes, the largest first: n_i = n_max * imbalance^(-i / (classes - 1))."""
    return [round(LARGEST * IMBALANCE ** (-i / (CLASSES - 1))) for i in range(CLASSES)]


def make_subset(source: Path, folder: Path) -> List[str]:
    """Link a long-tailed training split, and all validation images of its classes; returns the classes, largest first.

    Args:
        source: Folder with the splits `train` and `val` of class folders.
        folder: Where the splits `train` and `validation` are made, if they are not there.

    Raises:
        PSTError: If the source has too few classes or images.
    """
    names = in_order(path.name for path in (source / 'train').iterdir() if path.is_dir())
    if len(names) < CLASSES:
        raise PSTError(f'{source} has {len(names)} classes, expected {CLASSES} or more.')
    rng = np.random.default_rng(CHOICE)
    chosen = [names[i] for i in rng.permutation(len(names))[:CLASSES]]
    for name, size in zip(chosen, class_sizes()):
        for split, other, most in (('train', 'train', size), ('val', 'validation', None)):
            images = [Path(path) for path in sorted(scan_folder(source / split / name, EXTENSIONS).paths)]
            if len(images) < (most or 1):
                raise PSTError(f'{source / split / name} has {len(images)} images, expected {most or 1} or more.')
            place = folder / other / name
            place.mkdir(parents=True, exist_ok=True)
            for i in sorted(rng.permutation(len(images))[:most]):
                link = place / images[i].name
                if not link.is_symlink():
                    link.symlink_to(images[i].resolve())
    return chosen


def kept_runs(path: Path, same: Dict[str, Any]) -> List[Dict[str, Any]]:
    """Runs in a file of results, if all else is the same; none if there is no such file.

    Raises:
        PSTError: If the file has results of another recipe or data set.
    """
    if not path.is_file():
        return []
    written = json.loads(path.read_text())
    if other := [key for key, value in same.items() if written.get(key) != json.loads(json.dumps(value))]:
        raise PSTError(f'{path} has results of other {", ".join(other)}: name another --output.')
    return written['runs']


def audit_weights(data: Path, work: Path, recipe: Dict[str, Any]) -> Path:
    """Weights of the training images for --hard-examples, by `pst-timm audit --cross 3` with the recipe itself."""
    folder = work / 'audit'
    if not (folder / 'weights.csv').is_file():
        work.mkdir(parents=True, exist_ok=True)
        write_text(work / 'audit.yaml', yaml.safe_dump(recipe))
        code = audit.main([
            '--data-dir', str(data), '--split', 'train', '--against', '--cross', '3', '--config',
            str(work / 'audit.yaml'), '--resume', 'auto', '--device', 'cpu', '-o', str(folder)])
        if code:
            raise PSTError(f'The audit in {folder} ended with {code}.')
    return folder / 'weights.csv'


def run_cell(
        cell: str,
        seed: int,
        data: Path,
        work: Path,
        chosen: Sequence[str],
        recipe: Dict[str, Any],
) -> Dict[str, Any]:
    """Train a cell, or the rest of it, and evaluate its last epoch; accuracies in percent."""
    flags = dict(CELLS[cell])
    if 'hard_examples' in flags:
        flags['hard_examples'] = str(audit_weights(data, work, recipe))
    result = train(train_args(**{
        **recipe, 'data_dir': str(data), 'output': str(work), 'experiment': f'{cell}-{seed}', 'seed': seed,
        'resume': 'auto', 'val_interval': recipe['epochs'], **flags}))
    share = accuracies(result.output_dir / 'last.pth.tar', data, chosen)
    return dict(
        cell=cell, seed=seed, top1=100 * float(np.mean(share)),
        **{part: 100 * float(np.mean(share[places])) for part, places in PARTS.items()},
        classes=[round(100 * float(x), 2) for x in share])


def accuracies(checkpoint: Path, data: Path, chosen: Sequence[str]) -> np.ndarray:
    """Share of the validation images of each class that are classified right, in the order of `chosen`."""
    subject = open_subject(str(checkpoint), device='cpu')
    samples = open_labelled(subject, str(data))
    found = Outputs.gather(answers(subject, samples, 250, embeddings=False))
    right = found.logits.argmax(axis=1) == found.labels
    return np.array([right[found.labels == samples.class_names.index(name)].mean() for name in chosen])


def summary(runs: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """A row for each cell, in percent: mean over the seeds, and the smallest and largest one."""
    rows = []
    for cell in CELLS:
        found = [run for run in runs if run['cell'] == cell]
        if found:
            rows.append(dict(cell=cell, seeds=len(found), **{
                key: spread([run[key] for run in found]) for key in ('top1', *PARTS)}))
    return rows


def spread(values: Sequence[float]) -> str:
    mean = f'{statistics.mean(values):.1f}'
    return mean if len(values) < 2 else f'{mean} ({min(values):.1f} to {max(values):.1f})'


def setting(data: Path, seeds: Sequence[int], epochs: int) -> str:
    sizes, head, middle = class_sizes(), PARTS['head'].stop, PARTS['middle'].stop
    held_out = len(scan_folder(data / 'validation', EXTENSIONS).paths)
    return (
        f'{CLASSES} classes of Tiny ImageNet chosen by seed {CHOICE}, {sum(sizes):,} training images, {sizes[0]} of '
        f'the largest class and {sizes[-1]} of the smallest; accuracy in percent on {held_out:,} balanced validation '
        f'images after the last epoch, mean over the seeds (lowest to highest); head, middle and tail are the {head} '
        f'largest classes, the next {middle - head} and the {CLASSES - middle} smallest; {RECIPE["model"]} from '
        f'scratch at {RECIPE["img_size"]} px, {epochs} epochs, batch {RECIPE["batch_size"]}, seeds '
        f'{", ".join(map(str, seeds))}; {hardware_name(torch.device("cpu"))}, {torch.get_num_threads()} thread(s), '
        f'bfloat16; torch {torch.__version__}, timm {timm.__version__}')


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Train what is missing, and write the table after each run."""
    parser = argparse.ArgumentParser(
        prog='python -m scripts.measure_long_tail', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', type=Path, required=True, help='class folders in train and val')
    parser.add_argument('--work', type=Path, required=True, help='folder for the subset and the runs')
    parser.add_argument('--output', type=Path, default=Path('results/data'))
    parser.add_argument('--cells', nargs='+', choices=CELLS, default=list(CELLS))
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1])
    parser.add_argument('--epochs', type=int, default=RECIPE['epochs'])
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format='%(asctime)s %(message)s')
    chosen = make_subset(args.data_dir, args.work / 'data')
    args.output.mkdir(parents=True, exist_ok=True)
    recipe = dict(RECIPE, epochs=args.epochs)
    runs = kept_runs(args.output / 'long_tail.json', dict(classes=chosen, sizes=class_sizes(), recipe=recipe))
    for seed in args.seeds:
        for cell in args.cells:
            if any((run['cell'], run['seed']) == (cell, seed) for run in runs):
                continue
            runs.append(run_cell(cell, seed, args.work / 'data', args.work / 'runs', chosen, recipe))
            seeds = sorted({run['seed'] for run in runs})
            write_csv(args.output / 'long_tail.csv', summary(runs))
            write_json(args.output / 'long_tail.json', dict(
                setting=setting(args.work / 'data', seeds, args.epochs), classes=chosen, sizes=class_sizes(),
                recipe=recipe, cells=CELLS, runs=runs))
            print(format_table(summary(runs)), flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
