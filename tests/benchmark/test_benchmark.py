"""What the benchmark measures is what it says; no test looks at a time."""
import csv
import json
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import pst_timm
from pst_timm.benchmark import (
    Setting,
    benchmark_figures,
    benchmark_layers,
    benchmark_models,
    benchmark_parts,
    build,
    figures,
    make_call,
    models,
    open_source,
    plain_attention,
    plain_twin,
    setting,
)
from pst_timm.benchmark.models import Source
from pst_timm.checkpoints import load_model
from pst_timm.commands.benchmark import main
from pst_timm.layers import PyramidSparseAttention
from pst_timm.models.resnet_pst import WEIGHTS
from pst_timm.utils.errors import PSTError
from tests.helpers import randomize, relative_error

DIGITS = WEIGHTS / 'test_resnet_pst.digits.safetensors'
SMALL = ['-b', '1', '--img-size', '64', '--repeats', '1', '--device', 'cpu']


@pytest.mark.parametrize('topk', [0, 3, 1000])
@torch.no_grad()
def test_plain_formula_computes_the_same(topk):
    layer = randomize(PyramidSparseAttention(64, 2, topk=topk)).eval()
    x, upper = torch.randn(2, 64, 12, 8), torch.randn(2, 64, 6, 4)
    assert relative_error(layer(x, upper), plain_attention(layer, x, upper)) < 1e-5


def test_attention_memory_grows_linearly_and_the_plain_formula_does_not():
    # batch and channels scale both sides alike
    setting = Setting(batch_size=2, repeats=1)
    rows = benchmark_layers((32, 64), ((8, 'gate'), (8, 'joint')), dim=64, setting=setting, progress=False)
    for fusion in ('gate', 'joint'):
        ours, plain = ([r[key] for r in rows if r['fusion'] == fusion] for key in ('ours_mib', 'plain_mib'))
        # four times the queries
        assert ours[1] / ours[0] < 4.5
        assert plain[1] / plain[0] > 10


def test_layers_are_measured_in_the_dtype_asked_for():
    memory = {
        dtype: benchmark_layers((32,), ((0, 'gate'),), setting=Setting(repeats=1, dtype=dtype), progress=False)
        for dtype in (torch.float32, torch.float64)}
    assert memory[torch.float64][0]['plain_mib'] > 1.9 * memory[torch.float32][0]['plain_mib']


def test_plain_formula_is_left_out_where_it_would_not_fit():
    row, = benchmark_layers(
        (16,), ((0, 'gate'),), setting=Setting(repeats=1), max_plain_bytes=16, progress=False)
    assert row['plain_ms'] is None and row['speedup'] is None and row['ours_ms'] > 0


@pytest.mark.parametrize('train', [False, True])
def test_rows_of_a_pair(train):
    setting = Setting(batch_size=2, img_size=64, repeats=2, train=train, channels_last=True)
    plain, pst = benchmark_models([('test_resnet_pst', 'test_resnet')], setting, progress=False)
    assert (plain['model'], pst['model']) == ('test_resnet', 'test_resnet_pst')
    assert plain['latency_ratio'] is None and pst['latency_ratio'] > 0
    assert pst['macs_ratio'] == pytest.approx(pst['gmacs'] / plain['gmacs']) and pst['macs_ratio'] > 1
    assert pst['params_m'] == pytest.approx(0.692456)
    assert 'top1' not in pst and pst['peak_mib'] > 0


def test_parts_add_up():
    rows = {r['part']: r for r in benchmark_parts(
        ['test_resnet_pst'], Setting(batch_size=1, img_size=64, repeats=1, reparam=True), progress=False)}
    top = ['layer1', 'layer2', 'layer3', 'layer4', 'pst', 'fuse_down', 'fuse_merge', 'conv_head', 'fc']
    stem = 1 - sum(rows[part]['gmacs'] for part in top) / rows['whole model']['gmacs']
    assert 0 < stem < 0.6  # all but the stem is listed
    assert rows['pst.blocks.0.attn.q']['gmacs'] == pytest.approx(32 * 32 * 16 / 1e9)
    assert rows['pst.blocks.0.attn']['gmacs'] > sum(
        rows[f'pst.blocks.0.attn.{part}']['gmacs'] for part in ('q', 'kv', 'pe', 'proj'))


