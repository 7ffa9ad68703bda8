"""What is done to an image and its boxes before a detector sees them: torchvision's transforms v2.

The size is made here and nowhere else. The longer side of an image becomes `img_size`, in training as in evaluation,
and a scale jitter leaves the size as it is: what gets larger is cropped, what gets smaller is padded. The resize that
torchvision's detectors bring along then finds nothing to do.
"""
import math
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

__all__ = ['eval_transforms', 'fitted_size', 'train_transforms']

FILL = (124., 116., 104.)  # the mean of ImageNet, which is 0 to a model
SMALLEST = 2.  # pixels of the sides of a box that is left by a crop, at the size that the model sees
TOO_SMALL = 8  # pixels of the sides of an image of which no crop is taken


def fitted_size(height: int, width: int, img_size: int) -> Tuple[int, int]:
    """Height and width of an image whose longer side is resized to `img_size`."""
    longer = max(height, width)
    return max(1, round(height * img_size / longer)), max(1, round(width * img_size / longer))


def eval_transforms(img_size: int) -> nn.Module:
    """Resizing, and nothing else.

    Args:
        img_size: Longer side in pixels.
    """
    return v2.Compose([_Fit(img_size), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])


def train_transforms(
        img_size: int,
        hflip: float = 0.,
        scale_jitter: Optional[Sequence[float]] = None,
        box_crop: float = 0.,
        color_jitter: float = 0.,
        vflip: float = 0.,
) -> nn.Module:
    """Crop, flip, scale and colours, each as asked for.

    Args:
        img_size: Longer side in pixels.
        hflip: Probability of a left-right flip.
        scale_jitter: Range of the factors by which objects get larger or smaller; none if None.
        box_crop: Probability of a crop that keeps boxes, as SSD takes them.
        color_jitter: Strength of the changes of brightness, contrast and saturation, as timm has it.
        vflip: Probability of an upside-down flip.
    """
    steps: List[nn.Module] = [_WithoutCrowds()]
    if box_crop:
        steps.append(v2.RandomApply([_BoxCrop()], p=box_crop))
    if hflip:
        steps.append(v2.RandomHorizontalFlip(hflip))
    if vflip:
        steps.append(v2.RandomVerticalFlip(vflip))
    steps.append(_Fit(img_size, scale_jitter))
    steps.append(v2.SanitizeBoundingBoxes(SMALLEST, labels_getter=_per_box))
    if color_jitter:
        steps.append(v2.ColorJitter(*[color_jitter] * 3))
    return v2.Compose([*steps, _BoxAreas(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])


def _per_box(sample: Tuple[Any, Dict[str, Any]]) -> Tuple[torch.Tensor, ...]:
    """What goes with its box."""
    target = sample[1]
    return target['labels'], target['area'], target['iscrowd']


class _Fit(v2.Transform):
    """Resizes the longer side of an image; with a jitter, what is in the image by more or less."""

    def __init__(self, img_size: int, jitter: Optional[Sequence[float]] = None):
        super().__init__()
        self.img_size = img_size
        self.jitter = tuple(jitter) if jitter else None

    def make_params(self, flat_inputs: List[Any]) -> Dict[str, Any]:
        height, width = F.get_size(next(x for x in flat_inputs if isinstance(x, tv_tensors.Image)))
        size = fitted_size(height, width, self.img_size)
        if self.jitter is None:
            return dict(size=size, inner=size, top=0, left=0)
        low, high = self.jitter
        factor = low + (high - low) * torch.rand(()).item()
        inner = tuple(max(1, round(side * factor)) for side in size)
        # of what is larger some part is seen; what is smaller lies somewhere
        top, left = (
            math.floor(torch.rand(()).item() * (abs(a - b) + 1)) * (1 if a > b else -1) for a, b in zip(inner, size))
        return dict(size=size, inner=inner, top=top, left=left)

    def transform(self, inpt: Any, params: Dict[str, Any]) -> Any:
        (height, width), (inner_height, inner_width) = params['size'], params['inner']
        output = F.resize(inpt, list(params['inner']), antialias=True)
        if params['inner'] == params['size']:
            return output
        top, left = params['top'], params['left']
        before = [max(-left, 0), max(-top, 0)]
        after = [max(width - inner_width - before[0], 0), max(height - inner_height - before[1], 0)]
        if any(before + after):
            output = F.pad(output, before + after, fill=list(FILL))
        return F.crop(output, max(top, 0), max(left, 0), height, width)


class _BoxCrop(v2.RandomIoUCrop):
    """SSD's crop, of images that have something to crop and boxes to keep."""

    def make_params(self, flat_inputs: List[Any]) -> Dict[str, Any]:
        boxes = next(x for x in flat_inputs if isinstance(x, tv_tensors.BoundingBoxes))
        if not len(boxes) or min(boxes.canvas_size) < TOO_SMALL:
            return {}
        return super().make_params(flat_inputs)


class _WithoutCrowds(nn.Module):
    """Leaves out boxes around many objects, which are no object to learn."""

    def forward(self, image: Any, target: Dict[str, Any]) -> Tuple[Any, Dict[str, Any]]:
        kept = ~target['iscrowd']
        if kept.all():
            return image, target
        boxes = tv_tensors.wrap(target['boxes'][kept], like=target['boxes'])
        others = {key: target[key][kept] for key in ('labels', 'area', 'iscrowd')}
        return image, dict(target, boxes=boxes, **others)


class _BoxAreas(nn.Module):
    """Areas of the boxes as they have become."""

    def forward(self, image: Any, target: Dict[str, Any]) -> Tuple[Any, Dict[str, Any]]:
        x1, y1, x2, y2 = target['boxes'].as_subclass(torch.Tensor).unbind(1)
        return image, dict(target, area=(x2 - x1) * (y2 - y1))
