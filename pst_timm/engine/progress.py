"""What a run shows and leaves behind: bars, log lines, summary.csv, curves, TensorBoard and Weights & Biases."""
import csv
import logging
import re
import shutil
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Sequence

from timm.utils import AverageMeter

from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import read_csv, write_csv, write_whole

__all__ = ['RunLog', 'StepTimer', 'format_metrics', 'plot_summary']

_logger = logging.getLogger(__name__)

SUMMARY = 'summary.csv'
SPEED = 'speed.csv'


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

    def __init__(self, args: Namespace, folder: Path, start_epoch: int, title: str, metrics: Sequence[str]):
        """
        Args:
            args: Arguments of the run.
            folder: Folder of the run; nothing is written to it before `open`.
            start_epoch: First epoch; rows of an earlier try from there on are dropped.
            title: What the curves are of.
            metrics: What an evaluation tells; the first two beside the loss are drawn.

        Raises:
            PSTError: If a logger is asked for that is not installed, or if a table is there that cannot be gone on
                with.
        """
        self.args = args
        self.folder = folder
        self.start_epoch = start_epoch
        self.title, self.metrics = title, metrics
        self.tensorboard = self.wandb = None
        self._writer = _import_tensorboard() if args.log_tensorboard else None
        self._wandb = _import_wandb() if args.log_wandb else None
        # a run from the start has no use for a table that is there
        self.tables = {name: Table(folder / name, start_epoch) for name in (SUMMARY, SPEED)}

    def open(self) -> None:
        """Drop the rows that the run will write anew, and open the loggers.

        Raises:
            PSTError: If a table cannot be written.
        """
        for table in self.tables.values():
            table.open()
        if self._writer is not None:
            self.tensorboard = self._writer(str(self.folder / 'tensorboard'), purge_step=self.start_epoch or None)
        if self._wandb is not None:
            _init_wandb(self._wandb, self.args)
            self.wandb = self._wandb

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
        columns = dict(dict.fromkeys(self.metrics, ''), **evaluation)
        row = dict(
            epoch=epoch,
            **{f'train_{k}': v for k, v in train.items()},
            **{f'eval_{k}': v for k, v in columns.items()},
            lr=lr,
        )
        self.tables[SUMMARY].add(row)
        if self.wandb is not None:
            self.wandb.log(row)
        # apart from the summary, which is the same whenever the run is repeated
        self.tables[SPEED].add(dict(epoch=epoch, **{f'train_{k}': v for k, v in speed.items()}))
        drawn = [f'eval_{name}' for name in self.metrics if name != 'loss'][:2]
        plot_summary(self.folder / SUMMARY, self.folder / 'curve.png', self.title, drawn)
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


class Table:
    """A row for each epoch in a CSV file, which is written whole each time: timm's appends, and a kill cuts it off."""

    def __init__(self, path: Path, start_epoch: int):
        """
        Args:
            path: The file.
            start_epoch: Rows of epochs from there on are not kept.

        Raises:
            PSTError: If there is a file that is no such table.
        """
        self.path = path
        self.rows: List[Dict[str, Any]] = []
        self.dropped = self.broken = 0
        if not path.exists() or not start_epoch:
            return
        try:
            text = path.read_text(encoding='utf-8', errors='replace')
        except OSError as e:
            raise PSTError(f'{path} cannot be read ({e.strerror}). {_MEND}') from None
        lines = [line for line in re.split('[\r\n]+', text) if line.strip('\0')]  # which a crash of the machine leaves
        header = _fields(lines[0]) if lines else []
        if lines and ('epoch' not in header or len(set(header)) < len(header)):
            raise PSTError(f'{path} is no table of a training run: its first line does not name the columns. {_MEND}')
        for fields in map(_fields, lines[1:]):
            row = dict(zip(header, fields))
            if len(fields) != len(header) or not _is_row(row):
                self.broken += 1
            elif int(row['epoch']) < start_epoch:
                self.rows.append(row)
            else:
                self.dropped += 1

    def open(self) -> None:
        """Write the rows that are kept; a file with rows that could not be read stays under another name."""
        if self.broken:
            kept = self.path.with_suffix('.damaged.csv')
            write_whole(kept, lambda temporary: shutil.copyfile(self.path, temporary))
            _logger.warning(
                f'{self.path}: {self.broken} rows could not be read and are left out; the file as it was is {kept}.')
        if self.broken or self.dropped:
            write_csv(self.path, self.rows)
        elif not self.rows:
            self.path.unlink(missing_ok=True)

    def add(self, row: Dict[str, Any]) -> None:
        """Add the row of an epoch."""
        self.rows.append(row)
        write_csv(self.path, self.rows)


_MEND = 'Mend it, or move it away, and start again.'


def _fields(line: str) -> List[str]:
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        return []


def _is_row(row: Mapping[str, str]) -> bool:
    """Whether everything is a number that the engine wrote as one."""
    try:
        for key, text in row.items():
            if text and re.fullmatch('lr|(train|eval)_.*', key):
                float(text)
    except ValueError:
        return False
    return row['epoch'].isdecimal()


def _import_tensorboard() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise PSTError('--log-tensorboard needs it: pip install tensorboard, or leave the flag out.') from None
    return SummaryWriter


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError:
        raise PSTError('--log-wandb needs it: pip install wandb, or leave the flag out.') from None
    return wandb


def _init_wandb(wandb: Any, args: Namespace) -> None:
    wandb.init(
        project=args.wandb_project or args.experiment or None,
        name=args.experiment or None,
        config=vars(args),
        tags=args.wandb_tags,
        resume='must' if args.wandb_resume_id else None,
        id=args.wandb_resume_id or None,
    )


def plot_summary(
        summary: Path,
        image: Path,
        title: str = '',
        metrics: Sequence[str] = ('eval_top1', 'eval_top5'),
) -> bool:
    """Draw loss and metrics over the epochs of a summary.csv as a PNG.

    Args:
        summary: The CSV file that a run writes.
        image: The file to write.
        title: What the curves are of.
        metrics: Columns of the summary, in percent, to draw beside the loss.

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
            ('loss', 'validation (%)'),
            (('train_loss', 'eval_loss'), metrics)):
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
