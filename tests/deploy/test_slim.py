"""The recipe keeps what is accurate enough on images that were set aside, says why it drops the rest, and ends well."""
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

from pst_timm.checkpoints import load_model
from pst_timm.checkpoints.folder import save_folder
from pst_timm.cli import main
from pst_timm.deploy import slim as module
from pst_timm.deploy.latency import Latency
from pst_timm.deploy.slim import REPORT, Settings, slim
from pst_timm.engine import train
from pst_timm.utils.errors import Interrupted, PSTError
from tests.engine.helpers import tiny_train_args, write_images

pytest.importorskip('torch_pruning')
pytest.importorskip('onnxruntime')
NAMES = ['class0', 'class1', 'class2']


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp('source') / 'model'
    save_folder(timm.create_model('test_resnet_pst', num_classes=3), folder, NAMES)
    return str(folder)


class Parts:
    """Stands for what the steps do: accuracies by name, and what was asked for in order."""

    def __init__(self):
        self.held = {'original': 90., 'pruned 50%': 89.5, 'pruned 70%': 85., 'int8': 89.2, 'cascade': 89.9}
        self.validation = {name: value - 5 for name, value in self.held.items()}
        self.asked = []
        self.failing = {}
        self.with_layers_in_float = 0.

    def note(self, name, *args, **kwargs):
        self.asked.append((name, args, kwargs))
        if name in self.failing:
            raise self.failing[name]

    def prune_to_folder(self, source, folder, ratio, **kwargs):
        self.note('prune', source, folder, ratio, **kwargs)
        shutil.copytree(self.source, folder)
        return SimpleNamespace(model=load_model(folder), params={'after': 1}, gmacs={'after': 0.5})

    def quantize(self, model, path, images, max_drop=None, **kwargs):
        self.note('quantize', model, images, max_drop)
        if max_drop is not None:
            self.held['int8'] = self.with_layers_in_float
        Path(path).write_text('int8')
        return SimpleNamespace(path=path, bytes=4, float_layers=[] if max_drop is None else ['fc'])

    def fit(self, sources, output, data_dir, split, **kwargs):
        self.note('fit', sources, data_dir, split, **kwargs)
        Path(output).write_text('{}')
        return SimpleNamespace(
            route=SimpleNamespace(reached=(100, 25)), measured=SimpleNamespace(accuracy=self.held['cascade']))

    def accuracy(self, run, model, data_dir, split, name):
        self.note(f'accuracy on {split}', name, data_dir)
        return (self.held if split == 'held' else self.validation)[name], 200


@pytest.fixture
def parts(source, monkeypatch):
    parts = Parts()
    parts.source = source
    for name in ('prune_to_folder', 'quantize', 'fit'):
        monkeypatch.setattr(module, name, getattr(parts, name))
    monkeypatch.setattr(module, 'open_source', lambda path: f'opened {Path(path).name}')
    monkeypatch.setattr(module._Slimming, 'accuracy', lambda run, *args: parts.accuracy(run, *args))
    monkeypatch.setattr(module, 'compare_latency', lambda models, size, rounds, baseline: {
        name: Latency(0.01 / (1 + i), 1. + i) for i, name in enumerate(models)})
    return parts


def steps(report):
    return {step.name: step for step in report.steps}


def test_every_step_begins_with_what_the_one_before_gave(parts, images, source, tmp_path):
    folder = tmp_path / 'out'
    report = slim(source, folder, str(images), train_flags=dict(epochs=2))
    assert [step.name for step in report.steps if step.kept] == ['original', 'pruned 50%', 'int8', 'cascade']
    [asked] = [kwargs for name, _, kwargs in parts.asked if name == 'prune']
    data_args = asked['data_args']
    # it trains on what was not set aside, from the source, and looks at no validation images
    assert data_args['train_split'] == 'train' and data_args['data_dir'] != str(images)
    assert asked['teacher'] == source and asked['train_flags'] == dict(epochs=2, val_split='')
    [(sources, data_dir, split)] = [args for name, args, kwargs in parts.asked if name == 'fit']
    assert sources == [str(folder / f'{name}.int8.onnx') for name in ('model', 'whole')]
    assert split == 'held' and data_dir != str(images)
    # the validation images come after all decisions, and only of what is kept
    order = [name for name, *_ in parts.asked]
    assert order.index('accuracy on validation') > max(
        i for i, name in enumerate(order) if name in ('fit', 'quantize', 'prune', 'accuracy on held'))
    found = steps(report)
    assert found['int8'].top1 == 84.2 and found['int8'].interval[0] < 84.2 < found['int8'].interval[1]
    # a quarter of the images costs the original in int8 too: 1 / (1 / 3 + 1 / 4 / 4)
    assert found['cascade'].ratio == pytest.approx(48 / 19) and found['int8'].ratio == 3.
    assert found['cascade'].note == '25% of the images go on to the original in int8'
    told = json.loads((folder / REPORT).read_text())
    assert [step['name'] for step in told['steps']] == [step.name for step in report.steps]
    assert told['images']['validation'] == 200
    assert sorted(path.name for path in folder.iterdir()) == [
        'cascade.json', 'model.int8.onnx', 'pruned', REPORT, 'whole.int8.onnx']
    load_model(folder / 'pruned')


