"""Labels follow from names alone, in every process; what is no image or no whole archive is said."""
import io
import os
import pickle
import tarfile

import pytest
from PIL import Image
from timm.utils import natural_key

from pst_timm.data.datasets import class_names, create_eval_dataset
from pst_timm.data.loaders import open_train_splits
from pst_timm.data.readers import FolderReader, TarReader, in_order, read_class_map
from pst_timm.engine import train_args, validate_args
from pst_timm.utils.errors import PSTError

# that timm's order cannot tell apart, so that at random all of them would be right once in a million times
ALIKE = [name for n in range(10) for name in (f'{n:02d}', f'{n}', f'Cat{n:02d}', f'cat{n}')]


def write_class(folder, name, count=1, ending='.png'):
    """A class folder with small images."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    for n in range(count):
        Image.new('RGB', (4, 4), (n, 0, 0)).save(folder / name / f'{n}{ending}')


def write_tar(path, members, end=True):
    """A .tar file of (name, bytes or None for a link) pairs; `end` is whether it is finished."""
    data = io.BytesIO()
    Image.new('RGB', (4, 4)).save(data, 'PNG')
    tar = tarfile.open(path, 'w')
    for name in members:
        info = tarfile.TarInfo(name.removeprefix('link:'))
        if name.startswith('link:'):
            info.type, info.linkname = tarfile.SYMTYPE, '/etc/passwd'
            tar.addfile(info)
        else:
            info.size = data.tell()
            tar.addfile(info, io.BytesIO(data.getvalue()))
    if end:
        tar.close()
    else:
        tar.fileobj.close()
    return path


def labelled(reader):
    """Pairs of a sample's folder and the name of its label."""
    names = {i: name for name, i in reader.class_to_idx.items()}
    return [(reader.filename(i).split('/')[-2], names[int(reader[i][1])]) for i in range(len(reader))]


def opened(data, **values):
    return create_eval_dataset(validate_args(data_dir=str(data), **values), values.get('split', 'validation'), None)


def test_classes_that_sort_alike_have_one_order_everywhere(tmp_path):
    for name in reversed(ALIKE):
        write_class(tmp_path / 'data', name)
    expected = sorted(ALIKE, key=lambda name: (natural_key(name), name))
    assert class_names(opened(tmp_path / 'data')) == expected
    write_tar(tmp_path / 'data.tar', [f'{name}/0.png' for name in reversed(ALIKE)])
    assert class_names(opened(tmp_path / 'data.tar')) == expected
    for reader in (FolderReader(tmp_path / 'data'), TarReader(tmp_path / 'data.tar')):
        pairs = labelled(reader)
        assert len(pairs) == len(ALIKE) and all(folder == name for folder, name in pairs)


def test_images_that_sort_alike_have_one_order_everywhere(tmp_path):
    """An interrupted epoch goes on with the same images, on whatever file system."""
    (tmp_path / 'one').mkdir()
    for name in ALIKE:
        (tmp_path / 'one' / f'{name}.png').touch()
    found = [os.path.basename(path) for path, _ in FolderReader(tmp_path).samples]
    assert found == sorted((f'{name}.png' for name in ALIKE), key=lambda name: (natural_key(name), name))


def test_the_order_is_timms_where_that_is_one():
    names = ['10', '9', 'b', 'B2', 'a10', 'a9', 'n01440764', 'class 3']
    assert in_order(names) == sorted(names, key=natural_key)


def test_names_that_timms_order_cannot_take(tmp_path):
    for name in ('1²3', 'm²', 'a'):
        write_class(tmp_path, name)
    assert class_names(opened(tmp_path)) == ['1²3', 'a', 'm²']


def test_names_that_are_no_text_are_recorded_as_one(tmp_path):
    write_class(tmp_path, 'a')
    (tmp_path / 'a').rename(os.fsdecode(os.fsencode(tmp_path) + b'/\xff'))
    write_class(tmp_path, 'b')
    assert class_names(opened(tmp_path)) == ['b', r'\udcff']


def test_names_that_a_tar_file_tells(tmp_path):
    write_tar(tmp_path / 'x.tar', ['./b/0.png', 'a/0.png', '/abs/c/0.png', '../d/0.png'])
    assert class_names(opened(tmp_path / 'x.tar')) == ['a', 'b', 'c', 'd']


