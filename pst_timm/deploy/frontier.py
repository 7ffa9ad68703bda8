"""The plot of what each step of deployment gives: accuracy against time, and the models that no other one beats."""
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, List, Mapping, Sequence

from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ['draw_frontier', 'frontier']

Row = Mapping[str, Any]
SIZES = {'P': 7, '*': 10}  # of markers that look small; in points
# colour, marker and name of each kind; colours of Okabe and Ito, the marker tells the rest
KINDS = {
    'float': ('#000000', 'o', 'the model itself, in float'),
    'int8': ('#0072B2', 's', 'int8'),
    'pruned': ('#E69F00', '^', 'pruned'),
    'pruned int8': ('#D55E00', 'D', 'pruned, int8'),
    'cascade': ('#009E73', 'P', 'cascade'),
    'slim': ('#CC79A7', '*', 'slim'),
}


def frontier(rows: Sequence[Row]) -> List[Row]:
    """The rows that no other one beats: none is as fast and as accurate, and better in one of both; slowest first.

    Args:
        rows: With `ratio_1` (times faster) and `top1`.
    """
    best, kept = float('-inf'), []
    for row in sorted(rows, key=lambda row: (-row['ratio_1'], -row['top1'])):
        if row['top1'] > best:
            best = row['top1']
            kept.append(row)
    return kept[::-1]


def draw_frontier(table: Path, path: Path) -> None:
    """Draw top-1 against the speed of batch 1, with 95% intervals and the frontier.

    Args:
        table: A JSON file that the part `weights` of `scripts/measure_deploy.py` wrote.
        path: The PNG file.

    Raises:
        PSTError: If the table is not such a one.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    try:
        rows = json.loads(table.read_text(encoding='utf-8'))['rows']
        figure = Figure(figsize=(8., 4.2), layout='constrained', dpi=200)
        axes = figure.subplots()
        kept = frontier(rows)
        axes.plot(
            [row['ratio_1'] for row in kept], [row['top1'] for row in kept], color='0.6', lw=1, zorder=1,
            label='the frontier: nothing is faster and as accurate')
        for kind, (color, marker, label) in KINDS.items():
            own = [row for row in rows if row['kind'] == kind]
            if own:
                _draw_kind(axes, own, color, marker, label)
        _number(axes, kept)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise PSTError(f'{table} is no table of `scripts/measure_deploy.py` ({e!r}).') from None
    axes.set(xlabel='times faster than eager float32, one image', ylabel='top-1 (%)')
    axes.set_xscale('log', base=2)
    axes.xaxis.set_major_formatter('{x:g}')
    axes.grid(alpha=0.3, lw=0.5)
    axes.spines[['top', 'right']].set_visible(False)
    figure.legend(loc='outside lower left', frameon=False, fontsize=7, ncols=3)
    names = [f'{i}  {row["row"]}' for i, row in enumerate(kept, 1)]
    figure.legend(
        [Line2D([], [], ls='none')] * len(names), names, loc='outside right upper', frameon=False, fontsize=7,
        handlelength=0, handletextpad=0, title='the frontier', title_fontsize=8, alignment='left')
    write_whole(path, partial(FigureCanvasAgg(figure).print_png, metadata={'Software': None}))


def _draw_kind(axes: 'Axes', rows: Sequence[Row], color: str, marker: str, label: str) -> None:
    x, top1 = ([row[key] for row in rows] for key in ('ratio_1', 'top1'))
    beside = [[abs(row['interval'][end] - row['top1']) for row in rows] for end in (0, 1)]
    axes.errorbar(x, top1, beside, ls='none', color=color, elinewidth=0.6, alpha=0.35)
    axes.plot(
        x, top1, ls='none', color=color, marker=marker, ms=SIZES.get(marker, 5), mec='white', mew=0.5, label=label)


def _number(axes: 'Axes', rows: Sequence[Row]) -> None:
    for i, row in enumerate(rows, 1):
        axes.annotate(
            str(i), (row['ratio_1'], row['top1']), xytext=(4, 3), textcoords='offset points', fontsize=7, weight='bold')