@pytest.mark.parametrize('held, ratios, kept', [
    ({'pruned 70%': 85.}, (0.7, 0.5), ['original', 'pruned 50%', 'int8', 'cascade']),
    ({'pruned 50%': 88.9}, (0.5,), ['original', 'int8', 'cascade']),
    ({'int8': 88.9}, (0.5,), ['original', 'pruned 50%', 'cascade']),
    ({'cascade': 89.2}, (0.5,), ['original', 'pruned 50%', 'int8']),
    ({'pruned 50%': 0., 'int8': 0.}, (0.5,), ['original']),
    ({'int8': 89.0}, (0.5,), ['original', 'pruned 50%', 'int8', 'cascade']),  # as much as is allowed
], ids=['second-ratio', 'not-pruned', 'not-quantised', 'no-cascade', 'nothing', 'just-enough'])
def test_what_costs_too_much_is_dropped(parts, images, source, tmp_path, held, ratios, kept):
    parts.held.update(held)
    report = slim(source, tmp_path / 'out', str(images), Settings(ratios=ratios))
    assert [step.name for step in report.steps if step.kept] == kept
    for step in report.steps[1:]:
        assert step.kept == bool(step.path) and (step.kept or step.note)
        assert step.path == '' or (tmp_path / 'out' / step.path).exists()
    assert (tmp_path / 'out' / 'model.int8.onnx').exists() == ('int8' in kept)
    assert (tmp_path / 'out' / 'pruned').exists() == any(name.startswith('pruned') for name in kept)
    stages = [args[0] for name, args, kwargs in parts.asked if name == 'fit']
    # the original is as small as what it follows: in int8 after an int8 file of another model
    both = 'int8' in kept and any(name.startswith('pruned') for name in kept)
    assert [second.endswith('whole.int8.onnx') for _, second in stages] == [both] * (kept[-1] != 'original')
    assert (tmp_path / 'out' / 'whole.int8.onnx').exists() == (both and 'cascade' in kept)


def test_int8_keeps_layers_in_float_where_it_loses_too_much(parts, images, source, tmp_path):
    parts.held['int8'], parts.with_layers_in_float = 80., 89.1
    found = steps(slim(source, tmp_path / 'out', str(images)))
    allowed = [args[2] for name, args, _ in parts.asked if name == 'quantize']
    assert allowed[:2] == [None, pytest.approx(0.5)], 'what pruning has left of the one point'
    assert found['int8'].kept and '1 layers in float' in found['int8'].note


def test_a_step_that_fails_is_told_and_the_others_go_on(parts, images, source, tmp_path):
    parts.failing = {name: PSTError(f'{name} failed') for name in ('prune', 'fit')}
    found = steps(slim(source, tmp_path / 'out', str(images)))
    assert (found['pruned 50%'].note, found['cascade'].note) == ('prune failed', 'fit failed')
    assert found['int8'].kept and not (found['pruned 50%'].kept or found['cascade'].kept)


@pytest.mark.parametrize('settings, said', [
    (Settings(val_split='test'), "has no 'test' split"),
    (Settings(train_split='rest'), "has no 'rest' split"),
    (Settings(max_drop=float('nan')), 'max_drop and cascade_cost must be finite'),
])
def test_what_would_fail_at_the_end_fails_at_the_start(parts, images, source, tmp_path, settings, said):
    with pytest.raises(PSTError, match=said):
        slim(source, tmp_path / 'out', str(images), settings)
    assert not parts.asked and not (tmp_path / 'out').exists()


def test_data_of_other_classes_is_refused_at_the_start(parts, source, tmp_path):
    other = write_images(tmp_path / 'data', {'train': 4, 'validation': 2}, classes=2)
    with pytest.raises(PSTError, match='have different classes: the former lacks class2'):
        slim(source, tmp_path / 'out', str(other))
    assert not parts.asked and not (tmp_path / 'out').exists()


