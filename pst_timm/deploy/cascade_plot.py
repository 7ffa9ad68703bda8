"""The curve of a cascade: accuracy against cost, with every single model on it."""
from pathlib import Path
from typing import TYPE_CHECKING, Sequence, Tuple

from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import write_whole
from pst_timm.utils.markdown import plain

if TYPE_CHECKING:
    from .cascade_fit import Measured

__all__ = ['check_plots', 'draw_curve']


def check_plots() -> None:
    """Make sure that the curve can be drawn.

    Raises:
        PSTError: If matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PSTError(
            "The curve needs matplotlib: pip install 'pst_timm[train]' brings it, or leave it out with --no-plot."
        ) from None


def draw_curve(
        path: Path,
        curve: Sequence[Tuple[float, float]],
        candidates: Sequence[Tuple[float, float]],
        singles: Sequence[Tuple[str, Sequence[int], 'Measured']],
        chosen: 'Measured',
        unit: str,
) -> None:
    """Draw accuracy against mean cost.

    Args:
        path: The PNG file.
        curve: Cost and accuracy in percent with one threshold for all stages, from none passed on to all.
        candidates: The same of the thresholds that were to choose from.
        singles: Name, input size (C, H, W) and what was measured of every stage alone.
        chosen: What was measured of the cascade that was chosen.
        unit: Unit of a cost.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout='constrained')
    axes = figure.subplots()
    axes.plot(*zip(*curve), color='#0072B2', lw=1., zorder=2, label='cascades, by threshold')
    axes.plot(*zip(*candidates), color='#0072B2', marker='.', ls='', zorder=2, label='thresholds to choose from')
    dearest = max(single.cost for _, _, single in singles)
    for name, size, single in singles:
        axes.scatter(single.cost, single.accuracy, color='#555555', marker='s', zorder=3)
        axes.annotate(
            f'{plain(name, 40)}, {"x".join(map(str, dict.fromkeys(size[1:])))} px', (single.cost, single.accuracy),
            xytext=(0, -7), fontsize=8, textcoords='offset points', va='top',
            ha='right' if single.cost > 0.7 * dearest else 'center')
    axes.scatter(chosen.cost, chosen.accuracy, color='#D55E00', marker='*', s=140, zorder=4, label='this cascade')
    axes.set(xlabel=f'mean cost of an image ({unit})', ylabel='top-1 (%)')
    axes.set_xlim(left=0)
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    axes.legend(loc='lower right', fontsize=8, frameon=False)
    write_whole(path, FigureCanvasAgg(figure).print_png)
