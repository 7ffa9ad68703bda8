"""Measure `pst-timm audit`: how many wrong labels and copies, planted for the purpose, it finds.

    python -m scripts.measure_audit --data-dir data/tiny-imagenet-200 --work output/audit --output results/data

Of scikit-learn's digits and of 20 classes of Tiny ImageNet, 5% of the training labels are flipped to another class, and
copies of training images (the same file, resized, compressed again) are put among the validation images. Then the
command is run as anybody would run it. Stopped, it goes on with the same words. The recipes were chosen by the accuracy
on the given labels, flips and all: nobody who has wrong labels knows which they are.
"""
import argparse
import csv
import random
import shutil
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
import yaml
from PIL import Image

from pst_timm.cli import main as pst_timm
from pst_timm.data.images import open_image
from pst_timm.engine import train, train_args
from pst_timm.utils.files import read_csv, write_csv, write_json, write_text
from scripts.demo import write_digits

__all__ = ['flip_labels', 'main', 'measure_labels', 'plant_copies', 'read_audit']

SHARE = 0.05
CLASSES = 20
KINDS = ('same file', 'half the size', '1.4 times the size', 'JPEG, quality 40', 'smaller and JPEG, quality 60')

DIGITS = dict(
    # as all of this was started when it was measured
    model_kwargs=dict(pst_zero_init=False),
    model='test_resnet_pst', img_size=32, batch_size=32, workers=0, opt='adamw', lr=0.003, weight_decay=0.05,
    sched='cosine', sched_on_updates=True, epochs=15, warmup_epochs=2, smoothing=0.0, hflip=0.0, color_jitter=0.0,
    scale=[0.8, 1.0], ratio=[0.9, 1.1111], crop_pct=1.0, train_interpolation='bilinear', data_on_device=True,
    log_interval=50)
TINY = dict(
    model='resnet18', model_kwargs=dict(layers=[1, 1, 1, 1]), crop_pct=1.0, interpolation='bicubic',
    mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225], opt='adamw', opt_kwargs=dict(fused=True), weight_decay=0.05,
    sched='cosine', sched_on_updates=True, smoothing=0.0, scale=[0.35, 1.0], color_jitter=0.0,
    train_interpolation='bilinear', amp=True, amp_dtype='bfloat16', channels_last=True, data_on_device=True, workers=0,
    log_interval=50, recovery_interval=100)
# on the other classes, first at a smaller size: what all folds begin with
BEGINNINGS = {
    'pretraining': dict(TINY, img_size=48, batch_size=128, lr=0.002, epochs=3, warmup_epochs=0),
    'pretraining-64': dict(TINY, img_size=64, batch_size=128, lr=0.0015, epochs=2, warmup_epochs=0),
}
FOLDS = dict(TINY, img_size=64, batch_size=64, lr=0.001, epochs=10, warmup_epochs=1)


class Planted(NamedTuple):
    """What is known to be wrong."""
    flips: List[str]
    """Images with a wrong label, relative to the split."""
    copies: Dict[str, Dict[str, str]]
    """Kind and original of each copy, by its name relative to the validation split."""


def flip_labels(source: Path, target: Path, share: float = SHARE, seed: int = 0) -> List[str]:
    """Write a folder of class folders again, as links, some of which are in the folder of another class.

    Args:
        source: Folder of class folders.
        target: Where to write.
        share: Share of the images that get the label of another class, drawn evenly over the others.
        seed: Which ones.

    Returns:
        Names of the flipped images, relative to the target.
    """
    rng = random.Random(seed)
    classes = sorted(path.name for path in source.iterdir())
    images = [(name, path) for name in classes for path in sorted((source / name).iterdir())]
    chosen = set(rng.sample(range(len(images)), round(share * len(images))))
    flips = []
    for i, (name, path) in enumerate(images):
        label = rng.choice([other for other in classes if other != name]) if i in chosen else name
        link = target / label / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
        if i in chosen:
            flips.append(f'{label}/{path.name}')
    return flips


