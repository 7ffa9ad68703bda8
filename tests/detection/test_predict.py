"""Boxes found in files, drawn on them and written as data; files that cannot be read, and files that must stay."""
import json
import logging
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

from pst_timm.detection.drawing import class_colors, draw_boxes
from pst_timm.detection.predict import Prediction, coco_results, find, predict
from pst_timm.utils.errors import PSTError

from .box_data import COLORS, picture


class ColorDetector(nn.Module):
    """A detector as torchvision's are, which finds the coloured rectangles of `picture`, one box for each colour."""
    class_names = ('red', 'green', 'blue')
    img_size = 120

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.batches = []

    def forward(self, images):
        self.batches.append(len(images))
        outputs = []
        for image in images:
            assert image.dtype == torch.float32 and max(image.shape) == self.img_size and image.max() <= 1
            boxes, labels = [], []
            for k in range(len(self.class_names)):
                color = torch.tensor(COLORS[k]).float() / 255
                found = ((image - color[:, None, None]).abs().amax(0) < 0.2).nonzero()
                if len(found):
                    (y1, x1), (y2, x2) = found.min(0).values.tolist(), found.max(0).values.tolist()
                    boxes.append([x1, y1, x2 + 1, y2 + 1])
                    labels.append(k)
            outputs.append(dict(
                boxes=torch.tensor(boxes).float().reshape(-1, 4), labels=torch.tensor(labels, dtype=torch.int64),
                # the later classes are the surer ones
                scores=torch.tensor([0.4 + 0.2 * k for k in labels])))
        return outputs


BOXES = [(10, 20, 60, 70), (100, 20, 160, 90), (30, 100, 90, 140)]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / 'images'
    (path / 'more').mkdir(parents=True)
    picture(240, 180, BOXES[:2]).save(path / 'a.png')
    picture(240, 180, BOXES).save(path / 'more' / 'b.jpg', quality=98)
    picture(100, 150).save(path / 'none.png')
    return path


@pytest.fixture
def detector():
    return ColorDetector()


def test_boxes_are_in_pixels_of_the_file(folder, detector):
    a, b, none = predict(detector, [folder], threshold=0.)
    assert [p.path for p in (a, b, none)] == [str(folder / name) for name in ('a.png', 'more/b.jpg', 'none.png')]
    np.testing.assert_allclose(a.boxes, [BOXES[1], BOXES[0]], atol=2.1)
    assert a.labels.tolist() == [1, 0] and a.scores.tolist() == pytest.approx([.6, .4]) and a.size == (240, 180)
    np.testing.assert_allclose(b.boxes, BOXES[::-1], atol=2.1)
    assert len(none.boxes) == 0 and none.size == (100, 150) and not none.reason


def test_the_threshold_is_for_all_that_is_given(folder, detector):
    a, b, _ = predict(detector, [folder], threshold=0.55)
    assert a.labels.tolist() == [1] and b.labels.tolist() == [2, 1]
    assert len(a.boxes) == len(a.scores) == 1


@pytest.mark.parametrize('batch_size, batches', [(1, [1, 1, 1]), (2, [2, 1]), (8, [3])])
def test_batches(folder, detector, batch_size, batches):
    found = predict(detector, [folder], threshold=0., batch_size=batch_size)
    assert detector.batches == batches and [len(p.boxes) for p in found] == [2, 3, 0]


def test_images_are_seen_upright(tmp_path, detector):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    picture(240, 180, BOXES[:1]).save(tmp_path / 'turned.png', exif=exif)
    found, = predict(detector, [tmp_path / 'turned.png'], threshold=0.)
    assert found.size == (180, 240)
    np.testing.assert_allclose(found.boxes, [(110, 10, 160, 60)], atol=2.1)


