"""Runs end well on terminals that lack letters, and before readers that go away."""
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from pst_timm.utils.streams import flush_output

RUN = 'from pst_timm.commands.common import run; import sys; sys.exit(run("pst-timm dance", work))'


def python(code, **kwargs):
    environment = {**os.environ, 'PYTHONPATH': os.getcwd(), 'OMP_NUM_THREADS': '1', **kwargs.pop('env', {})}
    environment.pop('PST_TIMM_DEBUG', None)
    return subprocess.Popen(
        [sys.executable, '-c', f'{textwrap.dedent(code)}\n{RUN}'], stderr=subprocess.PIPE, text=True, env=environment,
        **kwargs)


def test_letters_that_a_terminal_lacks_are_escaped():
    code = '''
        def work():
            print('M\\u00f6we \\u2713')
    '''
    run = python(code, stdout=subprocess.PIPE, env={'PYTHONIOENCODING': 'ascii'})
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out, err) == (0, 'M\\xf6we \\u2713\n', '')


@pytest.mark.parametrize('lines', [pytest.param(1, marks=pytest.mark.slow), 100_000])
def test_a_reader_that_goes_away_is_no_error(lines):
    read, write = os.pipe()
    os.close(read)
    run = python(f'''
        def work():
            for i in range({lines}):
                print('a line', i)
    ''', stdout=write)
    os.close(write)
    assert run.communicate(timeout=60)[1] == '' and run.returncode == 141


@pytest.mark.slow
def test_another_pipe_that_breaks_is_an_error():
    run = python('''
        def work():
            raise BrokenPipeError('a worker')
    ''', stdout=subprocess.PIPE)
    assert 'unexpected BrokenPipeError (a worker)' in run.communicate(timeout=60)[1] and run.returncode == 1


def test_the_help_for_a_reader_that_goes_away():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, '-m', 'pst_timm', 'export', '--help'], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr == '' and done.returncode == 0


def test_a_second_interruption_is_silent():
    run = python('''
        import os, signal, time

        class Slow:
            def __del__(self):  # as the process winds up
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)

        kept = Slow()

        def work():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
    ''', stdout=subprocess.PIPE)
    assert run.communicate(timeout=50)[1] == '\npst-timm dance: stopped before the end.\n'
    assert run.returncode in (130, -signal.SIGINT)


def test_streams_that_are_not_there(monkeypatch):
    monkeypatch.setattr(sys, 'stdout', None)
    assert flush_output()
