"""What the tests of the engine share."""

import pytest
import torch


@pytest.fixture(scope='session', autouse=True)
def one_thread():
    """As many threads as the scripts have, for results that are bitwise theirs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
