"""Plots of deployment: accuracy against time, with the models that no other one beats; and what pruning saves."""
import json
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, List, Mapping, Sequence

from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['draw_frontier', 'draw_pruned', 'frontier']

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
RUNTIME_COLORS = ('#000000', '#56B4E9', '#E69F00', '#0072B2', '#D55E00', '#009E73', '#CC79A7')
SCOPE_LINES = {'uniform': '-', 'global': '--'}
WIDTH_MARKS = {16: 'o', 32: 's'}
SLIM = (0.5, 'uniform', 16, 'ONNX Runtime int8')  # what `pst-timm slim` makes unless told otherwise


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
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    with _rows_of(table) as rows:
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
    axes.set(xlabel='times faster than eager float32, one image', ylabel='top-1 (%)')
    axes.set_xscale('log', base=2)
    axes.xaxis.set_major_formatter('{x:g}')
    _plain_axes(axes)
    figure.legend(loc='outside lower left', frameon=False, fontsize=7, ncols=3)
    names = [f'{i}  {row["row"]}' for i, row in enumerate(kept, 1)]
    figure.legend(
        [Line2D([], [], ls='none')] * len(names), names, loc='outside right upper', frameon=False, fontsize=7,
        handlelength=0, handletextpad=0, title='the frontier', title_fontsize=8, alignment='left')
    _write(figure, path)


def draw_pruned(table: Path, path: Path) -> None:
    """Draw how many times faster pruned models are, by the share of multiply-adds removed: a panel a batch size.

    Args:
        table: A JSON file that the part `pruned` of `scripts/measure_deploy.py` wrote.
        path: The PNG file. Its lines are the runtimes of the first model in the table.

    Raises:
        PSTError: If the table is not such a one.
    """
    from matplotlib.figure import Figure

    with _rows_of(table) as rows:
        rows = [row for row in rows if row['model'] == rows[0]['model']]
        figure = Figure(figsize=(8., 3.8), layout='constrained', dpi=200)
        for axes, batch in zip(figure.subplots(1, 2), (1, 8)):
            _draw_runtimes(axes, rows, f'ratio_{batch}')
            axes.set(xlabel='multiply-adds removed (%)', title=f'batch {batch}')
            _plain_axes(axes)
    figure.axes[0].set_ylabel('times faster than eager float32, whole')
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc='outside lower left', frameon=False, fontsize=7,
                  ncols=4)
    _write(figure, path)


@contextmanager
def _rows_of(table: Path) -> Iterator[List[Row]]:
    """The rows of a table; what goes wrong with them is told as a wrong table."""
    try:
        yield json.loads(table.read_text(encoding='utf-8'))['rows']
    except (OSError, ValueError, KeyError, TypeError, IndexError) as e:
        raise PSTError(f'{table} is no table of `scripts/measure_deploy.py` ({e!r}).') from None


def _plain_axes(axes: 'Axes') -> None:
    axes.grid(alpha=0.3, lw=0.5)
    axes.spines[['top', 'right']].set_visible(False)


def _write(figure: 'Figure', path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    write_whole(path, partial(FigureCanvasAgg(figure).print_png, metadata={'Software': None}))


def _draw_runtimes(axes: 'Axes', rows: Sequence[Row], key: str) -> None:
    colors = dict(zip(dict.fromkeys(row['runtime'] for row in rows), RUNTIME_COLORS))
    for (runtime, color), (scope, line), (to, mark) in product(
            colors.items(), SCOPE_LINES.items(), WIDTH_MARKS.items()):
        own = [row for row in rows if row['runtime'] == runtime and (row['scope'], row['round_to']) in (
            ('-', 0), (scope, to))]
        own.sort(key=lambda row: row['ratio'])
        axes.plot([100 * row['ratio'] for row in own], [row[key] for row in own], line, color=color, lw=0.9,
                  marker=mark, ms=3)
    for runtime, color in colors.items():
        axes.plot([], [], color=color, lw=2, label=runtime)
    for scope, line in SCOPE_LINES.items():
        axes.plot([], [], line, color='0.5', lw=0.9, label=scope)
    for to, mark in WIDTH_MARKS.items():
        axes.plot([], [], ls='none', color='0.5', marker=mark, ms=3, label=f'widths in multiples of {to}')
    color, marker, label = KINDS['slim']
    for row in rows:
        if (row['ratio'], row['scope'], row['round_to'], row['runtime']) == SLIM:
            at = 100 * row['ratio'], row[key]
            axes.plot(*at, marker, ls='none', color=color, ms=11, mec='white', mew=0.5, zorder=5, label=label)
            axes.annotate(
                f'{row[key]:.1f}', at, xytext=(6, -10), textcoords='offset points', fontsize=8, weight='bold')


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
