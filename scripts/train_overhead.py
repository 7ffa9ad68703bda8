"""What the training engine costs: images per second of its epoch beside the bare timm step, on the same images.

    python -m scripts.train_overhead --model resnet50_pst --img-size 224 --batch-size 32

The two take turns on one model and one optimizer, so that both see the same machine and the same memory; the medians
over the rounds are compared.
"""
import argparse
import itertools
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Sequence, Tuple

import torch
from PIL import Image

from pst_timm.data.loaders import TrainData
from pst_timm.engine import train_args
from pst_timm.engine.signals import StopSignals
from pst_timm.engine.training import prepare, train_one_epoch
from pst_timm.utils.devices import check_device
from pst_timm.utils.tables import format_table
from pst_timm.utils.timing import time_in_turn

__all__ = ['main', 'measure_overhead']

Batch = Tuple[torch.Tensor, torch.Tensor]


class FixedBatches:
    """A loader that hands out one batch again and again."""
    dataset = sampler = None

    def __init__(self, batch: Batch, steps: int):
        self.batch, self.steps = batch, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.steps):
            yield self.batch


def _bare_steps(model, optimizer, criterion, batch: Batch, steps: int) -> None:
    images, target = batch
    for _ in range(steps):
        optimizer.zero_grad()
        criterion(model(images), target).backward()
        optimizer.step()


def measure_overhead(
        model: str = 'resnet50_pst',
        img_size: int = 224,
        batch_size: int = 32,
        steps: int = 10,
        rounds: int = 5,
        device: Optional[str] = None,
) -> Dict[str, Any]:
    """Measure the engine beside the bare step.

    Args:
        model: Name of a timm model.
        img_size: Height and width of the images.
        batch_size: Images per step.
        steps: Steps in each round of either.
        rounds: Rounds, after one to warm up.
        device: Device, the best one present if None.

    Returns:
        Median images per second of both (`bare`, `engine`) and their `ratio`.
    """
    chosen = check_device(device or '')
    batch = (
        torch.randn(batch_size, 3, img_size, img_size, device=chosen),
        torch.randint(0, 10, (batch_size,), device=chosen))

    criterion = torch.nn.CrossEntropyLoss()
    epochs = itertools.count()
    with tempfile.TemporaryDirectory() as folder, StopSignals() as stop:
        _write_one_image_per_class(Path(folder) / 'data', batch_size)
        run = prepare(train_args(
            data_dir=f'{folder}/data', val_split='', output=folder, experiment='run', model=model, num_classes=10,
            img_size=img_size, batch_size=batch_size, workers=0, device=str(chosen), lr=1e-3, weight_decay=1e-4,
            sched='none', smoothing=0., log_interval=50))
        run.data = TrainData(FixedBatches(batch, steps), None, None)
        calls = {
            'bare': lambda: _bare_steps(run.task.get_trainable_module(), run.optimizer, criterion, batch, steps),
            'engine': lambda: train_one_epoch(run, next(epochs), stop),
        }
        times = time_in_turn(calls, rounds, warmup=1)
    result = {name: batch_size * steps / statistics.median(seconds) for name, seconds in times.items()}
    return dict(result, ratio=result['engine'] / result['bare'])


def _write_one_image_per_class(root: Path, count: int) -> None:
    for i in range(max(count, 10)):
        folder = root / 'train' / str(i % 10)
        folder.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8)).save(folder / f'{i}.png')


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Print the comparison as a table."""
    parser = argparse.ArgumentParser(
        prog='python -m scripts.train_overhead', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='resnet50_pst')
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--steps', type=int, default=10)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--device', help='default: the best one present')
    args = parser.parse_args(argv)
    result = measure_overhead(**vars(args))
    print(format_table([
        dict(step='bare timm', images_per_second=f'{result["bare"]:.2f}'),
        dict(step='engine', images_per_second=f'{result["engine"]:.2f}'),
        dict(step='engine / bare', images_per_second=f'{result["ratio"]:.3f}'),
    ]))
    return 0


if __name__ == '__main__':
    sys.exit(main())
