"""Data that are not what they should be: each is one sentence, before anything was written or waited for."""
import importlib.util
import io
import os
import pickle
import struct
import tarfile
import zlib
from functools import partial

from PIL import Image

from pst_timm.cli import main
from tests.commands.bad_inputs import BadInput, parametrize, refused
from tests.engine.helpers import tiny_image

MODEL = ['--model', 'test_resnet_pst', '--img-size', '48', '--device', 'cpu', '--workers', '0', '--batch-size', '2']


def train(*words):
    return ['train', *MODEL, '--epochs', '1', '--output', 'out', '--data-dir', 'data', *words]


def validate(*words):
    """With the weights in the package, which know the classes 0 to 9."""
    return ['validate', *MODEL, '--pretrained', '--data-dir', 'data', *words]


def visualize(source):
    return ['visualize', source, '--model', 'test_resnet_pst', '--output', 'figure.png']


def data(folder, train=('cat', 'dog'), validation=('cat', 'dog'), ending='.png'):
    """An image folder with two images in each class."""
    for split, names in (('train', train), ('validation', validation)):
        (folder / 'data' / split).mkdir(parents=True)
        for label, name in enumerate(names):
            (folder / 'data' / split / name).mkdir()
            for n in range(2):
                tiny_image(label % 3, n).save(folder / 'data' / split / name / f'{n}{ending}')
    return folder / 'data'


def digits(folder, names=tuple('0123456789')):
    return data(folder, (), names)


def data_and(name, content, folder, **kwargs):
    """Data, and a file beside or in them."""
    data(folder, **kwargs)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def digits_and(name, text, folder, names=tuple('0123456789')):
    digits(folder, names)
    (folder / name).write_text(text)


