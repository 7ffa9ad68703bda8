"""What a kind of task knows of its batches, so that the loops pass them on and never look into one.

timm's `TrainingTask` computes the loss of a batch that is ready, and makes the evaluator; everything before that is
here: where a batch has to be, in what precision and order, how many images it holds.
"""
from typing import Any, Optional, Protocol, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.data import Mixup
from timm.task import TrainingTask

__all__ = ['Batches', 'Evaluator', 'LabelledImages']


class Batches(Protocol):
    """What the loops ask about a batch."""

    def prepare(self, batch: Any, training: bool = False) -> Any:
        """A batch of the loader, where and as the model wants it; with `training`, as the loss wants it too."""

    def size(self, batch: Any) -> int:
        """How many images a prepared batch holds."""

    def loss(self, task: TrainingTask, batch: Any) -> torch.Tensor:
        """Loss of a prepared batch, a scalar: the mean over its images."""

    def answers(self, model: nn.Module, batch: Any) -> Tuple[Any, Any]:
        """What a model in inference mode says of a prepared batch, and what is true, both for the evaluator."""

    def images(self, batch: Any) -> Union[torch.Tensor, Sequence[torch.Tensor]]:
        """The images (C, H, W) of a prepared batch, to look at."""


class Evaluator(Protocol):
    """What a pass over a split needs of timm's evaluators."""

    def update(self, output: Any, target: Any) -> None:
        """Take in the answers of a batch."""

    def summary(self) -> Any:
        """Metrics so far, of this process, for the log."""

    def compute(self, distributed: bool = False) -> Any:
        """Metrics, of all processes if `distributed`."""


class LabelledImages:
    """Batches of classification: images (B, C, H, W) with labels (B,), or (B, classes) once they are mixed."""

    def __init__(
            self,
            device: torch.device,
            dtype: Optional[torch.dtype] = None,
            channels_last: bool = False,
            mixup_fn: Optional[Mixup] = None,
            tta: int = 0,
    ):
        """
        Args:
            device: Device of the model.
            dtype: Precision of the images, as they come if None.
            channels_last: Whether to lay out the images channels last.
            mixup_fn: Mixup of the prepared images in training, where the loader has not done it.
            tta: In evaluation, consecutive images that are views of one, whose outputs are averaged; 0 for none.
        """
        self.device = device
        self.dtype = dtype
        self.channels_last = channels_last
        self.mixup_fn = mixup_fn
        self.tta = tta

    def prepare(self, batch: Any, training: bool = False) -> Tuple[torch.Tensor, torch.Tensor]:
        images, target = batch
        images, target = images.to(self.device, self.dtype), target.to(self.device)
        if training and self.mixup_fn is not None:
            images, target = self.mixup_fn(images, target)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, target

    def size(self, batch: Tuple[torch.Tensor, torch.Tensor]) -> int:
        return len(batch[0])

    def loss(self, task: TrainingTask, batch: Tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return task(*batch)['loss']

    def answers(
            self,
            model: nn.Module,
            batch: Tuple[torch.Tensor, torch.Tensor],
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        images, target = batch
        output = model(images)
        output = output[0] if isinstance(output, (tuple, list)) else output
        if self.tta > 1:
            output, target = output.unfold(0, self.tta, self.tta).mean(dim=2), target[::self.tta]
        return output, target

    def images(self, batch: Tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return batch[0]
