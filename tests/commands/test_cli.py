"""The console command."""
import timm

import pst_timm  # noqa: F401
from pst_timm.cli import main


def test_list_names_every_model_of_the_package(capsys):
    assert main(['list']) == 0
    table = capsys.readouterr().out
    for name in timm.list_models('*_pst'):
        assert name in table
    assert '29,260,488' in table and 'not yet trained' in table and 'GMACs' in table


def test_help_and_unknown_commands(capsys):
    assert main(['--help']) == 0
    assert 'train' in capsys.readouterr().out
    assert main([]) == 2
    assert main(['trian']) == 2
    assert "unknown command 'trian'" in capsys.readouterr().err


def test_train_and_validate_take_their_flags(capsys):
    assert main(['train', '--epochs', 'x']) == 1
    assert 'pst-timm train: error:' in capsys.readouterr().err
    assert main(['validate', '--split-size', '1']) == 1
    assert 'pst-timm validate: error:' in capsys.readouterr().err
