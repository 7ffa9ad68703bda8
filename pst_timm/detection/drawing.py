"""Boxes drawn on images, with class and score, so that they can be read."""
import colorsys
from typing import List, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes

from pst_timm.utils.markdown import plain

__all__ = ['class_colors', 'draw_boxes']

Color = Tuple[int, int, int]

# Okabe and Ito's colours, told apart by colour-blind readers too
FIRST_COLORS = (
    (213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (240, 228, 66))
MOST_NAME = 30  # characters of a class
LEAST_TEXT, LINES = 9, 36  # pixels, and lines of text that an image would have room for


def class_colors(count: int) -> List[Color]:
    """A colour for each class, the first few told apart best."""
    more = (colorsys.hsv_to_rgb(k * 0.381966 % 1, 0.75, 0.9) for k in range(count - len(FIRST_COLORS)))
    return [*FIRST_COLORS[:count], *(tuple(round(255 * c) for c in color) for color in more)]


def draw_boxes(
        image: Image.Image,
        boxes: np.ndarray,
        labels: Sequence[int],
        scores: Optional[Sequence[float]],
        class_names: Sequence[str],
) -> Image.Image:
    """An image with boxes drawn on it, those of high scores over the others.

    Args:
        image: The image, RGB.
        boxes: XYXY (n, 4) in its pixels.
        labels: Class of each box.
        scores: Score of each box, from 0 to 1; None for none, such as those of the truth.
        class_names: Names in the order of the labels.
    """
    width, height = image.size
    size = max(LEAST_TEXT, round(min(width, height) / LINES))
    line = max(1, round(size / 7))
    # the lower right edge of a box is that of its last pixel
    last = np.array([width, height] * 2) - 1
    corners = np.clip(np.round(np.asarray(boxes, float).reshape(-1, 4) - [0, 0, 1, 1]), 0, last)
    corners[:, 2:] = np.maximum(corners[:, 2:], corners[:, :2])
    order = np.argsort(scores, kind='stable') if scores is not None else np.arange(len(corners))
    corners = corners[order]
    palette = class_colors(len(class_names))
    colors = [palette[labels[i]] for i in order]
    if len(corners):
        pixels = draw_bounding_boxes(
            F.pil_to_tensor(image.convert('RGB')), torch.from_numpy(corners), colors=colors, width=line)
        image = F.to_pil_image(pixels)
    else:
        image = image.convert('RGB')
    canvas = ImageDraw.Draw(image)
    font = ImageFont.load_default(size)
    for i, (x1, y1, _, _), color in zip(order, corners.tolist(), colors):
        name = plain(class_names[labels[i]], MOST_NAME)
        text = name if scores is None else f'{name} {scores[i]:.2f}'
        _write(canvas, text, x1, y1, color, font, (width, height))
    return image


def _write(
        canvas: ImageDraw.ImageDraw,
        text: str,
        x: float,
        y: float,
        color: Color,
        font: ImageFont.ImageFont,
        size: Tuple[int, int],
) -> None:
    """A text on a ground of the colour of its box: above the corner, below it where there is no room."""
    if not isinstance(font, ImageFont.FreeTypeFont):  # Pillow without FreeType has letters for Latin-1 alone
        text = text.encode('latin-1', 'replace').decode('latin-1')
    left, top, right, bottom = canvas.textbbox((0, 0), text, font=font)
    margin = max(1, round((bottom - top) / 6))
    width, height = right - left + 2 * margin, bottom - top + 2 * margin
    x = max(0, min(x, size[0] - width))
    y = y - height if y >= height else y
    canvas.rectangle((x, y, x + width, y + height), fill=color)
    # as bright as people see it
    dark = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
    canvas.text((x + margin - left, y + margin - top), text, fill='black' if dark else 'white', font=font)
