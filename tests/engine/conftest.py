"""What the tests of the engine share."""
from pathlib import Path

import pytest
import torch

from .helpers import write_images


@pytest.fixture(scope='session')
def images(tmp_path_factory) -> Path:
    """An image folder of three easy classes: 16 training and 6 validation images each. Not to be written to."""
    return write_images(tmp_path_factory.mktemp('images'), {'train': 16, 'validation': 6})


@pytest.fixture(scope='session', autouse=True)
def one_thread():
    """As many threads as the scripts have, for results that are bitwise theirs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
