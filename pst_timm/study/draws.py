"""Few images of each class for training, all others for the test: folders of links, drawn alike on every machine."""
import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from pst_timm.utils.errors import PSTError

__all__ = ['ALL', 'Draw', 'write_draw']

ALL = 'all'


@dataclass(frozen=True)
class Draw:
    """Which images a cell trains on. No image is drawn for two seeds, and none that is ever drawn is tested on."""
    images: Optional[int]
    """Images of each class, None for all of the training split."""
    turn: int
    """How many seeds draw before this one."""
    most: int
    """The most images of a class that a cell of the study draws for one seed."""
    turns: int
    """Seeds in all."""

    def split(self, train: Sequence[Path], val: Sequence[Path]) -> Tuple[List[Path], List[Path]]:
        """Images of a class to train and to test on, from the two splits.

        Raises:
            PSTError: If there are too few.
        """
        if self.images is None:
            return list(train), list(val)
        order = sorted(train, key=lambda path: hashlib.sha256(f'{path.parent.name}/{path.name}'.encode()).digest())
        drawn = self.most * self.turns
        if len(order) < drawn:
            raise PSTError(
                f'{order[0].parent if order else "A class"} has {len(order)} images, and {self.turns} seeds draw '
                f'{self.most} each, none of them twice: name fewer seeds or shots.')
        first = self.most * self.turn
        return order[first:first + self.images], [*val, *order[drawn:]]


def write_draw(
        draw: Draw,
        data_dir: Path,
        folder: Path,
        splits: Tuple[str, str],
        classes: Sequence[str],
) -> None:
    """Write the images of a draw as folders of links, in place of what an earlier start may have left there.

    Args:
        draw: The draw.
        data_dir: Image folder with both splits.
        folder: The folder that is made, with folders of the same names.
        splits: Names of the splits to train and to test on.
        classes: Folder names of the classes.

    Raises:
        PSTError: If images are missing, or the links cannot be made.
    """
    chosen: Dict[Path, Path] = {}
    for name in classes:
        found = [_images_in(data_dir / split / name) for split in splits]
        for split, images in zip(splits, draw.split(*found)):
            chosen.update((folder / split / name / _link_name(path, data_dir), path) for path in images)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        for link, path in chosen.items():
            link.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(path.resolve(), link)
    except OSError as e:
        raise PSTError(f'The images of a draw cannot be linked to in {folder} ({e.strerror}).') from e


def _images_in(folder: Path) -> List[Path]:
    if not folder.is_dir():
        raise PSTError(f'There is no {folder}: a study with shots needs every class in both splits.')
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith('.'))


def _link_name(path: Path, data_dir: Path) -> str:
    # two splits may have images of the same name
    return '-'.join((path.relative_to(data_dir).parts[0], path.name))
