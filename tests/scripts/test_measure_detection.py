"""The table of detectors is that of the runs, and its intervals hold what they are of."""
import json

import pytest
import yaml

from pst_timm.utils.files import read_csv
from scripts import measure_detection as measure
from tests.detection.tiny import RUN, write_squares

pytest.importorskip('pycocotools')


@pytest.fixture
def words(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, 'ROWS', {key: measure.ROWS[key] for key in ('FPN', 'PST', 'PST, k = 8, gate')})
    data = write_squares(tmp_path / 'data', dict(train=8, val=4, test=12))
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(yaml.safe_dump({k: v for k, v in RUN.items() if k != 'device'} | dict(score_thresh=0.0)))
    return [str(word) for word in (
        '--data-dir', data, '--work', tmp_path / 'work', '--output', tmp_path / 'out', '--config', recipe)]


@pytest.mark.slow
def test_the_table_is_that_of_the_runs(words, tmp_path, monkeypatch):
    assert measure.main([*words, '--cells', 'fpn', 'pst', '--seeds', '0']) == 0
    rows = read_csv(tmp_path / 'out' / 'bccd.csv')
    assert [row['detector'] for row in rows] == ['FPN', 'PST', 'PST, k = 8, gate']
    record = json.loads((tmp_path / 'out' / 'bccd.json').read_text())
    assert '12 test images' in record['setting'] and len(record['runs']) == 3
    for row, run in zip(rows, record['runs']):
        assert run['row'] == row['detector']
        for column, metric in (('AP', 'ap'), ('AP50', 'ap50')):
            value, low, _, high = row[column].replace('(', '').replace(')', '').split()
            # one seed: the mean is the run's own number
            assert float(value) == pytest.approx(run['metrics'][metric], abs=0.06)
            assert float(low) <= float(value) <= float(high)
    assert rows[0]['AP over FPN'] == '-' and rows[1]['AP over FPN'][0] in '+-'
    found, twin = (run['metrics']['ap'] for run in (record['runs'][1], record['runs'][0]))
    assert float(rows[1]['AP over FPN'].split()[0]) == pytest.approx(found - twin, abs=0.06)

    # nothing is trained or evaluated twice, and the table comes out the same
    monkeypatch.setattr(measure.job, 'train', None)
    monkeypatch.setattr(measure, 'open_detector', None)
    assert measure.main([*words, '--cells', '--seeds', '0']) == 0
    assert read_csv(tmp_path / 'out' / 'bccd.csv') == rows
