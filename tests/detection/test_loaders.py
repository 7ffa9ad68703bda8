"""Loaders give lists, every image once where it matters, and the same order and draws for the same seed."""
from argparse import Namespace
from itertools import chain

import pytest
import torch

from pst_timm.data.loaders import checked_batches, report_bad_images
from pst_timm.detection.datasets import open_boxes
from pst_timm.detection.loaders import create_box_loaders, create_eval_box_loader
from pst_timm.engine.seeding import seeded_batches
from pst_timm.utils.errors import PSTError

from .box_data import annotation, coco, picture, write_coco

COUNT = 11


def arguments(**changes):
    return Namespace(**dict(dict(
        img_size=32, hflip=0.5, scale_jitter=[0.6, 1.6], box_crop=0.5, color_jitter=0.3, no_aug=False, batch_size=4,
        validation_batch_size=None, workers=0, pin_mem=False, max_bad_images=100, max_bad_share=1., distributed=False,
        world_size=1, rank=0, seed=5, train_split='train'), **changes))


@pytest.fixture
def root(tmp_path):
    boxes = [annotation(i, i + 1, 1 + i % 2, (4, 4, 20, 16)) for i in range(COUNT) if i != 3]
    write_coco(tmp_path, coco(images=COUNT, annotations=boxes))
    for i in range(COUNT):
        picture(40, 30, [(4, 4, 24, 20)]).save(tmp_path / 'train' / f'{i}.png')
    return tmp_path


def loaders(root, **changes):
    return create_box_loaders(arguments(**changes), open_boxes(root, 'train'), open_boxes(root, 'train'))


def ids(batches):
    return [target['image_id'] for _, targets in batches for target in targets]


def test_batches_are_lists_and_training_has_whole_ones_alone(root):
    train, evaluation, mixup = loaders(root)
    assert mixup is None and len(train) == 2 and len(evaluation) == 3
    for images, targets in train:
        assert isinstance(images, list) and isinstance(targets, list) and len(images) == len(targets) == 4
        assert all(max(image.shape) == 32 and image.dtype == torch.float32 for image in images)
    assert ids(evaluation) == list(range(1, COUNT + 1)), 'in order, all of them'
    assert [len(images) for images, _ in evaluation] == [4, 4, 3]
    assert {tuple(image.shape) for images, _ in evaluation for image in images} == {(3, 24, 32)}


def test_the_validation_batch_may_have_another_size(root):
    assert [len(images) for images, _ in loaders(root, validation_batch_size=6).evaluation] == [6, 5]


def test_without_augmentation_training_sees_what_evaluation_sees(root):
    train, evaluation, _ = loaders(root, no_aug=True, color_jitter=0.9)
    seen = {t['image_id']: image for images, targets in evaluation for image, t in zip(images, targets)}
    for images, targets in train:
        for image, target in zip(images, targets):
            assert image.equal(seen[target['image_id']])


def test_training_has_another_order_and_other_draws_in_every_epoch(root):
    train, _, _ = loaders(root)
    first, second = (list(seeded_batches(train, 5, 0, epoch)) for epoch in (0, 1))
    assert ids(first) != ids(second) and ids(first) != sorted(ids(first))
    assert len(set(ids(first))) == 8


@pytest.mark.parametrize('workers', [0, 2])
def test_the_same_epoch_is_bitwise_the_same_whatever_was_drawn_before(root, workers):
    train, _, _ = loaders(root, workers=workers)
    first = list(seeded_batches(train, 5, 0, 3))
    torch.manual_seed(99)
    again = seeded_batches(loaders(root, workers=workers).train, 5, 0, 3)
    next(again)  # and a resumed epoch goes on in the middle, after other draws of the model
    torch.rand(7)
    (images, targets), (others, other_targets) = first[1], next(again)
    for a, b in zip(images, others, strict=True):
        assert a.equal(b)
    for a, b in zip(targets, other_targets, strict=True):
        assert a['boxes'].equal(b['boxes']) and a['labels'].equal(b['labels']) and a['image_id'] == b['image_id']
    other, _ = list(seeded_batches(train, 6, 0, 3))[1]
    assert not all(a.shape == b.shape and a.equal(b) for a, b in zip(images, other))


@pytest.mark.parametrize('world_size', [2, 3])
def test_processes_share_the_images(root, world_size):
    parts = [loaders(root, distributed=True, world_size=world_size, rank=rank, batch_size=2)
             for rank in range(world_size)]
    evaluated = [ids(part.evaluation) for part in parts]
    assert sorted(chain(*evaluated)) == list(range(1, COUNT + 1)), 'no image twice, none left out'
    epochs = []
    for epoch in (0, 1):
        for part in parts:
            part.train.sampler.set_epoch(epoch)
        epochs.append([ids(part.train) for part in parts])
        assert len({len(part.train) for part in parts}) == 1, 'all processes take as many steps'
        # the sampler fills up what is not enough for all with images that others have
        assert len(set(chain(*epochs[-1]))) >= sum(map(len, epochs[-1])) - world_size + 1
    assert epochs[0] != epochs[1]
    seeds = [ids(loaders(root, distributed=True, world_size=2, rank=0, seed=seed).train) for seed in (1, 2)]
    assert seeds[0] != seeds[1]


def test_damaged_images_are_replaced_in_training_and_left_out_of_evaluation(root):
    for name in '0', '1':
        path = root / 'train' / f'{name}.png'
        path.write_bytes(path.read_bytes()[:50])
    train, evaluation, _ = loaders(root, batch_size=2, validation_batch_size=2)
    assert all(len(images) == 2 for images, _ in train) and not {1, 2} & set(ids(train))
    batches = list(checked_batches(evaluation))
    assert ids(batches) == list(range(3, COUNT + 1)) and all(images for images, _ in batches)
    report_bad_images(evaluation)
    evaluation.dataset.bad_images.limit = 1
    with pytest.raises(PSTError, match=r'2 images could not be read, more than the 1 of --max.*0\.png cannot'):
        report_bad_images(evaluation)


def test_limits_are_those_of_the_flags(root):
    (root / 'train' / '0.png').write_bytes(b'')
    _, evaluation, _ = loaders(root, max_bad_images=0)
    with pytest.raises(PSTError, match='more than the 0 of --max-bad-images'):
        list(evaluation)
    assert len(list(loaders(root, max_bad_images=1).evaluation)) == 3


# torch takes five seconds to end a worker that has raised
@pytest.mark.parametrize('workers', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_too_many_damaged_images_end_with_a_sentence(root, workers):
    for i in range(COUNT):
        (root / 'train' / f'{i}.png').write_bytes(b'')
    _, evaluation, _ = loaders(root, workers=workers, max_bad_images=2)
    with pytest.raises(PSTError, match=r'images? could not be read, more than the 2 of --max-bad-images') as error:
        list(checked_batches(evaluation))
    assert 'Traceback' not in str(error.value)


def test_fewer_images_than_a_batch_are_an_error(root):
    with pytest.raises(PSTError, match="'train' split has fewer images than one batch of 12 in each of 1 process"):
        loaders(root, batch_size=12)
    with pytest.raises(PSTError, match='in each of 3 process'):
        loaders(root, batch_size=5, distributed=True, world_size=3)
    few = open_boxes(root, 'train')
    with pytest.raises(PSTError, match=r'11 image.* too few for 12 processes'):
        create_eval_box_loader(arguments(world_size=12), few, 1, distributed=True)


def test_a_run_without_evaluation(root):
    assert create_box_loaders(arguments(), open_boxes(root, 'train'), None).evaluation is None
