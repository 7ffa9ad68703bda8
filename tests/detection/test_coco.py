"""COCO's files: what is read, what is mended and told, and what is refused by file and entry."""
import json
import logging
import math

import numpy as np
import pytest

from pst_timm.detection.datasets import open_boxes
from pst_timm.utils.errors import PSTError

from .box_data import annotation, coco, picture, write_coco


def opened(root, *args, **kwargs):
    return open_boxes(root, *(args or ('train',)), **kwargs)


def test_boxes_classes_and_files_are_those_of_the_file(tmp_path):
    content = coco(images=3, annotations=[
        annotation(7, 2, 2, (1.5, 2.5, 10, 20), area=55.5),
        annotation(9, 1, 1, (0, 0, 40, 30)),
        annotation(8, 2, 1, (30, 20, 10, 10), iscrowd=1),
    ])
    dataset = opened(write_coco(tmp_path, content))
    known = dataset.annotations
    assert dataset.class_names == ['cat', 'dog'] and len(dataset) == 3
    assert [dataset.name(i) for i in range(3)] == ['0.png', '1.png', '2.png']
    assert known.image_ids == [1, 2, 3] and known.category_ids == [1, 2]
    assert known.boxes[known.of(0)].tolist() == [[0, 0, 40, 30]]
    assert known.boxes[known.of(1)].tolist() == [[1.5, 2.5, 11.5, 22.5], [30, 20, 40, 30]]
    assert known.labels[known.of(1)].tolist() == [1, 0]
    assert known.areas[known.of(1)].tolist() == [55.5, 100]
    assert known.crowd[known.of(1)].tolist() == [False, True] and not known.difficult.any()
    assert known.boxes[known.of(2)].shape == (0, 4)


def test_a_sample_has_what_the_contract_says(tmp_path):
    content = coco(annotations=[annotation(1, 1, 2, (2, 3, 10, 8), area=60)])
    dataset = opened(write_coco(tmp_path, content))
    image, target = dataset[0]
    assert image.shape == (3, 30, 40) and str(image.dtype) == 'torch.uint8'
    assert image[:, 3, 2].tolist() == [230, 20, 20] and image[:, 2, 2].tolist() == [90, 90, 90]
    assert image[:, 10, 11].tolist() == [230, 20, 20] and image[:, 11, 11].tolist() == [90, 90, 90]
    assert target['boxes'].tolist() == [[2, 3, 12, 11]] and str(target['boxes'].dtype) == 'torch.float32'
    assert target['boxes'].canvas_size == (30, 40) == target['orig_size']
    assert target['labels'].tolist() == [1] and target['area'].tolist() == [60]
    assert target['iscrowd'].tolist() == [False] and target['image_id'] == 1
    _, empty = dataset[1]
    assert empty['boxes'].shape == (0, 4) and len(empty['labels']) == len(empty['area']) == len(empty['iscrowd']) == 0


def test_a_sample_may_be_changed_without_a_change_of_the_truth(tmp_path):
    dataset = opened(write_coco(tmp_path))
    before = dataset.annotations.boxes.copy()
    for key in ('boxes', 'labels', 'area', 'iscrowd'):
        dataset[0][1][key].fill_(1)
    assert (dataset.annotations.boxes == before).all() and dataset.annotations.labels.tolist() == [0, 1]
    assert not dataset.annotations.crowd.any()


def test_identifiers_may_have_holes_and_any_order(tmp_path):
    content = coco(categories=[dict(id=90, name='dog'), dict(id=4, name='cat')], annotations=[
        annotation(1, 1, 90), annotation(2, 2, 4)])
    content['images'][0]['id'], content['annotations'][0]['image_id'] = 397133, 397133
    known = opened(write_coco(tmp_path, content)).annotations
    assert known.class_names == ['cat', 'dog'] and known.category_ids == [4, 90]
    assert known.labels.tolist() == [1, 0] and known.image_ids == [397133, 2]


