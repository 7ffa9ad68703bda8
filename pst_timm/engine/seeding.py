"""Random state as a function of (seed, rank, epoch, step): nothing depends on what happened before."""
import random
from typing import Any, Iterable, Iterator

import numpy as np
import torch

__all__ = ['seed_model', 'seeded_batches']

DATA, MODEL = 0, 1


def _seed(*words: int) -> None:
    for_torch, for_others = (int(x) for x in np.random.SeedSequence(words).generate_state(2, np.uint32))
    # torch.manual_seed also queues the seed for every kind of device that is not there, milliseconds each time
    torch.default_generator.manual_seed(for_torch)
    if torch.accelerator.is_available():
        torch.get_device_module(torch.accelerator.current_accelerator()).manual_seed(for_torch)
    random.seed(for_others)
    np.random.seed(for_others)


def seed_model(seed: int, rank: int, epoch: int, step: int) -> None:
    """Set all generators of this process for a forward pass.

    Args:
        seed: Seed of the run.
        rank: Rank of this process.
        epoch: Epoch.
        step: Batch within the epoch.
    """
    _seed(seed, rank, epoch, step, MODEL)


def seeded_batches(batches: Iterable, seed: int, rank: int, epoch: int) -> Iterator[Any]:
    """The same batches, each fetched from a random state of its own.

    A resumed epoch thus skips batches without repeating what the model drew between them. The first state also gives
    the loader its order and its workers their seeds.
    """
    iterator = None
    step = 0
    while True:
        _seed(seed, rank, epoch, step, DATA)
        iterator = iter(batches) if iterator is None else iterator
        try:
            batch = next(iterator)
        except StopIteration:
            return
        yield batch
        step += 1
