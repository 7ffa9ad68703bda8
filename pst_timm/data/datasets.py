"""Datasets, made by timm's factory, with errors that say what is wrong with the data."""
import importlib.util
import logging
import os
import tarfile
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NoReturn, Optional, Sequence, Set, Tuple

import torch
from PIL import EpsImagePlugin, ImageMode
from timm.data import ImageDataset, IterableImageDataset, create_dataset
from torch.utils.data import Dataset

from pst_timm.utils.errors import PSTError, did_you_mean

from .images import MODES, UnreadableImage, as_seen, first_of, listed, open_image, read_image
from .readers import FolderReader, TarReader, read_class_map

__all__ = [
    'TRAINING', 'VALIDATION', 'BadImages', 'CheckedImageDataset', 'check_class_names', 'check_classes',
    'check_mapped_names', 'class_names', 'create_eval_dataset', 'is_folder_or_tar', 'open_dataset',
]

_logger = logging.getLogger(__name__)

# names that timm takes for one another
TRAINING = ('train', 'training')
VALIDATION = ('val', 'valid', 'validation', 'eval', 'evaluation')
# what a kind of dataset needs, None for what is there anyway
KINDS = {'torch': None, 'hfds': 'datasets', 'hfids': 'datasets', 'tfds': 'tensorflow_datasets', 'wds': 'webdataset'}
FOLDER_NAMES = ('', 'folder', 'tar', 'imagefolder', 'imagetar')


class BadImages:
    """Counts images that could not be read, in all worker processes together."""

    def __init__(self, size: int, limit: int, share: float = 1.):
        """
        Args:
            size: Number of images in the dataset.
            limit: Unreadable images to put up with.
            share: Share of the images, from 0 to 1, likewise.
        """
        self.limit = limit
        self.share = share
        self.seen = torch.zeros(size, dtype=torch.uint8).share_memory_()
        self.named: Set[int] = set()

    def add(self, index: int) -> None:
        """Note that an image is broken."""
        self.seen[index] = 1

    @property
    def count(self) -> int:
        return int(self.seen.sum())

    def check(self, dataset: Dataset) -> None:
        """Raise an PSTError if there are more broken images than the limits allow."""
        count, size = self.count, len(self.seen)
        if count > self.limit:
            limit = f'the {self.limit} of --max-bad-images'
        elif count > self.share * size:
            limit = f'the share of {self.share:g} of --max-bad-share ({count / size:.1%} of {size})'
        else:
            return
        names = listed([self.name(dataset, i) for i in self._indices()[:5]], 5)
        raise PSTError(
            f'{count} image{"s" if count > 1 else ""} could not be read, more than {limit}; the first: '
            f'{names}. Mend or remove them, or raise the limit.')

    def report(self, dataset: Dataset) -> None:
        """Name the broken images in the log, each of them once, and check the limits."""
        for i in self._indices():
            if i not in self.named:
                self.named.add(i)
                _logger.warning(f'Skipped an unreadable image: {self.name(dataset, i)} ({len(self.named)} so far).')
        self.check(dataset)

    def name(self, dataset: Dataset, index: int) -> str:
        """What a broken image is called in messages."""
        return dataset.filename(index, absolute=True)

    def _indices(self) -> List[int]:
        return self.seen.nonzero().flatten().tolist()


class CheckedImageDataset(ImageDataset):
    """timm's image dataset that reads images as a person sees them, and counts and names those it skips."""

    def __init__(self, dataset: ImageDataset, bad_images: BadImages):
        """
        Args:
            dataset: The dataset whose reader and image mode are taken over.
            bad_images: The count of images that cannot be read.
        """
        super().__init__(
            root=None,
            reader=dataset.reader,
            input_img_mode=dataset.input_img_mode,
            transform=dataset.transform,
            target_transform=dataset.target_transform,
        )
        self.bad_images = bad_images
        self.class_transforms: Dict[int, Callable] = {}
        """Transforms of the images of some classes, by class index, instead of `transform`."""

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        for i in range(index, index + len(self)):
            i %= len(self)
            try:
                file, target = self.reader[i]
                with file:
                    image = read_image(file, self.input_img_mode)
                break
            except (OSError, UnreadableImage, tarfile.TarError):
                self.bad_images.add(i)
                self.bad_images.check(self)
        else:
            raise PSTError('Not one of the images could be read.')
        target = -1 if target is None else target
        if self.target_transform is not None:
            target = self.target_transform(target)
        transform = self.class_transforms.get(target, self.transform)
        return (image if transform is None else transform(image)), target


