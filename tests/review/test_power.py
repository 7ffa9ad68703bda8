"""The plot of what the monitor finds: the numbers of the table, and none of its own."""
import csv

import pytest

from pst_timm.commands.report import main
from pst_timm.review import power
from pst_timm.utils.errors import PSTError

ROWS = [
    {'data': data, 'corruption': name, 'strength': strength, '100 images': strength / 10, '500 images': strength / 5}
    for data in ('photos', 'digits') for name in ('blur', 'noise') for strength in (1, 2, 3)]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_the_plot_shows_the_numbers_of_the_table(tmp_path, monkeypatch):
    drawn = {}
    draw = power._draw_panel

    def spy(axes, rows, counts):
        draw(axes, rows, counts)
        drawn[rows[0]['data']] = {line.get_label(): line.get_xydata().round().tolist() for line in axes.lines}

    monkeypatch.setattr(power, '_draw_panel', spy)
    power.draw_power(write(tmp_path / 'power.csv', ROWS), tmp_path / 'power.png')
    assert (tmp_path / 'power.png').read_bytes().startswith(b'\x89PNG')
    expected = {
        f'{name}, {n} images': [[s, round(100 * s / (10 if n == 100 else 5))] for s in (1, 2, 3)]
        for name in ('blur', 'noise') for n in (100, 500)}
    assert drawn == {'photos': expected, 'digits': expected}


@pytest.mark.parametrize('rows', [[{'data': 'photos'}], [dict(ROWS[0], strength='x')], [{'a': 1}]])
def test_another_table_is_refused(rows, tmp_path):
    with pytest.raises(PSTError, match='is no table of'):
        power.draw_power(write(tmp_path / 'power.csv', rows), tmp_path / 'power.png')


def test_report_draws_it_once_and_alike(tmp_path, capsys):
    table = write(tmp_path / 'results' / 'monitoring' / 'power.csv', ROWS)
    assert main(['--root', str(tmp_path)]) == 0 and 'power.png: drawn' in capsys.readouterr().out
    first = table.with_suffix('.png').read_bytes()
    assert main(['--root', str(tmp_path)]) == 0 and table.with_suffix('.png').read_bytes() == first
