"""A comparison of images with a reference as one page of HTML, its plots within it; nothing is fetched to show it."""
import base64
import html
import io
from typing import Any, List, Sequence, Tuple

import numpy as np

from pst_timm.data.drift import Batch
from pst_timm.data.samples import LOOKS
from pst_timm.utils.errors import PSTError
from pst_timm.utils.markdown import plain

from .monitor import Reference, Report

__all__ = ['check_plots', 'render']

BEFORE, NOW = '#0072B2', '#D55E00'  # told apart by colour-blind readers too
MOST_CLASSES = 15  # of which shares are drawn
STYLE = '''
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .75rem; text-align: left; border-bottom: 1px solid #ddd; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.alert td { background: #fdecea; font-weight: 600; }
.verdict { padding: .75rem 1rem; border-left: .4rem solid; font-size: 1.2rem; }
.well { border-color: #009e73; background: #e9f6f1; }
.moved { border-color: #d55e00; background: #fdecea; }
img { max-width: 100%; }
'''


def check_plots() -> None:
    """Make sure that plots can be drawn.

    Raises:
        PSTError: If matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PSTError("The page needs matplotlib for its plots: pip install 'pst_timm[train]' brings it.") from None


def render(report: Report, reference: Reference, batch: Batch) -> str:
    """The page.

    Args:
        report: What came of the comparison.
        reference: What was compared with.
        batch: What was compared.
    """
    moved = [result.name for result in report.tests if result.alert]
    verdict = f'Moved: {", ".join(moved)}.' if moved else 'Nothing is seen to have moved.'
    rows = [
        (result.name, result.method, *(f'{value:.4g}' for value in (result.statistic, result.p, result.corrected)),
         'alert' if result.alert else '')
        for result in report.tests]
    parts = [
        f'<h1>Images against the reference: {_text(report.architecture)}</h1>',
        f'<p class="verdict {"moved" if moved else "well"}">{_text(verdict)}</p>',
        f'<p>{report.images:,} images, {report.reference_images:,} in the reference. Where nothing has moved, the '
        f'chance of an alert, over all tests, is at most {report.alpha:g}.</p>',
        _table(('test', 'method', 'statistic', 'p', 'corrected p', ''), rows),
        '<h2>Accuracy and calibration</h2>',
        _table(('', 'reference', 'new images'), _quality(report)),
        *(f'<p>{_text(note)}</p>' for note in report.notes),
        '<h2>Distributions</h2>',
        _image(_distributions(reference, batch), 'Distributions of confidence and looks'),
        '<h2>Classes that the model says</h2>',
        _image(_classes(reference, batch), 'Shares of the predicted classes'),
    ]
    body = '\n'.join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # nothing is run or fetched, whatever a name in it says
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        'style-src \'unsafe-inline\'">\n'
        f'<title>{_text(verdict)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n')


def _quality(report: Report) -> List[Tuple[str, str, str]]:
    def share(value: Any) -> str:
        return '-' if value is None else f'{100 * value:.1f}%'

    def number(value: Any) -> str:
        return '-' if value is None else f'{value:.3f}'

    accuracy, calibration = report.accuracy, report.calibration
    interval = accuracy['interval']
    within = f' (95% interval {share(interval[0])} to {share(interval[1])})' if interval else ''
    return [
        ('accuracy, from labels', share(accuracy['reference']), share(accuracy['measured']) + within),
        ('accuracy, estimated from confidence', '', share(accuracy['estimated'])),
        ('calibration error (ECE)', number(calibration['reference_ece']), number(calibration['ece'])),
        ('temperature', number(calibration['reference_temperature']), number(calibration['temperature'])),
    ]


def _text(value: object) -> str:
    return html.escape(plain(value, 500))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cell(text: str) -> str:
        number = text[:1].isdigit() or text[:1] == '-'
        return f'<td{" class=number" if number else ""}>{_text(text)}</td>'

    lines = [f'<tr>{"".join(f"<th>{_text(text)}</th>" for text in head)}</tr>']
    for row in rows:
        alert = ' class="alert"' if row[-1] == 'alert' else ''
        lines.append(f'<tr{alert}>{"".join(map(cell, row))}</tr>')
    return '\n'.join(['<table>', *lines, '</table>'])


def _image(figure: Any, what: str) -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file, metadata={'Software': None})
    return f'<img alt="{_text(what)}" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout='constrained', dpi=100)


def _distributions(reference: Reference, batch: Batch) -> Any:
    """A histogram of confidence, and of each look, of both."""
    pairs = {'confidence': (reference.summary.confidence, batch.confidence)}
    if batch.looks is not None:
        pairs.update({name: (reference.summary.looks[:, i], batch.looks[:, i]) for i, name in enumerate(LOOKS)})
    figure = _figure(9, 2.6 * -(-len(pairs) // 3))
    for i, (name, (before, now)) in enumerate(pairs.items()):
        axes = figure.add_subplot(-(-len(pairs) // 3), 3, i + 1)
        low, high = (float(end(before.min(), now.min()) if end is min else end(before.max(), now.max()))
                     for end in (min, max))
        edges = np.linspace(*((low, high) if high > low else (low - 0.5, low + 0.5)), 31)
        for values, color, label in ((before, BEFORE, 'reference'), (now, NOW, 'new')):
            axes.stairs(np.histogram(values, edges)[0] / len(values), edges, color=color, label=label)
        axes.set(title=name, ylabel='share' if i % 3 == 0 else '')
        if not i:
            axes.legend(frameon=False)
    return figure


def _classes(reference: Reference, batch: Batch) -> Any:
    """The classes whose shares moved most, of both."""
    before = reference.summary.predicted / reference.summary.images
    now = np.bincount(batch.predicted, minlength=len(before)) / len(batch.predicted)
    shown = np.argsort(-np.abs(now - before), kind='stable')[:MOST_CLASSES]
    figure = _figure(9, 1.2 + 0.3 * len(shown))
    axes = figure.add_subplot()
    places = np.arange(len(shown))
    axes.barh(places - 0.2, 100 * before[shown], 0.4, color=BEFORE, label='reference')
    axes.barh(places + 0.2, 100 * now[shown], 0.4, color=NOW, label='new')
    axes.set_yticks(places, [plain(reference.class_names[i], 30) for i in shown], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel('share of the images (%)')
    figure.legend(loc='outside upper center', ncols=2, frameon=False)
    return figure
