"""Train a model and its plain twin on Tiny ImageNet; put its weights into the package, with their record and card:

    python -m scripts.bundle_tin200 --data-dir data/tiny-imagenet-200            # resnet18_pst, hours on two cores
    python -m scripts.bundle_tin200 --data-dir data/tiny-imagenet-200 --model resnet50_pst --recipes gpu

Each recipe of `configs/tin200/` that is named is a stage, and goes on from the moving average that the one before left.
Those that name a model without PST train the plain twin, and are for both; in the first of the others the model with
PST begins with the trunk that the twin left. Started again, it goes on where it was stopped; stages that are done are
not trained again. The moving average of the last epoch is taken, never the best epoch.
"""
import argparse
import hashlib
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
import timm
import torch
import torchvision
from timm.utils import setup_default_logging

from pst_timm import __version__
from pst_timm.checkpoints import create_model, label_names, load_model, read_checkpoint
from pst_timm.checkpoints.conversion import convert, save_safetensors
from pst_timm.checkpoints.facts import as_plain
from pst_timm.commands.common import at_least, run
from pst_timm.data.datasets import create_eval_dataset
from pst_timm.data.sampling import labels_of
from pst_timm.engine import Interrupted, parse_train_args, validate, validate_args
from pst_timm.engine.flags import recipe
from pst_timm.engine.recovery import find_newest
from pst_timm.hub.card import Accuracy, model_card
from pst_timm.metrics.answers import unpack_answers
from pst_timm.metrics.intervals import paired_difference
from pst_timm.models import PSTModel
from pst_timm.models.digest import digest_note
from pst_timm.models.resnet_pst import WEIGHTS, tin200_cfg
from pst_timm.utils.devices import available_cores, check_device, hardware_name
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import read_csv, write_json, write_text, write_whole
from pst_timm.utils.markdown import fence, prose
from pst_timm.utils.tables import markdown_table

__all__ = ['Stage', 'bundle', 'card', 'main', 'measure', 'train_stages']

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / 'results' / 'weights'
TAG, DATA_SET, SPLIT = 'tin200', 'Tiny ImageNet', 'val'
CONFIGS = ROOT / 'configs' / TAG
CLASSES = tin200_cfg()['label_descriptions']
MODEL, STAGES, PROCESSES = 'resnet18_pst', ('cpu64', 'cpu96', 'cpu96b', 'cpu128'), 2
TOPK = [0, 2, 8]
LAST = 'last.pth.tar'
METRICS = ('img_size', 'topk', 'fine_fusion', 'top1', 'top5', 'loss', 'ece')


class Stage(NamedTuple):
    """A stage of a model, which is a run of train.py."""
    recipe: Path
    model: str
    output: Path
    processes: int
    start: Sequence[str] = ()  # where it begins: a flag and the checkpoint of the stage before

    @property
    def name(self) -> str:
        return f'{self.model}.{TAG}-{self.recipe.stem}'

    @property
    def last(self) -> Path:
        """Checkpoint of the last epoch."""
        return self.output / self.name / LAST

    def words(self, data: Path) -> List[str]:
        """Arguments of train.py."""
        return ['--config', str(self.recipe), '--data-dir', str(data), '--output', str(self.output), '--experiment',
                self.name, '--resume', 'auto', '--model', self.model, *self.start,
                *([] if plain_of(self.model) else ['--model-kwargs'])]  # those of the recipe are of the PST

    def is_done(self, data: Path) -> bool:
        """Whether it has come to its end.

        Raises:
            PSTError: If it was trained, or begun, with other settings, or before the stage before it was.
        """
        newest = find_newest(self.last.parent)
        if newest is None:
            return False
        checkpoint, args = read_checkpoint(newest), parse_train_args(self.words(data))
        settings, wanted = as_plain(checkpoint.recipe or {}), as_plain(recipe(args))
        other = [key for key in {**settings, **wanted} if settings.get(key) != wanted.get(key)]
        if checkpoint.args.get('seed') != args.seed:
            other.append('seed')
        if checkpoint.args.get('world_size') != self.processes:
            other.append('number of processes')
        folder, mend = self.last.parent, 'choose another --output, or remove that folder to train it anew.'
        if other:
            raise PSTError(f'{folder} was trained with other settings ({", ".join(sorted(other))}): {mend}')
        if self.start and newest.stat().st_mtime < Path(self.start[1]).stat().st_mtime:
            raise PSTError(f'{folder} is older than {self.start[1]}, from which it has to begin: {mend}')
        return newest.name == LAST and checkpoint.epoch + 1 >= args.epochs


