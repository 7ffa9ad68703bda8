"""How often each training image is seen: classes balanced, hard images more often, both drawn with replacement."""
import logging
import math
import os
import zlib
from argparse import Namespace
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence

import numpy as np
import torch
from timm.data import ImageDataset
from timm.loss import compute_class_weights
from torch.utils.data import DataLoader, Dataset, Sampler

from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import read_csv

from .images import listed

__all__ = [
    'SAMPLERS', 'DrawnImages', 'TrainImages', 'class_weights', 'draw_with', 'labels_of', 'open_train_images',
    'rare_classes', 'read_weights',
]

_logger = logging.getLogger(__name__)

SAMPLERS = ('balanced', 'sqrt', 'effective')
LARGEST_FILE = 256 * 2 ** 20  # bytes of a file of weights, several million images
LARGEST_WEIGHT = 1e9  # beside which one of 1 would be nothing
DRAW = 2  # tells the generator of the draw from those of the batches, which have the same seed


class TrainImages(NamedTuple):
    """Labels of the N training images, and how likely each is drawn."""
    labels: np.ndarray
    """int64 (N,)."""
    chances: Optional[np.ndarray]
    """float64 (N,), with a sum of 1; None where each image comes once in an epoch."""

    def class_shares(self, classes: int) -> np.ndarray:
        """What share of the images that are seen is of each class, float64 (classes,)."""
        chances = self.chances if self.chances is not None else np.full(len(self.labels), 1 / len(self.labels))
        return np.bincount(self.labels, chances, minlength=classes)

    @property
    def digest(self) -> Optional[int]:
        """What tells one set of chances from another, None where there are none."""
        return zlib.crc32(self.chances.tobytes()) if self.chances is not None else None


def open_train_images(args: Namespace, dataset: Dataset) -> Optional[TrainImages]:
    """What the flags about balance and hard examples need to know of the training images; reads none of them.

    Args:
        args: Arguments of a training run.
        dataset: The training images.

    Returns:
        None if none of these flags is given.

    Raises:
        PSTError: If the data does not tell the labels or names that a flag needs, or the file of weights does not fit.
    """
    flags = dict(sampler=args.sampler, hard_examples=args.hard_examples, logit_adjust=args.logit_adjust,
                 rare_aa=args.rare_aa)
    given = [f'--{key.replace("_", "-")} {value}' for key, value in flags.items() if value]
    if not given:
        return None
    labels = labels_of(dataset)
    if labels is None:
        raise PSTError(
            f'{given[0]} needs the labels of all training images beforehand, which a stream of shards and some '
            f'datasets do not tell: use a folder of class folders or a .tar file, or leave it out.')
    if not (args.sampler or args.hard_examples):
        return TrainImages(labels, None)
    weights, show = np.ones(len(labels)), getattr(args, 'rank', 0) == 0
    if args.sampler:
        weights = class_weights(np.bincount(labels), args.sampler)[labels]
    if args.hard_examples:
        weights = weights * read_weights(args.hard_examples, _names_of(dataset), show)
    chances = weights / weights.sum()
    if show:
        _say(given[:bool(args.sampler) + bool(args.hard_examples)], TrainImages(labels, chances))
    return TrainImages(labels, chances)


def _say(given: Sequence[str], images: TrainImages) -> None:
    before = images._replace(chances=None).class_shares(0)
    after = images.class_shares(0)
    count = len(images.labels)
    # an image is missed by all draws of an epoch with this probability
    different = count - np.exp(count * np.log1p(-np.minimum(images.chances, 1 - 1e-12))).sum()
    present = before > 0
    _logger.info(
        f'{", ".join(given)}: the shares of the classes are {after[present].min():.2%} to {after[present].max():.2%} '
        f'(of the images: {before[present].min():.2%} to {before[present].max():.2%}); an epoch of {count:,} draws '
        f'shows about {different:,.0f} different images.')


def labels_of(dataset: Dataset) -> Optional[np.ndarray]:
    """Class indices of all images, int64 (N,), without reading one; None if the dataset does not tell."""
    reader = getattr(dataset, 'reader', dataset)
    if hasattr(reader, 'iter_targets'):
        found = list(reader.iter_targets())
    elif hasattr(reader, 'targets'):  # of .tar files, and of torchvision's datasets
        found = reader.targets
    elif isinstance(dataset, ImageDataset) and hasattr(reader, 'samples'):
        found = [target for _, target in reader.samples]
    else:
        return None
    labels = np.asarray(found)
    if labels.shape != (len(dataset),) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        return None
    return labels.astype(np.int64)


def _names_of(dataset: Dataset) -> List[str]:
    """Paths of the images below the folder of the split, with '/' between their parts."""
    if not isinstance(dataset, ImageDataset):
        raise PSTError(
            '--hard-examples goes by the names of the images, which this dataset does not tell: use a folder of class '
            'folders or a .tar file, or leave it out.')
    # as text files have them: file systems have names that are no text
    return [
        str(name).replace(os.sep, '/').encode('utf-8', 'backslashreplace').decode() for name in dataset.filenames()]


