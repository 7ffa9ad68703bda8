"""The package as others get it: a wheel, away from the checkout, without a network."""
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from scripts import check_wheel
from scripts.check_wheel import DIGITS, build_wheel, check_contents, check_installed, main, run


def write_gradient(path):
    path.parent.mkdir()
    Image.linear_gradient('L').save(path)
    return path


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


def test_the_wheel_classifies_digits_away_from_the_checkout(installed):
    check_installed(sys.executable, installed)


def test_photographs_have_to_be_taken_for_what_their_folders_say(installed, tmp_path):
    picture = write_gradient(tmp_path / 'n01443537' / 'picture.png')
    with pytest.raises(RuntimeError, match=r'n01443537.picture\.png was taken for n\d{8}\t\w') as raised:
        check_installed(sys.executable, installed, [picture])
    name = str(raised.value).split('was taken for ')[1][:9]
    [said] = check_installed(sys.executable, installed, [write_gradient(tmp_path / name / 'picture.png')])
    assert said.startswith(f'{name}\t')


@pytest.mark.slow
def test_wrong_answers_and_other_packages_are_noticed(installed, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match=r'AssertionError|No module named'):
        check_installed(sys.executable, tmp_path)  # no package there, so that of the tests would answer
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


@pytest.mark.slow
def test_the_wheel_installs_into_an_empty_environment(wheel, capsys):
    assert main([str(wheel)]) == 0
    assert 'tells ten digits apart' in capsys.readouterr().out
