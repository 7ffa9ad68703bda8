"""The parts of the measurement write tables of what they were asked for, and keep the rows that are there."""
import argparse
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from pst_timm.checkpoints.folder import save_folder
from pst_timm.deploy.runtime import Deployed
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import read_csv
from scripts import deploy_artefacts, deploy_steps, deploy_table, measure_deploy
from scripts.deploy_artefacts import ONNX, Candidate, make
from scripts.deploy_steps import mean_counts
from scripts.deploy_table import Table, file_bytes
from scripts.measure_deploy import main
from tests.engine.helpers import write_images
from tests.models.helpers import build

EAGER, FOLDED, CHANNELS = 'eager float32', 'folded', 'folded, channels_last'


@pytest.fixture(autouse=True)
def no_processes(monkeypatch):
    """The peak of memory is told at once; a process for each would take seconds."""
    for module in (deploy_table, measure_deploy):
        monkeypatch.setattr(module, 'memory_of', lambda candidate, img_size: 3 * 2 ** 20)


def table_of(folder, **kwargs):
    return Table(folder, 'made-up', **{'setting': 'here', 'show': lambda row: {'name': row['row']}, **kwargs})


def test_rows_are_kept_in_their_order(tmp_path):
    table = table_of(tmp_path / 'new', order=['a', 'b'])
    for row in (dict(row='other'), dict(row='b', value=1), dict(row='a')):
        table.add(row)
    again = table_of(tmp_path / 'new', order=['a', 'b'])
    again.add(dict(row='b', value=2))
    assert read_csv(tmp_path / 'new/made-up.csv') == [{'name': 'a'}, {'name': 'b'}, {'name': 'other'}]
    found = json.loads((tmp_path / 'new/made-up.json').read_text())
    assert found == {'setting': 'here', 'rows': [{'row': 'a'}, {'row': 'b', 'value': 2}, {'row': 'other'}]}


def test_rows_of_another_setting_are_not_mixed_in(tmp_path):
    table_of(tmp_path).add(dict(row='a'))
    with pytest.raises(PSTError, match='was measured otherwise'):
        table_of(tmp_path, setting='there')


