"""Progress bars."""
import sys
from typing import Iterable

from tqdm import tqdm

__all__ = ['progress_bar']


def progress_bar(items: Iterable, total: int, title: str, enabled: bool = True) -> tqdm:
    """A bar over an iterable that shows nothing where standard error is not a terminal."""
    return tqdm(items, total=total, desc=title, leave=False, disable=not (enabled and sys.stderr.isatty()))
