"""The plot marks the models that no other one beats, and is drawn from what was measured."""
import io
import json

import pytest
from PIL import Image

from pst_timm.commands.report import main as report
from pst_timm.deploy.frontier import KINDS, SLIM, draw_frontier, draw_pruned, frontier
from pst_timm.utils.errors import PSTError


def row(name, ratio, top1, kind='float'):
    return dict(row=name, kind=kind, ratio_1=ratio, top1=top1, interval=[top1 - 1, top1 + 1])


def names(rows):
    return [row['row'] for row in frontier(rows)]


def test_the_frontier_is_what_no_other_one_beats():
    rows = [row('eager', 1., 90.), row('fast', 4., 80.), row('worse and slower', 3., 79.), row('between', 2., 85.)]
    assert names(rows) == ['eager', 'between', 'fast']
    assert names([*rows, row('as good, and faster', 2.5, 90.)]) == ['as good, and faster', 'fast']
    assert names([row('a', 2., 80.), row('as fast, and better', 2., 81.)]) == ['as fast, and better']
    assert names([]) == []


@pytest.fixture
def table(tmp_path):
    folder = tmp_path / 'results/deploy'
    folder.mkdir(parents=True)
    rows = [row(kind, 1. + i, 90. - i, kind) for i, kind in enumerate(KINDS)]
    (folder / 'steps-made-up.json').write_text(json.dumps(dict(setting='made up', rows=rows)))
    return folder / 'steps-made-up.json'


def test_report_draws_it_and_draws_it_alike(table, tmp_path, capsys):
    assert report(['--root', str(tmp_path)]) == 0
    drawn = table.with_suffix('.png')
    first = drawn.read_bytes()
    assert f'{drawn}: drawn' in capsys.readouterr().out and first.startswith(b'\x89PNG')
    draw_frontier(table, drawn)
    assert drawn.read_bytes() == first


@pytest.mark.parametrize('draw', [draw_frontier, draw_pruned])
@pytest.mark.parametrize('text', ['', '[]', '{"rows": [{"kind": "float", "model": "it"}]}', '{"rows": 3}'])
def test_what_is_no_such_table_is_told(table, text, draw):
    table.write_text(text)
    with pytest.raises(PSTError, match=r'is no table of `scripts/measure_deploy\.py`'):
        draw(table, table.with_suffix('.png'))
    assert not table.with_suffix('.png').exists()


def test_the_plot_of_pruning_marks_what_slim_makes(tmp_path):
    """With the row it is there, with another row it is not: the pictures differ in its star."""
    def drawn(name, runtime):
        rows = [dict(model='it', ratio=ratio, scope=scope, round_to=to, runtime=runtime, ratio_1=1. + ratio,
                     ratio_8=2. + ratio)
                for ratio, scope, to in ((0., '-', 0), (0.5, 'uniform', 16), (0.5, 'global', 32))]
        rows.append(dict(rows[0], model='another', ratio_1=99.))
        table = tmp_path / f'results/deploy/pruned-{name}.json'
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text(json.dumps(dict(rows=rows)))
        assert report(['--root', str(tmp_path)]) == 0
        return table.with_suffix('.png').read_bytes()

    star = bytes.fromhex(KINDS['slim'][0][1:])
    for runtime, there in ((SLIM[-1], True), ('eager float32', False)):
        picture = Image.open(io.BytesIO(drawn(str(there), runtime))).convert('RGB')
        assert (tuple(star) in {color for _, color in picture.getcolors(picture.width * picture.height)}) == there
