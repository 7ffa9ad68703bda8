"""What the benchmark of the necks says; no test looks at a time."""
from itertools import pairwise

import pytest
import torch

from pst_timm.benchmark import Setting, benchmark_necks
from pst_timm.benchmark.necks import NECKS
from pst_timm.layers import PANPyramid, PSTPyramid
from pst_timm.utils.errors import PSTError

ATTENDING = [part for part in NECKS if part.startswith('PST')]


@pytest.fixture(scope='module')
def rows():
    setting = Setting(batch_size=1, repeats=1, reparam=True)
    rows = benchmark_necks([('test_resnet', 64)], (128, 256), setting, progress=False)
    return {(row['px'], row['part']): row for row in rows}


def test_a_row_for_the_trunk_and_each_neck(rows):
    assert list(rows) == [(px, part) for px in (128, 256) for part in ('trunk', *NECKS)]
    assert all(row['trunk'] == 'test_resnet' and row['width'] == 64 and row['ms'] > 0 for row in rows.values())
    assert all(rows[px, 'PAN']['over_pan'] == 1 for px in (128, 256))


def test_what_is_counted(rows):
    in_chs, tokens = (48, 192, 96), (256, 64, 16)
    for part, neck in (('PAN', PANPyramid(in_chs, 64)), ('PST', PSTPyramid(in_chs, 64))):
        assert rows[128, part]['params_m'] == pytest.approx(sum(p.numel() for p in neck.parameters()) / 1e6)
    lateral = sum(c * 64 * n for c, n in zip(in_chs, tokens))
    threes = 9 * 64 * 64
    pan = lateral + threes * (sum(tokens) + 2 * sum(tokens[1:]))
    assert rows[128, 'PAN']['gmacs'] == pytest.approx(pan / 1e9)
    # two 32-wide products, of queries with keys and of weights with values, for a quarter of the keys
    saved = 2 * 32 * sum(n * m * 3 // 4 for n, m in pairwise(tokens))
    assert rows[128, 'PST']['gmacs'] - rows[128, 'PST, kv_pool = 2']['gmacs'] == pytest.approx(saved / 1e9)


def test_memory_of_the_necks_grows_with_the_pixels(rows):
    for part in NECKS:
        assert rows[256, part]['peak_mib'] / rows[128, part]['peak_mib'] < 4.5, part
    assert all(rows[256, part]['peak_mib'] < 3 * rows[256, 'PAN']['peak_mib'] for part in ATTENDING)


def test_one_thread_is_timed_by_its_own_time(monkeypatch):
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 1)
    monkeypatch.setattr('time.process_time', iter(range(10 ** 6)).__next__)
    found = benchmark_necks([('test_resnet', 64)], (64,), Setting(batch_size=1, repeats=1), progress=False)
    assert {row['ms'] for row in found} == {1e3}


@pytest.mark.parametrize('name, words', [
    ('no_such_model', 'no_such_model gives no three levels'),
    ('vit_tiny_patch16_224', r'at strides \[16, 16, 16\], expected 8, 16 and 32'),
])
def test_trunks_without_such_levels_are_errors(name, words):
    with pytest.raises(PSTError, match=words):
        benchmark_necks([(name, 64)], (64,), Setting(repeats=1), progress=False)
