"""Calls are timed in turn; no test looks at a time."""
import pytest

from pst_timm.utils import timing
from pst_timm.utils.timing import median_ratio, percentile, time_in_turn


def test_calls_run_in_turn():
    order, ticks = [], []
    times = time_in_turn(
        {'a': lambda: order.append('a'), 'b': lambda: order.append('b')}, repeats=3, warmup=1,
        tick=lambda: ticks.append(len(order)))
    assert order == ['a', 'b'] * 4 and ticks == [2, 4, 6, 8]
    assert len(times['a']) == len(times['b']) == 3


def test_times_are_those_of_the_timed_rounds(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(timing.time, 'perf_counter', lambda: next(clock) ** 2)
    assert time_in_turn({'a': lambda: None}, repeats=2, warmup=1) == {'a': [9 - 4, 25 - 16]}


def test_ratios_are_paired():
    assert median_ratio([2., 9., 4.], [1., 3., 4.]) == 2.
    assert percentile([1., 2., 3.], 50) == 2. and percentile([0., 10.], 90) == pytest.approx(9.)


def test_lead_ins_are_not_timed(monkeypatch):
    clock, calls = iter(range(100)), []
    monkeypatch.setattr(timing.time, 'perf_counter', lambda: next(clock))
    times = time_in_turn({name: lambda name=name: calls.append(name) for name in 'ab'}, 2, warmup=0, lead_in=1)
    assert calls == [*'aabb'] * 2 and times == {'a': [1, 1], 'b': [1, 1]}
