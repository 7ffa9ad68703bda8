"""Build the wheel, install it into an empty environment and classify digits there, away from the checkout.

    python -m scripts.check_wheel                  # needs a Python and pip, nothing else
    python -m scripts.check_wheel dist/NAME.whl    # a wheel that is there
    python -m scripts.check_wheel --photos data/tiny-imagenet-200/val/n01443537/val_1230.JPEG    # photographs as well

The environment is filled from the package index; the check itself runs without a network.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import List, Optional, Sequence

__all__ = ['build_wheel', 'check_contents', 'check_installed', 'install_and_check', 'main', 'run']

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = sorted(path.stem for path in Path(ROOT, 'pst_timm', 'models', 'weights').glob('*.safetensors'))
# one held-out scan of each digit, 0 to 9, of scikit-learn: rows of pixels from 0 to 16, as digits of that base
DIGITS = (
    '00aca000 03ggg400 07f38d00 08c00e10 08c00780 05d00480 00e80a80 007cdc40',
    '0002gg20 0004gg20 014cgc00 07gggc00 003age00 0008gc00 0006gg20 0002cf40',
    '0003fa10 000bag40 000c1f60 00034f40 0006f600 04fg9000 00dgf930 00049e70',
    '009gd600 0065gg00 0008f500 0005e300 00009f20 00000bc0 0048bfc0 00bec800',
    '0000c200 0006e100 004g7800 00d90g60 06gabg00 005adg00 00006g00 0000c800',
    '03f88600 04gggd20 03g92000 02ggf300 0076c900 0001ea00 005ef200 01fe1000',
    '0005e200 001db000 005g2000 006f5000 01fgfb10 02de1c90 004g7d90 0005gf30',
    '003ege00 00dddg20 00109f00 009cfga0 04gggb30 0049e200 002f9000 004d1000',
    '00ab4000 00afdd10 008b0e40 000dfd00 01bgg000 01f39a00 00e6fa00 008e7100',
    '00da1000 05ge7000 04g8e000 02egg600 00149d10 00000d60 005859e0 00ddfgd0',
)
CLASSIFY = """
import json, socket, sys
sys.path.insert(0, sys.argv[1])

def refuse(*args):
    raise OSError('there is no network')

socket.socket.connect = refuse
import numpy, timm, torch, pst_timm
from PIL import Image
assert pst_timm.__file__.startswith(sys.argv[1]), pst_timm.__file__
model = timm.create_model('test_resnet_pst', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
images = []
for scan in json.loads(sys.argv[2]):
    pixels = numpy.array([[int(v, 17) for v in row] for row in scan.split()])
    image = Image.fromarray((pixels / 16 * 255).round().astype('uint8')).resize((64, 64), Image.Resampling.BICUBIC)
    images.append(transform(image.convert('RGB')))
with torch.inference_mode():
    print(*[model.pretrained_cfg['label_names'][i] for i in model(torch.stack(images)).argmax(dim=1)])
if sys.argv[3:]:
    model = timm.create_model('resnet18_pst', pretrained=True).eval()
    cfg, transform = model.pretrained_cfg, timm.data.create_transform(**timm.data.resolve_data_config(model=model))
for path in sys.argv[3:]:
    with Image.open(path) as image, torch.inference_mode():
        name = cfg['label_names'][model(transform(image.convert('RGB'))[None]).argmax().item()]
    print(name, cfg['label_descriptions'][name], sep='\t')
from pst_timm.cli import main
sys.exit(main(['list']))
"""


def build_wheel(folder: Path, *pip_flags: str) -> Path:
    """Build the wheel from a copy of what belongs into it, so that nothing else of the checkout can get in.

    Args:
        folder: Where to write it.
        pip_flags: Further flags of `pip wheel`.

    Returns:
        The wheel.

    Raises:
        RuntimeError: If it cannot be built.
    """
    with tempfile.TemporaryDirectory() as source:
        shutil.copytree(ROOT / 'pst_timm', Path(source, 'pst_timm'), ignore=shutil.ignore_patterns('__pycache__'))
        for name in ('pyproject.toml', 'README.md', 'LICENSE'):
            shutil.copy(ROOT / name, source)
        run(sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', *pip_flags, '-w', str(folder), source)
    [path] = folder.glob('*.whl')
    return path


def check_contents(wheel: Path) -> None:
    """Make sure that a wheel holds the package with its weights, and nothing beside it.

    Raises:
        RuntimeError: If it does not; names what is wrong.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split('/')[0] for name in names}
    strangers = {top for top in tops if top != 'pst_timm' and not top.endswith('.dist-info')}
    if strangers:
        raise RuntimeError(f'{wheel.name} holds {", ".join(sorted(strangers))} beside the package.')
    weights = [f'pst_timm/models/weights/{name}.safetensors' for name in WEIGHTS]
    for wanted in ('pst_timm/py.typed', *weights):
        if wanted not in names:
            raise RuntimeError(f'{wheel.name} does not hold {wanted}.')