def test_the_head_of_a_table_names_the_hardware(monkeypatch):
    monkeypatch.setattr(setting, 'hardware_name', lambda device: f'a fine {device.type}')
    assert re.search(r', a fine cpu, \d+ CPU threads, batch 8, ', Setting().describe())
    assert 'CPU' not in Setting(torch.device('cuda')).describe()


def test_settings_reach_the_model():
    setting = Setting(batch_size=1, img_size=64, reparam=True, channels_last=True, dtype=torch.bfloat16, topk=3)
    model = build('test_resnet_pst', setting)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert model.pst.blocks[0].attn.topk == 3 and model.fc.weight.dtype == torch.bfloat16
    assert model.layer4[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert make_call(model, setting)().shape == (1, 1000)


def test_a_training_step_trains():
    setting = Setting(batch_size=2, img_size=64, train=True)
    model = build('test_resnet_pst', setting)
    before = model.fc.weight.detach().clone()
    make_call(model, setting)()
    assert not torch.equal(model.fc.weight, before)


def test_a_checkpoint_tells_what_is_built():
    source = str(DIGITS)
    opened = open_source(source)
    assert opened[:3] == (source, 'test_resnet_pst', 64) and plain_twin(source) == plain_twin(opened) == 'test_resnet'
    assert open_source('test_resnet_pst') == ('test_resnet_pst', 'test_resnet_pst', 224, None)
    setting = Setting(batch_size=1, img_size=64, repeats=1)
    model = build(source, setting)
    trained = timm.create_model('test_resnet_pst', pretrained=True)
    torch.testing.assert_close(model.fc.weight, trained.fc.weight)
    assert model.pst.blocks[0].attn.topk == trained.pst.blocks[0].attn.topk
    plain, pst = benchmark_models([(source, 'test_resnet')], setting, progress=False)
    # the same classes on both sides
    expected = sum(p.numel() for p in timm.create_model('test_resnet', num_classes=10).parameters())
    assert plain['params_m'] == pytest.approx(expected / 1e6)
    assert (pst['model'], pst['params_m']) == (source, sum(p.numel() for p in trained.parameters()) / 1e6)


@pytest.mark.parametrize('flags', [[], ['--parts']], ids=['models', 'parts'])
def test_a_checkpoint_is_read_once(flags, monkeypatch):
    read = []

    def load(source, **kwargs):
        read.append(source)
        return load_model(source, **kwargs)

    monkeypatch.setattr(models, 'load_model', load)
    assert main(['--checkpoint', str(DIGITS), *flags, '-b', '1', '--repeats', '1', '--device', 'cpu']) == 0
    assert read.count(str(DIGITS)) == 1


def test_a_measurement_leaves_an_open_source_alone():
    source = open_source(str(DIGITS))
    before = {k: v.clone() for k, v in source.model.state_dict().items()}
    changed = Setting(batch_size=1, img_size=64, reparam=True, dtype=torch.bfloat16, topk=3)
    assert build(source, changed).fc.weight.dtype == torch.bfloat16
    after = source.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[k], v) for k, v in before.items())
    assert source.model.inference_settings()['topk'] == 0


