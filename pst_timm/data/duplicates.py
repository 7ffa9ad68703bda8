"""Copies of images, within a split and across splits: the same pixels, or nearly so after resizing or recompression."""
import hashlib
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from pst_timm.utils.errors import PSTError
from pst_timm.utils.progress import progress_bar

from .loaders import plain_worker_errors
from .samples import LOOKS, Look, Samples, look_of
from .scores import neighbours

__all__ = ['Prints', 'duplicate_groups', 'fingerprint', 'likeness', 'read_prints']

SIDE = 16  # of a thumbnail
CANDIDATES = 8  # neighbours of an image that are compared with it
# correlation of two thumbnails, and root of their mean squared difference, that make a copy: strong compression leaves
# 0.99 and 0.013, and of 4,000 different photographs no two had more than 0.97 or less than 0.09
ALIKE, APART = 0.985, 0.025
# where each is a neighbour of the other to a model, brightness does not count, nor which side is left
ALIKE_TO_MODEL, NEAR_TO_MODEL = 0.995, 0.9
FLAT = 0.01  # standard deviation of a thumbnail below which there is nothing in it to compare


class Prints(NamedTuple):
    """What is known of N images without a model; those that could not be read are left out."""
    kept: np.ndarray
    """int64: places of the images among all."""
    digests: List[bytes]
    """Of size and pixels."""
    thumbs: np.ndarray
    """uint8 (N, 16, 16): small grey copies."""
    looks: np.ndarray
    """float64 (N, looks): a `Look` each."""
    labels: np.ndarray
    """int64 (N,), -1 where there is none."""
    broken: List[str]
    """Names of the images that could not be read."""


def fingerprint(image: Image.Image) -> Tuple[bytes, np.ndarray, Look]:
    """Digest, thumbnail and look of an image."""
    digest = hashlib.sha256(repr((image.mode, image.size)).encode() + image.tobytes()).digest()
    small = image.convert('L').resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return digest, np.asarray(small), look_of(image)


class _Printed(Dataset):
    def __init__(self, samples: Samples):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Optional[tuple]:
        try:
            image, label = self.samples.read(index)
            return (index, *fingerprint(image), label)
        except (PSTError, OSError):
            return None


def _kept(items: Sequence[Any]) -> List[Any]:
    return [item for item in items if item is not None]


def read_prints(samples: Samples, workers: int = 0, title: str = 'Images') -> Prints:
    """Read all images once.

    Args:
        samples: The images.
        workers: Processes that read, 0 for this one.
        title: Name in the bar.
    """
    loader = DataLoader(_Printed(samples), 64, num_workers=workers, collate_fn=_kept)
    with plain_worker_errors():
        rows = [row for batch in progress_bar(loader, len(loader), title) for row in batch]
    kept = [row[0] for row in rows]
    missing = sorted(set(range(len(samples))) - set(kept))
    return Prints(
        np.array(kept, np.int64),
        [row[1] for row in rows],
        np.array([row[2] for row in rows], np.uint8).reshape(-1, SIDE, SIDE),
        np.array([row[3] for row in rows], float).reshape(-1, len(LOOKS)),
        np.array([row[4] for row in rows], np.int64),
        [samples.names[i] for i in missing])


def likeness(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation of thumbnails (..., S, S), from -1 to 1; 0 where one has nothing in it."""
    x, y = _centred(a), _centred(b)
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    return np.divide((x * y).sum(axis=-1), norms, out=np.zeros_like(norms), where=norms > 0)


def _centred(thumbs: np.ndarray) -> np.ndarray:
    flat = thumbs.reshape(*thumbs.shape[:-2], thumbs.shape[-2] * thumbs.shape[-1]).astype(np.float32) / 255
    flat = flat - flat.mean(axis=-1, keepdims=True)
    return np.where(flat.std(axis=-1, keepdims=True) < FLAT, 0, flat)


def duplicate_groups(
        digests: Sequence[bytes],
        thumbs: np.ndarray,
        embeddings: Optional[np.ndarray] = None,
) -> np.ndarray:
    """Groups of images that are copies of each other.

    Copies are images with the same pixels; images whose thumbnails are as good as the same, as after resizing or
    recompression; and images that are near neighbours to a model, whose thumbnails differ in brightness, contrast or by
    being mirrored alone. Images of one colour are copies only pixel by pixel.

    Args:
        digests: N of them.
        thumbs: uint8 (N, S, S).
        embeddings: (N, D) of one model; None to go without.

    Returns:
        int64 (N,): a number for each group, -1 for images that have no copy.
    """
    count = len(digests)
    parents = np.arange(count)

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = i = parents[parents[i]]
        return i

    def join(a: int, b: int) -> None:
        parents[max(root(a), root(b))] = min(root(a), root(b))

    first: Dict[bytes, int] = {}
    for i, digest in enumerate(digests):
        join(first.setdefault(digest, i), i)
    # of images with the same pixels one stands for all, so that many of them do not hide a near one
    single = np.array(sorted(first.values()), np.int64)
    for a, b in _near_pairs(thumbs[single], None if embeddings is None else embeddings[single]):
        join(single[a], single[b])
    roots = np.array([root(i) for i in range(count)], np.int64)
    sizes = np.bincount(roots, minlength=count)
    return np.where(sizes[roots] > 1, roots, -1)


def _near_pairs(thumbs: np.ndarray, embeddings: Optional[np.ndarray]) -> np.ndarray:
    """Pairs (P, 2) of images that are nearly copies."""
    found = [np.zeros((0, 2), np.int64)]
    if len(thumbs) < 2:
        return found[0]
    pairs = _pairs(neighbours(_centred(thumbs), k=CANDIDATES)[0])
    alike, apart = _compare(thumbs, pairs, thumbs)
    found.append(pairs[(alike >= ALIKE) & (apart <= APART)])
    if embeddings is not None:
        indices, near = neighbours(embeddings - embeddings.mean(axis=0), k=CANDIDATES)
        pairs = _pairs(np.where(near >= NEAR_TO_MODEL, indices, -1))
        pairs = pairs[(indices[pairs[:, 1]] == pairs[:, :1]).any(axis=1)]
        for other in (thumbs, thumbs[:, :, ::-1]):
            found.append(pairs[_compare(thumbs, pairs, other)[0] >= ALIKE_TO_MODEL])
    return np.concatenate(found)


def _pairs(indices: np.ndarray) -> np.ndarray:
    """Pairs (P, 2) of the images with their neighbours (N, k), of which -1 is none."""
    pairs = np.stack([np.repeat(np.arange(len(indices)), indices.shape[1]), indices.ravel()], axis=1)
    return pairs[pairs[:, 1] >= 0]


def _compare(thumbs: np.ndarray, pairs: np.ndarray, others: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Correlation (P,) of pairs of thumbnails, and root of the mean squared difference (P,) of their grey, 0 to 1."""
    alike, apart = [np.zeros(0)], [np.zeros(0)]
    for chunk in np.array_split(pairs, 1 + len(pairs) // 100_000):
        a, b = thumbs[chunk[:, 0]], others[chunk[:, 1]]
        alike.append(likeness(a, b))
        apart.append(np.sqrt(((a.astype(np.float32) - b) ** 2).mean(axis=(1, 2))) / 255)
    return np.concatenate(alike), np.concatenate(apart)
