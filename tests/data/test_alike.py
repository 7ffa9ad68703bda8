"""One image is one input and one label, whoever reads it; and all say the same of classes that do not fit."""
import io
import json
import os
import shutil
import signal
import tarfile
from argparse import Namespace

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from PIL import EpsImagePlugin, Image
from timm.data import resolve_data_config

from pst_timm.checkpoints import load_model, read_checkpoint
from pst_timm.data import on_device
from pst_timm.data.datasets import CheckedImageDataset, check_class_names, class_names, create_eval_dataset
from pst_timm.data.images import open_image
from pst_timm.data.loaders import create_eval_loader, create_train_data, open_train_splits
from pst_timm.deploy import export
from pst_timm.engine import train, train_args, validate, validate_args
from pst_timm.study.cell import open_split
from pst_timm.utils.errors import PSTError
from pst_timm.visualize.view import look
from tests.engine.helpers import tiny_image, tiny_train_args, tiny_validate_args, write_images

SIDE = 48


def odd_images():
    """Images of every kind, by the class they are of, each with what a person sees (SIDE, SIDE, 3)."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    grey = pixels[..., 0]
    colour, half = Image.fromarray(pixels), np.where(np.arange(SIDE) < SIDE // 2, 0, 255).astype(np.uint8)
    alpha = np.broadcast_to(half, (SIDE, SIDE))
    on_white = np.where(alpha[..., None] > 0, pixels, 255).astype(np.uint8)
    grey_on_white = np.where(alpha > 0, grey, 255).astype(np.uint8)
    palette = Image.fromarray((grey // 128).astype(np.uint8), 'P')
    palette.putpalette([10, 200, 30, 250, 90, 0])
    turned = Image.Exif()
    turned[274] = 6
    cmyk = colour.convert('CMYK')

    def rgb(array):
        return np.repeat(array[..., None], 3, axis=2)

    return {
        'grey16': (Image.fromarray(grey.astype(np.uint16) * 257), {}, rgb(grey)),
        'grey': (Image.fromarray(grey), {}, rgb(grey)),
        'rgba': (Image.fromarray(np.dstack([pixels, alpha])), {}, on_white),
        'la': (Image.fromarray(np.dstack([grey, alpha])), {}, rgb(grey_on_white)),
        'palette': (palette, dict(transparency=0), np.where(
            (grey < 128)[..., None], 255, np.array([250, 90, 0])).astype(np.uint8)),
        'cmyk': (cmyk, dict(ending='tif'), np.asarray(cmyk.convert('RGB'))),
        'turned': (colour, dict(exif=turned), np.rot90(pixels, -1)),
    }


@pytest.fixture(scope='module')
def odd(tmp_path_factory):
    """A folder of odd images, one in each class and split, and what a person sees by class."""
    root, seen = tmp_path_factory.mktemp('odd'), {}
    for name, (image, options, expected) in odd_images().items():
        options = dict(options)
        ending = options.pop('ending', 'png')
        for split in ('train', 'validation'):
            (root / split / name).mkdir(parents=True)
            image.save(root / split / name / f'0.{ending}', **options)
        seen[name] = expected
    return root, seen


FLAT = dict(input_key='.png;.tif', img_size=SIDE, crop_pct=1.0, device='cpu', workers=0, mean=[0.] * 3, std=[1.] * 3)


def by_class(images, labels, names):
    """Levels of 255 of each image, by the name of its label."""
    return {
        names[int(label)]: np.round(np.asarray(image, dtype=np.float64) * 255).astype(np.uint8).transpose(1, 2, 0)
        for image, label in zip(images, labels)}


def loaded(loader, names):
    batches = list(loader)
    return by_class(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]), names)


def resolved(args):
    args = Namespace(**dict(vars(args), rank=0, world_size=1, distributed=False, in_chans=3, num_classes=7))
    return args, resolve_data_config(vars(args), model=timm.create_model('test_resnet_pst'))


def read_by_training(root, **values):
    args, config = resolved(train_args(
        data_dir=str(root), no_aug=True, batch_size=1, opt='sgd', lr=0.1, **FLAT, **values))
    splits = open_train_splits(args, 3)
    data = create_train_data(args, splits, config, torch.float32)
    names = class_names(splits.train)
    found = loaded(data.train, names)
    for name, pixels in loaded(data.evaluation, names).items():
        np.testing.assert_array_equal(pixels, found[name])
    return found


def read_by_validation(root, **values):
    args, config = resolved(validate_args(data_dir=str(root), **FLAT, **values))
    dataset = create_eval_dataset(args, 'validation', None)
    return loaded(create_eval_loader(args, dataset, config, 3, torch.float32), class_names(dataset))


def read_by_the_study(root):
    _, dataset = open_split(dict(data_dir=str(root), **FLAT), 'validation')
    samples = [dataset[i] for i in range(len(dataset))]
    return {class_names(dataset)[label]: np.asarray(image) for image, label in samples}


def read_by_visualize(root):
    model = timm.create_model('test_resnet_pst', num_classes=7).eval()
    model.pretrained_cfg.update(mean=(0.,) * 3, std=(1.,) * 3, crop_pct=1., label_names=None)
    paths = sorted((root / 'validation').rglob('0.*'))
    return {path.parent.name: np.round(look(model, path, 2, img_size=SIDE).pixels * 255) for path in paths}


def read_by_export(root):
    config = dict(
        resolve_data_config({}, model=timm.create_model('test_resnet_pst')), mean=(0.,) * 3, std=(1.,) * 3, crop_pct=1.)
    paths = sorted((root / 'validation').rglob('0.*'))
    names = [path.parent.name for path in paths]
    return by_class(export._inputs(len(paths), (SIDE, SIDE), config, paths), range(len(names)), names)


@pytest.mark.parametrize('read', [
    read_by_training, lambda root: read_by_training(root, data_on_device=True), read_by_validation,
    lambda root: read_by_validation(root, data_on_device=True),
    lambda root: read_by_validation(root, no_prefetcher=True),
    read_by_the_study, read_by_visualize, read_by_export,
], ids=['train', 'train on device', 'validate', 'validate on device', 'no prefetcher', 'study', 'visualize', 'export'])
def test_an_image_is_one_input_and_one_label_to_all(odd, read):
    root, seen = odd
    found = read(root)
    assert found.keys() == seen.keys()
    for name, expected in seen.items():
        np.testing.assert_array_equal(found[name], expected, err_msg=name)


def test_streams_read_alike(odd, tmp_path):
    pytest.importorskip('webdataset')
    root, seen = odd
    names = sorted(set(seen) - {'cmyk'})
    with tarfile.open(tmp_path / 'validation-0.tar', 'w') as tar:
        for label, name in enumerate(names):
            for ending, content in (
                    ('png', (root / 'validation' / name / '0.png').read_bytes()), ('cls', str(label).encode())):
                info = tarfile.TarInfo(f'{name}.{ending}')
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    entry = dict(name='validation', num_samples=len(names), filenames=['validation-0.tar'], shard_lengths=[len(names)])
    (tmp_path / '_info.json').write_text(json.dumps(dict(splits=dict(validation=entry))))
    dataset = create_eval_dataset(validate_args(data_dir=str(tmp_path), dataset='wds/'), 'validation', None)
    found = {names[label]: np.asarray(image) for image, label in dataset}
    assert found.keys() == set(names)
    for name in names:
        np.testing.assert_array_equal(found[name], seen[name], err_msg=name)


@pytest.mark.parametrize('kind', ['folder', 'wds/'])
def test_no_program_is_started_to_read_a_data_set(tmp_path, monkeypatch, kind):
    """Pillow gives PostScript to Ghostscript, whatever the file is called."""
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin' / 'gs').write_text(f'#!/bin/sh\ntouch {tmp_path}/mark\n')
    (tmp_path / 'bin' / 'gs').chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path / 'bin'), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, 'gs_binary', None)
    data = io.BytesIO()
    tiny_image(0, 0).save(data, 'EPS')
    if kind == 'folder':
        (tmp_path / 'validation' / 'cat').mkdir(parents=True)
        (tmp_path / 'validation' / 'cat' / '0.png').write_bytes(data.getvalue())
    else:
        pytest.importorskip('webdataset')
        with tarfile.open(tmp_path / 'validation-0.tar', 'w') as tar:
            for ending, content in (('png', data.getvalue()), ('cls', b'0')):
                info = tarfile.TarInfo(f'0.{ending}')
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        entry = dict(name='validation', num_samples=1, filenames=['validation-0.tar'], shard_lengths=[1])
        (tmp_path / '_info.json').write_text(json.dumps(dict(splits=dict(validation=entry))))
    dataset = create_eval_dataset(
        validate_args(data_dir=str(tmp_path), dataset=kind.replace('folder', ''), max_bad_share=1.), 'validation', None)
    if kind == 'folder':
        with pytest.raises(PSTError, match='Not one of the images'):
            dataset[0]
    else:
        assert not list(dataset)
    assert not (tmp_path / 'mark').exists()


def test_grey_models_read_alike_too(odd):
    root, _ = odd
    dataset = create_eval_dataset(
        validate_args(data_dir=str(root), in_chans=1, input_key='.png;.tif'), 'validation', None)
    names = class_names(dataset)
    for i in range(len(dataset)):
        image, label = dataset[i]
        expected = open_image(dataset.filename(i, absolute=True), 'L')
        assert image.mode == 'L'
        np.testing.assert_array_equal(image, expected, err_msg=names[label])


# classes


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Data whose classes sort alike but for leading zeros and case, and a run over it."""
    data = write_images(tmp_path_factory.mktemp('trained') / 'data', {'train': 4, 'validation': 3})
    for split in ('train', 'validation'):
        for i, name in enumerate(('cat', '1', 'Cat')):
            (data / split / f'class{i}').rename(data / split / name)
        shutil.copytree(data / split / '1', data / split / '01')
    result = train(tiny_train_args(data, data.parent, num_classes=4, epochs=1))
    return data, result.best_checkpoint


