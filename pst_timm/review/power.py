"""The plot of which corruptions the monitor finds, from what `scripts/measure_monitoring.py` measured."""
from functools import partial
from pathlib import Path
from typing import Any, Mapping, Sequence

from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import read_csv, write_whole

__all__ = ['draw_power']

COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
LINES = ('-', '--', ':')
ASIDE = 0.08
COUNT = ' images'  # how the columns with the shares of alerts end


def draw_power(table: Path, path: Path) -> None:
    """Draw the share of draws with an alert against the strength of each corruption, a panel for each kind of data.

    Args:
        table: A CSV file with `data`, `corruption`, `strength` and a column such as `500 images` for each size.
        path: The PNG file.

    Raises:
        PSTError: If the table is not such a one.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_csv(table)
    try:
        panels = list(dict.fromkeys(row['data'] for row in rows))
        counts = sorted((key for key in rows[0] if key.endswith(COUNT)), key=lambda key: -int(key.removesuffix(COUNT)))
        figure = Figure(figsize=(7.2, 3.2), layout='constrained', dpi=150)
        for i, (axes, data) in enumerate(zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels)):
            _draw_panel(axes, [row for row in rows if row['data'] == data], counts)
            axes.set(title=data, xlabel='strength', ylabel='' if i else 'draws with an alert (%)', ylim=(-4, 104))
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside right center', frameon=False, fontsize=8)
    except (KeyError, ValueError, IndexError) as e:
        raise PSTError(f'{table} is no table of `scripts/measure_monitoring.py` ({e!r}).') from None
    write_whole(path, partial(FigureCanvasAgg(figure).print_png, metadata={'Software': None}))


def _draw_panel(axes: Any, rows: Sequence[Mapping[str, str]], counts: Sequence[str]) -> None:
    names = list(dict.fromkeys(row['corruption'] for row in rows))
    for i, (color, name) in enumerate(zip(COLORS, names)):
        line = [row for row in rows if row['corruption'] == name]
        # side by side, or those that are always found would hide each other
        places = [int(row['strength']) + ASIDE * (i - (len(names) - 1) / 2) for row in line]
        for style, count in zip(LINES, counts):
            axes.plot(places, [100 * float(row[count]) for row in line], style, color=color, marker='o', markersize=3.5,
                      mfc=color if style == LINES[0] else 'white', lw=1.2, label=f'{name}, {count}')
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
    axes.set_xticks(sorted({int(row['strength']) for row in rows}))