def test_classes_of_other_data_are_found_by_name(tmp_path):
    content = coco(categories=[dict(id=1, name='dog'), dict(id=2, name='cat'), dict(id=3, name='unused')])
    known = opened(write_coco(tmp_path, content), class_names=['bird', 'cat', 'dog']).annotations
    assert known.class_names == ['bird', 'cat', 'dog'] and known.labels.tolist() == [2, 1]
    assert known.category_ids == [4, 2, 1], 'bird gets a number that the file does not use'


@pytest.mark.parametrize('file, folder', [
    ('annotations/instances_train.json', 'train'),
    ('annotations/instances_train2017.json', 'train2017'),
    ('annotations/instances_train2017.json', 'images/train2017'),
    ('annotations/instances_train.json', 'images'),
    ('annotations/train.json', 'train'),
    ('train/_annotations.coco.json', 'train'),
    ('training/_annotations.coco.json', 'training'),
])
def test_layouts(tmp_path, file, folder):
    write_coco(tmp_path, file=tmp_path / file, folder=tmp_path / folder)
    dataset = opened(tmp_path)
    assert len(dataset) == 2 and dataset[1][0].shape == (3, 30, 40) and not dataset.bad_images.count


def test_captions_and_keypoints_are_no_boxes(tmp_path):
    write_coco(tmp_path)
    for name in ('captions_train', 'person_keypoints_train', 'captions_val'):
        (tmp_path / 'annotations' / f'{name}.json').write_text('{}')
    assert len(opened(tmp_path)) == 2
    with pytest.raises(PSTError, match="has no 'val' split; it has train"):
        opened(tmp_path, 'val')


@pytest.mark.parametrize('asked, there, found', [
    ('val', ('train', 'val2017'), 'val2017'),
    ('validation', ('train', 'valid'), 'valid'),
    ('train', ('train', 'train2017'), 'train'),
    ('val2017', ('val2014', 'val2017'), 'val2017'),
    ('test', ('train', 'test2017'), 'test2017'),
    ('val', ('val2014', 'val2017'), r"no 'val' split: val2014, val2017 could be meant; it has val2014, val2017"),
    ('val2014', ('train', 'val2017'), r"no 'val2014' split; it has train, val2017. Did you mean val2017\?"),
    ('test', ('train', 'val'), r"no 'test' split; it has train, val"),
    ('tain', ('train', 'val'), r'Did you mean train\?'),
    (' ', ('train',), 'No split is named'),
])
def test_names_of_splits(tmp_path, asked, there, found):
    for i, split in enumerate(there):
        write_coco(tmp_path, coco(images=i + 1), split=split)
    if found in there:
        assert len(opened(tmp_path, asked)) == there.index(found) + 1
    else:
        with pytest.raises(PSTError, match=found):
            opened(tmp_path, asked)


def changed(**changes):
    """A file whose first annotation is changed."""
    content = coco()
    content['annotations'][0].update(changes)
    return content


def with_image(**changes):
    content = coco()
    content['images'][0].update(changes)
    return content


def without(part, key):
    content = coco()
    del content[part][0][key]
    return content


