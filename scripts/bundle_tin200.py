"""Put weights that were trained on Tiny ImageNet into the package, with their record and their card:

    python -m scripts.bundle_tin200 RUN [RUN ...] --data-dir data/tiny-imagenet-200

The runs are the stages of a recipe in `configs/tin200/`, in order. The moving average of the last epoch of the last one
is taken, never the best epoch; the validation images choose nothing, and are answered once, at the size it was trained.
"""
import argparse
import hashlib
import platform
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import timm
import torch
import torchvision
from timm.data import ImageNetInfo
from timm.utils import setup_default_logging

from pst_timm.checkpoints import label_names, load_model, read_checkpoint
from pst_timm.checkpoints.conversion import convert
from pst_timm.commands.common import fail
from pst_timm.data.datasets import create_eval_dataset
from pst_timm.data.sampling import labels_of
from pst_timm.engine import validate, validate_args
from pst_timm.hub.card import Accuracy, model_card
from pst_timm.metrics.answers import unpack_answers
from pst_timm.models.resnet_pst import WEIGHTS
from pst_timm.utils.devices import hardware_name
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import read_csv, write_json, write_text
from pst_timm.utils.markdown import prose
from pst_timm.utils.tables import markdown_table

__all__ = ['bundle', 'card', 'main', 'measure']

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / 'results' / 'weights'
TAG, DATA_SET, SPLIT = 'tin200', 'Tiny ImageNet', 'val'
TOPK = [0, 8]


def measure(weights: Path, data: Path, img_size: int) -> List[Dict[str, Any]]:
    """What `validate.py` says of weights on the validation images, coarse and with fine attention."""
    return validate(validate_args(
        checkpoint=str(weights), data_dir=str(data), split=SPLIT, img_size=img_size, topk_sweep=TOPK, answers=True,
        calibrate=True, workers=1, device_modules=['pst_timm']))


def by_class(row: Dict[str, Any], labels: np.ndarray, names: Sequence[str]) -> Dict[str, float]:
    """Top-1 in percent of each class, by its name, from the answers of `measure`."""
    right = unpack_answers(row['answers'], len(labels))
    return {name: round(100 * right[labels == label].mean().item(), 2) for label, name in enumerate(names)}


def seconds_of(run: Path) -> float:
    """Wall time that a run spent on training steps, beside whatever else its machine did."""
    return sum(float(row['train_seconds']) for row in read_csv(run / 'speed.csv'))


def bundle(runs: Sequence[Path], data: Path, folder: Path, records: Path) -> Dict[str, Any]:
    """Write the weights, measure what was written, and write record and card.

    Args:
        runs: Folders of the stages, in order.
        data: Tiny ImageNet, `train/WNID/*` and `val/WNID/*`.
        folder: Where to write NAME.safetensors.
        records: Where to write NAME.json and NAME.md.

    Returns:
        The record.

    Raises:
        PSTError: If a run or the data will not do.
    """
    stages = [read_checkpoint(run / 'last.pth.tar', use_ema=True) for run in runs]
    last = stages[-1]
    name = f'{last.arch}.{TAG}'
    weights = folder / f'{name}.safetensors'
    convert(runs[-1] / 'last.pth.tar', weights, 'float16', use_ema=True, overwrite=True)
    model = load_model(weights)
    names = label_names(model)
    if not names:
        raise PSTError(f'{runs[-1]} does not know the names of its classes: train it on folders of class folders.')
    img_size = model.pretrained_cfg['input_size'][-1]
    rows = measure(weights, data, img_size)
    keys = ('topk', 'fine_fusion', 'top1', 'top5', 'loss', 'ece')
    labels = np.asarray(labels_of(create_eval_dataset(validate_args(data_dir=str(data), split=SPLIT), SPLIT, None)))
    record = dict(
        weights=name, data_set=DATA_SET, classes=len(names), images=len(labels),
        img_size=img_size, metrics=[{key: row[key] for key in keys if key in row} for row in rows],
        top1_by_class=by_class(rows[0], labels, names),
        sha256=hashlib.sha256(weights.read_bytes()).hexdigest(), bytes=weights.stat().st_size,
        stages=[dict(recipe=stage.recipe, epochs=stage.epoch + 1, train_seconds=round(seconds_of(run), 1))
                for stage, run in zip(stages, runs)],
        hardware=hardware_name(torch.device('cpu')),
        versions=dict(python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__,
                      timm=timm.__version__),
        command='python -m scripts.bundle_tin200 RUN RUN --data-dir data/tiny-imagenet-200')
    write_json(records / f'{name}.json', record)
    write_text(records / f'{name}.md', card(record, last, model))
    return record


def card(record: Dict[str, Any], checkpoint: Any, model: torch.nn.Module) -> str:
    """The card of bundled weights: that of a published model, and what its record tells beside it."""
    first = record['metrics'][0]
    cfg = model.pretrained_cfg
    accuracy = Accuracy(
        first['top1'], first['top5'], record['img_size'], cfg['crop_pct'], cfg['interpolation'],
        f'by validate.py on the {record["images"]:,} validation images')
    words = ImageNetInfo()
    attention = markdown_table([{
        'attention': f'k = {row["topk"]}, {row["fine_fusion"]}' if row['topk'] else 'coarse',
        'top-1 (%)': f'{row["top1"]:.2f}', 'top-5 (%)': f'{row["top5"]:.2f}', 'ECE': f'{row["ece"]:.3f}',
    } for row in record['metrics']])
    classes = markdown_table([
        {'class': name, 'what it is': prose(words.label_name_to_description(name)), 'top-1 (%)': f'{top1:.0f}'}
        for name, top1 in record['top1_by_class'].items()])
    sections = [
        '## Intended use', '',
        'A start for fine-tuning on photographs, and an example of a trained model with PST. The 200 classes are some '
        'of ImageNet, at 64 x 64 pixels: it is no classifier of ImageNet-1k, and knows no fine detail. The images are '
        "for research under ImageNet's terms.", '',
        '## With fine attention', '', attention, '',
        '## By class', '', f'Of {record["images"] // record["classes"]} validation images each, coarse attention.', '',
        classes, '']
    return model_card(
        f'pst_timm/{record["weights"]}', checkpoint, model, accuracy, DATA_SET, 'apache-2.0',
        source=record['weights'], sections=sections)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Write the weights, the record and the card; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m scripts.bundle_tin200', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN')
    parser.add_argument('--data-dir', type=Path, required=True)
    parser.add_argument('--folder', type=Path, default=WEIGHTS, help='of the weights (default: in the package)')
    parser.add_argument('--records', type=Path, default=RECORDS, help='of record and card (default: results/weights)')
    args = parser.parse_args(argv)
    setup_default_logging()
    try:
        for folder in (args.folder, args.records):
            folder.mkdir(parents=True, exist_ok=True)
        record = bundle(args.runs, args.data_dir, args.folder, args.records)
    except PSTError as e:
        return fail(parser.prog, e)
    for row in record['metrics']:
        print(row)
    return 0


if __name__ == '__main__':
    sys.exit(main())
