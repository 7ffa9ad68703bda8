"""Random state as a function of (seed, epoch, rank), and as a value that a checkpoint can hold."""
import random
from typing import Any, Dict

import numpy as np
import torch

__all__ = ['capture_rng', 'restore_rng', 'seed_epoch']


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Set all generators of this process; no epoch depends on what happened before it."""
    words = np.random.SeedSequence([seed, epoch, rank]).generate_state(2, np.uint64)
    torch.manual_seed(int(words[0]))
    random.seed(int(words[1]))
    np.random.seed(int(words[1]) % 2 ** 32)


def capture_rng() -> Dict[str, Any]:
    """The state of all generators, made of tensors, numbers and lists alone."""
    kind, keys, *rest = np.random.get_state()
    version, words, gauss = random.getstate()
    state = dict(
        torch=torch.get_rng_state(),
        numpy=[kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        python=[version, torch.tensor(words), gauss],
    )
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: Dict[str, Any]) -> None:
    """Set the generators to what `capture_rng` returned."""
    torch.set_rng_state(state['torch'])
    kind, keys, *rest = state['numpy']
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, words, gauss = state['python']
    random.setstate((version, tuple(words.tolist()), gauss))
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])
