"""What the README and the docs state about the zoo is so."""
import json
import re
from pathlib import Path

import pytest

from pst_timm.commands import report
from pst_timm.commands.list import bundled_weights, model_rows

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob('*.md'), *ROOT.glob('docs/*.md')])


def test_model_table():
    table = {
        m[1]: m.groups()[1:] for m in re.finditer(
            r'^\| `(\w+)` \| [^|]+ \| ([\d,]+) \| ([\d.]+) \| (\d+) \|', (ROOT / 'README.md').read_text(), re.M)}
    rows = {row['model']: (row['parameters'], f'{float(row["GMACs"]):.2f}', str(row['input'])) for row in model_rows()}
    assert table == rows


def test_bundled_weights():
    [record] = bundled_weights()
    text = ' '.join((ROOT / 'README.md').read_text().split())
    assert f'{record["top1"]:.2f}% top-1 of {record["images"]} held-out images at {record["img_size"]} px' in text


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r'\]\(([^)#:]+)(?:#[^)]*)?\)', page.read_text()):
        assert (page.parent / target).exists(), f'{page.name} links to {target}'


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_configs_named_exist(page):
    for target in re.findall(r'(?:--config|pst-timm study) (configs/[\w./]+)', page.read_text()):
        assert (ROOT / target).is_file(), f'{page.name} names {target}'


@pytest.mark.parametrize('page', report.pages(ROOT), ids=lambda p: p.name)
def test_tables_are_those_of_the_measurements(page):
    assert report.fill_page(page, ROOT, report.load_studies(ROOT)) == page.read_text()


def test_pages_ask_for_what_was_measured():
    marks = {page.name: re.findall(r'^<!-- ((?:study|performance) .*) -->$', page.read_text(), re.M) for page in PAGES}
    assert marks['performance.md'] == ['performance figures', 'performance parts', 'performance layers']
    names = {s: [*json.loads((ROOT / f'results/study/{s}/study.json').read_text())['questions']] for s in ['cpu']}
    names['gpu'] = '12345'
    assert sorted(marks['evidence.md']) == sorted(
        f'study {study} {name}' for study, numbers in names.items()
        for name in ('setting', 'models', 'plots', *(f'question{i}' for i in numbers)))
