"""A study runs every cell once, however often it is killed, and puts on record what the engine measured."""
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pst_timm.commands.study import main
from pst_timm.engine import validate, validate_args
from pst_timm.engine.flags import TRAIN_FLAGS
from pst_timm.study import cell as study_cell
from pst_timm.study import runner as study_runner
from pst_timm.study.collection import describe, merge
from pst_timm.study.config import Study, choose_classes, read_study
from pst_timm.study.runner import epochs_done, finished, make_slots
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import read_csv
from pst_timm.utils.locks import locked
from tests.engine.helpers import ROOT, TINY, script_env, write_images

CONFIGS = sorted((ROOT / 'configs' / 'study').glob('*.yaml'))
SHARED = {k: v for k, v in TINY.items() if k not in ('model', 'num_classes', 'device')}
TOY = dict(
    name='toy',
    title='Bands',
    seeds=[0, 1],
    classes=['class0', 'class2', 'class4'],
    train=dict(SHARED, val_split='validation', img_size=32, sched='cosine', channels_last=True),
    cells=dict(
        plain=dict(model='test_resnet'),
        pst=dict(model='test_resnet_pst', model_kwargs=dict(topk=0, pst_depth=1)),
    ),
    sweep=dict(cells=['pst'], topk=[0, 1], img_size=[32, 64]),
    probe=dict(cells=['pst'], classes=dict(first=1, step=2)),
    questions={1: dict(title='Does it help?', kind='compare', of='pst', against=['plain'])},
)


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp('bands'), {'train': 16, 'validation': 7}, classes=5)


def write_config(folder, **changes):
    path = folder / 'toy.yaml'
    path.write_text(yaml.safe_dump({**TOY, **changes}))
    return path


def words(config, data, folder, *more):
    return [str(config), '--data-dir', str(data), '--output', str(folder / 'output'), '--results',
            str(folder / 'results'), '--device', 'cpu', *more]