def test_named_models_wait_for_no_weights(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError('weights were loaded')

    monkeypatch.setattr('timm.models._builder.load_pretrained', refuse)
    build('test_resnet_pst', Setting())


def test_command_takes_the_size_from_the_checkpoint(tmp_path, capsys):
    assert main(['--checkpoint', str(DIGITS), '-b', '1', '--repeats', '1', '--output', str(tmp_path)]) == 0
    assert ', 64 px, ' in capsys.readouterr().out
    assert ', 64 px, ' in json.loads((tmp_path / 'benchmark.json').read_text())['setting']
    assert main([str(DIGITS), 'test_resnet_pst', '--repeats', '1']) == 1
    assert 'different sizes' in capsys.readouterr().err


def test_command_writes_csv_json_and_picture(tmp_path, capsys):
    accuracy = tmp_path / 'results.csv'
    accuracy.write_text('model,top1\ntest_resnet_pst,97.5\n')
    out = str(tmp_path / 'out')
    assert main(['test_resnet_pst', *SMALL, '--reparam', '--results-file', str(accuracy), '--output', out]) == 0
    shown = capsys.readouterr()
    assert 'latency_ratio' in shown.out
    # one line as the result comes, where there is no terminal
    assert re.fullmatch(r'\[1/1\] test_resnet_pst: [\d.]+ ms a batch, [\d.]+ times test_resnet\n', shown.err)
    with open(tmp_path / 'out' / 'benchmark.csv', newline='') as f:
        assert [row['top1'] for row in csv.DictReader(f)] == ['', '97.5']
    record = json.loads((tmp_path / 'out' / 'benchmark.json').read_text())
    assert record.keys() == {'setting'} and 'batch 1, 64 px, float32, reparam, medians of 1 rounds' in record['setting']
    assert (tmp_path / 'out' / 'benchmark.png').read_bytes().startswith(b'\x89PNG')


def test_without_matplotlib_the_figures_are_still_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    assert main(['test_resnet_pst', *SMALL, '--output', str(tmp_path)]) == 0
    assert 'No picture' in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ['benchmark.csv', 'benchmark.json']


def test_layers_and_parts_by_command(tmp_path, capsys):
    argv = ['--layers', '--quick', '--sizes', '8', '--topk', '2', '--fusion', 'joint', '--output', str(tmp_path)]
    assert main(argv) == 0
    shown = capsys.readouterr()
    assert 'medians of 5 rounds' in shown.out and shown.err.startswith('[1/1] 8x8, k = 2 joint: ')
    assert main(['test_resnet_pst', '--parts', *SMALL, '--output', str(tmp_path)]) == 0
    with open(tmp_path / 'parts.csv', newline='') as f:
        assert [row['part'] for row in csv.DictReader(f)][:2] == ['whole model', 'layer1']


def stand_ins(monkeypatch):
    """The headline figures, measured on nothing."""
    seen = []

    def measure(setting, tick):
        seen.append(setting)
        tick()
        return 3., ' (MACs: 1.5)'

    stood_in = tuple(figure._replace(measure=measure) for figure in figures.FIGURES)
    monkeypatch.setattr(figures, 'FIGURES', stood_in)
    return seen


def test_headline_figures_come_one_by_one(monkeypatch, capsys):
    seen = stand_ins(monkeypatch)
    rows = benchmark_figures(Setting(repeats=3, topk=4))
    assert len(rows) == len(seen) == 10
    assert all(s.reparam and s.channels_last and s.batch_size == 8 and s.topk is None and s.repeats == 3 for s in seen)
    by_name = {row['figure']: row for row in rows}
    row = by_name['resnet50_pst over resnet50: latency (MACs: 1.5)']
    assert row == dict(figure=row['figure'], target='<= 1.07', measured=3., met='no')
    assert by_name['attention 14x14 over 7x7, k = 8 gate: times faster than the plain formula']['met'] == 'yes'
    head, *lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r'10 figures of 3 rounds: about \d+ (s|min) on two idle cores, more on a busy machine\.', head)
    assert len(lines) == 10
    assert re.fullmatch(r'\[1/10\] attention 80x80 .*: 3\.000 \(target >= 4\) \(about \d+ s left\)', lines[0])
    assert lines[-1].endswith(': 3.000 (target <= 1.08)')


