"""Pascal VOC's folders: where they may be, what the pixels mean, and what is refused."""
import logging
import re

import numpy as np
import pytest

from pst_timm.detection.datasets import open_boxes
from pst_timm.detection.voc import read_annotation
from pst_timm.utils.errors import PSTError

from .box_data import picture, voc_object, voc_xml, write_voc


def known_of(root, split='train', **kwargs):
    return open_boxes(root, split, **kwargs).annotations


def test_pixels_are_counted_from_1_and_the_last_one_is_part_of_the_box(tmp_path):
    whole = voc_object('cat', (1, 1, 40, 30))
    painted = voc_object('dog', (3, 4, 12, 11))
    dataset = open_boxes(write_voc(tmp_path, xml={'a': voc_xml([whole, painted])}), 'train')
    image, target = dataset[0]
    assert target['boxes'].tolist() == [[0, 0, 40, 30], [2, 3, 12, 11]]
    x1, y1, x2, y2 = target['boxes'][1].int().tolist()
    # the very pixels that were painted
    red = (image[0] > 150).nonzero()
    assert red.min(0).values.tolist() == [y1, x1] and (red.max(0).values + 1).tolist() == [y2, x2]
    assert target['labels'].tolist() == [0, 1] and dataset.class_names == ['cat', 'dog']


@pytest.mark.parametrize('corners, expected, told', [
    ((0, 0, 40, 30), [0, 0, 40, 30], ''),  # as tools that count from 0 write it: no pixel is outside
    ((5, 5, 5, 5), [4, 4, 5, 5], ''),  # one pixel
    ((0.5, 0.5, 12.5, 9), [0, 0, 12.5, 9], ''),
    ((5, 5, 41, 31), [4, 4, 40, 30], '1 boxes that reach out'),
    ((-3, 5, 10, 10), [0, 4, 10, 10], '1 boxes that reach out'),
    ((0, 0, 0, 0), None, '1 empty or inverted'),
    ((20, 5, 10, 10), None, '1 empty or inverted'),
    ((60, 5, 70, 10), None, '1 boxes wholly outside'),
])
def test_corners(tmp_path, caplog, corners, expected, told):
    root = write_voc(tmp_path, xml={'a': voc_xml([voc_object(corners=corners)])})
    with caplog.at_level(logging.WARNING):
        known = known_of(root)
    np.testing.assert_allclose(known.boxes[known.of(0)], [expected] if expected else np.zeros((0, 4)))
    if told:
        assert told in caplog.text and 'object 1 (cat) in a.xml' in caplog.text
    else:
        assert not caplog.text


def test_difficult_objects_are_trained_on_and_not_asked_for(tmp_path):
    objects = [voc_object('cat', (1, 1, 9, 9), 1), voc_object('cat', (3, 4, 12, 11), 0)]
    dataset = open_boxes(write_voc(tmp_path, xml={'a': voc_xml(objects)}), 'train')
    at = dataset.annotations.of(0)
    assert dataset.annotations.difficult[at].tolist() == [True, False] == dataset.annotations.ignored[at].tolist()
    assert not dataset.annotations.crowd.any()
    assert len(dataset[0][1]['boxes']) == 2 and not dataset[0][1]['iscrowd'].any()


def test_an_image_without_objects_is_kept(tmp_path):
    dataset = open_boxes(write_voc(tmp_path, xml={'a': voc_xml([])}), 'train')
    assert len(dataset) == 2 and dataset[0][1]['boxes'].shape == (0, 4)


@pytest.mark.parametrize('below', ['', 'BCCD', 'VOC2007', 'VOCdevkit/VOC2007'])
def test_the_folder_may_be_one_or_two_levels_below(tmp_path, below):
    write_voc(tmp_path / below)
    (tmp_path / 'other').mkdir()
    dataset = open_boxes(tmp_path, 'train')
    assert [dataset.name(i) for i in range(2)] == ['a.jpg', 'b.jpg'] and dataset[1][0].shape == (3, 30, 40)


def test_of_several_folders_one_has_to_be_named(tmp_path):
    for name in ('VOC2007', 'VOC2012'):
        write_voc(tmp_path / name)
    with pytest.raises(PSTError, match=r'several folders of Pascal VOC \(VOC2007, VOC2012\): name one'):
        open_boxes(tmp_path, 'train')
    assert len(open_boxes(tmp_path / 'VOC2012', 'train')) == 2


