"""What a run shows and leaves behind: bars, log lines, summary.csv, curves, TensorBoard and Weights & Biases."""
import logging
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, Mapping

from timm.utils import AverageMeter, trim_summary, update_summary

from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import read_csv, write_whole

__all__ = ['RunLog', 'StepTimer', 'format_metrics', 'plot_summary']

_logger = logging.getLogger(__name__)


def format_metrics(metrics: Mapping[str, float]) -> str:
    """'loss 0.123, top1 97.50' for a log line."""
    return ', '.join(f'{k} {v:.3f}' if 'top' not in k else f'{k} {v:.2f}' for k, v in metrics.items())


class StepTimer:
    """Times the steps, and how long each waits for data."""

    def __init__(self):
        self.wait = AverageMeter()
        self.step = AverageMeter()
        self.images = 0
        self.start = time.perf_counter()

    def over(self, batches: Iterable) -> Iterator:
        """The same batches, with the time until each of them arrives on the books."""
        asked = time.perf_counter()
        for batch in batches:
            got = time.perf_counter()
            self.wait.update(got - asked)
            yield batch
            done = time.perf_counter()
            self.step.update(done - asked)
            asked = done

    @property
    def images_per_second(self) -> float:
        return self.images / max(time.perf_counter() - self.start, 1e-9)

    @property
    def wait_share(self) -> float:
        """Share of the time spent waiting for the loader, from 0 to 1."""
        return self.wait.sum / max(time.perf_counter() - self.start, 1e-9)

    def speed(self, world_size: int = 1) -> Dict[str, float]:
        """Seconds so far, images per second of all processes, and the share of the time spent waiting for data."""
        return dict(
            seconds=round(time.perf_counter() - self.start, 3),
            images_per_second=round(self.images_per_second * world_size, 2),
            wait_share=round(self.wait_share, 4),
        )

    def __str__(self) -> str:
        text = f'{self.images_per_second:.1f} images/s, {self.wait_share:.0%} of the time waiting for data'
        slow = self.step.count >= 20 and self.wait_share > 0.3  # at first the workers are only starting
        return text + (' (the loader is the bottleneck: more --workers)' if slow else '')


class RunLog:
    """The record of a training run in its folder; every method is for the first process alone."""

    def __init__(self, args: Namespace, folder: Path, start_epoch: int):
        """
        Args:
            args: Arguments of the run.
            folder: Folder of the run.
            start_epoch: First epoch; rows of an earlier try from there on are dropped.

        Raises:
            PSTError: If a logger is asked for that is not installed.
        """
        self.folder = folder
        self.title = run_title(args)
        self.summary = folder / 'summary.csv'
        self.speed = folder / 'speed.csv'
        for file in (self.summary, self.speed):
            trim_summary(str(file), start_epoch)
        self.tensorboard = _open_tensorboard(folder, start_epoch) if args.log_tensorboard else None
        self.wandb = _open_wandb(args) if args.log_wandb else None

    def epoch(
            self,
            epoch: int,
            train: Dict[str, float],
            evaluation: Dict[str, float],
            lr: float,
            speed: Dict[str, float],
    ) -> None:
        """Record an epoch and draw the curves anew; `evaluation` is empty where there was none."""
        # every row has the columns of the header
        columns = dict(dict.fromkeys(('loss', 'top1', 'top5'), ''), **evaluation)
        update_summary(epoch, train, columns, str(self.summary), lr=lr, log_wandb=self.wandb is not None)
        # apart from the summary, which is the same whenever the run is repeated
        update_summary(epoch, speed, {}, str(self.speed))
        plot_summary(self.summary, self.folder / 'curve.png', self.title)
        if self.tensorboard is not None:
            for name, values in (('train', train), ('eval', evaluation)):
                for key, value in values.items():
                    self.tensorboard.add_scalar(f'{name}/{key}', value, epoch)
            self.tensorboard.add_scalar('lr', lr, epoch)
            self.tensorboard.flush()

    def close(self) -> None:
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def _open_tensorboard(folder: Path, start_epoch: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise PSTError('--log-tensorboard needs it: pip install tensorboard, or leave the flag out.') from None
    return SummaryWriter(str(folder / 'tensorboard'), purge_step=start_epoch or None)


def _open_wandb(args: Namespace) -> Any:
    try:
        import wandb
    except ImportError:
        raise PSTError('--log-wandb needs it: pip install wandb, or leave the flag out.') from None
    wandb.init(
        project=args.wandb_project or args.experiment or None,
        name=args.experiment or None,
        config=vars(args),
        tags=args.wandb_tags,
        resume='must' if args.wandb_resume_id else None,
        id=args.wandb_resume_id or None,
    )
    return wandb


def run_title(args: Namespace) -> str:
    """'resnet18 on digits': the model, and the name of its data."""
    data = args.dataset.partition('/')[2] or Path(args.data_dir).resolve().name
    return f'{args.model} on {data}'


def plot_summary(summary: Path, image: Path, title: str = '') -> bool:
    """Draw loss and accuracy over the epochs of a summary.csv as a PNG.

    Args:
        summary: The CSV file that a run writes.
        image: The file to write.
        title: What the curves are of.

    Returns:
        Whether it was drawn; without matplotlib it is not.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        _logger.debug('No curve without matplotlib.')
        return False
    rows = read_csv(summary)
    figure = Figure(figsize=(9, 3.6), layout='constrained')
    figure.suptitle(title)
    for axes, name, keys in zip(
            figure.subplots(1, 2),
            ('loss', 'accuracy (%)'),
            (('train_loss', 'eval_loss'), ('eval_top1', 'eval_top5'))):
        for key in keys:
            points = [(float(r['epoch']) + 1, float(r[key])) for r in rows if r.get(key)]
            if points:
                axes.plot(*zip(*points), marker='.', label=key.replace('_', ' '))
                axes.legend()
        axes.set(title=name, xlabel='epoch')
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    write_whole(image, lambda temporary: figure.savefig(temporary, dpi=120))
    return True
