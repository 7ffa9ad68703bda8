"""The console command: what it lists, how it ends, and what an interpreter loads for it."""
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import timm

import pst_timm
from pst_timm.cli import COMMANDS, main

ROOT = Path(pst_timm.__file__).parents[1]
REPORT = 'import sys, timm; print("registered" if timm.is_model("resnet18_pst") else "not registered")'
COMMAND = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pst_timm.cli import main
try:
    main()
finally:
    print("torch" in sys.modules)
"""
LIGHT = [['--help'], ['--version'], ['list', '--help'], ['convert', '--help'], ['benchmark', '--help'],
         ['report', '--help']]


def python(*words, interpreter=sys.executable, **kwargs):
    """What a new interpreter prints."""
    done = subprocess.run(
        [interpreter, *map(str, words)], capture_output=True, text=True, check=True, cwd=ROOT, **kwargs)
    return done.stdout.strip()


def test_list_names_every_model_of_the_package(capsys):
    assert main(['list']) == 0
    table = capsys.readouterr().out
    for name in timm.list_models('*_pst', exclude_filters='backbone_pst'):  # which is any of them
        assert name in table
    assert '29,260,488' in table and 'not yet trained' in table and 'GMACs' in table


def test_help_and_version(capsys):
    assert main(['--help']) == 0
    shown = capsys.readouterr().out
    assert all(f'\n  {name} ' in shown and command.help in shown for name, command in COMMANDS.items())
    assert main(['--version']) == 0
    assert capsys.readouterr().out == f'pst-timm {pst_timm.__version__}\n'
    assert main([]) == 2


@pytest.mark.parametrize('word, message', [
    ('trian', "unknown command 'trian'. Did you mean train? See pst-timm --help."),
    ('--verison', "unknown flag '--verison'. Did you mean --version? See pst-timm --help."),
    ('dance', "unknown command 'dance'. See pst-timm --help."),
])
def test_unknown_commands_are_told_in_one_line(word, message, capsys):
    assert main([word]) == 2
    assert capsys.readouterr().err == f'pst-timm: error: {message}\n'


def test_every_command_is_there():
    for command in COMMANDS.values():
        assert (ROOT / 'pst_timm' / 'commands' / f'{command.module}.py').is_file()


def test_train_and_validate_take_their_flags(capsys):
    assert main(['train', '--epochs', 'x']) == 1
    assert 'pst-timm train: error:' in capsys.readouterr().err
    assert main(['validate', '--split-size', '1']) == 1
    assert 'pst-timm validate: error:' in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- what an interpreter loads

@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """An environment of its own, with the entry point where an installer puts it; returns its interpreter and that."""
    folder = tmp_path_factory.mktemp('installed') / 'venv'
    venv.create(folder, symlinks=True)
    for name in ('pst-timm', 'pst-timm.exe'):
        (folder / 'bin' / name).write_text(COMMAND)
    return folder / 'bin' / 'python', folder / 'bin' / 'pst-timm'


def say(interpreter, *words):
    """What another interpreter prints, which has our packages."""
    environment = {'PYTHONPATH': ':'.join(p for p in sys.path if p), 'PATH': '', 'OMP_NUM_THREADS': '1'}
    return python(*words, interpreter=interpreter, env=environment).splitlines()


@pytest.mark.parametrize('argv', LIGHT, ids=' '.join)
def test_help_does_not_wait_for_torch(argv, installed):
    interpreter, script = installed
    *shown, loaded = say(interpreter, f'{script}.exe' if argv == ['--help'] else script, *argv)
    assert loaded == 'False'
    assert any(word in shown[0] for word in ('usage: pst-timm', 'pst-timm 0'))


def test_a_link_to_the_command_is_the_command(installed, tmp_path):
    interpreter, script = installed
    (tmp_path / 'pst-timm').symlink_to(script)  # as pipx installs it
    assert say(interpreter, tmp_path / 'pst-timm', '--help')[-1] == 'False'


@pytest.mark.slow
def test_a_script_of_that_name_is_not_the_command(installed, tmp_path):
    code = f'import pst_timm\n{REPORT}\n'
    for name in ('pst-timm', 'pst-timm.exe', 'train.py'):
        (tmp_path / name).write_text(code)
        assert say(installed[0], tmp_path / name) == ['registered']


@pytest.mark.parametrize('name', ['train', 'validate'])
def test_help_of_a_script_does_not_wait_for_torch(name):
    done = subprocess.run(
        [sys.executable, '-v', f'{name}.py', '--help'], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.startswith(f'usage: {name}.py')
    assert "import 'pst_timm'" in done.stderr and "import 'torch'" not in done.stderr


@pytest.mark.parametrize('words', [['-m', 'pst_timm'], ['-X', 'utf8', '-mpst_timm']])
def test_help_of_the_module_does_not_wait_for_torch(words):
    done = subprocess.run(
        [sys.executable, '-v', *words, '--help'], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.startswith('usage: pst-timm')
    assert "import 'pst_timm'" in done.stderr and "import 'torch'" not in done.stderr


def test_the_module_is_the_command():
    assert python('-m', 'pst_timm', '--version') == f'pst-timm {pst_timm.__version__}'
    done = subprocess.run([sys.executable, '-m', 'pst_timm', 'trian'], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and 'Did you mean train?' in done.stderr


@pytest.mark.slow
def test_the_command_registers_the_models_for_its_work(installed):
    interpreter, script = installed
    *shown, loaded = say(interpreter, script, 'list')
    assert loaded == 'True' and any(line.startswith('resnet50_pst ') for line in shown)


@pytest.mark.parametrize('way', [
    '-c', 'spawned', *(pytest.param(w, marks=pytest.mark.slow) for w in (
        'script', 'package', 'pytest', 'spawned by train.py'))])
def test_everyone_else_gets_the_models_on_import(way, tmp_path):
    code = f'import pst_timm\n{REPORT}\n'
    path = [str(ROOT), str(tmp_path)]
    environment = {'PYTHONPATH': ':'.join(path), 'PATH': '', 'OMP_NUM_THREADS': '1'}
    if way == '-c':
        words = ['-c', code, 'pst-timm']
    elif way == 'script':
        words = [tmp_path / 'pst-timm.py', '-m', 'pst_timm']
        words[0].write_text(code)
    elif way == 'package':  # whose __init__ imports ours while Python still looks for the module
        (tmp_path / 'mine').mkdir()
        (tmp_path / 'mine' / '__init__.py').write_text(code)
        (tmp_path / 'mine' / 'go.py').touch()
        words = ['-m', 'mine.go', 'pst_timm']
    elif way == 'pytest':
        (tmp_path / 'test_mine.py').write_text(f'{code}def test_it(): pass\n')
        words = ['-m', 'pytest', '-s', '-q', '-p', 'no:cacheprovider', tmp_path / 'test_mine.py']
    elif way.startswith('spawned'):  # a worker of the command has its words, and yet runs the user's code
        (tmp_path / 'mine.py').write_text(f'def go():\n    {code.strip()}'.replace('\nimport', '\n    import') + '\n')
        (tmp_path / 'pst-timm').write_text(
            ('__pst_timm_command__ = True\n' if 'train' in way else '') +
            'import mine, multiprocessing\n'
            'if __name__ == "__main__":\n'
            '    process = multiprocessing.get_context("spawn").Process(target=mine.go)\n'
            '    process.start()\n'
            '    process.join()\n')
        words = [tmp_path / 'pst-timm', 'train']
    shown = python(*words, env=environment)
    assert 'registered' in shown.split('\n')[0] and 'not registered' not in shown


def test_public_names_are_listed_and_loaded():
    assert python('-c', (
        'import pst_timm\n'
        'assert {"load_trunk", "publish", "engine", "__version__"} <= set(dir(pst_timm))\n'
        'assert "not_there" not in dir(pst_timm) and not hasattr(pst_timm, "not_there")\n'
        'names = {}\n'
        'exec("from pst_timm import *", names)\n'
        'assert set(pst_timm.__all__) <= set(names)\n'
        'assert names["load_trunk"] is pst_timm.load_trunk is pst_timm.checkpoints.load_trunk\n'
        'print("fine")')) == 'fine'
