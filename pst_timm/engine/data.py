"""Datasets and loaders, made by timm's factories, with errors that say what is wrong with the data."""
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

import torch
from PIL import Image
from timm.data import FastCollateMixup, ImageDataset, Mixup, create_dataset, create_loader
from timm.utils import is_primary
from torch.utils.data import DataLoader, Dataset

from .device_data import DeviceLoader, RandomCrop, check_flags, reading_loader, store, storing_transform
from .errors import EngineError

__all__ = ['BadImages', 'TrainData', 'create_eval_dataset', 'create_eval_loader', 'create_train_data']

_logger = logging.getLogger(__name__)

# what PIL raises for files that are not, or not wholly, images
BROKEN_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class BadImages:
    """Counts images that could not be read, in all worker processes together."""

    def __init__(self, size: int, limit: int):
        """
        Args:
            size: Number of images in the dataset.
            limit: Unreadable images to put up with.
        """
        self.limit = limit
        self.seen = torch.zeros(size, dtype=torch.uint8).share_memory_()
        self.named: Set[int] = set()

    def add(self, index: int) -> None:
        """Note that an image is broken."""
        self.seen[index] = 1

    @property
    def count(self) -> int:
        return int(self.seen.sum())

    def check(self, dataset: Dataset) -> None:
        """Raise an EngineError if there are more broken images than the limit."""
        if self.count > self.limit:
            names = [dataset.filename(i, absolute=True) for i in self._indices()[:5]]
            raise EngineError(
                f'{self.count} images could not be read, more than the {self.limit} of --max-bad-images; '
                f'the first: {", ".join(names)}. Mend or remove them, or raise the limit.')

    def report(self, dataset: Dataset) -> None:
        """Name the broken images in the log, each of them once, and check the limit."""
        for i in self._indices():
            if i not in self.named:
                self.named.add(i)
                _logger.warning(
                    f'Skipped an unreadable image: {dataset.filename(i, absolute=True)} ({len(self.named)} so far).')
        self.check(dataset)

    def _indices(self) -> List[int]:
        return self.seen.nonzero().flatten().tolist()


class CheckedImageDataset(ImageDataset):
    """timm's image dataset that counts and names the images it skips."""

    def __init__(self, dataset: ImageDataset, limit: int):
        """
        Args:
            dataset: The dataset whose reader and image mode are taken over.
            limit: Unreadable images to put up with.
        """
        super().__init__(
            root=None,
            reader=dataset.reader,
            input_img_mode=dataset.input_img_mode,
            transform=dataset.transform,
            target_transform=dataset.target_transform,
        )
        self.bad_images = BadImages(len(self), limit)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        for i in range(index, index + len(self)):
            i %= len(self)
            try:
                image, target = self.reader[i]
                image = Image.open(image)
                image = image.convert(self.input_img_mode or image.mode)
                break
            except BROKEN_IMAGE:
                self.bad_images.add(i)
                self.bad_images.check(self)
        else:
            raise EngineError('Not one of the images could be read.')
        target = -1 if target is None else target
        if self.target_transform is not None:
            target = self.target_transform(target)
        return (image if self.transform is None else self.transform(image)), target


def _is_folder_or_tar(args: Namespace) -> bool:
    return '/' not in args.dataset


def _open_dataset(args: Namespace, split: str, num_samples: Optional[int], **kwargs: Any) -> Dataset:
    if not args.data_dir and _is_folder_or_tar(args):
        raise EngineError('No data given: name the folder with the images, as in `--data-dir path/to/images`.')
    if args.data_dir and _is_folder_or_tar(args):
        _check_root(Path(args.data_dir), split)
    mode = args.input_img_mode or ('L' if args.in_chans == 1 else 'RGB')
    try:
        dataset = create_dataset(
            args.dataset,
            root=args.data_dir,
            split=split,
            class_map=args.class_map,
            download=args.dataset_download,
            input_img_mode=mode,
            input_key=args.input_key,
            target_key=args.target_key,
            num_samples=num_samples,
            trust_remote_code=args.dataset_trust_remote_code,
            **kwargs,
        )
    except (RuntimeError, AssertionError, OSError, ImportError, TypeError, ValueError) as e:
        raise EngineError(f'Cannot open the {split!r} split of {args.data_dir or args.dataset}: {e}') from e
    if isinstance(dataset, ImageDataset) and len(dataset) == 0:
        raise EngineError(f'The {split!r} split of {args.data_dir} has no images.')
    return CheckedImageDataset(dataset, args.max_bad_images) if isinstance(dataset, ImageDataset) else dataset


