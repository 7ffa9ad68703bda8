"""Images that quantisation looks at: some to calibrate by and others to check with, from one split, never the same."""
import logging
from typing import Any, Dict, Iterator, List, NamedTuple, Set, Tuple

import torch
import torch.nn as nn
from timm.data import create_transform
from torch.utils.data import DataLoader

from pst_timm.checkpoints import label_names
from pst_timm.data.datasets import create_eval_dataset
from pst_timm.data.images import listed
from pst_timm.data.loaders import plain_worker_errors
from pst_timm.data.samples import Samples, collate_samples
from pst_timm.engine.args import validate_args
from pst_timm.utils.errors import PSTError
from pst_timm.utils.markdown import plain

__all__ = ['Drawn', 'ImageBatches', 'draw_images', 'drawn_subset', 'open_images']

_logger = logging.getLogger(__name__)

Batch = Tuple[torch.Tensor, torch.Tensor]


class ImageBatches:
    """Images in batches with their labels, read anew in every pass: (B, C, H, W) and (B,), -1 where there is none."""

    def __init__(self, samples: Samples, batch_size: int = 32, workers: int = 0):
        self.samples = samples
        self.loader = DataLoader(samples, batch_size, num_workers=workers, collate_fn=collate_samples)
        self.told: Set[int] = set()

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        with plain_worker_errors():
            for batch, unread in self.loader:
                new = [image.index for image in unread if image.index not in self.told]
                if new:  # told once, in however many passes
                    names = [plain(self.samples.names[index], 300) for index in new]
                    _logger.warning(f'Skipped {len(names)} image(s) that cannot be read: {listed(names)}.')
                    self.told.update(new)
                if batch is not None:
                    yield batch.image, batch.label


class Drawn(NamedTuple):
    """Images of one split."""
    calibration: List[torch.Tensor]
    """Batches (B, C, H, W)."""
    held_out: ImageBatches
    """Others of the split."""


def open_images(
        model: nn.Module,
        config: Dict[str, Any],
        data_dir: str,
        split: str,
        labels: bool = True,
) -> Samples:
    """The images of a split as a model takes them at test time.

    Args:
        model: The model, by whose class names the folders go where it knows any.
        config: Its preprocessing, see `timm.data.resolve_data_config`.
        data_dir: The data.
        split: Split, or folder below the data.
        labels: Whether the folders tell the classes.

    Raises:
        PSTError: If there are no such images, or, with `labels`, they have classes that the model does not know.
    """
    channels = config['input_size'][0]
    if channels not in (1, 3):
        raise PSTError(f'The model takes images of {channels} channels; images from files have 3, or 1 if grey.')
    args = validate_args(
        data_dir=str(data_dir), split=split, in_chans=channels, **({} if labels else {'real_labels': 'none'}))
    dataset = create_eval_dataset(args, split, None)
    transform = create_transform(**config)
    if not labels:
        paths = dataset.filenames(absolute=True)
        return Samples.loose(paths, transform, 'L' if channels == 1 else 'RGB')
    names = label_names(model)
    samples = Samples.labelled(dataset, transform, names)
    if not names and len(samples.class_names) != model.num_classes:
        raise PSTError(
            f'{data_dir} has {len(samples.class_names)} classes, and the model has {model.num_classes} without names: '
            f'which is which is not known. Take data of its classes, or name a model of these classes; '
            f'`pst-timm quantize --no-labels` needs neither.')
    return samples


def draw_images(
        samples: Samples,
        count: int = 128,
        held_out: int = 1000,
        seed: int = 0,
        batch_size: int = 16,
        workers: int = 0,
) -> Drawn:
    """Draw images to calibrate by, and others to check with.

    Args:
        samples: Those of the split.
        count: Images to calibrate by; at most half of them where the split is small.
        held_out: Images to check with, at most.
        seed: Seed of the draw.
        batch_size: Images of a batch.
        workers: Processes that read images.

    Raises:
        PSTError: If not one of them can be read.
    """
    order = _order(samples, seed)
    count = min(count, -(-len(order) // 2))
    batches = [images for images, _ in ImageBatches(samples.subset(order[:count]), batch_size, workers)]
    if not batches:
        raise PSTError(f'Not one of the {count} images drawn to calibrate by could be read.')
    return Drawn(batches, ImageBatches(samples.subset(order[count:count + held_out]), batch_size, workers))


def drawn_subset(samples: Samples, count: int, seed: int = 0) -> Samples:
    """So many of some images, drawn with a seed; all of them if there are no more."""
    return samples.subset(_order(samples, seed)[:count])


def _order(samples: Samples, seed: int) -> List[int]:
    return torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
