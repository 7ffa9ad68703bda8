"""Train a model and its plain twin on Tiny ImageNet; put its weights into the package, with their record and card:

    python -m scripts.bundle_tin200 --data-dir data/tiny-imagenet-200            # resnet18_pst, hours on two cores
    python -m scripts.bundle_tin200 --data-dir data/tiny-imagenet-200 --model resnet50_pst --recipes gpu

Each recipe of `configs/tin200/` that is named is a stage, and goes on from the moving average that the one before left.
Started again, it goes on where it was stopped; stages that are done are not trained again. The moving average of the
last epoch is taken, never the best epoch: the validation images are looked at on the way, and choose none.
"""
import argparse
import hashlib
import math
import platform
import shutil
import sys
import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import timm
import torch
import torchvision
from timm.data import ImageNetInfo
from timm.utils import setup_default_logging

from pst_timm import __version__
from pst_timm.checkpoints import create_model, label_names, load_model, read_checkpoint
from pst_timm.checkpoints.conversion import convert, save_safetensors
from pst_timm.checkpoints.facts import as_plain
from pst_timm.checkpoints.reading import Checkpoint
from pst_timm.commands.common import run
from pst_timm.data.datasets import create_eval_dataset
from pst_timm.data.sampling import labels_of
from pst_timm.engine import Interrupted, parse_train_args, train, validate, validate_args
from pst_timm.engine.flags import recipe
from pst_timm.engine.recovery import find_newest
from pst_timm.hub.card import Accuracy, model_card
from pst_timm.metrics.answers import unpack_answers
from pst_timm.metrics.intervals import paired_difference
from pst_timm.models import PSTModel
from pst_timm.models.digest import digest_note
from pst_timm.models.resnet_pst import SYNSETS, WEIGHTS
from pst_timm.utils.devices import check_device, hardware_name
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import read_csv, write_json, write_text, write_whole
from pst_timm.utils.markdown import fence, prose
from pst_timm.utils.tables import markdown_table

__all__ = ['bundle', 'card', 'main', 'measure', 'train_stages']

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / 'results' / 'weights'
TAG, DATA_SET, SPLIT = 'tin200', 'Tiny ImageNet', 'val'
CONFIGS = ROOT / 'configs' / TAG
CLASSES = SYNSETS.read_text(encoding='utf-8').split()
MODEL, STAGES = 'resnet18_pst', ('cpu64', 'cpu96', 'cpu128')
TOPK = [0, 2, 8]
LAST = 'last.pth.tar'
METRICS = ('img_size', 'topk', 'fine_fusion', 'top1', 'top5', 'loss', 'ece')


def train_stages(recipes: Sequence[Path], data: Path, output: Path, *flags: str) -> List[Path]:
    """Train one stage after the other, as far as they are not trained yet.

    Args:
        recipes: Configuration files of the stages, in order.
        data: Tiny ImageNet, `train/WNID/*` and `val/WNID/*`.
        output: Where the runs are, each in a folder by the names of model, tag and recipe.
        flags: Further flags of all stages, for the model.

    Returns:
        The last checkpoints of the runs.

    Raises:
        PSTError: If one cannot be trained, or was trained by another recipe, with another seed or from other weights.
        Interrupted: If the process was asked to stop; the same call goes on.
    """
    found: List[Path] = []
    for path in recipes:
        words = ['--config', str(path), '--data-dir', str(data), '--output', str(output), '--resume', 'auto', *flags]
        if found:
            words += ['--initial-checkpoint', str(found[-1])]
        args = parse_train_args(words)
        args.experiment = f'{args.model}.{TAG}-{path.stem}'
        folder = output / args.experiment
        if not _is_trained(folder, args, found):
            try:
                train(args)
            except Interrupted as e:  # which names flags of train.py
                raise Interrupted('Stopped, as asked: the same command goes on.') from e
        found.append(folder / LAST)
    return found