class SeenStream(IterableImageDataset):
    """timm's stream of images, which are read as a person sees them."""

    def __init__(self, dataset: IterableImageDataset, mode: str):
        """
        Args:
            dataset: The stream, whose reader leaves the images in the mode that they have.
            mode: The mode they are to have.
        """
        super().__init__(
            root=None, reader=dataset.reader, transform=dataset.transform, target_transform=dataset.target_transform)
        self.mode = mode

    def __iter__(self) -> Iterator[Tuple[Any, Any]]:
        for image, target in self.reader:
            try:
                image = as_seen(image, self.mode)
            except Exception as e:  # as timm's readers of streams do over what they cannot decode
                _logger.warning(f'Skipped an unreadable image of a stream: {e}')
                continue
            image = image if self.transform is None else self.transform(image)
            yield image, target if self.target_transform is None else self.target_transform(target)


def is_folder_or_tar(args: Namespace) -> bool:
    return '/' not in args.dataset


def open_dataset(args: Namespace, split: str, num_samples: Optional[int], **kwargs: Any) -> Dataset:
    """Open a split.

    Args:
        args: Arguments of a training run or an evaluation.
        split: Name of the split, or of a folder below the data.
        num_samples: Samples of a stream that does not tell.
        kwargs: For timm's `create_dataset`.

    Raises:
        PSTError: If there is no such dataset or split, or it has no images, or the flags do not fit it.
    """
    if not split.strip():
        raise PSTError('No split is named: leave the flag out, or name a split or folder, such as train or validation.')
    mode = _image_mode(args)
    if is_folder_or_tar(args):
        dataset = _open_folder_or_tar(args, split, num_samples, mode)
    else:
        dataset = _open_named(args, split, num_samples, mode, kwargs)
    if isinstance(dataset, ImageDataset):
        if len(dataset) == 0:
            raise PSTError(f'The {split!r} split of {args.data_dir or args.dataset} has no images.')
        return CheckedImageDataset(dataset, BadImages(len(dataset), args.max_bad_images, args.max_bad_share))
    return dataset


def _image_mode(args: Namespace) -> str:
    mode = args.input_img_mode or ('L' if args.in_chans == 1 else 'RGB')
    if mode not in MODES:
        raise PSTError(f'--input-img-mode {mode}: expected one of {", ".join(MODES)}.{did_you_mean(mode, MODES)}')
    channels = len(ImageMode.getmode(mode).bands)
    if args.in_chans and channels != args.in_chans:
        raise PSTError(
            f'The model takes images of {args.in_chans} channel(s), and those read in mode {mode} have {channels}: '
            f'choose --in-chans and --input-img-mode ({", ".join(MODES)}) alike.')
    return mode


def _open_folder_or_tar(args: Namespace, split: str, num_samples: Optional[int], mode: str) -> ImageDataset:
    if args.dataset.lower() not in FOLDER_NAMES:
        raise PSTError(
            f'--dataset {args.dataset}: expected nothing for a folder or .tar file, or '
            f'{", ".join(f"{kind}/NAME" for kind in KINDS)}, as in torch/{args.dataset.lower()}.')
    if not args.data_dir:
        raise PSTError('No data given: name the folder with the images, as in `--data-dir path/to/images`.')
    if args.target_key:
        raise PSTError(
            f'Cannot open {args.data_dir} with --target-key {args.target_key}: a folder or .tar file takes its labels '
            f'from the folders of the images. Leave it out.')
    if num_samples is not None:
        raise PSTError(
            f'The number of samples ({num_samples}) is for streams of shards; the images in {args.data_dir} are '
            f'counted. Leave the flag out.')
    root = Path(args.data_dir)
    common = dict(
        class_map=read_class_map(args.class_map, args.data_dir) if args.class_map else None,
        flat=bool(getattr(args, 'real_labels', '')),  # which go by the names of the files
        show=getattr(args, 'rank', 0) == 0,
    )
    try:
        if root.is_dir():
            reader = FolderReader(_split_folder(root, split), input_key=args.input_key, **common)
        elif not os.path.lexists(root):
            raise PSTError(f'There is no {root}: --data-dir must name an existing folder or .tar file.')
        elif not root.is_file() or root.suffix != '.tar':
            raise PSTError(f'{root} is neither a folder nor a .tar file: --data-dir must name one with images in it.')
        elif args.input_key:
            raise PSTError(f'--input-key {args.input_key} chooses images by their endings in a folder, not in {root}.')
        else:
            reader = TarReader(root, **common)
    except (OSError, ValueError) as e:
        _cannot_open(args, split, e)
    return ImageDataset(args.data_dir, reader=reader, input_img_mode=mode)