def _check_root(root: Path, split: str) -> None:
    if not root.exists():
        raise EngineError(f'There is no {root}: --data-dir must name an existing folder or .tar file.')
    if not root.is_dir():
        return
    split = split.split('[')[0]
    # a split that is not there would fall back to the whole folder, validation images and all
    synonyms = {'train': ('training',), 'validation': ('val', 'valid', 'eval', 'evaluation')}.get(split, ())
    synonyms = (*synonyms, 'validation') if split in ('val', 'valid', 'eval', 'evaluation') else synonyms
    if any((root / name).exists() for name in (split, *synonyms)):
        return
    others = sorted(p.name for p in root.iterdir() if p.is_dir())
    if any(name in others for name in ('train', 'training', 'val', 'validation', 'valid', 'eval', 'test')):
        raise EngineError(
            f'{root} has no {split!r} split; it has {", ".join(others)}. Name one of these with --train-split, '
            f'--val-split or, in validation, --split.')


def class_names(dataset: Dataset) -> Optional[List[str]]:
    """Names of the classes in the order of their indices, None if the dataset does not tell."""
    to_index: Optional[Dict[str, int]] = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)
    return sorted(to_index, key=to_index.get) if to_index else None


def check_classes(dataset: Dataset, num_classes: int, explicit: bool, split: str) -> None:
    """Compare the classes of the data with the outputs of the model.

    Args:
        dataset: The data.
        num_classes: Outputs of the model.
        explicit: Whether the user asked for this number.
        split: Name of the data in the message.

    Raises:
        EngineError: If a label has no output, or if the user asked for another number than there is.
    """
    names = class_names(dataset)
    if names is None or len(names) == num_classes:
        return
    message = (
        f'The {split!r} split has {len(names)} classes ({", ".join(names[:3])}, ...) and the model has '
        f'{num_classes} outputs: use --num-classes {len(names)}')
    if len(names) > num_classes or explicit:
        raise EngineError(f'{message}, or check that the data is complete.')
    _logger.warning(f'{message} unless this is meant.')


class TrainData(NamedTuple):
    """Everything a training run reads images from."""
    train: DataLoader
    evaluation: Optional[DataLoader]
    mixup_fn: Optional[Mixup]


def _loader_kwargs(args: Namespace, data_config: Dict[str, Any], dtype: torch.dtype) -> Dict[str, Any]:
    return dict(
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        use_prefetcher=not args.no_prefetcher,
        num_workers=args.workers,
        pin_memory=args.pin_mem,
        img_dtype=dtype,
        device=torch.device(args.device),
        # fresh workers take their seeds from the random state of the epoch, so that a resumed epoch is the same epoch
        persistent_workers=False,
    )


