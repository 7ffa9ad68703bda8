"""Fill the tables of the README and the docs, and draw the plots, from the measurements under `results/`.

    pst-timm report

A page says what it wants by a mark, alone in its line; what follows, up to the line `<!-- end -->`, is made anew:

    <!-- study NAME BLOCK -->    of results/study/NAME: setting, models, question1 to question8, plots
    <!-- table FOLDER/NAME -->   the table results/FOLDER/NAME.csv

so that no number is typed in. Marks within fenced code are left alone.
"""
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, List, Mapping, Optional, Sequence

from pst_timm.utils.errors import PSTError

from .common import ArgumentParser, run

if TYPE_CHECKING:
    from pst_timm.study.results import StudyData

__all__ = ['fill_page', 'load_studies', 'main', 'pages']

NUMBER = re.compile(r'-?\d+\.\d+(e-?\d+)?')  # with a decimal point


def pages(root: Path) -> List[Path]:
    """The pages of a checkout that may have marks."""
    return [path for path in (root / 'README.md', *sorted((root / 'docs').glob('*.md'))) if path.is_file()]


def load_studies(root: Path) -> Mapping[str, 'StudyData']:
    """The studies of a checkout by name.

    Raises:
        PSTError: If a file of theirs is missing or garbled.
    """
    from pst_timm.study.results import load_study

    return {path.name: load_study(path) for path in sorted((root / 'results' / 'study').glob('*')) if path.is_dir()}


def fill_page(path: Path, root: Path, studies: Mapping[str, 'StudyData']) -> str:
    """The text of a page with its blocks made anew.

    Args:
        path: The page.
        root: The checkout with `results/`.
        studies: The studies there.

    Raises:
        PSTError: If a mark asks for what there is not, or a file is garbled.
    """
    from pst_timm.study.tables import BLOCKS, study_block
    from pst_timm.utils.pages import fill_text

    def table(words: List[str]) -> str:
        if len(words) != 1:
            raise PSTError(f'{path}: unknown mark {" ".join(["table", *words])!r}; known is "table FOLDER/NAME".')
        return table_block(root / 'results', words[0])

    def study(words: List[str]) -> str:
        if len(words) != 2 or words[1] not in (*BLOCKS, 'plots'):
            raise PSTError(
                f'{path}: unknown mark {" ".join(["study", *words])!r}; known is "study NAME BLOCK" with a block of '
                f'{", ".join((*BLOCKS, "plots"))}.')
        name, wanted = words
        if name not in studies and name in told:
            return ''
        told.add(name)
        found = None
        if name in studies:
            found = plot_links(root / 'results' / 'study' / name, path) if wanted == 'plots' else (
                study_block(studies[name], wanted))
        return found or f'Not yet run: `pst-timm study configs/study/{name}.yaml`.'

    told = set()  # studies of the page that have not been run: said once
    try:
        text = path.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as e:
        raise PSTError(f'{path} cannot be read as a page ({e}).') from None
    return fill_text(text, {'table': table, 'study': study})


def table_block(folder: Path, name: str) -> str:
    """How something was measured, and the table of it: the numbers of a column with as many decimals, at most three."""
    from pst_timm.utils.files import read_csv
    from pst_timm.utils.markdown import prose
    from pst_timm.utils.tables import markdown_table

    def decimals(key: str) -> int:
        values = [row[key] for row in found if NUMBER.fullmatch(row[key])]
        return min(3, max((3 if 'e' in v else len(v.partition('.')[2]) for v in values), default=0))

    def cell(key: str, value: str) -> str:
        return f'{float(value):.{decimals(key)}f}' if NUMBER.fullmatch(value) else prose(value)

    if not re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', name):
        raise PSTError(f'{name!r} is no name of a table in {folder}.')
    found = read_csv(folder / f'{name}.csv')
    rows = [{prose(key): cell(key, value) for key, value in row.items()} for row in found]
    path = folder / f'{name}.json'
    try:
        setting = json.loads(path.read_text(encoding='utf-8'))['setting']
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise PSTError(f"{path} must be a JSON file whose 'setting' says how it was measured ({e!r}).") from None
    if not rows:
        raise PSTError(f'{folder / name}.csv has no rows.')
    return f'{setting}.\n\n{markdown_table(rows)}'


def plot_links(folder: Path, page: Path) -> str:
    """Links from a page to the plots of a study, empty if there are none."""
    from pst_timm.study.plots import PLOTS

    return '\n\n'.join(
        f'![{what}]({Path(os.path.relpath(folder / f"{name}.png", page.parent)).as_posix()})'
        for name, what in PLOTS.items() if (folder / f'{name}.png').is_file())


def main(argv: Optional[Sequence[str]] = None) -> int:
    """`pst-timm report`; returns the exit code."""
    parser = ArgumentParser(
        prog='pst-timm report', description='Make the tables in README.md and docs/*.md, and the plots, from results/.')
    parser.add_argument('--root', type=Path, default=Path(), help='the checkout (default: this folder)')
    args = parser.parse_args(argv)
    if not (args.root / 'results').is_dir():
        parser.error(f'{args.root.resolve()} has no folder results: run this in a checkout, or name one with --root')
    return run(parser.prog, _report, args.root)


def _report(root: Path) -> None:
    from pst_timm.utils.files import write_text

    studies = load_studies(root)
    _draw(studies, root)
    for path in pages(root):
        text = fill_page(path, root, studies)
        if text != path.read_text(encoding='utf-8'):
            write_text(path, text)
            print(f'{path}: made anew')


def _draw(studies: Mapping[str, 'StudyData'], root: Path) -> None:
    from pst_timm.deploy.frontier import draw_frontier, draw_pruned
    from pst_timm.review.power import draw_power
    from pst_timm.study.plots import draw_plots

    power = root / 'results' / 'monitoring' / 'power'
    try:
        for name, study in studies.items():
            for path in draw_plots(study, root / 'results' / 'study' / name):
                print(f'{path}: drawn')
        if power.with_suffix('.csv').is_file():
            draw_power(power.with_suffix('.csv'), power.with_suffix('.png'))
            print(f'{power}.png: drawn')
        for pattern, draw in (('steps*.json', draw_frontier), ('pruned*.json', draw_pruned)):
            for path in sorted((root / 'results' / 'deploy').glob(pattern)):
                draw(path, path.with_suffix('.png'))
                print(f'{path.with_suffix(".png")}: drawn')
    except ImportError as e:
        print(f"No plots, {e}: pip install 'pst_timm[train]' brings what draws them.", file=sys.stderr)
