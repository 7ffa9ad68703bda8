"""What a kind of training, such as classification, brings along; `training` does the rest."""
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List, Optional, Protocol, Sequence, Tuple

import timm
import torch
import torch.nn as nn
from timm.data import resolve_data_config
from timm.task import TrainingTask

from pst_timm.checkpoints import label_names
from pst_timm.checkpoints.building import check_model_name
from pst_timm.checkpoints.facts import as_plain, describe
from pst_timm.checkpoints.reading import is_file
from pst_timm.data.datasets import check_class_names, check_classes, class_names
from pst_timm.data.loaders import TrainData, TrainSplits, create_train_data, open_train_splits

from . import factories
from .batches import Batches, LabelledImages
from .dry_run import check_channels, check_input
from .flags import TRAIN_FLAGS, FlagGroups, recipe
from .losses import create_loss
from .processes import check_ranks
from .transfer import Frozen, apply_transfer

__all__ = ['Classification', 'Job', 'expected_channels', 'run_title']

_logger = logging.getLogger(__name__)


class Job(Protocol):
    """A kind of training. The methods are called once each, in this order, but for `start_epoch`."""
    flags: FlagGroups
    """The flags of its command: those with a role decide whether a run goes on as it was."""
    metrics: Sequence[str]
    """What its evaluator computes, in percent but for a `loss`; the columns of summary.csv."""
    title: str
    """What the curves of the run are of."""
    input_size: Tuple[int, ...]
    """Channels, height and width of an image, once there is a model."""
    class_names: Optional[List[str]]
    """Names of the classes in the order of the labels, once the data is open; None where nobody knows."""

    def open(self, args: Namespace) -> TrainSplits:
        """Check what needs no data, and open the data, which needs no model; sets `num_classes` in args."""

    def create_model(self, args: Namespace) -> Tuple[nn.Module, Frozen]:
        """The model on the CPU, with the weights it starts from, and what of it stays as it is."""

    def create_data(self, args: Namespace, model: nn.Module, dtype: torch.dtype) -> TrainData:
        """The loaders; what a batch has too much of shows here."""

    def describe(self, given: Namespace, model: nn.Module) -> Dict[str, Any]:
        """What the checkpoints know beside their weights, as plain values; from the arguments as they were given."""

    def create_task(
            self,
            args: Namespace,
            model: nn.Module,
            device: torch.device,
            dtype: torch.dtype,
    ) -> TrainingTask:
        """timm's task around the model, which is on its device."""

    def create_batches(self, args: Namespace, device: torch.device, dtype: torch.dtype) -> Batches:
        """What knows of a batch."""

    def start_epoch(self, args: Namespace, epoch: int) -> None:
        """Set what depends on the epoch, and on nothing else, beside what the engine sets."""


class Classification:
    """Training of an image classifier, by labels or by a teacher."""
    flags = TRAIN_FLAGS
    metrics = ('loss', 'top1', 'top5')

    def open(self, args: Namespace) -> TrainSplits:
        check_model_name(args.model)
        self.explicit_classes = args.num_classes is not None
        self.in_chans = expected_channels(args)
        check_channels(args, self.in_chans)
        self.splits = open_train_splits(args, self.in_chans)
        check_ranks(args, self.splits)
        self.title = run_title(args)
        self.class_names = class_names(self.splits.train)
        if not self.explicit_classes and self.class_names:
            args.num_classes = len(self.class_names)
            _logger.info(f'The {args.train_split!r} split has {args.num_classes} classes, and so gets the model.')
        if args.kd_model_name:
            factories.check_teacher(args)
        return self.splits

    def create_model(self, args: Namespace) -> Tuple[nn.Module, Frozen]:
        model = factories.create_train_model(args)
        if args.in_chans != self.in_chans:  # only a model from a folder or the Hub can surprise
            check_channels(args, args.in_chans)
            self.splits = open_train_splits(args, args.in_chans)
        check_classes(self.splits.train, args.num_classes, self.explicit_classes, args.train_split)
        return model, apply_transfer(args, model)

    def create_data(self, args: Namespace, model: nn.Module, dtype: torch.dtype) -> TrainData:
        self.data_config = resolve_data_config(vars(args), model=model)
        self.input_size = self.data_config['input_size']
        check_input(args, model, self.data_config, args.batch_size, self.splits.train, training=True)
        self.data = create_train_data(args, self.splits, self.data_config, dtype)
        return self.data

    def describe(self, given: Namespace, model: nn.Module) -> Dict[str, Any]:
        facts = describe(model, given.model, given.model_kwargs, self.data_config, self.class_names)
        return dict(facts, recipe=as_plain(recipe(given)))

    def create_task(
            self,
            args: Namespace,
            model: nn.Module,
            device: torch.device,
            dtype: torch.dtype,
    ) -> TrainingTask:
        if args.torchscript:
            model = factories.script(model)
        images = self.splits.images
        shares = images.class_shares(args.num_classes) if images is not None else None
        task = factories.create_task(args, model, device, dtype, create_loss(args, shares))
        if args.kd_model_name:
            teacher = task.teacher.model
            if is_file(args.kd_model_name) and args.kd_distill_type != 'feature':  # published names may be others
                check_class_names(
                    self.class_names, label_names(teacher), f'the {args.train_split!r} split',
                    f'the teacher {args.kd_model_name}')
            named = Namespace(**dict(vars(args), model=args.kd_model_name))
            check_input(named, teacher, self.data_config, args.batch_size, self.splits.train)
        return task

    def create_batches(self, args: Namespace, device: torch.device, dtype: torch.dtype) -> Batches:
        return LabelledImages(device, dtype, args.channels_last, self.data.mixup_fn, args.tta)

    def start_epoch(self, args: Namespace, epoch: int) -> None:
        if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
            for mixup in (self.data.train, self.data.mixup_fn):
                if mixup is not None:
                    mixup.mixup_enabled = False


def expected_channels(args: Namespace) -> int:
    """Input channels of the model that the arguments name, before it is made."""
    given = args.in_chans or (args.input_size[0] if args.input_size else None) or args.model_kwargs.get('in_chans')
    try:
        size = None if ':' in args.model else timm.get_pretrained_cfg_value(args.model, 'input_size')
    except RuntimeError:  # no such tag, which timm says when the model is made
        size = None
    return given or (size[0] if size else 3)


def run_title(args: Namespace) -> str:
    """'resnet18 on digits': the model, and the name of its data."""
    data = args.dataset.partition('/')[2] or Path(args.data_dir).resolve().name
    return f'{args.model} on {data}'
