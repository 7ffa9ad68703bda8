"""Images that live on the device as bytes: read once, then cropped, resized and flipped there, a batch at a time."""
import logging
import math
import os
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from timm.data import Mixup
from timm.data.loader import PrefetchLoader
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision import transforms

from pst_timm.utils.errors import PSTError
from pst_timm.utils.progress import progress_bar

__all__ = [
    'DeviceLoader', 'RandomCrop', 'StoredImages', 'check_flags', 'check_memory', 'reading_loader', 'store',
    'storing_transform',
]

_logger = logging.getLogger(__name__)

READ_BYTES = 2 ** 22  # of a chunk that a worker reads
MEMORY_SHARE = 0.8  # of the free memory, the rest is for the model
CROP_ATTEMPTS = 10  # timm's number
CUBIC_SHARE = {'bilinear': 0., 'bicubic': 1., 'random': 0.5}


def check_flags(args: Namespace) -> None:
    """Refuse the flags of training that images on the device cannot follow.

    Raises:
        PSTError: If there are any; the message says of each of them what to do.
    """
    off = 'leave it out'
    refused = [('aug_repeats', args.aug_repeats, 'set it to 0')]
    if not args.no_aug:
        refused += [
            ('aa', args.aa, off),
            ('rare_aa', args.rare_aa, off),
            ('color_jitter', args.color_jitter, "set it to 0 (0.4 is timm's default)"),
            ('grayscale_prob', args.grayscale_prob, off),
            ('gaussian_blur_prob', args.gaussian_blur_prob, off),
            ('train_crop_mode', args.train_crop_mode not in (None, 'rrc') and args.train_crop_mode, 'take rrc'),
        ]
    problems = [
        f'--data-on-device cannot do --{key.replace("_", "-")} {value}, which is for PIL images in loader workers: '
        f'{advice}, or leave --data-on-device out.'
        for key, value, advice in refused if value]
    if problems:
        raise PSTError('\n'.join(problems))


class StoredImages(NamedTuple):
    """A split on the device."""
    images: torch.Tensor
    """Bytes (N, C, H, W)."""
    labels: torch.Tensor
    """Class indices (N,)."""


def storing_transform(size: Optional[int]) -> Callable:
    """From a PIL image to the bytes (C, H, W) that training crops are taken from.

    Args:
        size: Side of the square in the middle that is kept, after the shorter side was resized to it; None for the
            image as it is.
    """
    fit = [] if size is None else [
        transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(size)]
    return transforms.Compose([*fit, transforms.PILToTensor()])


def _collate(samples: Sequence[Tuple[torch.Tensor, int]]) -> Tuple[List[torch.Size], Optional[torch.Tensor], Any]:
    """Shapes, images and labels of a chunk; no images if their shapes differ."""
    images, labels = zip(*samples)
    shapes = [image.shape for image in images]
    return shapes, torch.stack(images) if len(set(shapes)) == 1 else None, torch.tensor(labels)


