"""Images as a person sees them, and those of a folder. Training, validation and pictures all read through here."""
import logging
import os
import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Collection, FrozenSet, List, Optional, Sequence, Set, Tuple, Union

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from timm.data import get_img_extensions

from pst_timm.utils.errors import PSTError

__all__ = [
    'EXTENSIONS', 'MODES', 'FoundImages', 'UnreadableImage', 'as_seen', 'find_images', 'first_of', 'image_size',
    'listed', 'open_image', 'read_image', 'scan_folder', 'warn_once',
]

_logger = logging.getLogger(__name__)
# old cameras leave such notes in thousands of images; the pixels are whole
warnings.filterwarnings('ignore', 'Corrupt EXIF data', UserWarning)

EXTENSIONS = (*get_img_extensions(), '.webp', '.bmp', '.gif', '.tif', '.tiff')
# no reader here takes these by itself, and who has such files wants to know
OTHER_EXTENSIONS = (*EXTENSIONS, '.avif', '.heic', '.jfif', '.jp2', '.pgm', '.ppm')
MODES = ('L', 'LA', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'HSV')  # whole bytes in every channel
# of the formats that Pillow knows, those that it decodes itself: for others it starts programs, such as Ghostscript
FORMATS = (
    'JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM', 'JPEG2000', 'AVIF', 'HEIF', 'MPO', 'DDS', 'DIB', 'ICO', 'PCX',
    'QOI', 'SGI', 'TGA', 'XBM', 'XPM')
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(PSTError):
    """What should be an image is none, or not wholly."""


def open_image(path: os.PathLike, mode: str = 'RGB', upright: bool = True) -> Image.Image:
    """Read an image file, see `as_seen`.

    Args:
        path: The file.
        mode: One of `MODES`.
        upright: Whether to turn it as the camera notes.

    Raises:
        PSTError: If it is missing, damaged, or no image.
    """
    if not os.path.exists(path):
        raise PSTError(f'There is no image {path}.')
    if not os.path.isfile(path):  # to open a FIFO is to wait
        raise PSTError(f'{path} cannot be read as an image: it is a folder, a device, a FIFO or a socket.')
    try:
        return read_image(path, mode, upright)
    except UnreadableImage as e:
        raise PSTError(f'{path} cannot be read as an image: {e}.') from e


def read_image(file: Union[os.PathLike, BinaryIO], mode: str = 'RGB', upright: bool = True) -> Image.Image:
    """Read an image, see `as_seen`.

    Raises:
        UnreadableImage: If it is damaged, too large to be honest, or no image.
    """
    try:
        with Image.open(file, formats=_formats()) as image:
            return as_seen(image, mode, upright)
    except UnidentifiedImageError as e:  # whose text repeats the path, or tells the address of a file in memory
        raise UnreadableImage('cannot identify image file') from e
    except Exception as e:  # what Pillow's decoders raise over damaged bytes is no short list
        raise UnreadableImage(str(e) or type(e).__name__) from e


def image_size(path: os.PathLike) -> Optional[Tuple[int, int]]:
    """Width and height in pixels as they are stored, which the head of a file tells; None if it cannot be read."""
    if not os.path.isfile(path):
        return None
    try:
        with Image.open(path, formats=_formats()) as image:
            return image.size
    except Exception:  # see `read_image`
        return None


@cache
def _formats() -> List[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def as_seen(image: Image.Image, mode: str = 'RGB', upright: bool = True) -> Image.Image:
    """An image as a person sees it: upright, 16 bits scaled to 8, transparent parts white unless `mode` keeps them.

    Without `upright`, its pixels stay in the order in which they are stored.
    """
    image.load()
    if image.mode == 'F':
        raise UnreadableImage('its pixels are floating-point numbers, of which nothing tells which is black or white')
    turn = UPRIGHT.get(_orientation(image)) if upright else None
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.format == 'PNG'):  # the latter in older Pillow
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).clip(max=255).astype(np.uint8))
    if image.has_transparency_data and mode not in ('LA', 'RGBA'):
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    if image.mode != mode:
        image = image.convert(mode)
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> Optional[int]:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # a broken note beside the pixels, which may well be whole
        return None


