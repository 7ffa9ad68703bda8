"""Names of splits, as people and data sets write them."""
import re
from typing import Collection

from pst_timm.data.datasets import TRAINING, VALIDATION
from pst_timm.data.images import first_of
from pst_timm.utils.errors import PSTError, did_you_mean
from pst_timm.utils.markdown import plain

__all__ = ['choose_split']

GROUPS = (TRAINING, VALIDATION, ('test', 'testing'))


def choose_split(split: str, known: Collection[str], where: str) -> str:
    """The split that a name means: the very one, or the only one by another of its names ('val', 'val2017', 'valid').

    Args:
        split: The name.
        known: Names of the splits there are.
        where: What has them, for the message.

    Raises:
        PSTError: If there is none, or more than one.
    """
    if split in known:
        return split
    asked = _group(split)
    alike = [name for name in known if asked is not None and _group(name) == asked]
    year = re.fullmatch(r'\D*', split) is None
    if len(alike) == 1 and not year:
        return alike[0]
    have = f'it has {first_of(known, 10)}' if known else 'it has none'
    which = f': {first_of(alike)} could be meant' if len(alike) > 1 and not year else ''
    raise PSTError(f'{where} has no {split!r} split{which}; {have}.{did_you_mean(split, map(plain, known))}')


def _group(name: str) -> object:
    stem = re.sub(r'[-_]?\d{4}$', '', name.lower())
    return next((group for group in GROUPS if stem in group), None)