def test_quick_is_a_small_set_of_few_rounds(monkeypatch, capsys):
    seen = stand_ins(monkeypatch)
    assert main(['--quick', '--device', 'cpu']) == 0
    assert len(seen) == 8 and {s.repeats for s in seen} == {5}
    shown = capsys.readouterr().out
    assert 'resnet101' not in shown and 'reparam, channels_last, medians of 5 rounds' in shown
    quick = sum(f.seconds for f in figures.FIGURES if f.quick) * seen[0].rounds
    assert quick < 0.25 * sum(f.seconds for f in figures.FIGURES) * Setting().rounds


def test_figures_are_measured(monkeypatch):
    """Each kind of figure, at a size for tests."""
    setting = Setting(batch_size=1, img_size=64, repeats=1)
    ticks = []

    def tick():
        ticks.append(1)

    assert figures._attention_speed(8, 2, 'gate', 2)(setting, tick)[0] > 0
    value, known = figures._latency('test_resnet_pst')(setting, tick)
    assert value > 0 and re.fullmatch(r' \(MACs: 1\.\d{3}\)', known)
    assert len(ticks) == 2 * setting.rounds
    monkeypatch.setattr(figures, 'attention_memory', lambda size, *args: size ** 2)
    assert figures._memory_growth(setting, tick) == (16., '')


@pytest.mark.parametrize('argv, message', [
    (['resnet50_pst', '--baselines', 'resnet50', 'resnet18'], 'give one for each'),
    (['--parts'], 'needs the models'),
    (['resnet50_pst', '--parts', '--layers'], 'exclude each other'),
    (['--layers', '--sizes', '15'], 'must be even and from 2 to 1024, got 15'),
    (['resnet50_pst', '--reparam', '--train'], '--train needs'),
    (['resnet50_pst', '--repeats', '0'], 'at least 1'),
    (['resnet50_pst', '--img-size', '0'], 'at least 1'),
    (['resnet50_pst', '--topk', '-1'], "at least 0, got '-1'"),
    (['resnet50_pst', '--fusion', 'joint'], 'no say without --topk'),
    (['resnet50_pst', '--layers'], 'models has no say in the benchmark of layers'),
    (['--layers', '--compile'], 'compile has no say in the benchmark of layers'),
    (['resnet50_pst', '--parts', '--train'], 'train has no say in the benchmark of parts'),
    (['--batch-size', '4'], 'batch-size has no say in the benchmark of figures'),
])
def test_contradictions_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as e:
        main(argv)
    assert e.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1


@pytest.mark.parametrize('argv, message', [
    (['resnt50_pst'], 'Did you mean resnet50_pst'),
    (['resnet50_pst', '--baselines', 'resnt50'], 'Did you mean resnet50'),
    (['resnet50'], 'has no plain twin'),
    (['nowhere.pth.tar'], 'nowhere.pth.tar'),
    (['resnet50_pst', '--device', 'abacus'], '--device abacus cannot be used here'),
    (['resnet50_pst', '--results-file', 'nowhere.csv'], 'nowhere.csv'),
    (['resnet50_pst', '--results-file', str(Path(__file__).parents[2] / 'results/performance/layers.csv')],
     'must have the columns'),
    (['resnet50_pst', '--output', f'{__file__}/folder'], 'Not a directory'),
])
def test_mistakes_are_explained(argv, message, capsys):
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith('pst-timm benchmark: error: ') and message in error and error.count('\n') == 1


def test_twins():
    assert plain_twin('resnet101_pst') == 'resnet101'
    model = pst_timm.create_pst('test_convnext', num_classes=3)  # whose architecture does not tell
    assert plain_twin(Source('x', 'backbone_pst', 64, model)) == 'test_convnext'
    with pytest.raises(PSTError, match='no plain twin'):
        plain_twin('resnet50')