@dataclass
class FoundImages:
    """What there is in a folder, and in the folders in it."""
    paths: List[str] = field(default_factory=list)
    """Images, in no order."""
    ignored: Counter = field(default_factory=Counter)
    """Number of images in formats that were not asked for, by ending."""
    closed: List[str] = field(default_factory=list)
    """Folders that cannot be opened, with the reason."""
    circles: List[str] = field(default_factory=list)
    """Links to a folder that they are in."""
    odd: List[str] = field(default_factory=list)
    """What is called like an image and is no file: FIFOs, devices, sockets, broken links."""
    empty: Set[str] = field(default_factory=set)
    """Folders directly in the folder without an image in or below them."""

    def left_out(self) -> List[str]:
        """What was not taken, in words."""
        parts = []
        if self.ignored:
            parts.append('images in other formats (' + ', '.join(
                f'{count} {ending}' for ending, count in sorted(self.ignored.items())) + ')')
        for paths, one, many in (
                (self.closed, 'folder that cannot be opened', 'folders that cannot be opened'),
                (self.circles, 'link to a folder that it is in', 'links to folders that they are in'),
                (self.odd, 'that is no file (FIFO, device, socket or broken link)',
                 'that are no files (FIFOs, devices, sockets or broken links)')):
            if paths:
                parts.append(f'{len(paths)} {one if len(paths) == 1 else many} ({first_of(paths)})')
        return parts


def first_of(names: Collection[str], most: int = 3) -> str:
    """The first few names, by name."""
    return listed(sorted(names), most)


def listed(names: Sequence[Any], most: int = 3) -> str:
    """Some names that others chose: the first few, none too long, and without what would steer a terminal."""
    shown = [str(name) if str(name).isprintable() else repr(str(name)) for name in names[:most]]
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(name if len(name) <= 300 else f'{name[:300]}...' for name in shown) + more


def scan_folder(root: os.PathLike, endings: Collection[str]) -> FoundImages:
    """Look for images in a folder and the folders in it; links are followed, but not in circles.

    Args:
        root: The folder.
        endings: Endings of the files to take, in lower case.

    Raises:
        PSTError: If the folder itself cannot be opened.
    """
    found, taken = FoundImages(), set(endings)
    real = Path(os.path.realpath(root))
    # a link to a folder above the first one is a circle too
    stack = [(os.fspath(root), frozenset(filter(None, map(_identity, real.parents))), '')]
    while stack:
        folder, above, top = stack.pop()
        try:
            with os.scandir(folder) as entries:
                entries = list(entries)
        except OSError as e:
            if folder == os.fspath(root):
                raise PSTError(f'Cannot open the folder {root}: {e.strerror}.') from e
            found.closed.append(f'{folder}: {e.strerror}')
            continue
        inside: FrozenSet = above | {_identity(folder)}
        count = len(found.paths)
        for entry in entries:
            is_file, is_dir = _kind(entry)
            if is_dir:
                if entry.is_symlink() and _identity(entry.path) in inside:
                    found.circles.append(entry.path)
                else:
                    stack.append((entry.path, inside, top or entry.name))
                    if not top:
                        found.empty.add(entry.name)
                continue
            ending = os.path.splitext(entry.name)[1].lower()
            if ending not in taken:
                if is_file and ending in OTHER_EXTENSIONS:
                    found.ignored[ending] += 1
            elif is_file:
                found.paths.append(entry.path)
            else:
                found.odd.append(entry.path)
        if len(found.paths) > count:
            found.empty.discard(top)
    return found


def _kind(entry: os.DirEntry) -> Tuple[bool, bool]:
    try:
        return (True, False) if entry.is_file() else (False, entry.is_dir())
    except OSError:  # a link to itself
        return False, False


def _identity(folder: os.PathLike) -> Optional[Tuple[int, int]]:
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_dev, found.st_ino


@cache
def warn_once(message: str) -> None:
    """Log a warning that has not been logged before."""
    _logger.warning(message)


def find_images(folder: os.PathLike, limit: Optional[int] = None) -> Tuple[List[Path], int]:
    """Images in a folder and the folders in it, by name; evenly spaced ones if there are more than the limit.

    Args:
        folder: The folder.
        limit: Most images to return, all if None.

    Returns:
        The images, and how many there are in all.

    Raises:
        PSTError: If there are none.
    """
    found = scan_folder(folder, EXTENSIONS)
    left_out = '; '.join(found.left_out())
    if left_out:
        warn_once(f'Left out of {folder}: {left_out}.')
    if not found.paths:
        raise PSTError(f'The folder {folder} has no images ({", ".join(EXTENSIONS)}).')
    paths = sorted(map(Path, found.paths))
    count = len(paths) if limit is None else min(limit, len(paths))
    return [paths[i * len(paths) // count] for i in range(count)], len(paths)
