"""One cell of a study: a model trained with one seed, evaluated, and put on record."""
import importlib.util
import json
import platform
from argparse import Namespace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Iterable, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import timm
import torch
import torchvision
from timm.data import resolve_data_config
from torch.nn.functional import cross_entropy

from pst_timm.checkpoints import load_model
from pst_timm.checkpoints.reading import has_weights_ending
from pst_timm.data.datasets import create_eval_dataset
from pst_timm.data.loaders import create_eval_loader
from pst_timm.engine import factories, train, train_args, validate, validate_args
from pst_timm.engine.flags import shared_keys
from pst_timm.metrics.answers import pack_answers
from pst_timm.metrics.calibration import calibration_error
from pst_timm.utils.cost import count_gmacs
from pst_timm.utils.devices import check_device, hardware_name
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import read_csv, write_json, write_text
from pst_timm.version import __version__

from .config import Cell
from .draws import write_draw
from .results import Row

__all__ = ['check_needs', 'read_record', 'run_cell', 'settings_of']

RECORD = 'cell.json'
SETTINGS = 'settings.json'
CHECKPOINT = 'last.pth.tar'
# inverse strengths of the regularisation that a probe chooses from
PROBE_C = (1e-4, 1e-3, 1e-2, 1e-1)


def check_needs(cells: Iterable[Cell]) -> None:
    """Raise a PSTError if cells need weights or packages that are not there; later it would be late to say so."""
    for cell in cells:
        if has_weights_ending(cell.start):  # the checksum of a file that is there has none
            raise PSTError(
                f'There is no checkpoint {cell.start}, which {cell.id} is to begin with: train it first, or mend its '
                f'path in the study.')
    if any(c.probe for c in cells) and importlib.util.find_spec('sklearn') is None:
        raise PSTError(
            "The linear probe needs scikit-learn: pip install 'pst_timm[demo]', or take probe out of the study.")


def run_cell(cell: Cell, data_dir: str, output: Path, device: str = '', jobs: int = 1) -> Row:
    """Train a cell, or go on with it, evaluate it, and write its record.

    Args:
        cell: The cell.
        data_dir: Image folder with the splits.
        output: Folder of the study; the cell gets a folder in it.
        device: Device, the best present if empty.
        jobs: Cells that run side by side on this machine, for the record.

    Returns:
        The record, as in `output/id/cell.json`.

    Raises:
        PSTError: As `train` and `validate`.
    """
    check_needs([cell])
    folder = output / cell.id
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SETTINGS, cell.settings)
    given = cell.given(data_dir, output, device)
    if cell.draw is not None:
        args = train_args(**cell.train)
        given['data_dir'] = str(folder / 'images')
        write_draw(
            cell.draw, Path(data_dir), folder / 'images', (args.train_split, args.val_split), cell.classes)
    settings = vars(train_args(**cell.train, **given))
    write_classes(Path(settings['class_map']), cell.classes)
    # where no epoch is due for it before the last, the evaluation below is enough
    late = settings['val_interval'] > settings['epochs']
    train(train_args(**dict(settings, val_split='') if late else settings))
    evaluations = evaluate_cell(cell, settings, folder)
    record = dict(
        settings=cell.settings,
        cell=describe(cell, settings, folder, evaluations[0], jobs),
        evaluations=evaluations,
        curves=read_csv(folder / 'summary.csv'),
    )
    write_json(folder / RECORD, record)
    return record


def read_record(path: Path) -> Optional[Row]:
    """The record of a cell, None if it is not there.

    Raises:
        PSTError: If it is damaged.
    """
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
        if {'settings', 'cell', 'evaluations', 'curves'} <= set(record):
            return record
    except (TypeError, ValueError):
        pass
    raise PSTError(f'{path} is damaged: remove it, and the cell is evaluated again; its training is kept.')


def settings_of(folder: Path) -> Optional[Row]:
    """The settings that a cell was begun with, None if it was not."""
    path = folder / SETTINGS
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except ValueError:
        raise PSTError(f'{path} is damaged: remove its folder to run the cell again.') from None


def write_classes(path: Path, classes: Sequence[str]) -> str:
    """Write a class map for timm's readers, one folder name per line; returns the path as text."""
    write_text(path, ''.join(f'{name}\n' for name in classes))
    return str(path)


def evaluation_settings(settings: Mapping[str, Any], folder: Path) -> Row:
    """Flags of `validate` for the last checkpoint of a cell: the last epoch, so that the images choose nothing."""
    return dict(
        {k: settings[k] for k in shared_keys('model', 'preprocessing', 'machine')},
        checkpoint=str(folder / CHECKPOINT),
        use_ema=settings['model_ema'],
        data_dir=settings['data_dir'],
        split=settings['val_split'],
        class_map=settings['class_map'],
        num_classes=settings['num_classes'],
        batch_size=settings['validation_batch_size'] or settings['batch_size'],
    )


def evaluate_cell(cell: Cell, settings: Mapping[str, Any], folder: Path) -> List[Row]:
    """Evaluate the last checkpoint: as it is, with fine attention, and as a source of features.

    Returns:
        Rows with evaluation ('final', 'sweep' or 'probe'), img_size, topk, fine_fusion, images, top1 and top5 in
        percent, loss, ece (0 to 1) and answers; the final row first.
    """
    common = evaluation_settings(settings, folder)
    metrics = dict(calibrate=True, answers=True)
    images = len(open_split(common, settings['val_split'])[1])
    [final] = validate(validate_args(**common, **metrics))
    rows = [evaluation_row('final', images, final)]
    for size in cell.sweep.get('img_size', ()):
        sized = dict(common, img_size=size, torchscript=False)  # a scripted model keeps the attention it has
        rows += [
            evaluation_row('sweep', images, r)
            for r in validate(validate_args(**sized, **metrics, topk_sweep=cell.sweep['topk']))]
    if cell.probe:
        rows.append(probe(cell.probe, common, settings, folder))
    return rows


