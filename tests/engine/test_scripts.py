"""train.py and validate.py, as a user runs them."""
import csv
import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios

import timm
import yaml
from PIL import Image
from timm.models import load_checkpoint

import pst_timm  # noqa: F401
from pst_timm.engine import train

from .helpers import ROOT, TINY, as_words, load_weights, run_script, script_env, tiny_train_args

KEYS = (
    'data_dir', 'model', 'num_classes', 'img_size', 'batch_size', 'workers', 'device', 'epochs', 'lr',
    'warmup_epochs', 'hflip', 'color_jitter', 'smoothing', 'log_interval', 'output', 'experiment', 'device_modules')


def test_train_then_validate(images, tmp_path):
    words = as_words(tiny_train_args(images, tmp_path, workers=1), *KEYS)
    done = run_script('train.py', *words)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / 'run'
    # no bar without a terminal, log lines instead
    assert '\r' not in done.stderr and 'Train: 1 [   6/6 (100%)]' in done.stderr
    assert 'images_per_second' in done.stderr and 'Data:' in done.stderr
    assert f'Best checkpoint: {folder}/model_best.pth.tar' in done.stdout

    with open(folder / 'summary.csv') as f:
        rows = list(csv.DictReader(f))
    assert [r['epoch'] for r in rows] == ['0', '1']
    assert {'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr'} < set(rows[0])
    with Image.open(folder / 'curve.png') as curve:
        assert curve.width > 500
    assert yaml.safe_load((folder / 'args.yaml').read_text())['epochs'] == TINY['epochs']

    model = timm.create_model(TINY['model'], num_classes=3)
    load_checkpoint(model, str(folder / 'model_best.pth.tar'))  # timm reads it, weights only
    assert load_weights(folder / 'last.pth.tar').keys() == model.state_dict().keys()

    results_file = tmp_path / 'results.csv'
    done = run_script(
        'validate.py', *words[:12], '--device-modules', 'pst_timm', '--checkpoint', folder / 'model_best.pth.tar',
        '--results-file', results_file, '--model-kwargs', 'topk=1')
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.split('--result\n')[1])
    assert results['model'] == TINY['model'] and 0 <= results['top1'] <= results['top5'] == 100.
    with open(results_file) as f:
        assert float(next(csv.DictReader(f))['top1']) == results['top1']


def test_args_yaml_starts_the_same_run_again(images, tmp_path):
    train(tiny_train_args(images, tmp_path, epochs=1))
    again = run_script(
        'train.py', '--config', tmp_path / 'run' / 'args.yaml', '--experiment', 'again')
    assert again.returncode == 0, again.stderr
    summaries = [(tmp_path / name / 'summary.csv').read_text() for name in ('run', 'again')]
    assert summaries[0] == summaries[1]


def test_a_mistake_is_one_sentence_and_an_exit_code():
    for script, words in (
            ('train.py', ['--data-dir', 'nowhere', '--model', 'test_resnet_pst', '--device', 'cpu']),
            ('validate.py', ['--data-dir', 'nowhere', '--model', 'resnet18_pts', '--device-modules', 'pst_timm'])):
        done = run_script(script, *words)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith(f'{script}: error: ')
        assert 'Traceback' not in done.stderr
    assert "'resnet18_pts'" in done.stderr and 'Did you mean resnet18_pst' in done.stderr


def test_a_terminal_shows_bars_and_a_line_per_epoch(images, tmp_path):
    words = as_words(tiny_train_args(images, tmp_path, epochs=1), *KEYS)
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 100, 0, 0))
    done = subprocess.run(
        [sys.executable, str(ROOT / 'train.py'), *words], env=script_env(), stdin=subprocess.DEVNULL, stderr=slave,
        stdout=subprocess.DEVNULL, timeout=120)
    os.close(slave)
    said = b''
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # all is read
            break
        said += chunk
        if not chunk:
            break
    os.close(master)
    text = said.decode()
    assert done.returncode == 0, text
    assert 'Epoch 0:' in text and '6/6' in text
    assert text.count('Train: 0') == 1
