"""YAML files mean what a person reads in them, or are refused."""
import os

import pytest
import yaml

from pst_timm.utils.configs import read_config
from pst_timm.utils.errors import PSTError

BOMB = 'a: &a [x, x, x, x, x, x, x, x, x, x]\n' + ''.join(
    f'{chr(98 + i)}: &{chr(98 + i)} [{", ".join([f"*{chr(97 + i)}"] * 10)}]\n' for i in range(9))


def write(folder, content):
    path = folder / 'config.yaml'
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize('content, line, problem', [
    ('a: 1\nb: 2\na: 3', 3, "'a' is there twice, first in line 1"),
    ('a:\n  x: 1\n  x: 2', 3, "'x' is there twice"),
    ('a: 1\n"a": 2', 2, "'a' is there twice"),
    ('seed: 010', 1, 'seed: 010 is a number in base 8'),
    ('lr: 1:30', 1, 'lr: 1:30 is a number in base 60'),
    ('lr: 1:30.5', 1, 'base 60'),
    ('\nexperiment: 2020-01-01', 2, 'experiment: 2020-01-01 is a date'),
    ('a: [1, 2020-01-01]', 1, 'a: 2020-01-01 is a date'),
    ('a: !!python/object/apply:os.system [ls]', 1, 'python/object'),
    ('a: !!python/name:os.system', 1, 'python/name'),
    ('a: !!binary aGk=', 1, 'binary'),
    ('a: !mine 1', 1, '!mine'),
    ('a: !!set {x}', 1, 'set'),
    ('? [a, b]\n: 1', 1, 'cannot be a key'),
    ('a: 1\n\tb: 2', 2, 'not valid YAML'),
    ('a: [', 1, 'not valid YAML'),
    ('a: 1\n---\nb: 2', 2, 'not valid YAML'),
    ('a: *nowhere', 1, 'not valid YAML'),
    ('a: {x: *a', 1, 'not valid YAML'),
    ('a: &a [*a]', 1, 'inside of what it names'),
    (BOMB, 1, 'make 12,345,679,021 values'),
    ('[' * 60 + ']' * 60, None, 'must hold one mapping'),
    ('a: ' + '[' * 60 + ']' * 60, 1, 'too deeply'),
    ('a: ' + '[' * 20000, None, 'too deeply'),
    ('a: ' + '{a: ' * 20000, None, 'too deeply'),
    ('- a\n- b', None, 'must hold one mapping'),
    ('just text', None, 'must hold one mapping'),
    ('a: \x01', None, 'not valid YAML'),
    ('name: Müller\nb: grün'.encode('latin-1'), 1, 'UTF-8'),
    ('a: 1\nb: grün'.encode('latin-1'), 2, 'UTF-8'),
    (b'\xff\xfea', None, 'UTF-8'),
    (b'a: ' + b'x' * 2 ** 20, None, '1,048,579 bytes'),
    ('a: 1' + '0' * 5000, None, 'not valid YAML'),
], ids=lambda value: None if isinstance(value, (int, type(None))) else repr(value)[:30])
def test_what_is_not_what_it_seems_is_refused(tmp_path, content, line, problem):
    path = write(tmp_path, content)
    with pytest.raises(PSTError) as e:
        read_config(path)
    told = str(e.value)
    assert str(path) in told and problem in told and told.count('\n') == 0 and len(told) < 500
    if line is not None:
        assert f'line {line}' in told


@pytest.mark.parametrize('content, expected', [
    ('', {}), ('# nothing', {}), ('a: 1', {'a': 1}), ('a: 1e-3', {'a': '1e-3'}), ('a: 0x10', {'a': 16}),
    ('a: 0', {'a': 0}), ('a: "010"', {'a': '010'}), ('a: "2020-01-01"', {'a': '2020-01-01'}),
    ('base: &b {x: 1, y: 2}\nmore: {<<: *b, x: 3}', {'base': {'x': 1, 'y': 2}, 'more': {'x': 3, 'y': 2}}),
    ('1: a\n"1": b', {1: 'a', '1': 'b'}),
    ('a: grün', {'a': 'grün'}),
    ('a: grün'.encode('utf-8-sig'), {'a': 'grün'}),
    ('a: grün'.encode('utf-16'), {'a': 'grün'}),
    ('a: ~\nb: yes', {'a': None, 'b': True}),
])
def test_the_rest_is_read(tmp_path, content, expected):
    assert read_config(write(tmp_path, content)) == expected


def test_long_files_of_ordinary_values_are_read(tmp_path):
    values = {f'key{i}': list(range(20)) for i in range(2000)}
    assert read_config(write(tmp_path, yaml.safe_dump(values))) == values


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    for path, problem in (
            (tmp_path, 'folder'), (tmp_path / 'pipe', 'no ordinary file'), (tmp_path / 'gone.yaml', 'No such file'),
            ('/dev/zero', 'no ordinary file'), (tmp_path / 'x\0y', 'null'), (tmp_path / ('x' * 300), 'too long')):
        with pytest.raises(PSTError, match=problem):
            read_config(path)
