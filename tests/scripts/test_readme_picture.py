"""The picture of the README can be drawn again, and stays small."""
from PIL import Image

from scripts.readme_picture import PICTURE, main


def test_the_picture_can_be_drawn_again(tmp_path):
    assert main(['--output', str(tmp_path / 'new' / 'digits.png')]) == 0
    with Image.open(tmp_path / 'new' / 'digits.png') as new, Image.open(PICTURE) as old:
        assert new.format == 'PNG' and new.size == old.size
    assert (tmp_path / 'new' / 'digits.png').stat().st_size < 300_000
