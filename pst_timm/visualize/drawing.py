"""Figures of what PST looks at, drawn to the size at which they are printed."""
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional, Sequence, Tuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['HEAD_COLORS', 'View', 'draw_sheet', 'draw_view']

# Okabe and Ito's colours, told apart by colour-blind readers too; the last for their yellow, faint on white
HEAD_COLORS = ('#D55E00', '#0072B2', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000', '#6A3D9A')
VARIANTS = (('coarse', '#6E6E6E'), ('fine', '#0072B2'))
TITLE_TEXT, TITLE_PAD, TEXT = 9, 3, 7.5  # points; the last for names, numbers and ticks
GREY = 0.75  # beyond the image, and the middle of it below the heat
HEAT, CONTRAST = 0.65, 0.5  # opacity of the attention over the image, and contrast of that image
VEIL = 0.72  # opacity of the white over tokens that are not selected

LEAST_SPREAD = 1e-3  # of the even share: a colour scale that spans less would show rounding

PANEL, GAP, EDGE, TITLE, CAPTION = 1.1, 0.07, 0.06, 0.22, 0.2  # inches
BAR_GAP, BAR, TICKS = 0.05, 0.07, 0.76  # inches, before a colour bar, the bar, and what stands beside it
NAME, PREDICTION, BAR_BELOW = 0.17, 1.7, 0.34  # inches, what stands beside the rows of a sheet, and below them
CLASS = 0.21  # inches, least height of a class among the predictions
BAR_LENGTH = 0.55  # of a certain class, over the width of the predictions
PER_ROW = 4  # panels of heads beside each other


@dataclass(frozen=True)
class View:
    """An image as the network saw it, and what a PST block looked at in it; all that a figure is drawn from."""
    name: str
    pixels: np.ndarray
    """The image (H, W, 3) from 0 to 1, cropped and scaled but not normalised."""
    coarse_size: Tuple[int, int]
    """Rows and columns of coarse tokens, h and w."""
    fine_size: Tuple[int, int]
    """Rows and columns of fine tokens."""
    coarse_cell: int
    """Side of a coarse token in pixels; those at the right and lower edge may reach beyond the image."""
    fine_cell: int
    """Side of a fine token in pixels."""
    attention: np.ndarray
    """Share of the coarse attention that each coarse token gets (h, w), mean over queries and heads; 1 in all."""
    scores: np.ndarray
    """Selection score of each coarse token (heads, h, w)."""
    selected: np.ndarray
    """Indices of the selected coarse tokens (heads, k), row by row, the best first."""
    children: np.ndarray
    """Indices of the fine tokens below them (heads, k, 4 or 1), -1 where there is none."""
    coarse: np.ndarray
    """Probability of each class with coarse attention alone."""
    fine: np.ndarray
    """Probability of each class with fine attention too."""
    class_names: Sequence[str]
    model: str
    """Name of the architecture."""
    fusion: str
    """'gate' or 'joint'."""

    @property
    def selects_all(self) -> bool:
        """Whether there was no choice: every head selects every coarse token."""
        return self.selected.shape[1] == self.attention.size

    @property
    def caption(self) -> str:
        """Model, size and fine attention."""
        height, width, _ = self.pixels.shape
        k, tokens = self.selected.shape[1], self.attention.size
        note = ': all, so none is chosen' if self.selects_all else ''
        return (
            f'{_short(self.model)}, {width} x {height} px, fine attention ({self.fusion}) over k = {k} of {tokens} '
            f'tokens{note}')


def draw_view(view: View) -> 'Figure':
    """The figure of one image: input, coarse attention, prediction, and of each head the selection and the scores."""
    canvas = _Canvas(view)
    groups = [range(i, min(i + PER_ROW, len(view.scores))) for i in range(0, len(view.scores), PER_ROW)]
    # two heads or fewer have room for both kinds of panels in one row
    rows = sum(1 if 2 * len(heads) <= PER_ROW else 2 for heads in groups)
    figure = canvas.figure(
        PER_ROW * (PANEL + GAP) + BAR + TICKS, CAPTION + (rows + 1) * canvas.row + EDGE, view.caption)

    _show_image(canvas.panel(0, 0, 'Input'), view)
    heat = _show_attention(canvas.panel(0, 1, 'Coarse attention'), view, _attention_scale([view]))
    canvas.bar(0, 1, heat, '\n'.join(_share_label(view)), 100 / view.attention.size)
    axes = canvas.axes(canvas.left(2) + BAR + TICKS, canvas.top(0), PREDICTION, canvas.height)
    _show_prediction(axes, view, 5)

    row = 1
    for heads in groups:
        together = 2 * len(heads) <= PER_ROW
        for i, head in enumerate(heads):
            _show_tokens(canvas.panel(row, i, f'Head {head + 1}: selected', head), view, head)
        row, start = (row, len(heads)) if together else (row + 1, 0)
        for i, head in enumerate(heads):
            axes = canvas.panel(row, start + i, f'Head {head + 1}: scores', head)
            scores = _show_scores(axes, view, head)
        canvas.bar(row, start + len(heads) - 1, scores, 'score, centred')
        row += 1
    return figure


def draw_sheet(views: Sequence[View]) -> 'Figure':
    """One row per image: input, coarse attention, the selection of each head, prediction."""
    heads = len(views[0].scores)
    canvas = _Canvas(views[0], titled=False)
    width = NAME + (2 + heads) * (PANEL + GAP) + PREDICTION + EDGE
    height = CAPTION + TITLE + len(views) * canvas.row + BAR + BAR_BELOW
    figure = canvas.figure(width, height, views[0].caption, top=TITLE, margin=NAME)
    scale = _attention_scale(views)
    for row, view in enumerate(views):
        titles = ['Input', 'Coarse attention', *(f'Head {i + 1}' for i in range(heads))]
        titles = titles if row == 0 else [''] * len(titles)
        axes = canvas.panel(row, 0, titles[0])
        _show_image(axes, view)
        axes.set_ylabel(_short(view.name, int(18 * canvas.height)), fontsize=TEXT, labelpad=2, parse_math=False)
        heat = _show_attention(canvas.panel(row, 1, titles[1]), view, scale)
        for head in range(heads):
            _show_tokens(canvas.panel(row, 2 + head, titles[2 + head], head), view, head)
        axes = canvas.axes(canvas.left(2 + heads), canvas.top(row), PREDICTION, canvas.height)
        _show_prediction(axes, view, 3, legend=row == 0)
    extend = 'both' if len(views) > 1 else 'neither'
    canvas.bar_below(len(views) - 1, 1, heat, ', '.join(_share_label(views[0])), 100 / views[0].attention.size, extend)
    return figure


class _Canvas:
    """Places panels in inches, from the upper left corner."""

    def __init__(self, view: View, titled: bool = True):
        # all tokens are drawn whole, so a panel is as large as the map, grey where the image has ended
        self.shape = (view.coarse_size[0] * view.coarse_cell, view.coarse_size[1] * view.coarse_cell)
        self.height = PANEL * self.shape[0] / self.shape[1]
        self.title = TITLE if titled else 0.
        self.row = self.height + (self.title or GAP)

    def figure(
            self,
            width: float,
            height: float,
            caption: str,
            top: float = 0.,
            margin: float = EDGE,
    ) -> 'Figure':
        from matplotlib.figure import Figure

        self._figure = Figure(figsize=(width, height), facecolor='white')
        self._top, self._margin = CAPTION + top, margin
        self._figure.text(
            margin / width, 1 - EDGE / height, caption, fontsize=TEXT, ha='left', va='top', parse_math=False)
        return self._figure

    def left(self, column: int) -> float:
        return self._margin + column * (PANEL + GAP)

    def top(self, row: int) -> float:
        return self._top + row * self.row + self.title

    def axes(self, left: float, top: float, width: float, height: float) -> 'Axes':
        total_width, total_height = self._figure.get_size_inches()
        return self._figure.add_axes((
            left / total_width, 1 - (top + height) / total_height, width / total_width, height / total_height))

    def panel(self, row: int, column: int, title: str, head: int = -1) -> 'Axes':
        """An empty panel in pixels of the image, its title in the colour of a head if one is given."""
        axes = self.axes(self.left(column), self.top(row), PANEL, self.height)
        axes.set(xlim=(0, self.shape[1]), ylim=(self.shape[0], 0), xticks=[], yticks=[], facecolor=str(GREY))
        axes.set_title(title, fontsize=TITLE_TEXT, pad=TITLE_PAD, color='black' if head < 0 else _head_color(head))
        for spine in axes.spines.values():
            spine.set_linewidth(0.6)
        return axes

    def bar(self, row: int, column: int, mappable: Any, label: str, mark: Optional[float] = None) -> None:
        """A colour bar at the right of a panel, with a line across it at the mark."""
        axes = self.axes(self.left(column) + PANEL + BAR_GAP, self.top(row), BAR, self.height)
        self._bar(axes, mappable, label, 'vertical')
        if mark is not None:
            axes.axhline(mark, color='black', lw=0.8)

    def bar_below(self, row: int, column: int, mappable: Any, label: str, mark: float, extend: str) -> None:
        """A colour bar below a panel, with a line across it at the mark, pointed where values go beyond it."""
        axes = self.axes(self.left(column), self.top(row) + self.height + BAR_GAP, PANEL, BAR)
        self._bar(axes, mappable, label, 'horizontal', extend)
        axes.axvline(mark, color='black', lw=0.8)

    def _bar(self, axes: 'Axes', mappable: Any, label: str, orientation: str, extend: str = 'neither') -> None:
        from matplotlib.ticker import MaxNLocator, ScalarFormatter

        # numbers as they are, not as distances from one that stands elsewhere
        numbers = ScalarFormatter(useOffset=False)
        bar = self._figure.colorbar(
            mappable, cax=axes, orientation=orientation, extend=extend, ticks=MaxNLocator(4), format=numbers)
        bar.ax.tick_params(labelsize=TEXT, length=2, width=0.6, pad=1.5)
        bar.set_label(label, fontsize=TEXT, labelpad=2)
        bar.outline.set_linewidth(0.5)


def _head_color(head: int) -> str:
    return HEAD_COLORS[head % len(HEAD_COLORS)]


def _show_map(axes: 'Axes', values: np.ndarray, **kwargs: Any) -> Any:
    """A map of coarse tokens over the whole panel, every token of one colour."""
    extent = (*axes.get_xlim(), *axes.get_ylim())
    return axes.imshow(values, extent=extent, aspect='auto', interpolation='nearest', **kwargs)


def _show_image(axes: 'Axes', view: View, grey: bool = False) -> None:
    height, width, _ = view.pixels.shape
    pixels = view.pixels
    if grey:
        pixels = np.repeat(GREY + CONTRAST * (pixels @ [[0.299], [0.587], [0.114]] - 0.5), 3, axis=2)
    limits = axes.get_xlim(), axes.get_ylim()
    axes.imshow(pixels, extent=(0, width, height, 0), aspect='auto')
    axes.set(xlim=limits[0], ylim=limits[1])


def _attention_scale(views: Sequence[View]) -> Tuple[float, float]:
    """Least and greatest share of the colours, one scale for all views.

    From least to greatest and not from zero, so that a nearly even map shows its structure; the colour bar tells how
    even it is. Half of several views may go beyond it, so that one bright token does not darken all others.
    """
    low, high = (float(np.median([end(view.attention) for view in views])) for end in (np.min, np.max))
    lacking = max(0., LEAST_SPREAD / views[0].attention.size - (high - low))
    return low - lacking / 2, high + lacking / 2


def _share_label(view: View) -> Tuple[str, str]:
    """What stands beside a bar of shares, the second for the line across it: the share if all tokens had the same."""
    return 'share (%)', f'even {100 / view.attention.size:.3g}'


def _show_attention(axes: 'Axes', view: View, limits: Tuple[float, float]) -> Any:
    """Heat over a faint grey image; returns what a colour bar needs, with the colours as they look over plain grey."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    scale, colors = Normalize(100 * limits[0], 100 * limits[1]), colormaps['inferno']
    _show_image(axes, view, grey=True)
    _show_map(axes, 100 * view.attention, cmap=colors, norm=scale, alpha=HEAT)
    return ScalarMappable(scale, ListedColormap(HEAT * colors(np.linspace(0, 1, 256))[:, :3] + (1 - HEAT) * GREY))


def _show_tokens(axes: 'Axes', view: View, head: int) -> None:
    """The image where a head looks finely: its coarse tokens outlined, the fine ones below them in thin lines."""
    _show_image(axes, view)
    veil = np.ones((*view.coarse_size, 4))
    veil[..., 3] = VEIL
    veil.reshape(-1, 4)[view.selected[head], 3] = 0
    _show_map(axes, veil)
    fine = view.children[head]
    _outline(axes, fine[fine >= 0], view.fine_size[1], view.fine_cell, 0.25, 'fine', _head_color(head))
    _outline(axes, view.selected[head], view.coarse_size[1], view.coarse_cell, 1.1, 'coarse', _head_color(head))


def _show_scores(axes: 'Axes', view: View, head: int) -> Any:
    """The scores of a head over its mean, on a scale shared by all heads, with the selected tokens outlined."""
    scores = _relative(view.scores)
    image = _show_map(axes, scores[head], cmap='viridis', vmin=scores.min(), vmax=scores.max())
    for line, color in ((1.5, 'black'), (0.8, 'white')):  # seen on every colour of the map
        _outline(axes, view.selected[head], view.coarse_size[1], view.coarse_cell, line, 'coarse', color)
    return image


def _relative(scores: np.ndarray) -> np.ndarray:
    """Scores over the mean of their head: the softmax does not know that mean, and heads differ in it."""
    return scores - scores.mean(axis=(1, 2), keepdims=True)


def _outline(
        axes: 'Axes',
        tokens: np.ndarray,
        columns: int,
        cell: int,
        line: float,
        level: str,
        color: str,
) -> None:
    """Outline tokens of a map with so many columns; the line, in points, runs inside so that neighbours stay apart."""
    from matplotlib.patches import Rectangle

    inset = line / 2 * axes.get_xlim()[1] / (72 * PANEL)
    for token in tokens.flatten():
        row, col = divmod(int(token), columns)
        axes.add_patch(Rectangle(
            (col * cell + inset, row * cell + inset), cell - 2 * inset, cell - 2 * inset, fill=False, lw=line, ec=color,
            joinstyle='miter', gid=level))


def _show_prediction(axes: 'Axes', view: View, most: int, legend: bool = True) -> None:
    """The likeliest classes, as many as there is room for, coarse above fine."""
    height = axes.figure.get_figheight() * axes.get_position().height
    most = min(most, max(1, int(height / CLASS)))
    axes.set(xlim=(0, 1), ylim=(most, 0))
    axes.axis('off')
    ends = (0.79, 1.)  # of the columns of numbers
    if legend:
        header = dict(y=1 + TITLE_PAD / (72 * height), transform=axes.transAxes, va='baseline')  # as the panels' titles
        axes.text(0, s='Prediction (%)', fontsize=TITLE_TEXT, **header)
        for (name, color), end in zip(VARIANTS, ends):
            axes.text(end, s=name, fontsize=TEXT, color=color, ha='right', **header)
    likeliest = np.argsort(-np.maximum(view.coarse, view.fine), kind='stable')[:most]
    for row, i in enumerate(likeliest):
        axes.text(0, row + 0.45, _short(view.class_names[i]), fontsize=TEXT, va='bottom', parse_math=False)
        for probabilities, (_, color), offset, end in zip((view.coarse, view.fine), VARIANTS, (0.5, 0.7), ends):
            value = probabilities[i]
            axes.barh(row + offset, BAR_LENGTH * value, 0.17, color=color, align='edge', lw=0)
            axes.text(
                end, row + 0.685, f'{100 * value:.1f}', fontsize=TEXT, color=color, ha='right', va='center')


def _short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f'{name[:most - 1]}…'