def test_without_data_the_structure_is_timed(parts, source, tmp_path):
    report = slim(source, tmp_path / 'out', None)
    assert {name for name, *_ in parts.asked} == {'prune', 'quantize'}
    assert [step.name for step in report.steps if step.kept] == ['original', 'pruned 50%', 'int8']
    assert all(step.top1 is None and step.held_out is None and step.ratio for step in report.steps)
    assert 'top-1' not in report.rows()[0] and report.rows()[2]['times as fast'] == 3.


def test_a_stopped_call_keeps_its_work_and_another_folder_is_left_alone(parts, images, source, tmp_path):
    folder = tmp_path / 'out'
    parts.failing = {'prune': Interrupted('Stopped.')}
    with pytest.raises(Interrupted):
        slim(source, folder, str(images))
    assert [path.name for path in folder.iterdir()] == ['work']
    before = [args[1] for name, args, _ in parts.asked if name == 'prune']
    parts.failing = {}
    slim(source, folder, str(images))
    assert [args[1] for name, args, _ in parts.asked if name == 'prune'] == before * 2, 'it goes on in one place'
    with pytest.raises(PSTError, match='--overwrite'):
        slim(source, folder, str(images))
    slim(source, folder, str(images), overwrite=True)
    (folder / 'thesis.tex').write_text('mine')
    for overwrite in (False, True):
        with pytest.raises(PSTError, match=r'thesis\.tex'):
            slim(source, folder, str(images), overwrite=overwrite)
    other = tmp_path / 'other'
    (other / 'pruned').mkdir(parents=True)
    with pytest.raises(PSTError, match='holds other files, such as pruned'):
        slim(source, other, None, overwrite=True)
    assert (other / 'pruned').is_dir() and (folder / 'thesis.tex').read_text() == 'mine'


@pytest.mark.parametrize('name', ['model.pth', 'cascade-notes.md', 'work/thesis.tex'])
def test_a_folder_of_work_is_not_taken_for_its_own(parts, source, tmp_path, name):
    mine = tmp_path / 'out' / name
    (tmp_path / 'out' / 'work').mkdir(parents=True)
    mine.write_text('mine')
    with pytest.raises(PSTError, match=f'holds other files, such as {name}'):
        slim(source, tmp_path / 'out', None, overwrite=True)
    assert mine.read_text() == 'mine' and not parts.asked


def test_what_was_half_written_when_it_was_killed_is_no_hindrance(parts, source, tmp_path):
    (tmp_path / 'out' / 'work' / 'pruned-0.5.finetune').mkdir(parents=True)
    for name in ('model.int8.onnx', 'model.int8.onnx.json', '.slim.json.0a1b2c3d.json'):
        (tmp_path / 'out' / name).write_text('half')
    slim(source, tmp_path / 'out', None)
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['model.int8.onnx', 'pruned', REPORT]


@pytest.mark.parametrize('words, said', [
    ([], 'one of the arguments --data-dir --no-data is required'),
    (['--no-data', '--', '--epochs', '3'], 'needs --data-dir'),
    (['--no-data', '--ratio', '1'], 'between 0 and 1'),
    (['--no-data', '--max-drop', 'nan'], 'from 0 to 100'),
    (['--no-data', '--held-out', '0.9'], 'held_out must be above 0 and at most 0.5'),
    (['--data-dir', 'images', '--', '--model', 'resnet18'], '--model: a fine-tuning begins with the model'),
    (['--data-dir', 'images', '--', '--epoch', '3'], '--epochs'),
])
def test_wrong_words_are_refused_before_the_work(words, said, source, tmp_path, capsys):
    try:
        code = main(['slim', source, '-o', str(tmp_path / 'out'), *words])
    except SystemExit as e:
        code = e.code
    assert code and said in capsys.readouterr().err and not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_a_reader_made_slim_in_one_command(images, tmp_path, capsys):
    run = train(tiny_train_args(images, tmp_path, epochs=6, img_size=64)).output_dir
    words = ['slim', str(run), '--data-dir', str(images), '-o', str(tmp_path / 'slim'), '--max-drop', '100', '--rounds',
             '2', '--held-out', '0.25', '--', '--epochs', '2', '--batch-size', '8', '--workers', '0', '--device', 'cpu']
    assert main(words) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / 'slim' / REPORT).read_text())
    small = {step['name']: step for step in report['steps']}
    assert small['pruned 50%']['kept'] and small['int8']['kept'], report['steps']
    assert small['pruned 50%']['gmacs'] < 0.55 * small['original']['gmacs']
    assert small['int8']['bytes'] < 0.6 * small['pruned 50%']['bytes']
    assert main(['validate', '--data-dir', str(images), '--checkpoint', str(tmp_path / 'slim' / 'model.int8.onnx'),
                 '--device', 'cpu', '-j', '0']) == 0
    assert f'"top1": {small["int8"]["top1"]:.4f}'[:12] in capsys.readouterr().out
