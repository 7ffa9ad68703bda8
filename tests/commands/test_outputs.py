"""What commands write replaces no input, nothing of others without --overwrite, and nothing at all by half."""
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from pst_timm.checkpoints.conversion import convert
from pst_timm.cli import main
from pst_timm.deploy.export import FORMATS, export
from pst_timm.hub.publishing import publish
from pst_timm.utils.errors import PSTError
from pst_timm.visualize.view import visualize
from tests.checkpoints.helpers import build, save_checkpoint
from tests.commands.bad_inputs import contents
from tests.utils.test_files import full_disk


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    """A run folder, the same weights as a single file, a folder as the Hub has it, an image and a folder of images."""
    folder = tmp_path_factory.mktemp('start')
    (folder / 'run').mkdir()
    save_checkpoint(folder / 'run' / 'model_best.pth.tar', build())
    save_checkpoint(folder / 'model.pt', build())
    timm.models.save_for_hf(build(), folder / 'hub', safe_serialization=True)
    (folder / 'photos').mkdir()
    for path in ('photo.png', 'photos/1.png', 'photos/2.png', 'photos/3.png'):
        Image.new('RGB', (70, 60), 'red').save(folder / path)
    (folder / 'names.txt').write_text('a\nb\nc\n')
    return folder


@pytest.fixture
def here(start, tmp_path, monkeypatch):
    shutil.copytree(start, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize('words', [
    'export model.pt --format torchscript',  # whose default name is that of the source
    'export run --format torchscript --output run/model_best.pth.tar',
    'export hub --format torchscript --output hub/model.safetensors',
    'export model.pt --output names.txt --class-names names.txt',
    'export model.pt --check --images photo.png --output photo.png',
    'convert model.pt model.pt',
    'convert run run/model_best.pth.tar',
    'convert hub hub/model.safetensors',
    'visualize photo.png --checkpoint model.pt --output photo.png',
    'visualize photo.png --checkpoint model.pt --output link.png',
    'visualize photos --checkpoint model.pt --output photos/2.png --limit 1',
    'publish hub --repo-id acme/hub --dry-run --folder hub',
    'publish hub/model.safetensors --repo-id acme/hub --dry-run --folder hub',
])
def test_what_is_read_is_not_written_over(words, here, capsys):
    (here / 'link.png').symlink_to('photo.png')
    before = contents(here)
    assert main([*words.split(), '--overwrite']) == 1
    error = capsys.readouterr().err
    assert contents(here) == before and error.count('\n') == 1
    assert 'is what is read' in error or 'is where the checkpoint is read' in error or 'is in the folder that' in error


@pytest.mark.parametrize('words, old', [
    ('export model.pt --format onnx --output old.onnx', 'old.onnx'),
    ('convert model.pt old.safetensors', 'old.safetensors'),
    ('visualize photo.png --checkpoint model.pt', 'photo-pst.png'),
    ('visualize photos --checkpoint model.pt --each --output sheet.png', 'sheet-02-2.png'),
    ('publish model.pt --repo-id acme/tiny --dry-run', 'output/publish/tiny/config.json'),
    ('publish model.pt --repo-id acme/tiny --dry-run --folder published', 'published/README.md'),
])
def test_a_file_of_others_is_kept_without_overwrite(words, old, here, capsys, monkeypatch):
    (here / old).parent.mkdir(parents=True, exist_ok=True)
    (here / old).write_text('of others')
    before = contents(here)
    monkeypatch.setattr('pst_timm.checkpoints.load_model', lambda *args, **kwargs: pytest.fail('too late'))
    monkeypatch.setattr('pst_timm.checkpoints.conversion.open_checkpoint', lambda *args: pytest.fail('too late'))
    monkeypatch.setattr('pst_timm.hub.publishing.open_checkpoint', lambda *args: pytest.fail('too late'))
    assert main(words.split()) == 1
    error = capsys.readouterr().err
    assert contents(here) == before
    assert error.count('\n') == 1 and '--overwrite' in error and Path(old).name in error


def test_overwrite_replaces(here, capsys):
    for words in ('export model.pt --format torchscript --output a.pt', 'convert model.pt a.safetensors',
                  'visualize photo.png --checkpoint model.pt --topk 1', 'publish model.pt --repo-id acme/a --dry-run'):
        assert main(words.split()) == 0
        assert main(words.split()) == 1
        assert main([*words.split(), '--overwrite']) == 0
    assert json.loads((here / 'output/publish/a/config.json').read_text())['architecture'] == 'test_resnet_pst'


@pytest.mark.parametrize('format', FORMATS)
def test_an_export_on_a_full_disk_leaves_what_was_there(format, tmp_path):
    path = tmp_path / f'model{FORMATS[format]}'
    path.write_text('the old model')
    with full_disk(), pytest.raises(PSTError, match=r'Cannot write .*File too large'):
        export(build(), path, format, img_size=64, overwrite=True)
    assert path.read_text() == 'the old model' and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('write', [
    lambda folder: convert(folder / 'model.pt', folder / 'old.safetensors', overwrite=True),
    lambda folder: convert(folder / 'model.pt', folder / 'old.pth.tar', overwrite=True),
    lambda folder: visualize(folder / 'photo.png', build(), folder / 'old.png', overwrite=True, topk=1),
    lambda folder: visualize(folder / 'photo.png', build(), folder / 'old.pdf', overwrite=True, topk=1),
    lambda folder: publish(folder / 'model.pt', 'acme/a', dry_run=True, folder=folder / 'new'),
], ids=['safetensors', 'pickle', 'png', 'pdf', 'folder'])
def test_a_full_disk_leaves_what_was_there(write, here):
    for name in ('old.safetensors', 'old.pth.tar', 'old.png', 'old.pdf'):
        (here / name).write_text('as it was')
    before = contents(here)
    with full_disk(), pytest.raises(PSTError, match='Cannot write'):
        write(here)
    after = contents(here)
    assert {name: after.get(name) for name in before} == before
    assert not [name for name in set(after) - set(before) if (here / name).is_file()]


def test_weights_beyond_what_onnx_holds_are_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr('pst_timm.utils.onnx_file.MOST_ONNX', 1000)
    monkeypatch.setattr(torch.onnx, 'export', lambda *args, **kwargs: pytest.fail('too late'))
    with pytest.raises(PSTError, match='an ONNX file holds at most 2'):
        export(build(), tmp_path / 'model.onnx')
    assert not list(tmp_path.iterdir())
