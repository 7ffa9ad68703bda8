"""Loaders of training and evaluation, made by timm's factory."""
import logging
import math
import warnings
from argparse import Namespace
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Callable, Dict, Iterator, NamedTuple, Optional, Tuple

import torch
from timm.data import FastCollateMixup, Mixup, create_loader
from timm.utils import is_primary
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from pst_timm.utils.devices import available_cores
from pst_timm.utils.errors import PSTError

from . import augment  # noqa: F401  (mends what --aa asks of Pillow)
from .datasets import (
    BadImages,
    CheckedImageDataset,
    check_class_names,
    check_classes,
    class_names,
    create_eval_dataset,
    is_folder_or_tar,
    open_dataset,
)
from .images import listed
from .on_device import DeviceLoader, RandomCrop, check_flags, check_memory, reading_loader, store, storing_transform
from .sampling import TrainImages, draw_with, open_train_images, rare_classes

__all__ = [
    'TrainData', 'TrainSplits', 'bad_images', 'checked_batches', 'create_eval_loader', 'create_train_data',
    'note_workers', 'open_train_splits', 'plain_worker_errors', 'report_bad_images', 'worker_ended',
]

_logger = logging.getLogger(__name__)


class TrainSplits(NamedTuple):
    """The data of a training run, opened."""
    train: Dataset
    evaluation: Optional[Dataset]
    images: Optional[TrainImages] = None
    """What is known of the training images, where a flag needs to know it."""


class TrainData(NamedTuple):
    """Everything a training run reads images from."""
    train: DataLoader
    evaluation: Optional[DataLoader]
    mixup_fn: Optional[Mixup]


def _pin_memory(args: Namespace) -> bool:
    # torch warns of the flag, in every epoch, where there is nothing to pin the memory for
    return args.pin_mem and torch.accelerator.is_available()


@cache
def note_workers(workers: int, show: bool) -> None:
    """Say once if there are more loader workers than cores; torch would at every loader, and again in every epoch."""
    warnings.filterwarnings('ignore', 'This DataLoader will create', UserWarning)
    if show and workers > (cores := available_cores()):
        _logger.warning(
            f'{workers} loader workers share {cores} core(s): fewer may be faster, try --workers {max(1, cores - 1)}.')


def _loader_kwargs(args: Namespace, data_config: Dict[str, Any], dtype: torch.dtype) -> Dict[str, Any]:
    note_workers(args.workers, is_primary(args))
    return dict(
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        use_prefetcher=not args.no_prefetcher,
        num_workers=args.workers,
        pin_memory=_pin_memory(args),
        img_dtype=dtype,
        device=torch.device(args.device),
        # fresh workers take their seeds from the random state of the epoch, so that a resumed epoch is the same epoch
        persistent_workers=False,
    )


def open_train_splits(args: Namespace, in_chans: int) -> TrainSplits:
    """Open the data of a training run; needs no model, and reads no image.

    Args:
        args: Arguments with the world resolved.
        in_chans: Input channels of the model.

    Raises:
        PSTError: If the data is missing, empty, or has other classes than the user said, or if the flags do not fit
            it.
    """
    args = Namespace(**dict(vars(args), in_chans=in_chans))
    if args.data_on_device:
        check_flags(args)
    if args.aug_repeats and not args.distributed:
        raise PSTError(
            f'--aug-repeats {args.aug_repeats:g} spreads the copies of an image over several processes and this run '
            f'has one: start it with torchrun, or add --aug-repeats 0.')
    dataset = open_dataset(
        args, args.train_split, args.train_num_samples,
        is_training=True, batch_size=args.batch_size, seed=args.seed, repeats=args.epoch_repeats)
    names = class_names(dataset)
    if names is not None and len(names) == 1:
        raise PSTError(
            f'The {args.train_split!r} split has one class alone ({listed(names)}), where there is nothing to tell '
            f'apart: give each class a folder of its own.')
    if args.num_classes is not None:
        check_classes(dataset, args.num_classes, True, args.train_split)
    images = open_train_images(args, dataset)
    if args.rare_aa and not isinstance(dataset, CheckedImageDataset):
        raise PSTError(
            f'--rare-aa {args.rare_aa} needs images that are read one by one with their class (a folder, a .tar file, '
            f'hfds/): leave it out.')
    if not args.val_split:
        return TrainSplits(dataset, None, images)
    dataset_eval = create_eval_dataset(args, args.val_split, args.val_num_samples)
    check_class_names(
        class_names(dataset_eval), names, f'the {args.val_split!r} split', f'the {args.train_split!r} split')
    if args.tta > 1 and args.distributed:
        raise PSTError(
            f'--tta {args.tta} needs all copies of an image in one process, and several processes deal them out: leave '
            f'it out, or evaluate with one process.')
    if args.tta > 1 and hasattr(dataset_eval, '__len__') and len(dataset_eval) % args.tta:
        raise PSTError(
            f'--tta {args.tta}: the {len(dataset_eval)} images of the {args.val_split!r} split are not so many copies '
            f'of each image. Leave it out, or add the missing ones.')
    if is_folder_or_tar(args) and dataset.reader.root == dataset_eval.reader.root:
        _logger.warning(
            f'Training and validation read the same images, {dataset.reader.root}: the accuracy will tell nothing '
            f"new. Add a split, or --val-split '' for no validation.")
    return TrainSplits(dataset, dataset_eval, images)


