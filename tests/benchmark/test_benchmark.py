"""What the benchmark measures is what it says; no test looks at a time."""
import csv
import json
import sys

import pytest
import torch
from torch import nn

from pst_timm.benchmark.models import (
    Setting,
    benchmark_layers,
    benchmark_models,
    benchmark_parts,
    build,
    make_call,
    plain_attention,
    plain_twin,
)
from pst_timm.commands.benchmark import main
from pst_timm.layers import PyramidSparseAttention
from pst_timm.utils.cost import count_activations, peak_memory
from pst_timm.utils.timing import median_ratio, percentile, time_in_turn
from tests.helpers import randomize, relative_error

CPU = torch.device('cpu')


@pytest.mark.parametrize('topk', [0, 3, 1000])
@torch.no_grad()
def test_plain_formula_computes_the_same(topk):
    layer = randomize(PyramidSparseAttention(64, 2, topk=topk)).eval()
    x, upper = torch.randn(2, 64, 12, 8), torch.randn(2, 64, 6, 4)
    assert relative_error(layer(x, upper), plain_attention(layer, x, upper)) < 1e-5


def test_attention_memory_grows_linearly_and_the_plain_formula_does_not():
    rows = benchmark_layers((16, 32, 64), ((8, 'gate'), (8, 'joint')), setting=Setting(repeats=1), progress=False)
    for fusion in ('gate', 'joint'):
        ours, plain = ([r[key] for r in rows if r['fusion'] == fusion] for key in ('ours_mib', 'plain_mib'))
        # four times the queries
        assert ours[2] / ours[1] < 4.5
        assert plain[2] / plain[1] > 10


def test_layers_are_measured_in_the_dtype_asked_for():
    memory = {
        dtype: benchmark_layers((32,), ((0, 'gate'),), setting=Setting(repeats=1, dtype=dtype), progress=False)
        for dtype in (torch.float32, torch.float64)}
    assert memory[torch.float64][0]['plain_mib'] > 1.9 * memory[torch.float32][0]['plain_mib']


def test_plain_formula_is_left_out_where_it_would_not_fit():
    row, = benchmark_layers(
        (16,), ((0, 'gate'),), setting=Setting(repeats=1), max_plain_bytes=16, progress=False)
    assert row['plain_ms'] is None and row['speedup'] is None and row['ours_ms'] > 0


def test_calls_run_in_turn():
    order = []
    times = time_in_turn({'a': lambda: order.append('a'), 'b': lambda: order.append('b')}, repeats=3, warmup=1)
    assert order == ['a', 'b'] * 4
    assert len(times['a']) == len(times['b']) == 3
    assert median_ratio([2., 9., 4.], [1., 3., 4.]) == 2.
    assert percentile([1., 2., 3.], 50) == 2. and percentile([0., 10.], 90) == pytest.approx(9.)


def test_peak_memory_counts_what_a_call_holds():
    size = 2 ** 20
    one = peak_memory(lambda: torch.empty(size), CPU)
    two = peak_memory(lambda: [torch.empty(size), torch.empty(size)], CPU)
    assert one == 4 * size and two == 8 * size


def test_activations_of_known_layers():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    assert count_activations(lambda: net(torch.zeros(1, 3, 4, 4))) == 8 * 16 + 5


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
        'test_resnet_pst', Setting(batch_size=1, img_size=64, repeats=1, reparam=True), progress=False)}
    top = ['layer1', 'layer2', 'layer3', 'layer4', 'pst', 'fuse_down', 'fuse_merge', 'conv_head', 'fc']
    stem = 1 - sum(rows[part]['gmacs'] for part in top) / rows['whole model']['gmacs']
    assert 0 < stem < 0.6  # all but the stem is listed
    assert rows['pst.blocks.0.attn.q']['gmacs'] == pytest.approx(32 * 32 * 16 / 1e9)
    assert rows['pst.blocks.0.attn']['gmacs'] > sum(
        rows[f'pst.blocks.0.attn.{part}']['gmacs'] for part in ('q', 'kv', 'pe', 'proj'))


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


def test_command_writes_csv_json_and_picture(tmp_path, capsys):
    accuracy = tmp_path / 'results.csv'
    accuracy.write_text('model,top1\ntest_resnet_pst,97.5\n')
    assert main([
        'test_resnet_pst', '-b', '1', '--img-size', '64', '--repeats', '1', '--device', 'cpu', '--reparam',
        '--results-file', str(accuracy), '--output', str(tmp_path / 'out')]) == 0
    assert 'latency_ratio' in capsys.readouterr().out
    with open(tmp_path / 'out' / 'benchmark.csv', newline='') as f:
        assert [row['top1'] for row in csv.DictReader(f)] == ['', '97.5']
    assert len(json.loads((tmp_path / 'out' / 'benchmark.json').read_text())['rows']) == 2
    assert (tmp_path / 'out' / 'benchmark.png').read_bytes().startswith(b'\x89PNG')


def test_without_matplotlib_the_figures_are_still_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    argv = ['test_resnet_pst', '-b', '1', '--img-size', '64', '--repeats', '1', '--device', 'cpu']
    assert main([*argv, '--output', str(tmp_path)]) == 0
    assert 'No picture' in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ['benchmark.csv', 'benchmark.json']


@pytest.mark.parametrize('argv, message', [
    (['resnt50_pst'], 'Did you mean resnet50_pst'),
    (['resnet50_pst', '--baselines', 'resnet50', 'resnet18'], 'give one for each'),
    (['resnet50'], 'has no plain twin'),
    (['--parts'], 'needs the models'),
    (['--layers', '--sizes', '15'], 'must be even'),
    (['resnet50_pst', '--reparam', '--train'], '--train needs'),
    (['resnet50_pst', '--repeats', '0'], 'at least 1'),
    (['resnet50_pst', '--img-size', '0'], 'at least 1'),
    (['resnet50_pst', '--topk', '-1'], 'must not be negative, got -1'),
    (['resnet50_pst', '--device', 'abacus'], '--device abacus cannot be used here'),
    (['resnet50_pst', '--results-file', 'nowhere.csv'], 'nowhere.csv'),
    (['resnet50_pst', '--results-file', __file__], 'must have the columns'),
    (['resnet50_pst', '--output', f'{__file__}/folder'], 'Not a directory'),
    (['resnet50_pst', '--layers'], 'models has no say in the benchmark of layers'),
    (['--layers', '--compile'], 'compile has no say in the benchmark of layers'),
    (['resnet50_pst', '--parts', '--train'], 'train has no say in the benchmark of parts'),
    (['--batch-size', '4'], 'batch-size has no say in the benchmark of figures'),
])
def test_mistakes_are_explained(argv, message, capsys):
    with pytest.raises(SystemExit) as e:
        main(argv)
    assert e.value.code == 2
    assert message in capsys.readouterr().err


def test_twins():
    assert plain_twin('resnet101_pst') == 'resnet101'
    with pytest.raises(ValueError, match='no plain twin'):
        plain_twin('resnet50')