def _open_named(
        args: Namespace,
        split: str,
        num_samples: Optional[int],
        mode: str,
        kwargs: Dict[str, Any],
) -> Dataset:
    kind, _, name = args.dataset.partition('/')
    kind = kind.lower()
    if kind not in KINDS:
        raise PSTError(
            f'--dataset {args.dataset}: unknown kind {kind!r}, expected one of '
            f'{", ".join(f"{known}/" for known in KINDS)}.{did_you_mean(kind, KINDS)}')
    needed = KINDS[kind]
    if needed and importlib.util.find_spec(needed) is None:
        raise PSTError(f'--dataset {args.dataset} needs the package {needed}: pip install {needed}')
    if not name and kind != 'wds':
        raise PSTError(f'--dataset {args.dataset}: name the dataset too, as in {kind}/NAME.')
    if not args.data_dir and kind in ('torch', 'wds'):
        raise PSTError(f'No data given for --dataset {args.dataset}: name its folder with --data-dir.')
    if kind == 'torch' and args.class_map:
        raise PSTError(f'--class-map {args.class_map}: the labels of {args.dataset} are its own. Leave the map out.')
    # wds and hfids leave the images as they are where no mode is given
    own_mode = '' if kind in ('wds', 'hfids') else mode
    # what decodes streams is timm's, and opens whatever Pillow can, PostScript by a program: not in this process
    EpsImagePlugin.gs_binary = False
    try:
        dataset = create_dataset(
            args.dataset,
            root=args.data_dir,
            split=split,
            class_map=read_class_map(args.class_map, args.data_dir) if args.class_map else None,
            download=args.dataset_download,
            input_img_mode=own_mode,
            input_key=args.input_key,
            target_key=args.target_key,
            num_samples=num_samples,
            trust_remote_code=args.dataset_trust_remote_code,
            **kwargs,
        )
    except Exception as e:  # it is read by code of others, from files of others
        _cannot_open(args, split, e)
    if kind == 'wds':
        _check_shards(dataset.reader)
    if hasattr(dataset, 'loader'):  # torchvision's datasets of files
        dataset.loader = partial(open_image, mode=mode)
    return SeenStream(dataset, mode) if not own_mode else dataset


def _check_shards(reader: Any) -> None:
    """Raise a PSTError if a shard is not there, which timm's reader would pass over."""
    paths = [os.path.join(reader.root or '', name) for name in reader.split_info.filenames]
    missing = [path for path in paths if ':' not in path and not os.path.isfile(path)]
    if missing:
        raise PSTError(f'{len(missing)} of {len(paths)} shards are not there: {listed(missing)}.')


def _cannot_open(args: Namespace, split: str, error: Exception) -> NoReturn:
    if isinstance(error, PSTError):
        raise error
    hint = ''
    if args.dataset.lower().startswith('torch/') and not args.dataset_download:
        hint = ' (--dataset-download fetches those that can be fetched)'
    text = ' '.join(str(error).split()) or type(error).__name__
    text = f'no {text}' if isinstance(error, KeyError) else text
    raise PSTError(
        f'Cannot open the {split!r} split of {args.dataset or args.data_dir}: {text[:500].rstrip(".")}{hint}.'
    ) from error


def find_split(root: Path, split: str) -> Optional[Path]:
    """What a folder has for a split, by its name or another usual one of the same; None if it has nothing."""
    alike = next((names for names in (TRAINING, VALIDATION) if split in names), ())
    return next((root / name for name in (split, *alike) if name and (root / name).exists()), None)


def _split_folder(root: Path, split: str) -> Path:
    """The folder of a split; the root itself where there are no splits at all, as timm has it."""
    if '[' in split:
        raise PSTError(f'{split!r} takes a part of a split, which folders do not offer: name a whole one.')
    found = find_split(root, split)
    if found is not None:
        if not found.is_dir():
            raise PSTError(f'{found} is not a folder: --data-dir must name a folder of splits, or a .tar file itself.')
        return found
    others = sorted(p.name for p in root.iterdir() if p.is_dir())
    if split not in (*TRAINING, *VALIDATION) or set(others) & {*TRAINING, *VALIDATION, 'test'}:
        have = f'it has {listed(others, 10)}' if others else 'it has no folders'
        raise PSTError(
            f'{root} has no {split!r} split; {have}. Name one of these with --train-split, --val-split or, in '
            f'validation, --split.')
    return root


