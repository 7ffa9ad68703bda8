"""One pass over a split, and everything `validate` can measure on the way."""
import logging
from contextlib import AbstractContextManager
from typing import Any, Callable, Dict, Optional

import torch
import torch.nn as nn
from timm.task import ClassificationEvaluator
from torch.utils.data import DataLoader

from pst_timm.data.loaders import checked_batches, report_bad_images
from pst_timm.utils.progress import progress_bar

from .progress import StepTimer, format_metrics

__all__ = ['evaluate']

_logger = logging.getLogger(__name__)


@torch.inference_mode()
def evaluate(
        model: nn.Module,
        loader: DataLoader,
        evaluator: ClassificationEvaluator,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
        *,
        channels_last: bool = False,
        tta: int = 0,
        distributed: bool = False,
        title: str = 'Validate',
        show: bool = True,
        log_interval: int = 50,
        observe: Optional[Callable[[torch.Tensor, torch.Tensor], Any]] = None,
) -> Dict[str, float]:
    """Evaluate a model.

    Args:
        model: The model, in inference mode.
        loader: Batches of images (B, C, H, W) and labels (B,).
        evaluator: What accumulates the metrics, from the task.
        device: Device of the model.
        autocast: Context of the forward pass.
        channels_last: Whether to lay out the images channels last.
        tta: Consecutive images that are views of one, whose outputs are averaged; 0 for none.
        distributed: Whether the metrics are those of all processes.
        title: Name in the bar and the log.
        show: Whether this process has anything to say.
        log_interval: Batches between log lines, where there is no bar.
        observe: Called with logits (B, classes) and labels (B,) of each batch.

    Returns:
        Metrics in percent, loss, and images per second of this process.
    """
    timer = StepTimer()
    total = len(loader)
    bar = progress_bar(timer.over(checked_batches(loader)), total, title, show)
    for step, (images, target) in enumerate(bar):
        images, target = images.to(device), target.to(device)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast():
            output = model(images)
        output = output[0] if isinstance(output, (tuple, list)) else output
        if tta > 1:
            output = output.unfold(0, tta, tta).mean(dim=2)
            target = target[::tta]
        evaluator.update(output, target)
        if observe is not None:
            observe(output, target)
        timer.images += images.shape[0]
        if show and bar.disable and (step + 1) % log_interval == 0:
            _logger.info(f'{title}: [{step + 1}/{total}] {format_metrics(evaluator.summary())}, {timer}')
    report_bad_images(loader)
    return dict(evaluator.compute(distributed=distributed), images_per_second=timer.images_per_second)