def plant_copies(train: Path, validation: Path, count: int, seed: int = 0) -> Dict[str, Dict[str, str]]:
    """Put copies of training images among the validation images.

    Args:
        train: Folder of class folders.
        validation: Likewise; must be the caller's own.
        count: Copies of each kind.
        seed: Of which images.

    Returns:
        Kind and original of each copy by name, relative to the splits.
    """
    images = sorted(train.glob('*/*'))
    chosen = random.Random(seed + 1).sample(images, count * len(KINDS))
    copies = {}
    for i, path in enumerate(chosen):
        kind = KINDS[i % len(KINDS)]
        folder = validation / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        image = open_image(path)
        if kind == 'same file':
            target = folder / f'copy-{i:04d}{path.suffix}'
            shutil.copyfile(path, target)
        else:
            factor = {'half the size': 0.5, '1.4 times the size': 1.4, 'smaller and JPEG, quality 60': 0.7}.get(kind, 1)
            size = tuple(round(side * factor) for side in image.size)
            quality = 60 if 'smaller' in kind else 40
            target = folder / f'copy-{i:04d}{".jpg" if "JPEG" in kind else ".png"}'
            image.resize(size, Image.Resampling.BICUBIC).save(target, quality=quality)  # which PNG does not heed
        copies[f'{folder.name}/{target.name}'] = dict(kind=kind, of=path.relative_to(train).as_posix())
    return copies


def plant(source: Path, validation: Path, target: Path, count: int) -> Planted:
    """Write flipped training labels and validation images with copies, or read what was planted there before."""
    record = target / 'planted.json'
    if record.is_file():
        return Planted(**yaml.safe_load(record.read_text()))
    shutil.rmtree(target, ignore_errors=True)
    flips = flip_labels(source, target / 'data' / 'train')
    flip_labels(validation, target / 'data' / 'validation', share=0.)
    copies = plant_copies(target / 'data' / 'train', target / 'data' / 'validation', count)
    write_json(record, dict(flips=flips, copies=copies))
    return Planted(flips, copies)


def run_audit(target: Path, recipe: Dict[str, Any], folds: int, flags: Sequence[str] = ()) -> Path:
    """Audit planted data; returns the folder of the audit, which is left as it is if it is there."""
    output = target / 'audit'
    if (output / 'audit.csv').is_file():
        return output
    write_text(target / 'recipe.yaml', yaml.safe_dump(recipe))
    words = [
        'audit', '--config', target / 'recipe.yaml', '--cross', folds, '--data-dir', target / 'data',
        '--split', 'train', '--output', output, '--resume', 'auto', '--batch-size', 250, *flags]
    if pst_timm([str(word) for word in words]):
        sys.exit(1)
    return output


def read_audit(path: Path) -> List[Dict[str, str]]:
    """Rows of an audit.csv, without broken images."""
    return [row for row in read_csv(path) if not row['broken']]


def measure_labels(name: str, rows: Sequence[Dict[str, str]], flips: Sequence[str]) -> List[Dict[str, Any]]:
    """How well either ranking finds the flips, a row each."""
    from sklearn.metrics import average_precision_score

    flipped = np.array([row['image'] in set(flips) for row in rows])
    loss, margin = (np.array([float(row[key]) for row in rows]) for key in ('loss', 'margin'))
    confident = np.array([row['confident_learning'] == 'yes' for row in rows])
    right = np.mean([row['label'] == row['suggested'] for row in rows])
    found = []
    for ranking, order in (
            ('self-confidence', np.argsort(-loss, kind='stable')),
            ('confident-learning', np.lexsort((margin, ~confident)))):
        ranks = np.empty(len(rows))
        ranks[order] = np.arange(len(rows))
        count = len(flips)
        found.append({
            'data': name, 'images': len(rows), 'flips': count,
            'marked as wrong': sum(row['wrong_label'] == 'yes' for row in rows),
            'agrees with the given label': f'{right:.1%}',
            'ranking': ranking, 'share of flips among as many': f'{flipped[order][:count].mean():.1%}',
            'flips in the first hundred': int(flipped[order][:100].sum()),
            'area under precision-recall': round(float(average_precision_score(flipped, -ranks)), 4)})
    return found