def class_weights(counts: Sequence[int], sampler: str) -> np.ndarray:
    """How likely an image of each class is to be drawn, beside one of another class.

    - balanced: 1/n for a class of n images, so that all classes are drawn alike often;
    - sqrt: 1/sqrt(n), half of the way on a logarithmic scale (Mahajan et al. 2018, Exploring the Limits of Weakly
      Supervised Pretraining);
    - effective: 1/E(n) with the effective number E(n) = (1 - beta^n) / (1 - beta) (Cui et al. 2019, Class-Balanced
      Loss Based on Effective Number of Samples), where images of large classes repeat one another. The paper has
      beta = (N - 1)/N for the N different images that a class can have; here N is the size of the largest class.

    Args:
        counts: Images of each class.
        sampler: One of `SAMPLERS`.

    Returns:
        float64 (classes,), with a mean of 1; a class without images counts as one with a single image.
    """
    counts, total, largest = torch.as_tensor(counts), int(np.sum(counts)), int(np.max(counts))
    if largest == 1:
        return np.ones(len(counts))
    if sampler == 'effective':
        method = dict(method='effective_num', beta=(largest - 1) / largest)
    else:
        method = dict(method='inv_freq', power=dict(balanced=1., sqrt=0.5)[sampler])
    return compute_class_weights(counts, total, **method)[1].double().numpy()


def read_weights(path: str, names: Sequence[str], show: bool = True) -> np.ndarray:
    """Read how often each image is to be seen, as `pst-timm audit` writes it.

    Args:
        path: CSV file with a header and the columns `image`, a path below the folder of the split with '/' between
            its parts, and `weight`.
        names: Such paths of the training images.
        show: Whether to say what the file names too much or too little.

    Returns:
        Weights (N,) in the order of the names, 1 for those that the file does not name.

    Raises:
        PSTError: If it cannot be read, has a weight that is no finite number from 0 up, names an image twice, names
            none of the images, or leaves nothing to draw from.
    """
    where = f'--hard-examples: {path}'
    if not os.path.isfile(path):
        raise PSTError(f'{where} is no file: expected a CSV file with the columns image and weight.')
    if os.path.getsize(path) > LARGEST_FILE:
        raise PSTError(f'{where} has more than {LARGEST_FILE >> 20} MiB: expected a line for each training image.')
    rows = read_csv(path)
    missing = [column for column in ('image', 'weight') if rows and column not in rows[0]]
    if missing or not rows:
        raise PSTError(f'{where} {"has no column " + missing[0] if missing else "names no image"}: expected a header '
                       f'with the columns image and weight, and a line for each image.')
    found: Dict[str, float] = {}
    for number, row in enumerate(rows, 2):
        name = row['image'].replace(os.sep, '/')
        weight = _number(row['weight'])
        if not 0 <= weight <= LARGEST_WEIGHT:
            raise PSTError(
                f'{where}, line {number} gives {listed([name])} the weight {listed([row["weight"]])}: expected a '
                f'number from 0 to {LARGEST_WEIGHT:g}.')
        if name in found:
            raise PSTError(f'{where}, line {number} names {listed([name])} again: expected one weight for an image.')
        found[name] = weight
    known = set(names)
    unknown = [name for name in found if name not in known]
    if len(unknown) == len(found):
        raise PSTError(
            f'{where} names none of the training images: its first is {listed(unknown, 1)}, and theirs is '
            f'{listed(names, 1)}. Names are paths below the folder of the split.')
    if unknown and show:
        _logger.warning(f'{where} names {len(unknown)} images that are not there: {listed(unknown)}.')
    if show and (absent := sum(name not in found for name in names)):
        _logger.warning(f'{where} does not name {absent} of the {len(names)} training images: they get the weight 1.')
    weights = np.array([found.get(name, 1.) for name in names])
    if not weights.any():
        raise PSTError(f'{where} leaves nothing to draw from: all weights are 0.')
    return weights


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def rare_classes(labels: np.ndarray, below: int) -> List[int]:
    """Indices of the classes that have images, but fewer than so many."""
    counts = np.bincount(labels)
    return [int(i) for i in np.flatnonzero((counts > 0) & (counts < below))]


class DrawnImages(Sampler):
    """Images drawn with replacement, one draw for all processes that depends on seed and epoch alone.

    The loader's own sampler says which places of the draw this process takes, and in what order: all of them in random
    order, a share, or with repeated augmentation each of its places several times, spread over the processes. What
    holds for images without a draw holds for places of the draw with it.
    """

    def __init__(self, chances: Sequence[float], seed: int, places: Sampler):
        """
        Args:
            chances: How likely each image is drawn (N,), with a sum of 1.
            seed: Seed of the run.
            places: Sampler of numbers from 0 to N - 1.
        """
        # the last is 1 without rounding, so that no draw falls beyond it
        cumulative = np.cumsum(chances)
        self.cumulative = cumulative / cumulative[-1]
        self.seed = seed
        self.places = places
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.places, 'set_epoch'):
            self.places.set_epoch(epoch)

    def draw(self) -> np.ndarray:
        """Indices of the images that all processes together see in this epoch, (N,)."""
        shares = np.random.default_rng([self.seed, self.epoch, DRAW]).random(len(self.cumulative))
        # the first image whose cumulated chance is above the share, so never one without a chance
        return np.searchsorted(self.cumulative, shares, side='right')

    def __iter__(self) -> Iterator[int]:
        return iter(self.draw()[list(self.places)].tolist())

    def __len__(self) -> int:
        return len(self.places)


def draw_with(loader: Any, chances: np.ndarray, seed: int) -> Any:
    """The same loader, made anew with drawn images.

    Args:
        loader: A loader of timm's factory over images in random order, with or without its prefetcher.
        chances: How likely each image is drawn (N,), with a sum of 1.
        seed: Seed of the run.
    """
    if not isinstance(loader, DataLoader):
        loader.loader = draw_with(loader.loader, chances, seed)
        return loader
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=DrawnImages(chances, seed, loader.sampler),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        worker_init_fn=loader.worker_init_fn,
        persistent_workers=loader.persistent_workers,
    )
