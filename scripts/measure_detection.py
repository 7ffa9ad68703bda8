"""What a PST pyramid is worth in a detector: FCOS on blood cells with each neck and seed, and the precision on the test
images, with intervals.

    python -m scripts.measure_detection --data-dir BCCD --work runs/bccd --output results/detection

Started again, it goes on where it stopped. The recipe, configs/detect/bccd.yaml, was chosen on the validation images;
what is evaluated on the test images is the last epoch.
"""
import argparse
import json
import logging
import statistics
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import timm
import torch

from pst_timm.detection import job
from pst_timm.detection.checkpoint import open_detector
from pst_timm.detection.datasets import BoxDataset, open_boxes
from pst_timm.detection.evaluation import METRICS, ImageMatches, detections_of, match, shown
from pst_timm.detection.flags import TRAIN_FLAGS, train_args, validate_args
from pst_timm.detection.intervals import Estimate, ap_differences, ap_intervals
from pst_timm.detection.validation import evaluate_detector
from pst_timm.engine import factories
from pst_timm.engine.args import read_yaml
from pst_timm.utils.devices import hardware_name
from pst_timm.utils.files import write_csv, write_json
from pst_timm.utils.tables import format_table

__all__ = ['CELLS', 'ROWS', 'main', 'summary']

CONFIG = Path('configs/detect/bccd.yaml')
# in the order in which they are trained, seed by seed
CELLS: Dict[str, Dict[str, Any]] = {
    'pst': dict(neck='pst'),
    'fpn': dict(neck='fpn'),
    'pan': dict(neck='pan'),
    'pst-zero': dict(neck='pst', neck_kwargs=dict(zero_init=True)),
}
COARSE, GATE, JOINT = {}, dict(topk=8, fine_fusion='gate'), dict(topk=8, fine_fusion='joint')
# what is evaluated of each, in the order of the table
ROWS = {
    'FPN': ('fpn', COARSE),
    'PAN': ('pan', COARSE),
    'PST': ('pst', COARSE),
    'PST, k = 8, gate': ('pst', GATE),
    'PST, k = 8, joint': ('pst', JOINT),
    'PST, zero start': ('pst-zero', COARSE),
    'PST, zero start, k = 8, gate': ('pst-zero', GATE),
    'PST, zero start, k = 8, joint': ('pst-zero', JOINT),
}
TWIN = 'FPN'


def run_cell(cell: str, seed: int, recipe: Dict[str, Any], given: Dict[str, Any], work: Path) -> Path:
    """Train a cell, or the rest of it; returns its last checkpoint."""
    result = job.train(train_args(**{
        **recipe, **given, **CELLS[cell], 'seed': seed, 'output': str(work), 'experiment': f'{cell}-{seed}',
        'resume': 'auto'}))
    return result.output_dir / 'last.pth.tar'


def evaluate_row(
        row: str,
        seed: int,
        dataset: BoxDataset,
        given: Dict[str, Any],
        work: Path,
) -> Optional[Dict[str, Any]]:
    """Metrics and boxes of a row of the table, kept in the folder of its run; None before it is trained."""
    cell, setting = ROWS[row]
    folder = work / f'{cell}-{seed}'
    done = folder / f'{given["split"]}-{"-".join(map(str, setting.values())) or "coarse"}.json'
    if done.is_file():
        return json.loads(done.read_text())
    if not (folder / 'done').is_file():
        return None
    model = open_detector(folder / 'last.pth.tar', device='cpu', **setting)
    args = validate_args(**given, checkpoint='-', device='cpu', workers=0, channels_last=True, img_size=model.img_size)
    metrics, evaluator = evaluate_detector(args, model, dataset, factories.init_device(args), torch.float32)
    metrics.pop('images_per_second')
    found = dict(row=row, seed=seed, metrics=metrics, boxes=evaluator.results())
    write_json(done, found)
    return json.loads(done.read_text())