def evaluation_row(evaluation: str, images: int, result: Mapping[str, Any]) -> Row:
    """The part of a result of `validate` that goes on record."""
    keys = ('img_size', 'topk', 'fine_fusion', 'top1', 'top5', 'loss', 'ece', 'answers')
    return dict(evaluation=evaluation, images=images, **{k: result.get(k, '') for k in keys})


def open_split(common: Mapping[str, Any], split: str, **kwargs: Any) -> Tuple[Namespace, Any]:
    """Arguments and data of an evaluation."""
    args = validate_args(**dict(common, split=split, **kwargs))
    factories.import_modules(args.device_modules)
    return args, create_eval_dataset(args, split, None)


def probe(classes: Sequence[str], common: Mapping[str, Any], settings: Mapping[str, Any], folder: Path) -> Row:
    """Logistic regression on the frozen network's pooled features, on classes that it has never seen.

    The strength of the regularisation is chosen on every fifth training image; the validation images choose nothing.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    class_map = write_classes(folder / 'probe_classes.txt', classes)
    x, y = pooled_features(common, settings['train_split'], class_map)
    x_val, y_val = pooled_features(common, settings['val_split'], class_map)
    held = np.arange(len(y)) % 5 == 0

    def fit(c: float, chosen: np.ndarray):
        return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000)).fit(x[chosen], y[chosen])

    best = max(PROBE_C, key=lambda c: fit(c, ~held).score(x[held], y[held]))
    probabilities = torch.from_numpy(fit(best, np.full(len(y), True)).predict_proba(x_val))
    logits, target = probabilities.clamp(min=1e-12).log(), torch.from_numpy(y_val)
    order = logits.argsort(dim=-1, descending=True)
    hits = order.eq(target[:, None])
    return dict(
        evaluation='probe', images=len(target), img_size=common.get('img_size', ''), topk='', fine_fusion='',
        top1=round(100 * hits[:, :1].any(dim=1).double().mean().item(), 4),
        top5=round(100 * hits[:, :5].any(dim=1).double().mean().item(), 4),
        loss=round(cross_entropy(logits, target).item(), 6),
        ece=round(calibration_error(logits, target), 5),
        answers=pack_answers(hits[:, 0].tolist()),
    )


@torch.inference_mode()
def pooled_features(common: Mapping[str, Any], split: str, class_map: str) -> Tuple[np.ndarray, np.ndarray]:
    """Features before the classifier (N, channels) and labels (N,) of the images of some classes, in order."""
    args, dataset = open_split(common, split, class_map=class_map)
    device = factories.init_device(args)
    model = load_model(args.checkpoint, use_ema=args.use_ema)
    model.reset_classifier(0)
    model.to(device).eval()
    data_config = resolve_data_config(vars(args), model=model)
    loader = create_eval_loader(args, dataset, data_config, args.batch_size, torch.float32)
    features, targets = [], []
    for images, target in loader:
        features.append(model(images.to(device)).float().cpu())
        targets.append(target.cpu())
    return torch.cat(features).numpy(), torch.cat(targets).numpy()


def describe(cell: Cell, settings: Mapping[str, Any], folder: Path, final: Mapping[str, Any], jobs: int) -> Row:
    """Everything about a cell in one row: seed, data, metrics, speed, versions, hardware."""
    args = train_args(**settings)
    device = check_device(args.device or '')
    _, dataset = open_split(evaluation_settings(settings, folder), args.train_split)
    model = load_model(folder / CHECKPOINT)
    input_size = (model.pretrained_cfg['input_size'][0], final['img_size'], final['img_size'])
    speed = read_csv(folder / 'speed.csv')
    seconds = sum(float(r['train_seconds']) for r in speed)
    images = sum(float(r['train_seconds']) * float(r['train_images_per_second']) for r in speed)
    return dict(
        cell=cell.name,
        model=args.model,
        model_kwargs=' '.join(f'{k}={v}' for k, v in args.model_kwargs.items()),
        seed=cell.seed,
        epochs=len(speed),
        img_size=final['img_size'],
        classes=len(cell.classes),
        train_images=len(dataset),
        val_images=final['images'],
        **{k: final[k] for k in ('top1', 'top5', 'loss', 'ece')},
        params=sum(p.numel() for p in model.parameters()),
        gmacs=round(count_gmacs(model, input_size), 4),
        train_seconds=round(seconds, 1),
        images_per_second=round(images / seconds, 1),
        wait_share=round(sum(float(r['train_wait_share']) * float(r['train_seconds']) for r in speed) / seconds, 4),
        precision=args.amp_dtype if args.amp else args.model_dtype or 'float32',
        device=device.type,
        hardware=hardware_name(device),
        threads=torch.get_num_threads(),
        jobs=jobs,
        torch=torch.__version__,
        torchvision=torchvision.__version__,
        timm=timm.__version__,
        pst_timm=__version__,
        python=platform.python_version(),
        date=datetime.now(timezone.utc).isoformat(timespec='seconds'),
        start=cell.start,
        settings=json.dumps(cell.train, sort_keys=True),
    )