def _is_trained(folder: Path, args: Namespace, before: Sequence[Path]) -> bool:
    """Whether a run has come to its end; `before` are the last checkpoints of the stages before it.

    Raises:
        PSTError: If it was trained, or begun, with other settings, or before the stage before it was.
    """
    newest = find_newest(folder)
    if newest is None:
        return False
    checkpoint = read_checkpoint(newest)
    settings, wanted = as_plain(checkpoint.recipe or {}), as_plain(recipe(args))
    other = [key for key in {**settings, **wanted} if settings.get(key) != wanted.get(key)]
    if checkpoint.args.get('seed') != args.seed:
        other.append('seed')
    mend = 'choose another --output, or remove that folder to train it anew.'
    if other:
        raise PSTError(f'{folder} was trained with other settings ({", ".join(sorted(other))}): {mend}')
    if before and newest.stat().st_mtime < before[-1].stat().st_mtime:
        raise PSTError(f'{folder} is older than {before[-1]}, from which it has to begin: {mend}')
    return newest.name == LAST and checkpoint.epoch + 1 >= args.epochs


def measure(weights: Path, data: Path, img_size: int, topk: Sequence[int] = ()) -> List[Dict[str, Any]]:
    """What `validate.py` says of weights on the validation images, with as many tokens in fine attention as `topk`."""
    return validate(validate_args(
        checkpoint=str(weights), data_dir=str(data), split=SPLIT, img_size=img_size, topk_sweep=list(topk) or None,
        answers=True, calibrate=True, workers=1, device_modules=['pst_timm']))


