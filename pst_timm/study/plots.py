"""The plots of a study: accuracy against cost, learning curves, fine attention against coarse."""
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Sequence

import numpy as np

from pst_timm.metrics.intervals import mean_and_sd

from .results import Attention, StudyData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['PLOTS', 'draw_plots', 'spread_out']

# Okabe and Ito's colours without the yellow, told apart by colour-blind readers too; the marker tells the rest
COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
MARKERS = 'osD^vp<>hd'
STYLE = {
    'font.size': 9, 'axes.labelsize': 9, 'axes.titlesize': 9, 'xtick.labelsize': 8, 'ytick.labelsize': 8,
    'axes.linewidth': 0.6, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True, 'grid.alpha': 0.3,
    'grid.linewidth': 0.5, 'legend.fontsize': 8, 'legend.frameon': False, 'lines.markerfacecolor': 'white',
    'lines.markeredgewidth': 1.}
WIDTH = 7.2  # inches, the text width of a paper
# marker, line, colour, and how far aside single seeds stand, in points
FUSIONS = {'gate': ('o', '-', COLORS[0], -4), 'joint': ('s', '--', COLORS[1], 4)}
METRICS = {'top1': 'top-1 (%)', 'loss': 'loss', 'ece': 'calibration error'}
PLOTS = {
    'accuracy': 'Top-1 accuracy against multiply-adds, latency and training time',
    'curves': 'Training loss and validation accuracy by epoch',
    'sweep': 'Accuracy, loss and calibration error with fine attention over k tokens',
    'shots': 'Top-1 accuracy against training images of each class',
}


def draw_plots(study: StudyData, folder: Path) -> List[Path]:
    """Draw the plots for which there is data; the same data and matplotlib give the same files.

    Args:
        study: The study.
        folder: Where the files named in `PLOTS` go.

    Returns:
        The files written.
    """
    import matplotlib

    written = []
    draws = dict(accuracy=draw_accuracy, curves=draw_curves, sweep=draw_sweep)
    for name, draw in (dict(shots=draw_shots) if shots_of(study) else draws).items():
        with matplotlib.rc_context(STYLE):
            figure = draw(study)
            if figure is not None:
                written.append(folder / f'{name}.png')
                # the name of the drawing program would change with its version
                figure.savefig(written[-1], dpi=200, metadata={'Software': None})
    return written


def draw_accuracy(study: StudyData) -> Optional['Figure']:
    """Top-1 against GMACs, latency and training time: means with standard deviations, and every seed beside them.

    The training time is that of a step, timed in turn with the others: whole runs met the machine in other moods.
    """
    cells = comparable_cells(study)
    costs: Dict[str, Dict[str, float]] = {'GMACs\nof an image': {c: study.runs_of(c)[0]['gmacs'] for c in cells}}
    if study.latency:
        first = next(iter(study.latency.values()))
        for what, size, key in (
                ('latency', 'batch_size', 'latency_ms'),
                ('training step', 'train_batch_size', 'train_ms')):
            label = f'{what} (ms)\nof {first[size]} images'
            costs[label] = {c: study.latency[c][key] for c in cells if c in study.latency}
    costs = {label: values for label, values in costs.items() if values}
    if not cells:
        return None
    figure, (panels,) = _figure(1, len(costs), 2.6, sharey=True)
    means = {}
    for axes, (label, values) in zip(panels, costs.items()):
        for cell, x in values.items():
            top1 = [row['top1'] for row in study.runs_of(cell)]
            means[cell], sd = mean_and_sd(top1)
            style = _style(study, cell)
            axes.errorbar(x, means[cell], sd, **style, markersize=5, capsize=2, elinewidth=0.8)
            _draw_seeds(axes, x, top1, style['color'], 5)
        axes.set_xlabel(label)
        axes.margins(0.12)
    panels[0].set_ylabel(METRICS['top1'])
    _label_lines(panels[-1], means, {cell: _style(study, cell) for cell in means})
    return figure