def test_pictures_and_json_are_written(folder, tmp_path, detector):
    found = predict(detector, [folder], tmp_path / 'drawn', tmp_path / 'boxes.json', threshold=0.)
    assert sorted(p.relative_to(tmp_path / 'drawn').as_posix() for p in (tmp_path / 'drawn').rglob('*.*')) == [
        'a.png', 'more/b.jpg', 'none.png']
    rows = json.loads((tmp_path / 'boxes.json').read_text())
    assert rows == coco_results(found, detector.class_names) and len(rows) == 5
    assert [row['image_id'] for row in rows] == [1, 1, 2, 2, 2]
    assert rows[0] == dict(
        image_id=1, file_name=str(folder / 'a.png'), category_id=2, category='green', score=pytest.approx(0.6),
        bbox=pytest.approx([100, 20, 60, 70], abs=4.2))
    assert list(rows[0]) == ['image_id', 'file_name', 'category_id', 'category', 'bbox', 'score']
    drawn, plain = (np.asarray(Image.open(p).convert('RGB')) for p in (
        tmp_path / 'drawn' / 'a.png', folder / 'a.png'))
    assert drawn.shape == plain.shape and (drawn != plain).any()
    empty, same = (np.asarray(Image.open(p).convert('RGB')) for p in (
        tmp_path / 'drawn' / 'none.png', folder / 'none.png'))
    assert (empty == same).all()


def test_other_formats_are_drawn_as_png(tmp_path, detector):
    picture(240, 180, BOXES).save(tmp_path / 'a.bmp')
    predict(detector, [tmp_path / 'a.bmp'], tmp_path / 'drawn')
    assert [path.name for path in (tmp_path / 'drawn').iterdir()] == ['a.bmp.png']
    assert Image.open(tmp_path / 'drawn' / 'a.bmp.png').format == 'PNG'


def test_files_that_cannot_be_read_are_named_and_skipped(folder, tmp_path, detector, caplog):
    (folder / 'broken.png').write_bytes(b'\x89PNG')
    with caplog.at_level(logging.WARNING):
        found = predict(
            detector, [folder, tmp_path / 'missing.png'], tmp_path / 'drawn', tmp_path / 'boxes.json', threshold=0.)
    assert [bool(p.reason) for p in found] == [False, True, False, False, True]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and 'broken.png cannot be read' in lines[0] and 'There is no image' in lines[1]
    assert not (tmp_path / 'drawn' / 'broken.png').exists()
    assert {row['image_id'] for row in json.loads((tmp_path / 'boxes.json').read_text())} == {1, 3}


def test_nothing_to_read_is_an_error(tmp_path, detector):
    with pytest.raises(PSTError, match='No images are named'):
        predict(detector, [])
    with pytest.raises(PSTError, match=r'Not one of 1 image\(s\) could be read, such as .*missing.png'):
        predict(detector, [tmp_path / 'missing.png'], json=tmp_path / 'boxes.json')
    assert not (tmp_path / 'boxes.json').exists() and not detector.batches
    (tmp_path / 'empty').mkdir()
    with pytest.raises(PSTError, match='has no images'):
        predict(detector, [tmp_path / 'empty'])


def test_files_that_are_there_stay(folder, tmp_path, detector):
    (tmp_path / 'boxes.json').write_text('mine')
    with pytest.raises(PSTError, match=r'boxes\.json is there already.*--overwrite'):
        predict(detector, [folder], json=tmp_path / 'boxes.json')
    (tmp_path / 'drawn').mkdir()
    (tmp_path / 'drawn' / 'none.png').write_text('mine')
    with pytest.raises(PSTError, match=r'none\.png is there already'):
        predict(detector, [folder], tmp_path / 'drawn')
    assert not detector.batches, 'told before the work'
    assert sorted(path.name for path in (tmp_path / 'drawn').rglob('*.*')) == ['none.png']
    predict(detector, [folder], tmp_path / 'drawn', tmp_path / 'boxes.json', overwrite=True)
    assert (tmp_path / 'boxes.json').read_text() != 'mine' and Image.open(tmp_path / 'drawn' / 'none.png').size


def test_images_are_never_drawn_upon(folder, detector):
    before = (folder / 'a.png').read_bytes()
    for overwrite in (False, True):
        with pytest.raises(PSTError, match=r'is what is read: name another file'):
            predict(detector, [folder], folder, overwrite=overwrite)
    assert (folder / 'a.png').read_bytes() == before


def test_two_images_of_one_name_are_told(folder, tmp_path, detector):
    (tmp_path / 'other').mkdir()
    picture(20, 20).save(tmp_path / 'other' / 'a.png')
    with pytest.raises(PSTError, match=r'images/a\.png and .*other/a\.png would both be drawn as'):
        predict(detector, [folder, tmp_path / 'other'], tmp_path / 'drawn')
    assert not (tmp_path / 'drawn').exists()
    assert len(predict(detector, [folder, tmp_path / 'other'])) == 4, 'nothing against it without pictures'


