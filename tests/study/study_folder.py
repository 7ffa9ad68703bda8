"""A study that was never run: files of the form that a study writes, with made-up numbers."""
import csv
import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence

import numpy as np

from pst_timm.metrics.answers import pack_answers

CELLS = ('resnet18', 'resnet18_pst', 'resnet18_pst_depth0', 'resnet18_pst_fine50')
QUESTIONS = {
    '1': dict(title='Does PST help?', kind='compare', of='resnet18_pst', against=['resnet18', 'resnet18_pst_depth0']),
    '2': dict(title='Does fine attention help?', kind='sweep', cells=['resnet18_pst']),
    '3': dict(title='Does training help?', kind='train_fine', cells=['resnet18_pst', 'resnet18_pst_fine50']),
    '5': dict(title='Does it transfer?', kind='probe', of='resnet18_pst', against=['resnet18']),
}


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with open(path, 'w', newline='') as f:
        writer = csv.DictWriter(f, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def read_table(path: Path) -> List[Dict[str, str]]:
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


def answered(evaluation: str, cell: str, seed: int, right: np.ndarray, **columns: Any) -> Dict[str, Any]:
    """A row of evaluations.csv for these right answers."""
    top1 = round(100 * right.mean(), 4)
    return {
        'cell': cell, 'model': 'resnet18', 'seed': seed, 'evaluation': evaluation, 'img_size': 96, 'topk': '',
        'fine_fusion': '', 'images': len(right), 'top1': top1, 'top5': 99., 'loss': round(3 - top1 / 50, 6),
        'ece': round(top1 / 1000, 5), 'answers': pack_answers(right.tolist()), **columns}


def write_study(
        folder: Path,
        cells: Sequence[str] = CELLS,
        swept: Sequence[str] = CELLS[1::2],
        questions: Mapping[str, Any] = QUESTIONS,
        seeds: Sequence[int] = (0, 1, 2),
        sizes: Sequence[int] = (96, 224),
        topks: Sequence[int] = (0, 1, 8, 16, 64),
        images: int = 202,
        epochs: int = 4,
) -> Path:
    """Write a synthetic study; returns its folder."""
    rng = np.random.default_rng(0)
    difficulty = rng.random(images)
    folder.mkdir(parents=True)
    tables: Dict[str, List[Dict[str, Any]]] = {name: [] for name in ('cells', 'evaluations', 'curves', 'latency')}
    for i, cell in enumerate(cells):
        tables['latency'].append(dict(
            cell=cell, params=11_000_000 + i, gmacs=0.3 + 0.02 * i, batch_size=100, img_size=96,
            latency_ms=80. + 5 * i, ratio=1 + i / 16,
            train_batch_size=64, train_ms=300. + 60 * i, train_ratio=1 + i / 5,
            device='cpu', hardware='made up', threads=2))
        for seed in seeds:
            def answers(bonus: float = 0., seed: int = seed, i: int = i) -> np.ndarray:
                return difficulty + 0.1 * rng.standard_normal(images) < 0.5 + 0.02 * i + 0.01 * seed + bonus

            final = answered('final', cell, seed, answers())
            rows = [final, answered('probe', cell, seed, answers(-0.1), img_size='')]
            for size in sizes if cell in swept else ():
                for k in topks:
                    for fusion in ('gate', 'joint') if k else ('coarse',):
                        # as many answers as there are different attentions: what selects all tokens is the same
                        rows.append(answered(
                            'sweep', cell, seed, answers(k / 500), img_size=size, topk=k, fine_fusion=fusion))
            tables['evaluations'] += rows
            tables['cells'].append({
                'cell': cell, 'model': 'resnet18',
                'model_kwargs': 'train_topk=8 train_fine_prob=0.5' if 'fine' in cell else '', 'seed': seed,
                'epochs': epochs, 'img_size': 96, 'classes': 20, 'train_images': 1000, 'val_images': images,
                **{key: final[key] for key in ('top1', 'top5', 'loss', 'ece')}, 'params': 11_000_000 + i,
                'gmacs': 0.3 + 0.02 * i, 'train_seconds': 600 + 60 * i + seed, 'images_per_second': 50. - i,
                'wait_share': 0.01, 'precision': 'float32', 'device': 'cpu', 'hardware': 'a made-up machine',
                'threads': 1, 'jobs': 2, 'torch': '2.0', 'torchvision': '0.1', 'timm': '1.0', 'pst_timm': '0.1',
                'python': '3.11', 'date': f'2000-01-0{seed + 1}T12:00:00+00:00', 'settings': '{}'})
            tables['curves'] += [
                dict(cell=cell, seed=seed, epoch=e, train_loss=3 / (e + 1) + 0.1 * seed, eval_loss=2.,
                     eval_top1=final['top1'] * (e + 1) / epochs, eval_top5=99., lr=0.001)
                for e in range(epochs)]
    for name, rows in tables.items():
        write_table(folder / f'{name}.csv', rows)
    (folder / 'study.json').write_text(json.dumps(dict(
        name=folder.name, setting='Made-up numbers of no machine', questions=questions, cells=list(cells),
        seeds=list(seeds), missing=[])))
    return folder
