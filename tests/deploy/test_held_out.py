"""Images that are set aside are in one part alone, the same ones each time, and a share of every class."""
import os
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from timm.data import create_transform, resolve_data_config

from pst_timm.data.images import open_image
from pst_timm.deploy.held_out import HELD, REST, set_aside, training_batches
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
    (tmp_path / 'file').write_text('')
    with pytest.raises(PSTError, match='Cannot write to'):
        set_aside(str(images), 'train', tmp_path / 'file')


def test_batches_are_images_as_the_model_sees_them(images):
    config = resolve_data_config({}, model=timm.create_model('test_resnet_pst'))
    found = training_batches(str(images), 'train', config, 18, batch_size=8)
    assert [len(labels) for _, labels in found] == [8, 8, 2]
    transform = create_transform(**config)
    known = {
        label: [transform(open_image(path, 'RGB')) for path in (images / 'train' / f'class{label}').iterdir()]
        for label in range(3)}
    for batch, labels in found:
        for image, label in zip(batch, labels.tolist()):
            assert any(torch.equal(image, other) for other in known[label])
    assert len({label for _, labels in found for label in labels.tolist()}) == 3, 'drawn from all'
    again, other = (training_batches(str(images), 'train', config, 18, 32, seed=seed)[0][0] for seed in (0, 1))
    assert torch.equal(again, torch.cat([batch for batch, _ in found])) and not torch.equal(again, other)
