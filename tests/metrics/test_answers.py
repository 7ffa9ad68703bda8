"""Right and wrong answers survive being written as digits."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pst_timm.metrics.answers import Answers, pack_answers, unpack_answers


@pytest.mark.parametrize('right, digits', [
    ([True], '8'), ([False, True, True, False], '6'), ([True] * 4 + [False, True], 'f4'), ([], '')])
def test_pack_answers(right, digits):
    assert pack_answers(right) == digits


def test_answers_by_hand():
    assert unpack_answers('a8', 5).tolist() == [True, False, True, False, True]
    assert unpack_answers('F', 4).tolist() == [True] * 4
    assert unpack_answers('123', 12).tolist() == [bool(int(b)) for b in '000100100011']


@settings(deadline=None, derandomize=True)
@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_answers_come_back(right):
    assert unpack_answers(pack_answers(right), len(right)).tolist() == right


@pytest.mark.parametrize('digits, images', [('a8', 4), ('a8', 9), ('a9', 5), ('8', 5)])
def test_answers_of_another_number_of_images_are_refused(digits, images):
    with pytest.raises(ValueError, match='images'):
        unpack_answers(digits, images)


def test_answers_of_batches_are_in_order():
    answers = Answers()
    answers.update(torch.tensor([[0., 1.], [1., 0.]]), torch.tensor([1, 1]))
    answers.update(torch.tensor([[2., 1.]]), torch.tensor([0]))
    assert answers.results() == {'answers': 'a'}
