"""What the report writes is what the files say, and nothing else on a page changes."""
import json
import re
import shutil
import statistics
import sys
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pst_timm.commands.report import fill_page, load_studies, main
from pst_timm.metrics.answers import pack_answers
from pst_timm.metrics.intervals import student_quantile
from pst_timm.study import plots as study_plots
from pst_timm.study.plots import draw_accuracy, draw_curves, draw_plots, draw_sweep, spread_out
from pst_timm.study.results import Attention, load_study
from pst_timm.study.tables import signed, study_block
from pst_timm.utils.errors import PSTError
from pst_timm.utils.pages import fill_text

from .study_folder import CELLS, QUESTIONS, read_table, write_study, write_table


@pytest.fixture(scope='module')
def made_up(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp('results') / 'cpu')


@pytest.fixture
def folder(made_up, tmp_path):
    """A copy to damage."""
    return shutil.copytree(made_up, tmp_path / 'results/study/cpu')


@pytest.fixture
def checkout(tmp_path):
    """A checkout without a study, and with pages that ask for one."""
    (tmp_path / 'docs').mkdir()
    (tmp_path / 'results').mkdir()
    (tmp_path / 'README.md').write_text('# Title\n\n<!-- study cpu models -->\n\nEnd.\n')
    names = ('setting', *(f'question{i}' for i in range(1, 6)), 'plots')
    (tmp_path / 'docs/evidence.md').write_text('\n\n'.join(f'<!-- study cpu {name} -->' for name in names) + '\n')
    return tmp_path


@pytest.fixture
def small(checkout):
    """A study in the checkout, quick to draw."""
    return write_study(checkout / 'results/study/cpu', swept=CELLS[1:2], sizes=(96,), questions={
        i: question for i, question in QUESTIONS.items() if i != '3'})


def edit(path, change):
    """Rewrite a CSV file; `change` keeps, alters or drops a row."""
    rows = [row for row in read_table(path) if change(row) is not False]
    write_table(path, rows)


def edit_one(path, values, **where):
    """Set values in the first row that matches."""
    found = iter([values])
    edit(path, lambda row: row.update(next(found, {})) if all(row[k] == v for k, v in where.items()) else None)


def drop(folder, wanted):
    """Drop what a study knows of the runs that match."""
    for name in ('cells', 'evaluations', 'curves'):
        edit(folder / f'{name}.csv', lambda row: not wanted(row))


def tables(text):
    """Rows of the Markdown tables of a text, as dicts."""
    found = []
    for table in re.findall(r'(?:^\|.*\|\n?)+', text, re.M):
        lines = [[cell.strip() for cell in line.strip('|').split('|')] for line in table.strip().split('\n')]
        assert set(lines[1]) == {'---'} and len({len(line) for line in lines}) == 1
        found.append([dict(zip(lines[0], line)) for line in lines[2:]])
    return found


def bits(row):
    return [digit == '1' for digit in f'{int("1" + row["answers"], 16):b}'[1:]][:int(row['images'])]


def expected_difference(rows, others):
    """The texts of difference and intervals, from rows of evaluations.csv in the order of the seeds."""
    n = len(rows)
    d = [float(a['top1']) - float(b['top1']) for a, b in zip(rows, others)]
    mean = sum(d) / n
    half = student_quantile(0.95, n - 1) * statistics.stdev(d) / n ** 0.5
    images = [100 * (sum(a) - sum(b)) / n for a, b in zip(zip(*map(bits, rows)), zip(*map(bits, others)))]
    half_images = 1.959964 * statistics.stdev(images) / len(images) ** 0.5
    middle = statistics.fmean(images)
    ends = [(mean - half, mean + half), (middle - half_images, middle + half_images)]
    bold = '**' if all(low > 0 or high < 0 for low, high in ends) else ''
    return [f'{bold}{mean:+.2f}{bold}', *(f'[{low:+.2f}, {high:+.2f}]' for low, high in ends)]


def written_difference(row):
    return [row['difference in top-1'], row['95% over seeds'], row['95% over images']]


def chosen(folder, **columns):
    rows = read_table(folder / 'evaluations.csv')
    return [row for row in rows if all(row[key] == str(value) for key, value in columns.items())]


# ------------------------------------------------------------------------------------------------------- the files

