"""What is measured of the monitor: corruptions that grow, draws that are fair, tables that can be gone on with."""
import json

import numpy as np
import pytest
from PIL import Image

from pst_timm.data.drift import Batch, Result
from pst_timm.data.samples import LOOKS
from scripts import measure_monitoring as measure


def photo(size=64):
    """Smooth shapes with an edge, neither dark nor bright."""
    y, x = np.mgrid[:size, :size] / size
    pixels = np.stack([60 + 60 * x, 80 + 40 * np.sin(9 * y), 70 + 50 * (x > y)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize('name', measure.CORRUPTIONS)
def test_corruptions_grow_with_their_strength(name):
    image = photo()
    made = [measure.corrupted(image, name, strength, seed=3) for strength in range(1, 6)]
    assert all(m.size == image.size and m.mode == 'RGB' for m in made)
    changes = [np.abs(np.asarray(m, float) - np.asarray(image, float)).mean() for m in made]
    assert changes[0] > 0 and changes == sorted(changes) and changes[4] > 1.5 * changes[0]
    again = measure.corrupted(image, name, 3, seed=3)
    assert np.array_equal(np.asarray(again), np.asarray(made[2]))


def test_a_rotated_image_has_no_black_corners():
    turned = np.asarray(measure.corrupted(Image.new('RGB', (64, 48), (200, 90, 60)), 'rotation', 5, 1))
    assert np.abs(turned.astype(int) - (200, 90, 60)).max() <= 1


def test_blur_is_scaled_to_the_size_of_the_image():
    """An edge of a large image is spread over as large a part of it."""
    def spread(size):
        half = np.repeat((np.arange(size) >= size // 2) * 255, size).reshape(size, size)
        edge = Image.fromarray(half.astype(np.uint8))
        row = np.asarray(measure.corrupted(edge.convert('RGB'), 'blur', 5, 0))[:, size // 2, 0]
        return ((row > 25) & (row < 230)).sum() / size

    assert spread(448) == pytest.approx(spread(224), rel=0.15) and spread(224) > 0


def clean(count=40):
    rng = np.random.default_rng(0)
    return Batch(np.arange(count) / count, rng.integers(0, 3, count), rng.integers(0, 3, count),
                 rng.normal(size=(count, len(LOOKS))), rng.normal(size=(count, 4)))


@pytest.mark.parametrize('fresh', [True, False])
def test_draws_share_no_image_with_their_reference(fresh, monkeypatch):
    monkeypatch.setattr(measure, 'FALSE_DRAWS', 5)
    draws = list(measure.unmoved(clean(), 3, 10, fresh))
    assert len(draws) == 5
    for reference, new in draws:
        known = set(reference.confidence.round(6).tolist())
        drawn = set(new.confidence.astype(np.float32).round(6).tolist())
        assert len(known) == 20 and len(drawn) == 10 and not known & drawn and new.labels is None
    assert len({tuple(new.confidence) for _, new in draws}) == 5
    assert (len({tuple(sorted(reference.confidence)) for reference, _ in draws}) > 1) == fresh


def test_a_tally_is_gone_on_with(tmp_path, monkeypatch):
    calls = []

    def tests(reference, batch, names, alpha, seed):
        calls.append(seed)
        return [Result('confidence', 'KS', 0, 0, 0, seed == 1), Result('width', 'KS', 0, 0, 0, seed < 2)]

    monkeypatch.setattr(measure, 'drift_tests', tests)
    draws = [(None, None)] * 4
    expected = {'draws': 4, 'alerts': 2, 'confidence': 1, 'width': 2}
    assert measure.Tally(tmp_path / 'tally.json').count('a', iter(draws)) == expected
    assert json.loads((tmp_path / 'tally.json').read_text()) == {'a': expected}
    assert measure.Tally(tmp_path / 'tally.json').count('a', iter(draws)) == expected and calls == [0, 1, 2, 3]