@pytest.mark.parametrize('asked, there, found', [
    ('validation', ('train', 'val'), 'val'),
    ('val', ('train', 'valid'), 'valid'),
    ('trainval', ('train', 'val', 'trainval'), 'trainval'),
    ('test', ('train', 'val'), r"has no 'test' split; it has train, val"),
    ('vall', ('train', 'val'), r"Did you mean val\?"),
])
def test_names_of_splits(tmp_path, asked, there, found):
    write_voc(tmp_path, {name: [f'{name}{i}' for i in range(n + 1)] for n, name in enumerate(there)})
    (tmp_path / 'ImageSets/Main/cat_train.txt').write_text('train0 1\n')  # of one class, for classification
    if found in there:
        assert len(open_boxes(tmp_path, asked)) == there.index(found) + 1
    else:
        with pytest.raises(PSTError, match=found) as error:
            open_boxes(tmp_path, asked)
        assert 'cat_train' not in str(error.value)


def test_classes_are_those_of_the_training_split_in_every_split(tmp_path):
    xml = {'a': voc_xml([voc_object('dog')]), 'b': voc_xml([voc_object('cat')]), 'c': voc_xml([voc_object('dog')])}
    root = write_voc(tmp_path, xml=xml)
    for split in ('train', 'val'):
        assert known_of(root, split).class_names == ['cat', 'dog']
    assert known_of(root, 'val').labels.tolist() == [1]
    assert known_of(root, 'val', class_names=['dog', 'cat']).labels.tolist() == [0]
    assert known_of(root, 'val').category_ids == [1, 2]


def test_a_class_that_training_does_not_know_is_an_error(tmp_path):
    root = write_voc(tmp_path, xml={'c': voc_xml([voc_object('catt')])})
    for names in (None, ['cat']):
        with pytest.raises(PSTError, match=r'val.txt has boxes of catt, which is not among .* Did you mean cat\?'):
            known_of(root, 'val', class_names=names)


def test_the_name_of_the_file_counts_not_what_the_xml_says(tmp_path):
    root = write_voc(tmp_path, xml={'a': voc_xml(name='C:\\photos\\other.jpeg'), 'b': voc_xml(name='../../etc/x.png')})
    dataset = open_boxes(root, 'train')
    assert [dataset.name(i) for i in range(2)] == ['a.jpg', 'b.jpg']
    (root / 'JPEGImages' / 'a.jpg').unlink()
    picture(40, 30).save(root / 'JPEGImages' / 'a.PNG')
    (root / 'JPEGImages' / 'b.jpg').unlink()
    dataset = open_boxes(root, 'train', max_bad_share=1.)
    assert dataset.name(0) == 'a.PNG' and dataset.name(1) == 'b.jpg', 'nothing outside of the folder is looked for'
    assert dataset.bad_images.count == 1


def test_sizes_of_0_come_from_the_image(tmp_path, caplog):
    root = write_voc(tmp_path, xml={'a': voc_xml([voc_object(corners=(5, 5, 99, 20))], width=0, height=0),
                                    'b': voc_xml().replace('<width>40</width>', '')})
    known = known_of(root)
    assert known.sizes.tolist() == [[40, 30], [40, 30]] and known.boxes[0].tolist() == [4, 4, 40, 20]


ENTITY = '<!DOCTYPE a [<!ENTITY b "cat">]>'
BOMB = '<!DOCTYPE a [<!ENTITY b "' + 'x' * 1000 + '">' + ''.join(
    f'<!ENTITY {c} "{f"&{d};" * 10}">' for c, d in zip('cdefghi', 'bcdefgh')) + ']>'