def test_attention_that_selects_everything_is_one(folder):
    labels = [(a.img_size, str(a)) for a in load_study(folder).sweep('resnet18_pst')]
    # 96 px have 3 x 3 coarse tokens, 224 px 7 x 7
    assert labels == [
        *((96, name) for name in (
            'coarse', 'gate, k = 1', 'gate, k = 8', 'gate, k = all', 'joint, k = 1', 'joint, k = 8', 'joint, k = all')),
        *((224, name) for name in (
            'coarse', 'gate, k = 1', 'gate, k = 8', 'gate, k = 16', 'gate, k = all',
            'joint, k = 1', 'joint, k = 8', 'joint, k = 16', 'joint, k = all')),
    ]
    assert str(Attention(100, 'gate', 9)) == 'gate, k = 9' and str(Attention(100, 'gate', 16)) == 'gate, k = all'


COARSE = dict(evaluation='sweep', fine_fusion='coarse')
GATE = dict(evaluation='sweep', fine_fusion='gate')


@pytest.mark.parametrize('name, change, message', [
    ('study.json', lambda path: path.unlink(), 'study.json cannot be read'),
    ('study.json', lambda path: path.write_text('{'), 'study.json is not a JSON file'),
    ('study.json', lambda path: path.write_text('{"setting": "x"}'), "study.json needs 'questions', a dict"),
    ('cells.csv', lambda path: path.unlink(), 'cells.csv cannot be read'),
    ('cells.csv', lambda path: path.write_text(''), 'cells.csv is empty'),
    ('cells.csv', lambda path: path.write_bytes(b'\xff\xfe\x00'), 'cells.csv is not a CSV file'),
    ('cells.csv', lambda path: path.write_text(path.read_text().replace('loss', 'lost', 1)),
     "cells.csv has no column 'loss'; it has cell, model, "),
    ('cells.csv', lambda path: path.write_text(path.read_text()[:-30]),
     'cells.csv, line 13 does not have as many fields as the header'),
    ('cells.csv', lambda path: edit(path, lambda row: row.update(top1='many')),
     "cells.csv, line 2, column 'top1': expected a percentage from 0 to 100, got 'many'"),
    ('cells.csv', lambda path: edit(path, lambda row: row.update(top1='101')), "column 'top1'"),
    ('cells.csv', lambda path: edit(path, lambda row: row.update(seed='1.5')),
     "column 'seed': expected a whole number, got '1.5'"),
    ('cells.csv', lambda path: edit(path, lambda row: row.update(cell='')), "column 'cell': expected a name, got ''"),
    ('cells.csv', lambda path: edit(path, lambda row: row.update(seed='0')),
     'cells.csv has two rows for cell resnet18, seed 0; keep one'),
    ('evaluations.csv', lambda path: path.unlink(), 'evaluations.csv cannot be read'),
    ('evaluations.csv', lambda path: edit(path, lambda row: row.update(answers='xyz')),
     "evaluations.csv, line 2, column 'answers': expected hexadecimal digits, got 'xyz'"),
    ('evaluations.csv', lambda path: edit(path, lambda row: row.update(answers=row['answers'][:-1])),
     "cell resnet18, seed 0, evaluation 'final', column 'answers': 202 images are 51 hexadecimal digits, got 50"),
    ('evaluations.csv', lambda path: edit(path, lambda row: row.update(answers='0' * 51)),
     "'answers' are 0.00% right, but 'top1' is "),
    ('evaluations.csv', lambda path: edit_one(path, dict(fine_fusion='both'), **GATE), "got 96, 1 and 'both'"),
    ('evaluations.csv', lambda path: edit_one(path, dict(topk=''), **GATE), "needs 'img_size', and 'topk' with"),
    ('evaluations.csv', lambda path: edit_one(path, dict(topk='3'), **COARSE), "got 96, 3 and 'coarse'"),
    ('evaluations.csv', lambda path: edit_one(path, dict(img_size=''), **COARSE), "got None, 0 and 'coarse'"),
    ('evaluations.csv', lambda path: edit_one(path, dict(evaluation='final'), evaluation='probe'),
     'evaluations.csv has two rows for cell resnet18, seed 0, evaluation final; keep one'),
    ('evaluations.csv', lambda path: edit_one(path, dict(fine_fusion='joint'), **GATE, topk='8'),
     'evaluation sweep, img_size 96, topk 8, fine_fusion joint; keep one'),
    ('curves.csv', lambda path: edit(path, lambda row: row.update(epoch='')), "curves.csv, line 2, column 'epoch'"),
    ('latency.csv', lambda path: edit(path, lambda row: row.update(ratio='fast')),
     "latency.csv, line 2, column 'ratio': expected a number, got 'fast'"),
    ('latency.csv', lambda path: edit_one(path, dict(cell='resnet18'), cell='resnet18_pst'),
     'latency.csv has two rows for cell resnet18; keep one'),
    ('curves.csv', lambda path: edit_one(path, dict(epoch='2'), epoch='3'),
     'curves.csv has two rows for cell resnet18, seed 0, epoch 2; keep one'),
])
def test_bad_files_are_named(folder, tmp_path, capsys, name, change, message):
    change(folder / name)
    assert main(['--root', str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith('pst-timm report: error: ') and message in error


# ------------------------------------------------------------------------------------------------------ the tables

def test_models_are_means_over_seeds(folder):
    [rows] = tables(study_block(load_study(folder), 'models'))
    assert [row['model'] for row in rows] == [f'`{cell}`' for cell in CELLS]
    runs = [row for row in read_table(folder / 'cells.csv') if row['cell'] == 'resnet18_pst']
    top1, loss = ([float(run[key]) for run in runs] for key in ('top1', 'loss'))
    assert rows[1] == {
        'model': '`resnet18_pst`', 'seeds': '3', 'parameters (M)': '11.00', 'GMACs': '0.320',
        'top-1 (%)': f'{np.mean(top1):.2f} ± {statistics.stdev(top1):.2f}',
        'loss': f'{np.mean(loss):.3f} ± {statistics.stdev(loss):.3f}',
        'ECE': f'{np.mean(top1) / 1000:.3f} ± {statistics.stdev(top1) / 1000:.3f}',
        # 660, 661 and 662 seconds
        'training (min)': '11.0 ± 0.0', 'training step, times `resnet18`': '1.200',
        'latency, times `resnet18`': '1.062'}


def test_cost_that_was_not_measured_is_left_open(folder):
    edit(folder / 'cells.csv', lambda row: row.update(train_seconds='') if row['cell'] == 'resnet18' else None)
    edit(folder / 'latency.csv', lambda row: row['cell'] != 'resnet18')
    [rows] = tables(study_block(load_study(folder), 'models'))
    assert [row['training (min)'] for row in rows[:2]] == ['-', '11.0 ± 0.0']
    # ratios are those to the first cell that was timed
    assert [row['latency, times `resnet18_pst`'] for row in rows[:2]] == ['-', '1.062']


@pytest.mark.parametrize('value, text', [(0.0004, '+0.000'), (-0.0004, '+0.000'), (-0.0006, '-0.001'), (2, '+2.000')])
def test_signs(value, text):
    assert signed(value, 3) == text


def test_setting_says_with_what_and_when(folder):
    text = study_block(load_study(folder), 'setting')
    assert text.startswith('Made-up numbers of no machine.\n')
    assert 'Trained 2000-01-01 to 2000-01-03, a made-up machine, cells side by side: 2, threads of each: 1' in text
    assert 'python 3.11, torch 2.0, torchvision 0.1, timm 1.0, pst_timm 0.1.' in text
    assert 'Not run yet' not in text


def test_setting_names_what_differs_and_what_is_missing(folder):
    edit(folder / 'cells.csv', lambda row: row.update(torch='3.0') if row['seed'] == '2' else None)
    head = json.loads((folder / 'study.json').read_text())
    (folder / 'study.json').write_text(json.dumps(dict(
        head, missing=['resnet26-seed0', 'resnet26-seed1'], setting='Done with python 3.11.')))
    text = study_block(load_study(folder), 'setting')
    assert 'torch 2.0 and 3.0, ' in text
    assert 'Not run yet: resnet26-seed0, resnet26-seed1.' in text
    # the sentence has said it
    assert text.startswith('Done with python 3.11.\n') and text.count('python') == 1


@pytest.mark.parametrize('number, evaluation', [('1', 'final'), ('5', 'probe')])
def test_comparisons(folder, number, evaluation):
    text = study_block(load_study(folder), f'question{number}')
    [rows] = tables(text)
    own = chosen(folder, cell='resnet18_pst', evaluation=evaluation)
    assert written_difference(rows[0]) == ['-'] * 3
    against = QUESTIONS[number]['against']
    assert [row['model'] for row in rows[1:]] == [f'`{cell}`' for cell in against]
    for row, cell in zip(rows[1:], against):
        others = chosen(folder, cell=cell, evaluation=evaluation)
        assert (row['seeds'], row['pairs']) == ('3', '3')
        assert written_difference(row) == expected_difference(own, others)
        loss = [float(a['loss']) - float(b['loss']) for a, b in zip(own, others)]
        assert row['difference in loss'].startswith(f'{sum(loss) / 3:+.3f} [')
        plain, seeds, images = expected_difference(own, others)
        assert (
            f'\n`resnet18_pst` minus `{cell}`: {plain.strip("*")} points of top-1 '
            f'(95% over 3 seeds {seeds}; over 202 images {images}).') in text


def test_differences_in_bold_and_not(folder):
    study = load_study(folder)
    rows = [row for i in '12' for table in tables(study_block(study, f'question{i}')) for row in table]
    written = [row['difference in top-1'] for row in rows]
    assert any(w.startswith('**') for w in written) and any(re.fullmatch(r'[+-]\d+\.\d\d', w) for w in written)


def test_sweep_compares_with_coarse_attention_of_the_same_size(folder):
    text = study_block(load_study(folder), 'question2')
    [rows] = tables(text)
    assert len(rows) == 7 + 9
    for row in rows:
        fusion, _, k = row['attention'].partition(', k = ')
        coarse = chosen(folder, cell='resnet18_pst', evaluation='sweep', img_size=row['px'], fine_fusion='coarse')
        if fusion == 'coarse':
            assert written_difference(row) == ['-'] * 3
            continue
        fine = chosen(
            folder, cell='resnet18_pst', evaluation='sweep', img_size=row['px'], fine_fusion=fusion,
            topk=k.replace('all', '64'))
        assert written_difference(row) == expected_difference(fine, coarse)
        ece = [float(a['ece']) - float(b['ece']) for a, b in zip(fine, coarse)]
        assert row['difference in ECE'].startswith(f'{sum(ece) / 3:+.3f} ['.replace('-0.000', '+0.000'))
        assert row['seeds'] == '3'
    best = max(rows[1:7], key=lambda row: float(row['difference in top-1'].strip('*')))
    better = sum(row['difference in top-1'].startswith('**+') for row in rows[1:7])
    worse = sum(row['difference in top-1'].startswith('**-') for row in rows[1:7])
    assert text.partition('Of 6 settings of fine attention at 96 px, ')[2].startswith(
        f'{better} are better than coarse attention and {worse} worse, with both intervals away from zero.')
    assert f'chosen after the fact, is {best["attention"]}: {best["difference in top-1"].strip("*")} points' in text


def test_sentences_are_about_the_size_trained_at(folder):
    edit(folder / 'cells.csv', lambda row: row.update(img_size='224'))
    study = load_study(folder)
    assert 'Of 8 settings of fine attention at 224 px, ' in study_block(study, 'question2')
    assert '\n\nAt 224 px, ' in study_block(study, 'question3')


def test_training_through_the_fine_branch_is_compared_coarse_and_fine(folder):
    text = study_block(load_study(folder), 'question3')
    [rows] = tables(text)
    assert len(rows) == 7 + 9
    base, other = 'resnet18_pst', 'resnet18_pst_fine50'
    coarse = chosen(folder, cell=base, evaluation='sweep', img_size=224, fine_fusion='coarse')
    row = next(row for row in rows if (row['px'], row['attention']) == ('224', 'joint, k = 16'))
    columns = dict(evaluation='sweep', img_size=224, fine_fusion='joint', topk=16)
    fine, beside = chosen(folder, cell=other, **columns), chosen(folder, cell=base, **columns)
    assert written_difference(row) == expected_difference(fine, beside)
    assert row[f'top-1 (%), `{other}`'].startswith(f'{np.mean([float(r["top1"]) for r in fine]):.2f} ± ')
    mean, seeds, _ = expected_difference(fine, coarse)
    assert row[f'difference in top-1 to `{base}`, coarse'] == f'{mean.strip("*")} {seeds}'
    # trained with 8 of 9 tokens and gate at 96 px
    columns = dict(evaluation='sweep', img_size=96)
    coarse = chosen(folder, cell=base, fine_fusion='coarse', **columns)
    for name, setting in (('coarse', dict(fine_fusion='coarse')), ('gate, k = 8', dict(fine_fusion='gate', topk=8))):
        mean, seeds, images = expected_difference(chosen(folder, cell=other, **columns, **setting), coarse)
        assert (
            f'`{other}` evaluated with {name} attention minus `{base}` evaluated with coarse attention: '
            f'{mean.strip("*")} points of top-1 (95% over 3 seeds {seeds}; over 202 images {images})') in text


def test_a_seed_that_one_cell_lacks_is_left_out_of_the_pairs(folder):
    drop(folder, lambda row: (row['cell'], row['seed']) == ('resnet18', '1'))
    [rows] = tables(study_block(load_study(folder), 'question1'))
    own = [row for row in chosen(folder, cell='resnet18_pst', evaluation='final') if row['seed'] != '1']
    assert (rows[1]['seeds'], rows[1]['pairs'], rows[2]['pairs']) == ('2', '2', '3')
    assert written_difference(rows[1]) == expected_difference(own, chosen(folder, cell='resnet18', evaluation='final'))


def test_one_seed_has_no_interval_over_seeds(folder):
    drop(folder, lambda row: row['seed'] != '0')
    study = load_study(folder)
    text = study_block(study, 'question1')
    [rows] = tables(text)
    assert rows[1]['95% over seeds'] == 'one seed' and rows[1]['95% over images'].startswith('[')
    assert rows[1]['top-1 (%)'] == f'{float(chosen(folder, cell="resnet18", evaluation="final")[0]["top1"]):.2f}'
    assert '95% over seeds unknown, as there is one; over 202 images [' in text
    assert '±' not in study_block(study, 'models') + study_block(study, 'question2') + study_block(study, 'question3')


def test_cells_that_were_not_run_are_shown_as_such(folder):
    drop(folder, lambda row: row['cell'] == 'resnet18')
    edit(folder / 'latency.csv', lambda row: row['cell'] != 'resnet18_pst_fine50')
    study = load_study(folder)
    [rows] = tables(study_block(study, 'models'))
    assert rows[0]['seeds'] == '0' and rows[0]['top-1 (%)'] == '-' and rows[3]['latency, times `resnet18`'] == '-'
    [rows] = tables(study_block(study, 'question1'))
    assert (rows[1]['top-1 (%)'], rows[1]['pairs'], *written_difference(rows[1])) == ('-', '0', '-', '-', '-')
    assert '`resnet18_pst` minus `resnet18_pst_depth0`' in study_block(study, 'question1')
    assert study_block(study, 'question5') is None
    assert study_block(study, 'question4') == 'Not part of this study.'


def test_without_the_model_in_question_there_is_no_answer(folder):
    drop(folder, lambda row: row['cell'] == 'resnet18_pst')
    assert [study_block(load_study(folder), f'question{i}') for i in '1235'] == [None] * 4


def test_without_any_run_there_is_the_setting_alone(folder):
    for name in ('cells', 'evaluations', 'curves'):
        path = folder / f'{name}.csv'
        path.write_text(path.read_text().split('\n')[0] + '\n')
    (folder / 'latency.csv').unlink()
    study = load_study(folder)
    assert study_block(study, 'setting') == 'Made-up numbers of no machine.'
    assert study_block(study, 'models') is None and study_block(study, 'question1') is None
    assert draw_plots(study, folder) == []


def test_cells_of_other_classes_are_told_apart(folder):
    edit(folder / 'cells.csv', lambda row: row.update(classes='16') if row['cell'] == 'resnet18_pst_fine50' else None)
    study = load_study(folder)
    [rows] = tables(study_block(study, 'models'))
    assert [row['classes'] for row in rows] == ['20', '20', '20', '16']
    assert study_plots.comparable_cells(study) == list(CELLS[:3])


def test_results_on_other_images_are_not_compared(folder):
    def shorten(row):
        if row['cell'] == 'resnet18':
            row.update(images='201', answers=pack_answers(bits(row)[:201]))

    edit(folder / 'evaluations.csv', shorten)
    with pytest.raises(PSTError, match='different images cannot be compared: resnet18_pst 202 images, resnet18 201'):
        study_block(load_study(folder), 'question1')


@pytest.mark.parametrize('question, message', [
    (dict(kind='contrast', cells=['resnet18']), "Question 1 in study.json of cpu needs 'kind'"),
    (dict(kind='compare', of='resnet18'), "'against' is not right"),
    (dict(kind='sweep', cells=['resnet81']), "is about 'resnet81'; the cells are resnet18, "),
    ('Does it help?', "needs 'kind'"),
])
def test_questions_that_cannot_be_answered_are_named(folder, question, message):
    head = json.loads((folder / 'study.json').read_text())
    (folder / 'study.json').write_text(json.dumps(dict(head, questions={'1': question})))
    with pytest.raises(PSTError, match=re.escape(message)):
        study_block(load_study(folder), 'question1')


# ------------------------------------------------------------------------------------------------------- the pages

PAGE = '''# Title

Marks such as `<!-- study cpu models -->` stay in prose.

```
<!-- study cpu models -->
```py
<!-- study cpu models -->
<!-- end -->
```

<!-- study cpu models -->

an old table

<!-- end -->

<!-- a remark -->
~~~md
```
<!-- table performance/parts -->
~~~
<!-- table performance/figures -->
kept, as there was no end

  <!-- study cpu indented -->
<!-- study cpu plots -->
<!-- end -->
<!-- end -->
'''


def test_only_marked_blocks_change():
    def make(kind, words):
        return f'{kind}: {"+".join(words)}\ntwo lines'

    filled = fill_text(PAGE, {kind: partial(make, kind) for kind in ('study', 'table')})
    expected = PAGE.replace('an old table', 'study: cpu+models\ntwo lines')
    expected = expected.replace(
        'figures -->\n', 'figures -->\n\ntable: performance/figures\ntwo lines\n\n<!-- end -->\n')
    expected = expected.replace('plots -->\n', 'plots -->\n\nstudy: cpu+plots\ntwo lines\n\n')
    assert filled == expected


PIECES = st.sampled_from([
    'text', '', '```', '````py', '~~~', '<!-- end -->', '<!-- study cpu models -->', '<!-- table performance/parts -->',
    'see `<!-- study cpu setting -->`', '<!-- other -->', '| a | b |'])


@settings(deadline=None, derandomize=True)
@given(st.lists(PIECES, max_size=14))
def test_filling_twice_is_filling_once(pieces):
    def filled_with(text, content):
        return fill_text(text, {kind: lambda words: content for kind in ('study', 'table')})

    text = '\n'.join(pieces)
    filled = filled_with(text, 'a block')
    assert filled_with(filled, 'a block') == filled
    # another content replaces the first and leaves no trace of it, nor does none
    assert filled_with(filled, 'new\nlines') == filled.replace('a block', 'new\nlines')
    assert filled_with(filled_with(filled, ''), 'a block') == filled


def test_blocks_are_made_in_the_order_of_the_page():
    made = []
    text = '<!-- study a -->\n<!-- study b -->\n'
    assert fill_text(text, {'study': lambda words: made.append(words) or ''}) == (
        '<!-- study a -->\n\n<!-- end -->\n<!-- study b -->\n\n<!-- end -->\n')
    assert made == [['a'], ['b']]


def test_report_fills_pages_and_draws_plots_and_does_so_once(checkout, small, capsys):
    assert main(['--root', str(checkout)]) == 0
    readme, evidence = ((checkout / name).read_text() for name in ('README.md', 'docs/evidence.md'))
    study = load_study(small)
    assert readme == (
        f'# Title\n\n<!-- study cpu models -->\n\n{study_block(study, "models")}\n\n<!-- end -->\n\nEnd.\n')
    for name in ('setting', 'question1', 'question2', 'question3', 'question4', 'question5'):
        assert f'<!-- study cpu {name} -->\n\n{study_block(study, name)}\n\n<!-- end -->' in evidence
    links = re.findall(r'!\[.+\]\((.+)\)', evidence)
    assert links == [f'../results/study/cpu/{name}.png' for name in ('accuracy', 'curves', 'sweep')]
    images = [(checkout / 'docs' / link).read_bytes() for link in links]
    assert all(image.startswith(b'\x89PNG') and len(image) > 10_000 for image in images)
    assert 'README.md: made anew' in capsys.readouterr().out
    assert main(['--root', str(checkout)]) == 0
    assert 'made anew' not in capsys.readouterr().out
    assert (readme, evidence) == ((checkout / 'README.md').read_text(), (checkout / 'docs/evidence.md').read_text())
    assert images == [(checkout / 'docs' / link).read_bytes() for link in links]


def test_links_are_relative_to_the_page_and_lead_somewhere(checkout, small):
    (checkout / 'README.md').write_text('<!-- study cpu plots -->\n')
    (small / 'sweep.png').touch()
    assert re.findall(r'\(.*\)', fill_page(checkout / 'README.md', checkout, load_studies(checkout))) == [
        '(results/study/cpu/sweep.png)']


def test_what_was_not_run_says_how_to_once_in_a_page(checkout, small):
    line = 'Not yet run: `pst-timm study configs/study/gpu.yaml`.'
    names = ('setting', 'models', 'question3', 'plots')
    (checkout / 'README.md').write_text('\n'.join(f'<!-- study gpu {name} -->' for name in names))
    assert fill_page(checkout / 'README.md', checkout, load_studies(checkout)) == '\n'.join(
        f'<!-- study gpu {name} -->\n\n{block}<!-- end -->' for name, block in zip(names, (f'{line}\n\n', '', '', '')))
    # a study that lacks an answer says so where it is asked
    drop(small, lambda row: row['cell'] == 'resnet18_pst')
    page = checkout / 'docs/evidence.md'
    page.write_text('<!-- study cpu question1 -->\n<!-- study cpu models -->\n<!-- study cpu question5 -->\n')
    filled = fill_page(page, checkout, load_studies(checkout))
    assert filled.count(line.replace('gpu', 'cpu')) == 2 and '| `resnet18` |' in filled


def test_tables_of_results(checkout, capsys):
    folder = checkout / 'results/performance'
    folder.mkdir()
    (folder / 'parts.csv').write_text('part,ms,count\nwhole,1.23456,3\nhalf,5.1e-02,-\n')
    (folder / 'parts.json').write_text('{"setting": "here, today"}')
    (checkout / 'README.md').write_text('<!-- table performance/parts -->\n')
    assert main(['--root', str(checkout)]) == 0
    assert (checkout / 'README.md').read_text() == (
        '<!-- table performance/parts -->\n\nhere, today.\n\n| part | ms | count |\n| --- | --- | --- |\n'
        '| whole | 1.235 | 3 |\n| half | 0.051 | - |\n\n<!-- end -->\n')
    (folder / 'parts.json').write_text('{}')
    assert main(['--root', str(checkout)]) == 1
    assert 'parts.json must be a JSON file' in capsys.readouterr().err
    (folder / 'parts.csv').write_text('part,ms\n')
    (folder / 'parts.json').write_text('{"setting": "here"}')
    assert main(['--root', str(checkout)]) == 1
    assert 'parts.csv has no rows' in capsys.readouterr().err


@pytest.mark.parametrize('mark', [
    'study cpu model', 'study cpu', 'study', 'table', 'table performance/parts fast', 'table performance/parts'])
def test_unknown_marks_are_named(checkout, capsys, mark):
    (checkout / 'README.md').write_text(f'<!-- {mark} -->\n')
    assert main(['--root', str(checkout)]) == 1
    error = capsys.readouterr().err
    assert 'parts.csv cannot be read' in error if mark == 'table performance/parts' else (
        f'README.md: unknown mark {mark!r}' in error)
    assert (checkout / 'README.md').read_text() == f'<!-- {mark} -->\n'


def test_report_needs_results(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(['--root', str(tmp_path)])
    assert stop.value.code == 2 and 'has no folder results' in capsys.readouterr().err


def test_without_scipy_there_is_one_sentence(checkout, small, monkeypatch, capsys):
    for name in ('scipy', 'scipy.stats'):
        monkeypatch.setitem(sys.modules, name, None)
    page = checkout / 'docs/evidence.md'
    page.write_text('<!-- study cpu question1 -->\n')
    assert main(['--root', str(checkout)]) == 1
    said = capsys.readouterr().err
    assert said.startswith('pst-timm report: error: ') and said.endswith("pip install 'pst_timm[train]' brings it.\n")
    assert said.count('\n') == 1 and page.read_text() == '<!-- study cpu question1 -->\n'


def test_tables_come_without_matplotlib_too(checkout, small, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    assert main(['--root', str(checkout)]) == 0
    assert "pip install 'pst_timm[train]'" in capsys.readouterr().err
    assert '| `resnet18_pst` |' in (checkout / 'README.md').read_text()


# ------------------------------------------------------------------------------------------------------- the plots

@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(0., 1.), min_size=1, max_size=9).map(sorted))
def test_labels_keep_their_distance_and_order(values):
    gap = 0.1
    places = spread_out(values, gap)
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(places))
    assert places[0] >= -1e-9 and places[-1] <= 1 + 1e-9
    if all(b - a >= gap for a, b in pairwise(values)):
        assert places == pytest.approx(values)


def test_accuracy_plot_shows_every_cell_at_its_cost(folder):
    study = load_study(folder)
    panels = draw_accuracy(study).axes
    labels = ['GMACs\nof an image', 'latency (ms)\nof 100 images', 'training step (ms)\nof 64 images']
    assert [axes.get_xlabel() for axes in panels] == labels
    costs = ([0.3, 0.32, 0.34, 0.36], [80., 85., 90., 95.], [300., 360., 420., 480.])
    top1 = [[row['top1'] for row in study.runs_of(cell)] for cell in CELLS]
    for axes, cost in zip(panels, costs):
        points = [bars.lines[0].get_xydata()[0] for bars in axes.containers]
        assert np.array(points) == pytest.approx(np.transpose([cost, np.mean(top1, axis=1)]))
        ends = [bars.lines[2][0].get_segments()[0][:, 1] for bars in axes.containers]
        assert np.diff(ends, axis=1)[:, 0] == pytest.approx(2 * np.std(top1, axis=1, ddof=1))
    assert {text.get_text() for text in panels[-1].texts if text.get_text()} == set(CELLS)


def test_labels_of_equal_models_do_not_overlap(folder):
    edit(folder / 'cells.csv', lambda row: row.update(top1='50.0'))
    figure = draw_accuracy(load_study(folder))
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [t.get_window_extent(canvas.get_renderer()) for axes in figure.axes for t in axes.texts if t.get_text()]
    assert len(boxes) == len(CELLS)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box.x1 <= figure.bbox.x1 for box in boxes)


