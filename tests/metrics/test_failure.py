"""The order of confidences, against scikit-learn and against all pairs."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from pst_timm.metrics.failure import failure_auroc


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=60))
def test_it_is_the_area_of_scikit_learn_and_the_share_of_ordered_pairs(images):
    confidence, right = (torch.tensor(values) for values in zip(*images))
    found = failure_auroc(confidence / 7, right)
    if right.all() or not right.any():
        assert found is None
        return
    assert found == pytest.approx(roc_auc_score(right, confidence))
    pairs = [(a > b) + (a == b) / 2 for a in confidence[right].tolist() for b in confidence[~right].tolist()]
    assert found == pytest.approx(sum(pairs) / len(pairs))


def test_a_perfect_order_and_its_reverse():
    right = torch.tensor([True, False, True])
    assert failure_auroc(torch.tensor([0.9, 0.2, 0.8]), right) == 1
    assert failure_auroc(torch.tensor([0.1, 0.2, 0.1]), right) == 0