def test_files_are_made_once(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(deploy_artefacts, 'write_float', lambda model, path, size: made.append(model) or path.touch())
    for _ in range(2):
        found = make('test_resnet_pst', ONNX, tmp_path / 'files', None, pretrained=False, num_classes=2)
        assert found == Candidate(str(tmp_path / 'files/model.onnx'))
    assert [model.num_classes for model in made] == [2]


def test_sizes_are_those_of_the_files_of_a_model(tmp_path):
    info = dict(architecture='a', num_classes=2, **dict.fromkeys(
        ('mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')), input_size=(3, 8, 8))
    deployed = Deployed(lambda x: x, info)
    for name, size in (('model.onnx', 5), ('model.xml', 7), ('model.bin', 11)):
        (tmp_path / name).write_bytes(bytes(size))
    assert file_bytes(str(tmp_path / 'model.onnx'), deployed) == 5
    assert file_bytes(str(tmp_path / 'model.xml'), deployed) == 7 + 11
    assert file_bytes('resnet18', torch.nn.Linear(3, 2)) == 4 * (6 + 2)


def test_runtimes_are_compared_with_eager_and_with_the_plain_twin(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_deploy, 'SIZE', (3, 64, 64))
    def times(models, size, batch, rounds):
        assert list(models) == [(m, r) for m in ('test_resnet_pst', 'test_resnet') for r in (EAGER, FOLDED)]
        assert size == (3, 64, 64) and rounds == 2
        return dict(zip(models, ([8. * batch] * 2, [2. * batch] * 2, [4. * batch] * 2, [1.6 * batch] * 2)))
    monkeypatch.setattr(measure_deploy, 'time_models', times)
    assert main([
        'runtimes', '--models', 'test_resnet_pst', '--runtimes', EAGER, FOLDED, '--rounds', '2', '--output',
        str(tmp_path / 'out'), '--work', str(tmp_path / 'work')]) == 0
    rows = read_csv(tmp_path / 'out/runtimes.csv')
    assert [(r['runtime'], r['times faster, batch 1'], r['times faster, batch 8'], r['ms an image']) for r in rows] == [
        (EAGER, '1.00', '1.00', '8000.00'), (FOLDED, '4.00', '4.00', '2000.00')]
    assert {(r['memory (MiB)'], r['energy (J)'], r['M parameters']) for r in rows} <= {('3', 'not measurable', '0.69')}
    rows = read_csv(tmp_path / 'out/twins.csv')
    assert [(r['twin'], r['latency, batch 1'], r['latency, batch 8']) for r in rows] == [
        ('test_resnet', '2.000', '2.000'), ('test_resnet', '1.250', '1.250')]
    assert '64 px' in json.loads((tmp_path / 'out/twins.json').read_text())['setting']


def test_pruned_models_are_compared_with_the_whole_one(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_deploy, 'SIZE', (3, 64, 64))
    cuts = [(0., '-', 0), (0.4, 'uniform', 32)]

    def smaller(source, ratio, folder, options, **kwargs):
        assert (source, ratio) == ('test_resnet_pst', 0.4)
        assert options == dict(scope='uniform', round_to=32) and kwargs == dict(pretrained=False)
        save_folder(build('test_resnet_pst', pst_depth=0), folder)
        return str(folder)
    monkeypatch.setattr(measure_deploy, 'pruned', smaller)

    def times(models, size, batch, rounds):
        assert list(models) == [(cut, r) for cut in cuts for r in (EAGER, FOLDED)]
        return dict(zip(models, ([8.] * 2, [6.] * 2, [4.] * 2, [2.] * 2)))
    monkeypatch.setattr(measure_deploy, 'time_models', times)
    assert main([
        'pruned', '--models', 'test_resnet_pst', '--ratios', '0.4', '--scopes', 'uniform', '--round-to', '32',
        '--runtimes', EAGER, FOLDED, '--output', str(tmp_path / 'out'), '--work', str(tmp_path / 'work')]) == 0
    rows = read_csv(tmp_path / 'out/pruned.csv')
    told = [(r['removed'], r['runtime'], r['times faster, batch 1'], r['than whole in it, batch 1']) for r in rows]
    assert told == [
        ('0%', EAGER, '1.00', '1.00'), ('0%', FOLDED, '1.33', '1.00'), ('40%', EAGER, '2.00', '2.00'),
        ('40%', FOLDED, '4.00', '3.00')]
    assert float(rows[2]['M parameters']) < float(rows[0]['M parameters'])


def test_a_cascade_counts_what_its_images_meet():
    parts = [dict(params=1, gmacs=1.), dict(params=2, gmacs=4.), dict(params=4, gmacs=10.)]
    assert mean_counts(parts[:1], [1.]) == parts[0]
    assert mean_counts(parts, [0.5, 0.3, 0.2]) == dict(params=7, gmacs=pytest.approx(1 + 0.5 * 4 + 0.2 * 10))


def few_digits(folder, split):
    """Sixty digits as the reader sees them, and their labels."""
    digits = load_digits()
    images = torch.from_numpy(digits.images[:60]).float()[:, None] / 16
    images = F.interpolate(images, (64, 64), mode='bicubic').clamp(0, 1).expand(-1, 3, -1, -1)
    return (images - 0.45) / 0.225, torch.from_numpy(digits.target[:60])


def test_the_reader_is_read_in_each_attention(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure_deploy, 'digit_images', few_digits)
    words = ['digits', '--runtimes', EAGER, FOLDED, '--draws', '2', '--output', str(tmp_path / 'out')]
    assert main([*words, '--work', str(tmp_path / 'work')]) == 0
    rows = read_csv(tmp_path / 'out/digits.csv')
    assert [(r['attention'], r['runtime']) for r in rows] == [
        (attention, runtime) for attention in measure_deploy.ATTENTION for runtime in (EAGER, FOLDED)]
    for r in rows:
        # the noise takes some points, and not most
        assert 75 < float(r['top-1 (%)']) < 100 and r['over eager float32'] == '+0.00'
        assert r['same answer (%)'] == '100.00'
    assert len({r['ECE'] for r in rows}) == 3  # the attention is set
    with pytest.raises(SystemExit):
        main(['digits', '--runtimes', FOLDED])
    assert "begins with 'eager float32'" in capsys.readouterr().err


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A model of three classes, and images of them."""
    folder = tmp_path_factory.mktemp('trained')
    save_folder(build('test_resnet_pst', num_classes=3), folder / 'model', ['class0', 'class1', 'class2'])
    return folder / 'model', write_images(folder / 'data', {'train': 4, 'validation': 10})


@pytest.fixture
def words(trained, tmp_path):
    model, data = trained
    return ['weights', str(model), '--data-dir', str(data), '--img-size', '64', '--rounds', '1', '--images', '4',
            '--output', str(tmp_path / 'out'), '--work', str(tmp_path / 'work')]


def parsed(words):
    parser = argparse.ArgumentParser()
    deploy_steps.add_flags(parser)
    for flag in ('--output', '--work'):
        parser.add_argument(flag, type=Path)
    parser.add_argument('--rounds', type=int)
    return parser.parse_args(words[1:])


def test_steps_are_measured_once_each(words, tmp_path, monkeypatch, capsys):
    measured = []
    real = deploy_steps.accuracy_of
    monkeypatch.setattr(deploy_steps, 'accuracy_of', lambda c, shop: measured.append(c.source) or real(c, shop))
    assert main([*words, '--rows', FOLDED]) == 0
    assert len(measured) == 2
    assert main([*words, '--rows', FOLDED, CHANNELS]) == 0
    assert len(measured) == 3
    rows = read_csv(tmp_path / 'out/steps.csv')
    assert [r['model'] for r in rows] == [EAGER, FOLDED, CHANNELS]
    assert len({r['top-1 (%)'] for r in rows}) == len({r['95%'] for r in rows}) == 1
    assert rows[0]['times faster, batch 1'] == '1.00' and rows[0]['over the first'] == '-'
    assert rows[1]['over the first'].startswith('+0.00 (-')
    assert main([*words, '--rows', FOLDED, '--again']) == 0
    assert len(measured) == 5
    capsys.readouterr()
    assert main([*words, '--rows', FOLDED, '--images', '3']) == 1
    assert 'was measured otherwise' in capsys.readouterr().err


def test_what_was_made_elsewhere_is_taken(words, trained, tmp_path):
    assert main([*words, '--rows', 'pruned 50%', '--artefact', f'pruned 50%={trained[0]}']) == 0
    rows = read_csv(tmp_path / 'out/steps.csv')
    assert [r['model'] for r in rows] == [EAGER, 'pruned 50%']
    assert rows[0]['GMACs'] == rows[1]['GMACs'] and not (tmp_path / 'work/pruned-50').exists()


def test_files_of_checkpoints_of_one_name_are_kept_apart(words, monkeypatch):
    places = []
    monkeypatch.setattr(deploy_steps, 'make', lambda source, runtime, folder, *rest: places.append(folder))
    shop = deploy_steps.Workshop(parsed(words))
    for source in ('a/last.pth.tar', 'b/last.pth.tar', 'a/last.pth.tar'):
        shop.in_runtime(ONNX, source)
    assert places[0] == places[2] != places[1]


@pytest.mark.parametrize('more', [['--rows', 'none such'], ['--artefact', 'none such=file']])
def test_rows_that_there_are_not_are_told(words, more, capsys):
    assert main([*words, *more]) == 1
    assert "There is no row 'none such': the rows are eager float32; folded;" in capsys.readouterr().err
