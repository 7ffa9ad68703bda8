"""Tables of bad inputs: what was typed or opened, and what a person is told."""
import hashlib
import re
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Union

import pytest

from pst_timm.cli import main

__all__ = ['BadInput', 'contents', 'parametrize', 'refused']


class BadInput(NamedTuple):
    """A row of a table: a command that must be refused."""
    name: str
    """Of the row, for pytest."""
    words: Sequence[Any]
    """The command line after `pst-timm`; `{folder}` in a word is the folder of the test."""
    culprit: str
    """What the sentence must name: a flag, a file, a key, a value."""
    make: Union[Callable[[Path], Any], None] = None
    """Writes what the row needs into the folder of the test."""
    code: int = 1
    """Exit code."""


def parametrize(table: Sequence[BadInput]) -> Callable:
    """`pytest.mark.parametrize` over the rows of a table, as `row`."""
    assert len({row.name for row in table}) == len(table)
    return pytest.mark.parametrize('row', [pytest.param(row, id=row.name) for row in table])


def contents(folder: Path) -> Dict[str, str]:
    """What is on disk below a folder: a digest of each file, the target of each link, the mode of anything else."""
    found = {}
    for path in sorted(folder.rglob('*')):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f'-> {path.readlink()}'
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = oct(path.lstat().st_mode)
    return found


def refused(row: BadInput, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> List[str]:
    """Run the command of a row in a folder, and make sure that it is refused as a person would want.

    The exit code is right; exactly one error is printed, its last line or lines; it names the culprit; there is no
    traceback, not even below the last net; and everything that was on disk before is as it was.

    Returns:
        All lines of the standard error.
    """
    monkeypatch.setenv('PST_TIMM_DEBUG', '1')  # what no check foresaw comes out as it is
    monkeypatch.chdir(folder)
    if row.make is not None:
        row.make(folder)
    before = contents(folder)
    words = [str(word).replace('{folder}', str(folder)) for word in row.words]
    capfd.readouterr()
    try:
        code = main(words)
    except SystemExit as stop:  # argparse
        code = stop.code
    out, err = capfd.readouterr()
    assert code == row.code, err
    told = re.split(r'^pst-timm[ \w-]*: error: ', err, flags=re.MULTILINE)
    assert len(told) == 2, f'{len(told) - 1} errors instead of one:\n{err}'
    assert row.culprit in told[1], told[1]
    assert 'Traceback' not in out + err
    assert len(told[1]) < 1500, 'too long to be read'
    after = contents(folder)
    assert {name: after.get(name) for name in before} == before
    return err.splitlines()
