"""What is true of the images of a split: their boxes and classes as plain data, whatever file they came from.

Boxes are XYXY in pixels, from the left edge of the first pixel (0) to the right edge of the last (the width). What is
slightly wrong is taken right and counted, what cannot be right is an error; nothing goes without a word.
"""
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from pst_timm.data.images import image_size, listed
from pst_timm.utils.errors import PSTError, did_you_mean
from pst_timm.utils.markdown import plain

__all__ = ['Annotations', 'BoxCollector', 'check_class_list', 'map_classes']

_logger = logging.getLogger(__name__)

ROUNDING = 0.1  # pixels outside of an image that are no more than rounded numbers
SMALLEST = 0.01  # pixels; what is thinner is no box
MOST = 2 ** 31  # pixels, identifiers
MOST_NAME = 1000  # characters of a class; a checkpoint tells no longer ones


@dataclass
class Annotations:
    """The ground truth of a split; the boxes of all images one after the other."""
    class_names: List[str]
    """In the order of the labels."""
    category_ids: List[int]
    """What each class is called in the file, for results that others evaluate."""
    image_ids: List[int]
    """Likewise of the images."""
    files: List[str]
    """Image files, relative to the folder of the images."""
    sizes: np.ndarray
    """Width and height (images, 2) that the boxes are for, int64; 0 where neither file nor image tells."""
    starts: np.ndarray
    """Where the boxes of each image start (images + 1,)."""
    boxes: np.ndarray
    """XYXY (boxes, 4), float64."""
    labels: np.ndarray
    """Class of each box (boxes,), int64, from 0."""
    areas: np.ndarray
    """Area of each object (boxes,), by which sizes are told apart: that of its mask where the file says so."""
    crowd: np.ndarray
    """Boxes (boxes,) around many objects at once, bool: no object to train on, and nothing to find in evaluation."""
    difficult: np.ndarray
    """Boxes (boxes,) of objects that need not be found, bool."""

    def __len__(self) -> int:
        return len(self.files)

    def of(self, index: int) -> slice:
        """Where the boxes of an image are."""
        return slice(int(self.starts[index]), int(self.starts[index + 1]))

    @property
    def ignored(self) -> np.ndarray:
        """Boxes (boxes,) that an evaluation neither asks for nor holds against a detector."""
        return self.crowd | self.difficult