def summary(found: Dict[str, List[ImageMatches]], runs: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """A row for each detector, in percent, mean over the seeds.

    Args:
        found: Matches of each row by seed.
        runs: Metrics of each row and seed.
    """
    rows = []
    for name, matches in found.items():
        own = [run['metrics'] for run in runs if run['row'] == name]
        # None where there is nothing to find
        each = {key: None if own[0][key] is None else statistics.mean(m[key] for m in own) for key in own[0]}
        known = ap_intervals(matches)
        row = dict(
            detector=name, seeds=len(own), AP=told(known['ap']), AP50=told(known['ap50']), AP75=shown(each['ap75']))
        row.update({key.removeprefix('ap_'): shown(value) for key, value in each.items() if key not in METRICS})
        twins = found.get(TWIN, [])
        if name != TWIN and len(twins) == len(matches):
            over = ap_differences(matches, twins)
            row.update({f'AP over {TWIN}': told(over['ap'], '+'), f'AP50 over {TWIN}': told(over['ap50'], '+')})
        rows.append(row)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key, '-') for key in columns} for row in rows]


def told(estimate: Estimate, sign: str = '') -> str:
    low, high = estimate.images
    return f'{estimate.value:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})'


def setting_of(recipe: Dict[str, Any], counts: Dict[str, int], seeds: Sequence[int]) -> str:
    return (
        f'BCCD, {counts["train"]} training and {counts["test"]} test images; FCOS over {recipe["trunk"]} from scratch, '
        f'necks of {recipe["neck_width"]} channels, {recipe["img_size"]} px, {recipe["epochs"]} epochs, batch '
        f'{recipe["batch_size"]}, seeds {", ".join(map(str, seeds))}; the last epoch, in float32; COCO\'s AP in '
        f'percent, mean over the seeds, with 95% intervals by 1,000 draws of the test images; differences on the same '
        f'draws; {hardware_name(torch.device("cpu"))}; torch {torch.__version__}, timm {timm.__version__}')


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Train what is missing, and write the table after each run."""
    parser = argparse.ArgumentParser(
        prog='python -m scripts.measure_detection', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', type=Path, required=True, help='Pascal VOC folder with train, val and test')
    parser.add_argument('--work', type=Path, required=True, help='folder for the runs')
    parser.add_argument('--output', type=Path, default=Path('results/detection'))
    parser.add_argument('--config', type=Path, default=CONFIG, help='default: %(default)s')
    parser.add_argument('--cells', nargs='*', choices=CELLS, default=list(CELLS), help='none: only the table')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1])
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format='%(asctime)s %(message)s')
    recipe = read_yaml(str(args.config), TRAIN_FLAGS)
    given = dict(data_dir=str(args.data_dir), device='cpu')
    for seed in args.seeds:
        for cell in args.cells:
            last = run_cell(cell, seed, recipe, given, args.work)
            last.with_name('done').touch()
            write_tables(args, recipe)
    if not args.cells:
        write_tables(args, recipe)
    return 0


def write_tables(args: argparse.Namespace, recipe: Dict[str, Any]) -> None:
    """Evaluate what is trained and not yet evaluated, and write what is known."""
    train = open_boxes(args.data_dir, 'train')
    counts = dict(train=len(train))
    runs, found = [], {}
    dataset = open_boxes(args.data_dir, 'test', class_names=train.class_names)
    counts['test'] = len(dataset)
    for row in ROWS:
        for seed in args.seeds:
            known = evaluate_row(row, seed, dataset, dict(data_dir=str(args.data_dir), split='test'), args.work)
            if known is not None:
                runs.append({key: known[key] for key in ('row', 'seed', 'metrics')})
                matches = match(dataset.annotations, detections_of(dataset.annotations, known['boxes']))
                found.setdefault(row, []).append(matches)
    rows = summary(found, runs)
    args.output.mkdir(parents=True, exist_ok=True)
    write_csv(args.output / 'bccd.csv', rows)
    write_json(args.output / 'bccd.json', dict(
        setting=setting_of(recipe, counts, args.seeds), recipe=recipe, cells=CELLS, runs=runs))
    print(format_table(rows), flush=True)


if __name__ == '__main__':
    sys.exit(main())