def class_indices(dataset: Dataset) -> Optional[Dict[str, int]]:
    """Class indices by name, None if the dataset does not tell."""
    found: Optional[Dict[str, int]] = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)
    return found if found and set(found) != {''} else None


def class_names(dataset: Dataset) -> Optional[List[str]]:
    """Names of the classes in the order of their indices, None if the dataset does not tell one for each."""
    found = class_indices(dataset)
    if found is None or sorted(found.values()) != list(range(len(found))):
        return None
    # a file system may have names that no text file takes
    return [str(name).encode('utf-8', 'backslashreplace').decode() for name in sorted(found, key=found.get)]


def check_classes(
        dataset: Dataset,
        num_classes: int,
        explicit: bool,
        split: str,
        choice: bool = True,
) -> None:
    """Compare the classes of the data with the outputs of the model.

    Args:
        dataset: The data.
        num_classes: Outputs of the model.
        explicit: Whether the user asked for this number.
        split: Name of the data in the message.
        choice: Whether the user can ask for a number.

    Raises:
        PSTError: If a label has no output, or if the user asked for another number than there is.
    """
    found = class_indices(dataset)
    if found is None:
        return
    count = max(found.values()) + 1
    if count == num_classes:
        return
    names = sorted(found, key=found.get)
    if count > len(found):  # a class map with gaps
        if count > num_classes:
            raise PSTError(
                f'--class-map gives {names[-1]!r} the index {count - 1}, and the model has {num_classes} outputs, '
                f'counted from 0.')
        return
    message = (
        f'The {split!r} split has {count} classes ({listed(names)}) and the model has '
        f'{num_classes} outputs: {f"use --num-classes {count}" if choice else "name a model of these classes"}')
    if count > num_classes or explicit:
        raise PSTError(f'{message}, or check that the data is complete.')
    _logger.warning(f'{message} unless this is meant.')


def create_eval_dataset(args: Namespace, split: str, num_samples: Optional[int]) -> Dataset:
    """Open a split for evaluation; errors as in `open_dataset`."""
    return open_dataset(args, split, num_samples, is_training=False, batch_size=args.batch_size)


def check_class_names(
        found: Optional[Sequence[str]],
        expected: Optional[Sequence[str]],
        found_in: str,
        expected_in: str,
        advice: str = 'Give both the same folders, or a --class-map: a text file of class names in the order of the '
                      'labels, one a line.',
) -> None:
    """Make sure that classes are the same ones in the same order, so that a label means the same to both.

    Args:
        found: Names in the order of their indices; None or empty where they are not known, and then nothing is said.
        expected: What they should be, likewise.
        found_in: What has the names, such as "the 'validation' split".
        expected_in: What has the expected ones.
        advice: What to do, in a sentence.

    Raises:
        PSTError: If they differ; the message names the first that do.
    """
    if not found or not expected or list(found) == list(expected):
        return
    missing = [name for name in expected if name not in set(found)]
    new = [name for name in found if name not in set(expected)]
    if missing or new:
        parts = [f'lacks {listed(missing)}'] if missing else []
        parts += [f'alone has {listed(new)}'] if new else []
        what = f'have different classes: the former {" and ".join(parts)}'
    else:
        i = next(i for i, (a, b) in enumerate(zip(found, expected)) if a != b)
        what = f'have the same classes in another order: class {i} is {found[i]!r} in the former, {expected[i]!r} in ' \
               f'the latter'
    raise PSTError(
        f'{found_in[:1].upper()}{found_in[1:]} and {expected_in} {what}. Labels are positions in the list of classes. '
        f'{advice}')


def check_mapped_names(dataset: Dataset, expected: Sequence[str], expected_in: str) -> None:
    """Make sure that a class map gives no class the place that another one has elsewhere.

    It may leave classes out, and use other names.

    Args:
        dataset: The data, read with the map.
        expected: Names in the order of their indices.
        expected_in: What has them.

    Raises:
        PSTError: If a name is in both with different indices.
    """
    places = {name: i for i, name in enumerate(expected)}
    wrong = {
        name: i for name, i in (class_indices(dataset) or {}).items() if name in places and places[name] != i}
    if wrong:
        name, i = next(iter(wrong.items()))
        raise PSTError(
            f'--class-map gives {name!r} the index {i}, and in {expected_in} it is class {places[name]} '
            f'({len(wrong)} differ: {first_of(wrong)}): give each name its place there.')