def test_checkpoints_record_the_names_in_the_order_of_the_labels(trained):
    data, checkpoint = trained
    assert read_checkpoint(checkpoint).pretrained_cfg['label_names'] == ['01', '1', 'Cat', 'cat']
    [results] = validate(tiny_validate_args(data, checkpoint=str(checkpoint), num_classes=None))
    assert 0 <= results['top1'] <= 100
    # the same names are drawn beside the outputs
    shown = look(load_model(checkpoint), next((data / 'validation' / 'cat').iterdir()), 2)
    assert shown.class_names == ['01', '1', 'Cat', 'cat']


def with_names(checkpoint, path, names):
    """A copy of a checkpoint that knows its classes by other names, or in another order."""
    content = torch.load(checkpoint, weights_only=False)
    content['facts']['pretrained_cfg']['label_names'] = names
    torch.save(content, path)
    return str(path)


@pytest.mark.parametrize('names,message', [
    (['1', '01', 'Cat', 'cat'], "another order: class 0 is '01' in the former, '1' in the latter"),
    (['01', '1', 'Cat', 'dog'], r'different classes: the former lacks dog and alone has cat\. .*--class-map'),
])
def test_validation_refuses_other_names_and_another_order(trained, tmp_path, names, message):
    data, checkpoint = trained
    other = with_names(checkpoint, tmp_path / 'other.pth.tar', names)
    values = dict(checkpoint=other, num_classes=None)
    with pytest.raises(PSTError, match=message):
        validate(tiny_validate_args(data, **values))
    (tmp_path / 'map.txt').write_text('\n'.join('cat' if name == 'dog' else name for name in names))
    assert validate(tiny_validate_args(data, class_map=str(tmp_path / 'map.txt'), **values))


