"""What is planted is what the record says, and what is measured is what was planted."""
import numpy as np
import pytest
from PIL import Image

from pst_timm.utils.files import read_csv
from scripts.measure_audit import KINDS, flip_labels, main, measure_copies, measure_labels, plant_copies
from tests.data.test_duplicates import photo


@pytest.fixture
def images(tmp_path):
    for i in range(60):
        path = tmp_path / 'images' / f'class{i % 3}' / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(i).save(path)
    return tmp_path / 'images'


def test_flips_are_links_in_the_folder_of_another_class(images, tmp_path):
    flips = flip_labels(images, tmp_path / 'flipped', share=0.1)
    assert len(flips) == 6 and flips == flip_labels(images, tmp_path / 'again', share=0.1)
    found = {path.relative_to(tmp_path / 'flipped').as_posix(): path.resolve() for path in (
        tmp_path / 'flipped').glob('*/*')}
    assert len(found) == 60
    assert {name for name, path in found.items() if name.split('/')[0] != path.parent.name} == set(flips)


def test_planted_copies_are_of_the_images_that_the_record_names(images, tmp_path):
    copies = plant_copies(images, tmp_path / 'validation', 3)
    assert len(copies) == 3 * len(KINDS) == len({about['of'] for about in copies.values()})
    for name, about in copies.items():
        copy, original = Image.open(tmp_path / 'validation' / name), Image.open(images / about['of'])
        small = [np.asarray(im.convert('RGB').resize((24, 20), Image.Resampling.BOX), float) for im in (copy, original)]
        assert np.abs(small[0] - small[1]).mean() < 12
        exact = (tmp_path / 'validation' / name).read_bytes() == (images / about['of']).read_bytes()
        assert exact == (about['kind'] == 'same file')


def test_the_measures_by_hand(tmp_path):
    rows = [dict(image=f'{i}', label='a', suggested='ab'[i in (0, 3)], loss=loss, margin=margin,
                 confident_learning=wrong, wrong_label='yes' * (i == 1))
            for i, (loss, margin, wrong) in enumerate([
                ('5.0', '-0.5', 'yes'), ('4.0', '-0.1', ''), ('0.1', '0.9', ''), ('3.0', '-0.9', 'yes')])]
    own, confident = measure_labels('x', rows, ['0', '3'])
    assert own['share of flips among as many'] == '50.0%' and confident['share of flips among as many'] == '100.0%'
    assert own['area under precision-recall'] == pytest.approx((1 + 2 / 3) / 2, abs=1e-4)
    assert confident['area under precision-recall'] == 1 and own['agrees with the given label'] == '50.0%'
    assert own['flips in the first hundred'] == 2 and own['marked as wrong'] == 1
    (tmp_path / 'd.csv').write_text(
        'image,duplicate_of,split\na/1.png,a/copy.png,validation\na/2.png,a/other.png,validation\na/1.png,x,test\n')
    found = measure_copies('x', tmp_path / 'd.csv', {
        'a/copy.png': dict(kind=KINDS[0], of='a/1.png'), 'a/lost.png': dict(kind=KINDS[0], of='a/3.png')})
    assert (found[0]['planted'], found[0]['found']) == (2, 1)
    assert (found[-1]['copy'], found[-1]['found']) == ('none', 1)


@pytest.mark.slow
def test_the_flips_of_the_digits_are_found(tmp_path):
    assert main(['--work', str(tmp_path / 'work'), '--output', str(tmp_path / 'out')]) == 0
    for row in read_csv(tmp_path / 'out' / 'audit.csv'):
        assert float(row['share of flips among as many'].rstrip('%')) >= 80
    *planted, others = read_csv(tmp_path / 'out' / 'audit_copies.csv')
    assert all(row['found'] == row['planted'] == '20' for row in planted)
    assert int(others['found']) <= 2
