"""Loaders of images with boxes: lists of images and of targets."""
from argparse import Namespace
from typing import Any, Iterator, List, Optional, Sequence, Tuple

import torch
from timm.utils import is_primary
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from pst_timm.data.loaders import TrainData, note_workers
from pst_timm.utils.errors import PSTError

from .datasets import BoxDataset, Target
from .transforms import eval_transforms, train_transforms

__all__ = ['collate_boxes', 'create_box_loaders', 'create_eval_box_loader']


def collate_boxes(samples: Sequence[Optional[Tuple[torch.Tensor, Target]]]) -> Tuple[List[torch.Tensor], List[Target]]:
    """Samples as two lists, without the images that could not be read."""
    kept = [sample for sample in samples if sample is not None]
    return [image for image, _ in kept], [target for _, target in kept]


class EveryNth(Sampler[int]):
    """The images of one process, in order; each is in one process, so that none is evaluated twice."""

    def __init__(self, size: int, rank: int, world_size: int):
        """
        Args:
            size: Images of all processes.
            rank: Rank of this process.
            world_size: Processes.
        """
        self.indices = range(rank, size, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


class EvalLoader(DataLoader):
    """A loader that passes over batches of which no image could be read."""

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch in super().__iter__() if batch[0])


def _common(args: Namespace, dataset: BoxDataset) -> dict:
    note_workers(args.workers, is_primary(args))
    dataset.bad_images.limit, dataset.bad_images.share = args.max_bad_images, args.max_bad_share
    return dict(
        dataset=dataset,
        num_workers=args.workers,
        collate_fn=collate_boxes,
        pin_memory=args.pin_mem and torch.accelerator.is_available(),
        # fresh workers take their seeds from the random state of the epoch, so that a resumed epoch is the same epoch
        persistent_workers=False,
    )


def create_box_loaders(args: Namespace, train: BoxDataset, evaluation: Optional[BoxDataset]) -> TrainData:
    """Make the loaders of a training run.

    Args:
        args: Arguments with the world resolved.
        train: The training split.
        evaluation: The split to evaluate on, if any.

    Raises:
        PSTError: If there are fewer images than a batch.
    """
    train.replace_bad = True
    augmentation = {} if args.no_aug else dict(
        hflip=args.hflip, scale_jitter=args.scale_jitter, box_crop=args.box_crop,
        color_jitter=args.color_jitter, vflip=args.vflip)
    train.transforms = train_transforms(args.img_size, **augmentation)
    sampler = None
    if args.distributed:
        sampler = DistributedSampler(train, args.world_size, args.rank, shuffle=True, seed=args.seed)
    loader = DataLoader(
        batch_size=args.batch_size, sampler=sampler, shuffle=sampler is None, drop_last=True, **_common(args, train))
    if len(loader) == 0:
        raise PSTError(
            f'The {args.train_split!r} split has fewer images than one batch of {args.batch_size} in each of '
            f'{args.world_size} process(es): use a smaller --batch-size.')
    if evaluation is None:
        return TrainData(loader, None, None)
    batch_size = args.validation_batch_size or args.batch_size
    return TrainData(loader, create_eval_box_loader(args, evaluation, batch_size, args.distributed), None)


def create_eval_box_loader(
        args: Namespace,
        dataset: BoxDataset,
        batch_size: int,
        distributed: bool = False,
) -> DataLoader:
    """Loader over a split in order, resized and nothing else.

    Args:
        args: Arguments with the world resolved.
        dataset: The split.
        batch_size: Images at a time.
        distributed: Whether the processes share the images among them.

    Raises:
        PSTError: If there are fewer images than processes.
    """
    dataset.replace_bad = False
    dataset.transforms = eval_transforms(args.img_size)
    sampler = None
    if distributed:
        if len(dataset) < args.world_size:
            raise PSTError(
                f'{len(dataset)} image(s) to evaluate are too few for {args.world_size} processes: use fewer of them.')
        sampler = EveryNth(len(dataset), args.rank, args.world_size)
    return EvalLoader(batch_size=batch_size, sampler=sampler, shuffle=False, **_common(args, dataset))
