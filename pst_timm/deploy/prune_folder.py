"""A model pruned, trained further if there are images to do it with, and written as a folder that timm reads."""
from pathlib import Path
from typing import Any, List, Mapping, NamedTuple, Optional, Sequence

import torch.nn as nn

from pst_timm.checkpoints import load_model, preprocessing
from pst_timm.checkpoints.folder import check_target, save_folder
from pst_timm.checkpoints.schema import parse_json
from pst_timm.utils.cost import count_gmacs
from pst_timm.utils.files import write_json

from .calibration import ImageBatches, drawn_subset, open_images
from .finetune import finetune, work_folder
from .importance import Batch
from .prune import prune, ratio_for_latency

__all__ = ['Pruned', 'prune_to_folder', 'training_batches']

BATCH = 64
RATIO = 'latency.json'  # beside the trainings, what was found


class Pruned(NamedTuple):
    """What was done to a model."""
    model: nn.Module
    ratio: float
    """Share of the multiply-adds that was asked for, or found for a latency."""
    gmacs: Mapping[str, float]
    """Multiply-adds of an image in billions, 'before' and 'after'."""
    params: Mapping[str, int]
    """Parameters, likewise."""
    checkpoint: Optional[Path]
    """The last checkpoint of the fine-tuning, None if there was none."""


def prune_to_folder(
        source: str,
        folder: Path,
        ratio: float = 0.5,
        latency: Optional[Mapping[str, float]] = None,
        data_args: Optional[Mapping[str, Any]] = None,
        images: int = 512,
        seed: int = 0,
        train: bool = True,
        teacher: Optional[str] = None,
        train_flags: Optional[Mapping[str, Any]] = None,
        overwrite: bool = False,
        load_args: Optional[Mapping[str, Any]] = None,
        **options: Any,
) -> Pruned:
    """Prune a model, train it further, and write it as a folder.

    A call that was stopped while it trained goes on there when it is repeated.

    Args:
        source: What `pst_timm.load_model` takes.
        folder: Where to write; beside it the training has a folder of its own.
        ratio: See `prune`.
        latency: Instead of the ratio, `share` or `milliseconds` of `ratio_for_latency`.
        data_args: Flags that say which images: `data_dir`, `train_split` and others of `pst-timm train`; None to prune
            alone.
        images: How many of the training images the importance and the statistics of batch norms are taken from.
        seed: Seed of their draw.
        train: Whether to train after each step, where there are images.
        teacher: What the training distils from, none if None; the source itself is opened with the same `load_args`.
        train_flags: Further flags of `pst-timm train`, by key.
        overwrite: Whether an earlier model in the folder, or an earlier training beside it, may be replaced.
        load_args: Further arguments of `load_model`.
        options: Further arguments of `prune`.

    Raises:
        PSTError: If anything is wrong that the user can mend.
        Interrupted: If the process was asked to stop.
    """
    folder = Path(folder)
    check_target(folder, Path(source.removeprefix('local-dir:')), overwrite)
    model = load_model(source, **(load_args or {}))
    batches = training_batches(model, source, data_args, images, seed) if data_args else None
    done: List[Path] = []

    def trained(smaller: nn.Module, step: int) -> nn.Module:
        done.append(_finetuned(smaller, folder, step, data_args, teacher, train_flags or {}, overwrite))
        return load_model(done[-1])

    train = train and bool(data_args)
    if train and teacher == source and any(value is not None for value in (load_args or {}).values()):
        teacher = str(work_folder(folder) / 'teacher')  # the source alone would be opened otherwise
        save_folder(model, Path(teacher))
    if latency:
        # statistics cost no time
        scored = batches if options.get('importance') == 'taylor' else None
        note = work_folder(folder) / RATIO if train else None
        ratio = _ratio_for(model, latency, scored, options, note, overwrite)
    smaller = prune(model, ratio, images=batches, between=trained if train else None, **options)
    if train:
        smaller = trained(smaller, options.get('steps', 1))
    save_folder(smaller, folder)
    size = model.pretrained_cfg['input_size']
    both = {'before': model, 'after': smaller}
    return Pruned(
        smaller, ratio, {key: count_gmacs(net, size) for key, net in both.items()},
        {key: sum(p.numel() for p in net.parameters()) for key, net in both.items()}, done[-1] if done else None)


def _ratio_for(
        model: nn.Module,
        latency: Mapping[str, float],
        images: Optional[Sequence[Batch]],
        options: Mapping[str, Any],
        note: Optional[Path],
        overwrite: bool,
) -> float:
    """The ratio for a latency; if a note of it is kept, that of an earlier start: no two measurements are alike."""
    target = {'latency': dict(latency), 'options': dict(options)}
    if note is not None and note.is_file() and not overwrite:
        told = parse_json(note.read_bytes(), note)
        ratio = told.get('ratio') if isinstance(told, dict) and told.get('target') == target else None
        if isinstance(ratio, float) and 0 < ratio < 1:
            return ratio
    ratio = ratio_for_latency(model, **latency, images=images, **options)
    if note is not None:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, {'target': target, 'ratio': ratio})
    return ratio


def _finetuned(
        model: nn.Module,
        folder: Path,
        step: int,
        data_args: Mapping[str, Any],
        teacher: Optional[str],
        train_flags: Mapping[str, Any],
        overwrite: bool,
) -> Path:
    """The checkpoint of a model that was trained further, beside a folder."""
    work = work_folder(folder)
    place = work / f'pruned-{step}'
    save_folder(model, place)
    return finetune(place, data_args, teacher, work / f'run-{step}', overwrite, **train_flags)


def training_batches(
        model: nn.Module,
        source: str,
        data_args: Mapping[str, Any],
        images: int = 512,
        seed: int = 0,
) -> List[Batch]:
    """Some of the training images with their labels, prepared as for inference.

    Args:
        model: The model that is to take them.
        source: What it is called.
        data_args: `data_dir` and `train_split`; others are for the training.
        images: How many, drawn at random.
        seed: Seed of the draw.

    Raises:
        PSTError: If there are no such images, or they have other classes than the model.
    """
    config = preprocessing(model, source, {})
    samples = open_images(model, config, data_args['data_dir'], data_args.get('train_split') or 'train')
    return list(ImageBatches(drawn_subset(samples, images, seed), BATCH))
