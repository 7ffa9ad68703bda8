"""Datasets of images with boxes, from COCO's JSON files or Pascal VOC's folders."""
import logging
import os
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from pst_timm.data.datasets import BadImages
from pst_timm.data.images import listed, open_image
from pst_timm.utils.errors import PSTError

from .boxes import Annotations
from .coco import find_coco, read_coco
from .voc import find_voc, read_voc

__all__ = ['BadBoxImages', 'BoxDataset', 'Target', 'open_boxes']

_logger = logging.getLogger(__name__)

Target = Dict[str, Any]


class BadBoxImages(BadImages):
    """Counts images that cannot be read, or are not those that their boxes are for; says why of each."""

    def name(self, dataset: 'BoxDataset', index: int) -> str:
        try:
            dataset.read(index)
        except PSTError as e:
            return str(e).rstrip('.')
        return super().name(dataset, index)


class BoxDataset(Dataset):
    """Images with their boxes, in torchvision's form: an image, and a dict of what is true of it.

    Pixels are taken as they are stored, as COCO's tools and torchvision do, unless the annotations are for the image as
    it is shown (a camera's note turns it by a quarter, and they have its width and height the other way round).
    """

    def __init__(
            self,
            annotations: Annotations,
            folder: os.PathLike,
            max_bad_images: int = 100,
            max_bad_share: float = 0.01,
    ):
        """
        Args:
            annotations: What is true of the images.
            folder: The folder of the images.
            max_bad_images: Images that cannot be read to put up with.
            max_bad_share: Share of the images, from 0 to 1, likewise.
        """
        self.annotations = annotations
        self.folder = Path(folder)
        self.bad_images: BadImages = BadBoxImages(len(annotations), max_bad_images, max_bad_share)
        self.transforms: Optional[Callable[[tv_tensors.Image, Target], Tuple[Any, Target]]] = None
        """What makes a sample for a model of an image and its target."""
        self.replace_bad = True
        """Whether the next image takes the place of one that cannot be read, as in training; None does otherwise, so
        that no image is evaluated twice."""

    @property
    def class_names(self) -> List[str]:
        return self.annotations.class_names

    @property
    def class_to_idx(self) -> Dict[str, int]:
        """The same as timm's datasets have it: processes compare what they see."""
        return {name: i for i, name in enumerate(self.class_names)}

    def __len__(self) -> int:
        return len(self.annotations)

    def name(self, index: int) -> str:
        """The file of an image, relative to the folder of the images."""
        return self.annotations.files[index]

    def filename(self, index: int, absolute: bool = False) -> str:
        """The same as timm's datasets have it."""
        return str(self.folder / self.name(index)) if absolute else self.name(index)

    def read(self, index: int) -> Image.Image:
        """An image as its boxes are for it.

        Raises:
            PSTError: If it cannot be read, or has another size than the annotations say.
        """
        path = self.folder / self.name(index)
        image = open_image(path, upright=False)
        expected = tuple(self.annotations.sizes[index].tolist())
        if image.size == expected or 0 in expected:
            return image
        upright = open_image(path)
        if upright.size == expected:
            return upright
        raise PSTError(
            f'{path} has {image.size[0]}x{image.size[1]} pixels, and its boxes are for {expected[0]}x{expected[1]}: '
            f'mend its annotations, or fetch the image again.')

    def target(self, index: int, size: Tuple[int, int]) -> Target:
        """What is true of an image.

        Args:
            index: The image.
            size: Its width and height.
        """
        known, at = self.annotations, self.annotations.of(index)
        canvas = (size[1], size[0])
        boxes = torch.from_numpy(known.boxes[at]).float().reshape(-1, 4)
        return dict(
            boxes=tv_tensors.BoundingBoxes(boxes, format='XYXY', canvas_size=canvas),
            labels=torch.from_numpy(known.labels[at].copy()),
            image_id=known.image_ids[index],
            area=torch.from_numpy(known.areas[at]).float(),
            iscrowd=torch.from_numpy(known.crowd[at].copy()),
            orig_size=canvas,
        )

    def __getitem__(self, index: int) -> Optional[Tuple[Any, Target]]:
        count = len(self) if self.replace_bad else 1
        for i in range(index, index + count):
            i %= len(self)
            try:
                image = self.read(i)
            except PSTError:
                self.bad_images.add(i)
                self.bad_images.check(self)
                continue
            target = self.target(i, image.size)
            sample = tv_tensors.Image(F.pil_to_tensor(image))
            return (sample, target) if self.transforms is None else self.transforms(sample, target)
        if self.replace_bad:
            raise PSTError('Not one of the images could be read.')
        return None


def open_boxes(
        data_dir: os.PathLike,
        split: str,
        class_names: Optional[Sequence[str]] = None,
        max_bad_images: int = 100,
        max_bad_share: float = 0.01,
        show: bool = True,
) -> BoxDataset:
    """Open a split of COCO's JSON files or of a Pascal VOC folder.

    Args:
        data_dir: The folder of the data.
        split: Name of the split, such as train, val, test or train2017.
        class_names: Classes in the order of the labels, where the data may know others or another order; by default
            COCO's categories by identifier, or the classes of VOC's training split by name.
        max_bad_images: Images that cannot be read to put up with.
        max_bad_share: Share of the images, from 0 to 1, likewise.
        show: Whether this process has anything to say.

    Raises:
        PSTError: If there is no such data or split, it is broken, or too many images are missing; the message names
            file and entry.
    """
    if not split.strip():
        raise PSTError('No split is named: name one, such as train or val.')
    root = Path(data_dir)
    if not root.is_dir():
        raise PSTError(f'There is no folder {root}: name the one with the images and their boxes.')
    splits = find_coco(root)
    voc = None if splits else find_voc(root)
    if splits:
        annotations, folder = read_coco(root, splits, split, class_names, show)
    elif voc is not None:
        annotations, folder = read_voc(voc, split, class_names, show)
    else:
        names = sorted(path.name for path in root.iterdir())
        raise PSTError(
            f'{root} has no boxes as COCO or Pascal VOC have them; it has {listed(names, 10) or "nothing"}. Expected '
            f'annotations/instances_{split}.json with images in {split}/, {split}/_annotations.coco.json beside its '
            f'images, or the folders Annotations, ImageSets and JPEGImages.')
    dataset = BoxDataset(annotations, folder, max_bad_images, max_bad_share)
    _check_files(dataset)
    return dataset


def _check_files(dataset: BoxDataset) -> None:
    """Note the images that are not there, before any of them is read."""
    present: Dict[str, set] = {}
    for i in range(len(dataset)):
        folder, name = os.path.split(dataset.name(i))
        if folder not in present:
            try:
                present[folder] = set(os.listdir(dataset.folder / folder))
            except OSError:
                present[folder] = set()
        if name not in present[folder]:
            dataset.bad_images.add(i)
    if dataset.bad_images.count == len(dataset):
        raise PSTError(
            f'Not one of the {len(dataset)} images is in {dataset.folder}, such as {listed([dataset.name(0)])}: fetch '
            f'them, or name the folder that has them.')
    dataset.bad_images.check(dataset)
