"""Losses of training that weigh classes or images; timm's own where none of these flags is given."""
import math
from argparse import Namespace
from functools import partial
from typing import Callable, Optional

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy

from pst_timm.utils.errors import PSTError

__all__ = ['TrainingLoss', 'create_loss']


def create_loss(args: Namespace, class_shares: Optional[np.ndarray] = None) -> Optional[nn.Module]:
    """The criterion of --logit-adjust and --hard-loss-fraction, None where neither is given.

    Args:
        args: Arguments of a training run.
        class_shares: Share of each class in the images that are seen (classes,), for --logit-adjust.

    Raises:
        PSTError: If a class is never seen, which has no logarithm.
    """
    if not args.logit_adjust and args.hard_loss_fraction is None:
        return None
    offsets = None
    if args.logit_adjust:
        unseen = np.flatnonzero(class_shares == 0)
        if len(unseen):
            raise PSTError(
                f'--logit-adjust {args.logit_adjust:g} takes the logarithm of the share of each class, and class '
                f'{unseen[0]} has no image that is seen ({len(unseen)} such classes): leave it out, or the class.')
        offsets = torch.from_numpy(args.logit_adjust * np.log(class_shares)).float()
    if args.bce_loss:
        soft = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
        each = BinaryCrossEntropies(
            smoothing=0. if soft else args.smoothing, target_threshold=args.bce_target_thresh,
            pos_weight=args.bce_pos_weight, reduction='none', add_up=args.bce_sum)
    else:
        each = partial(cross_entropies, smoothing=args.smoothing)
    warmup = args.warmup_epochs if args.hard_loss_warmup is None else args.hard_loss_warmup
    return TrainingLoss(each, offsets, args.hard_loss_fraction or 1., warmup)


def cross_entropies(output: torch.Tensor, target: torch.Tensor, smoothing: float = 0.) -> torch.Tensor:
    """Cross-entropy of each image.

    Args:
        output: Logits (B, classes).
        target: Class indices (B,), or soft targets (B, classes), which have been smoothed.
        smoothing: Label smoothing of class indices.

    Returns:
        Losses (B,), whose mean is that of timm's `LabelSmoothingCrossEntropy` and `SoftTargetCrossEntropy`.
    """
    if target.ndim == 1:
        return F.cross_entropy(output, target, reduction='none', label_smoothing=smoothing)
    return -(target * F.log_softmax(output, dim=-1)).sum(-1)


class BinaryCrossEntropies(BinaryCrossEntropy):
    """timm's binary cross-entropy, image by image."""

    def __init__(self, add_up: bool = False, **kwargs):
        """
        Args:
            add_up: Whether the loss of an image is the sum over the classes instead of their mean.
            kwargs: For timm's class, without reduction.
        """
        super().__init__(**kwargs)
        self.add_up = add_up

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        losses = super().forward(output, target)
        return losses.sum(-1) if self.add_up else losses.mean(-1)


class TrainingLoss(nn.Module):
    """Mean loss of a batch, with adjusted logits (Menon et al. 2021) and over its largest losses alone.

    With the offset tau * log(share) on the logit of each class, the model learns by how much a class has to be more
    likely than the data alone says: without the offsets, in evaluation, it favours no class for being frequent.
    """

    def __init__(
            self,
            each: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
            offsets: Optional[torch.Tensor] = None,
            fraction: float = 1.,
            warmup: int = 0,
    ):
        """
        Args:
            each: From logits and targets to the loss of each image (B,).
            offsets: What is added to the logits (classes,).
            fraction: Share of the batch that counts, the images with the largest losses, rounded up.
            warmup: Epochs at the start in which all images count.
        """
        super().__init__()
        self.each = each
        self.register_buffer('offsets', offsets, persistent=False)
        self.fraction = fraction
        self.warmup = warmup
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Logits (B, classes) and targets (B,) or (B, classes) to a scalar."""
        losses = self.each(output if self.offsets is None else output + self.offsets, target)
        if self.fraction < 1 and self.epoch >= self.warmup:
            # 0.7 of 10 is 7, and a little more in floating point
            losses = losses.sort(descending=True).values[:max(1, math.ceil(self.fraction * len(losses) - 1e-9))]
        return losses.mean()