def draw_curves(study: StudyData) -> Optional['Figure']:
    """Training loss and validation top-1 by epoch: means over the seeds, and every seed thin."""
    if not study.curves:
        return None
    figure, ((left, right),) = _figure(1, 2, 2.8)
    ends = {}
    for cell in comparable_cells(study):
        style = _style(study, cell)
        for axes, key in ((left, 'train_loss'), (right, 'eval_top1')):
            seeds = _curves_of(study, cell, key)
            for curve in seeds:
                axes.plot(curve.keys(), curve.values(), color=style['color'], lw=0.5, alpha=0.4)
            # up to where all seeds are
            epochs = sorted(set.intersection(*map(set, seeds))) if seeds else []
            means = [np.mean([curve[epoch] for curve in seeds]) for epoch in epochs]
            axes.plot(epochs, means, **style, lw=1.2, markersize=3.5, markevery=max(1, len(means) // 6))
            if means and axes is right:
                ends[cell] = means[-1]
    left.set(xlabel='epoch', ylabel='training loss')
    right.set(xlabel='epoch', ylabel='validation top-1 (%)')
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.margins(x=0.02)
    _label_lines(right, ends, {cell: _style(study, cell) for cell in ends})
    return figure


def draw_sweep(study: StudyData) -> Optional['Figure']:
    """Top-1, loss and calibration error over k: a row for each cell and image size, coarse attention as a line."""
    sweeps = {cell: study.sweep(cell) for cell in study.cells}
    shown = [(c, size) for c, sweep in sweeps.items() for size in dict.fromkeys(a.img_size for a in sweep)]
    if not shown:
        return None
    figure, panels = _figure(len(shown), len(METRICS), 0.5 + 1.6 * len(shown))
    for row, (cell, size) in zip(panels, shown):
        sweep = {a: rows for a, rows in sweeps[cell].items() if a.img_size == size}
        for axes, (key, label) in zip(row, METRICS.items()):
            _draw_sweep_panel(axes, sweep, key)
            axes.set_ylabel(label)
        row[0].set_title(f'{cell}, {size} px', loc='left')
    for axes in panels[-1]:
        axes.set_xlabel('selected tokens k')
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=len(labels))
    return figure


def shots_of(study: StudyData) -> Dict[str, List[str]]:
    """The cells by what stands before the number of images in their names; empty for a study without shots."""
    numbers = {str(n) for question in study.questions.values() for n in question.get('shots') or ()}
    found: Dict[str, List[str]] = {}
    for cell in study.cells:
        start, _, number = cell.rpartition('-')
        if number in numbers and study.runs_of(cell):
            found.setdefault(start, []).append(cell)
    return found


def draw_shots(study: StudyData) -> Optional['Figure']:
    """Top-1 over the training images of each class: means over the seeds with standard deviations, and every seed.

    A line joins what was tested on the same images.
    """
    from matplotlib.ticker import NullLocator

    figure, ((axes,),) = _figure(1, 1, 4.2)
    ends, places, styles = {}, set(), {}
    for place, (start, cells) in enumerate(shots_of(study).items()):
        style = styles[start] = dict(color=COLORS[place % len(COLORS)], marker=MARKERS[place % len(MARKERS)])
        line = '--' if place >= len(COLORS) else '-'
        points = []
        for cell in cells:
            runs = study.runs_of(cell)
            x = int(runs[0]['train_images']) / runs[0]['classes']
            top1 = [row['top1'] for row in runs]
            points.append((x, *mean_and_sd(top1), runs[0]['val_images']))
            _draw_seeds(axes, x, top1, style['color'], 5)
        for images in {point[-1] for point in points}:
            xs, means, sds, _ = zip(*sorted(point for point in points if point[-1] == images))
            axes.errorbar(
                xs, means, [sd or 0. for sd in sds], **style, ls=line, lw=1.2, markersize=4, capsize=2, elinewidth=0.8)
            places |= set(xs)
        ends[start] = max(points)[1]
    axes.set(xscale='log', xlabel='training images of each class', ylabel=METRICS['top1'])
    axes.set_xticks(sorted(places), [f'{place:.0f}' for place in sorted(places)])
    axes.xaxis.set_minor_locator(NullLocator())
    _label_lines(axes, ends, styles)
    return figure


def _draw_sweep_panel(axes: 'Axes', sweep: Mapping[Attention, Mapping[int, Any]], key: str) -> None:
    ticks = list(dict.fromkeys(a.k_label for a in sorted(sweep, key=lambda a: a.k) if a.k))
    for fusion, (marker, line, color, aside) in FUSIONS.items():
        found = {
            ticks.index(a.k_label): [row[key] for row in rows.values()]
            for a, rows in sweep.items() if a.fusion == fusion}
        for x, values in found.items():
            _draw_seeds(axes, x, values, color, aside)
        axes.plot(found.keys(), [np.mean(v) for v in found.values()], marker=marker, ls=line, color=color, lw=1.,
                  markersize=4, label=fusion)
    for attention, rows in sweep.items():
        if attention.fusion == 'coarse':
            values = [r[key] for r in rows.values()]
            axes.axhline(np.mean(values), color='0.35', lw=1., ls=':', label='coarse alone, and range of its seeds')
            axes.axhspan(min(values), max(values), color='0.35', alpha=0.12, lw=0)
    axes.set_xticks(range(len(ticks)), ticks)


def _draw_seeds(axes: 'Axes', x: float, values: Sequence[float], color: str, aside: float) -> None:
    """A dot for each seed, some points to the right of x."""
    from matplotlib.transforms import ScaledTranslation

    beside = axes.transData + ScaledTranslation(aside / 72, 0, axes.figure.dpi_scale_trans)
    axes.plot([x] * len(values), values, '.', color=color, mfc=color, markersize=2.5, transform=beside)
    # the limits would leave out what has a transform of its own
    axes.update_datalim([(x, value) for value in values])


def comparable_cells(study: StudyData) -> List[str]:
    """The cells that were trained, of those with the classes of the first one."""
    classes = {row['cell']: row['classes'] for row in reversed(study.runs)}
    cells = [c for c in study.cells if c in classes]
    return [c for c in cells if classes[c] == classes[cells[0]]]


def spread_out(values: Sequence[float], gap: float, low: float = 0., high: float = 1.) -> List[float]:
    """Heights for labels, as near to the values as it goes with at least `gap` between them, in the same order.

    Args:
        values: Where the labels belong, upwards.
        gap: Least distance.
        low: Lowest height.
        high: Highest height; too many labels reach beyond it.
    """
    steps = gap * np.arange(len(values))
    free = np.clip(np.asarray(values) - steps, low, max(low, high - gap * (len(values) - 1)))
    # the nearest non-decreasing numbers from above and from below; so is their mean
    above, below = np.maximum.accumulate(free), np.minimum.accumulate(free[::-1])[::-1]
    return ((above + below) / 2 + steps).tolist()


def _figure(rows: int, columns: int, height: float, **kwargs: Any) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout='constrained')
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def _style(study: StudyData, cell: str) -> Dict[str, str]:
    i = study.cells.index(cell)
    return dict(color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)])


