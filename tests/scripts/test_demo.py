"""The demo, on a smaller model."""
import os
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest
import timm
from PIL import Image

from pst_timm.engine import Interrupted
from scripts import demo
from scripts.demo import TARGET, command_to_go_on, write_digits
from tests.engine.helpers import script_env


def test_digits_are_split_once_and_for_all(tmp_path):
    assert write_digits(tmp_path / 'a') == (1437, 360)
    assert write_digits(tmp_path / 'b') == (1437, 360)
    files = [sorted(p.relative_to(tmp_path / f) for p in (tmp_path / f).rglob('*.png')) for f in 'ab']
    assert files[0] == files[1] and len(files[0]) == 1797
    counts = [len(list((tmp_path / 'a' / 'validation' / str(i)).glob('*.png'))) for i in range(10)]
    assert max(counts) - min(counts) <= 2
    with Image.open(tmp_path / 'a' / files[0][0]) as image:
        assert image.size == (64, 64) and np.asarray(image).std() > 10


def start(*words, cwd):
    return subprocess.Popen(
        words, cwd=cwd, env=script_env(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True)


@pytest.mark.slow
def test_a_stopped_demo_goes_on_and_ends_with_a_table(tmp_path):
    run = start(sys.executable, '-m', 'scripts.demo', '--model', 'test_resnet_pst', '--epochs', '1', cwd=tmp_path)
    for line in run.stderr:
        if line.startswith('Train: 0 [  15/'):
            # as a terminal does, to all processes
            os.killpg(run.pid, signal.SIGINT)
            break
    rest = run.communicate(timeout=120)[1].strip().splitlines()
    assert run.returncode == 75, rest
    words = 'Stopped; to go on: '
    assert rest[-1].startswith(words) and not [line for line in rest if 'Traceback' in line]
    folder = tmp_path / 'output' / 'demo'
    [recovery] = folder.glob('*.pth.tar')
    assert recovery.name.startswith('recovery-0-')

    run = start(*shlex.split(rest[-1].removeprefix(words)), cwd=tmp_path)
    out, err = run.communicate(timeout=300)
    assert f'Going on from {recovery.relative_to(tmp_path)}' in err
    lines = out.splitlines()
    top1 = next(float(line.split()[2].rstrip('%')) for line in lines if line.startswith('top-1, coarse'))
    assert run.returncode == (0 if top1 >= TARGET else 1), err
    assert any(line.startswith('fine, topk=2, gate') for line in lines)
    assert any(' is a ' in line and 'probability 0.' in line for line in lines)
    for name in ('curve.png', 'attention.png'):
        assert any(line.startswith('picture: ') and line.endswith(f'output/demo/{name}') for line in lines)
        with Image.open(folder / name) as picture:
            assert picture.height > 200
    assert not list(folder.glob('recovery*')) and (folder / 'model_best.pth.tar').is_file()
    weights = folder / 'test_resnet_pst_digits'
    assert (weights / 'model.safetensors').is_file()
    model = timm.create_model(f'local-dir:{weights}', pretrained=True)
    assert model.num_classes == 10 and model.pretrained_cfg['input_size'] == (3, 64, 64)


def test_the_command_to_go_on_is_one_that_can_be_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'executable', str(tmp_path / '.venv/bin/python'))
    assert command_to_go_on() == '.venv/bin/python -m scripts.demo --resume auto'
    assert command_to_go_on(['--resume', 'auto', '--aa', '']) == (
        ".venv/bin/python -m scripts.demo --resume auto --aa ''")
    monkeypatch.setattr(sys, 'executable', '/usr/bin/python3')
    assert command_to_go_on(['--epochs', '1']) == '/usr/bin/python3 -m scripts.demo --epochs 1 --resume auto'


def test_a_new_demo_takes_the_place_of_an_older_one(tmp_path, monkeypatch):
    asked = []

    def stop(args):
        asked.append((args.resume, args.overwrite))
        raise Interrupted('stopped')

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, 'train', stop)
    monkeypatch.setattr(demo, 'write_digits', lambda folder: (0, 0))
    for words in (['--resume', 'auto'], [], ['--experiment', 'mine']):
        assert demo.main(words) == 75
    assert asked == [('auto', False), ('', True), ('', False)]


def test_a_wrong_flag_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, 'write_digits', lambda folder: (0, 0))
    assert demo.main(['--epoch', '1']) == 1
    assert 'python -m scripts.demo: error: ' in capsys.readouterr().err
