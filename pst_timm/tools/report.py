"""Fill the tables of the README and the docs, and draw the plots, from the measurements under `results/`.

    pst-timm report

A page says what it wants by a mark, alone in its line; what follows, up to the line `<!-- end -->`, is made anew:

    <!-- study NAME BLOCK -->    of results/study/NAME: setting, models, question1 to question5, plots
    <!-- performance NAME -->    the table results/performance/NAME.csv

so that no number is typed in. Marks within fenced code are left alone.
"""
import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Callable, Iterator, List, Mapping, Optional, Sequence

from .study_data import ReportError, StudyData, load_study, read_table
from .study_plots import PLOTS, draw_plots
from .study_tables import BLOCKS, markdown_table, study_block

__all__ = ['fill_page', 'fill_text', 'load_studies', 'main', 'pages']

MARK = re.compile(r'<!-- *(study|performance)\b(.*?)-->\s*')
END = '<!-- end -->'
FENCE = re.compile(r'\s*(`{3,}|~{3,})(.*)')


def pages(root: Path) -> List[Path]:
    """The pages of a checkout that may have marks."""
    return [path for path in (root / 'README.md', *sorted((root / 'docs').glob('*.md'))) if path.is_file()]


def load_studies(root: Path) -> Mapping[str, StudyData]:
    """The studies of a checkout by name.

    Raises:
        ReportError: If a file of theirs is missing or garbled.
    """
    return {path.name: load_study(path) for path in sorted((root / 'results' / 'study').glob('*')) if path.is_dir()}


def fill_page(path: Path, root: Path, studies: Mapping[str, StudyData]) -> str:
    """The text of a page with its blocks made anew.

    Args:
        path: The page.
        root: The checkout with `results/`.
        studies: The studies there.

    Raises:
        ReportError: If a mark asks for what there is not, or a file is garbled.
    """
    def block(kind: str, words: List[str]) -> str:
        if kind == 'performance' and len(words) == 1:
            return performance_block(root / 'results' / 'performance', words[0])
        if kind == 'performance' or len(words) != 2 or words[1] not in (*BLOCKS, 'plots'):
            raise ReportError(
                f'{path}: unknown mark {" ".join([kind, *words])!r}; known are "performance NAME" and "study NAME '
                f'BLOCK" with a block of {", ".join((*BLOCKS, "plots"))}.')
        name, wanted = words
        found = None
        if name in studies:
            found = plot_links(root / 'results' / 'study' / name, path) if wanted == 'plots' else (
                study_block(studies[name], wanted))
        return found or f'Not yet run: `pst-timm study configs/study/{name}.yaml`.'

    return fill_text(path.read_text(encoding='utf-8'), block)


def fill_text(text: str, block: Callable[[str, List[str]], str]) -> str:
    """Markdown with its blocks made anew.

    Args:
        text: Markdown.
        block: Makes the Markdown of a block from the kind in its mark and the words after it.
    """
    lines = text.split('\n')
    open_lines = [i for i, fenced in enumerate(_fenced(lines)) if not fenced]
    marks = [i for i in open_lines if MARK.fullmatch(lines[i])]
    # from the last to the first, so that the numbers of the lines before stay right
    for start, following in reversed(list(zip(marks, [*marks[1:], len(lines)]))):
        kind, words = MARK.fullmatch(lines[start]).groups()
        ends = [i for i in open_lines if start < i < following and lines[i].rstrip() == END]
        # without an end, what follows is not ours
        stop = ends[0] + 1 if ends else start + 1
        lines[start + 1:stop] = ['', *block(kind, words.split()).split('\n'), '', END]
    return '\n'.join(lines)


def _fenced(lines: Sequence[str]) -> Iterator[bool]:
    """Whether each line is within fenced code; the line that opens it is not."""
    fence = ''
    for line in lines:
        match = FENCE.match(line)
        yield bool(fence)
        if match and not fence:
            fence = match[1]
        elif match and match[1].startswith(fence) and not match[2].strip():
            fence = ''


def performance_block(folder: Path, name: str) -> str:
    """How something was measured, and the table of it, numbers with a decimal point cut to three places."""
    def cell(value: str) -> str:
        return f'{float(value):.3f}' if re.fullmatch(r'-?\d+\.\d+(e-?\d+)?', value) else value

    rows = [{key: cell(value) for key, value in row.items()} for row in read_table(folder / f'{name}.csv', {})]
    path = folder / f'{name}.json'
    try:
        setting = json.loads(path.read_text(encoding='utf-8'))['setting']
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ReportError(f"{path} must be a JSON file whose 'setting' says how it was measured ({e!r}).") from None
    if not rows:
        raise ReportError(f'{folder / name}.csv has no rows.')
    return f'{setting}.\n\n{markdown_table(rows)}'


def plot_links(folder: Path, page: Path) -> str:
    """Links from a page to the plots of a study, empty if there are none."""
    return '\n\n'.join(
        f'![{what}]({Path(os.path.relpath(folder / f"{name}.png", page.parent)).as_posix()})'
        for name, what in PLOTS.items() if (folder / f'{name}.png').is_file())


def main(argv: Optional[Sequence[str]] = None) -> int:
    """`pst-timm report`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='pst-timm report', description='Make the tables in README.md and docs/*.md, and the plots, from results/.')
    parser.add_argument('--root', type=Path, default=Path(), help='the checkout (default: this folder)')
    args = parser.parse_args(argv)
    if not (args.root / 'results').is_dir():
        parser.error(f'{args.root.resolve()} has no folder results; run this in a checkout, or name one with --root')
    try:
        studies = load_studies(args.root)
        _draw(studies, args.root)
        for path in pages(args.root):
            text = fill_page(path, args.root, studies)
            if text != path.read_text(encoding='utf-8'):
                path.write_text(text, encoding='utf-8')
                print(f'{path}: made anew')
    except ReportError as e:
        print(f'pst-timm report: error: {e}', file=sys.stderr)
        return 1
    return 0


def _draw(studies: Mapping[str, StudyData], root: Path) -> None:
    for name, study in studies.items():
        try:
            for path in draw_plots(study, root / 'results' / 'study' / name):
                print(f'{path}: drawn')
        except ImportError as e:
            print(f"No plots, {e}: pip install 'pst_timm[train]' brings what draws them.", file=sys.stderr)
            return


if __name__ == '__main__':
    sys.exit(main())
