"""Images that are missing, damaged, turned, or not those that their boxes are for."""
import logging

import pytest
from PIL import Image

from pst_timm.detection.datasets import open_boxes
from pst_timm.utils.errors import PSTError

from .box_data import annotation, coco, picture, write_coco


@pytest.fixture
def root(tmp_path):
    return write_coco(tmp_path, coco(images=4))


def damage(path):
    path.write_bytes(path.read_bytes()[:60])


def test_a_missing_image_is_counted_when_the_data_is_opened(root):
    (root / 'train' / '1.png').unlink()
    dataset = open_boxes(root, 'train', max_bad_images=1, max_bad_share=1.)
    assert dataset.bad_images.count == 1
    assert dataset[1][1]['image_id'] == 3, 'the next image takes its place in training'
    dataset.replace_bad = False
    assert dataset[1] is None, 'and none does in evaluation'
    assert dataset[0][1]['image_id'] == 1


def test_too_many_missing_images_are_told_when_the_data_is_opened(root):
    (root / 'train' / '1.png').unlink()
    with pytest.raises(PSTError, match=r'1 image could not be read, more than the share.*There is no image .*1\.png'):
        open_boxes(root, 'train')


def test_the_last_image_is_followed_by_the_first(root):
    damage(root / 'train' / '3.png')
    dataset = open_boxes(root, 'train', max_bad_share=1.)
    assert dataset[3][1]['image_id'] == 1 and dataset.bad_images.count == 1


@pytest.mark.parametrize('limits, words', [
    (dict(max_bad_images=0, max_bad_share=1.), 'more than the 0 of --max-bad-images'),
    (dict(max_bad_images=9, max_bad_share=0.1), r'more than the share of 0.1 of --max-bad-share \(25.0% of 4\)'),
])
def test_too_many_end_the_run_with_the_reason(root, limits, words):
    damage(root / 'train' / '2.png')
    dataset = open_boxes(root, 'train', **limits)
    with pytest.raises(PSTError, match=words) as error:
        dataset[2]
    assert '2.png cannot be read as an image' in str(error.value)


def test_each_is_named_once_in_the_log(root, caplog):
    (root / 'train' / '0.png').unlink()
    damage(root / 'train' / '2.png')
    dataset = open_boxes(root, 'train', max_bad_share=1.)
    dataset[2]
    with caplog.at_level(logging.WARNING):
        dataset.bad_images.report(dataset)
        dataset.bad_images.report(dataset)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and 'There is no image' in lines[0] and '2.png cannot be read' in lines[1]


def test_an_image_of_another_size_is_not_used(root):
    picture(20, 15).save(root / 'train' / '0.png')
    dataset = open_boxes(root, 'train', max_bad_share=1.)
    with pytest.raises(PSTError, match=r'0\.png has 20x15 pixels, and its boxes are for 40x30'):
        dataset.read(0)
    assert dataset[0][1]['image_id'] == 2 and dataset.bad_images.count == 1
    dataset.bad_images.limit = 0
    with pytest.raises(PSTError, match='has 20x15 pixels, and its boxes are for 40x30'):
        dataset[0]


def turned(path, orientation, size=(40, 30)):
    """A picture with its red rectangle at (2, 3, 12, 11) as it is stored, which the camera's note turns."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(*size, [(2, 3, 12, 11)]).save(path, exif=exif)


@pytest.mark.parametrize('orientation', [1, 2, 3, 4, 5, 6, 7, 8])
def test_boxes_are_for_the_pixels_as_they_are_stored(root, orientation):
    turned(root / 'train' / '0.png', orientation)
    image, target = open_boxes(root, 'train')[0]
    assert image.shape == (3, 30, 40) and target['orig_size'] == (30, 40)
    assert image[:, 3, 2].tolist() == [230, 20, 20] and image[:, 2, 1].tolist() == [90, 90, 90]


@pytest.mark.parametrize('orientation, left, top', [(5, 3, 2), (6, 19, 2), (7, 19, 28), (8, 3, 28)])
def test_boxes_are_for_the_image_as_it_is_shown_where_their_size_says_so(tmp_path, orientation, left, top):
    root = write_coco(tmp_path, coco(images=1, size=(30, 40), annotations=[annotation(1)]))
    turned(root / 'train' / '0.png', orientation)
    image, target = open_boxes(root, 'train')[0]
    assert image.shape == (3, 40, 30) and target['boxes'].canvas_size == (40, 30)
    red = (image[0] > 150).nonzero()
    assert red.min(0).values.tolist() == [top, left] and len(red) == 80


def test_grey_and_transparent_images_have_three_channels(root):
    Image.new('L', (40, 30), 7).save(root / 'train' / '0.png')
    Image.new('RGBA', (40, 30), (0, 0, 0, 0)).save(root / 'train' / '1.png')
    dataset = open_boxes(root, 'train')
    assert dataset[0][0].unique().tolist() == [7] and dataset[1][0].unique().tolist() == [255]
    assert dataset[0][0].shape == dataset[1][0].shape == (3, 30, 40)


def test_names_of_files(root):
    dataset = open_boxes(root, 'train')
    assert dataset.filename(1) == '1.png' == dataset.name(1)
    assert dataset.filename(1, absolute=True) == str(root / 'train' / '1.png')
    assert dataset.class_to_idx == {'cat': 0, 'dog': 1}
