"""Boxes go with the pixels that are in them, through whatever is done to an image."""
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms.v2 import functional as F

from pst_timm.detection.transforms import eval_transforms, fitted_size, train_transforms

from .box_data import COLORS, picture

ALL = dict(hflip=0.5, scale_jitter=(0.5, 1.8), box_crop=0.5)


def sample(width, height, boxes, crowd=None):
    """A picture and its target: labels, areas and crowds of their own, by which boxes are known again."""
    count = len(boxes)
    image = tv_tensors.Image(F.pil_to_tensor(picture(width, height, boxes)))
    return image, dict(
        boxes=tv_tensors.BoundingBoxes(
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), format='XYXY', canvas_size=(height, width)),
        labels=torch.arange(count),
        image_id=7,
        area=torch.arange(count) + 100.,
        iscrowd=torch.tensor(crowd or [False] * count, dtype=torch.bool),
        orig_size=(height, width),
    )


def painted(image, label):
    """The box of the pixels that have the colour of a label, None where there are none."""
    color = torch.tensor(COLORS[label]).float() / 255
    found = ((image - color[:, None, None]).abs().amax(0) < 0.25).nonzero()
    if not len(found):
        return None
    (y1, x1), (y2, x2) = found.min(0).values.tolist(), found.max(0).values.tolist()
    return [x1, y1, x2 + 1, y2 + 1]


def assert_follow(image, target, tolerance=1.6):
    for box, label in zip(target['boxes'].tolist(), target['labels'].tolist()):
        found = painted(image, label)
        assert found is not None, f'nothing of box {label} is left'
        assert max(abs(a - b) for a, b in zip(box, found)) <= tolerance, (box, found)