class BoxCollector:
    """Takes in images and boxes, checks them, and keeps count of what it mends."""

    def __init__(self, source: str, folder: Path):
        """
        Args:
            source: File of the annotations, for messages.
            folder: Folder of the images, which tell their size where the annotations do not.
        """
        self.source = source
        self.folder = folder
        self.image_ids: List[int] = []
        self.files: List[str] = []
        self.sizes: List[Tuple[int, int]] = []
        self.counts: List[int] = []
        self.rows: List[Tuple[Any, ...]] = []
        self.mended: Dict[str, List[str]] = {}

    def image(self, image_id: int, file: str, width: int, height: int) -> None:
        """Start an image, whose boxes follow; a width or height of 0 is not known."""
        if not (width and height):
            width, height = image_size(self.folder / file) or (0, 0)
        self.image_ids.append(image_id)
        self.files.append(file)
        self.sizes.append((width, height))
        self.counts.append(0)

    def box(
            self,
            corners: Sequence[float],
            label: int,
            where: str,
            area: Optional[float] = None,
            crowd: bool = False,
            difficult: bool = False,
    ) -> None:
        """A box of the image that was started last.

        Args:
            corners: XYXY in pixels.
            label: Its class.
            where: Entry in the file, for messages.
            area: Area of the object; that of the box if None.
            crowd: Whether it is around many objects.
            difficult: Whether the object need not be found.

        Raises:
            PSTError: If a number is none, or has no end.
        """
        x1, y1, x2, y2 = self.numbers(corners, where)
        if min(x2 - x1, y2 - y1) < SMALLEST:
            self.note('empty or inverted boxes were dropped', where)
            return
        width, height = self.sizes[-1]
        if width and height:
            inside = (max(x1, 0.), max(y1, 0.), min(x2, float(width)), min(y2, float(height)))
            if min(inside[2] - inside[0], inside[3] - inside[1]) < SMALLEST:
                self.note('boxes wholly outside of their image were dropped', where)
                return
            if max(abs(a - b) for a, b in zip(inside, (x1, y1, x2, y2))) > ROUNDING:
                self.note('boxes that reach out of their image were cut off at its edge', where)
            x1, y1, x2, y2 = inside
        whole = (x2 - x1) * (y2 - y1)
        if area is None:
            area = whole
        elif not 0 <= area < math.inf:
            self.note('areas that are no size were replaced by those of the boxes', where)
            area = whole
        self.rows.append((x1, y1, x2, y2, label, min(area, whole), crowd, difficult))
        self.counts[-1] += 1

    def numbers(self, values: Sequence[Any], where: str) -> List[float]:
        """Four finite numbers, or an error that says which entry has them not."""
        fine = isinstance(values, (list, tuple)) and len(values) == 4 and all(
            isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
        if not fine or not all(abs(v) < MOST for v in values):  # which NaN is not either
            raise PSTError(
                f'{self.source}, {where}: the box {plain(values, 80)} is not four finite numbers of pixels. Mend the '
                f'entry, or take it out.')
        return [float(v) for v in values]

    def note(self, what: str, where: str) -> None:
        """Keep in mind that something was mended or left out."""
        self.mended.setdefault(what, []).append(where)

    def finish(self, class_names: Sequence[str], category_ids: Sequence[int], show: bool = True) -> Annotations:
        """The annotations; says what was mended, in a line for each kind.

        Args:
            class_names: Names in the order of the labels.
            category_ids: What each class is called in the file.
            show: Whether this process has anything to say.

        Raises:
            PSTError: If there are no images, or no box at all.
        """
        for what, places in self.mended.items() if show else ():
            _logger.warning(f'{self.source}: {len(places)} {what}, such as that of {places[0]}.')
        if not self.files:
            raise PSTError(f'{self.source} has no images.')
        if not self.rows:
            raise PSTError(f'{self.source} has {len(self.files)} images and not one box: there is nothing to find.')
        rows = np.array(self.rows, np.float64)
        return Annotations(
            class_names=list(class_names),
            category_ids=list(category_ids),
            image_ids=self.image_ids,
            files=self.files,
            sizes=np.array(self.sizes, np.int64),
            starts=np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64),
            boxes=np.ascontiguousarray(rows[:, :4]),
            labels=rows[:, 4].astype(np.int64),
            areas=rows[:, 5].copy(),
            crowd=rows[:, 6].astype(bool),
            difficult=rows[:, 7].astype(bool),
        )


def check_class_list(names: Sequence[str], source: str) -> None:
    """Raise an PSTError if names of classes are none, empty, or there twice."""
    if not names:
        raise PSTError(f'{source} names no classes.')
    for name in names:
        if not isinstance(name, str) or not name.strip() or not name.isprintable() or len(name) > MOST_NAME:
            raise PSTError(
                f'{source} has the class {plain(repr(name), 80)}: expected a name of at most {MOST_NAME} characters '
                f'that can be printed.')
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise PSTError(f'{source} has the class {plain(double)!r} twice: give each its own name.')


def map_classes(found: Sequence[str], expected: Sequence[str], source: str) -> Dict[str, int]:
    """Labels by name, for classes that are to be among those of other data or of a model.

    Args:
        found: Classes of which there are boxes.
        expected: The classes to be known, in the order of the labels.
        source: Where the boxes are.

    Raises:
        PSTError: If there are boxes of a class that is not known.
    """
    unknown = [name for name in found if name not in set(expected)]
    if unknown:
        raise PSTError(
            f'{source} has boxes of {listed(sorted(map(plain, unknown)))}, which {"is" if len(unknown) == 1 else "are"}'
            f' not among the {len(expected)} known classes ({listed(list(map(plain, expected)), 10)}).'
            f'{did_you_mean(plain(unknown[0]), map(plain, expected), 1)} Give both the same names, or take these boxes '
            f'out.')
    return {name: i for i, name in enumerate(expected)}
