"""Images are read as a person sees them; what is none is named."""
import os

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps

from pst_timm.data.images import find_images, open_image
from pst_timm.utils.errors import PSTError


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_images_are_opened_as_a_person_sees_them(tmp_path):
    path = tmp_path / 'x.png'
    pixels = noise((4, 6, 3))
    exif = Image.Exif()
    exif[274] = 6  # to be turned a quarter to the right
    Image.fromarray(pixels).save(path, exif=exif)
    np.testing.assert_array_equal(open_image(path), np.rot90(pixels, -1))
    Image.fromarray(np.concatenate([pixels, np.zeros((4, 6, 1), np.uint8)], axis=2)).save(path)
    assert (np.asarray(open_image(path)) == 255).all()  # wholly transparent
    palette = Image.new('P', (6, 4), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    palette.save(path)
    assert open_image(path).getcolors() == [(24, (200, 100, 50))]
    palette.save(path, transparency=1)
    assert open_image(path).getcolors() == [(24, (255, 255, 255))]
    Image.fromarray(pixels[..., 0]).save(path)
    np.testing.assert_array_equal(open_image(path), pixels[..., :1].repeat(3, axis=2))
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(path)
    np.testing.assert_array_equal(open_image(path, 'L'), pixels[..., 0])


def test_damaged_notes_beside_the_pixels_do_no_harm(tmp_path):
    Image.fromarray(noise((8, 8, 3))).save(tmp_path / 'x.jpg', exif=b'Exif\0\0MM\0*\0\0\0\x08\xff\xff' + b'\xff' * 40)
    assert open_image(tmp_path / 'x.jpg').size == (8, 8)
    Image.fromarray(noise((8, 8, 3))).save(tmp_path / 'y.jpg', exif=b'Exif\0\0no notes at all')
    assert open_image(tmp_path / 'y.jpg').size == (8, 8)


@pytest.mark.parametrize('ending', ['jpg', 'png', 'tif', 'webp'])
@pytest.mark.parametrize('turn', range(1, 9))
def test_every_turn_is_that_of_pillow(tmp_path, ending, turn):
    exif = Image.Exif()
    exif[274] = turn
    path = tmp_path / f'x.{ending}'
    Image.fromarray(noise((4, 6, 3))).save(path, exif=exif)
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image)
        assert expected.size == ((6, 4) if turn < 5 else (4, 6))
        np.testing.assert_array_equal(open_image(path), expected)


def test_modes_with_transparency_keep_it(tmp_path):
    pixels = noise((4, 6, 4))
    Image.fromarray(pixels).save(tmp_path / 'x.png')
    np.testing.assert_array_equal(open_image(tmp_path / 'x.png', 'RGBA'), pixels)


def test_what_is_no_file_is_no_image(tmp_path):
    """And nobody waits for a FIFO to be written to."""
    os.mkfifo(tmp_path / 'x.png')
    for path in (tmp_path / 'x.png', tmp_path, '/dev/null'):
        with pytest.raises(PSTError, match='cannot be read as an image: it is a folder, a device, a FIFO'):
            open_image(path)
    (tmp_path / 'up.png').symlink_to(tmp_path)
    with pytest.raises(PSTError, match='has no images'):
        find_images(tmp_path, 3)
    Image.fromarray(noise((4, 4, 3))).save(tmp_path / 'y.png')
    assert find_images(tmp_path, 3) == ([tmp_path / 'y.png'], 1)


def test_an_image_of_dishonest_size_is_unreadable(tmp_path, monkeypatch):
    Image.new('L', (64, 64)).save(tmp_path / 'x.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    with pytest.raises(PSTError, match=r'x.png cannot be read as an image: .*decompression bomb'):
        open_image(tmp_path / 'x.png')


def test_no_program_is_started_to_read_an_image(tmp_path, monkeypatch):
    """Pillow gives PostScript to Ghostscript, whatever the file is called."""
    Image.fromarray(noise((8, 8, 3))).save(tmp_path / 'x.eps')
    (tmp_path / 'x.eps').rename(tmp_path / 'x.png')
    asked = []
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', lambda *args, **kwargs: asked.append(args))
    with pytest.raises(PSTError, match=r'x.png cannot be read as an image: cannot identify'):
        open_image(tmp_path / 'x.png')
    assert not asked


@pytest.mark.parametrize('ending', ['jpg', 'png', 'webp', 'bmp', 'gif', 'tif', 'ppm', 'tga', 'jp2'])
def test_formats_that_are_read(tmp_path, ending):
    Image.new('RGB', (8, 6), (0, 0, 255)).save(tmp_path / f'x.{ending}')
    (tmp_path / f'x.{ending}').rename(tmp_path / 'x.png')  # what counts is in the file
    assert open_image(tmp_path / 'x.png').size == (8, 6)


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / 'noise.png').write_bytes(b'noise')
    Image.fromarray(noise((64, 64, 3))).save(tmp_path / 'whole.png')
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'whole.png').read_bytes()[:3000])
    for name, message in (
            ('nowhere.png', 'There is no image .*nowhere.png'),
            ('noise.png', 'noise.png cannot be read as an image: cannot identify'),
            ('cut.png', 'cut.png cannot be read as an image: ')):
        with pytest.raises(PSTError, match=message):
            open_image(tmp_path / name)


def test_a_folder_gives_evenly_spaced_images(tmp_path):
    for name in ('b/1.png', 'a/2.JPG', 'c.webp', 'a/1.jpeg', 'notes.txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    paths, found = find_images(tmp_path, 10)
    assert [str(p.relative_to(tmp_path)) for p in paths] == ['a/1.jpeg', 'a/2.JPG', 'b/1.png', 'c.webp']
    assert found == 4 and find_images(tmp_path, 2) == ([paths[0], paths[2]], 4)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(PSTError, match=r'empty has no images \(.png, '):
        find_images(tmp_path / 'empty', 1)


def test_pixels_without_a_known_range_are_not_taken_for_black(tmp_path):
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / 'a.tif')
    with pytest.raises(PSTError, match=r'a\.tif cannot be read as an image: its pixels are floating-point numbers'):
        open_image(tmp_path / 'a.tif')