BAD = {
    'nan': (changed(bbox=[1, math.nan, 3, 4]), r'json, annotation 1: the box .*nan.* is not four finite numbers'),
    'inf': (changed(bbox=[1, 2, math.inf, 4]), 'annotation 1: the box .*inf.* is not four finite numbers'),
    'huge': (changed(bbox=[1, 2, 1e300, 4]), 'annotation 1: .* not four finite numbers'),
    'three numbers': (changed(bbox=[1, 2, 3]), 'annotation 1: .* not four finite numbers'),
    'words': (changed(bbox=['1', '2', '3', '4']), 'annotation 1: .* not four finite numbers'),
    'truths': (changed(bbox=[True, 2, 3, 4]), 'annotation 1: .* not four finite numbers'),
    'no box': (without('annotations', 'bbox'), 'annotation 1: the box None is not four'),
    'unknown category': (changed(category_id=77), r'annotation 1: no category has its category_id 77; there are 1, 2'),
    'category as text': (changed(category_id='1'), "annotation 1: its category_id is '1'; expected a whole number"),
    'image as text': (changed(image_id='1'), "its image_id is '1'; expected a whole number"),
    'image as float': (changed(image_id=1.5), 'its image_id is 1.5; expected a whole number'),
    'image beyond all': (changed(image_id=10 ** 30), 'its image_id is 1000.*; expected a whole number'),
    'no image': (without('annotations', 'image_id'), 'its image_id is missing'),
    'crowd': (changed(iscrowd=2), 'annotation 1: iscrowd is 2; expected 0 or 1'),
    'area': (changed(area='large'), "annotation 1: its area is 'large'; expected a number"),
    'id of image': (with_image(id='x'), r"entry 0 of images: its id is 'x'; expected a whole number"),
    'images alike': (with_image(id=2), "entry 1 of images: its id 2 is that of '0.png' already"),
    'no file': (without('images', 'file_name'), 'entry 0 of images: its file_name is None; expected the name'),
    'file outside': (with_image(file_name='../0.png'), 'is not below the folder of the images'),
    'file hidden outside': (with_image(file_name='a/../../0.png'), 'is not below the folder of the images'),
    'absolute file': (with_image(file_name='/etc/0.png'), 'is not below the folder of the images'),
    'width': (with_image(width='40'), "entry 0 of images: its width is '40'; expected a whole number of pixels"),
    'negative height': (with_image(height=-30), 'its height is -30; expected a whole number of pixels'),
    'endless height': (with_image(height=math.inf), 'its height is inf'),
    'nan width': (with_image(width=math.nan), 'its width is nan'),
    'categories alike': (coco(categories=[dict(id=1, name='a'), dict(id=1, name='b')]), 'two categories have the id 1'),
    'names alike': (coco(categories=[dict(id=1, name='a'), dict(id=2, name='a')]), "has the class 'a' twice"),
    'a name of two lines': (coco(categories=[dict(id=1, name='cat'), dict(id=2, name='do\ng')]), 'that can be printed'),
    'an endless name': (coco(categories=[dict(id=1, name='cat'), dict(id=2, name='g' * 1001)]), 'at most 1000'),
    'no names': (coco(categories=[dict(id=1), dict(id=2)]), 'has the class None: expected a name'),
    'no categories': (coco(categories=[], annotations=[]), 'names no classes'),
    'no images at all': (coco(images=0), 'has no images'),
    'no boxes at all': (coco(annotations=[]), 'has 2 images and not one box'),
    'no list': (dict(images=[], annotations={}, categories=[]), 'has no list of annotations'),
    'nothing': ({}, 'has no list of images'),
    'a list': ([], 'is no file of COCO'),
    'entries': (dict(coco(), annotations=[3]), 'entry 0 of annotations is 3; expected an object'),
    'cut off': (json.dumps(coco())[:-40], r'is not whole JSON'),
    'empty': ('', 'is not whole JSON'),
    'binary': ('\0\1', 'is not whole JSON'),
    'deep': ('[' * 100_000, 'is not whole JSON .nested too deeply'),
}


@pytest.mark.parametrize('name', BAD)
def test_what_cannot_be_right_is_refused_by_file_and_entry(tmp_path, name):
    content, words = BAD[name]
    with pytest.raises(PSTError, match=words) as error:
        opened(write_coco(tmp_path, content))
    assert 'instances_train.json' in str(error.value) and '\n' not in str(error.value)


def test_boxes_of_unknown_classes_are_refused_with_a_hint(tmp_path):
    content = coco(categories=[dict(id=1, name='cat'), dict(id=2, name='dogs')])
    with pytest.raises(PSTError, match=r'boxes of dogs, which is not among the 2 known classes.*Did you mean dog\?'):
        opened(write_coco(tmp_path, content), class_names=['cat', 'dog'])


