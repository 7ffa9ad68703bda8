"""Data of every kind, and what is said when it is not right."""
import io
import json
import tarfile

import pytest
from PIL import Image

from pst_timm.engine import train, validate
from pst_timm.utils.errors import PSTError
from tests.engine.helpers import tiny_image, tiny_train_args, tiny_validate_args, write_images


def write_tar(path, count):
    """A .tar of class folders, as timm reads it."""
    with tarfile.open(path, 'w') as tar:
        for label in range(3):
            for n in range(count):
                data = io.BytesIO()
                tiny_image(label, n).save(data, 'PNG')
                info = tarfile.TarInfo(f'class{label}/{n}.png')
                info.size = data.tell()
                tar.addfile(info, io.BytesIO(data.getvalue()))


def write_shards(folder, split, shards, per_shard):
    """WebDataset shards; returns their entry in _info.json."""
    names = []
    for shard in range(shards):
        names.append(f'{split}-{shard}.tar')
        with tarfile.open(folder / names[-1], 'w') as tar:
            for n in range(per_shard):
                label = n % 3
                data = io.BytesIO()
                tiny_image(label, 100 * shard + n).save(data, 'PNG')
                for ext, content in (('png', data.getvalue()), ('cls', str(label).encode())):
                    info = tarfile.TarInfo(f'{shard}_{n}.{ext}')
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return dict(
        name=split, num_samples=shards * per_shard, filenames=names, shard_lengths=[per_shard] * shards)


def test_tar_files_train(tmp_path):
    (tmp_path / 'data').mkdir()
    write_tar(tmp_path / 'data' / 'train.tar', 8)
    result = train(tiny_train_args(tmp_path / 'data' / 'train.tar', tmp_path, val_split='', epochs=4))
    losses = [row['loss'] for row in result.history]
    assert losses[-1] < losses[0]
    assert result.best_metric is None and result.best_checkpoint.name == 'last.pth.tar'
    [results] = validate(tiny_validate_args(
        tmp_path / 'data' / 'train.tar', checkpoint=str(result.best_checkpoint)))
    assert results['top1'] > 34


@pytest.mark.parametrize('workers', [0, 1])
def test_webdataset_shards_train(tmp_path, workers):
    pytest.importorskip('webdataset')
    data = tmp_path / 'data'
    data.mkdir()
    splits = {'train': write_shards(data, 'train', 2, 12), 'validation': write_shards(data, 'validation', 1, 9)}
    (data / '_info.json').write_text(json.dumps(dict(splits=splits)))
    result = train(tiny_train_args(data, tmp_path, dataset='wds/', workers=workers, epochs=3))
    assert len(result.history) == 3 and 'eval_top1' in result.history[0]
    assert result.history[-1]['loss'] < result.history[0]['loss']
    again = train(tiny_train_args(data, tmp_path / 'again', dataset='wds/', workers=workers, epochs=3))
    assert again.history == result.history


@pytest.mark.parametrize('flags', [
    dict(sampler='balanced'), dict(hard_examples='weights.csv'), dict(logit_adjust=1.),
    dict(rare_aa='rand-m5', rare_below=3)], ids=lambda flags: next(iter(flags)))
def test_shards_do_not_tell_their_labels_beforehand(tmp_path, flags):
    pytest.importorskip('webdataset')
    splits = {'train': write_shards(tmp_path, 'train', 1, 12)}
    (tmp_path / '_info.json').write_text(json.dumps(dict(splits=splits)))
    args = tiny_train_args(tmp_path, tmp_path / 'runs', dataset='wds/', val_split='', **flags)
    with pytest.raises(PSTError, match=rf'^--{next(iter(flags)).replace("_", "-")} .* needs the labels') as e:
        train(args)
    assert len(str(e.value).splitlines()) == 1 and not (tmp_path / 'runs').exists()


def test_shards_that_are_missing_or_empty_are_no_epoch(tmp_path):
    """timm's reader logs the error and goes on: to the end of an epoch without an image."""
    pytest.importorskip('webdataset')
    data = tmp_path / 'data'
    data.mkdir()
    splits = {'train': write_shards(data, 'train', 2, 12)}
    (data / '_info.json').write_text(json.dumps(dict(splits=splits)))
    (data / 'train-1.tar').unlink()
    args = tiny_train_args(data, tmp_path, dataset='wds/', val_split='', epochs=1)
    with pytest.raises(PSTError, match=r'1 of 2 shards are not there: .*train-1.tar'):
        train(args)
    for n in range(2):
        (data / f'train-{n}.tar').write_bytes(b'no shard')
    with pytest.raises(PSTError, match='Not one batch of images could be read'):
        train(args)


