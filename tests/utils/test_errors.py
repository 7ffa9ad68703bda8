"""Hints, and what an error makes of a command."""
import pytest

from pst_timm.utils.errors import Interrupted, PSTError, Unavailable, did_you_mean


@pytest.mark.parametrize('name, sentence', [
    ('convnet', ' Did you mean convnext?'),
    ('resnet5', ' Did you mean resnet50 or resnet18?'),
    ('vit', ''),
    ('', ''),
])
def test_near_names(name, sentence):
    assert did_you_mean(name, iter(['resnet18', 'resnet50', 'convnext'])) == sentence


def test_most_limits_the_hints():
    assert did_you_mean('resnet5', ['resnet18', 'resnet50'], most=1) == ' Did you mean resnet50?'


def test_one_root_and_its_exit_codes():
    assert {error: error.exit_code for error in (PSTError, Interrupted, Unavailable)} == {
        PSTError: 1, Interrupted: 75, Unavailable: 75}
    assert issubclass(Interrupted, PSTError) and issubclass(Unavailable, PSTError)
