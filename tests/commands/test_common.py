"""How all commands parse and end."""
import argparse
import re
from pathlib import Path

import pytest

from pst_timm.checkpoints import conversion
from pst_timm.commands import common
from pst_timm.commands.common import (
    ArgumentParser,
    add_attention_flags,
    add_ema_flag,
    add_output,
    add_source,
    at_least,
    run,
)
from pst_timm.layers import attention
from pst_timm.utils.errors import Interrupted, PSTError, Unavailable


def parser():
    parser = ArgumentParser(prog='pst-timm dance')
    add_source(parser)
    add_ema_flag(parser)
    add_attention_flags(parser)
    add_output(parser)
    parser.add_argument('--count', type=at_least(1), default=2)
    parser.add_argument('--secret', action='store_true', help=argparse.SUPPRESS)
    return parser


@pytest.mark.parametrize('argv, message', [
    (['x', '--outputt', 'y'], "unknown argument '--outputt'. Did you mean --output? See pst-timm dance --help."),
    (['x', '--topk=1', '--use-em'], "unknown argument '--use-em'. Did you mean --use-ema? See pst-timm dance --help."),
    (['x', '--outpu', 'y'], "unknown argument '--outpu'. Did you mean --output? See pst-timm dance --help."),
    (['x', '--secrets'], "unknown argument '--secrets'. See pst-timm dance --help."),
    (['x', 'y'], "unknown argument 'y'. See pst-timm dance --help."),
    (['x', '--fusion', 'gates'], 'argument --fine-fusion/--fusion: expected one of gate, joint, got \'gates\'. '
                                 'Did you mean gate?'),
    (['x', '--topk', '-1'], "argument --topk: expected a whole number of at least 0, got '-1'."),
    (['x', '--count', '0'], "argument --count: expected a whole number of at least 1, got '0'."),
    (['x', '--count', 'many'], "argument --count: expected a whole number of at least 1, got 'many'."),
    ([], 'the following arguments are required: source.'),
])
def test_mistakes_are_told_in_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(argv)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f'pst-timm dance: error: {message}\n'


@pytest.mark.parametrize('words, expected', [
    ([], None), (['--use-ema'], True), (['--no-use-ema'], False), (['--no-ema'], False)])
def test_ema_is_one_flag(words, expected):
    assert parser().parse_args(['x', *words]).use_ema is expected
    shown = parser().format_help()
    assert '--use-ema, --no-use-ema' in shown and '--no-ema' not in shown and '--secret' not in shown


def test_fusion_has_two_names():
    for name in ('--fusion', '--fine-fusion'):
        assert parser().parse_args(['x', name, 'joint', '--topk', '8']).fine_fusion == 'joint'


def test_choices_are_those_of_the_rooms():
    assert common.FINE_FUSIONS == tuple(attention.FINE_FUSIONS)
    assert common.DTYPES == tuple(conversion.DTYPES)


@pytest.mark.parametrize('error, code', [(PSTError, 1), (Unavailable, 75), (Interrupted, 75)])
def test_errors_are_told_and_have_their_code(error, code, capsys):
    def work(what):
        raise error(f'No {what} here.')

    assert run('pst-timm dance', work, 'music') == code
    assert capsys.readouterr() == ('', 'pst-timm dance: error: No music here.\n')


def test_interruption_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr('signal.signal', lambda *args: None)  # the rest of the suite stays interruptible
    def work():
        raise KeyboardInterrupt

    assert run('pst-timm dance', work) == 130
    assert capsys.readouterr().err == '\npst-timm dance: stopped before the end.\n'


def test_exit_codes_are_passed_on():
    assert run('pst-timm dance', lambda: None) == 0
    assert run('pst-timm dance', lambda code: code, 3) == 3


def test_an_unexpected_exception_is_one_sentence_with_the_traceback_in_a_file(capsys, monkeypatch):
    def break_down():
        return {}['tensor']

    monkeypatch.delenv('PST_TIMM_DEBUG', raising=False)
    assert run('pst-timm dance', break_down) == 1
    told = capsys.readouterr().err
    assert told.startswith("pst-timm dance: error: pst-timm dance ended with an unexpected KeyError ('tensor'): ")
    assert told.count('\n') == 1 and 'Traceback' not in told
    log = Path(re.search(r'the traceback is in (\S+)\.', told).group(1))
    assert "return {}['tensor']" in log.read_text()
    log.unlink()


def test_an_unexpected_exception_is_bare_where_asked_for(monkeypatch):
    monkeypatch.setenv('PST_TIMM_DEBUG', '1')
    with pytest.raises(ZeroDivisionError):
        run('pst-timm dance', lambda: 1 / 0)