# rectangles that do not touch, large enough to be found again after a resize
@st.composite
def pictures(draw):
    width, height = draw(st.integers(90, 200)), draw(st.integers(90, 200))
    boxes = []
    for column in range(2):
        for row in range(2):
            if draw(st.booleans()):
                left, top = column * width // 2 + 3, row * height // 2 + 3
                x1, y1 = left + draw(st.integers(0, 8)), top + draw(st.integers(0, 8))
                x2 = min(x1 + draw(st.integers(20, 70)), (column + 1) * width // 2 - 3)
                y2 = min(y1 + draw(st.integers(20, 70)), (row + 1) * height // 2 - 3)
                boxes.append((x1, y1, x2, y2))
    return width, height, boxes


@settings(max_examples=60, deadline=None)
@given(pictures(), st.integers(0, 10 ** 6), st.sampled_from([
    dict(hflip=1.), dict(vflip=1.), dict(scale_jitter=(0.6, 0.9)), dict(scale_jitter=(1.1, 1.8)), dict(box_crop=1.),
    ALL]))
def test_boxes_follow_their_pixels(drawn, seed, kwargs):
    torch.manual_seed(seed)
    image, target = train_transforms(160, **kwargs)(*sample(*drawn))
    assert_follow(image, target)
    boxes, (height, width) = target['boxes'], image.shape[-2:]
    # the longer side is that of the evaluation, whatever was done
    assert max(height, width) == 160
    assert (boxes[:, 2:] - boxes[:, :2] >= 1.999).all() and (boxes >= 0).all()
    assert (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
    # what goes with a box still does
    assert len(boxes) == len(target['labels']) == len(target['area']) == len(target['iscrowd'])
    x1, y1, x2, y2 = boxes.unbind(1)
    torch.testing.assert_close(target['area'], (x2 - x1) * (y2 - y1))


@settings(max_examples=25, deadline=None)
@given(pictures(), st.sampled_from([96, 160, 333]))
def test_evaluation_resizes_and_nothing_else(drawn, size):
    width, height, boxes = drawn
    before, target = sample(*drawn)
    image, after = eval_transforms(size)(before, target)
    assert tuple(image.shape[-2:]) == fitted_size(height, width, size) and max(image.shape) == size
    assert_follow(image, after, 1.6 * max(1, size / 160))
    # boxes map back exactly by the sizes alone
    scale = torch.tensor([width / image.shape[2], height / image.shape[1]] * 2)
    torch.testing.assert_close(after['boxes'] * scale, torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    for key in ('labels', 'area', 'iscrowd'):
        assert after[key].equal(target[key])
    assert after['orig_size'] == (height, width) and after['image_id'] == 7


def test_samples_are_plain_tensors_from_0_to_1():
    for transforms in (eval_transforms(64), train_transforms(64, **ALL, color_jitter=0.5)):
        image, target = transforms(*sample(100, 80, [(10, 10, 60, 60)]))
        for tensor in (image, *(v for v in target.values() if isinstance(v, torch.Tensor))):
            assert type(tensor) is torch.Tensor
        assert image.dtype == torch.float32 and 0 <= image.min() and 0.5 < image.max() <= 1
        assert target['boxes'].dtype == torch.float32 and target['labels'].dtype == torch.int64


def test_two_flips_are_none():
    flip = train_transforms(100, hflip=1.)
    image, target = flip(*sample(100, 80, [(10, 12, 60, 61)]))
    assert target['boxes'].tolist() == [[40, 12, 90, 61]]
    again = F.to_dtype(tv_tensors.Image(image), torch.uint8, scale=True)
    boxes = tv_tensors.BoundingBoxes(target['boxes'], format='XYXY', canvas_size=(80, 100))
    image, target = flip(again, dict(target, boxes=boxes))
    expected, _ = eval_transforms(100)(*sample(100, 80, [(10, 12, 60, 61)]))
    assert image.equal(expected) and target['boxes'].tolist() == [[10, 12, 60, 61]]


def test_labels_stay_with_their_boxes_where_some_are_cropped_away():
    boxes = [(2, 2, 40, 40), (150, 2, 190, 40), (2, 150, 40, 190), (150, 150, 190, 190)]
    seen = set()
    for seed in range(25):
        torch.manual_seed(seed)
        image, target = train_transforms(160, box_crop=1.)(*sample(200, 200, boxes))
        assert_follow(image, target, 2.1)
        seen.add(tuple(target['labels'].tolist()))
    assert len({len(labels) for labels in seen}) > 2, 'some crops leave boxes out'


def test_crowds_are_left_out_of_training_alone():
    boxes = [(2, 2, 40, 40), (50, 2, 90, 40), (2, 50, 40, 75)]
    _, target = train_transforms(100)(*sample(100, 80, boxes, [False, True, False]))
    assert target['labels'].tolist() == [0, 2]
    assert target['boxes'].tolist() == [[2, 2, 40, 40], [2, 50, 40, 75]]
    assert not target['iscrowd'].any()
    _, target = eval_transforms(100)(*sample(100, 80, boxes, [False, True, False]))
    assert target['iscrowd'].tolist() == [False, True, False]


@pytest.mark.parametrize('crowd', [None, [True]])
@pytest.mark.parametrize('size', [(90, 60), (3, 200), (200, 5), (1, 1)])
def test_images_without_boxes_and_strange_sizes(size, crowd):
    boxes = [(0, 0, 1, 1)] if crowd else []
    for seed in range(8):
        torch.manual_seed(seed)
        image, target = train_transforms(64, hflip=1., scale_jitter=(0.3, 3.), box_crop=1., color_jitter=0.4)(
            *sample(*size, boxes, crowd))
        assert target['boxes'].shape == (0, 4) and len(target['labels']) == len(target['area']) == 0
        assert max(image.shape) == 64 and min(image.shape) >= 1


@pytest.mark.parametrize('size', [(3, 200), (200, 5), (7, 7), (1, 1)])
def test_images_too_small_to_crop(size):
    for seed in range(8):
        torch.manual_seed(seed)
        image, target = train_transforms(64, hflip=0.5, scale_jitter=(0.5, 2.), box_crop=1.)(
            *sample(*size, [(0, 0, *size)]))
        assert max(image.shape) == 64 and len(target['boxes']) == len(target['labels']) <= 1


def test_a_jitter_of_1_is_none_and_others_change_the_objects():
    given = sample(100, 80, [(20, 20, 60, 60)])
    plain, at_rest = (train_transforms(100, scale_jitter=jitter)(*given) for jitter in (None, (1., 1.)))
    assert plain[0].equal(at_rest[0]) and plain[1]['boxes'].equal(at_rest[1]['boxes'])
    _, half = train_transforms(100, scale_jitter=(0.5, 0.5))(*given)
    x1, y1, x2, y2 = half['boxes'][0].tolist()
    assert x2 - x1 == pytest.approx(20) and y2 - y1 == pytest.approx(20)


@pytest.mark.parametrize('width, height', [(200, 60), (60, 200)])
@pytest.mark.parametrize('jitter', [0.4, 1.7])
def test_what_is_jittered_lies_anywhere_and_is_whole(width, height, jitter):
    places = []
    middle = (width // 2 - 10, height // 2 - 10, width // 2 + 10, height // 2 + 10)
    for seed in range(40):
        torch.manual_seed(seed)
        image, target = train_transforms(200, scale_jitter=(jitter, jitter))(*sample(width, height, [middle]))
        assert image.shape == (3, height, width) and image.amax(0).min() > 0.3, 'nothing is black'
        places += target['boxes'].tolist()
        if jitter < 1:  # nothing is lost
            x1, y1, x2, y2 = target['boxes'][0].tolist()
            assert (x2 - x1, y2 - y1) == pytest.approx((8, 8), abs=0.2)
    lefts, tops = ({round(place[i]) for place in places} for i in (0, 1))
    assert len(lefts) > 8 and len(tops) > 8
    # as far as there is room
    assert max(lefts) - min(lefts) > 0.4 * abs(1 - jitter) * width
    assert max(tops) - min(tops) > 0.4 * abs(1 - jitter) * height


def test_what_is_beyond_the_image_is_the_mean():
    torch.manual_seed(0)
    image, _ = train_transforms(100, scale_jitter=(0.5, 0.5))(*sample(100, 80, []))
    mean = torch.tensor([124, 116, 104]) / 255
    assert ((image - mean[:, None, None]).abs().amax(0) < 1e-6).float().mean() == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize('size', [(640, 480), (480, 640), (333, 517), (70, 1000), (31, 33)])
@pytest.mark.parametrize('img_size', [320, 333])
def test_the_resize_of_torchvisions_detectors_finds_nothing_to_do(size, img_size):
    resize = GeneralizedRCNNTransform(img_size, img_size, [0., 0., 0.], [1., 1., 1.])
    width, height = size
    for transforms in (eval_transforms(img_size), train_transforms(img_size, **ALL)):
        image, target = transforms(*sample(width, height, [(5, 5, 25, 25)]))
        for training in (True, False):
            images, targets = resize.train(training)([image], [dict(target)])
            assert images.image_sizes == [tuple(image.shape[-2:])]
            assert images.tensors[0, :, :image.shape[1], :image.shape[2]].equal(image)
            assert targets[0]['boxes'].equal(target['boxes'])


def test_the_same_seed_draws_the_same():
    given = sample(120, 90, [(10, 10, 60, 60), (70, 40, 110, 80)])
    transforms = train_transforms(96, **ALL, color_jitter=0.4)

    def drawn(seed):
        torch.manual_seed(seed)
        image, target = transforms(*given)
        return image, target['boxes']

    (a, boxes_a), (b, boxes_b), (c, _) = drawn(3), drawn(3), drawn(4)
    assert a.equal(b) and boxes_a.equal(boxes_b) and not (a.shape == c.shape and a.equal(c))


def test_an_image_alone_is_resized_as_one_with_boxes():
    image, _ = sample(120, 90, [(10, 10, 60, 60)])
    assert eval_transforms(64)(image).equal(eval_transforms(64)(*sample(120, 90, [(10, 10, 60, 60)]))[0])


def test_transforms_travel_to_worker_processes():
    for transforms in (eval_transforms(64), train_transforms(64, **ALL, color_jitter=0.5)):
        again = pickle.loads(pickle.dumps(transforms))
        torch.manual_seed(1)
        first = transforms(*sample(100, 80, [(10, 10, 60, 60)]))[0]
        torch.manual_seed(1)
        assert again(*sample(100, 80, [(10, 10, 60, 60)]))[0].equal(first)


def test_a_resize_smooths_what_gets_smaller():
    noise = tv_tensors.Image(torch.randint(256, (3, 400, 400), dtype=torch.uint8))
    # sixteen pixels and more make one; without smoothing it would be four, and twice the deviation
    assert eval_transforms(100)(noise).std() < 0.25 * (noise.float() / 255).std()