def plain_of(name: str) -> Optional[str]:
    """Name of the plain twin of a model, None if it has no PST."""
    with torch.device('meta'):
        model = create_model(name)
    return model.plain_name if isinstance(model, PSTModel) else None


def model_in(path: Path) -> str:
    """The model that a recipe names."""
    return parse_train_args(['--config', str(path), '--data-dir', '.']).model


def train_stages(recipes: Sequence[Path], data: Path, output: Path, model: str, processes: int = 1) -> List[Stage]:
    """Train one stage after the other, as far as they are not trained yet.

    Args:
        recipes: Configuration files of the stages, in order; one that names a model without PST is of the plain twin.
        data: Tiny ImageNet, `train/WNID/*` and `val/WNID/*`.
        output: Where the runs are, each in a folder by the names of model, tag and recipe.
        model: The model with PST, or its plain twin.
        processes: How many train side by side, each with the batch size of the recipe.

    Returns:
        The stages.

    Raises:
        PSTError: If one cannot be trained, or was trained by another recipe, with another seed or from other weights.
        Interrupted: If the process was asked to stop; the same call goes on.
    """
    stages: List[Stage] = []
    for path in recipes:
        of = model if plain_of(model_in(path)) else plain_of(model) or model
        start = []
        if stages:
            start = ['--trunk-checkpoint' if stages[-1].model != of else '--initial-checkpoint', str(stages[-1].last)]
        stages.append(Stage(path, of, output, processes, start))
        if not stages[-1].is_done(data):
            _train(stages[-1], data)
    return stages