def test_a_class_without_a_validation_folder_is_an_error_unless_it_is_mapped(trained, tmp_path, caplog):
    data, checkpoint = trained
    shutil.copytree(data, tmp_path / 'data')
    shutil.rmtree(tmp_path / 'data' / 'validation' / '1')
    values = dict(checkpoint=str(checkpoint), num_classes=None)
    with pytest.raises(PSTError, match=r"The 'validation' split and the 'train' split .* the former lacks 1. Labels"):
        train(tiny_train_args(tmp_path / 'data', tmp_path, num_classes=4))
    with pytest.raises(PSTError, match=r"The 'validation' split and .* the former lacks 1\. "):
        validate(tiny_validate_args(tmp_path / 'data', **values))
    (tmp_path / 'map.txt').write_text('01\n1\nCat\ncat\n')
    (tmp_path / 'labels.txt').write_text('0\n2\n3\n')
    class_map = dict(class_map=str(tmp_path / 'map.txt'))
    [mapped] = validate(tiny_validate_args(tmp_path / 'data', **values, **class_map))
    assert '1 class(es) of --class-map that have no images here (1)' in caplog.text
    [chosen] = validate(tiny_validate_args(tmp_path / 'data', **values, valid_labels=str(tmp_path / 'labels.txt')))
    assert chosen['top1'] >= mapped['top1']
    assert train(tiny_train_args(tmp_path / 'data', tmp_path, num_classes=4, epochs=1, **class_map)).history
    (tmp_path / 'labels.txt').write_text('0\n1\n2\n')
    with pytest.raises(PSTError, match='the former lacks 1 and alone has cat'):
        validate(tiny_validate_args(tmp_path / 'data', **values, valid_labels=str(tmp_path / 'labels.txt')))