def measure_copies(name: str, path: Path, copies: Dict[str, Dict[str, str]]) -> List[Dict[str, Any]]:
    """How many planted copies were found by kind, and what else was taken for copies across splits."""
    with open(path, newline='', encoding='utf-8') as file:
        rows = [row for row in csv.DictReader(file) if row['split'] == 'validation']
    found = {(row['duplicate_of'], row['image']) for row in rows}
    rows_out = []
    for kind in KINDS:
        mine = {(copy, about['of']) for copy, about in copies.items() if about['kind'] == kind}
        rows_out.append({'data': name, 'copy': kind, 'planted': len(mine), 'found': len(mine & found)})
    planted = {(copy, about['of']) for copy, about in copies.items()}
    return [*rows_out, {'data': name, 'copy': 'none', 'planted': 0, 'found': len(found - planted)}]


def digits(work: Path) -> Planted:
    """Plant in the digits, and audit them."""
    if not (work / 'digits').is_dir():
        write_digits(work / 'digits', 32)
    planted = plant(work / 'digits' / 'train', work / 'digits' / 'validation', work / 'flipped-digits', 20)
    run_audit(work / 'flipped-digits', DIGITS, 4)
    return planted


def tiny_imagenet(data: Path, work: Path) -> Planted:
    """Train on the other classes, plant in 20, and audit those."""
    work = work / 'tiny'
    names = sorted(path.name for path in (data / 'train').iterdir())
    chosen = sorted(random.Random(0).sample(names, CLASSES))
    for split in ('train', 'val'):
        for name in names:
            link = work / ('classes' if name in chosen else 'others') / split / name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to((data / split / name).resolve())
    before = ''
    for name, recipe in BEGINNINGS.items():
        summary = work / name / 'summary.csv'
        if not summary.is_file() or len(read_csv(summary)) < recipe['epochs']:
            train(train_args(
                **recipe, num_classes=len(names) - CLASSES, data_dir=str(work / 'others'), val_split='',
                initial_checkpoint=before, output=str(work), experiment=name, resume='auto', checkpoint_hist=1))
        before = str(work / name / 'last.pth.tar')
    planted = plant(work / 'classes' / 'train', work / 'classes' / 'val', work / 'flipped', 60)
    run_audit(work / 'flipped', dict(FOLDS, initial_checkpoint=before), 3, ['--mirror', '--crops'])
    return planted


SETTING = (
    'A share of 5% of the training labels flipped to another class, drawn evenly; recipes chosen by the accuracy on '
    'the given labels')
SETTINGS = {
    'digits': (
        "digits: the 1,437 training scans of scikit-learn's digits at 32 px, four folds, `test_resnet_pst` for 15 "
        'epochs'),
    'Tiny ImageNet, 20 classes': (
        'Tiny ImageNet: 10,000 training images of 20 classes drawn by seed, three folds, a `resnet18` with one block '
        'in each stage for 10 epochs at 64 px, begun with its weights after 3 epochs at 48 px and 2 at 64 px on the '
        'other 180 classes, on one core of a processor in bfloat16, images scored by five crops and their mirror '
        'images'),
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Measure, and write the tables; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m scripts.measure_audit', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', type=Path, help='Tiny ImageNet, unpacked; without it the digits alone')
    parser.add_argument('--work', type=Path, default=Path('output/audit'), help='folder for data and trainings')
    parser.add_argument('--output', type=Path, default=Path('results/data'), help='folder for the tables')
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    parts = {'digits': (digits(args.work), args.work / 'flipped-digits')}
    if args.data_dir:
        planted = tiny_imagenet(args.data_dir, args.work)
        parts['Tiny ImageNet, 20 classes'] = (planted, args.work / 'tiny' / 'flipped')
    labels, copies = [], []
    for name, (planted, folder) in parts.items():
        labels += measure_labels(name, read_audit(folder / 'audit' / 'audit.csv'), planted.flips)
        copies += measure_copies(name, folder / 'audit' / 'duplicates.csv', planted.copies)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, rows, setting in (
            ('audit', labels, '; '.join([SETTING, *(SETTINGS[name] for name in parts)])),
            ('audit_copies', copies, 'Copies of training images planted among the validation images of the same data; '
                                     'in the row "none", pairs that were not planted')):
        write_csv(args.output / f'{name}.csv', rows)
        write_json(args.output / f'{name}.json', dict(setting=setting))
    for row in labels + copies:
        print(row)
    return 0


if __name__ == '__main__':
    sys.exit(main())