def _train(stage: Stage, data: Path) -> None:
    several = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(stage.processes)]
    words = [sys.executable, *(several if stage.processes > 1 else []), str(ROOT / 'train.py'), *stage.words(data)]
    threads = {'OMP_NUM_THREADS': str(max(1, available_cores() // stage.processes))} if stage.processes > 1 else {}
    print(f'Training {stage.name}.', flush=True)
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, env={**threads, **os.environ})
    try:
        code = process.wait()
    except KeyboardInterrupt as e:  # it has reached the other too, which saves its state
        process.wait()
        raise Interrupted('Stopped, as asked: the same command goes on.') from e
    if code:
        raise PSTError(f'{stage.name} ended before its time, with exit code {code}, for what is told above. Then the '
                       'same command goes on.')


def measure(weights: Path, data: Path, img_size: int, topk: Sequence[int] = ()) -> List[Dict[str, Any]]:
    """What `validate.py` says of weights on the validation images, with as many tokens in fine attention as `topk`."""
    return validate(validate_args(
        checkpoint=str(weights), data_dir=str(data), split=SPLIT, img_size=img_size, topk_sweep=list(topk) or None,
        answers=True, calibrate=True, workers=1, device_modules=['pst_timm']))


def by_class(right: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Dict[str, float]:
    """Top-1 in percent of each class, by its name."""
    return {name: round(100 * right[labels == label].mean().item(), 2) for label, name in enumerate(names)}


def end_of(folder: Path) -> Dict[str, float]:
    """Of the last epoch the loss in training, and top-1 in percent of the moving average on the validation images; and
    the wall time of the steps of all epochs, of one in which the run was stopped of the part after that alone."""
    last = read_csv(folder / 'summary.csv')[-1]
    seconds = sum(float(row['train_seconds']) for row in read_csv(folder / 'speed.csv'))
    return dict(train_loss=round(float(last['train_loss']), 3), top1=float(last['eval_top1']),
                train_seconds=round(seconds, 1))


def half_precision(source: Path, target: Path) -> Path:
    """Write the moving average of a checkpoint in half precision, with the words of its classes and a test size.

    The test size is 1.25 times that of training, in multiples of 32: random crops show things larger than whole images
    do (https://arxiv.org/abs/1906.06423). Of the run go along what it takes to repeat it, and not its arguments, which
    tell where things are on its machine. Returns the file.
    """
    convert(source, target, 'float16', use_ema=True)
    written = read_checkpoint(target)
    facts = {k: v for k, v in written.facts().items() if k != 'args'}
    cfg = facts['pretrained_cfg']
    cfg['label_descriptions'] = {name: CLASSES[name] for name in cfg['label_names']}
    size = 32 * math.ceil(1.25 * cfg['input_size'][-1] / 32)
    cfg['test_input_size'] = (cfg['input_size'][0], size, size)
    save_safetensors(written.weights, target, facts)
    return target


def checksums(path: Path) -> Dict[str, Any]:
    """What tells whether a file, and the weights in it, are those of a record."""
    return dict(sha256=hashlib.sha256(path.read_bytes()).hexdigest(), bytes=path.stat().st_size,
                notes=digest_note(read_checkpoint(path).weights))


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
        records: Where to write NAME.json and NAME.md, and the twin's weights, which studies begin with.
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
        weights = half_precision(stages[-1], Path(temporary, f'{name}.safetensors'))
        model = load_model(weights)
        plain = half_precision(twins[-1], Path(temporary, f'{model.plain_name}.{TAG}.safetensors'))
        names = label_names(model)
        labels = np.asarray(labels_of(create_eval_dataset(
            validate_args(data_dir=str(data), split=SPLIT), SPLIT, None)))
        img_size, test_size = (model.pretrained_cfg[key][-1] for key in ('input_size', 'test_input_size'))
        rows = measure(weights, data, test_size, TOPK) + measure(weights, data, img_size, TOPK[:1])
        [row] = measure(plain, data, test_size)
        mine, other = (unpack_answers(found['answers'], len(labels)) for found in (rows[0], row))
        difference = paired_difference({0: rows[0]['top1']}, {0: row['top1']}, {0: mine}, {0: other})
        record = dict(
            weights=name, data_set=DATA_SET, classes=len(names), images=len(labels), img_size=img_size,
            test_size=test_size, metrics=[{key: row[key] for key in METRICS if key in row} for row in rows],
            twin=dict(
                weights=plain.stem, **{key: row[key] for key in METRICS if key in row},
                difference=round(difference.mean, 4), over_images=[round(bound, 4) for bound in difference.images],
                **checksums(plain), end=end_of(twins[-1].parent)),
            top1_by_class=by_class(mine, labels, names), **checksums(weights), seed=last.args['seed'],
            stages=[dict(recipe=stage.recipe, processes=stage.args['world_size'], epochs=stage.epoch + 1,
                         **end_of(path.parent)) for stage, path in zip(runs, stages)],
            hardware=hardware_name(check_device('')),
            versions=dict(python=platform.python_version(), torch=torch.__version__,
                          torchvision=torchvision.__version__, timm=timm.__version__, pst_timm=__version__),
            command=command)
        text = card(record, weights)
        for place in (folder, records):
            place.mkdir(parents=True, exist_ok=True)
        for place, path in ((folder, weights), (records, plain)):
            write_whole(place / path.name, partial(shutil.copyfile, path))
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
        first['top1'], first['top5'], first['img_size'], cfg['crop_pct'], cfg['interpolation'],
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
        'stage': str(i), 'model': f'`{stage["recipe"]["model"]}`', 'px': str(stage['recipe']['img_size']),
        'epochs': str(stage['epochs']), 'loss in training': f'{stage["train_loss"]:.2f}',
        'top-1 (%) at its end': f'{stage["top1"]:.2f}', 'processes': str(stage['processes']),
        'minutes of training': f'{stage["train_seconds"] / 60:.0f}',
    } for i, stage in enumerate(record['stages'], start=1)])
    several = len(record['stages']) > 1
    began = (
        'Each after the first began with the moving average that the one before left, or its trunk, and is tested at '
        'its own size. How many there are, and how long, was settled with the accuracy of those before in sight; no '
        'epoch was chosen by it. The settings that follow this section are those of the last. ' if several else '')
    shared = [stage for stage in record['stages'] if stage['recipe']['model'] != checkpoint.arch]
    start = (
        'It went on from the trunk that this model began with, and with the classifier that it had there; the rest of '
        'this model was new then. ' if shared else '')
    sections = [
        '## Intended use', '',
        'A start for fine-tuning on photographs, and an example of a trained model with PST. It is no classifier of '
        'ImageNet-1k: it knows 200 of its 1000 classes, from images of 64 x 64 pixels, and no fine detail.', '',
        '## Data and terms', '',
        f'{DATA_SET}: 500 training images of each of {record["classes"]} classes of ImageNet, reduced to 64 x 64 '
        'pixels by its makers, and enlarged again where a stage has more. The images are for non-commercial research '
        "and education under ImageNet's terms: who uses the weights for more should ask whether these reach so far.",
        '',
        '## With fine attention, and at the size of training', '',
        attention, '',
        'ECE is the expected calibration error, from 0 to 1. Fine attention was never trained.', '',
        '## Beside its plain twin', '',
        f'`{twin["weights"]}`, trained by the same recipe with the same seed: {twin["top1"]:.2f}% top-1, '
        f'{twin["top5"]:.2f}% top-5, loss {twin["loss"]:.3f}, ECE {twin["ece"]:.3f}. The difference in top-1 is '
        f'{twin["difference"]:+.2f} points, 95% over images [{twin["over_images"][0]:+.2f}, '
        f'{twin["over_images"][1]:+.2f}]; one run of each says nothing of what another seed would give. {start}Its '
        f'last stage took {twin["end"]["train_seconds"] / 60:.0f} minutes, and ended with a loss in training of '
        f'{twin["end"]["train_loss"]:.2f}.', '',
        '## By class', '', f'Of {record["images"] // record["classes"]} validation images each, coarse attention.', '',
        classes, '',
        '## Stages', '',
        f'{began}Batch sizes are those of each process. Seed {record["seed"]}, {record["hardware"]}, torch '
        f'{record["versions"]["torch"]}, timm {record["versions"]["timm"]}. Minutes are those of the steps, beside '
        'whatever else the machine did; of an epoch in which the run was stopped, those after that. In a checkout, '
        'this makes all of it again:', '',
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
    parser.add_argument(
        '--recipes', nargs='+', metavar='NAME', default=list(STAGES),
        help='of the stages, in order; one that names a model without PST is of its plain twin')
    parser.add_argument(
        '--processes', type=at_least(1),
        help='that train side by side, each with the batch size of the recipe (default: 2 on a CPU, otherwise 1)')
    parser.add_argument('--output', type=Path, default=Path('output', 'train'), help='where the runs are')
    parser.add_argument('--folder', type=Path, default=WEIGHTS, help='of the weights (default: in the package)')
    parser.add_argument(
        '--records', type=Path, default=RECORDS,
        help="of record, card and the twin's weights (default: results/weights)")
    args = parser.parse_args(argv)
    setup_default_logging()
    return run(parser.prog, _work, args)


def _work(args: Namespace) -> None:
    plain = plain_of(args.model)
    if not plain:
        raise PSTError(f'{args.model} has no PST: choose a model of this package, such as {MODEL}.')
    processes = args.processes or (PROCESSES if check_device('').type == 'cpu' else 1)
    command = 'python -m scripts.bundle_tin200 --data-dir data/tiny-imagenet-200' + (
        '' if args.model == MODEL else f' --model {args.model}') + (
        '' if args.recipes == list(STAGES) else f' --recipes {" ".join(args.recipes)}') + (
        f' --processes {processes}')
    found = sorted(path.name for path in (args.data_dir / 'train').glob('*') if path.is_dir())
    if found != list(CLASSES):
        raise PSTError(
            f'{args.data_dir} is not {DATA_SET}: expected its {len(CLASSES)} class folders in train/, from '
            f'{min(CLASSES)} to {max(CLASSES)}, and found {len(found)}.')
    recipes = [CONFIGS / f'{name}.yaml' for name in args.recipes]
    if not plain_of(model_in(recipes[-1])):
        raise PSTError(f'{recipes[-1]} trains no model with PST: a recipe that does has to be the last.')
    if args.folder.resolve() == args.records.resolve():
        raise PSTError(f'--folder and --records are both {args.folder}: name two folders.')
    stages, twins = ([stage.last for stage in train_stages(recipes, args.data_dir, args.output, name, processes)]
                     for name in (args.model, plain))
    record = bundle(stages, twins, args.data_dir, args.folder, args.records, command)
    for row in (*record['metrics'], record['twin']):
        print(row)
    name, size, test = (record[key] for key in ('weights', 'img_size', 'test_size'))
    crop_pct = read_checkpoint(args.folder / f'{name}.safetensors').pretrained_cfg['crop_pct']
    if name not in timm.list_pretrained() or timm.get_pretrained_cfg(name).notes != (record['notes'],):
        print(
            f'Now default_cfgs, where {args.model} is, needs (WEIGHTS, {TAG}_cfg: pst_timm.models.resnet_pst)\n'
            f'    {name!r}: pst_cfg(\n'
            f"        file=str(WEIGHTS / '{name}.safetensors'), **{TAG}_cfg(),\n"
            f'        notes=({record["notes"]!r},),\n'
            f'        input_size=(3, {size}, {size}), test_input_size=(3, {test}, {test}), '
            f'pool_size=({size // 32}, {size // 32}),\n        crop_pct={crop_pct}),')


if __name__ == '__main__':
    sys.exit(main())