def file(name, content=b'x'):
    def make(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return make


def bomb():
    """A small PNG that claims to be of 60,000 by 60,000 pixels."""
    def chunk(kind, content):
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
    header = struct.pack('>IIBBBBB', 60_000, 60_000, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')


def tar_of(*names):
    image = io.BytesIO()
    tiny_image(0, 0).save(image, 'PNG')
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode='w') as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = image.tell()
            tar.addfile(info, io.BytesIO(image.getvalue()))
    return content.getvalue()


TAR = tar_of(*(f'{name}/{n}.png' for name in ('cat', 'dog') for n in range(2)))


def loose(folder):
    for split in ('train', 'validation'):
        (folder / 'data' / split).mkdir(parents=True)
        tiny_image(0, 0).save(folder / 'data' / split / '0.png')


def moved(source, target, folder):
    data(folder)
    (folder / 'data' / source).rename(folder / 'data' / target)


def fifos(folder):
    (folder / 'data' / 'train' / 'cat').mkdir(parents=True)
    os.mkfifo(folder / 'data' / 'train' / 'cat' / '0.png')


def circles(folder):
    (folder / 'data' / 'train' / 'cat').mkdir(parents=True)
    (folder / 'data' / 'train' / 'cat' / 'again').symlink_to('..')


def of_two_sizes(folder):
    data(folder)
    Image.new('RGB', (20, 30)).save(folder / 'data' / 'train' / 'dog' / '1.png')


def devices(folder):
    (folder / 'photos').mkdir()
    (folder / 'photos' / 'zero.png').symlink_to('/dev/zero')


class Code:
    """What writes a file when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ('owned',)


def with_map(content, name='map.txt'):
    return partial(data_and, name, content)


TABLE = [
    # where the data should be
    BadInput('no data', train()[:-2], '--data-dir'),
    BadInput('missing folder', train(), 'There is no data'),
    BadInput('a text for a folder', train(), 'data is neither a folder nor a .tar file', file('data')),
    BadInput('a compressed tar', train('--data-dir', 'x.tar.gz'), 'x.tar.gz', file('x.tar.gz', TAR)),
    BadInput('empty folder', train('--train-split', 'trai'), "data has no 'trai' split", lambda f: (
        f / 'data').mkdir()),
    BadInput('no images at all', train(), 'Found 0 images', lambda f: (f / 'data').mkdir()),
    BadInput('no images in the split', train(), 'Found 0 images', partial(data, train=())),
    BadInput('no class folders', train(), 'has no class folders', loose),
    BadInput('one class', train(), 'one class alone (cat)', partial(data, train=('cat',))),
    BadInput('only another format', train(), '.webp', partial(data, ending='.webp')),
    BadInput('only FIFOs', train('--val-split', ''), 'train/cat/0.png', fifos),
    BadInput('only a circle', train('--val-split', ''), 'train/cat/again', circles),
    # splits
    BadInput('empty train split', train('--train-split', ''), 'No split is named', data),
    BadInput('unknown train split', train('--train-split', 'trian'), "no 'trian' split; it has train", data),
    BadInput('missing train split', train(), "no 'train' split; it has learn", partial(moved, 'train', 'learn')),
    BadInput('missing val split', train('--val-split', 'test'), "no 'test' split", data),
    BadInput('a part of a split', train('--train-split', 'train[:50%]'), "'train[:50%]'", data),
    BadInput('a file for a split', train(), 'data/train is not a folder', file('data/train')),
    # classes of the splits
    BadInput('class without validation', train(), 'lacks dog', partial(data, validation=('cat',))),
    BadInput('renamed validation class', train(), 'dogs', partial(data, validation=('cat', 'dogs'))),
    BadInput('validation class never trained', train(), 'alone has owl', partial(
        data, validation=('cat', 'dog', 'owl'))),
    BadInput('other number of classes', train('--num-classes', '7'), '--num-classes 2', data),
    # images
    BadInput('unreadable image', train('--num-classes', '2'), 'cat/1.png', partial(
        data_and, 'data/train/cat/1.png', b'no image')),
    BadInput('more than the count', train('--max-bad-images', '0', '--max-bad-share', '1'), '--max-bad-images', partial(
        data_and, 'data/train/cat/1.png', b'')),
    BadInput('nothing readable', train('--max-bad-share', '1', '--val-split', '', '--num-classes', '2'),
             'Not one of the images', lambda f: [
                 file(f'data/train/{c}/{n}.png')(f) for c in ('cat', 'dog') for n in range(2)]),
    BadInput('decompression bomb', train('--num-classes', '2'), 'cat/1.png', partial(
        data_and, 'data/train/cat/1.png', bomb())),
    BadInput('share out of range', train('--max-bad-share', '2'), '--max-bad-share', data),
    BadInput('unknown image mode', train('--input-img-mode', 'RGBX'), 'RGBX', data),
    BadInput('mode of other channels', train('--input-img-mode', 'L'), '--input-img-mode', data),
    BadInput('channels no image has', train('--in-chans', '7'), '7 channel', data),
    # class maps
    BadInput('missing class map', train('--class-map', 'map.txt'), '--class-map map.txt', data),
    BadInput('class map of another kind', train('--class-map', 'map.json'), '--class-map map.json', with_map(
        '{"cat": 0}', 'map.json')),
    BadInput('empty class map', train('--class-map', 'map.txt'), 'is empty', with_map('')),
    BadInput('class twice', train('--class-map', 'map.txt'), "line 3 names 'cat'", with_map('cat\ndog\ncat\n')),
    BadInput('line without a class', train('--class-map', 'map.txt'), 'line 2', with_map('cat\n\ndog\n')),
    BadInput('binary class map', train('--class-map', 'map.txt'), '--class-map map.txt', with_map(b'\xff\xfe\0\0')),
    BadInput('classes not in the data', train('--class-map', 'map.txt'), "'cow 0'", with_map('cow 0\nowl 1\n')),
    BadInput('negative index', train('--class-map', 'map.pkl'), "'-1'", with_map(
        pickle.dumps(dict(cat=-1, dog=0)), 'map.pkl')),
    BadInput('index that is no number', train('--class-map', 'map.pkl'), "'one'", with_map(
        pickle.dumps(dict(cat='one', dog=0)), 'map.pkl')),
    BadInput('index beyond the outputs', train('--num-classes', '2', '--class-map', 'map.pkl'), '1000000', with_map(
        pickle.dumps(dict(cat=1_000_000, dog=0)), 'map.pkl')),
    BadInput('class map with code', train('--class-map', 'map.pkl'), '--class-map map.pkl', with_map(
        pickle.dumps(Code()), 'map.pkl')),
    # archives
    BadInput('broken tar', train('--data-dir', 'x.tar', '--val-split', ''), 'x.tar', file('x.tar', b'no tar' * 999)),
    BadInput('empty tar', train('--data-dir', 'x.tar', '--val-split', ''), 'x.tar', file('x.tar', b'')),
    BadInput('cut tar', train('--data-dir', 'x.tar', '--val-split', ''), 'not a whole .tar', file('x.tar', TAR[:9000])),
    BadInput('tar cut between images', train('--data-dir', 'x.tar', '--val-split', ''), 'not a whole .tar', file(
        'x.tar', TAR[:2 * (512 + 3072)])),
    BadInput('tar without images', train('--data-dir', 'x.tar', '--val-split', ''), 'Found 0 images', file(
        'x.tar', tar_of('cat/notes.txt'))),
    BadInput('tar without folders', train('--data-dir', 'x.tar', '--val-split', ''), 'has no class folders', file(
        'x.tar', tar_of('0.png', '../1.png'))),
    # datasets by name
    BadInput('name without a kind', train('--dataset', 'cifar10'), 'torch/cifar10', data),
    BadInput('unknown kind', train('--dataset', 'hdfs/beans'), 'hfds', data),
    BadInput('unknown torch dataset', train('--dataset', 'torch/beans'), 'torch/beans', data),
    BadInput('torch dataset without a folder', [*train()[:-2], '--dataset', 'torch/mnist'],
             'torch/mnist: name its folder with --data-dir'),
    BadInput('torch dataset that is not there', train('--dataset', 'torch/cifar10'), '--dataset-download', data),
    BadInput('class map of a torch dataset', train('--dataset', 'torch/cifar10', '--class-map', 'map.txt'),
             '--class-map map.txt', with_map('cat\n')),
    BadInput('shards without a list', train('--dataset', 'wds/'), 'wds/', data),
    BadInput('shards with a damaged list', train('--dataset', 'wds/'), 'wds/', partial(
        data_and, 'data/_info.json', '{"splits": {"train": {}}}')),
    BadInput('samples of a folder', train('--train-num-samples', '7'), '7', data),
    BadInput('absurd samples', train('--train-num-samples', '9' * 30), '--train-num-samples', data),
    BadInput('key of a label in a folder', train('--target-key', 'label'), '--target-key label', data),
    # the device
    BadInput('stored size beyond memory', train(
        '--data-on-device', '--stored-size', '1000000', '--color-jitter', '0', '--num-classes', '2'),
        '--stored-size', data),
    BadInput('images of two sizes', train('--data-on-device', '--color-jitter', '0', '--num-classes', '2'),
             '--stored-size 32', of_two_sizes),
    # validation
    BadInput('validate without a split', validate('--split', ''), 'No split is named', digits),
    BadInput('validate an unknown split', validate('--split', 'tset'), "no 'tset' split", digits),
    BadInput('validate other classes', validate(), 'alone has nine', partial(
        digits, names=(*'012345678', 'nine'))),
    BadInput('validate some of the classes', validate(), 'lacks 9', partial(digits, names=tuple('012345678'))),
    BadInput('validate mapped to other places', validate('--class-map', 'map.txt'), "gives '1' the index 0", partial(
        digits_and, 'map.txt', '1\n0\n2\n')),
    BadInput('validate unreadable images', validate(), 'validation/5/1.png', lambda f: (
        digits(f), (f / 'data/validation/5/1.png').write_bytes(b'no image'))),
    BadInput('validate a broken tar', validate('--data-dir', 'x.tar'), 'x.tar', file('x.tar', b'no tar' * 999)),
    BadInput('validate beyond memory', validate('--data-on-device', '--img-size', '1000000'), '1000000', digits),
    # pictures
    BadInput('visualize nothing', visualize('photo.jpg'), 'photo.jpg'),
    BadInput('visualize a FIFO', visualize('x.png'), 'x.png', lambda f: os.mkfifo(f / 'x.png')),
    BadInput('visualize no image', visualize('x.png'), 'x.png', file('x.png', b'no image')),
    BadInput('visualize a bomb', visualize('x.png'), 'x.png', file('x.png', bomb())),
    BadInput('visualize a folder of devices', visualize('photos'), 'photos has no images', devices),
]
if importlib.util.find_spec('datasets') is None:
    TABLE.append(BadInput('missing package', train('--dataset', 'hfds/beans'), 'pip install datasets', data))


@parametrize(TABLE)
def test_bad_data_are_refused(row, tmp_path, monkeypatch, capfd):
    refused(row, tmp_path, monkeypatch, capfd)
    assert not (tmp_path / 'owned').exists()


def test_the_table_is_long():
    assert len(TABLE) >= 35


def test_the_commands_of_the_table_are_well_but_for_the_data(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    digits(tmp_path)
    assert main(validate()) == 0, capfd.readouterr().err
    (tmp_path / 'data').rename(tmp_path / 'digits')
    data(tmp_path)
    assert main(train('--num-classes', '2')) == 0, capfd.readouterr().err
