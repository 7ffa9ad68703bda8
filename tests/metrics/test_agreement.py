"""How far two forms of a model lie apart, by hand."""
import math

import pytest
import torch

from pst_timm.metrics.agreement import compare_logits


def test_difference_is_a_share_of_the_largest_logit_expected():
    expected = torch.tensor([[1., -4.], [2., 0.]])
    got = torch.tensor([[1., -4.], [-1., 0.]])
    assert compare_logits(got, expected) == (pytest.approx(3 / 4), 0.5)
    assert compare_logits(expected.half(), expected) == (0., 1.)
    assert compare_logits(torch.zeros(2, 2), torch.zeros(2, 2)).difference == 0


def test_what_cannot_agree_does_not_pass():
    expected = torch.ones(2, 3)
    assert compare_logits(torch.ones(2, 4), expected) == (math.inf, 0.)
    broken = expected.clone()
    broken[0, 0] = math.nan
    assert not compare_logits(broken, expected).difference <= 1e9
