"""The recipe in one call: prune, fine-tune by distillation, quantise, and let the original answer what is uncertain.

Every step is kept or dropped by what it costs on images that were set aside; the validation images are looked at once,
at the end, and decide nothing.
"""
import importlib.util
import logging
import math
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm.data import resolve_data_config

from pst_timm.checkpoints import label_names, load_model
from pst_timm.data.datasets import check_class_names, check_classes, class_names, create_eval_dataset
from pst_timm.engine import validate, validate_args
from pst_timm.metrics.binomial import binomial_interval
from pst_timm.utils.cost import count_gmacs, weight_bytes
from pst_timm.utils.errors import Interrupted, PSTError
from pst_timm.utils.files import write_json

from .calibration import ImageBatches, drawn_subset, open_images
from .cascade_fit import fit
from .held_out import HELD, REST, set_aside
from .latency import compare_latency
from .prune_folder import prune_to_folder, training_batches
from .quantize import SUFFIXES, quantize, report_of
from .runtime import open_source

__all__ = ['REPORT', 'Report', 'Settings', 'Step', 'slim']

_logger = logging.getLogger(__name__)

REPORT = 'slim.json'
WORK = 'work'
MOST_HELD = 1000  # images that the search for sensitive layers goes by
ORIGINAL, PRUNED, MODEL, WHOLE, CASCADE = 'original', 'pruned', 'model', 'whole', 'cascade.json'
FILES = [Path(f'{name}{SUFFIXES[backend]}') for name in (MODEL, WHOLE) for backend in ('onnxruntime', 'openvino')]
# all that a call makes in its folder; while it is written, a file has a point before its name and more behind it
OWN = {
    WORK, PRUNED, REPORT, CASCADE, 'cascade', 'cascade.png', *(path.with_suffix('.bin').name for path in FILES),
    *(name for path in FILES for name in (path.name, report_of(path).name))}


@dataclass(frozen=True)
class Settings:
    """How a model is made slim."""
    ratios: Sequence[float] = (0.5,)
    """Shares of the multiply-adds to remove; the first whose model is accurate enough is kept."""
    max_drop: float = 1.
    """Most percentage points of accuracy that may be lost, on the images set aside."""
    importance: str = 'l2'
    """See `deploy.prune.prune`."""
    scope: str = 'uniform'
    """Likewise."""
    round_to: int = 16
    """Likewise."""
    backend: str = 'onnxruntime'
    """See `deploy.quantize.quantize`."""
    cascade_cost: float = 0.9
    """Most mean latency of the cascade, as a share of that of its last stage; 0 for no cascade."""
    images: int = 256
    """Training images that batch norms are estimated on again, and that the quantised ranges come from."""
    held_out: float = 0.2
    """Share of the training images that is set aside to decide, from 0 to 0.5."""
    train_split: str = 'train'
    val_split: str = 'validation'
    batch_size: int = 64
    """Images at a time, where accuracy is measured."""
    workers: int = 0
    device: str = 'cpu'
    seed: int = 0
    rounds: int = 30
    """Rounds in which the models are timed in turn."""

    def check(self) -> None:
        """Raise a PSTError if a value is out of its range."""
        for name, value, low, high in (
                *(('ratios', ratio, 0, 1) for ratio in self.ratios), ('held_out', self.held_out, 0, 0.5)):
            if not low < value <= high or value == 1:
                raise PSTError(f'{name} must be above {low} and at most {high}, got {value}.')
        if not (self.max_drop >= 0 and self.cascade_cost >= 0) or math.inf in (self.max_drop, self.cascade_cost):
            raise PSTError('max_drop and cascade_cost must be finite, from 0 up.')


@dataclass
class Step:
    """A model that came of a step, or the reason why there is none."""
    name: str
    kept: bool
    note: str = ''
    path: str = ''
    """Below the folder of the report, empty for none."""
    held_out: Optional[float] = None
    """Top-1 in percent on the images set aside."""
    top1: Optional[float] = None
    """Top-1 in percent on the validation split."""
    interval: Optional[Tuple[float, float]] = None
    """Of it, at 95%."""
    params: Optional[int] = None
    gmacs: Optional[float] = None
    bytes: Optional[int] = None
    """Of the weights; of the whole file, where it is one of a runtime."""
    milliseconds: Optional[float] = None
    """Of an image, alone."""
    ratio: Optional[float] = None
    """Times as fast as the original in eager float32, timed in turn."""


