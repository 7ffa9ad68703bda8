"""Detection as a job of the engine, see `engine.jobs.Job`."""
import logging
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any, Dict, Tuple

import torch
from timm.layers import set_fast_norm
from timm.utils import is_primary

from pst_timm.checkpoints.facts import as_plain
from pst_timm.data.loaders import TrainData, TrainSplits
from pst_timm.engine import training
from pst_timm.engine.factories import check_finite_weights
from pst_timm.engine.flags import recipe
from pst_timm.engine.processes import check_ranks
from pst_timm.engine.transfer import Frozen, apply_transfer
from pst_timm.utils.errors import PSTError

from .batches import BoxBatches
from .checkpoint import check_stored, describe, load_initial, load_trunk_weights
from .datasets import open_boxes
from .evaluation import METRICS
from .flags import DETECTOR_KEYS, TRAIN_FLAGS
from .loaders import create_box_loaders
from .models import Detector, create_detector
from .task import DetectionTask

__all__ = ['Detection', 'train']

_logger = logging.getLogger(__name__)


def train(args: Namespace) -> training.TrainResult:
    """Train a detector; arguments from `flags.parse_train_args` or `flags.train_args`, errors as in `engine.train`."""
    return training.train(args, Detection())


class Detection:
    """Training of an object detector."""
    flags = TRAIN_FLAGS
    metrics = METRICS

    def open(self, args: Namespace) -> TrainSplits:
        args.model = f'{args.detector}_{args.trunk}_{args.neck}'  # what the engine calls it
        self.title = f'{args.model} on {Path(args.data_dir).resolve().name}'
        open_split = partial(
            open_boxes, args.data_dir, max_bad_images=args.max_bad_images, max_bad_share=args.max_bad_share,
            show=is_primary(args))
        train = open_split(split=args.train_split)
        self.class_names = list(train.class_names)
        evaluation = None
        if args.val_split:
            evaluation = open_split(split=args.val_split, class_names=self.class_names)
            if args.val_split == args.train_split:
                _logger.warning(
                    f'Training and validation read the same images, those of {args.train_split!r}: the precision will '
                    f"tell nothing new. Choose another --val-split, or '' for none.")
        if train.annotations.crowd.all():
            raise PSTError(f'The {args.train_split!r} split has no box to learn from: choose another --train-split.')
        if evaluation is not None and evaluation.annotations.ignored.all():
            raise PSTError(
                f"The {args.val_split!r} split has no box to find: choose another --val-split, or '' for none.")
        args.num_classes = len(self.class_names)
        self.splits = TrainSplits(train, evaluation)
        check_ranks(args, self.splits)
        return self.splits

    def create_model(self, args: Namespace) -> Tuple[Detector, Frozen]:
        if args.fast_norm:
            set_fast_norm()
        model = create_detector(
            args.detector,
            num_classes=args.num_classes,
            class_names=self.class_names,
            pretrained_trunk=args.pretrained_trunk,
            **{k: getattr(args, k) for k in DETECTOR_KEYS},
        )
        check_stored(model)
        self.input_size = tuple(model.pretrained_cfg['input_size'])
        if args.initial_checkpoint:
            load_initial(model, args.initial_checkpoint, args.use_ema)
        if args.trunk_checkpoint:
            load_trunk_weights(model, args.trunk_checkpoint, args.use_ema)
        check_finite_weights(model, args.initial_checkpoint or args.trunk_checkpoint or args.trunk)
        if args.grad_checkpointing:
            model.set_grad_checkpointing(True)
        return model, apply_transfer(Namespace(**dict(vars(args), linear_probe=False, trunk_checkpoint='')), model)

    def create_data(self, args: Namespace, model: Detector, dtype: torch.dtype) -> TrainData:
        return create_box_loaders(args, self.splits.train, self.splits.evaluation)

    def describe(self, given: Namespace, model: Detector) -> Dict[str, Any]:
        return dict(describe(model), recipe=as_plain(recipe(given, TRAIN_FLAGS)))

    def create_task(
            self,
            args: Namespace,
            model: Detector,
            device: torch.device,
            dtype: torch.dtype,
    ) -> DetectionTask:
        return DetectionTask(
            model, self.splits.evaluation, args.detections_per_img, device=device, dtype=dtype,
            verbose=is_primary(args))

    def create_batches(self, args: Namespace, device: torch.device, dtype: torch.dtype) -> BoxBatches:
        return BoxBatches(device, dtype)

    def start_epoch(self, args: Namespace, epoch: int) -> None:
        """Nothing here depends on the epoch but what the engine sets."""
