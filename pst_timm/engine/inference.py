"""One pass over a split."""
import logging
import math
from contextlib import AbstractContextManager
from typing import Any, Callable, Dict, Optional

import torch
import torch.nn as nn
from torch.utils.data import DataLoader

from pst_timm.data.loaders import checked_batches, report_bad_images
from pst_timm.utils.errors import PSTError
from pst_timm.utils.progress import progress_bar

from .batches import Batches, Evaluator
from .progress import StepTimer, format_metrics

__all__ = ['evaluate']

_logger = logging.getLogger(__name__)


@torch.inference_mode()
def evaluate(
        model: nn.Module,
        loader: DataLoader,
        evaluator: Evaluator,
        batches: Batches,
        autocast: Callable[[], AbstractContextManager],
        *,
        distributed: bool = False,
        title: str = 'Validate',
        show: bool = True,
        log_interval: int = 50,
        observe: Optional[Callable[[Any, Any], Any]] = None,
) -> Dict[str, float]:
    """Evaluate a model.

    Args:
        model: The model, in inference mode.
        loader: Batches of the split.
        evaluator: What accumulates the metrics, from the task.
        batches: What is known of a batch.
        autocast: Context of the forward pass.
        distributed: Whether the metrics are those of all processes.
        title: Name in the bar and the log.
        show: Whether this process has anything to say.
        log_interval: Batches between log lines, where there is no bar.
        observe: Called with the answers to each batch and what is true, in classification logits (B, classes) and
            labels (B,).

    Returns:
        Metrics in percent, loss, and images per second of this process.

    Raises:
        PSTError: If the loss is NaN or infinite, so that the other metrics mean nothing.
    """
    timer = StepTimer()
    total = len(loader)
    bar = progress_bar(timer.over(checked_batches(loader)), total, title, show)
    for step, batch in enumerate(bar):
        batch = batches.prepare(batch)
        with autocast():
            output, target = batches.answers(model, batch)
        evaluator.update(output, target)
        if observe is not None:
            observe(output, target)
        timer.images += batches.size(batch)
        if show and bar.disable and (step + 1) % log_interval == 0:
            _logger.info(f'{title}: [{step + 1}/{total}] {format_metrics(evaluator.summary())}, {timer}')
    report_bad_images(loader)
    metrics = evaluator.compute(distributed=distributed)
    if not math.isfinite(metrics.get('loss', 0.)):
        raise PSTError(
            f'{title}: the loss is {metrics["loss"]}, so that the accuracy means nothing. The weights have diverged, '
            f'or the precision (--amp, --model-dtype) is too low for them.')
    return dict(metrics, images_per_second=timer.images_per_second)