def start(config, data, folder, **kwargs):
    return subprocess.Popen(
        [sys.executable, '-m', 'pst_timm', 'study', *words(config, data, folder, '--jobs', '1')],
        env=script_env(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, **kwargs)


def alive(folder):
    """Processes of cells that still run."""
    found = subprocess.run(['pgrep', '-f', f'--output {folder / "output"}'], capture_output=True, text=True)
    return found.stdout.split()


def wait_for(condition, what, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f'{what} did not happen'
        time.sleep(0.05)


def table(folder, name):
    with open(folder / 'results' / f'{name}.csv', newline='') as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope='module')
def done(data, tmp_path_factory):
    """The folder of a study that was killed twice, with SIGKILL and with SIGTERM, and then finished."""
    folder = tmp_path_factory.mktemp('study')
    config = write_config(folder, train=dict(TOY['train'], epochs=3))
    cells = folder / 'output' / 'toy'

    first = start(config, data, folder)
    wait_for(lambda: (cells / 'plain-seed1' / 'summary.csv').is_file(), 'the second cell')
    first.kill()
    first.wait()
    # the cell at work notices that it is alone, and stops with its state saved
    wait_for(lambda: not alive(folder), 'the end of the cell')
    record = (cells / 'plain-seed0' / 'cell.json').stat().st_mtime_ns
    state = {p.parent.name: len(read_csv(p)) for p in cells.glob('*/summary.csv')}

    second = start(config, data, folder)
    wait_for(lambda: (cells / 'pst-seed0' / 'summary.csv').is_file(), 'the third cell')
    second.terminate()
    said = second.communicate(timeout=120)[0]
    assert second.returncode == 130 and 'Start the same command again' in said
    assert not alive(folder)

    third = start(config, data, folder)
    said = third.communicate(timeout=300)[0]
    assert third.returncode == 0, said
    return folder, config, record, state, said


class TestKilled:
    def test_a_finished_cell_is_not_run_again(self, done):
        folder, _, record, _, said = done
        assert (folder / 'output' / 'toy' / 'plain-seed0' / 'cell.json').stat().st_mtime_ns == record
        assert 'plain-seed0: started' not in said and 'plain-seed1: started' not in said
        assert 'toy: 2 of 4 cells are finished, 2 to run' in said

    def test_a_cell_at_work_goes_on_from_its_checkpoint(self, done):
        folder, _, _, state, _ = done
        assert state['plain-seed0'] == 3 and 1 <= state['plain-seed1'] <= 3
        log = (folder / 'output' / 'toy' / 'plain-seed1' / 'cell.log').read_text()
        assert 'Going on from' in log or state['plain-seed1'] == 3
        assert log.count('epochs 0 to 3') == 1

    def test_everything_is_there_in_the_end(self, done):
        folder = done[0]
        ids = [(r['cell'], r['seed']) for r in table(folder, 'cells')]
        assert ids == [('plain', '0'), ('plain', '1'), ('pst', '0'), ('pst', '1')]
        assert json.loads((folder / 'results' / 'study.json').read_text())['missing'] == []
        curves = table(folder, 'curves')
        assert [(r['cell'], r['seed'], int(r['epoch'])) for r in curves] == [(*i, e) for i in ids for e in range(3)]

    def test_a_third_start_runs_nothing(self, done, data, caplog):
        folder, config, *_ = done
        before = (folder / 'results' / 'cells.csv').read_text()
        with caplog.at_level('INFO'):
            assert main(words(config, data, folder)) == 0
        assert '4 of 4 cells are finished, 0 to run' in caplog.text and 'started' not in caplog.text
        assert (folder / 'results' / 'cells.csv').read_text() == before


class TestRecord:
    def test_metrics_are_those_of_the_last_checkpoint(self, done, data):
        folder = done[0]
        cell = folder / 'output' / 'toy' / 'pst-seed1'
        [again] = validate(validate_args(
            model='test_resnet_pst', checkpoint=str(cell / 'last.pth.tar'), data_dir=str(data), split='validation',
            class_map=str(cell / 'classes.txt'), num_classes=3, img_size=32, workers=0, device='cpu', batch_size=8,
            channels_last=True, calibrate=True, answers=True, device_modules=['pst_timm']))
        [row] = [r for r in table(folder, 'cells') if r['cell'] == 'pst' and r['seed'] == '1']
        [final] = [
            r for r in table(folder, 'evaluations')
            if (r['cell'], r['seed'], r['evaluation']) == ('pst', '1', 'final')]
        for key in ('top1', 'top5', 'loss', 'ece'):
            assert float(row[key]) == float(final[key]) == pytest.approx(again[key], abs=1e-5)
        assert final['answers'] == again['answers']
        assert row['classes'] == '3' and row['train_images'] == '48' and row['val_images'] == '21'

    def test_answers_are_the_accuracy(self, done):
        for row in table(done[0], 'evaluations'):
            bits = bin(int('1' + row['answers'], 16))[3:]
            images = int(row['images'])
            assert len(row['answers']) == -(-images // 4) and set(bits[images:]) <= {'0'}
            assert float(row['top1']) == pytest.approx(100 * bits.count('1') / images, abs=1e-3)

    def test_evaluations(self, done):
        rows = [r for r in table(done[0], 'evaluations') if r['seed'] == '0']
        found = [(r['cell'], r['evaluation'], r['img_size'], r['topk'], r['fine_fusion']) for r in rows]
        sweep = [('0', 'coarse'), ('1', 'gate'), ('1', 'joint')]
        assert found == [
            ('plain', 'final', '32', '', ''),
            ('pst', 'final', '32', '', ''),
            *(('pst', 'sweep', size, *setting) for size in ('32', '64') for setting in sweep),
            ('pst', 'probe', '32', '', '')]
        coarse = next(r for r in rows if r['evaluation'] == 'sweep')
        assert coarse['answers'] == rows[1]['answers'] and coarse['loss'] == rows[1]['loss']
        # the probe's classes are others: two of them, seven images each
        assert rows[-1]['images'] == '14' and float(rows[-1]['top5']) == 100

    def test_speed_and_hardware(self, done):
        for row in table(done[0], 'cells'):
            assert float(row['train_seconds']) > 0 and float(row['images_per_second']) > 0
            assert 0 <= float(row['wait_share']) <= 1
            assert row['hardware'] and row['torch'] and row['timm'] and row['python'] and row['date']
            assert row['device'] == 'cpu' and row['jobs'] == '1' and int(row['threads']) >= 1
            assert json.loads(row['settings'])['lr'] == TINY['lr']

    def test_latency(self, done):
        rows = {r['cell']: r for r in table(done[0], 'latency')}
        assert set(rows) == {'plain', 'pst'}
        assert float(rows['plain']['ratio']) == float(rows['plain']['train_ratio']) == 1
        assert float(rows['pst']['latency_ms']) > 0 and float(rows['pst']['train_ms']) > 0
        assert float(rows['pst']['gmacs']) > float(rows['plain']['gmacs'])

    def test_list(self, done, data, capsys):
        folder, config, *_ = done
        assert main(words(config, data, folder, '--list')) == 0
        assert capsys.readouterr().out.splitlines() == [
            f'{c}-seed{s}: finished' for c in ('plain', 'pst') for s in (0, 1)]

    def test_other_settings_are_no_reason_to_mix(self, done, data, capsys):
        folder, config, *_ = done
        other = folder / 'other.yaml'
        other.write_text(config.read_text().replace('lr: 0.05', 'lr: 0.1'))
        assert main(words(other, data, folder)) == 1
        assert 'plain-seed0 was run with other settings' in capsys.readouterr().err

    def test_results_of_other_cells_stay(self, done, data, tmp_path):
        folder, config, *_ = done
        study = read_study(str(config), str(data))
        rows = table(folder, 'cells')
        mine = [dict(r, top1='12.5') for r in rows if r['cell'] == 'pst']
        merge(tmp_path, study, 'cells', rows[:2])
        merge(tmp_path, study, 'cells', mine)
        assert read_csv(tmp_path / 'cells.csv') == rows[:2] + mine


@pytest.mark.slow
def test_a_cell_that_fails_does_not_stop_the_others(data, tmp_path):
    cells = dict(
        bad=dict(model='test_resnet_pst', model_kwargs=dict(pst_head_dim=7)), good=dict(model='test_resnet', epochs=1))
    config = write_config(tmp_path, seeds=[0], cells=cells, sweep={}, probe={}, questions={})
    said = start(config, data, tmp_path).communicate(timeout=300)[0]
    assert 'bad-seed0 failed' in said and 'multiple of head_dim=7' in said
    assert '1 cells failed: bad-seed0' in said and 'Traceback' not in said
    assert [r['cell'] for r in table(tmp_path, 'cells')] == ['good']
    assert json.loads((tmp_path / 'results' / 'study.json').read_text())['missing'] == ['bad-seed0']


@pytest.mark.parametrize('changes,message', [
    (dict(seed=[0]), "unknown key 'seed'.*seeds"),
    (dict(seeds=[]), 'seeds is missing'),
    (dict(cells=[1]), 'cells must be a dict'),
    (dict(cells=dict(a=dict(epochs=1))), "cell 'a' needs a mapping with its model"),
    (dict(sweep={}, probe={}, cells=dict(a=dict(model='resnet18_ptt'))), "unknown model 'resnet18_ptt'.*resnet18_pst"),
    (dict(sweep={}, probe={}, cells=dict(a=dict(model='resnet18', epoch=1))), "cell a: unknown key 'epoch'.*epochs"),
    (dict(sweep=dict(cells=['ps'], topk=[1], img_size=[32])), "sweep names an unknown cell 'ps'.*pst"),
    (dict(sweep=dict(cells=['pst'], topk=[1])), 'sweep needs cells, img_size, topk'),
    (dict(probe=dict(cells=['pst'], classes=['class0'])), 'classes it was not trained on; it saw class0'),
    (dict(classes=['class0', 'class9']), "no class 'class9'.*class4"),
    (dict(classes=dict(every=3)), 'classes must be names'),
    (dict(classes=dict(first=0, step=0)), 'classes must be names'),
    (dict(classes=dict(first=9, step=1)), 'are none of the 5 in the data'),
    (dict(seeds=[0, 0]), r'seeds must be different whole numbers, got \[0, 0\]'),
    (dict(seeds=['one']), 'seeds must be different whole numbers'),
    (dict(name='../toy'), "'../toy' is no name for a folder"),
    (dict(cells={'a/b': dict(model='resnet18')}), "'a/b' is no name for a folder"),
    (dict(cells={'a b': dict(model='resnet18')}), "'a b' is no name for a folder"),
    (dict(train=[1]), 'train must be a dict'),
    (dict(train=dict(SHARED, seed=3)), 'train: leave out seed, which the study gives'),
    (dict(cells=dict(a=dict(model='resnet18', resume='auto')), sweep={}, probe={}), 'cell a: leave out resume'),
    (dict(train=dict(SHARED, val_split='')), 'val_split is empty'),
    (dict(sweep=dict(cells=['plain'], topk=[1], img_size=[32])), 'test_resnet of plain has none'),
    (dict(sweep=dict(cells=['pst'], topk=[1], img_size=96)), 'img_size must be a list of whole numbers from 1 on'),
    (dict(sweep=dict(cells='pst', topk=[1], img_size=[96])), 'sweep: cells must be a list'),
    (dict(sweep=dict(cells=[['pst']], topk=[1], img_size=[96])), 'sweep: cells must be a list of names'),
    (dict(sweep=dict(cells=[], topk=[1], img_size=[96])), 'sweep: cells are none'),
    (dict(sweep=dict(cells=['pst'], topk=[], img_size=[96])), 'sweep: topk must be a list'),
    (dict(sweep=dict(cells=['pst'], topk=[1, 1], img_size=[96])), 'sweep: topk must be different numbers'),
    (dict(sweep=dict(cells=['pst'], topk=[1], img_size=[10 ** 9])), 'sweep: img_size must be different numbers up to'),
    (dict(seeds=[True]), 'seeds must be different whole numbers'),
    (dict(seeds=[10 ** 12]), 'seeds must be different whole numbers'),
    (dict(seeds=list(range(9999))), '2 cells with 9999 seeds are 19,998 runs'),
    (dict(seeds=[]), 'seeds is missing'),
    (dict(cells={}), 'cells is missing'),
    (dict(name=7), 'name must be a str, got 7'),
    (dict(name='x' * 300), 'has 300 letters'),
    (dict(title='a\nb'), 'title must be one line of text'),
    (dict(cells={'..': dict(model='resnet18')}), "'..' is no name for a folder"),
    (dict(cells={'a': dict(model='resnet18'), 'A': dict(model='resnet18')}), 'A and a are one folder'),
    (dict(cells={5: dict(model='resnet18')}), '5 is no name for a folder'),
    (dict(cells=dict(a=None)), "cell 'a' needs a mapping with its model"),
    (dict(cells=dict(a=dict(model=5)), sweep={}, probe={}, questions={}), 'cell a: model must be a text'),
    (dict(cells=dict(a={'model': 'resnet18', 7: 1}), sweep={}, probe={}), "cell 'a': 7 is no flag"),
    (dict(train=dict(SHARED, train_split=5)), 'train: train_split must be a text'),
    (dict(train={**SHARED, 1: 2}), 'train: 1 is no flag'),
    (dict(questions={1: 'why'}), 'question 1 needs a mapping with its title'),
    (dict(questions={1: dict(title='?', kind='guess')}), "question 1: kind must be one of compare"),
    (dict(questions={1: dict(title='?', kind='compare', of='pst', against='plain')}), "with a list 'against'"),
    (dict(questions={1: dict(title='?', kind='compare', of='pst', against=['plane'])}), 'Did you mean plain'),
    (dict(questions=None), 'questions must be a dict'),
    (dict(classes=[['class0']]), 'The data has no class'),
    (dict(probe=dict(cells=['pst'])), 'probe needs cells, classes'),
])
def test_mistakes_in_the_configuration(data, tmp_path, capsys, changes, message):
    assert main(words(write_config(tmp_path, **changes), data, tmp_path)) == 1
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert not (tmp_path / 'output').exists()


def test_missing_data_and_configuration(data, tmp_path, capsys):
    config = write_config(tmp_path)
    assert main(words(config, tmp_path / 'nowhere', tmp_path)) == 1
    assert '--data-dir must name the folder' in capsys.readouterr().err
    assert main(words(tmp_path / 'no.yaml', data, tmp_path)) == 1
    assert 'Cannot read the config' in capsys.readouterr().err
    config.write_text('name: [')
    assert main(words(config, data, tmp_path)) == 1
    assert 'not valid YAML' in capsys.readouterr().err


class TestBeforeTheFirstCell:
    """What would lose hours later is said at once."""

    def refused(self, capsys, folder, *args):
        assert main(words(*args)) == 1
        said = capsys.readouterr().err
        assert not list(folder.glob('output/toy/*/cell.log')) and 'Traceback' not in said
        return said

    def test_no_scikit_learn_for_the_probe(self, data, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, 'sklearn', None)
        config = write_config(tmp_path)
        assert "pip install 'pst_timm[demo]'" in self.refused(capsys, tmp_path, config, data, tmp_path)
        said = self.refused(capsys, tmp_path, config, data, tmp_path, '--cell', 'pst-seed0')
        assert 'needs scikit-learn' in said

    def test_no_gpu(self, data, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr('torch.cuda.device_count', lambda: 1)
        config = write_config(tmp_path)
        for device, message in (('cuda:1', 'torch sees 1 GPUs'), ('gpu', '--device gpu cannot be used here')):
            assert message in self.refused(capsys, tmp_path, config, data, tmp_path, '--device', device)
        monkeypatch.setattr('torch.cuda.device_count', lambda: 0)
        assert 'torch sees 0 GPUs' in self.refused(capsys, tmp_path, config, data, tmp_path, '--device', 'cuda')

    def test_the_same_study_at_work(self, data, tmp_path, capsys):
        config = write_config(tmp_path)
        (tmp_path / 'output' / 'toy').mkdir(parents=True)
        with locked(tmp_path / 'output' / 'toy' / 'study.lock'):
            assert 'already at work in' in self.refused(capsys, tmp_path, config, data, tmp_path)

    def test_an_output_that_cannot_be_written(self, data, tmp_path, capsys):
        config = write_config(tmp_path)
        (tmp_path / 'output').write_text('a file')
        assert 'Make room, or mend the permissions' in self.refused(capsys, tmp_path, config, data, tmp_path)

    @pytest.mark.parametrize('text', [
        b'<<<<<<< HEAD\ncell,seed\n', b'cell,seed\npst\n', b'cell,seed\npst,0,1\n', b'cell,seed\npst,x\n',
        b'\xff\xfe\n1'])
    def test_garbled_results(self, data, tmp_path, capsys, text):
        config = write_config(tmp_path)
        (tmp_path / 'results').mkdir()
        (tmp_path / 'results' / 'curves.csv').write_bytes(text)
        assert 'curves.csv is garbled: restore it' in self.refused(capsys, tmp_path, config, data, tmp_path)
        assert (tmp_path / 'results' / 'curves.csv').read_bytes() == text

    @pytest.mark.parametrize('changes, what', [
        (dict(cells={'other': {'model': 'test_resnet'}}), 'no cell of this study'),
        (dict(train=dict(TOY['train'], lr=0.1)), 'trained with other settings')])
    def test_results_of_another_study_of_that_name(self, done, data, tmp_path, capsys, changes, what):
        folder, *_ = done
        shutil.copytree(folder / 'results', tmp_path / 'results')
        before = (tmp_path / 'results' / 'cells.csv').read_bytes()
        config = write_config(tmp_path, **{**changes, 'sweep': {}, 'probe': {}, 'questions': {}})
        assert what in self.refused(capsys, tmp_path, config, data, tmp_path)
        assert (tmp_path / 'results' / 'cells.csv').read_bytes() == before

    @pytest.mark.parametrize('text', ['{"settings": ', '[]', '{"settings": {}}'])
    def test_a_damaged_record(self, data, tmp_path, capsys, text):
        config = write_config(tmp_path)
        path = tmp_path / 'output' / 'toy' / 'pst-seed0' / 'cell.json'
        path.parent.mkdir(parents=True)
        path.write_text(text)
        for more in ((), ('--list',), ('--cell', 'pst-seed0')):
            assert f'{path} is damaged: remove it' in self.refused(capsys, tmp_path, config, data, tmp_path, *more)

    def test_a_cell_begun_with_other_settings(self, data, tmp_path, capsys):
        config = write_config(tmp_path)
        cell = read_study(str(config), str(data)).cells[0]
        folder = tmp_path / 'output' / 'toy' / cell.id
        folder.mkdir(parents=True)
        (folder / 'settings.json').write_text(json.dumps(cell.settings))
        assert not finished(cell, folder.parent)
        # where it runs and what it writes does not matter
        other = dict(TOY['train'], workers=3, channels_last=False, checkpoint_hist=1)
        [same, *_] = read_study(str(write_config(tmp_path, train=other)), str(data)).cells
        assert same.train != cell.train and not finished(same, folder.parent)
        changed = write_config(tmp_path, train=dict(TOY['train'], lr=0.1))
        said = self.refused(capsys, tmp_path, changed, data, tmp_path)
        assert f'{folder} was run with other settings' in said

    @pytest.mark.parametrize('jobs', ['-1', 'all', '1.5'])
    def test_jobs(self, data, tmp_path, capsys, jobs):
        with pytest.raises(SystemExit):
            main(words(write_config(tmp_path), data, tmp_path, f'--jobs={jobs}'))
        assert f"expected a whole number of at least 0, got '{jobs}'" in capsys.readouterr().err


@pytest.mark.parametrize('more', [(), ('--of-study',)])
def test_a_cell_alone_does_not_look_at_its_input(data, tmp_path, monkeypatch, more):
    """A batch system gives it none; within a study, the end of the input is the end of the study."""
    calls = []
    monkeypatch.setattr(study_runner, 'stop_with_parent', lambda: calls.append('stops with its parent'))
    monkeypatch.setattr(study_runner, 'run_cell', lambda *args: calls.append('runs'))
    assert main(words(write_config(tmp_path), data, tmp_path, '--cell', 'plain-seed1', *more)) == 0
    assert calls == (['stops with its parent', 'runs'] if more else ['runs'])


def test_flags_that_the_configuration_leaves_out(data, tmp_path, monkeypatch):
    train = {k: v for k, v in TOY['train'].items() if k not in ('batch_size', 'val_split')}
    cell = read_study(str(write_config(tmp_path, train=train)), str(data)).cells[0]
    evaluated = []
    monkeypatch.setattr(study_cell, 'train', lambda args: None)
    monkeypatch.setattr(study_cell, 'evaluate_cell', lambda *args: evaluated.append(args) or [{}])
    monkeypatch.setattr(study_cell, 'describe', lambda *args: {})
    monkeypatch.setattr(study_cell, 'read_csv', lambda path: [])
    study_cell.run_cell(cell, str(data), tmp_path)
    _, settings, folder = evaluated[0]
    flags = study_cell.evaluation_settings(settings, folder)
    assert (flags['split'], flags['batch_size'], settings['train_split']) == ('validation', 128, 'train')
    assert (flags['img_size'], flags['channels_last'], flags['num_classes']) == (32, True, 3)
    assert Path(flags['class_map']).read_text().split() == cell.classes
    assert json.loads((folder / 'settings.json').read_text()) == cell.settings and finished(cell, tmp_path)


def test_the_sentence_names_every_length_of_training(done, data):
    study = read_study(str(done[1]), str(data))
    rows = table(done[0], 'cells')
    assert ', 32 px, 3 epochs, seeds 0, 1; float32, ' in describe(study, rows)
    assert ', 3 or 9 epochs, ' in describe(study, [*rows[:2], *(dict(r, epochs='9') for r in rows[2:])])


def test_cells_read_a_copy_of_the_configuration(done):
    folder, config, *_ = done
    assert (folder / 'output' / 'toy' / 'study.yaml').read_text() == config.read_text()


def test_classes():
    folders = list('abcdefg')
    assert choose_classes(None, folders) == folders
    assert choose_classes(dict(first=1, step=3), folders) == ['b', 'e']
    assert choose_classes({'except': dict(first=1, step=3)}, folders) == ['a', 'c', 'd', 'f', 'g']
    assert choose_classes(['g', 'a'], folders) == ['a', 'g']
    with pytest.raises(PSTError, match="got 'all'"):
        choose_classes('all', folders)


def test_slots(monkeypatch):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3,5')
    assert [s.environment['CUDA_VISIBLE_DEVICES'] for s in make_slots('cuda', 0, 9)] == ['3', '5']
    assert [s.environment['CUDA_VISIBLE_DEVICES'] for s in make_slots('cuda', 4, 9)] == ['3', '5', '3', '5']
    assert len(make_slots('cuda', 0, 1)) == 1
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', 'GPU-1a, GPU-2b,')
    assert [s.environment['CUDA_VISIBLE_DEVICES'] for s in make_slots('cuda', 0, 9)] == ['GPU-1a', 'GPU-2b']
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
    assert [s.environment['CUDA_VISIBLE_DEVICES'] for s in make_slots('cuda', 0, 9)] == ['0', '1']
    assert [(s.device, s.environment) for s in make_slots('cuda:1', 0, 9)] == [('cuda:1', {})]
    cores = len(os.sched_getaffinity(0))
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    assert [s.environment['OMP_NUM_THREADS'] for s in make_slots('cpu', 1, 9)] == [str(cores)]
    assert len(make_slots('cpu', 0, 1000)) == cores
    monkeypatch.setenv('OMP_NUM_THREADS', '7')
    assert make_slots('cpu', 1, 9)[0].environment['OMP_NUM_THREADS'] == '7'


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_protocols(path, tmp_path):
    """The protocols are complete and fair: every cell has the same recipe but for what its name says."""
    for i in range(200):
        (tmp_path / 'train' / f'n{i:03d}').mkdir(parents=True)
    study: Study = read_study(str(path), str(tmp_path))
    values = yaml.safe_load(path.read_text())
    assert study.name == path.stem
    allowed = {'model', 'model_kwargs', 'classes'}
    if path.stem == 'transfer':  # how a model starts is what it asks
        allowed |= {'pretrained', 'initial_checkpoint', 'trunk_checkpoint', 'freeze_trunk', 'linear_probe'}
    for own in values['cells'].values():
        assert set(own) <= allowed | ({'lr'} if own.get('linear_probe') else set())
    asked = [c for q in study.questions.values() for c in (q.get('of'), *q.get('against', []), *q.get('cells', []))]
    assert {c for c in asked if c} == set(values['cells'])
    suffixes = [f'-{number}' for number in values.get('shots', [])] or ['']
    assert study.names == [name + suffix for name in values['cells'] for suffix in suffixes]
    for cell in study.cells:
        assert set(cell.train) <= {f.key for _, flags in TRAIN_FLAGS for f in flags}
        assert not set(cell.probe) & set(cell.classes)
    if path.stem == 'gpu':
        assert set(study.questions) == {1, 2, 3, 4, 5} and len(study.seeds) == 3
        assert len(study.cells[0].classes) == 200 and study.cells[0].train['img_size'] >= 128
        assert study.cells[0].epochs >= 30
    elif path.stem == 'transfer':
        assert set(study.questions) == {6, 7, 8} and len(study.seeds) == 3
        assert list(values['shots']) == [10, 50, 'all'] and study.cells[0].train['img_size'] >= 128
        return
    else:
        assert {1, 2} <= set(study.questions) and len(study.seeds) == 2
        assert len(study.cells[0].classes) == 20 and study.cells[0].epochs == 15
    assert 224 in values['sweep']['img_size']


def test_progress_counts_epochs(done, data):
    folder, config, *_ = done
    cells = read_study(str(config), str(data)).cells
    assert [epochs_done(c, folder / 'output' / 'toy') for c in cells] == [3] * 4
    assert all(finished(c, folder / 'output' / 'toy') for c in cells)
    assert epochs_done(cells[0], folder) == 0 and not finished(cells[0], folder)


def test_an_unreadable_cell_name(done, data, capsys):
    folder, config, *_ = done
    assert main(words(config, data, folder, '--cell', 'pst-seed7')) == 1
    assert "no cell 'pst-seed7'" in capsys.readouterr().err