@pytest.mark.parametrize('values,message', [
    (dict(data_dir=None), r'No data given.*--data-dir'),
    (dict(data_dir='/nowhere/at/all'), r'There is no /nowhere/at/all'),
    (dict(num_classes=5), r'3 classes .* 5 outputs: use --num-classes 3'),
    (dict(num_classes=2), r'use --num-classes 3'),
    (dict(val_split='test'), r"has no 'test' split; it has train, validation"),
    (dict(batch_size=64), r'fewer images than one batch of 64'),
    (dict(mixup=0.5, batch_size=7), r'even --batch-size'),
    (dict(aug_repeats=3.), r'torchrun'),
    (dict(dataset='torch/no_such_set'), r'Cannot open'),
    (dict(target_key='label'), r'Cannot open'),
])
def test_wrong_data_is_an_error_at_the_start(images, tmp_path, values, message):
    with pytest.raises(PSTError, match=message):
        train(tiny_train_args(images, tmp_path, **values))
    assert not (tmp_path / 'run').exists()


def test_validation_on_the_training_images_is_said(images, tmp_path, caplog):
    train(tiny_train_args(images / 'train', tmp_path, epochs=1))
    assert 'Training and validation read the same images' in caplog.text


def test_empty_splits_and_shifted_classes_are_errors(tmp_path):
    data = write_images(tmp_path / 'empty', {'train': 8, 'validation': 0})
    with pytest.raises(PSTError, match='Found 0 images'):
        train(tiny_train_args(data, tmp_path))
    data = write_images(tmp_path / 'shifted', {'train': 8, 'validation': 2})
    (data / 'validation' / 'class0').rename(data / 'validation' / 'class9')
    with pytest.raises(PSTError, match=r'different classes: .* lacks class0 and alone has class9'):
        train(tiny_train_args(data, tmp_path))


@pytest.fixture
def broken(tmp_path):
    """Images of which a text, an empty file and a truncated image are no images."""
    data = write_images(tmp_path / 'data', {'train': 16, 'validation': 6})
    (data / 'train' / 'class0' / '3.png').write_text('not an image')
    (data / 'train' / 'class1' / '4.png').write_bytes(b'')
    path = data / 'train' / 'class2' / '5.png'
    path.write_bytes(path.read_bytes()[:300])
    return data


@pytest.mark.parametrize('workers', [0, 2])
def test_broken_images_are_named_counted_and_skipped(broken, tmp_path, caplog, workers):
    result = train(tiny_train_args(broken, tmp_path, workers=workers, epochs=2, max_bad_share=0.1))
    assert len(result.history) == 2
    assert '(3 so far)' in caplog.text
    for name in ('class0/3.png', 'class1/4.png', 'class2/5.png'):
        assert caplog.text.count(name) == 1


@pytest.mark.parametrize('workers', [0, 2])
def test_too_many_broken_images_end_the_run(broken, tmp_path, workers):
    with pytest.raises(PSTError) as e:
        train(tiny_train_args(broken, tmp_path, workers=workers, max_bad_images=2, max_bad_share=1.))
    assert '3 images could not be read, more than the 2 of --max-bad-images' in str(e.value)
    assert 'class0/3.png' in str(e.value) and 'Traceback' not in str(e.value)


def test_grey_images_and_one_channel(images, tmp_path):
    result = train(tiny_train_args(images, tmp_path, in_chans=1, mean=[0.5], std=[0.5], epochs=1))
    assert 'eval_top1' in result.history[0]
    with Image.open(images / 'train' / 'class0' / '0.png') as image:
        assert image.mode == 'RGB'


def test_a_model_that_does_not_exist_is_named_with_its_neighbours(images, tmp_path):
    with pytest.raises(PSTError, match=r"Unknown model 'resnet18pst'. Did you mean resnet18_pst"):
        train(tiny_train_args(images, tmp_path, model='resnet18pst'))
    with pytest.raises(PSTError, match=r'Cannot create test_resnet_pst: .*topk must be'):
        train(tiny_train_args(images, tmp_path, model_kwargs=dict(topk=-1)))
    with pytest.raises(PSTError, match=r"unknown optimizer 'adamv'. Did you mean adam"):
        train(tiny_train_args(images, tmp_path, opt='adamv'))
    with pytest.raises(PSTError, match='cosine'):
        train(tiny_train_args(images, tmp_path, sched='cosin'))