def test_models_that_know_no_names_take_any(images, tmp_path, caplog):
    """As when an ImageNet model is measured on ImageNet-V2, whose folders are called 0 to 999."""
    torch.save(dict(state_dict=timm.create_model('test_resnet_pst', num_classes=3).state_dict()), tmp_path / 'x.pth')
    assert validate(tiny_validate_args(images, checkpoint=str(tmp_path / 'x.pth'), num_classes=None))
    ten = write_images(tmp_path / 'ten', {'validation': 1}, classes=10)
    torch.save(dict(state_dict=timm.create_model('test_resnet_pst', num_classes=10).state_dict()), tmp_path / 'y.pth')
    assert validate(tiny_validate_args(ten, checkpoint=str(tmp_path / 'y.pth'), num_classes=None))
    # and the weights in the package know theirs
    with pytest.raises(PSTError, match=r'lacks 0, 1, 2 and 7 more and alone has class0, .*--class-map'):
        validate(tiny_validate_args(ten, num_classes=None))


def test_class_names_are_compared_wherever_both_are_known():
    check_class_names(['a', 'b'], ('a', 'b'), 'this', 'that')
    for unknown in (None, []):
        check_class_names(unknown, ['a'], 'this', 'that')
        check_class_names(['a'], unknown, 'this', 'that')
    for found, message in (
            (['b', 'a'], "This and that have the same classes in another order: class 0 is 'b' in the former, 'a'"),
            (['a'], 'different classes: the former lacks b. '), (['a', 'b', 'c'], 'the former alone has c. '),
            ([f'x{i}' for i in range(9)], 'lacks a, b and alone has x0, x1, x2 and 6 more. ')):
        with pytest.raises(PSTError, match=message):
            check_class_names(found, ['a', 'b'], 'this', 'that')


# unreadable images


def test_more_than_a_hundredth_unreadable_is_an_error_in_both(trained, tmp_path, caplog):
    data, checkpoint = trained
    shutil.copytree(data, tmp_path / 'data')
    bad = tmp_path / 'data' / 'validation' / 'Cat' / '1.png'
    bad.write_bytes(b'no image')
    values = dict(checkpoint=str(checkpoint), num_classes=None)
    with pytest.raises(PSTError, match=r'1 image could not be read, more than the share of 0.01 .*Cat/1.png'):
        validate(tiny_validate_args(tmp_path / 'data', **values))
    with pytest.raises(PSTError, match=r'share of 0.01 of --max-bad-share \(8.3% of 12\)'):
        train(tiny_train_args(tmp_path / 'data', tmp_path, num_classes=4))
    caplog.clear()
    [results] = validate(tiny_validate_args(tmp_path / 'data', **values, max_bad_share=0.1))
    assert results['unreadable_images'] == 1
    assert caplog.text.count(str(bad)) == 1