@dataclass
class Report:
    """What became of a model."""
    source: str
    images: Dict[str, int]
    """How many images decided (`held_out`), and how many the final numbers are of (`validation`)."""
    settings: Dict[str, Any]
    steps: List[Step] = field(default_factory=list)
    """The original first."""

    def rows(self) -> List[Dict[str, Any]]:
        """A table of it."""
        table = []
        for step in self.steps:
            interval = '' if step.interval is None else f'{step.interval[0]:.1f} to {step.interval[1]:.1f}'
            table.append({
                'step': step.name, 'kept': 'yes' if step.kept else 'no', 'held-out top-1': _rounded(step.held_out, 2),
                'top-1': _rounded(step.top1, 2), '95%': interval, 'GMACs': _rounded(step.gmacs, 3),
                'MB': None if step.bytes is None else round(step.bytes / 1e6, 2), 'ms': _rounded(step.milliseconds, 2),
                'times as fast': _rounded(step.ratio, 2), 'note': step.note})
        # without data there are no accuracies to show
        return [{key: row[key] for key in row if any(r[key] not in (None, '') for r in table)} for row in table]


def _rounded(value: Optional[float], digits: int) -> Optional[float]:
    return None if value is None else round(value, digits)


class _Slimming:
    """What the steps share."""

    def __init__(self, source: str, folder: Path, settings: Settings, model: nn.Module):
        self.source, self.folder, self.settings, self.original = source, folder, settings, model
        self.work = folder / WORK
        self.config = resolve_data_config({}, model=model)
        self.steps: List[Step] = []
        self.models: Dict[str, nn.Module] = {}
        """What is timed, and measured at the end, by the name of its step."""
        self.passed = 0.
        """Share of the images that the cascade passes on to its last stage."""
        self.whole = model
        """That stage: the original, or the int8 file of it."""

    def add(self, step: Step, model: Optional[nn.Module] = None) -> None:
        """Note a step, and what came of it."""
        _logger.info(f'{step.name}: {"kept" if step.kept else "not kept"}{f" ({step.note})" if step.note else ""}.')
        self.steps.append(step)
        if model is not None:
            self.models[step.name] = model

    def judge(self, step: Step, model: nn.Module, data: Optional[Path]) -> None:
        """Decide by the images set aside whether a step is kept; without data it is."""
        step.kept = True
        if data is not None:
            step.held_out = self.accuracy(model, str(data), HELD, step.name)[0]
            lost = self.steps[0].held_out - step.held_out
            step.kept = lost <= self.settings.max_drop + 1e-9
            step.note = f'{abs(lost):.2f} points {"lost" if lost >= 0 else "won"} on the images set aside'

    @property
    def last(self) -> Step:
        """The last step that was kept."""
        return next(step for step in reversed(self.steps) if step.kept)

    def accuracy(self, model: nn.Module, data_dir: str, split: str, name: str) -> Tuple[float, int]:
        """Top-1 in percent on a split, and how many images it has."""
        s = self.settings
        args = validate_args(
            data_dir=data_dir, split=split, checkpoint=f'the model {name!r}',  # as messages call it; no file is opened
            batch_size=s.batch_size, workers=s.workers, device=s.device)
        [result] = validate(args, lambda *named, **kwargs: model)
        return result['top1'], len(create_eval_dataset(args, split, None))


def slim(
        source: str,
        folder: Path,
        data_dir: Optional[str],
        settings: Settings = Settings(),
        train_flags: Optional[Mapping[str, Any]] = None,
        overwrite: bool = False,
) -> Report:
    """Make a model small and fast, step by step, as far as its accuracy allows.

    Args:
        source: A model, whatever `load_model` takes.
        folder: Folder for all that comes of it and the report, `REPORT`; made if there is none. A call that was stopped
            goes on in it.
        data_dir: Folder with a training split and, for the final numbers, a validation split. None for the structure
            alone: nothing is trained or measured but the latency, which depends on no weights.
        settings: How.
        train_flags: Flags of the fine-tuning, see `finetune_flags`.
        overwrite: Whether what came of an earlier call may be replaced.

    Raises:
        PSTError: If the model, the data or the folder will not do. That a step fails or costs too much is no error: the
            report says it.
        Interrupted: If the process was asked to stop in the fine-tuning.
    """
    settings.check()
    folder = Path(folder)
    _check_packages(settings)
    _check_folder(folder, overwrite)
    model = load_model(source)
    run = _Slimming(source, folder, settings, model)
    if data_dir is not None:
        _check_splits(model, source, data_dir, settings)  # after hours of training it would be late
    run.work.mkdir(parents=True, exist_ok=True)
    data = None if data_dir is None else set_aside(
        data_dir, settings.train_split, run.work, settings.held_out, settings.seed)
    first = Step(ORIGINAL, True, bytes=weight_bytes(model))
    if data is not None:
        first.held_out, held = run.accuracy(model, str(data), HELD, ORIGINAL)
    run.add(first, model)
    small = _prune(run, data, train_flags or {})
    _quantize(run, data, small)
    if data is not None and settings.cascade_cost:
        _cascade(run, data)
    images = {} if data is None else {'held_out': held}
    if data_dir is not None and settings.val_split:
        for step in run.steps:
            if step.name in run.models:
                step.top1, count = run.accuracy(run.models[step.name], data_dir, settings.val_split, step.name)
                right = round(step.top1 * count / 100)
                low, high = binomial_interval(right, count)
                step.interval = 100 * low, 100 * high
                images['validation'] = count
    _time(run)
    report = Report(source, images, asdict(settings), run.steps)
    write_json(folder / REPORT, asdict(report))
    shutil.rmtree(run.work)
    return report