def test_workers_do_not_share_the_position_in_a_tar_file(tmp_path):
    reader = TarReader(write_tar(tmp_path / 'x.tar', ['a/0.png', 'b/0.png']))
    reader[0][0].read()
    mine = reader.tar_state.tf
    child = os.fork()
    if child == 0:
        reader[1][0].read()
        os._exit(0 if reader.tar_state.tf is not mine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert reader[1][0].read() and reader.tar_state.tf is mine


@pytest.mark.parametrize('damage', ['cut', 'cut at a member', 'bad header', 'no tar', 'empty file'])
def test_a_tar_file_that_is_not_whole_is_an_error(tmp_path, damage):
    """Some of these end the reading of tarfile without a word, and images are missing."""
    path = write_tar(tmp_path / 'x.tar', [f'{name}/{n}.png' for name in 'ab' for n in range(9)])
    content = bytearray(path.read_bytes())
    if damage == 'cut':
        content = content[:len(content) // 2 - 700]
    elif damage == 'cut at a member':
        content = content[:1024 * 9]
    elif damage == 'bad header':
        content[1024 * 9:1024 * 9 + 100] = b'x' * 100
    else:
        content = b'no archive' * 100 if damage == 'no tar' else b''
    path.write_bytes(content)
    with pytest.raises(PSTError, match=r'x.tar is not a whole .tar file .*: fetch or pack it again'):
        opened(path)


def test_a_tar_file_without_images_is_an_error(tmp_path):
    with pytest.raises(PSTError, match=r'Found 0 images .* in .*x.tar'):
        opened(write_tar(tmp_path / 'x.tar', ['a/0.txt']))
    with pytest.raises(PSTError, match='has no class folders: all of its 1 images'):
        opened(write_tar(tmp_path / 'x.tar', ['0.png']))


def test_links_in_a_tar_file_are_named(tmp_path, caplog):
    dataset = opened(write_tar(tmp_path / 'x.tar', ['a/0.png', 'link:a/1.png', 'b/0.png', 'loose.png']))
    assert len(dataset) == 2 and class_names(dataset) == ['a', 'b']
    assert '1 member(s) that are no files, such as links (a/1.png)' in caplog.text
    assert '1 image(s) outside class folders' in caplog.text


def test_what_is_left_out_of_a_folder_is_named_in_one_warning(tmp_path, caplog, monkeypatch):
    for name in ('cat', 'dog'):
        write_class(tmp_path / 'validation', name, 2)
    root = tmp_path / 'validation'
    write_class(root, 'cat', 3, '.gif')
    write_class(root, 'gifs', 1, '.gif')
    write_class(root, 'cat', 1, '.webp')
    write_class(root, 'locked', 1)
    (root / 'cat' / 'up').symlink_to('..')
    (root / 'dog' / 'above').symlink_to(tmp_path.parent)
    (root / 'dog' / 'self.png').symlink_to('self.png')
    (root / 'dog' / 'gone.png').symlink_to('nowhere.png')
    os.mkfifo(root / 'cat' / 'fifo.png')
    (root / 'zero.jpg').symlink_to('/dev/zero')
    Image.new('RGB', (4, 4)).save(root / 'loose.png')
    (root / 'notes.txt').touch()
    scandir = os.scandir

    def closed(path):
        if os.path.basename(path) == 'locked':
            raise PermissionError(13, 'Permission denied')
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', closed)  # root may open any folder
    dataset = opened(tmp_path)
    assert class_names(dataset) == ['cat', 'dog'] and len(dataset) == 4
    [message] = [record.getMessage() for record in caplog.records]
    for part in (
            'images in other formats (4 .gif, 1 .webp)', '1 folder that cannot be opened', 'locked: Permission denied',
            '2 links to folders that they are in', 'cat/up', 'dog/above', '4 that are no files', 'cat/fifo.png',
            '1 image(s) outside class folders', '2 folder(s) without an image (gifs, locked)'):
        assert part in message


def test_a_folder_that_is_linked_twice_is_no_circle(tmp_path):
    write_class(tmp_path / 'store', 'x', 2)
    (tmp_path / 'validation').mkdir()
    for name in ('cat', 'dog'):
        (tmp_path / 'validation' / name).symlink_to(tmp_path / 'store' / 'x')
    assert len(opened(tmp_path)) == 4


def test_images_without_class_folders_are_an_error_but_for_real_labels(tmp_path):
    Image.new('RGB', (4, 4)).save(tmp_path / 'ILSVRC2012_val_00000001.JPEG', 'PNG')
    with pytest.raises(PSTError, match='has no class folders: all of its 1 images are directly in it'):
        opened(tmp_path)
    dataset = opened(tmp_path, real_labels='default')
    assert len(dataset) == 1 and class_names(dataset) is None


def test_formats_that_are_not_read_can_be_named(tmp_path):
    write_class(tmp_path, 'cat', 2, '.webp')
    write_class(tmp_path, 'dog', 1, '.webp')
    with pytest.raises(PSTError, match=r'Found 0 images .*\(3 .webp\): to read others, .* --input-key ".webp"'):
        opened(tmp_path)
    assert len(opened(tmp_path, input_key='.webp;.png')) == len(opened(tmp_path, input_key='WebP')) == 3
    with pytest.raises(PSTError, match=r'--input-key ;: expected endings'):
        opened(tmp_path, input_key=';')


def test_splits_that_are_not_there(images, tmp_path):
    for split, message in (
            ('', 'No split is named'), ('tset', "has no 'tset' split; it has train, validation"),
            ('train[:10%]', 'takes a part of a split'), ('class0', "has no 'class0' split")):
        with pytest.raises(PSTError, match=message.replace('[', r'\[')):
            opened(images, split=split)
    # without any splits, and a name that is no default, it is not guessed that all is meant
    with pytest.raises(PSTError, match="has no 'tset' split; it has class0"):
        opened(images / 'train', split='tset')
    assert len(opened(images / 'train')) == 48
    (tmp_path / 'validation').write_text('')
    with pytest.raises(PSTError, match='validation is not a folder'):
        opened(tmp_path)


def test_one_class_is_none_to_train_on(tmp_path):
    write_class(tmp_path / 'train', 'cat', 3)
    with pytest.raises(PSTError, match=r'one class alone \(cat\)'):
        open_train_splits(train_args(data_dir=str(tmp_path), val_split=''), 3)


@pytest.mark.parametrize('content,message', [
    (None, 'there is no such file'), (b'', 'is empty'), (b'\n\n', 'is empty'), (b'cat\n\ndog\n', 'line 2 is empty'),
    (b'cat\ndog\ncat\n', "line 3 names 'cat' again, which is line 1"), (b'\xff\xfe\x00', 'not a text file in UTF-8'),
    (b'cat\0\0\n', 'line 1 is binary'),
])
def test_class_maps_that_are_none(tmp_path, content, message):
    path = tmp_path / 'map.txt'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PSTError, match=f'--class-map .*map.txt: .*{message}'):
        read_class_map(str(path))


@pytest.mark.parametrize('content', [
    dict(cat=-1), dict(cat='0'), dict(cat=1.5), dict(cat=True), ['cat'], {}, Image.Transpose.ROTATE_90])
def test_pickled_class_maps_that_are_none(tmp_path, content):
    (tmp_path / 'map.pkl').write_bytes(pickle.dumps(content))
    with pytest.raises(PSTError, match=r'expected a whole number from 0 on|not a pickled dict|is empty'):
        read_class_map(str(tmp_path / 'map.pkl'))


def test_a_class_map_says_what_it_leaves_out(tmp_path, caplog):
    for name in ('cat', 'dog', 'owl'):
        write_class(tmp_path, name, 2)
    (tmp_path / 'map.txt').write_text('owl\r\nfox\ncat\n\n')
    dataset = opened(tmp_path, class_map=str(tmp_path / 'map.txt'))
    assert class_names(dataset) == ['owl', 'fox', 'cat'] and len(dataset) == 4
    assert '2 image(s) of 1 class(es) that --class-map does not name (dog)' in caplog.text
    assert '1 class(es) of --class-map that have no images here (fox)' in caplog.text
    (tmp_path / 'map.txt').write_text('dogs 0\n')
    with pytest.raises(PSTError, match=r"--class-map names no folder .* first name is 'dogs 0', .* Did you mean dog"):
        opened(tmp_path, class_map='map.txt')


def test_names_of_others_do_not_steer_the_terminal(tmp_path):
    write_class(tmp_path / 'train', '\x1b[2Jcat')
    with pytest.raises(PSTError) as e:
        open_train_splits(train_args(data_dir=str(tmp_path), val_split=''), 3)
    assert '\x1b' not in str(e.value) and r'\x1b[2Jcat' in str(e.value)


def test_tar_files_in_a_tar_file_are_read(tmp_path):
    inner = write_tar(tmp_path / 'cat.tar', ['0.png', '1.png'])
    with tarfile.open(tmp_path / 'all.tar', 'w') as tar:
        tar.add(inner, 'cat.tar')
        tar.add(write_tar(tmp_path / 'dog.tar', ['0.png']), 'dog.tar')
    dataset = opened(tmp_path / 'all.tar')
    assert class_names(dataset) == ['cat', 'dog'] and [dataset[i][1] for i in range(3)] == [0, 1, 0]