def create_train_data(
        args: Namespace,
        splits: TrainSplits,
        data_config: Dict[str, Any],
        dtype: torch.dtype,
) -> TrainData:
    """Make the loaders of a training run.

    Args:
        args: Arguments with the device, the world and `num_classes` resolved.
        splits: From `open_train_splits`.
        data_config: Preprocessing, from `timm.data.resolve_data_config`.
        dtype: Precision of the images on the device.

    Raises:
        PSTError: If there are fewer images than a batch, or if they cannot be kept on the device as asked.
    """
    dataset = splits.train
    collate_fn, mixup_fn = _create_mixup(args)
    interpolation = args.train_interpolation
    if args.no_aug or not interpolation:
        interpolation = data_config['interpolation']
    create = partial(
        create_loader,
        dataset,
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob or 0.,
        gaussian_blur_prob=args.gaussian_blur_prob or 0.,
        num_aug_repeats=args.aug_repeats,
        interpolation=interpolation,
        distributed=args.distributed,
        collate_fn=collate_fn,
        use_multi_epochs_loader=args.use_multi_epochs_loader,
        worker_seeding=args.worker_seeding,
        **_loader_kwargs(args, data_config, dtype),
    )
    if args.rare_aa:
        create(auto_augment=args.rare_aa)
        _augment_rare(args, dataset, splits.images)
    loader = create(auto_augment=args.aa)
    if isinstance(loader.sampler, DistributedSampler):  # which timm gives no seed
        loader.sampler.seed = args.seed
    if splits.images is not None and splits.images.chances is not None:
        loader = draw_with(loader, splits.images.chances, args.seed)
    if len(loader) == 0:
        raise PSTError(
            f'The {args.train_split!r} split has fewer images than one batch of {args.batch_size} in each of '
            f'{args.world_size} process(es): use a smaller --batch-size.')
    if args.data_on_device:
        crop = None
        if not args.no_aug:
            crop = RandomCrop(
                data_config['input_size'][-2:], args.scale, args.ratio, args.hflip, args.vflip, interpolation)
            dataset.transform = storing_transform(args.stored_size)
        _check_memory(args, splits, data_config)
        loader, mixup_fn = _move_to_device(args, loader, 'training', crop, mixup_fn), None
    evaluation = None
    if splits.evaluation is not None:
        evaluation = create_eval_loader(
            args, splits.evaluation, data_config, args.validation_batch_size or args.batch_size, dtype,
            distributed=args.distributed)
    return TrainData(loader, evaluation, mixup_fn)


def _augment_rare(args: Namespace, dataset: CheckedImageDataset, images: TrainImages) -> None:
    """Keep the transform that a dataset has for the images of rare classes."""
    rare = rare_classes(images.labels, args.rare_below)
    dataset.class_transforms = dict.fromkeys(rare, dataset.transform)
    if is_primary(args):
        names = class_names(dataset)
        _logger.log(
            logging.INFO if rare else logging.WARNING,
            f'--rare-below {args.rare_below}: {len(rare)} classes have fewer images'
            + (f' ({listed([names[i] if names else i for i in rare])}).' if rare else ', so --rare-aa does nothing.'))


