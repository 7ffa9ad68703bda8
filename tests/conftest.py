"""What the tests of several rooms share."""
import logging
import os
import random
import signal
from pathlib import Path

# before torch is imported: as many processes as there are cores may run tests, and the models are small
os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np
import pytest
import torch

from pst_timm.engine import progress
from tests.engine.helpers import write_images

PLOT_SUMMARY = progress.plot_summary

# nohup, or a shell that starts the tests in the background, would have all their processes ignore these
for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same state of the random generators, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _unlog() -> None:
    root = logging.getLogger()
    for handler in [h for h in root.handlers if not type(h).__module__.startswith('_pytest')]:
        root.removeHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger('pst_timm').setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def unlogged():
    """Take back how a command set up the log: its handlers write to a stream that ends with the test.

    Before the test as well, as the command may have been called by a fixture of the module.
    """
    _unlog()
    yield
    _unlog()


@pytest.fixture(scope='session', autouse=True)
def undrawn():
    """Runs in this process draw no curve, as without matplotlib: it takes longer than their epochs. See `drawn`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, 'plot_summary', lambda *args: False)
        yield


@pytest.fixture
def drawn(monkeypatch):
    """For the tests of the curve, which is drawn after each epoch. Runs in processes of their own always draw it."""
    monkeypatch.setattr(progress, 'plot_summary', PLOT_SUMMARY)


@pytest.fixture(scope='session')
def images(tmp_path_factory) -> Path:
    """An image folder of three easy classes: 16 training and 6 validation images each. Not to be written to."""
    return write_images(tmp_path_factory.mktemp('images'), {'train': 16, 'validation': 6})