def test_curves_are_means_up_to_where_all_seeds_are(folder):
    edit(folder / 'curves.csv', lambda row: (row['cell'], row['seed'], row['epoch']) != ('resnet18', '2', '3'))
    loss, top1 = draw_curves(load_study(folder)).axes
    means = [line for line in loss.lines if line.get_linewidth() == 1.2]
    assert means[0].get_xydata() == pytest.approx(np.array([(e, 3 / e + 0.1) for e in (1, 2, 3)]))
    assert means[1].get_xydata() == pytest.approx(np.array([(e, 3 / e + 0.1) for e in (1, 2, 3, 4)]))
    assert len([line for line in loss.lines if line.get_linewidth() == 0.5]) == 3 * len(CELLS)
    assert top1.get_ylabel() == 'validation top-1 (%)'


def test_sweep_plot_shows_means_of_every_k(folder):
    study = load_study(folder)
    axes = draw_sweep(study).axes
    assert len(axes) == 2 * 2 * 3
    assert [a.get_title('left') for a in axes[::3]] == [
        f'{cell}, {size} px' for cell in CELLS[1::2] for size in (96, 224)]
    panel = axes[4]  # the loss of the first cell at 224 px
    assert [label.get_text() for label in panel.get_xticklabels()] == ['1', '8', '16', 'all']
    lines = {line.get_label(): line for line in panel.lines}
    sweep = study.sweep('resnet18_pst')
    for fusion in ('gate', 'joint'):
        expected = [np.mean([r['loss'] for r in sweep[Attention(224, fusion, k)].values()]) for k in (1, 8, 16, 49)]
        assert lines[fusion].get_ydata() == pytest.approx(expected)
    coarse = [r['loss'] for r in sweep[Attention(224, 'coarse', 0)].values()]
    assert lines['coarse alone, and range of its seeds'].get_ydata() == pytest.approx([np.mean(coarse)] * 2)
    # nothing is cut off
    low, high = panel.get_ylim()
    values = [r['loss'] for a, rows in sweep.items() if a.img_size == 224 for r in rows.values()]
    assert low < min(values) and max(values) < high
