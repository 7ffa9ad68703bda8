"""Datasets, made by timm's factory, with errors that say what is wrong with the data."""
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List, Optional, Set, Tuple

import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset
from torch.utils.data import Dataset

from pst_timm.utils.errors import PSTError

__all__ = [
    'BadImages', 'check_classes', 'check_same_classes', 'class_names', 'create_eval_dataset', 'is_folder_or_tar',
    'open_dataset',
]

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
        """Raise an PSTError if there are more broken images than the limit."""
        if self.count > self.limit:
            names = [dataset.filename(i, absolute=True) for i in self._indices()[:5]]
            raise PSTError(
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
            raise PSTError('Not one of the images could be read.')
        target = -1 if target is None else target
        if self.target_transform is not None:
            target = self.target_transform(target)
        return (image if self.transform is None else self.transform(image)), target


def is_folder_or_tar(args: Namespace) -> bool:
    return '/' not in args.dataset


def open_dataset(args: Namespace, split: str, num_samples: Optional[int], **kwargs: Any) -> Dataset:
    if not args.data_dir and is_folder_or_tar(args):
        raise PSTError('No data given: name the folder with the images, as in `--data-dir path/to/images`.')
    if args.data_dir and is_folder_or_tar(args):
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
        raise PSTError(f'Cannot open the {split!r} split of {args.data_dir or args.dataset}: {e}') from e
    if isinstance(dataset, ImageDataset) and len(dataset) == 0:
        raise PSTError(f'The {split!r} split of {args.data_dir} has no images.')
    return CheckedImageDataset(dataset, args.max_bad_images) if isinstance(dataset, ImageDataset) else dataset


def _check_root(root: Path, split: str) -> None:
    if not root.exists():
        raise PSTError(f'There is no {root}: --data-dir must name an existing folder or .tar file.')
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
        raise PSTError(
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
        PSTError: If a label has no output, or if the user asked for another number than there is.
    """
    names = class_names(dataset)
    if names is None or len(names) == num_classes:
        return
    message = (
        f'The {split!r} split has {len(names)} classes ({", ".join(names[:3])}, ...) and the model has '
        f'{num_classes} outputs: use --num-classes {len(names)}')
    if len(names) > num_classes or explicit:
        raise PSTError(f'{message}, or check that the data is complete.')
    _logger.warning(f'{message} unless this is meant.')


def create_eval_dataset(args: Namespace, split: str, num_samples: Optional[int]) -> Dataset:
    """Open a split for evaluation; errors as in `open_train_splits`."""
    return open_dataset(args, split, num_samples, is_training=False, batch_size=args.batch_size)


def check_same_classes(args: Namespace, train: Optional[List[str]], evaluation: Optional[List[str]]) -> None:
    if train is None or evaluation is None or train == evaluation:
        return
    # labels are positions in the sorted list of folders, so one missing folder shifts all labels behind it
    odd = sorted(set(train) ^ set(evaluation))
    raise PSTError(
        f'The {args.train_split!r} and {args.val_split!r} splits have different classes ({", ".join(odd[:5])} in one '
        f'of them alone): give both the same folders, or a --class-map.')
