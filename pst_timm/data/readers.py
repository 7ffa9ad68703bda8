"""Readers of class folders, from a folder or a .tar file: timm's, in an order that is the same everywhere."""
import logging
import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import numpy as np
from timm.data import get_img_extensions
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils import natural_key

from pst_timm.utils.errors import PSTError, did_you_mean
from pst_timm.utils.files import read_text

from .images import first_of, scan_folder

__all__ = ['FolderReader', 'TarReader', 'in_order', 'read_class_map']

_logger = logging.getLogger(__name__)

KEPT_SCAN = 10 * 2 ** 30  # bytes of a .tar file from which on timm keeps the list of its members


def in_order(names: Iterable[str]) -> List[str]:
    """Names in timm's natural order; those alike to it ('1' and '01', 'Cat' and 'cat') by their letters."""
    return sorted(sorted(set(names)), key=_natural)


def _natural(name: str) -> List[Any]:
    try:
        return natural_key(name)
    except ValueError:  # timm takes a raised 2 for a number
        return natural_key(''.join(c if c.isascii() or not c.isdigit() else f'_{ord(c)}_' for c in name))


class FolderReader(ReaderImageFolder):
    """timm's reader of a folder whose images and classes are in one order everywhere, and who says what it left out."""

    def __init__(
            self,
            root: os.PathLike,
            class_map: Optional[Mapping[str, int]] = None,
            input_key: Optional[str] = None,
            flat: bool = False,
            show: bool = True,
    ):
        """
        Args:
            root: Folder of class folders.
            class_map: Class indices by folder name; the positions of the names in order if None.
            input_key: Endings of the images, with ';' between them; timm's if None.
            flat: Whether images outside class folders are taken too, as class 0 where there are no folders at all.
            show: Whether this process has anything to say.

        Raises:
            PSTError: If there are no images, no class folders, or none that the class map names.
        """
        self.root = os.fspath(root)
        endings = get_img_extensions()
        if input_key:
            endings = [f'.{ending.strip(" .")}' for ending in input_key.lower().split(';') if ending.strip(' .')]
            if not endings:
                raise PSTError(f'--input-key {input_key}: expected endings of images, such as ".jpg;.webp".')
        found = scan_folder(root, endings)
        labels = _labels(found.paths, self.root)
        notes = found.left_out()
        if not found.paths:
            hint = ''
            if found.ignored:
                hint = f': to read others, name their endings, as in --input-key "{";".join(found.ignored)}"'
            also = f' It has {"; ".join(notes)}{hint}.' if notes else ''
            raise PSTError(f'Found 0 images ({", ".join(endings)}) in the folders in {root}.{also}')
        kept, self.class_to_idx, more = _classes(str(root), labels, class_map, flat)
        notes += more
        if found.empty:
            notes.append(f'{len(found.empty)} folder(s) without an image ({first_of(found.empty)})')
        if notes and show:
            _logger.warning(f'Left out of {root}: {"; ".join(notes)}.')
        samples = [(found.paths[i], self.class_to_idx[labels[i]]) for i in kept]
        # by letters first, which the second order keeps where it has none of its own
        self.samples = sorted(sorted(samples), key=lambda sample: _natural(sample[0]))


def _labels(paths: Sequence[str], root: str) -> List[str]:
    """Names of the folders that images are in, '' for the root."""
    root = root.rstrip(os.path.sep)
    names: Dict[str, str] = {}
    labels = []
    for path in paths:
        folder = path[:path.rindex(os.path.sep)]
        if folder not in names:
            names[folder] = '' if folder == root else os.path.basename(folder)
        labels.append(names[folder])
    return labels


def _classes(
        where: str,
        labels: Sequence[str],
        class_map: Optional[Mapping[str, int]],
        flat: bool,
) -> Tuple[List[int], Dict[str, int], List[str]]:
    """Which samples are taken, the classes, and in words what was not taken; errors as in `FolderReader`."""
    counts = Counter(labels)
    loose = counts[''] if not flat else 0
    if loose == len(labels):
        raise PSTError(
            f'{where} has no class folders: all of its {loose} images are directly in it. Put those of each class '
            f'into a folder with its name.')
    notes = [f'{loose} image(s) outside class folders, directly in it'] if loose else []
    names = [name for name in counts if name or not loose]
    if class_map is None:
        classes = {name: i for i, name in enumerate(in_order(names))}
    else:
        classes = dict(class_map)
        unknown = [name for name in names if name not in classes]
        if len(unknown) == len(names):
            first = next(iter(classes))
            raise PSTError(
                f'--class-map names no folder of {where}: its first name is {str(first)[:80]!r}, and the folders are '
                f'{first_of(names)}. It takes one folder name a line, in the order of the classes'
                f'.{did_you_mean(str(first)[:80], names, most=1)}')
        if unknown:
            lost = sum(counts[name] for name in unknown)
            notes.append(f'{lost} image(s) of {len(unknown)} class(es) that --class-map does not name '
                         f'({first_of(unknown)})')
        absent = [str(name) for name in classes if name not in counts]
        if absent:
            notes.append(f'{len(absent)} class(es) of --class-map that have no images here ({first_of(absent)})')
    kept = [i for i, label in enumerate(labels) if label in classes and (label or not loose)]
    return kept, classes, notes


