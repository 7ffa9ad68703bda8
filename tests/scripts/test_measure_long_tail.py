"""The long-tailed subset is what it says, and the table is that of the runs."""
import json

import numpy as np
import pytest

from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import read_csv
from scripts import measure_long_tail as measure
from tests.engine.helpers import write_images


def test_sizes_fall_by_the_same_ratio():
    sizes = measure.class_sizes()
    assert len(sizes) == 20 and (sizes[0], sizes[-1]) == (500, 10)
    ratios = np.array(sizes[1:]) / sizes[:-1]
    assert np.abs(ratios - 50 ** (-1 / 19)).max() < 0.05


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Four classes of five, of which three are taken, with 8, 4 and 2 images."""
    monkeypatch.setattr(measure, 'CLASSES', 3)
    monkeypatch.setattr(measure, 'LARGEST', 8)
    monkeypatch.setattr(measure, 'IMBALANCE', 4)
    monkeypatch.setattr(measure, 'PARTS', dict(head=slice(0, 1), middle=slice(1, 2), tail=slice(2, 3)))
    monkeypatch.setattr(measure, 'RECIPE', dict(
        measure.RECIPE, img_size=32, batch_size=4, amp=False, warmup_epochs=0))
    return write_images(tmp_path / 'source', {'train': 10, 'val': 3}, classes=4)


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*.png'))


def test_the_subset(small, tmp_path):
    chosen = measure.make_subset(small, tmp_path / 'data')
    assert len(set(chosen)) == 3
    for name, size in zip(chosen, (8, 4, 2)):
        train, held_out = (list((tmp_path / 'data' / split / name).iterdir()) for split in ('train', 'validation'))
        assert len(train) == size and len(held_out) == 3
        assert {path.resolve().parent for path in train} == {small / 'train' / name}
    before = listing(tmp_path / 'data')
    assert measure.make_subset(small, tmp_path / 'data') == chosen and listing(tmp_path / 'data') == before
    assert measure.make_subset(small, tmp_path / 'again') == chosen and listing(tmp_path / 'again') == before


def test_too_little_is_refused(small, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, 'LARGEST', 11)
    with pytest.raises(PSTError, match='has 10 images, expected 11'):
        measure.make_subset(small, tmp_path / 'data')
    monkeypatch.setattr(measure, 'CLASSES', 5)
    with pytest.raises(PSTError, match='has 4 classes, expected 5'):
        measure.make_subset(small, tmp_path / 'data')


@pytest.mark.slow
def test_the_table_is_that_of_the_runs(small, tmp_path, capsys):
    words = ['--data-dir', small, '--work', tmp_path / 'work', '--output', tmp_path / 'out', '--epochs', 1,
             '--cells', 'plain', 'balanced', '--seeds', 0, 1]
    assert measure.main([*map(str, words)]) == 0
    written = json.loads((tmp_path / 'out' / 'long_tail.json').read_text())
    runs = written['runs']
    assert [(run['seed'], run['cell']) for run in runs] == [(s, c) for s in (0, 1) for c in ('plain', 'balanced')]
    rows = read_csv(tmp_path / 'out' / 'long_tail.csv')
    assert [row['cell'] for row in rows] == ['plain', 'balanced'] and rows[0]['seeds'] == '2'
    for row in rows:
        mine = [run for run in runs if run['cell'] == row['cell']]
        for key, place in (('head', 0), ('middle', 1), ('tail', 2)):
            values = [run['classes'][place] for run in mine]
            assert [run[key] for run in mine] == pytest.approx(values, abs=0.01)
            assert row[key] == f'{np.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})'
        assert [run['top1'] for run in mine] == pytest.approx([np.mean(run['classes']) for run in mine], abs=0.01)
    assert '14 training images, 8 of the largest class and 2 of the smallest; accuracy' in written['setting']
    assert 'on 9 balanced validation images' in written['setting']
    # started again, it goes on where it stopped, from its results or from the checkpoints
    before = (tmp_path / 'out' / 'long_tail.csv').read_bytes()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / 'work' / 'runs').rglob('last.pth.tar')}
    (tmp_path / 'out' / 'long_tail.json').write_text(json.dumps(dict(written, runs=runs[:2])))
    assert measure.main([*map(str, words)]) == 0
    assert (tmp_path / 'out' / 'long_tail.csv').read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in times} == times and len(times) == 4
    with pytest.raises(PSTError, match='has results of other recipe'):
        measure.main([*map(str, words), '--epochs', '2'])


def test_hard_examples_are_weighed_by_models_that_have_not_seen_them(small, tmp_path):
    words = ['--data-dir', small, '--work', tmp_path / 'work', '--output', tmp_path / 'out', '--epochs', 1,
             '--cells', 'hard-examples', '--seeds', 0]
    assert measure.main([*map(str, words)]) == 0
    weights = read_csv(tmp_path / 'work' / 'runs' / 'audit' / 'weights.csv')
    train = tmp_path / 'work' / 'data' / 'train'
    assert {row['image'] for row in weights} == {str(path.relative_to(train)) for path in train.rglob('*.png')}
    for fold in range(3):
        assert (tmp_path / 'work' / 'runs' / 'audit' / 'folds' / str(fold) / 'run' / 'last.pth.tar').is_file()