@pytest.mark.parametrize('output, words', [
    ('nowhere/drawn', 'there is no folder'),
    ('images/a.png', 'is no folder'),
])
def test_folders_that_cannot_be(folder, tmp_path, detector, output, words):
    with pytest.raises(PSTError, match=words):
        predict(detector, [folder], tmp_path / output)


@pytest.mark.parametrize('settings, words', [
    (dict(threshold=1.5), 'threshold of the scores is 1.5'),
    (dict(threshold=float('nan')), 'threshold of the scores is nan'),
    (dict(batch_size=0), 'batch size is 0'),
])
def test_settings_that_cannot_be(folder, detector, settings, words):
    with pytest.raises(PSTError, match=words):
        predict(detector, [folder], **settings)


def test_a_source_is_opened_with_its_settings(folder, detector, monkeypatch):
    asked = []
    module = ModuleType('pst_timm.detection.checkpoint')
    module.open_detector = lambda source, **settings: asked.append((source, settings)) or detector
    monkeypatch.setitem(sys.modules, module.__name__, module)
    predict('run', [folder], topk=8, device='cpu')
    assert asked == [('run', dict(topk=8, device='cpu'))]


def test_boxes_are_found_without_a_file_being_written(folder, detector):
    found = list(find(detector, [str(folder / 'a.png'), str(folder / 'no.png')], show=False))
    assert found[0][1].size == (240, 180) and found[1][1] is None and 'There is no image' in found[1][0].reason


NAMES = ('cat', 'dog', 'a very long name that no box has room for')


def drawn(boxes, scores, size=(200, 150), labels=None, names=NAMES):
    labels = labels or [i % 3 for i in range(len(boxes))]
    return np.asarray(draw_boxes(Image.new('RGB', size, (90, 90, 90)), np.array(boxes), labels, scores, names))


def test_the_edges_of_a_box_are_the_outermost_pixels_in_it():
    pixels = drawn([(50, 60, 101, 121)], None)
    color = np.array(class_colors(3)[0])
    is_edge = (pixels == color).all(axis=2)
    assert is_edge[90].nonzero()[0].tolist() == [50, 100] and is_edge[:, 75][70:].nonzero()[0].tolist() == [50]
    assert is_edge[120, 50:101].all() and not is_edge[122:].any()


def test_a_higher_score_is_drawn_over_a_lower_one():
    colors = [np.array(color) for color in class_colors(3)]
    for scores, top in (((.9, .2), 0), ((.2, .9), 1)):
        pixels = drawn([(50, 60, 100, 120)] * 2, scores, labels=[0, 1])
        assert (pixels[119, 75] == colors[top]).all()


@pytest.mark.parametrize('box', [
    (-50, -50, 500, 500), (0, 0, 1, 1), (199, 149, 200, 150), (0, 0, 200, 3), (5, 5, 5, 5), (300, 300, 400, 400)])
@pytest.mark.parametrize('size', [(200, 150), (12, 9), (1, 1)])
def test_boxes_and_names_stay_in_the_image(box, size):
    pixels = drawn([box] * 3, [.1, .2, .3], size)
    assert pixels.shape == (size[1], size[0], 3) and (pixels != 90).any()


def test_names_of_others_do_no_harm():
    pixels = drawn([(20, 40, 80, 90)], [.5], names=('a\nb\x1b[31m\u202e' + 'é漢' * 50,))
    assert (pixels != 90).any()
    assert drawn([], [], names=()).shape == (150, 200, 3)


def test_text_grows_with_the_image():
    def ground(side):
        pixels = drawn([(side // 4, side // 2, side - 2, side - 2)], [.5], (side, side))
        return (pixels[:side // 2 - 2] != 90).any(axis=(1, 2)).sum()

    assert ground(1200) > 2.5 * ground(300) > 0


def test_every_class_has_a_colour_of_its_own():
    colors = class_colors(90)
    assert len(set(colors)) == 90 and all(0 <= value <= 255 for color in colors for value in color)
    assert class_colors(2) == class_colors(90)[:2]


def test_results_of_an_unread_image_are_none():
    assert coco_results([Prediction('a.png', reason='broken')], ['cat']) == []
