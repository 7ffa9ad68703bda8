"""Which images are classified right, a bit each, so that two models can be compared image by image."""
import math
from typing import Any, Dict, List, Sequence

import numpy as np
import torch

from .base import Metric

__all__ = ['Answers', 'pack_answers', 'unpack_answers']


class Answers(Metric):
    """Which images are classified right, so that two models can be compared image by image."""

    def __init__(self):
        self.right: List[torch.Tensor] = []

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        self.right.append(output.argmax(dim=-1).eq(target).cpu())

    def results(self) -> Dict[str, Any]:
        """`answers`: hexadecimal digits for four images each in their order, first image in the highest bit."""
        return dict(answers=pack_answers(torch.cat(self.right).tolist()))


def pack_answers(right: Sequence[bool]) -> str:
    """Right and wrong answers as hexadecimal digits for four images each; zeros fill the last digit."""
    bits = ''.join('1' if r else '0' for r in right)
    bits += '0' * (-len(bits) % 4)
    return ''.join(f'{int(bits[i:i + 4], 2):x}' for i in range(0, len(bits), 4))


def unpack_answers(digits: str, images: int) -> np.ndarray:
    """Which images (N,) were classified right, from hexadecimal digits, four images a digit, the first one highest.

    Raises:
        ValueError: If the digits are not those of so many images.
    """
    if len(digits) != math.ceil(images / 4):
        raise ValueError(f'{images} images are {math.ceil(images / 4)} hexadecimal digits, got {len(digits)}')
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits + '0' * (len(digits) % 2)), np.uint8))
    if bits[images:].any():
        raise ValueError(f'there are right answers beyond the last of {images} images')
    return bits[:images].astype(bool)