def by_class(right: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Dict[str, float]:
    """Top-1 in percent of each class, by its name."""
    return {name: round(100 * right[labels == label].mean().item(), 2) for label, name in enumerate(names)}


def seconds_of(folder: Path) -> float:
    """Wall time that a run spent on training steps; of an epoch in which it was stopped, the part after that."""
    return sum(float(row['train_seconds']) for row in read_csv(folder / 'speed.csv'))


def end_of(folder: Path) -> Dict[str, float]:
    """Loss in training, and top-1 in percent of the moving average on the validation images, of the last epoch."""
    last = read_csv(folder / 'summary.csv')[-1]
    return dict(train_loss=round(float(last['train_loss']), 3), top1=float(last['eval_top1']))


def half_precision(source: Path, target: Path) -> Checkpoint:
    """Write the moving average of a checkpoint in half precision, with what its classes are in words.

    Of the run go along what it takes to repeat it, and not its arguments, which tell where things are on its machine.
    """
    convert(source, target, 'float16', use_ema=True)
    written, words = read_checkpoint(target), ImageNetInfo()
    facts = {k: v for k, v in written.facts().items() if k != 'args'}
    facts['pretrained_cfg']['label_descriptions'] = {
        name: words.label_name_to_description(name) for name in written.pretrained_cfg['label_names']}
    save_safetensors(written.weights, target, facts)
    return written


def bundle(
        stages: Sequence[Path],
        twins: Sequence[Path],
        data: Path,
        folder: Path,
        records: Path,
        command: str,
) -> Dict[str, Any]:
    """Write the weights, measure what was written, and write record and card; nothing if anything goes wrong.

    Args:
        stages: Last checkpoints of the stages, in order.
        twins: Those of the plain twin.
        data: Tiny ImageNet, `train/WNID/*` and `val/WNID/*`.
        folder: Where to write NAME.safetensors, and NAME.json for `pst-timm list`.
        records: Where to write NAME.json and NAME.md.
        command: What makes them again.

    Returns:
        The record.

    Raises:
        PSTError: If a run or the data will not do.
    """
    runs = [read_checkpoint(path, use_ema=True) for path in stages]
    last = runs[-1]
    name = f'{last.arch}.{TAG}'
    with tempfile.TemporaryDirectory() as temporary:
        weights = Path(temporary, f'{name}.safetensors')
        written = half_precision(stages[-1], weights)
        model = load_model(weights)
        names = label_names(model)
        labels = np.asarray(labels_of(create_eval_dataset(
            validate_args(data_dir=str(data), split=SPLIT), SPLIT, None)))
        img_size = model.pretrained_cfg['input_size'][-1]
        # random crops show things larger than whole images do (https://arxiv.org/abs/1906.06423)
        larger = 32 * math.ceil(1.25 * img_size / 32)
        rows = measure(weights, data, img_size, TOPK) + measure(weights, data, larger, TOPK[:1])
        [plain] = measure(twins[-1], data, img_size)
        mine, other = (unpack_answers(row['answers'], len(labels)) for row in (rows[0], plain))
        found = paired_difference({0: rows[0]['top1']}, {0: plain['top1']}, {0: mine}, {0: other})
        record = dict(
            weights=name, data_set=DATA_SET, classes=len(names), images=len(labels), img_size=img_size,
            metrics=[{key: row[key] for key in METRICS if key in row} for row in rows],
            twin=dict(
                model=model.plain_name, **{key: plain[key] for key in METRICS if key in plain},
                difference=round(found.mean, 4), over_images=[round(bound, 4) for bound in found.images],
                train_seconds=round(sum(seconds_of(path.parent) for path in twins), 1)),
            top1_by_class=by_class(mine, labels, names),
            sha256=hashlib.sha256(weights.read_bytes()).hexdigest(), bytes=weights.stat().st_size,
            notes=digest_note(written.weights), seed=last.args['seed'],
            stages=[dict(recipe=stage.recipe, epochs=stage.epoch + 1, **end_of(path.parent),
                         train_seconds=round(seconds_of(path.parent), 1)) for stage, path in zip(runs, stages)],
            hardware=hardware_name(check_device(last.args.get('device') or '')),
            versions=dict(python=platform.python_version(), torch=torch.__version__,
                          torchvision=torchvision.__version__, timm=timm.__version__, pst_timm=__version__),
            command=command)
        text = card(record, weights)
        for place in (folder, records):
            place.mkdir(parents=True, exist_ok=True)
        write_whole(folder / weights.name, partial(shutil.copyfile, weights))
    told = {**record, **rows[0]}
    keys = ('weights', 'data_set', 'images', 'img_size', 'top1', 'top5', 'loss', 'command')
    write_json(folder / f'{name}.json', {key: told[key] for key in keys})
    write_json(records / f'{name}.json', record)
    write_text(records / f'{name}.md', text)
    return record


def card(record: Dict[str, Any], weights: Path) -> str:
    """The card of bundled weights: that of a published model, and what its record tells beside it."""
    checkpoint, model = read_checkpoint(weights), load_model(weights)
    first, twin = record['metrics'][0], record['twin']
    cfg = model.pretrained_cfg
    accuracy = Accuracy(
        first['top1'], first['top5'], record['img_size'], cfg['crop_pct'], cfg['interpolation'],
        f'by validate.py on the {record["images"]:,} validation images')
    words = cfg['label_descriptions']
    attention = markdown_table([{
        'px': str(row['img_size']),
        'attention': f'k = {row["topk"]}, {row["fine_fusion"]}' if row['topk'] else 'coarse',
        'top-1 (%)': f'{row["top1"]:.2f}', 'top-5 (%)': f'{row["top5"]:.2f}', 'loss': f'{row["loss"]:.3f}',
        'ECE': f'{row["ece"]:.3f}',
    } for row in record['metrics']])
    classes = markdown_table([
        {'class': name, 'what it is': prose(words[name]), 'top-1 (%)': f'{top1:.0f}'}
        for name, top1 in record['top1_by_class'].items()])
    stages = markdown_table([{
        'stage': str(i), 'px': str(stage['recipe']['img_size']), 'epochs': str(stage['epochs']),
        'loss in training': f'{stage["train_loss"]:.2f}', 'top-1 (%) at its end': f'{stage["top1"]:.2f}',
        'minutes of training': f'{stage["train_seconds"] / 60:.0f}',
    } for i, stage in enumerate(record['stages'], start=1)])
    several = len(record['stages']) > 1
    began = ('Each began with the moving average that the one before left, and is tested at its own size; what follows '
             'this section is the last. ' if several else '')
    sections = [
        '## Intended use', '',
        'A start for fine-tuning on photographs, and an example of a trained model with PST. It is no classifier of '
        'ImageNet-1k: it knows 200 of its 1000 classes, from images of 64 x 64 pixels, and no fine detail.', '',
        '## Data and terms', '',
        f'{DATA_SET}: 500 training images of each of {record["classes"]} classes of ImageNet, reduced to 64 x 64 '
        'pixels by its makers, and enlarged again where a stage has more. The images are for non-commercial research '
        "and education under ImageNet's terms: who uses the weights for more should ask whether these reach so far.",
        '',
        '## With fine attention, and on larger images', '',
        attention, '',
        'ECE is the expected calibration error, from 0 to 1. Fine attention was never trained.', '',
        '## Beside its plain twin', '',
        f'`{twin["model"]}`, trained by the same recipe with the same seed: {twin["top1"]:.2f}% top-1, '
        f'{twin["top5"]:.2f}% top-5, loss {twin["loss"]:.3f}, ECE {twin["ece"]:.3f}. The difference in top-1 is '
        f'{twin["difference"]:+.2f} points, 95% over images [{twin["over_images"][0]:+.2f}, '
        f'{twin["over_images"][1]:+.2f}]; one run of each says nothing of what another seed would give.', '',
        '## By class', '', f'Of {record["images"] // record["classes"]} validation images each, coarse attention.', '',
        classes, '',
        '## Stages', '',
        f'{began}Seed {record["seed"]}, {record["hardware"]}, torch {record["versions"]["torch"]}, timm '
        f'{record["versions"]["timm"]}. Minutes are those of the steps, beside whatever else the machine did; of an '
        'epoch in which the run was stopped, those after that. In a checkout, this makes all of it again:', '',
        fence(record['command'], 'sh'), '', stages, '']
    return model_card(
        f'pst_timm/{record["weights"]}', checkpoint, model, accuracy, DATA_SET, 'apache-2.0',
        source=record['weights'], sections=sections)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Train, and write the weights, the record and the card; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m scripts.bundle_tin200', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', type=Path, required=True)
    parser.add_argument('--model', default=MODEL)
    parser.add_argument('--recipes', nargs='+', metavar='NAME', default=list(STAGES), help='of the stages, in order')
    parser.add_argument('--output', type=Path, default=Path('output', 'train'), help='where the runs are')
    parser.add_argument('--folder', type=Path, default=WEIGHTS, help='of the weights (default: in the package)')
    parser.add_argument('--records', type=Path, default=RECORDS, help='of record and card (default: results/weights)')
    args = parser.parse_args(argv)
    setup_default_logging()
    return run(parser.prog, _work, args)