def create_train_data(
        args: Namespace,
        data_config: Dict[str, Any],
        explicit_classes: bool,
        dtype: torch.dtype,
) -> TrainData:
    """Open the splits and make the loaders of a training run.

    Args:
        args: Arguments with the device, the world and `num_classes` resolved.
        data_config: Preprocessing, from `timm.data.resolve_data_config`.
        explicit_classes: Whether the user gave the number of classes.
        dtype: Precision of the images on the device.

    Raises:
        EngineError: If the data is missing, empty, or has other classes than the model, or if it cannot be kept on the
            device as asked.
    """
    if args.data_on_device:
        check_flags(args)
    dataset = _open_dataset(
        args, args.train_split, args.train_num_samples,
        is_training=True, batch_size=args.batch_size, seed=args.seed, repeats=args.epoch_repeats)
    check_classes(dataset, args.num_classes, explicit_classes, args.train_split)
    dataset_eval = None
    if args.val_split:
        dataset_eval = create_eval_dataset(args, args.val_split, args.val_num_samples)
        _check_same_classes(args, class_names(dataset), class_names(dataset_eval))
        if _is_folder_or_tar(args) and dataset.reader.root == dataset_eval.reader.root:
            _logger.warning(
                f'Training and validation read the same images, {dataset.reader.root}: the accuracy will tell nothing '
                f"new. Add a split, or --val-split '' for no validation.")
    if args.aug_repeats and not args.distributed:
        raise EngineError(
            f'--aug-repeats {args.aug_repeats:g} spreads the copies of an image over several processes and this run '
            f'has one: start it with torchrun, or add --aug-repeats 0.')

    collate_fn, mixup_fn = _create_mixup(args)
    interpolation = args.train_interpolation
    if args.no_aug or not interpolation:
        interpolation = data_config['interpolation']
    loader = create_loader(
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
        auto_augment=args.aa,
        num_aug_repeats=args.aug_repeats,
        interpolation=interpolation,
        distributed=args.distributed,
        collate_fn=collate_fn,
        use_multi_epochs_loader=args.use_multi_epochs_loader,
        worker_seeding=args.worker_seeding,
        **_loader_kwargs(args, data_config, dtype),
    )
    if len(loader) == 0:
        raise EngineError(
            f'The {args.train_split!r} split has fewer images than one batch of {args.batch_size} in each of '
            f'{args.world_size} process(es): use a smaller --batch-size.')
    if args.data_on_device:
        crop = None
        if not args.no_aug:
            crop = RandomCrop(
                data_config['input_size'][-2:], args.scale, args.ratio, args.hflip, args.vflip, interpolation)
            dataset.transform = storing_transform(args.stored_size)
        loader, mixup_fn = _move_to_device(args, loader, 'training', crop, mixup_fn), None
    evaluation = None
    if dataset_eval is not None:
        evaluation = create_eval_loader(
            args, dataset_eval, data_config, args.validation_batch_size or args.batch_size, dtype,
            distributed=args.distributed)
    return TrainData(loader, evaluation, mixup_fn)


def _check_same_classes(args: Namespace, train: Optional[List[str]], evaluation: Optional[List[str]]) -> None:
    if train is None or evaluation is None or train == evaluation:
        return
    # labels are places in the sorted list of folders, so one missing folder shifts all labels behind it
    odd = sorted(set(train) ^ set(evaluation))
    raise EngineError(
        f'The {args.train_split!r} and {args.val_split!r} splits have different classes ({", ".join(odd[:5])} in one '
        f'of them alone): give both the same folders, or a --class-map.')


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
    if args.batch_size % 2:
        raise EngineError(f'Mixup and CutMix need an even --batch-size, got {args.batch_size}.')
    return (None, Mixup(**kwargs)) if args.no_prefetcher or args.data_on_device else (FastCollateMixup(**kwargs), None)


def create_eval_dataset(args: Namespace, split: str, num_samples: Optional[int]) -> Dataset:
    """Open a split for evaluation; errors as in `create_train_data`."""
    return _open_dataset(args, split, num_samples, is_training=False, batch_size=args.batch_size)


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
    reading = reading_loader(loader.dataset, args.workers, args.pin_mem)
    stored = store(reading, checked_batches(reading), torch.device(args.device), title, is_primary(args))
    report_bad_images(reading)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    return DeviceLoader(loader, stored, crop, mixup_fn, memory_format)


def checked_batches(loader: DataLoader) -> Iterator[Any]:
    """The batches of a loader, with the errors of its workers in plain words."""
    try:
        yield from loader
    except EngineError:
        report_bad_images(loader)  # the same complaint, without the worker's traceback
        raise


def report_bad_images(loader: DataLoader) -> None:
    """Name the images behind a loader that could not be read; raise an EngineError if they are too many."""
    if (bad := bad_images(loader)) is not None:
        bad.report(loader.dataset)


def bad_images(loader: DataLoader) -> Optional[BadImages]:
    """The count of unreadable images behind a loader, None for datasets that read by themselves."""
    return getattr(loader.dataset, 'bad_images', None)
