"""Files are whole or not there, readable by whom the user lets read, and come back as they were."""
import os
import resource
import stat
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import (
    check_output,
    columns_of,
    read_class_names,
    read_csv,
    write_csv,
    write_json,
    write_text,
    write_whole,
)


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize('mask, modes', [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
@pytest.mark.parametrize('kind', ['text', 'safetensors', 'pickle'])
def test_modes_are_those_of_the_umask(kind, mask, modes, tmp_path, umask):
    umask(mask)
    path = tmp_path / 'file'
    if kind == 'text':
        write_text(path, 'words')
    elif kind == 'safetensors':  # whose own writer makes files for the owner alone
        write_whole(path, lambda name: save_file({'a': torch.zeros(2)}, name))
    else:
        write_whole(path, lambda name: torch.save({'a': 1}, name))
    assert stat.S_IMODE(path.stat().st_mode) == modes
    assert os.umask(mask) == mask
    assert list(tmp_path.iterdir()) == [path]


@contextmanager
def full_disk():
    """Files of this process end at 4000 bytes; taken back within the test, for its output may go to a longer file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize('write', [
    lambda path: write_text(path, 'word ' * 5000),
    lambda path: write_csv(path, [{'a': 'word ' * 5000}]),
    lambda path: write_json(path, ['word'] * 5000),
    lambda path: write_whole(path, lambda name: save_file({'a': torch.zeros(5000)}, name)),
    lambda path: write_whole(path, lambda name: torch.save(torch.zeros(5000), name)),
], ids=['text', 'csv', 'json', 'safetensors', 'pickle'])
def test_a_full_disk_leaves_what_was_there(write, tmp_path):
    path = tmp_path / 'kept.txt'
    path.write_text('as it was')
    with full_disk(), pytest.raises(PSTError, match=r'Cannot write .*kept\.txt: '):
        write(path)
    assert path.read_text() == 'as it was' and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('error', [KeyError, KeyboardInterrupt])
def test_a_writer_that_breaks_leaves_nothing(error, tmp_path):
    def write(name):
        Path(name).write_text('half')
        raise error

    with pytest.raises(error):
        write_whole(tmp_path / 'file', write)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('path, reason', [('no/folder/file', 'No such file'), ('file/inside', 'Not a directory')])
def test_folders_that_are_not_there_are_named(path, reason, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(PSTError, match=f'Cannot write .*{path}: {reason}'):
        write_text(tmp_path / path, '')


def test_the_writer_sees_the_ending_and_the_old_file_until_the_end(tmp_path):
    path = tmp_path / 'a.tar.png'
    path.write_text('old')

    def write(name):
        assert name.endswith('.png') and path.read_text() == 'old' and Path(name).parent == tmp_path
        Path(name).write_text('new')

    write_whole(path, write)
    assert path.read_text() == 'new'


def test_tables_come_back_with_their_gaps(tmp_path):
    rows = [{'name': 'a, "b"', 'top1': 97.5}, {'name': 'ä\nö', 'loss': None, 'top1': 1e-7}, {}]
    write_csv(tmp_path / 'rows.csv', rows)
    assert read_csv(tmp_path / 'rows.csv') == [
        {'name': 'a, "b"', 'top1': '97.5', 'loss': ''}, {'name': 'ä\nö', 'top1': '1e-07', 'loss': ''},
        {'name': '', 'top1': '', 'loss': ''}]
    assert columns_of(rows) == ['name', 'top1', 'loss']


@pytest.mark.parametrize('text, message', [
    ('', 'is empty'), ('a,b\n1,2\n3\n', 'line 3 does not have as many fields'), ('a,b\n1,2,3\n', 'line 2 does not'),
    (b'a\n\xff\n', 'is not a CSV file')])
def test_garbled_tables_are_named(text, message, tmp_path):
    path = tmp_path / 'rows.csv'
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PSTError, match=f'rows.csv.* {message}'):
        read_csv(path)
    with pytest.raises(PSTError, match='cannot be read'):
        read_csv(tmp_path)


def test_class_names(tmp_path):
    path = tmp_path / 'names.txt'
    path.write_bytes('cat\r\n\nÄrmel\n'.encode())
    assert read_class_names(path) == ['cat', 'Ärmel'] and read_class_names(None) is None
    with pytest.raises(PSTError, match='Cannot read the class names'):
        read_class_names(tmp_path / 'none')


@pytest.mark.parametrize('name, kwargs, told', [
    ('new', {}, None),
    ('old', {}, 'add --overwrite'),
    ('old', {'overwrite': True}, None),
    ('source', {'overwrite': True}, 'is what is read'),
    ('link', {'overwrite': True}, 'is what is read'),
    ('dangling', {}, 'add --overwrite'),
    ('folder', {'overwrite': True}, 'it is a folder'),
    ('pipe', {'overwrite': True}, 'not an ordinary file'),
    ('none/new', {}, 'there is no folder'),
])
def test_an_output_is_checked_before_the_work(name, kwargs, told, tmp_path):
    for file in ('old', 'source'):
        (tmp_path / file).write_text(file)
    (tmp_path / 'link').symlink_to(tmp_path / 'source')
    (tmp_path / 'dangling').symlink_to(tmp_path / 'gone')
    (tmp_path / 'folder').mkdir()
    os.mkfifo(tmp_path / 'pipe')
    before = sorted(tmp_path.iterdir())
    kwargs = dict(kwargs, inputs=[tmp_path / 'source', tmp_path / 'missing'])
    if told is None:
        check_output(tmp_path / name, **kwargs)
    else:
        with pytest.raises(PSTError, match=told):
            check_output(tmp_path / name, **kwargs)
    assert sorted(tmp_path.iterdir()) == before


def test_a_mark_at_the_beginning_is_no_part_of_the_first_column(tmp_path):
    (tmp_path / 'rows.csv').write_text('image,label\n1.png,cat\n', encoding='utf-8-sig')
    assert read_csv(tmp_path / 'rows.csv') == [{'image': '1.png', 'label': 'cat'}]