def _curves_of(study: StudyData, cell: str, key: str) -> List[Dict[int, float]]:
    """A curve for each seed, by epoch from 1; epochs without a value are left out."""
    curves: Dict[int, Dict[int, float]] = {}
    for row in study.curves:
        if row['cell'] == cell and row[key] is not None:
            curves.setdefault(row['seed'], {})[row['epoch'] + 1] = row[key]
    return list(curves.values())


def _label_lines(axes: 'Axes', values: Mapping[str, float], styles: Mapping[str, Dict[str, str]]) -> None:
    """Names at the right of a panel, each tied to its value in its style, none over another."""
    from matplotlib.transforms import ScaledTranslation

    def right_by(points: float) -> Any:
        return axes.transAxes + ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans)

    low, high = axes.get_ylim()
    names = sorted(values, key=values.get)
    heights = [(values[name] - low) / (high - low) for name in names]
    # a line of text, as a share of the panel's height
    spread = spread_out(heights, 11 / (72 * 0.8 * axes.figure.get_figheight()))
    for name, height, label in zip(names, heights, spread):
        style = styles[name]
        axes.annotate(
            '', (1, height), (1, label), axes.transAxes, right_by(12),
            arrowprops=dict(arrowstyle='-', color=style['color'], lw=0.6, shrinkA=0, shrinkB=0))
        axes.plot(1, label, **style, markersize=4, transform=right_by(16), clip_on=False)
        axes.text(1, label, name, color=style['color'], fontsize=8, va='center', transform=right_by(22))
