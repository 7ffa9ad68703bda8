"""The calibration error by its definition, and what is said of a temperature that does not help."""
import logging

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pst_timm.metrics.calibration import Calibration, calibration_error, refit_temperature


def by_definition(logits, target, bins):
    """Sum over the bins of their share of the images times |accuracy - mean confidence|, one image at a time."""
    found = [(p.max().item(), p.argmax().item() == t) for p, t in zip(logits.softmax(dim=-1), target.tolist())]
    error = 0.
    for i in range(bins):
        inside = [(c, r) for c, r in found if i / bins <= c < (i + 1) / bins or (c == 1 and i == bins - 1)]
        if inside:
            confidence = sum(c for c, _ in inside) / len(inside)
            accuracy = sum(r for _, r in inside) / len(inside)
            error += len(inside) / len(found) * abs(accuracy - confidence)
    return error


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(2, 9), st.integers(1, 20), st.floats(0.1, 8.), st.integers(0, 99))
def test_calibration_error_is_that_of_the_definition(images, classes, bins, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(images, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, (images,), generator=generator)
    assert calibration_error(logits, target, bins) == pytest.approx(by_definition(logits, target, bins), abs=1e-9)


def results_of(logits, target):
    calibration = Calibration()
    for i in range(0, len(target), 7):
        calibration.update(logits[i:i + 7], target[i:i + 7])
    return calibration.results()


def test_a_temperature_that_makes_it_worse_is_said(caplog):
    # two of three right at even odds, and none at a confidence of 0.9: the loss is mended, the error is not
    odds = torch.tensor([[0.7, 0.3]] * 60 + [[0.9, 0.1]] * 4, dtype=torch.float64)
    target = torch.tensor([0] * 42 + [1] * 18 + [1] * 4)
    with caplog.at_level(logging.WARNING):
        results = results_of(odds.log(), target)
    assert results['ece_calibrated'] > results['ece'] and results['temperature'] > 1
    [said] = caplog.messages
    assert said.endswith('Use the model without it.')
    assert f'{results["ece_calibrated"]:.5f} with it, {results["ece"]:.5f} without' in said


def test_a_temperature_that_helps_needs_no_word(caplog):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 4, generator=generator, dtype=torch.float64)
    target = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)
    results = results_of(3 * logits, target)
    assert results['ece_calibrated'] < results['ece'] and not caplog.messages


def drawn(images, scale, seed=0):
    """Logits that are `scale` times too large, and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, 4, generator=generator, dtype=torch.float64)
    return scale * logits, torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)


@pytest.mark.parametrize('scale', [0.5, 3.])
def test_a_refit_finds_the_temperature_and_measures_it_on_other_images(scale):
    logits, target = drawn(2000, scale)
    fit = refit_temperature(logits.float(), target)
    assert fit.temperature == pytest.approx(scale, rel=0.1) and fit.helps
    assert fit.loss == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)
    best = F.cross_entropy(logits / fit.temperature, target).item()
    assert best < fit.loss_refitted < best + 0.01  # no images are better at a temperature that is not theirs
    assert fit.ece_refitted < 0.05 < fit.ece


def test_a_refit_of_what_is_calibrated_does_not_help():
    """On its own images any fit lowers the loss; on others it raises it, on average over many draws of few images."""
    raised = []
    for seed in range(20):
        logits, target = drawn(40, 1., seed)
        fit = refit_temperature(logits, target)
        assert F.cross_entropy(logits / fit.temperature, target).item() <= fit.loss
        raised.append(fit.loss_refitted - fit.loss)
        assert fit.helps == (fit.loss_refitted < fit.loss and fit.ece_refitted < fit.ece)
    assert sum(raised) > 0
