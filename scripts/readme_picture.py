"""Draw the picture of the README: what the weights that come with `test_resnet_pst` look at in held-out digits.

    python -m scripts.readme_picture
"""
import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Optional, Sequence

from PIL import Image

from pst_timm.checkpoints import load_model
from pst_timm.visualize.view import visualize
from scripts.demo import TOPK, write_digits

__all__ = ['PICTURE', 'draw', 'main']

PICTURE = Path(__file__).resolve().parents[1] / 'docs' / 'images' / 'digits.png'
SHOWN = (2, 4, 8)
WIDTH = 1100  # pixels, so that the file stays small


def draw(path: Path) -> None:
    """Write the picture.

    Args:
        path: The PNG file.
    """
    with tempfile.TemporaryDirectory() as temporary:
        data, chosen, sheet = (Path(temporary, name) for name in ('data', 'chosen', 'sheet.png'))
        write_digits(data)
        chosen.mkdir()
        for digit in SHOWN:
            # the first of its class, not the best
            shutil.copy(sorted((data / 'validation' / str(digit)).glob('*.png'))[0], chosen / f'digit {digit}.png')
        visualize(chosen, load_model('test_resnet_pst', pretrained=True).eval(), sheet, topk=TOPK)
        with Image.open(sheet) as image:
            small = image.convert('RGB').resize(
                (WIDTH, round(WIDTH * image.height / image.width)), Image.Resampling.LANCZOS)
    path.parent.mkdir(parents=True, exist_ok=True)
    small.save(path, optimize=True)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Draw the picture; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m scripts.readme_picture', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, default=PICTURE, help='PNG file to write (default: that of the README)')
    draw(parser.parse_args(argv).output)
    return 0


if __name__ == '__main__':
    sys.exit(main())