def check_installed(python: str, packages: Path, photos: Sequence[Path] = ()) -> List[str]:
    """Classify ten digits with an installed package, without a network, from a folder that is no checkout.

    Args:
        python: The interpreter that has what the package needs.
        packages: Folder that the package is installed in.
        photos: Photographs of Tiny ImageNet, in folders by the names of their classes, to classify as well.

    Returns:
        Class and words that were said of each photograph.

    Raises:
        RuntimeError: If it is not there, does not tell the digits apart or takes a photograph for another class.
    """
    with tempfile.TemporaryDirectory() as elsewhere:
        # -I: neither the current folder nor PYTHONPATH is looked at
        out = run(
            python, '-I', '-c', CLASSIFY, str(packages), json.dumps(DIGITS), *(str(path.resolve()) for path in photos),
            cwd=elsewhere, HF_HUB_OFFLINE='1', HF_HOME=elsewhere)
    answer, *lines = out.splitlines()
    if answer != '0 1 2 3 4 5 6 7 8 9':
        raise RuntimeError(f'The digits 0 to 9 were read as {answer}.')
    said, listed = lines[:len(photos)], lines[len(photos):]
    for path, words in zip(photos, said):
        if words.split('\t')[0] != path.parent.name:
            raise RuntimeError(f'{path} was taken for {words}.')
    for name in WEIGHTS:
        if not any(f'{name}, in the package: ' in line for line in listed):
            raise RuntimeError(f'pst-timm list does not tell of {name}.')
    return said


def install_and_check(wheel: Path, photos: Sequence[Path] = ()) -> List[str]:
    """Check a wheel, and what it is once installed into an empty environment; returns what was said of `photos`.

    Raises:
        RuntimeError: If anything fails.
    """
    check_contents(wheel)
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder, 'Scripts' if os.name == 'nt' else 'bin', 'python'))
        constraints = ('--constraint', str(ROOT / 'constraints.txt'))
        run(python, '-m', 'pip', 'install', '--quiet', *constraints, str(wheel.resolve()))
        packages = run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').strip()
        return check_installed(python, Path(packages), photos)


def run(*words: str, cwd: Optional[str] = None, **environment: str) -> str:
    """What a command prints; PYTHONPATH is hidden from it.

    Raises:
        RuntimeError: If it fails; with all that it printed.
    """
    done = subprocess.run(
        words, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=cwd,
        env={**{k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}, **environment})
    if done.returncode != 0:
        raise RuntimeError(f'{" ".join(words[:4])} ... failed:\n{done.stdout}{done.stderr}')
    return done.stdout


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Build, install and check; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m scripts.check_wheel', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('wheel', type=Path, nargs='?', help='default: it is built first')
    parser.add_argument(
        '--photos', type=Path, nargs='+', default=[], metavar='WNID/FILE',
        help='photographs of Tiny ImageNet that resnet18_pst has to get right')
    args = parser.parse_args(argv)
    if args.wheel is not None and not args.wheel.is_file():
        parser.error(f'there is no wheel {args.wheel}')
    missing = [path for path in args.photos if not path.is_file()]
    if missing:
        parser.error(f'there is no photograph {missing[0]}')
    try:
        with tempfile.TemporaryDirectory() as folder:
            wheel = args.wheel or build_wheel(Path(folder))
            for path, words in zip(args.photos, install_and_check(wheel, args.photos)):
                print(path.name, words, sep='\t')
            print(f'{wheel.name} is installed from nothing and tells ten digits apart.')
    except RuntimeError as e:
        print(f'{parser.prog}: error: {e}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