def _check_memory(args: Namespace, splits: TrainSplits, data_config: Dict[str, Any]) -> None:
    """Raise an PSTError if either split will not fit on the device, before the images of the first one are read."""
    if isinstance(splits.train, IterableDataset):  # which is refused for what it is
        return
    size, side = tuple(data_config['input_size']), args.stored_size
    if args.no_aug:
        stored = size
    else:
        stored = (size[0], side, side) if side else splits.train[0][0].shape
    device, count = torch.device(args.device), len(splits.train)
    check_memory(count, stored, device, 'training')
    if splits.evaluation is not None:
        check_memory(len(splits.evaluation), size, device, 'validation', besides=count * math.prod(stored))


def _create_mixup(args: Namespace) -> Tuple[Optional[Callable], Optional[Mixup]]:
    """Mixup as a collate function where the prefetcher mixes bytes, else as a function of the batch."""
    if not (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None):
        return None, None
    kwargs = dict(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=args.num_classes,
    )
    return (None, Mixup(**kwargs)) if args.no_prefetcher or args.data_on_device else (FastCollateMixup(**kwargs), None)


def create_eval_loader(
        args: Namespace,
        dataset: Dataset,
        data_config: Dict[str, Any],
        batch_size: int,
        dtype: torch.dtype,
        distributed: bool = False,
) -> DataLoader:
    """Loader over a split in order, with the preprocessing of inference."""
    loader = create_loader(
        dataset,
        batch_size=batch_size,
        is_training=False,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        crop_border_pixels=getattr(args, 'crop_border_pixels', None),
        distributed=distributed,
        **_loader_kwargs(args, data_config, dtype),
    )
    if args.data_on_device and not isinstance(dataset, IterableDataset):
        check_memory(len(dataset), data_config['input_size'], torch.device(args.device), 'validation')
    # here the stored images are those that the transform of inference makes
    return _move_to_device(args, loader, 'validation') if args.data_on_device else loader


def _move_to_device(
        args: Namespace,
        loader: DataLoader,
        title: str,
        crop: Optional[RandomCrop] = None,
        mixup_fn: Optional[Mixup] = None,
) -> DeviceLoader:
    """Read the images behind a loader to the device; returns a loader of batches made there."""
    reading = reading_loader(loader.dataset, args.workers, _pin_memory(args))
    stored = store(reading, checked_batches(reading), torch.device(args.device), title, is_primary(args))
    report_bad_images(reading)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    return DeviceLoader(loader, stored, crop, mixup_fn, memory_format)


def checked_batches(loader: DataLoader) -> Iterator[Any]:
    """The batches of a loader, with the errors of its workers in plain words.

    Raises:
        PSTError: If there are too many unreadable images, or no batch at all.
    """
    empty = True
    try:
        for batch in loader:
            empty = False
            yield batch
    except PSTError:
        report_bad_images(loader)  # the same complaint, without the worker's traceback
        raise
    if empty:
        raise PSTError('Not one batch of images could be read: check that the data, or their shards, are whole.')


@contextmanager
def plain_worker_errors() -> Iterator[None]:
    """Turn the end of a loader worker, which torch tells of wherever the process is, into a sentence for people.

    Raises:
        PSTError: If a worker was killed or ended by itself.
    """
    try:
        yield
    except RuntimeError as e:
        told = worker_ended(e)
        if not told:
            raise
        raise PSTError(told) from e


def worker_ended(error: RuntimeError) -> str:
    """What torch says when a loader worker is gone, in plain words; empty if it is something else."""
    text = ' '.join(str(error).split()).rstrip('.')
    if isinstance(error, PSTError) or not text.startswith(('DataLoader worker', 'Pin memory thread')):
        return ''
    return (
        f'A process that loads images has ended ({text}). As a rule the memory ran out: take fewer --workers or a '
        f'smaller --batch-size; --workers 0 loads in this process.')


def report_bad_images(loader: DataLoader) -> None:
    """Name the images behind a loader that could not be read; raise an PSTError if they are too many."""
    if (bad := bad_images(loader)) is not None:
        bad.report(loader.dataset)


def bad_images(loader: DataLoader) -> Optional[BadImages]:
    """The count of unreadable images behind a loader, None for datasets that read by themselves."""
    return getattr(loader.dataset, 'bad_images', None)
