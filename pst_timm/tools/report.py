"""Fill the tables of the documentation from the measurements under `results/`.

    python -m pst_timm.tools.report

replaces what follows each `<!-- name -->` mark by the table of the file of that name, so that no number is typed in.
"""
import csv
import json
import re
import sys
from pathlib import Path
from typing import Dict, List

__all__ = ['fill_page', 'main', 'markdown_table']

ROOT = Path(__file__).resolve().parents[2]
PAGES = {'docs/performance.md': 'results/performance'}


def markdown_table(rows: List[Dict[str, str]]) -> str:
    """Rows of a CSV file as a Markdown table, numbers with a decimal point cut to three places."""
    def cell(value: str) -> str:
        return f'{float(value):.3f}' if re.fullmatch(r'-?\d+\.\d+(e-?\d+)?', value) else value

    lines = [list(rows[0]), ['---'] * len(rows[0]), *([cell(v) for v in row.values()] for row in rows)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def fill_page(text: str, results: Path) -> str:
    """The text of a page with its tables made anew.

    Args:
        text: Markdown with `<!-- name -->` marks, each followed by the block it stands for, or by nothing yet.
        results: Folder with name.csv, and name.json whose `setting` says how it was measured.
    """
    def block(match: re.Match) -> str:
        name = match[1]
        with open(results / f'{name}.csv', newline='') as f:
            rows = list(csv.DictReader(f))
        setting = json.loads((results / f'{name}.json').read_text())['setting']
        return f'<!-- {name} -->\n\n{setting}.\n\n{markdown_table(rows)}\n\n<!-- end -->'

    return re.sub(r'<!-- (?!end)(\w+) -->(?:(?:(?!<!--).)*<!-- end -->)?', block, text, flags=re.S)


def main() -> int:
    """Rewrite the pages; returns the exit code."""
    for page, results in PAGES.items():
        path = ROOT / page
        path.write_text(fill_page(path.read_text(), ROOT / results))
    return 0


if __name__ == '__main__':
    sys.exit(main())
