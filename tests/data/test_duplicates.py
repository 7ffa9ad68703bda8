"""Copies are found whatever was done to the file, and different images are none."""
import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from pst_timm.data.duplicates import duplicate_groups, fingerprint, likeness, read_prints
from pst_timm.data.samples import Samples


def photo(seed, size=(96, 80)):
    """Shapes of random place and colour over a slope: different enough from others, as photographs are."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 1, size[0])[None] * rng.integers(0, 120) + np.linspace(0, 1, size[1])[:, None] * 60
    image = Image.fromarray(np.repeat(slope[..., None], 3, axis=2).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y = rng.integers(0, size[0]), rng.integers(0, size[1])
        w, h = rng.integers(8, 40, 2)
        getattr(draw, rng.choice(['ellipse', 'rectangle']))((x, y, x + w, y + h), fill=tuple(rng.integers(0, 256, 3)))
    return image


def again(image, quality, format='JPEG'):
    file = io.BytesIO()
    image.save(file, format, quality=quality)
    return Image.open(file).convert('RGB')


CHANGES = {
    'the same file': lambda image: image.copy(),
    'JPEG 75': lambda image: again(image, 75),
    'JPEG 30': lambda image: again(image, 30),
    'WebP 50': lambda image: again(image, 50, 'WEBP'),
    'half': lambda image: image.resize((48, 40), Image.Resampling.BICUBIC),
    'twice': lambda image: image.resize((192, 160), Image.Resampling.LANCZOS),
    'an odd size': lambda image: image.resize((71, 59), Image.Resampling.BILINEAR),
    'small and JPEG': lambda image: again(image.resize((64, 53)), 50),
}


def groups_of(images, embeddings=None):
    prints = [fingerprint(image) for image in images]
    return duplicate_groups([p[0] for p in prints], np.array([p[1] for p in prints]), embeddings)


@pytest.mark.parametrize('change', CHANGES)
def test_changed_copies_are_found_and_nothing_else(change):
    originals = [photo(seed) for seed in range(60)]
    copies = [CHANGES[change](image) for image in originals[:20]]
    found = groups_of(originals + copies)
    assert found[:20].tolist() == list(range(20)) == found[60:].tolist()
    assert (found[20:60] == -1).all()


def test_many_copies_of_one_do_not_hide_a_changed_one():
    images = [photo(0)] * 40 + [photo(1)] + [again(photo(0), 60)]
    found = groups_of(images)
    assert (found[[*range(40), 41]] == 0).all() and found[40] == -1


def test_blank_images_are_copies_pixel_by_pixel_alone():
    plain = [Image.new('RGB', (64, 64), colour) for colour in ('white', 'black', (254, 255, 255), 'white')]
    assert groups_of(plain).tolist() == [0, -1, -1, 0]


def test_size_and_mode_count_among_the_same_pixels():
    a, b = Image.new('L', (8, 4), 9), Image.new('L', (4, 8), 9)
    assert fingerprint(a)[0] != fingerprint(b)[0] != fingerprint(Image.new('RGB', (4, 8), (9, 9, 9)))[0]


def test_a_mirrored_or_darker_copy_needs_a_model_that_takes_it_for_a_neighbour():
    originals = [photo(seed) for seed in range(12)]
    changed = [originals[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT), originals[1].point(lambda v: v // 2)]
    images = originals + changed
    assert (groups_of(images) == -1).all()
    embeddings = np.eye(14)
    embeddings[12], embeddings[13] = embeddings[0], embeddings[1]
    found = groups_of(images, embeddings)
    assert found[[0, 12]].tolist() == [0, 0] and found[[1, 13]].tolist() == [1, 1] and (found[2:12] == -1).all()
    # a model that takes all for the same makes no copies
    assert (groups_of(originals, np.ones((12, 3)) + 1e-3 * np.arange(36).reshape(12, 3)) == -1).all()


def test_groups_are_the_connected_parts():
    rng = np.random.default_rng(0)
    digests = [bytes([d]) for d in rng.integers(0, 12, 30)]
    found = duplicate_groups(digests, np.zeros((30, 16, 16), np.uint8))
    for i, j in itertools.combinations(range(30), 2):
        assert (found[i] == found[j] != -1) == (digests[i] == digests[j])


@pytest.mark.parametrize('count', [0, 1])
def test_one_image_has_no_copy(count):
    assert duplicate_groups([b'x'] * count, np.zeros((count, 16, 16), np.uint8), np.zeros((count, 3))).tolist() == (
        [-1] * count)


def test_likeness_is_the_correlation():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 16, 16)).astype(np.uint8)
    assert float(likeness(a, b)) == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1], abs=1e-5)
    assert float(likeness(a, np.full((16, 16), 7, np.uint8))) == 0


@pytest.mark.parametrize('workers', [0, 1])
def test_prints_name_what_cannot_be_read(tmp_path, workers):
    for i in range(3):
        photo(i).save(tmp_path / f'{i}.png')
    (tmp_path / '10.png').write_bytes(b'no image')
    found = read_prints(Samples.loose([tmp_path], torch.as_tensor), workers)
    assert found.kept.tolist() == [0, 1, 3] and found.broken == [str(tmp_path / '10.png')]
    assert found.looks[:, -2:].tolist() == [[96, 80]] * 3 and found.labels.tolist() == [-1] * 3
    for i in range(3):
        digest, thumb, look = fingerprint(photo(i))
        assert found.digests[i] == digest and (found.thumbs[i] == thumb).all()
        assert found.looks[i] == pytest.approx(look)


def test_a_model_without_near_neighbours_adds_nothing():
    images = [photo(seed) for seed in range(5)]
    assert (groups_of(images, np.eye(5)) == -1).all()
