"""The script that measures the necks writes what it prints."""
import json

import torch

from pst_timm.utils.files import read_csv
from scripts.measure_necks import main


def test_writes_the_table_and_how_it_was_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, 'set_num_threads', lambda n: None)  # of the process of all tests
    assert main(['--quick', '--trunks', 'test_resnet:64', 'resnet18', '--output', str(tmp_path / 'new')]) == 0
    rows = read_csv(tmp_path / 'new' / 'cost.csv')
    assert {(row['trunk'], row['px'], row['width']) for row in rows} == {('test_resnet', '128', '64')}
    setting = json.loads((tmp_path / 'new' / 'cost.json').read_text())['setting']
    assert setting.endswith('processor time') and 'medians of 3 rounds' in setting
    assert setting in capsys.readouterr().out
