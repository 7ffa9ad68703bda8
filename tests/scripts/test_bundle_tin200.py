"""Weights of runs become a file of half the size, with the record and the card that were measured on them."""
import hashlib
import json
import os
import signal

import pytest
import torch
import yaml

from pst_timm.checkpoints import label_names, load_model, read_checkpoint
from pst_timm.engine import Interrupted, PSTError
from pst_timm.engine.recovery import AtomicSaver
from pst_timm.models.digest import digest_note
from scripts import bundle_tin200
from scripts.bundle_tin200 import main, train_stages
from tests.engine.helpers import TINY, write_images
from tests.helpers import relative_error

WNIDS = ['n01443537', 'n01629819', 'n01641577']
NAME = 'test_resnet_pst.tin200'


def write_recipe(folder, name, **changes):
    values = {**TINY, 'model': 'resnet18_pst', 'val_split': 'val', 'model_ema': True, 'img_size': 64, **changes}
    (folder / f'{name}.yaml').write_text(yaml.safe_dump(values))


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with images, two recipes, and what the script made of them."""
    folder = tmp_path_factory.mktemp('tin200')
    write_images(folder / 'data', {'train': 12, 'val': 4}, classes=3)
    for split in ('train', 'val'):
        for i, name in enumerate(WNIDS):
            (folder / 'data' / split / f'class{i}').rename(folder / 'data' / split / name)
    write_recipe(folder, 'short', epochs=1)
    write_recipe(folder, 'long', epochs=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle_tin200, 'CONFIGS', folder)
        patch.setattr(bundle_tin200, 'CLASSES', WNIDS)
        assert main(words(folder)) == 0
        yield folder


def words(folder, *more):
    return ['--data-dir', str(folder / 'data'), '--output', str(folder / 'output'), '--folder', str(folder / 'package'),
            '--records', str(folder / 'records'), '--recipes', 'short', 'long', '--model', 'test_resnet_pst', *more]


def last_of(folder, recipe, model='test_resnet_pst'):
    return folder / 'output' / f'{model}.tin200-{recipe}' / 'last.pth.tar'


def test_weights_record_and_card_agree(place):
    short, path = sorted((place / 'package').iterdir())
    record = json.loads((place / 'records' / f'{NAME}.json').read_text())
    assert (path.name, record['weights']) == (f'{NAME}.safetensors', NAME)
    assert json.loads(short.read_text()).items() <= {**record, **record['metrics'][0]}.items()
    assert record['sha256'] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (record['images'], record['classes'], record['img_size'], record['seed']) == (12, 3, 64, 42)
    assert [stage['epochs'] for stage in record['stages']] == [1, 2] and record['stages'][1]['train_seconds'] > 0
    assert all(stage['train_loss'] > 0 and 0 <= stage['top1'] <= 100 for stage in record['stages'])
    assert record['command'].endswith(' --model test_resnet_pst --recipes short long')
    # the moving average of the last epoch, in half precision
    weights, expected = load_model(path), load_model(last_of(place, 'long'), use_ema=True)
    stored = read_checkpoint(path).weights
    assert label_names(weights) == WNIDS and stored['fc.weight'].dtype == torch.float16
    assert record['notes'] == digest_note(stored)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(weights(x), expected(x)) < 1e-2
    coarse, *fine, larger = record['metrics']
    assert coarse['topk'] == larger['topk'] == 0 and {row['topk'] for row in fine} == {2, 8}
    assert {row['img_size'] for row in (coarse, *fine)} == {64} and larger['img_size'] == 96
    assert sum(record['top1_by_class'].values()) / 3 == pytest.approx(coarse['top1'], abs=0.01)
    twin = record['twin']
    assert twin['model'] == 'test_resnet'
    assert twin['difference'] == pytest.approx(coarse['top1'] - twin['top1'], abs=0.01)
    assert twin['over_images'][0] <= twin['difference'] <= twin['over_images'][1]
    told = (place / 'records' / f'{NAME}.md').read_text()
    assert all(f'{row["top1"]:.2f}' in told for row in (*record['metrics'], twin))
    assert 'goldfish' in told and 'hf-hub' not in told and 'config.json' not in told
    assert f"timm.create_model('{NAME}', pretrained=True)" in told
    assert not any(str(place) in text for text in (told, json.dumps(record), str(path.read_bytes())))
    assert weights.pretrained_cfg['label_descriptions']['n01443537'] == 'goldfish, Carassius auratus'


def test_stages_go_on_from_one_another_and_are_trained_once(place, capsys):
    runs = []
    for model in ('test_resnet_pst', 'test_resnet'):
        first, second = (last_of(place, recipe, model) for recipe in ('short', 'long'))
        assert str(first) in (second.parent / 'args.yaml').read_text()
        runs += first, second
    times = [path.stat().st_mtime_ns for path in runs]
    record = json.loads((place / 'records' / f'{NAME}.json').read_text())
    assert main(words(place)) == 0 and times == [path.stat().st_mtime_ns for path in runs]
    again = json.loads((place / 'records' / f'{NAME}.json').read_text())
    # the same weights, in a file whose header has no order
    assert {**record, 'sha256': again['sha256']} == again
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
    assert 'test_resnet_pst.tin200-long was trained with other settings' in said and next(iter(changes)) in said


def test_a_run_that_was_stopped_goes_on_by_its_own_recipe_alone(place, tmp_path, monkeypatch, caplog):
    def start(lr):
        write_recipe(tmp_path, 'short', epochs=1, recovery_interval=1, lr=lr)
        return train_stages([tmp_path / 'short.yaml'], place / 'data', tmp_path / 'output', '--model', 'test_resnet')

    def save_and_stop(saver, position, save=AtomicSaver.save_step):
        save(saver, position)
        if position.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(AtomicSaver, 'save_step', save_and_stop)
        with pytest.raises(Interrupted, match='the same command goes on'):
            start(0.01)
    with pytest.raises(PSTError, match=r'tin200-short was trained with other settings \(lr\)'):
        start(0.02)
    with caplog.at_level('INFO'):
        [last] = start(0.01)
    assert 'Going on from' in caplog.text and read_checkpoint(last).epoch == 0
    assert start(0.01) == [last]


def test_a_stage_that_is_older_than_the_one_before_is_refused(place, capsys):
    first = last_of(place, 'short')
    then = first.stat()
    os.utime(first)
    try:
        assert main(words(place)) == 1
    finally:
        os.utime(first, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert 'test_resnet_pst.tin200-long is older than ' in capsys.readouterr().err


def test_data_that_will_not_do_leave_what_is_there(place, tmp_path, capsys):
    before = {path: path.read_bytes() for name in ('package', 'records') for path in (place / name).iterdir()}
    assert main([*words(place), '--data-dir', str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in before}


def test_a_model_without_pst_is_refused(place, capsys):
    assert main(words(place, '--model', 'resnet18')) == 1
    assert 'resnet18 has no PST' in capsys.readouterr().err
