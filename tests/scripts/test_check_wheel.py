"""The package as others get it: a wheel, away from the checkout, without a network."""
import sys
import zipfile

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import pst_timm  # noqa: F401  (registers the models)
from scripts import check_wheel
from scripts.check_wheel import DIGITS, build_wheel, check_contents, check_installed, main, run


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp('wheel'), '--no-build-isolation')


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    """The wheel without what it needs, which the interpreter of the tests has."""
    folder = tmp_path_factory.mktemp('installed')
    run(
        sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-index', '--target', str(folder),
        str(wheel))
    return folder


def test_the_wheel_holds_the_package_and_nothing_that_needs_a_checkout(wheel, tmp_path):
    check_contents(wheel)
    for name, extra, message in (
            ('more.whl', 'scripts/demo.py', 'holds scripts beside the package'),
            ('less.whl', 'pst_timm/py.typed', 'does not hold pst_timm/models/weights/resnet18_pst.tin200')):
        with zipfile.ZipFile(tmp_path / name, 'w') as archive:
            archive.writestr(extra, '')
        with pytest.raises(RuntimeError, match=message):
            check_contents(tmp_path / name)


def grey(folder):
    folder.mkdir()
    Image.new('RGB', (64, 64), 'grey').save(folder / '0.png')
    return folder / '0.png'


def test_the_wheel_classifies_images_away_from_the_checkout(installed, tmp_path, capsys):
    model = timm.create_model('resnet18_pst', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    with torch.inference_mode(), Image.open(grey(tmp_path / 'any')) as image:
        name = model.pretrained_cfg['label_names'][model(transform(image)[None]).argmax()]
    check_installed(sys.executable, installed, [grey(tmp_path / name)])
    assert model.pretrained_cfg['label_descriptions'][name] in capsys.readouterr().out


@pytest.mark.slow
def test_wrong_answers_and_other_packages_are_noticed(installed, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match=r'AssertionError|No module named'):
        check_installed(sys.executable, tmp_path)  # no package there, so that of the tests would answer
    with pytest.raises(RuntimeError, match=r'n00000000.0\.png was taken for n\d{8} \w+'):
        check_installed(sys.executable, installed, [grey(tmp_path / 'n00000000')])
    monkeypatch.setattr(check_wheel, 'DIGITS', DIGITS[::-1])
    with pytest.raises(RuntimeError, match='read as 9 8 7 6'):
        check_installed(sys.executable, installed)


def test_the_scans_are_held_out_ones(tmp_path):
    pytest.importorskip('sklearn')
    from scripts.demo import write_digits

    write_digits(tmp_path, size=8)
    for digit, scan in enumerate(DIGITS):
        pixels = np.array([[int(v, 17) for v in row] for row in scan.split()])
        with Image.open(min((tmp_path / 'validation' / str(digit)).glob('*.png'))) as image:
            np.testing.assert_array_equal(np.asarray(image), (pixels / 16 * 255).round())


def test_a_wheel_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit):
        main(['nowhere.whl'])
    assert 'there is no wheel nowhere.whl' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(['--photos', 'nowhere.JPEG'])
    assert 'there is no photograph nowhere.JPEG' in capsys.readouterr().err


@pytest.mark.slow
def test_the_wheel_installs_into_an_empty_environment(wheel, capsys):
    assert main([str(wheel)]) == 0
    assert 'tells ten digits apart' in capsys.readouterr().out