@pytest.mark.parametrize('bbox, expected, told', [
    ((-5, -5, 20, 20), [0, 0, 15, 15], '1 boxes that reach out of their image were cut off'),
    ((30, 20, 20, 20), [30, 20, 40, 30], '1 boxes that reach out of their image were cut off'),
    ((30.02, 20, 10, 10), [30.02, 20, 40, 30], ''),  # COCO's rounded numbers
    ((50, 5, 10, 10), None, '1 boxes wholly outside of their image were dropped'),
    ((-20, 5, 20, 10), None, '1 boxes wholly outside of their image were dropped'),
    ((5, 5, 0, 10), None, '1 empty or inverted boxes were dropped'),
    ((5, 5, 10, -3), None, '1 empty or inverted boxes were dropped'),
])
def test_boxes_that_are_slightly_wrong_are_mended_and_told(tmp_path, caplog, bbox, expected, told):
    content = coco(annotations=[annotation(11, 1, 1, bbox, area=9.), annotation(12, 2)])
    with caplog.at_level(logging.WARNING):
        known = opened(write_coco(tmp_path, content)).annotations
    np.testing.assert_allclose(known.boxes[known.of(0)], [expected] if expected else np.zeros((0, 4)))
    assert len(known.boxes[known.of(1)]) == 1
    if told:
        assert told in caplog.text and 'such as that of annotation 11' in caplog.text
    else:
        assert not caplog.text


def test_what_is_mended_is_told_once_for_each_kind(tmp_path, caplog):
    entries = [annotation(i, 1, 1, (35, 5, 10, 10)) for i in range(5)] + [
        annotation(i, 1, 1, (5, 5, 0, 0)) for i in range(5, 8)] + [annotation(9, 44)]
    with caplog.at_level(logging.WARNING):
        opened(write_coco(tmp_path, coco(annotations=entries)))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert any('5 boxes that reach out' in line for line in lines)
    assert any('3 empty or inverted boxes' in line for line in lines)
    assert any('1 boxes of images that the file does not have were dropped, such as that of annotation 9' in line
               for line in lines)
    caplog.clear()
    opened(tmp_path, show=False)
    assert not caplog.records


@pytest.mark.parametrize('area, expected', [(None, 80), (33.5, 33.5), (-1, 80), (math.nan, 80), (1e9, 80)])
def test_the_area_is_that_of_the_file_where_it_can_be(tmp_path, area, expected):
    content = coco(annotations=[annotation(1, area=area)])
    if area is None:
        del content['annotations'][0]['area']
    assert opened(write_coco(tmp_path, content)).annotations.areas.tolist() == [expected]


def test_sizes_that_the_file_does_not_tell_come_from_the_images(tmp_path, caplog):
    content = coco(annotations=[annotation(1, 1, 1, (30, 20, 50, 50)), annotation(2, 2)])
    for image in content['images']:
        del image['width'], image['height']
    dataset = opened(write_coco(tmp_path, content))
    assert dataset.annotations.boxes[0].tolist() == [30, 20, 40, 30] and 'reach out' in caplog.text
    assert dataset[0][1]['orig_size'] == (30, 40)


def test_masks_are_not_kept(tmp_path):
    content = coco(annotations=[annotation(1, segmentation=[[1, 2, 3, 4, 5, 6]])])
    assert opened(write_coco(tmp_path, content)).annotations.boxes.tolist() == [[2, 3, 12, 11]]


def test_a_folder_without_boxes_says_what_is_expected(tmp_path):
    picture(8, 8).save(tmp_path / 'a.png')
    with pytest.raises(PSTError, match=r'has no boxes as COCO or Pascal VOC have them; it has a.png'):
        opened(tmp_path)
    with pytest.raises(PSTError, match='There is no folder'):
        opened(tmp_path / 'nowhere')


def test_images_in_folders_of_the_split(tmp_path):
    content = with_image(file_name='deep/0.png')
    write_coco(tmp_path, content)
    (tmp_path / 'train' / 'deep').mkdir()
    (tmp_path / 'train' / '0.png').rename(tmp_path / 'train' / 'deep' / '0.png')
    dataset = opened(tmp_path)
    assert dataset.name(0) == 'deep/0.png' and not dataset.bad_images.count
    assert dataset[0][1]['image_id'] == 1


def test_no_images_at_all_are_an_error_when_the_data_is_opened(tmp_path):
    with pytest.raises(PSTError, match=r'Not one of the 2 images is in .*train, such as 0.png'):
        opened(write_coco(tmp_path, files=False))
    (tmp_path / 'train').rmdir()
    with pytest.raises(PSTError, match=r"Not one of the 2 images is in|The images of .* are not there"):
        opened(tmp_path)
