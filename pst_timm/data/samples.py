"""Images one by one with what is known of each: name, label, and how it looks before it is prepared for a model."""
import os
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import Dataset, default_collate

from pst_timm.utils.errors import PSTError

from .datasets import class_indices
from .images import UnreadableImage, find_images, open_image, read_image
from .readers import FolderReader

__all__ = ['LOOKS', 'NO_LABEL', 'Look', 'Sample', 'Samples', 'Unread', 'collate_samples', 'look_of']

NO_LABEL = -1


class Look(NamedTuple):
    """How an image looks, before it is prepared for a model."""
    brightness: float
    """Mean of the luma, from 0 to 1."""
    contrast: float
    """Standard deviation of the luma, from 0 to 0.5."""
    sharpness: float
    """Mean absolute difference of neighbouring pixels' luma, over both axes: blur lowers it, noise raises it."""
    grain: float
    """Mean absolute second difference over both axes, over `sharpness`: noise raises it, compression, resizing and blur
    lower it or raise it even where they leave `sharpness` as it was."""
    width: float
    """In pixels."""
    height: float
    """In pixels."""


LOOKS = Look._fields


def look_of(image: Image.Image) -> Look:
    """How an image looks."""
    luma = np.asarray(image.convert('L'), np.float32) / 255
    steps = [np.abs(np.diff(luma, axis=axis)).mean() for axis in (0, 1) if luma.shape[axis] > 1]
    sharpness = float(np.mean(steps)) if steps else 0.
    fine = np.diff(np.diff(luma, 2, axis=0), 2, axis=1) if min(luma.shape) > 2 else np.zeros(1)
    grain = float(np.abs(fine).mean()) / sharpness if sharpness else 0.
    return Look(float(luma.mean()), float(luma.std()), sharpness, grain, *map(float, image.size))


class Sample(NamedTuple):
    """An image as a model takes it, and what is known of it."""
    index: int
    image: torch.Tensor
    """(C, H, W), prepared."""
    label: int
    """`NO_LABEL` where there is none."""
    look: Tuple[float, ...]
    """A `Look`, as plain numbers."""


class Unread(NamedTuple):
    """An image that cannot be read."""
    index: int
    reason: str


class Samples(Dataset):
    """Images with their names; those that cannot be read are `Unread`, so that the others keep their places."""

    def __init__(
            self,
            names: Sequence[str],
            read: Callable[[int], Tuple[Image.Image, int]],
            transform: Callable[[Image.Image], torch.Tensor],
            class_names: Optional[Sequence[str]] = None,
            paths: Optional[Sequence[Path]] = None,
    ):
        """
        Args:
            names: What each image is called: its path, relative to the data where that is a folder.
            read: Gives image and label of an index; raises `PSTError` or `OSError` where it cannot be read.
            transform: What makes a tensor (C, H, W) of an image.
            class_names: Names of the classes in the order of the labels; None where there are no labels.
            paths: File of each image; None where they have none of their own.
        """
        self.names = list(names)
        self.paths = list(paths) if paths is not None else None
        self.read = read
        self.transform = transform
        self.class_names = list(class_names) if class_names is not None else None

    @classmethod
    def labelled(
            cls,
            dataset: ImageDataset,
            transform: Callable[[Image.Image], torch.Tensor],
            class_names: Sequence[str] = (),
    ) -> 'Samples':
        """Those of a dataset that `open_dataset` has opened, labels by class name.

        Args:
            dataset: The dataset.
            transform: See above.
            class_names: Names in the order of the model's outputs, which the data may have some of; if empty, those
                of the data in their own order.

        Raises:
            PSTError: If it is a stream, or has a class that the model does not know.
        """
        if not isinstance(dataset, ImageDataset):
            raise PSTError('The data is a stream or a list of its own: unpack it to a folder of class folders first.')
        found = class_indices(dataset)
        if found is None:
            raise PSTError('The data does not tell its classes: give each class a folder of its name.')
        names = list(class_names) or sorted(found, key=found.get)
        places = {name: i for i, name in enumerate(names)}
        unknown = sorted(str(name) for name in found if name not in places)
        if unknown:
            raise PSTError(
                f'The model knows no class {unknown[0]!r} ({len(unknown)} of {len(found)} folders are none of its '
                f'{len(names)} classes, the first of which is {names[0]!r}): name the folders after its classes.')
        labels = {i: places[name] for name, i in found.items()}
        paths = None
        if isinstance(dataset.reader, FolderReader):
            paths = [Path(name) for name in dataset.filenames(absolute=True)]
        return cls(dataset.filenames(), _Reader(dataset, labels), transform, names, paths)

    @classmethod
    def loose(
            cls,
            paths: Sequence[os.PathLike],
            transform: Callable[[Image.Image], torch.Tensor],
            mode: str = 'RGB',
    ) -> 'Samples':
        """Image files, and all those in folders, without labels.

        Args:
            paths: Files and folders.
            transform: See above.
            mode: One of `MODES`.

        Raises:
            PSTError: If there is no image.
        """
        files: List[str] = []
        for path in map(os.fspath, paths):
            files += map(str, find_images(path)[0]) if os.path.isdir(path) else [path]
        if not files:
            raise PSTError('No images are named.')
        return cls(files, _Files(files, mode), transform, paths=[*map(Path, files)])

    def subset(
            self,
            indices: Sequence[int],
            transform: Optional[Callable[[Image.Image], torch.Tensor]] = None,
    ) -> 'Samples':
        """Some of the images, perhaps as another model takes them.

        Args:
            indices: Their places here.
            transform: See above; None for this one.
        """
        paths = [self.paths[i] for i in indices] if self.paths is not None else None
        return Samples(
            [self.names[i] for i in indices], _Chosen(self.read, indices), transform or self.transform,
            self.class_names, paths)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Union[Sample, Unread]:
        try:
            image, label = self.read(index)
        except (PSTError, OSError) as e:
            # of the sentence around it, only why: the name is known
            return Unread(index, str(e.__cause__ if isinstance(e.__cause__, UnreadableImage) else e))
        return Sample(index, self.transform(image), label, tuple(look_of(image)))


class _Reader:
    def __init__(self, dataset: ImageDataset, labels: Dict[int, int]):
        self.dataset, self.labels = dataset, labels

    def __call__(self, index: int) -> Tuple[Image.Image, int]:
        file, label = self.dataset.reader[index]
        with file:
            return read_image(file, self.dataset.input_img_mode), self.labels[label]


class _Chosen:
    def __init__(self, read: Callable[[int], Tuple[Image.Image, int]], indices: Sequence[int]):
        self.read, self.indices = read, [int(i) for i in indices]

    def __call__(self, index: int) -> Tuple[Image.Image, int]:
        return self.read(self.indices[index])


class _Files:
    def __init__(self, paths: List[str], mode: str):
        self.paths, self.mode = paths, mode

    def __call__(self, index: int) -> Tuple[Image.Image, int]:
        if not os.path.exists(self.paths[index]):
            raise UnreadableImage('there is no such file')
        return open_image(self.paths[index], self.mode), NO_LABEL


def collate_samples(samples: Sequence[Union[Sample, Unread]]) -> Tuple[Optional[Any], List[Unread]]:
    """The samples that could be read as one `Sample` of batches, None where none could; and the others."""
    kept = [sample for sample in samples if isinstance(sample, Sample)]
    return default_collate(kept) if kept else None, [sample for sample in samples if isinstance(sample, Unread)]