def _work(args: Namespace) -> None:
    with torch.device('meta'):
        model = create_model(args.model)
    if not isinstance(model, PSTModel):
        raise PSTError(f'{args.model} has no PST: choose a model of this package, such as {MODEL}.')
    command = 'python -m scripts.bundle_tin200 --data-dir data/tiny-imagenet-200' + (
        '' if args.model == MODEL else f' --model {args.model}') + (
        '' if args.recipes == list(STAGES) else f' --recipes {" ".join(args.recipes)}')
    found = sorted(path.name for path in (args.data_dir / 'train').glob('*') if path.is_dir())
    if found != CLASSES:
        raise PSTError(
            f'{args.data_dir} is not {DATA_SET}: expected its {len(CLASSES)} class folders in train/, from '
            f'{CLASSES[0]} to {CLASSES[-1]}, and found {len(found)}.')
    recipes = [CONFIGS / f'{name}.yaml' for name in args.recipes]
    where = recipes, args.data_dir, args.output
    stages = train_stages(*where, '--model', args.model)
    twins = train_stages(*where, '--model', model.plain_name, '--model-kwargs')
    record = bundle(stages, twins, args.data_dir, args.folder, args.records, command)
    for row in (*record['metrics'], record['twin']):
        print(row)
    name, size = record['weights'], record['img_size']
    if name not in timm.list_pretrained() or timm.get_pretrained_cfg(name).notes != (record['notes'],):
        print(
            f'Now default_cfgs, where {args.model} is, needs\n'
            f'    {name!r}: pst_cfg(\n'
            f"        file=str(WEIGHTS / '{name}.safetensors'), **_{TAG}(),\n"
            f'        notes=({record["notes"]!r},),\n'
            f'        input_size=(3, {size}, {size}), pool_size=({size // 32}, {size // 32}), crop_pct=1.0),')


if __name__ == '__main__':
    sys.exit(main())