BAD = {
    'cut off': (voc_xml()[:-20], r'a\.xml is not whole XML'),
    'empty': ('', r'a\.xml is not whole XML'),
    'no xml': ('hello', r'a\.xml is not whole XML'),
    'binary': ('\0\0', r'a\.xml is not XML in UTF-8'),
    'another root': ('<html></html>', r'a\.xml is no annotation of Pascal VOC: its first element is <html>'),
    'entity': (ENTITY + voc_xml([voc_object('&b;')]), r'a\.xml declares a DOCTYPE or an ENTITY'),
    'bomb': (BOMB + voc_xml([voc_object('&i;')]), r'a\.xml declares a DOCTYPE or an ENTITY'),
    'file': ('<!doctype a [<!entity b SYSTEM "file:///etc/passwd">]>' + voc_xml([voc_object('&b;')]),
             r'a\.xml declares a DOCTYPE or an ENTITY'),
    'undeclared entity': (voc_xml([voc_object('&b;')]), r'a\.xml is not whole XML \(undefined entity'),
    'unknown encoding': ('<?xml version="1.0" encoding="nonsense"?>' + voc_xml(), r'a\.xml is not whole XML'),
    'no name': (voc_xml([voc_object(' ')]), r'a\.xml, object 1 has no name of a class'),
    'no corner': (voc_xml([voc_object().replace('xmax', 'xmix')]), r'object 1 \(cat\): its xmax is missing'),
    'nan': (voc_xml([voc_object(), voc_object(corners=(1, 2, 'nan', 4))]), r"object 2 \(cat\): its xmax is 'nan'"),
    'inf': (voc_xml([voc_object(corners=('-inf', 2, 3, 4))]), r"its xmin is '-inf'; expected a finite number"),
    'word': (voc_xml([voc_object(corners=('left', 2, 3, 4))]), "its xmin is 'left'"),
    'difficult': (voc_xml([voc_object(difficult='yes')]), "difficult is 'yes'; expected 0 or 1"),
    'width': (voc_xml(width='wide'), "the width of the image is 'wide'; expected a whole number"),
    'height': (voc_xml(height=-3), "the height of the image is '-3'"),
    'part of a pixel': (voc_xml(height=3.5), "the height of the image is '3.5'"),
    'nan height': (voc_xml(height='nan'), "the height of the image is 'nan'"),
}


@pytest.mark.parametrize('name', BAD)
def test_what_cannot_be_right_is_refused_by_file_and_object(tmp_path, name):
    content, words = BAD[name]
    with pytest.raises(PSTError, match=words) as error:
        known_of(write_voc(tmp_path, xml={'a': content}))
    assert '\n' not in str(error.value) and 'root:' not in str(error.value)


def test_xml_in_wide_letters_does_not_hide_an_entity(tmp_path):
    path = tmp_path / 'a.xml'
    path.write_bytes((ENTITY + voc_xml()).encode('utf-16'))
    with pytest.raises(PSTError, match='is not XML in UTF-8'):
        read_annotation(path)


def test_an_annotation_without_end_is_not_read(tmp_path):
    path = tmp_path / 'a.xml'
    path.write_bytes(b' ' * (17 << 20))
    with pytest.raises(PSTError, match='has more than 16 MiB'):
        read_annotation(path)


@pytest.mark.parametrize('lines, words', [
    ('', 'is empty'),
    ('a\na\n', "names 'a' twice"),
    ('a\nz\n', r'z\.xml is missing'),
    ('../a\n', r"has the line '\.\./a': expected the name of an image"),
    ('a/b\n', "has the line 'a/b'"),
    ('..\n', r"has the line '\.\.'"),
])
def test_lists_of_images(tmp_path, lines, words):
    root = write_voc(tmp_path)
    (root / 'ImageSets/Main/train.txt').write_text(lines)
    with pytest.raises(PSTError, match=words):
        known_of(root)


def test_a_missing_part_is_named(tmp_path):
    root = write_voc(tmp_path)
    for path in (root / 'ImageSets/Main').iterdir():
        path.unlink()
    with pytest.raises(PSTError, match=r'Main has no lists of images: expected train\.txt'):
        known_of(root)
    (root / 'ImageSets/Main').rmdir()
    (root / 'ImageSets').rmdir()
    with pytest.raises(PSTError, match=re.escape('lacks ImageSets: Pascal VOC has the folders')):
        known_of(root)


def test_a_split_without_one_object_is_an_error(tmp_path):
    with pytest.raises(PSTError, match='names no classes'):
        known_of(write_voc(tmp_path, xml={name: voc_xml([]) for name in 'abc'}))
    with pytest.raises(PSTError, match='has 1 images and not one box'):
        known_of(write_voc(tmp_path, xml={'c': voc_xml([])}), 'val')