def reading_loader(dataset: Dataset, workers: int, pin_memory: bool) -> DataLoader:
    """Loader that reads a dataset once, in order, in chunks for `store`; the transform has to return bytes (C, H, W).

    Raises:
        PSTError: If the dataset is a stream.
    """
    if isinstance(dataset, IterableDataset):
        raise PSTError(
            '--data-on-device needs a dataset whose images can be counted (a folder, a .tar file, hfds/, torch/), not '
            'a stream: leave the flag out.')
    return DataLoader(
        dataset,
        batch_size=max(1, READ_BYTES // dataset[0][0].numel()),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # the random state of the run stays as it is
    )


def store(
        loader: DataLoader,
        chunks: Iterable,
        device: torch.device,
        title: str,
        show: bool = True,
) -> StoredImages:
    """Read all images to the device.

    Args:
        loader: From `reading_loader`.
        chunks: What it yields.
        device: Where the images are to live.
        title: What the images are, for the bar and the messages.
        show: Whether this process has anything to say.

    Raises:
        PSTError: If they are not of one size, or do not fit into the memory of the device.
    """
    dataset, started = loader.dataset, time.perf_counter()
    shape = dataset[0][0].shape
    check_memory(len(dataset), shape, device, title)
    images = torch.empty((len(dataset), *shape), dtype=torch.uint8, device=device)
    labels = torch.empty(len(dataset), dtype=torch.int64, device=device)
    count = 0
    for shapes, chunk, chunk_labels in progress_bar(chunks, len(loader), f'Reading {title} images', show):
        if set(shapes) != {shape}:
            odd = next(i for i, s in enumerate(shapes) if s != shape)
            raise PSTError(
                f'--data-on-device: the {title} images are of different sizes, {_name(dataset, 0)} of {_size(shape)} '
                f'and {_name(dataset, count + odd)} of {_size(shapes[odd])} pixels: give the size to keep them at, as '
                f'in --stored-size {min(shape[1:])}.')
        images[count:count + len(shapes)].copy_(chunk, non_blocking=True)
        labels[count:count + len(shapes)].copy_(chunk_labels, non_blocking=True)
        count += len(shapes)
    _logger.info(
        f'{count:,} {title} images of {_size(shape)} pixels are on {device}: {images.numel() / 1e9:.2f} GB, read in '
        f'{time.perf_counter() - started:.1f} s.')
    return StoredImages(images, labels)


def _size(shape: Sequence[int]) -> str:
    return f'{shape[-1]}x{shape[-2]}'


def _name(dataset: Dataset, index: int) -> str:
    return dataset.filename(index, absolute=True) if hasattr(dataset, 'filename') else f'number {index}'


def check_memory(count: int, shape: Sequence[int], device: torch.device, title: str, besides: int = 0) -> None:
    """Raise an PSTError if so many images of so many bytes each will not fit into the memory of a device.

    Args:
        count: Number of images.
        shape: Shape of an image, a byte in each place.
        device: Where they are to live.
        title: What the images are.
        besides: Bytes of other images that will be there by then.
    """
    need, free = count * math.prod(shape), free_memory(device)
    if free is not None and need + besides > MEMORY_SHARE * free:
        others = f' beside {besides / 1e9:,.2f} GB of others' if besides else ''
        raise PSTError(
            f'--data-on-device: {count:,} {title} images of {"x".join(map(str, shape))} bytes need {need / 1e9:,.2f} '
            f'GB{others}, and {device} has {free / 1e9:.2f} GB free, of which {MEMORY_SHARE:.0%} may be images: keep '
            f'them smaller (--stored-size for training, --img-size for validation), or leave --data-on-device out.')


def free_memory(device: torch.device) -> Optional[int]:
    """Bytes that can be allocated on a device, None if the system does not tell."""
    if device.type == 'cuda':
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path('/proc/meminfo')
    if meminfo.exists():
        values = dict(line.split(':') for line in meminfo.read_text().splitlines())
        return int(values['MemAvailable'].split()[0]) * 1024
    try:
        return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    except (AttributeError, ValueError, OSError):
        return None


class Crops(NamedTuple):
    """A crop for each of B images: corners and sizes in pixels, as floats, and choices, as bools; all of shape (B,)."""
    top: torch.Tensor
    left: torch.Tensor
    height: torch.Tensor
    width: torch.Tensor
    vflip: torch.Tensor
    hflip: torch.Tensor
    cubic: torch.Tensor


class RandomCrop:
    """timm's RandomResizedCropAndInterpolation and random flips, for a whole batch of images of one size."""

    def __init__(
            self,
            size: Sequence[int],
            scale: Sequence[float],
            ratio: Sequence[float],
            hflip: float = 0.,
            vflip: float = 0.,
            interpolation: str = 'random',
    ):
        """
        Args:
            size: Height and width of the result.
            scale: Range of the share of the area that a crop keeps.
            ratio: Range of width over height of a crop.
            hflip: Probability of a left-right flip.
            vflip: Probability of an upside-down flip.
            interpolation: bilinear, bicubic, or random for one of them per image.

        Raises:
            PSTError: If it is another interpolation.
        """
        if interpolation not in CUBIC_SHARE:
            raise PSTError(
                f'--data-on-device cannot do --train-interpolation {interpolation}: take one of '
                f'{", ".join(CUBIC_SHARE)}, or leave --data-on-device out.')
        self.size = tuple(size)
        self.scale = scale
        self.ratio = ratio
        self.hflip = hflip
        self.vflip = vflip
        self.cubic_share = CUBIC_SHARE[interpolation]

    def draw(self, count: int, height: int, width: int, device: torch.device) -> Crops:
        """Random crops of images of one size, from the device's own generator."""
        area, log_ratio, rest = torch.rand(3, CROP_ATTEMPTS, count, device=device)
        area = (self.scale[0] + (self.scale[1] - self.scale[0]) * area) * height * width
        low, high = map(math.log, self.ratio)
        ratio = (low + (high - low) * log_ratio).exp()
        widths = (area * ratio).sqrt().round().clamp(min=1)
        heights = (area / ratio).sqrt().round().clamp(min=1)
        fits = (widths <= width) & (heights <= height)
        first = fits.int().argmax(0, keepdim=True)
        found = fits.any(0)
        # else the largest crop in the middle whose ratio is in the range
        middle_h = min(height, round(width / self.ratio[0]))
        middle_w = min(width, round(height * self.ratio[1]))
        crop_h = torch.where(found, heights.gather(0, first)[0], middle_h)
        crop_w = torch.where(found, widths.gather(0, first)[0], middle_w)
        share_y, share_x, vflip, hflip, cubic = rest[:5]
        return Crops(
            top=torch.where(found, (share_y * (height - crop_h + 1)).floor(), (height - middle_h) // 2),
            left=torch.where(found, (share_x * (width - crop_w + 1)).floor(), (width - middle_w) // 2),
            height=crop_h,
            width=crop_w,
            vflip=vflip < self.vflip,
            hflip=hflip < self.hflip,
            cubic=cubic < self.cubic_share,
        )

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Bytes (B, C, H, W) to levels (B, C, *size), see `take_crops`."""
        return take_crops(images, self.draw(len(images), *images.shape[2:], images.device), self.size)


def take_crops(images: torch.Tensor, crops: Crops, size: Sequence[int]) -> torch.Tensor:
    """Crop, resize and flip as PIL does: antialiased, across and then down, rounded to whole levels after each.

    Args:
        images: Bytes (B, C, H, W).
        crops: One for each image.
        size: Height and width of the result.

    Returns:
        Whole numbers from 0 to 255 as floats (B, C, *size), not contiguous.
    """
    b, c, h, w = images.shape
    rows = resize_weights(crops.top, crops.height, crops.vflip, crops.cubic, h, size[0])
    columns = resize_weights(crops.left, crops.width, crops.hflip, crops.cubic, w, size[1])
    # rows before channels: so each of the two products is one for all channels, without a copy in between
    x = images.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    x = _levels(x.view(b, h * c, w) @ columns.transpose(1, 2))
    x = _levels(rows @ x.view(b, h, c * size[1]))
    return x.view(b, size[0], c, size[1]).transpose(1, 2)


def _levels(x: torch.Tensor) -> torch.Tensor:
    return x.add_(0.5).floor_().clamp_(0, 255)


def resize_weights(
        start: torch.Tensor,
        length: torch.Tensor,
        flip: torch.Tensor,
        cubic: torch.Tensor,
        in_size: int,
        out_size: int,
) -> torch.Tensor:
    """What each pixel of an image gives to each pixel of a resized crop, along one axis.

    Args:
        start: First pixels of the crops (B,).
        length: Sizes of the crops (B,).
        flip: Whether the crops are mirrored (B,).
        cubic: Whether the filter is PIL's bicubic one (B,), else the bilinear one.
        in_size: Size of the images.
        out_size: Size of the resized crops.

    Returns:
        Weights (B, out_size, in_size), each row with a sum of one.
    """
    start, length, flip, cubic = (t[:, None, None] for t in (start, length, flip, cubic))
    step = length / out_size
    at = torch.arange(out_size, device=start.device)[:, None] + 0.5
    centre = torch.where(flip, out_size - at, at) * step
    pixel = torch.arange(in_size, device=start.device) - start
    # a filter as wide as the step keeps a smaller image free of aliasing
    x = ((pixel + 0.5 - centre) / step.clamp(min=1)).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    weights = torch.where(cubic, torch.where(x < 1, near, torch.where(x < 2, far, 0.)), (1 - x).clamp(min=0))
    weights = weights * ((pixel >= 0) & (pixel < length))
    return weights / weights.sum(2, keepdim=True)


class DeviceLoader:
    """Batches from images on the device, in the order of the loader it stands in for."""

    def __init__(
            self,
            template: PrefetchLoader,
            stored: StoredImages,
            crop: Optional[RandomCrop] = None,
            mixup_fn: Optional[Mixup] = None,
            memory_format: torch.memory_format = torch.contiguous_format,
    ):
        """
        Args:
            template: timm's loader of the same images, whose sampler, normalisation and random erasing are taken over.
            stored: The images.
            crop: How training images are cropped; None if they are stored as the model sees them.
            mixup_fn: Mixup of the normalised batch.
            memory_format: Order of the batches in memory.
        """
        self.template = template
        self.stored = stored
        self.crop = crop
        self.mixup_fn = mixup_fn
        self.memory_format = memory_format
        # draws what timm's loader draws for its order, and so gives the same
        self.order = DataLoader(
            range(len(stored.labels)),
            batch_size=template.loader.batch_size,
            sampler=template.sampler,
            drop_last=template.loader.drop_last,
            collate_fn=torch.tensor,
        )

    @property
    def dataset(self) -> Dataset:
        return self.template.dataset

    @property
    def sampler(self) -> Any:
        return self.order.sampler

    @property
    def mixup_enabled(self) -> bool:
        return self.mixup_fn is not None and self.mixup_fn.mixup_enabled

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        if self.mixup_fn is not None:
            self.mixup_fn.mixup_enabled = enabled

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        order = torch.cat(list(self.order)).to(self.stored.labels.device, non_blocking=True)
        for indices in order.split(self.order.batch_size):
            yield self.batch(indices)

    def batch(self, indices: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Images (B, C, H, W), normalised, and labels (B,), or (B, classes) with Mixup."""
        images, target = (t.index_select(0, indices) for t in self.stored)
        if self.crop is not None:
            images = self.crop(images)
        images = images.to(self.template.img_dtype).contiguous(memory_format=self.memory_format)
        images.sub_(self.template.mean).div_(self.template.std)
        if self.template.random_erasing is not None:
            images = self.template.random_erasing(images)
        return (images, target) if self.mixup_fn is None else self.mixup_fn(images, target)
