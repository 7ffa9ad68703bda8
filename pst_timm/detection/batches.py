"""What the engine's loops ask about a batch of images with boxes, see `engine.batches.Batches`."""
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from timm.task import TrainingTask

__all__ = ['BoxBatches']

Images = List[torch.Tensor]
Targets = List[Dict[str, Any]]


class BoxBatches:
    """Batches of detection: a list of images (3, H, W) in [0, 1], each of a size of its own, and one of targets."""

    def __init__(self, device: torch.device, dtype: Optional[torch.dtype] = None):
        """
        Args:
            device: Device of the model.
            dtype: Precision of the images, as they come if None.
        """
        self.device = device
        self.dtype = dtype

    def prepare(self, batch: Tuple[Images, Targets], training: bool = False) -> Tuple[Images, Targets]:
        """Images on the device, and with `training` boxes and labels; else targets get the size of their image."""
        images, targets = batch
        images = [_plain(image).to(self.device, self.dtype, non_blocking=True) for image in images]
        if training:  # torchvision's losses read these alone
            return images, [
                {k: _plain(t[k]).to(self.device, non_blocking=True) for k in ('boxes', 'labels')} for t in targets]
        return images, [
            {**{k: _plain(v) for k, v in target.items()}, 'given_size': tuple(image.shape[-2:])}
            for image, target in zip(images, targets)]

    def size(self, batch: Tuple[Images, Targets]) -> int:
        return len(batch[0])

    def loss(self, task: TrainingTask, batch: Tuple[Images, Targets]) -> torch.Tensor:
        return task(*batch)['loss']

    def answers(self, model: nn.Module, batch: Tuple[Images, Targets]) -> Tuple[List[Dict[str, torch.Tensor]], Targets]:
        """Boxes, labels and scores of each image on the CPU, in pixels of the image as the model was given it."""
        images, targets = batch
        return [{k: v.cpu() for k, v in output.items()} for output in model(images)], targets

    def images(self, batch: Tuple[Images, Targets]) -> torch.Tensor:
        """The images (B, 3, H, W), with black edges where others are larger."""
        height, width = (max(image.shape[i] for image in batch[0]) for i in (-2, -1))
        padded = [nn.functional.pad(i, (0, width - i.shape[-1], 0, height - i.shape[-2])) for i in batch[0]]
        return torch.stack(padded)


def _plain(value: Any) -> Any:
    """A tensor without the type that torchvision's transforms need: each calculation with it would take longer."""
    return value.as_subclass(torch.Tensor) if isinstance(value, torch.Tensor) else value
