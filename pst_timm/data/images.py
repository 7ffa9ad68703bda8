"""Images as a person sees them, and those of a folder."""
import os
from pathlib import Path
from typing import List, Tuple

import numpy as np
from PIL import Image, ImageOps
from timm.data import get_img_extensions

from pst_timm.utils.errors import PSTError

__all__ = ['EXTENSIONS', 'find_images', 'open_image']

EXTENSIONS = (*get_img_extensions(), '.webp', '.bmp', '.gif', '.tif', '.tiff')


def open_image(path: os.PathLike, mode: str = 'RGB') -> Image.Image:
    """Read an image as a person sees it: upright, transparent parts white.

    Args:
        path: The file.
        mode: 'RGB', or 'L' for grey.

    Raises:
        PSTError: If it is missing, damaged, or no image.
    """
    if not os.path.isfile(path):
        raise PSTError(f'There is no image {path}.')
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith('I;16'):
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert('RGBA')
                image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
            return image.convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:  # all that PIL's readers raise
        raise PSTError(f'{path} cannot be read as an image: {e}.') from e


def find_images(folder: os.PathLike, limit: int) -> Tuple[List[Path], int]:
    """Images in a folder and the folders in it, by name; evenly spaced ones if there are more than the limit.

    Args:
        folder: The folder.
        limit: Most images to return.

    Returns:
        The images, and how many there are in all.

    Raises:
        PSTError: If there are none.
    """
    paths = sorted(p for p in Path(folder).rglob('*') if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not paths:
        raise PSTError(f'The folder {folder} has no images ({", ".join(EXTENSIONS)}).')
    count = min(limit, len(paths))
    return [paths[i * len(paths) // count] for i in range(count)], len(paths)