def _check_packages(settings: Settings) -> None:
    needed = {'torch_pruning': 'prune', 'onnxruntime': 'export', 'onnx': 'export'}
    if settings.backend == 'openvino':
        needed.update(openvino='openvino', nncf='openvino')
    missing = {extra: name for name, extra in needed.items() if importlib.util.find_spec(name) is None}
    if missing:
        raise PSTError(
            f"Making a model slim needs {', '.join(missing.values())}: pip install 'pst_timm[{','.join(missing)}]'.")


def _check_splits(model: nn.Module, source: str, data_dir: str, settings: Settings) -> None:
    """Make sure that the splits are there, and have the classes of the model."""
    for split in filter(None, (settings.train_split, settings.val_split)):
        dataset = create_eval_dataset(validate_args(data_dir=data_dir, split=split), split, None)
        check_class_names(class_names(dataset), label_names(model), f'the {split!r} split', f'the model {source}')
        check_classes(dataset, model.num_classes, True, split, choice=False)


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Make sure that nobody loses anything but what an earlier call made."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise PSTError(f'Cannot write to {folder}: it is not a folder. Name a new one.')
    names = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in names if name not in OWN and not any(name.startswith(f'.{own}.') for own in OWN)]
    if (folder / WORK).is_dir():
        within = sorted(path.name for path in (folder / WORK).iterdir())
        foreign += [f'{WORK}/{name}' for name in within if not name.startswith(('data-', 'pruned-'))]
    if foreign or (names and not {WORK, REPORT} & set(names)):
        raise PSTError(f'{folder} holds other files, such as {(foreign or names)[0]}: name a new or empty folder.')
    if REPORT in names and not overwrite:
        raise PSTError(f'{folder} holds what an earlier call made: name another folder, or add --overwrite.')
    for name in names:
        if name != WORK:  # in which a call that was stopped goes on
            path = folder / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _images(run: _Slimming, model: nn.Module, data: Optional[Path]) -> List[torch.Tensor]:
    """Batches of training images as a model takes them; noise without data."""
    s = run.settings
    if data is None:
        noise = torch.randn(s.images, *run.config['input_size'], generator=torch.Generator().manual_seed(s.seed))
        return list(noise.split(s.batch_size))
    batches = training_batches(model, run.source, dict(data_dir=str(data), train_split=REST), s.images, s.seed)
    return [images for images, _ in batches]


def _prune(run: _Slimming, data: Optional[Path], train_flags: Mapping[str, Any]) -> nn.Module:
    """The first pruned model that is accurate enough, or the original."""
    s = run.settings
    data_args = None if data is None else dict(data_dir=str(data), train_split=REST)
    for ratio in s.ratios:
        step, place = Step(f'pruned {ratio:.0%}', False), run.work / f'pruned-{ratio:g}'
        try:
            found = prune_to_folder(
                run.source, place, ratio, data_args=data_args, images=s.images, seed=s.seed,
                teacher=None if train_flags.get('kd_model_name') else run.source,
                train_flags={**train_flags, 'val_split': ''},  # the validation images wait until the end
                overwrite=True, importance=s.importance, scope=s.scope, round_to=s.round_to)
        except Interrupted:
            raise
        except PSTError as e:
            step.note = str(e)
            run.add(step)
            continue
        step.params, step.gmacs = found.params['after'], found.gmacs['after']
        run.judge(step, found.model, data)
        if not step.kept:
            run.add(step)
            continue
        place.rename(run.folder / PRUNED)
        step.path, step.bytes = PRUNED, weight_bytes(found.model)
        run.add(step, found.model)
        return found.model
    return run.original


