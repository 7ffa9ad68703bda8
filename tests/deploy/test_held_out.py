"""Images that are set aside are in one part alone, the same ones each time, and a share of every class."""
import os
from collections import Counter
from pathlib import Path

import pytest

from pst_timm.deploy.held_out import HELD, REST, set_aside
from pst_timm.utils.errors import PSTError
from tests.engine.helpers import write_images


def files(folder):
    """What the links of a split lead to, by class."""
    return {(path.parent.name, os.path.realpath(path)) for path in folder.rglob('*') if path.is_symlink()}


def test_every_image_is_in_one_part_and_every_class_in_both(images, tmp_path):
    place = set_aside(str(images), 'train', tmp_path, 0.25)
    rest, held = files(place / REST), files(place / HELD)
    whole = {(path.parent.name, os.path.realpath(path)) for path in (images / 'train').rglob('*.png')}
    assert not rest & held and rest | held == whole
    assert Counter(name for name, _ in held) == {f'class{i}': 4 for i in range(3)}  # of 16
    assert set_aside(str(images), 'train', tmp_path, 0.25) == place
    others = {set_aside(str(images), 'train', tmp_path, *more) for more in ((0.5,), (0.25, 1))}
    assert len(others - {place}) == 2, 'another draw is another folder'


def test_names_of_files_do_not_matter(tmp_path):
    data = write_images(tmp_path / 'data', {'train': 4})
    odd = data / 'train' / 'class0' / 'a b\udce9 \n.png'
    Path(data / 'train' / 'class0' / '0.png').rename(odd)
    place = set_aside(str(data), 'train', tmp_path, 0.5)
    assert ('class0', os.path.realpath(odd)) in files(place)


def test_what_cannot_be_set_aside_is_said(tmp_path, images):
    data = write_images(tmp_path / 'data', {'train': 1})
    with pytest.raises(PSTError, match=r"'class0' has 1 images .* too few to set some aside"):
        set_aside(str(data), 'train', tmp_path)
    with pytest.raises(PSTError, match='no \'nothing\' split'):
        set_aside(str(images), 'nothing', tmp_path)
    with pytest.raises(PSTError, match=r'0\.4 of the images cannot be set aside.* choose 0\.5'):
        set_aside(str(images), 'train', tmp_path, 0.4)
    (tmp_path / 'file').write_text('')
    with pytest.raises(PSTError, match='Cannot write to'):
        set_aside(str(images), 'train', tmp_path / 'file')