class TarReader(ReaderImageInTar):
    """timm's reader of a .tar file, likewise; a broken file is an error, and its workers each open it."""

    def __init__(
            self,
            root: os.PathLike,
            class_map: Optional[Mapping[str, int]] = None,
            flat: bool = False,
            show: bool = True,
    ):
        """
        Args:
            root: The .tar file of class folders.
            class_map: Class indices by folder name; the positions of the names in order if None.
            flat: Whether images outside class folders are taken too.
            show: Whether this process has anything to say.

        Raises:
            PSTError: If it is no whole .tar file, or as `FolderReader` does.
        """
        root = os.fspath(root)
        notes = _check_tar(root)
        try:
            super().__init__(root)
        except (tarfile.TarError, EOFError, OSError) as e:
            raise PSTError(f'{root} is not a whole .tar file ({e}): fetch or pack it again.') from e
        except ValueError as e:  # timm's unpacking of no samples
            raise PSTError(f'Found 0 images ({", ".join(get_img_extensions())}) in {root}.') from e
        names = {i: '' if name in ('.', '..') else name for name, i in self.class_name_to_idx.items()}
        labels = [names[target] for target in self.targets.tolist()]
        kept, classes, more = _classes(root, labels, class_map, flat)
        notes += more
        if notes and show:
            _logger.warning(f'Left out of {root}: {"; ".join(notes)}.')
        self.samples = self.samples[kept]
        self.targets = np.array([classes[labels[i]] for i in kept])
        self.class_name_to_idx = self.class_to_idx = classes
        self.class_idx_to_name = {i: name for name, i in classes.items()}
        self.process = os.getpid()

    def __getitem__(self, index: int) -> Tuple[BinaryIO, int]:
        if self.process != os.getpid():
            # a file that a worker inherits has one position for all of them
            for state in [self.tar_state] if self.root_is_tar else self.tar_state.values():
                for each in (state, *state.children.values()):
                    each.reset()
            self.process = os.getpid()
        return super().__getitem__(index)


def _check_tar(path: str) -> List[str]:
    """Make sure that a .tar file is whole, and has images; returns in words what of it will not be read."""
    images, odd, whole = 0, [], False
    try:
        with tarfile.open(path, 'r:') as tar:
            if os.path.getsize(path) > KEPT_SCAN:
                return []
            for member in tar:
                ending = os.path.splitext(member.name)[1].lower()
                if member.isfile():
                    images += ending in (*get_img_extensions(), '.tar')
                elif ending in get_img_extensions():
                    odd.append(member.name)
            # tarfile takes a damaged header for the end
            tar.fileobj.seek(tar.offset)
            whole = tar.fileobj.read(tarfile.BLOCKSIZE) == tarfile.NUL * tarfile.BLOCKSIZE
    except (tarfile.TarError, EOFError, OSError, ValueError) as e:
        raise PSTError(f'{path} is not a whole .tar file ({e}): fetch or pack it again.') from e
    if not whole:
        raise PSTError(f'{path} is not a whole .tar file (it ends before its end mark): fetch or pack it again.')
    if not images:
        raise PSTError(f'Found 0 images ({", ".join(get_img_extensions())}) in {path}.')
    return [f'{len(odd)} member(s) that are no files, such as links ({first_of(odd)})'] if odd else []


def read_class_map(path: str, folder: Optional[str] = None) -> Dict[Any, int]:
    """Read and check a class map.

    Args:
        path: A text file with one class name a line, in the order of their indices, or a pickled dict of plain values.
        folder: Where it is looked for too.

    Returns:
        Class indices by name.

    Raises:
        PSTError: If it is missing, or no such file; the message says in which line or entry.
    """
    try:
        found = next((p for p in (Path(path), Path(folder or '') / path) if p.is_file()), None)
    except OSError as e:
        raise PSTError(f'--class-map {path}: {e.strerror}.') from e
    if found is None:
        raise PSTError(f'--class-map {path}: there is no such file.')
    if found.suffix.lower() == '.pkl':
        classes = _pickled_classes(path, found)
    elif found.suffix.lower() == '.txt':
        classes = _listed_classes(path, found)
    else:
        raise PSTError(
            f'--class-map {path}: expected a .txt file with one class name a line, or a .pkl file of a dict.')
    if not classes:
        raise PSTError(f'--class-map {path}: it is empty; expected one class name a line, in the order of the classes.')
    return classes


def _listed_classes(path: str, found: Path) -> Dict[Any, int]:
    try:
        lines = [line.strip() for line in read_text(found).split('\n')]
    except (OSError, ValueError) as e:
        raise PSTError(f'--class-map {path}: not a text file in UTF-8 ({e}).') from e
    while lines and not lines[-1]:
        lines.pop()
    classes: Dict[Any, int] = {}
    for i, name in enumerate(lines):
        if not name or '\0' in name:
            kind = 'binary' if name else 'empty'
            raise PSTError(f'--class-map {path}: line {i + 1} is {kind}; expected a class name.')
        if name in classes:
            raise PSTError(
                f'--class-map {path}: line {i + 1} names {name!r} again, which is line {classes[name] + 1} already.')
        classes[name] = i
    return classes


def _pickled_classes(path: str, found: Path) -> Dict[Any, int]:
    try:
        classes = load_class_map(str(found))  # which takes plain values only
    except Exception as e:  # what a damaged pickle raises is no short list
        raise PSTError(f'--class-map {path}: not a pickled dict of class names to indices ({e}).') from e
    for name, i in classes.items():
        if isinstance(i, bool) or not isinstance(i, int) or i < 0:
            raise PSTError(
                f'--class-map {path}: {str(name)[:80]!r} is given {str(i)[:80]!r}; expected a whole number from 0 on.')
    return classes
