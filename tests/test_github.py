"""Workflows, the form for results and the citation are well-formed, and what they name is there."""
import os
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from pst_timm.engine import parse_train_args, parse_validate_args

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = None

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / '.github' / 'workflows').glob('*.yml'))
FORM = ROOT / '.github' / 'ISSUE_TEMPLATE' / 'results.yml'


def read(path):
    content = yaml.safe_load(path.read_text(encoding='utf-8'))
    # YAML 1.1 takes the key `on` for true
    return {'on' if key is True else key: value for key, value in content.items()}


def steps(workflow):
    return [step for job in workflow['jobs'].values() for step in job['steps']]


@pytest.mark.parametrize('path', WORKFLOWS, ids=lambda p: p.name)
def test_workflows_run_what_is_there_on_every_change(path):
    workflow = read(path)
    assert workflow['on'] == {'pull_request': None, 'push': {'branches': ['main']}}
    assert workflow['permissions'] == {'contents': 'read'} and len(workflow['jobs']) <= 2
    for job in workflow['jobs'].values():
        assert job['runs-on'] == 'ubuntu-latest' and job['timeout-minutes'] <= 120
        assert job['steps'][0]['uses'].startswith('actions/checkout@')
    for step in steps(workflow):
        assert ('uses' in step) != ('run' in step)
        if 'uses' in step:
            assert re.fullmatch(r'actions/[\w-]+@v\d+', step['uses'])
            settings = step.get('with', {})
            assert settings.get('python-version', '3.11') == '3.11'
            assert all((ROOT / name).is_file() for name in settings.get('cache-dependency-path', '').split())
            continue
        for command in step['run'].splitlines():
            words = shlex.split(command)
            if words[:2] == ['python', '-m']:
                assert find_spec(words[2]) is not None, command
            else:
                assert os.access(ROOT / words[0], os.X_OK), command


def test_the_workflows_are_the_check_of_every_change_and_that_of_the_wheel():
    commands = {path.name: [step['run'] for step in steps(read(path)) if 'run' in step] for path in WORKFLOWS}
    assert commands == {'ci.yml': ['.ci/run'], 'wheel.yml': ['python -m scripts.check_wheel']}
    targets = re.findall(r'^make (\w+)$', (ROOT / '.ci' / 'run').read_text(), re.M)
    rules = re.findall(r'^(\w+):', (ROOT / 'Makefile').read_text(), re.M)
    assert targets == ['lint', 'test', 'demo'] and set(targets) <= set(rules)


def test_the_form_asks_for_what_makes_a_number_repeatable():
    form = read(FORM)
    assert {'name', 'description', 'title', 'body'} <= form.keys()
    fields = {item['id']: item for item in form['body'] if item['type'] != 'markdown'}
    assert len(fields) == len(form['body']) - 1  # no name twice
    for item in form['body']:
        assert item['type'] in ('markdown', 'textarea', 'input', 'dropdown', 'checkboxes')
        assert 'value' in item['attributes'] if item['type'] == 'markdown' else 'label' in item['attributes']
        assert item['type'] != 'dropdown' or len(set(item['attributes']['options'])) > 1
    required = {name for name, item in fields.items() if item.get('validations', {}).get('required')}
    assert required >= {'number', 'command', 'seed', 'versions', 'hardware', 'log'}


def test_the_commands_of_the_form_can_be_typed(monkeypatch):
    monkeypatch.chdir(ROOT)
    form = read(FORM)
    [command] = [item['attributes']['placeholder'] for item in form['body'] if item.get('id') == 'command']
    train, validate = command.strip().splitlines()
    assert train.startswith('torchrun --nproc_per_node=8 train.py ')
    assert parse_train_args(shlex.split(train)[3:]).model == 'resnet50_pst'
    assert shlex.split(validate)[:2] == ['python', 'validate.py']
    assert parse_validate_args(shlex.split(validate)[2:]).topk_sweep == [0, 8]
    for name in re.findall(r'docs/[\w.]+', FORM.read_text()):
        assert (ROOT / name).is_file()


def test_citation():
    citation = read(ROOT / 'CITATION.cff')
    assert citation['cff-version'] == '1.2.0' and citation['type'] == 'software'
    if tomllib is not None:
        project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
        assert (citation['title'], citation['license']) == (project['name'], project['license'])
    paper = citation['preferred-citation']
    for work in (citation, paper, *citation['references']):
        # what version 1.2 of the format demands
        assert work['title'] and work['authors'] and (work is citation or work['type'])
        for author in work['authors']:
            assert author.keys() in ({'name'}, {'family-names', 'given-names'})
    assert citation['message'] and isinstance(paper['year'], int)
    # the same paper as in the README
    bibtex = (ROOT / 'README.md').read_text()
    assert f'title   = {{{paper["title"]}}}' in bibtex and f'journal = {{{paper["journal"]}}}' in bibtex
    authors = ' and '.join(f'{a["family-names"]}, {a["given-names"]}' for a in paper['authors'])
    assert f'author  = {{{authors}}}' in bibtex and paper['url'].endswith('/2505.12772')
