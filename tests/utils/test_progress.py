"""What is said of a job where there is no terminal."""
import io
import re
import sys

import pytest

from pst_timm.utils import progress
from pst_timm.utils.progress import Steps, duration, progress_bar


@pytest.mark.parametrize('seconds, words', [
    (0.4, '0 s'), (89, '89 s'), (90, '2 min'), (3600, '60 min'), (5400, '1.5 h')])
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_every_step_is_a_line_with_what_is_left(monkeypatch, capsys):
    now = iter([100., 110., 130., 200.])
    monkeypatch.setattr(progress.time, 'monotonic', lambda: next(now))
    with Steps('job', [1., 3., 6.]) as steps:
        steps.say('three steps')
        for result in 'abc':
            tick = steps.ticks(2)
            tick()
            tick()
            steps.done(result)
    # a tenth took 10 s, four tenths 30 s
    assert capsys.readouterr() == (
        '', 'three steps\n[1/3] a (about 2 min left)\n[2/3] b (about 45 s left)\n[3/3] c\n')


def test_a_small_beginning_gives_no_estimate(capsys):
    with Steps('job', [1., 99.]) as steps:
        steps.done('a')
    assert capsys.readouterr().err == '[1/2] a\n'


def test_silence_on_request(capsys):
    with Steps('job', [1.], enabled=False) as steps:
        steps.ticks(1)()
        steps.say('a')
        steps.done('b')
    assert capsys.readouterr() == ('', '')


def test_a_terminal_gets_a_bar_above_which_results_stand(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, 'stderr', terminal)
    with Steps('job', [1., 1.]) as steps:
        steps.ticks(1)()
        steps.done('first')
    shown = terminal.getvalue()
    assert ' 50%|' in shown and re.search(r'\[1/2\] first \(about \d+ s left\)\n', shown)
    assert list(progress_bar([1, 2], 2, 'items')) == [1, 2] and 'items' in terminal.getvalue()


def test_bars_are_for_terminals(capsys):
    assert list(progress_bar([1, 2], 2, 'items')) == [1, 2]
    assert capsys.readouterr() == ('', '')
