"""The picture of a benchmark of models."""
from pathlib import Path
from typing import Sequence

from pst_timm.utils.files import write_whole

from .setting import Row

__all__ = ['plot']


def plot(rows: Sequence[Row], path: Path) -> None:
    """Write accuracy where it is known for all models, else GMACs, against latency.

    Args:
        rows: From `benchmark_models`.
        path: The PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    key, label = ('top1', 'top-1 (%)') if all(r.get('top1') is not None for r in rows) else ('gmacs', 'GMACs')
    figure = Figure(figsize=(6.4, 4.4), layout='constrained')
    axes = figure.subplots()
    for row in rows:
        pst = row.get('latency_ratio') is not None
        axes.scatter(row['p50_ms'], row[key], color='tab:blue' if pst else 'tab:gray', zorder=3)
        axes.annotate(row['model'], (row['p50_ms'], row[key]), xytext=(5, -3 if pst else 5), fontsize=8,
                      textcoords='offset points', va='top' if pst else 'bottom')
    axes.set(xlabel='latency of a batch, median (ms)', ylabel=label)
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    write_whole(path, FigureCanvasAgg(figure).print_png)
