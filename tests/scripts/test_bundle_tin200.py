"""Weights of runs become a file of half the size, with the record and the card that were measured on them."""
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from pst_timm.checkpoints import label_names, load_model, read_checkpoint
from pst_timm.models.digest import digest_note
from pst_timm.utils.errors import PSTError
from scripts import bundle_tin200
from scripts.bundle_tin200 import CLASSES, ROOT, main
from tests.engine.helpers import TINY, write_images
from tests.helpers import relative_error

pytestmark = pytest.mark.slow  # trains stages of seconds

WNIDS = ['n01443537', 'n01629819', 'n01641577']
NAME = 'mobilenetv4_conv_small_pst.tin200'


def write_recipe(folder, name, **changes):
    values = {**TINY, 'model': 'resnet18_pst', 'val_split': 'val', 'model_ema': True, 'img_size': 64, **changes}
    (folder / f'{name}.yaml').write_text(yaml.safe_dump(values))


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with images, a recipe of the trunk and one of both, and what the script made of them."""
    folder = tmp_path_factory.mktemp('tin200')
    write_images(folder / 'data', {'train': 12, 'val': 4}, classes=3)
    for split in ('train', 'val'):
        for i, name in enumerate(WNIDS):
            (folder / 'data' / split / f'class{i}').rename(folder / 'data' / split / name)
    write_recipe(folder, 'short', epochs=1, model='resnet18')
    write_recipe(folder, 'long', epochs=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle_tin200, 'CONFIGS', folder)
        patch.setattr(bundle_tin200, 'CLASSES', {name: CLASSES[name] for name in WNIDS})
        assert main(words(folder)) == 0
        yield folder


def words(folder, *more):
    return ['--data-dir', str(folder / 'data'), '--output', str(folder / 'output'), '--folder', str(folder / 'package'),
            '--records', str(folder / 'records'), '--recipes', 'short', 'long', '--model', 'mobilenetv4_conv_small_pst',
            '--processes', '1', *more]


def last_of(folder, recipe, model='mobilenetv4_conv_small_pst'):
    return folder / 'output' / f'{model}.tin200-{recipe}' / 'last.pth.tar'


def test_weights_record_and_card_agree(place):
    short, path = sorted((place / 'package').iterdir())
    plain = place / 'records' / 'mobilenetv4_conv_small.tin200.safetensors'
    record = json.loads((place / 'records' / f'{NAME}.json').read_text())
    assert (path.name, record['weights']) == (f'{NAME}.safetensors', NAME)
    assert json.loads(short.read_text()).items() <= {**record, **record['metrics'][0]}.items()
    assert record['sha256'] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (record['images'], record['classes'], record['img_size'], record['seed']) == (12, 3, 64, 42)
    assert [(stage['recipe']['model'], stage['epochs'], stage['processes']) for stage in record['stages']] == [
        ('mobilenetv4_conv_small', 1, 1), ('mobilenetv4_conv_small_pst', 2, 1)]
    assert all(end['train_seconds'] > 0 for end in (*record['stages'], record['twin']['end']))
    assert all(stage['train_loss'] > 0 and 0 <= stage['top1'] <= 100 for stage in record['stages'])
    assert record['command'].endswith(' --model mobilenetv4_conv_small_pst --recipes short long --processes 1')
    # the moving average of the last epoch, in half precision
    weights, expected = load_model(path), load_model(last_of(place, 'long'), use_ema=True)
    stored = read_checkpoint(path).weights
    assert label_names(weights) == WNIDS and stored['fc.weight'].dtype == torch.float16
    assert record['notes'] == digest_note(stored)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(weights(x), expected(x)) < 1e-2
    coarse, *fine, smaller = record['metrics']
    assert coarse['topk'] == smaller['topk'] == 0 and {row['topk'] for row in fine} == {2, 8}
    assert {row['img_size'] for row in (coarse, *fine, record['twin'])} == {record['test_size']} == {96}
    assert smaller['img_size'] == 64 and weights.pretrained_cfg['test_input_size'] == (3, 96, 96)
    assert weights.pretrained_cfg['pool_size'] == (2, 2)
    assert sum(record['top1_by_class'].values()) / 3 == pytest.approx(coarse['top1'], abs=0.01)
    twin = record['twin']
    assert twin['weights'] == plain.stem
    assert twin['sha256'] == hashlib.sha256(plain.read_bytes()).hexdigest()
    stored, expected = load_model(plain), load_model(last_of(place, 'long', 'mobilenetv4_conv_small'), use_ema=True)
    with torch.no_grad():
        assert relative_error(stored(x), expected(x)) < 1e-2
    assert twin['difference'] == pytest.approx(coarse['top1'] - twin['top1'], abs=0.01)
    assert twin['over_images'][0] <= twin['difference'] <= twin['over_images'][1]
    told = (place / 'records' / f'{NAME}.md').read_text()
    assert all(f'{row["top1"]:.2f}' in told for row in (*record['metrics'], twin))
    assert 'goldfish' in told and 'hf-hub' not in told and 'config.json' not in told
    assert f"timm.create_model('{NAME}', pretrained=True)" in told
    assert not any(str(place) in text for text in (told, json.dumps(record), str(path.read_bytes())))
    assert weights.pretrained_cfg['label_descriptions']['n01443537'] == 'goldfish, Carassius auratus'


def test_stages_go_on_from_one_another_and_are_trained_once(place, capsys):
    trunk = last_of(place, 'short', 'mobilenetv4_conv_small')
    ends = {flag: last_of(place, 'long', model) for flag, model in (
        ('trunk_checkpoint', 'mobilenetv4_conv_small_pst'), ('initial_checkpoint', 'mobilenetv4_conv_small'))}
    for flag, path in ends.items():
        assert f'{flag}: {trunk}' in (path.parent / 'args.yaml').read_text()
    assert not last_of(place, 'short').exists()
    runs = [trunk, *ends.values()]
    times = [path.stat().st_mtime_ns for path in runs]
    record = json.loads((place / 'records' / f'{NAME}.json').read_text())
    assert main(words(place)) == 0 and times == [path.stat().st_mtime_ns for path in runs]
    again = json.loads((place / 'records' / f'{NAME}.json').read_text())
    # the same weights, in files whose headers have no order
    for new, old in ((again, record), (again['twin'], record['twin'])):
        new['sha256'] = old['sha256']
    assert again == record
    # what an entry of default_cfgs needs
    assert record['notes'] in capsys.readouterr().out


@pytest.mark.parametrize('changes', [dict(lr=0.01), dict(epochs=3), dict(seed=7)], ids=str)
def test_a_run_of_another_recipe_is_refused(place, capsys, changes):
    write_recipe(place, 'long', **{'epochs': 2, **changes})
    try:
        assert main(words(place)) == 1
    finally:
        write_recipe(place, 'long', epochs=2)
    said = capsys.readouterr().err
    assert 'conv_small_pst.tin200-long was trained with other settings' in said and next(iter(changes)) in said


def test_what_was_stopped_goes_on_by_its_own_recipe_alone(place, tmp_path, capfd):
    def start(lr, *more):
        write_recipe(tmp_path, 'short', epochs=6, recovery_interval=1, lr=lr, model='resnet18')
        write_recipe(tmp_path, 'long', epochs=1)
        classes = {name: CLASSES[name] for name in WNIDS}
        code = (f'import pathlib, sys; from scripts import bundle_tin200 as b; b.CLASSES = {classes}; '
                f'b.CONFIGS = pathlib.Path({str(tmp_path)!r}); sys.exit(b.main())')
        folders = {flag: str(tmp_path / flag) for flag in ('output', 'folder', 'records')}
        said = words(place, *(word for flag, path in folders.items() for word in (f'--{flag}', path)))
        return subprocess.Popen(
            [sys.executable, '-c', code, *said, *more], cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE,
            text=True)

    process, folder = start(0.01, '--processes', '2'), tmp_path / 'output' / 'mobilenetv4_conv_small.tin200-short'
    deadline = time.monotonic() + 180
    while process.poll() is None and time.monotonic() < deadline and not list(folder.glob('recovery-*')):
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()[1]
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 75 and 'the same command goes on' in said
    said = start(0.02, '--processes', '2').communicate(timeout=120)[1]
    assert 'tin200-short was trained with other settings (lr)' in said
    said = start(0.01, '--processes', '1').communicate(timeout=120)[1]
    assert 'tin200-short was trained with other settings (number of processes)' in said
    said = start(0.01, '--processes', '2').communicate(timeout=240)[1]
    assert 'Going on from' in said
    assert json.loads((tmp_path / 'records' / f'{NAME}.json').read_text())['stages'][0]['processes'] == 2


def test_what_fails_says_so_and_how_to_go_on(place, capfd):
    write_recipe(place, 'wrong', epochs=1, val_split='none_such')
    assert main(words(place, '--recipes', 'wrong')) == 1
    said = capfd.readouterr().err
    assert 'none_such' in said and 'conv_small_pst.tin200-wrong ended before its time, with exit code 1' in said


def test_a_stage_that_is_older_than_the_one_before_is_refused(place, capsys):
    first = last_of(place, 'short', 'mobilenetv4_conv_small')
    then = first.stat()
    os.utime(first)
    try:
        assert main(words(place)) == 1
    finally:
        os.utime(first, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert 'mobilenetv4_conv_small_pst.tin200-long is older than ' in capsys.readouterr().err


def test_what_goes_wrong_leaves_what_is_there(place, tmp_path, monkeypatch, capsys):
    before = {path: path.read_bytes() for name in ('package', 'records') for path in (place / name).iterdir()}
    assert main([*words(place), '--data-dir', str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err
    done = []

    def measure(weights, *args, whole=bundle_tin200.measure):
        if done:
            raise PSTError('no second measurement')
        done.append(weights)
        return whole(weights, *args)

    monkeypatch.setattr(bundle_tin200, 'measure', measure)
    assert main(words(place)) == 1 and 'no second measurement' in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in before}


def test_recipes_and_folders_that_will_not_do_are_refused_at_once(place, capsys):
    assert main(words(place, '--recipes', 'short')) == 1
    assert 'short.yaml trains no model with PST' in capsys.readouterr().err
    assert main(words(place, '--folder', str(place / 'records'))) == 1
    assert 'name two folders' in capsys.readouterr().err


def test_a_model_without_pst_is_refused(place, capsys):
    assert main(words(place, '--model', 'resnet18')) == 1
    assert 'resnet18 has no PST' in capsys.readouterr().err