def test_images_that_lie_about_their_size_are_unreadable(images, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    dataset = create_eval_dataset(validate_args(data_dir=str(images)), 'validation', None)
    with pytest.raises(PSTError, match='1 image could not be read'):
        dataset[0]


def test_broken_members_of_a_tar_file_are_unreadable(tmp_path):
    with tarfile.open(tmp_path / 'x.tar', 'w') as tar:
        for n in range(150):
            data = io.BytesIO()
            tiny_image(n % 3, n, 8).save(data, 'PNG')
            content = data.getvalue() if n != 75 else b'x' * data.tell()
            info = tarfile.TarInfo(f'class{n % 3}/{n:03d}.png')
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    dataset = create_eval_dataset(validate_args(data_dir=str(tmp_path / 'x.tar')), 'validation', None)
    assert len([dataset[i] for i in range(150)]) == 150 and dataset.bad_images.count == 1


# workers and memory


def test_a_killed_loader_worker_is_one_sentence(trained, tmp_path, monkeypatch):
    data, checkpoint = trained
    monkeypatch.setattr(CheckedImageDataset, '__getitem__', lambda self, index: os.kill(os.getpid(), signal.SIGKILL))
    message = r'A process that loads images has ended \(DataLoader worker .*fewer --workers'
    with pytest.raises(PSTError, match=message) as e:
        train(tiny_train_args(data, tmp_path, workers=1, num_classes=4))
    assert '\n' not in str(e.value)
    with pytest.raises(PSTError, match=message):
        validate(tiny_validate_args(data, workers=1, checkpoint=str(checkpoint), num_classes=None))


@pytest.mark.parametrize('values,message', [
    (dict(stored_size=1_000_000), r'48 training images of 3x1000000x1000000 bytes need 144,000.00 GB'),
    (dict(no_aug=True, img_size=1_000_000), r'48 training images of 3x1000000x1000000 bytes'),
    (dict(img_size=1_000_000), r'18 validation images of 3x1000000x1000000 bytes'),
    # each of the two would fit
    (dict(stored_size=1000, img_size=1000, free=220e6), r'18 validation .* need 0.05 GB beside 0.14 GB of others'),
])
def test_what_cannot_fit_on_the_device_is_known_before_it_is_read(images, tmp_path, monkeypatch, values, message):
    values = dict(values)
    monkeypatch.setattr(on_device, 'store', None)  # nothing is read
    if free := values.pop('free', None):
        monkeypatch.setattr(on_device, 'free_memory', lambda device: free)
    args, config = resolved(tiny_train_args(images, tmp_path, data_on_device=True, **values))
    args.num_classes = 3
    with pytest.raises(PSTError, match=f'--data-on-device: {message}'):
        create_train_data(args, open_train_splits(args, 3), config, torch.float32)


def test_several_processes_draw_by_the_seed_and_do_not_average_views(images, tmp_path):
    orders = []
    dist.init_process_group('gloo', (tmp_path / 'meet').as_uri(), rank=0, world_size=1)
    try:
        for seed in (1, 1, 2):
            args, config = resolved(tiny_train_args(images, tmp_path, seed=seed))
            args.distributed, args.num_classes = True, 3
            data = create_train_data(args, open_train_splits(args, 3), config, torch.float32)
            orders.append(list(data.train.sampler))
    finally:
        dist.destroy_process_group()
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])
    args.tta = 2
    with pytest.raises(PSTError, match='--tta 2 needs all copies of an image in one process'):
        open_train_splits(args, 3)
