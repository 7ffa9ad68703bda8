"""What the README and the docs state about the zoo is so, and the commands in them are such as can be typed."""
import contextlib
import functools
import io
import re
import shlex
from importlib import import_module
from pathlib import Path
from statistics import fmean

import pytest
import torch
import yaml
from PIL import Image

from pst_timm.cli import COMMANDS
from pst_timm.commands import report
from pst_timm.commands.list import model_rows

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob('*.md'), *ROOT.glob('docs/*.md')])


def test_model_table():
    table = {
        m[1]: m.groups()[1:] for m in re.finditer(
            r'^\| `(\w+)` \| [^|]+ \| ([\d,]+) \| ([\d.]+) \| (\d+) \|', (ROOT / 'README.md').read_text(), re.M)}
    rows = {row['model']: (row['parameters'], f'{float(row["GMACs"]):.2f}', str(row['input'])) for row in model_rows()}
    assert table == rows


@pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r'\]\(([^)#:]+)(?:#[^)]*)?\)', page.read_text()):
        assert (page.parent / target).exists(), f'{page.name} links to {target}'


@pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_configs_named_exist(page):
    for target in re.findall(r'(?:--config|pst-timm study) (configs/[\w./]+)', page.read_text()):
        assert (ROOT / target).is_file(), f'{page.name} names {target}'


@pytest.mark.parametrize('page', report.pages(ROOT), ids=lambda p: str(p.relative_to(ROOT)))
def test_tables_are_those_of_the_measurements(page):
    assert report.fill_page(page, ROOT, report.load_studies(ROOT)) == page.read_text()


def test_what_the_reading_rounds_is_so():
    study = report.load_studies(ROOT)['transfer']
    top1 = {cell: fmean(row['top1'] for row in study.runs_of(cell)) for cell in study.cells}

    def gains(*against):
        """Points of the model with all of its weights, all of it trained, over others, the smallest first."""
        return sorted(
            round(top1[f'pst_tin200-{shots}'] - top1[f'{other}-{shots}']) for other in against
            for shots in (10, 50, 'all'))

    readme, evidence = (' '.join((ROOT / page).read_text().split()) for page in ('README.md', 'docs/evidence.md'))
    scratch, probes = gains('pst_scratch'), gains('pst_tin200_probe', 'plain_tin200_probe')
    for text in (readme, evidence):
        assert f'`resnet18_pst` {scratch[0]} to {scratch[-1]} points of top-1 over a start from nothing' in text
        assert 'about 4 points over a frozen trunk' in text and set(gains('pst_tin200_frozen')) == {4}
    assert f'{probes[0]} to {probes[-1]} over the classifier alone' in evidence


def test_pages_ask_for_what_was_measured():
    marks = {page.name: re.findall(r'^<!-- ((?:study|table) .*) -->$', page.read_text(), re.M) for page in PAGES}
    deploy = {path.stem for path in (ROOT / 'results/deploy').glob('*.csv')}
    assert marks['performance.md'] == [f'table performance/{name}' for name in ('figures', 'parts', 'layers')] + (
        ['table deploy/twins'] if 'twins' in deploy else [])
    assert set(marks['deploy.md']) == {f'table deploy/{name}' for name in deploy - {'twins'}}
    assert marks['monitoring.md'] == [f'table monitoring/{name}' for name in ('false_alarms', 'power')]
    names = {
        path.stem: yaml.safe_load(path.read_text())['questions'] for path in (ROOT / 'configs/study').glob('*.yaml')}
    assert sorted(marks['evidence.md']) == sorted(
        f'study {study} {name}' for study, numbers in names.items()
        for name in ('setting', 'models', 'plots', *(f'question{i}' for i in numbers)))


def test_pictures_are_small():
    for target in re.findall(r'!\[[^]]*\]\(([^)]+)\)', (ROOT / 'README.md').read_text()):
        assert (ROOT / target).stat().st_size < 300_000, target


def commands(page):
    """The words of each command in the code of a page, comments left out."""
    text = re.sub(r'\\\n\s*', '', page.read_text())
    code = '\n'.join(re.findall(r'^```sh\n(.*?)^```', text, re.M | re.S))
    for line in [*code.splitlines(), *re.findall(r'^ {4,}(\S.*)', text, re.M)]:
        line = line.split(' # ')[0].strip()
        if re.match(r'(pst-timm|python|torchrun|srun) ', line):
            yield shlex.split(line)


@functools.lru_cache
def help_of(module, *action):
    """What --help of a command prints, or of one of its actions."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        import_module(module).main([*action, '--help'])
    return text.getvalue()


def parse(words):
    """Module of a command with a `main`, and the words that follow it."""
    scripts = {'train.py': 'train', 'validate.py': 'validate'}
    for i, word in enumerate(words):
        if word in ('pst-timm', 'pst_timm'):
            return (None if words[i + 1].startswith('--') else f'pst_timm.commands.{words[i + 1]}'), words[i + 2:]
        if word in scripts:
            return f'pst_timm.commands.{scripts[word]}', words[i + 1:]
        if word.startswith('scripts.'):
            return word, words[i + 1:]
    raise AssertionError(f'what is {shlex.join(words)}?')


@pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_are_there_with_the_flags_named(page):
    for words in commands(page):
        module, rest = parse(words)
        if module is None:
            continue
        action = [word for word in rest[:1] if word in getattr(import_module(module), 'ACTIONS', ())]
        at = rest.index('--') if '--' in rest else len(rest)
        # what follows -- is for the training
        for part, flags, before in ((module, rest[:at], action), ('pst_timm.commands.train', rest[at + 1:], [])):
            known = re.findall(r'--[\w-]+', help_of(part, *before)) if flags else ()
            for word in flags:
                if word.startswith('--'):
                    assert word in known, f'{page.name}: {shlex.join(words)} has no {word}'


@pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_named_in_sentences_are_there(page):
    text = page.read_text()
    for name in re.findall(r'`pst-timm ([\w-]+)', text):
        assert name in COMMANDS or name.startswith('--'), f'{page.name} names pst-timm {name}'
    for name in re.findall(r'python -m (scripts[\w.]*)', text):
        assert name == 'scripts.NAME' or (ROOT / f'{name.replace(".", "/")}.py').is_file(), f'{page.name} names {name}'
    # the log of changes says where its scripts went
    assert 'pst_timm.tools' not in text or page.name == 'CHANGELOG.md', f'{page.name} names a room that is gone'


def test_the_first_lines_of_use_run(tmp_path, monkeypatch):
    Image.new('RGB', (80, 60), 'orange').save(tmp_path / 'photo.jpg')
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r'^```python\n(.*?)^```', (ROOT / 'README.md').read_text(), re.M | re.S)
    names = {}
    exec(blocks[0], names)
    assert names['image'].shape == (1, 3, 160, 160) and names['probabilities'].shape == (1, 200)
    assert names['words'] == names['model'].pretrained_cfg['label_descriptions'][names['name']]
    assert names['model'].pst.blocks[0].attn.topk == 2
    names['images'] = torch.randn(2, 3, 96, 96)
    [inspection] = [block for block in blocks if 'inspect_tokens' in block]
    exec(inspection, names)
    assert names['tokens'].selected.shape == (2, 4, 8)


def test_all_pages_are_listed():
    listed = re.findall(r'^- \[([\w.]+)\]', (ROOT / 'docs' / 'README.md').read_text(), re.M)
    assert sorted(listed) == sorted(p.name for p in (ROOT / 'docs').glob('*.md') if p.name != 'README.md')
