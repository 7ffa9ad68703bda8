"""timm's automatic augmentation: its texts checked, and what it asks of Pillow kept working."""
import re
from typing import Any

from PIL import Image
from timm.data.auto_augment import (
    NAME_TO_OP,
    augment_and_mix_transform,
    auto_augment_transform,
    posterize,
    rand_augment_transform,
)

from pst_timm.utils.errors import PSTError

__all__ = ['check_policy']

# numbers that timm reads in a section of each policy, and the sets of operations of 't'
NUMBERS = dict(rand=('m', 'n', 'p', 'mstd', 'mmax', 'inc'), augmix=('m', 'w', 'd', 'a', 'b', 'mstd'), auto=('mstd',))
SETS = ('weights', '3a', '3aw')


def check_policy(text: str) -> None:
    """Make sure that timm reads a text such as rand-m9-mstd0.5 wholly: it skips, or takes for others, parts of it.

    Raises:
        PSTError: If there is no such policy, or a section of the text means nothing.
    """
    name, *sections = text.split('-')
    kind = name if name in ('rand', 'augmix') else 'auto'
    make = dict(rand=rand_augment_transform, augmix=augment_and_mix_transform, auto=auto_augment_transform)[kind]
    try:
        make(text, dict(translate_const=1, img_mean=(0, 0, 0)))
    except (AssertionError, ValueError) as e:
        if kind == 'auto' and not sections:
            raise PSTError(
                f'{text!r} is no automatic augmentation: expected rand-..., augmix-..., original, originalr, v0, v0r '
                f'or 3a, such as rand-m7-mstd0.5-inc1.') from None
        raise PSTError(f'timm cannot read {text!r} ({e}); write it as rand-m7-mstd0.5-inc1.') from None
    for section in sections:
        if kind == 'rand' and section.startswith('t'):
            if section[1:] not in SETS:
                raise PSTError(f'{text!r} names a set of operations {section!r}: expected t{", t".join(SETS)}.')
            continue
        found = re.fullmatch(r'([a-z]+)(\d.*)', section)
        if not found or found[1] not in NUMBERS[kind]:
            known = ', '.join(NUMBERS[kind])
            raise PSTError(f'{text!r} has a part {section!r} that timm skips: expected {known} with a number each.')


def posterize_to_black(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    """timm's `posterize`, down to no bits at all, which timm's policies ask for and newer Pillow refuses: black."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return posterize(image, bits_to_keep, **kwargs)


for _name, _op in NAME_TO_OP.items():
    if _op is posterize:
        NAME_TO_OP[_name] = posterize_to_black
