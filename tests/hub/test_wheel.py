"""The package as others get it: a wheel, away from the checkout, without a network."""
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CLASSIFY = """
import socket, sys
sys.path.insert(0, sys.argv[1])

def refuse(*args):
    raise OSError('there is no network')

socket.socket.connect = refuse
import timm, torch, pst_timm
from PIL import Image
assert pst_timm.__file__.startswith(sys.argv[1]), pst_timm.__file__
model = timm.create_model('test_resnet_pst', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
images = torch.stack([transform(Image.open(path).convert('RGB')) for path in sys.argv[2:]])
with torch.inference_mode():
    print(*[model.pretrained_cfg['label_names'][i] for i in model(images).argmax(dim=1)])
from pst_timm.cli import main
sys.exit(main(['list']))
"""


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the checkout's code."""
    source, out = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('wheel')
    for name in ('pst_timm', 'scripts', 'tests'):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, source)
    run(sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', str(out), str(source))
    [path] = out.glob('*.whl')
    return path


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """One held-out scan of each digit, as image files."""
    pytest.importorskip('sklearn')
    from scripts.demo import write_digits

    folder = tmp_path_factory.mktemp('digits')
    write_digits(folder)
    paths = [sorted((folder / 'validation' / str(i)).glob('*.png'))[0] for i in range(10)]
    assert all(Image.open(path).size == (64, 64) for path in paths)
    return [str(path) for path in paths]


def run(*words, **environment):
    done = subprocess.run(
        words, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        env={**{k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(python, installed, folder, digits):
    out = run(python, '-c', CLASSIFY, str(installed), *digits, HF_HUB_OFFLINE='1', HF_HOME=str(folder / 'empty'))
    assert out.splitlines()[0] == '0 1 2 3 4 5 6 7 8 9'
    assert 'test_resnet_pst.digits, in the package: ' in out


def test_the_wheel_holds_what_needs_no_checkout(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split('/')[0] for name in names if '.dist-info/' not in name} == {'pst_timm'}
    assert {'pst_timm/py.typed', 'pst_timm/cli.py', 'pst_timm/__main__.py'} <= set(names)


def test_the_wheel_classifies_digits_away_from_the_checkout(wheel, digits, tmp_path):
    installed = tmp_path / 'installed'
    run(sys.executable, '-m', 'pip', 'install', '--no-deps', '--no-index', '--target', str(installed), str(wheel))
    names = [p.name for p in (installed / 'pst_timm' / 'models' / 'weights').iterdir()]
    assert sorted(names) == ['test_resnet_pst.digits.json', 'test_resnet_pst.digits.safetensors']
    check(sys.executable, installed, tmp_path, digits)
    shown = run(sys.executable, str(installed / 'bin' / 'pst-timm'), '--version', PYTHONPATH=str(installed))
    assert shown.startswith('pst-timm ')


@pytest.mark.slow
def test_the_wheel_installs_into_an_empty_environment(wheel, digits, tmp_path):
    venv.create(tmp_path / 'venv', with_pip=True)
    python = tmp_path / 'venv' / 'bin' / 'python'
    run(python, '-m', 'pip', 'install', '--quiet', '--constraint', str(ROOT / 'constraints.txt'), str(wheel))
    installed = run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').strip()
    check(python, installed, tmp_path, digits)
