"""A part of the training images, set aside to decide on what is done to a model, and never trained on meanwhile."""
import hashlib
import os
from pathlib import Path

import numpy as np
from timm.data import ImageDataset

from pst_timm.data.datasets import class_names, create_eval_dataset
from pst_timm.data.readers import FolderReader
from pst_timm.data.sampling import labels_of
from pst_timm.data.scores import stratified_folds
from pst_timm.engine import validate_args
from pst_timm.utils.errors import PSTError

__all__ = ['HELD', 'REST', 'set_aside']

REST, HELD = 'train', 'held'


def set_aside(data_dir: str, split: str, folder: Path, share: float = 0.2, seed: int = 0) -> Path:
    """Deal the images of a split into two, alike in all classes, as links.

    Args:
        data_dir: Folder with the splits.
        split: The split to deal.
        folder: Where the folder of links is made.
        share: Share that is set aside: a half, a third, and so on.
        seed: Seed of the draw.

    Returns:
        A folder with the splits `REST` and `HELD`; another one for other images, shares and seeds.

    Raises:
        PSTError: If the images have no files of their own, a class has too few of them, or nothing can be written.
    """
    folds = max(2, round(1 / share))
    if abs(share * folds - 1) > 0.02:
        raise PSTError(
            f'{share:g} of the images cannot be set aside, one in two, three or any other number can: choose '
            f'{1 / folds:.3g}, or another such share.')
    dataset = create_eval_dataset(validate_args(data_dir=data_dir, split=split), split, None)
    names, labels = class_names(dataset), labels_of(dataset)
    if not (isinstance(dataset, ImageDataset) and isinstance(dataset.reader, FolderReader)) or not names:
        raise PSTError(
            f'Images of the {split!r} split of {data_dir} are set aside by links, for which it must be a folder of '
            f'class folders: unpack it first.')
    held = stratified_folds(labels, folds, seed) == 0
    for label, name in enumerate(names):
        if len(np.unique(held[labels == label])) < 2:
            raise PSTError(
                f'The class {name!r} has {int((labels == label).sum())} images in the {split!r} split of {data_dir}, '
                f'too few to set some aside: add images.')
    paths = [os.path.abspath(path) for path in dataset.filenames(absolute=True)]
    what = '\n'.join(f'{int(part)} {path!r}' for part, path in zip(held, paths))
    place = folder / f'data-{hashlib.sha256(what.encode("ascii", "backslashreplace")).hexdigest()[:12]}'
    try:
        for i, (path, label, part) in enumerate(zip(paths, labels, held)):
            link = place / (HELD if part else REST) / names[label] / f'{i:07d}{Path(path).suffix}'
            if not os.path.lexists(link):
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path)
    except OSError as e:
        raise PSTError(f'Cannot write to {place} ({e.strerror or e}): choose another --output.') from e
    return place
