"""Studies with few images of each class: who trains on what, who is tested on what, and the report of it."""
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pst_timm.cli import main
from pst_timm.study import latency
from pst_timm.study.cell import run_cell
from pst_timm.study.collection import check_tables, collect
from pst_timm.study.config import read_study
from pst_timm.study.draws import Draw, write_draw
from pst_timm.study.plots import draw_plots
from pst_timm.study.results import load_study
from pst_timm.study.runner import finished
from pst_timm.study.tables import study_block
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import read_csv, write_csv
from pst_timm.utils.timing import time_in_turn
from tests.engine.helpers import write_images
from tests.study.study_folder import write_study
from tests.study.test_study import TOY, write_config

SHOTS = dict(sweep={}, probe={}, shots={4: dict(epochs=1), 'all': {}})


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp('bands'), {'train': 9, 'validation': 3}, classes=5)


@given(
    images=st.integers(1, 40), most=st.integers(1, 40), turns=st.integers(1, 6), train=st.integers(1, 200),
    val=st.integers(0, 5))
def test_nothing_drawn_is_tested_on_and_no_image_is_drawn_twice(images, most, turns, train, val):
    paths = [Path('train', 'rose', f'{i}.jpg') for i in range(train)]
    held = [Path('val', 'rose', f'{i}.jpg') for i in range(val)]
    images = min(images, most)
    draws = [Draw(images, turn, most, turns) for turn in range(turns)]
    if most * turns > train:
        with pytest.raises(PSTError, match=f'{train} images, and {turns} seeds draw {most} each'):
            draws[0].split(paths, held)
        return
    splits = [draw.split(paths, held) for draw in draws]
    drawn = Counter(path for chosen, _ in splits for path in chosen)
    assert len(drawn) == images * turns and set(drawn.values()) == {1}
    tests = [tested for _, tested in splits]
    assert all(tested == tests[0] for tested in tests)
    assert not drawn.keys() & set(tests[0]) and set(held) <= set(tests[0])
    assert len(tests[0]) == val + train - most * turns
    # fewer images are some of those that more are
    more = [Draw(most, turn, most, turns).split(paths, held)[0] for turn in range(turns)]
    assert all(set(few) <= set(many) for (few, _), many in zip(splits, more))
    # and the order of a folder decides nothing
    assert draws[0].split(paths[::-1], held) == splits[0]


def test_all_is_the_split_as_it_is():
    train, val = [Path('train/a/1')], [Path('val/a/1')]
    assert Draw(None, 1, 50, 3).split(train, val) == (train, val)


def test_links_lead_to_the_images_and_are_made_anew(data, tmp_path):
    folder = tmp_path / 'images'
    (folder / 'train' / 'class0').mkdir(parents=True)
    (folder / 'train' / 'class0' / 'left over').touch()
    for _ in range(2):
        write_draw(Draw(2, 1, 2, 2), data, folder, ('train', 'validation'), ['class0', 'class4'])
    found = {split: sorted((folder / split).glob('*/*')) for split in ('train', 'validation')}
    assert [len(found[split]) for split in found] == [4, 2 * (3 + 9 - 4)]
    ends = {path.resolve() for paths in found.values() for path in paths}
    assert len(ends) == 20 and all(path.is_relative_to(data.resolve()) for path in ends)
    assert all(path.resolve().parent.name == path.parent.name for path in found['train'])
    with pytest.raises(PSTError, match='class9'):
        write_draw(Draw(2, 0, 2, 2), data, folder, ('train', 'validation'), ['class9'])


def test_every_cell_with_every_number(data, tmp_path):
    config = write_config(tmp_path, **SHOTS)
    study = read_study(str(config), str(data))
    assert study.names == ['plain-4', 'plain-all', 'pst-4', 'pst-all']
    assert [cell.id for cell in study.cells][:3] == ['plain-4-seed0', 'plain-4-seed1', 'plain-all-seed0']
    assert [cell.draw.turn for cell in study.cells][:4] == [0, 1, 0, 1]
    assert [cell.epochs for cell in study.cells][1:3] == [1, 2]
    assert study.questions[1]['shots'] == [4, 'all']
    cell = study.cells[1]
    # what was drawn is among what decides the result
    assert cell.was_run_with(json.loads(json.dumps(cell.settings)))
    assert not cell.was_run_with(study.cells[0].settings) and not cell.was_run_with(study.cells[3].settings)


@pytest.mark.parametrize('changes, message', [
    (dict(shots={0: {}}), 'shots must be whole numbers above 0'),
    (dict(shots={'few': {}}), 'shots must be'),
    (dict(shots={2: None}), 'shots 2: expected a mapping of the flags that differ'),
    (dict(shots={2: dict(epoch=1)}), "cell plain-2: unknown key 'epoch'"),
    (dict(shots=[2]), 'shots must be a dict'),
    (dict(shots={2: {}}, probe=TOY['probe']), 'no probe'),
])
def test_mistakes(data, tmp_path, changes, message):
    with pytest.raises(PSTError, match=message):
        read_study(str(write_config(tmp_path, **{**SHOTS, **changes})), str(data))


