"""Train a model on Tiny ImageNet and put its weights into the package, with their record and their card:

    python -m scripts.bundle_tin200 --data-dir data/tiny-imagenet-200        # resnet18_pst, hours on two cores
    python -m scripts.bundle_tin200 --data-dir data/tiny-imagenet-200 --recipes gpu --model resnet50_pst

Each recipe of `configs/tin200/` that is named is a stage, and goes on from the moving average that the one before left.
Started again, it goes on where it was stopped; stages that are done are not trained again. The moving average of the
last epoch is taken, never the best epoch; the validation images choose nothing, and are answered once, at the size of
the last stage.
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
from pst_timm.checkpoints.conversion import convert, save_safetensors
from pst_timm.commands.common import run
from pst_timm.data.datasets import create_eval_dataset
from pst_timm.data.sampling import labels_of
from pst_timm.engine import parse_train_args, train, validate, validate_args
from pst_timm.hub.card import Accuracy, model_card
from pst_timm.metrics.answers import unpack_answers
from pst_timm.models.resnet_pst import WEIGHTS
from pst_timm.utils.devices import hardware_name
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import read_csv, write_json, write_text
from pst_timm.utils.markdown import fence, prose
from pst_timm.utils.tables import markdown_table

__all__ = ['bundle', 'card', 'main', 'measure', 'train_stages']

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / 'results' / 'weights'
TAG, DATA_SET, SPLIT = 'tin200', 'Tiny ImageNet', 'val'
CONFIGS = ROOT / 'configs' / TAG
TOPK = [0, 8]
LAST = 'last.pth.tar'


def measure(weights: Path, data: Path, img_size: int) -> List[Dict[str, Any]]:
    """What `validate.py` says of weights on the validation images, coarse and with fine attention."""
    return validate(validate_args(
        checkpoint=str(weights), data_dir=str(data), split=SPLIT, img_size=img_size, topk_sweep=TOPK, answers=True,
        calibrate=True, workers=1, device_modules=['pst_timm']))


def by_class(row: Dict[str, Any], labels: np.ndarray, names: Sequence[str]) -> Dict[str, float]:
    """Top-1 in percent of each class, by its name, from the answers of `measure`."""
    right = unpack_answers(row['answers'], len(labels))
    return {name: round(100 * right[labels == label].mean().item(), 2) for label, name in enumerate(names)}


def seconds_of(folder: Path) -> float:
    """Wall time that a run spent on training steps, beside whatever else its machine did."""
    return sum(float(row['train_seconds']) for row in read_csv(folder / 'speed.csv'))


def train_stages(recipes: Sequence[Path], data: Path, output: Path, extra: Sequence[str] = ()) -> List[Path]:
    """Train one stage after the other, as far as they are not trained yet.

    Args:
        recipes: Configuration files of the stages, in order.
        data: Tiny ImageNet, `train/WNID/*` and `val/WNID/*`.
        output: Where the runs are, each in a folder by the names of model, tag and recipe.
        extra: Further flags of all stages.

    Returns:
        The folders of the runs.

    Raises:
        PSTError: If one cannot be trained.
        Interrupted: If the process was asked to stop; the same call goes on.
    """
    runs: List[Path] = []
    for recipe in recipes:
        words = ['--config', str(recipe), '--data-dir', str(data), '--output', str(output), '--resume', 'auto', *extra]
        if runs:
            words += ['--initial-checkpoint', str(runs[-1] / LAST)]
        args = parse_train_args(words)
        args.experiment = f'{args.model}.{TAG}-{recipe.stem}'
        last = output / args.experiment / LAST
        if not last.is_file() or read_checkpoint(last).epoch + 1 < args.epochs:
            train(args)
        runs.append(last.parent)
    return runs


def bundle(runs: Sequence[Path], data: Path, folder: Path, records: Path, command: str) -> Dict[str, Any]:
    """Write the weights, measure what was written, and write record and card.

    Args:
        runs: Folders of the stages, in order.
        data: Tiny ImageNet, `train/WNID/*` and `val/WNID/*`.
        folder: Where to write NAME.safetensors, and NAME.json for `pst-timm list`.
        records: Where to write NAME.json and NAME.md.
        command: What makes them again.

    Returns:
        The record.

    Raises:
        PSTError: If a run or the data will not do.
    """
    stages = [read_checkpoint(path / LAST, use_ema=True) for path in runs]
    last = stages[-1]
    name = f'{last.arch}.{TAG}'
    weights = folder / f'{name}.safetensors'
    convert(runs[-1] / LAST, weights, 'float16', use_ema=True, overwrite=True)
    # the arguments of the run tell where things are on its machine, the recipe all else
    written = read_checkpoint(weights)
    save_safetensors(written.weights, weights, {k: v for k, v in written.facts().items() if k != 'args'})
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
        seed=last.args['seed'],
        stages=[dict(recipe=stage.recipe, epochs=stage.epoch + 1, train_seconds=round(seconds_of(path), 1))
                for stage, path in zip(stages, runs)],
        hardware=hardware_name(torch.device('cpu')),
        versions=dict(python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__,
                      timm=timm.__version__),
        command=command)
    write_json(records / f'{name}.json', record)
    told = {key: record[key] for key in ('weights', 'data_set', 'images', 'img_size')}
    told.update({key: rows[0][key] for key in ('top1', 'top5', 'loss')}, command=command)
    write_json(folder / f'{name}.json', told)
    write_text(records / f'{name}.md', card(record, weights))
    return record


def card(record: Dict[str, Any], weights: Path) -> str:
    """The card of bundled weights: that of a published model, and what its record tells beside it."""
    checkpoint, model = read_checkpoint(weights), load_model(weights)
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
    stages = markdown_table([{
        'stage': str(i), 'px': str(stage['recipe']['img_size']), 'epochs': str(stage['epochs']),
        'minutes of training': f'{stage["train_seconds"] / 60:.0f}',
    } for i, stage in enumerate(record['stages'], start=1)])
    sections = [
        '## Intended use', '',
        'A start for fine-tuning on photographs, and an example of a trained model with PST. The 200 classes are some '
        'of ImageNet, at 64 x 64 pixels: it is no classifier of ImageNet-1k, and knows no fine detail. The images are '
        "for research under ImageNet's terms.", '',
        '## With fine attention', '', attention, '',
        '## By class', '', f'Of {record["images"] // record["classes"]} validation images each, coarse attention.', '',
        classes, '',
        '## Stages', '',
        f'Each began with the moving average that the one before left; seed {record["seed"]}, {record["hardware"]}, '
        f'torch {record["versions"]["torch"]}, timm {record["versions"]["timm"]}. Minutes are those of the steps, '
        'beside whatever else the machine did. In a checkout, this makes all of it again:', '',
        fence(record['command'], 'sh'), '', stages, '', 'What follows is the last stage.', '']
    return model_card(
        f'pst_timm/{record["weights"]}', checkpoint, model, accuracy, DATA_SET, 'apache-2.0',
        source=record['weights'], sections=sections)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Train, and write the weights, the record and the card; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m scripts.bundle_tin200', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', nargs='+', type=Path, metavar='RUN', help='stages that are trained already, in order')
    parser.add_argument('--data-dir', type=Path, required=True)
    parser.add_argument('--recipes', nargs='+', metavar='NAME', default=['cpu64', 'cpu96'], help='of the stages')
    parser.add_argument('--model', default='resnet18_pst')
    parser.add_argument('--output', type=Path, default=Path('output', 'train'), help='of the runs')
    parser.add_argument('--folder', type=Path, default=WEIGHTS, help='of the weights (default: in the package)')
    parser.add_argument('--records', type=Path, default=RECORDS, help='of record and card (default: results/weights)')
    args, extra = parser.parse_known_args(argv)
    setup_default_logging()
    return run(parser.prog, _work, parser, args, extra)


def _work(parser: argparse.ArgumentParser, args: argparse.Namespace, extra: Sequence[str]) -> None:
    changed = [
        f' --{key} {words}' for key, words in (('recipes', ' '.join(args.recipes)), ('model', args.model))
        if getattr(args, key) != parser.get_default(key)]
    command = ''.join([f'{parser.prog} --data-dir data/tiny-imagenet-200', *changed, *(f' {word}' for word in extra)])
    for folder in (args.folder, args.records):
        folder.mkdir(parents=True, exist_ok=True)
    recipes = [CONFIGS / f'{name}.yaml' for name in args.recipes]
    runs = args.runs or train_stages(recipes, args.data_dir, args.output, ['--model', args.model, *extra])
    for row in bundle(runs, args.data_dir, args.folder, args.records, command)['metrics']:
        print(row)


if __name__ == '__main__':
    sys.exit(main())