def _quantize(run: _Slimming, data: Optional[Path], model: nn.Module) -> None:
    """An int8 file of a model, if it is accurate enough; with its most sensitive layers in float, if that is."""
    s = run.settings
    path = run.folder / f'{MODEL}{SUFFIXES[s.backend]}'
    step = Step('int8', False)
    common: Dict[str, Any] = dict(level='int8', backend=s.backend, timing=False, overwrite=True)
    try:
        images = _images(run, model, data)
        found = quantize(model, path, images, **common)
        small = open_source(path)
        run.judge(step, small, data)
        if not step.kept:
            # what may still be lost
            left = s.max_drop - (run.steps[0].held_out - run.last.held_out)
            some = drawn_subset(open_images(model, run.config, str(data), HELD), MOST_HELD, s.seed)
            held = ImageBatches(some, s.batch_size, s.workers)
            found = quantize(model, path, images, **common, max_drop=max(left, 0.), held_out=held)
            small = open_source(path)
            run.judge(step, small, data)
        if found.float_layers:
            step.note += f'; {len(found.float_layers)} layers in float'
    except PSTError as e:
        step.kept, step.note = False, '; '.join(filter(None, [step.note, str(e)]))
    if step.kept:
        step.bytes, step.path = found.bytes, path.name
        run.add(step, small)
        return
    _remove(run.folder, f'{MODEL}.*')
    run.add(step)


def _last_stage(run: _Slimming, data: Path) -> str:
    """What answers the uncertain images: the original, in int8 where the smaller model is."""
    s = run.settings
    if run.last.path in (PRUNED, '') or not (run.folder / PRUNED).is_dir():
        return run.source
    path = run.folder / f'{WHOLE}{SUFFIXES[s.backend]}'
    images = _images(run, run.original, data)
    quantize(run.original, path, images, level='int8', backend=s.backend, timing=False, overwrite=True)
    run.whole = open_source(path)
    return str(path)


def _cascade(run: _Slimming, data: Path) -> None:
    """The last of the small models before the original, if more images are right so."""
    s, step = run.settings, Step('cascade', False)
    small = run.last
    if small.name == ORIGINAL:
        step.note = 'there is no smaller model to begin with'
        run.add(step)
        return
    try:
        found = fit(
            [str(run.folder / small.path), _last_stage(run, data)], run.folder / CASCADE, str(data), HELD,
            max_cost=s.cascade_cost, relative=True, reparam=True, device=s.device, batch_size=s.batch_size,
            workers=s.workers, seed=s.seed, plot=importlib.util.find_spec('matplotlib') is not None)
    except PSTError as e:
        step.note = str(e)
        run.add(step)
        _remove(run.folder, f'{WHOLE}.*')
        return
    run.passed = found.route.reached[1] / found.route.reached[0]
    step.held_out = found.measured.accuracy
    step.kept = step.held_out > small.held_out
    numbers = '' if run.whole is run.original else ' in int8'
    step.note = f'{run.passed:.0%} of the images go on to the original{numbers}'
    if step.kept:
        step.path = CASCADE
        run.add(step, open_source(run.folder / CASCADE))
        return
    step.note += ': no more are right than without it'
    run.add(step)
    _remove(run.folder, f'{WHOLE}.*')
    _remove(run.folder, f'{Path(CASCADE).stem}*')


def _remove(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _time(run: _Slimming) -> None:
    """How fast all of them are beside the original, each as it is: files in their runtime, the rest in eager torch."""
    size = run.config['input_size']
    first, last = run.steps[0], run.steps[-1]
    cascade = last.name == 'cascade' and last.kept
    timed = {name: model for name, model in run.models.items() if name != 'cascade'}
    found = compare_latency(
        {**timed, WHOLE: run.whole} if cascade else timed, size, rounds=run.settings.rounds, baseline=ORIGINAL)
    for step in run.steps:
        if step.name in found:
            step.milliseconds, step.ratio = 1000 * found[step.name].seconds, found[step.name].ratio
    first.params = sum(p.numel() for p in run.original.parameters())
    first.gmacs = count_gmacs(run.original, size)
    if cascade:  # which answers most images at its first stage
        small = next(step for step in reversed(run.steps[:-1]) if step.kept)
        last.milliseconds = small.milliseconds + run.passed * 1000 * found[WHOLE].seconds
        last.ratio = 1 / (1 / small.ratio + run.passed / found[WHOLE].ratio)