def test_cells_train_on_few_images_and_the_report_says_so(data, tmp_path):
    train = dict(TOY['train'], val_interval=100)
    study = read_study(str(write_config(tmp_path, seeds=[0], train=train, **SHOTS)), str(data))
    output = tmp_path / 'output'
    for cell in study.cells:
        run_cell(cell, str(data), output, 'cpu')
        assert finished(cell, output)
        # once is enough
        assert not any(row['eval_top1'] for row in read_csv(output / cell.id / 'summary.csv'))
    folder = tmp_path / 'results'
    collect(study, output, folder)
    found = load_study(folder)
    sizes = {row['cell']: (int(row['train_images']), int(row['val_images'])) for row in found.runs}
    assert sizes['pst-4'] == (3 * 4, 3 * (3 + 9 - 4)) and sizes['pst-all'] == (3 * 9, 3 * 3)
    assert '12 or 27 training and 24 or 9 validation images of 3 classes' in study_block(found, 'setting')
    models = study_block(found, 'models')
    assert '`pst-all`' in models and '`pst-4`' not in models
    block = study_block(found, 'question1')
    assert block.index('**4 images of each class**') < block.index('`pst-4` minus `plain-4`')
    assert block.index('**All images of each class**') < block.index('`pst-all` minus `plain-all`')
    assert draw_plots(found, folder) == [folder / 'shots.png'] and (folder / 'shots.png').stat().st_size > 10_000


def test_other_weights_to_begin_with_make_another_cell(data, tmp_path, capsys):
    start = tmp_path / 'start.safetensors'
    cells = dict(given=dict(model='test_resnet_pst', initial_checkpoint=str(start)), fresh=TOY['cells']['pst'],
                 named=dict(model='test_resnet_pst', pretrained=True))
    question = dict(title='?', kind='compare', of='given', against=['fresh', 'named'])
    config = str(write_config(tmp_path, seeds=[0], cells=cells, sweep={}, probe={}, questions={1: question}))

    def settings():
        return {cell.name: cell.settings for cell in read_study(config, str(data)).cells}

    for words in ([], ['--cell', 'given-seed0']):
        assert main(['study', config, '--data-dir', str(data), '--output', str(tmp_path / 'output'), *words]) == 1
        assert f'There is no checkpoint {start}, which given-seed0 is to begin with' in capsys.readouterr().err
    start.write_bytes(b'one')
    first = settings()
    assert 'start' not in first['fresh'] and 'digits weights sha256 ' in first['named']['start']
    start.write_bytes(b'another')
    second = settings()
    assert {name for name in cells if first[name] != second[name]} == {'given'}
    # rows of the results tell the start; those of older ones do not
    study = read_study(config, str(data))
    rows = [dict(cell=c.name, seed='0', settings=json.dumps(c.train), start=c.start) for c in study.cells]
    (tmp_path / 'results').mkdir()
    write_csv(tmp_path / 'results' / 'cells.csv', rows)
    check_tables(tmp_path / 'results', study)
    start.write_bytes(b'one')
    with pytest.raises(PSTError, match="results of 'given', which was trained with other settings or weights"):
        check_tables(tmp_path / 'results', read_study(config, str(data)))
    write_csv(tmp_path / 'results' / 'cells.csv', [{k: v for k, v in row.items() if k != 'start'} for row in rows])
    check_tables(tmp_path / 'results', study)


def test_cells_of_one_network_are_timed_as_one(data, tmp_path, monkeypatch):
    timed = []

    def one_round(calls, count):
        timed.append(len(calls))
        return time_in_turn(calls, 1)

    monkeypatch.setattr(latency, 'time_in_turn', one_round)
    cells = dict(TOY['cells'], frozen=dict(TOY['cells']['pst'], freeze_trunk=True))
    study = read_study(str(write_config(tmp_path, **SHOTS, cells=cells)), str(data))
    rows = latency.measure_latency(study, 'cpu')
    assert timed == [3, 3] and [row['cell'] for row in rows] == study.names
    by_cell = {row.pop('cell'): row for row in rows}
    for name in cells:
        assert by_cell[f'{name}-4'] == by_cell[f'{name}-all']
    assert len({row['train_ms'] for row in by_cell.values()}) == 3
    assert by_cell[study.names[0]]['ratio'] == by_cell[study.names[0]]['train_ratio'] == 1


def test_a_cell_that_the_report_lacks_is_named(tmp_path):
    question = dict(title='?', kind='compare', of='a', against=['b'], shots=[2])
    folder = write_study(tmp_path / 'study', ['a-2', 'c-2'], (), {'6': question})
    with pytest.raises(PSTError, match="is about 'b-2'; the cells are a-2, c-2"):
        study_block(load_study(folder), 'question6')
