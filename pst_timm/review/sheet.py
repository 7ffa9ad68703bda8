"""Contact sheets: images in rows, with a few words below each, as PNG or PDF; needs Pillow alone."""
import os
from pathlib import Path
from typing import List, Mapping, NamedTuple, Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from pst_timm.utils.files import write_whole
from pst_timm.utils.markdown import plain

__all__ = ['SHEETS', 'Tile', 'draw_sheet', 'shown']

SHEETS = {'.png': 'PNG', '.pdf': 'PDF'}
COLUMNS = 8
SIDE, GAP, EDGE, HEADING, LINE = 144, 14, 20, 34, 15  # pixels
TEXT, TITLE = 12, 17  # size of letters
DPI = 100
GREY = (245, 245, 245)


class Tile(NamedTuple):
    """An image and the lines below it, the first two of which are set in black."""
    image: Image.Image
    """From `shown`."""
    lines: Sequence[str]


def draw_sheet(path: os.PathLike, headings: Mapping[str, Sequence[Tile]]) -> None:
    """Draw images under their headings, a page for each heading in a PDF.

    Args:
        path: File to write, .png or .pdf.
        headings: Tiles by heading; with none the sheet says that there is nothing to see.

    Raises:
        PSTError: If it cannot be written.
    """
    parts = [_part(heading, tiles) for heading, tiles in headings.items()] or [_part('Nothing to see.', [])]
    kind = SHEETS[Path(path).suffix.lower()]
    if kind == 'PDF':
        first, *rest = parts
        write_whole(path, lambda temporary: first.save(
            temporary, kind, resolution=DPI, save_all=True, append_images=rest))
        return
    page = Image.new('RGB', (parts[0].width, sum(part.height for part in parts)), 'white')
    top = 0
    for part in parts:
        page.paste(part, (0, top))
        top += part.height
    write_whole(path, lambda temporary: page.save(temporary, kind, dpi=(DPI, DPI)))


def _part(heading: str, tiles: Sequence[Tile]) -> Image.Image:
    """A heading and its tiles."""
    text, title = ImageFont.load_default(TEXT), ImageFont.load_default(TITLE)
    lines = max((len(tile.lines) for tile in tiles), default=0)
    height = SIDE + lines * LINE + GAP
    rows = -(-len(tiles) // COLUMNS)
    page = Image.new(
        'RGB', (2 * EDGE + COLUMNS * SIDE + (COLUMNS - 1) * GAP, HEADING + EDGE + rows * height + EDGE // 2), 'white')
    draw = ImageDraw.Draw(page)
    draw.text((EDGE, EDGE // 2 + 4), _fit(heading, title, page.width - 2 * EDGE), fill='black', font=title)
    for i, tile in enumerate(tiles):
        left = EDGE + i % COLUMNS * (SIDE + GAP)
        top = HEADING + EDGE // 2 + i // COLUMNS * height
        draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), fill=GREY)
        page.paste(tile.image, (left + (SIDE - tile.image.width) // 2, top + (SIDE - tile.image.height) // 2))
        for n, line in enumerate(tile.lines):
            draw.text(
                (left, top + SIDE + 2 + n * LINE), _fit(line, text, SIDE + GAP - 4), font=text,
                fill='black' if n < 2 else 'dimgrey')
    return page


def shown(image: Image.Image) -> Image.Image:
    """An image as large as its tile; the pixels of small ones are left as they are, so that they can be judged."""
    image = image.convert('RGB')
    smooth = max(image.size) > SIDE // 2
    return ImageOps.contain(
        image, (SIDE, SIDE), Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST)


def _fit(line: str, font: ImageFont.ImageFont, width: int) -> str:
    """A line without what would steer a reader, cut in the middle where it is too long: names differ at their ends."""
    words: List[str] = list(plain(line, 400))
    if not isinstance(font, ImageFont.FreeTypeFont):  # Pillow without FreeType has letters for Latin-1 alone
        words = list(''.join(words).encode('latin-1', 'replace').decode('latin-1'))
    if font.getlength(''.join(words)) <= width:
        return ''.join(words)
    keep = len(words)
    while keep > 2 and font.getlength(''.join([*words[:keep - keep // 2], '...', *words[-(keep // 2):]])) > width:
        keep -= 1
    return ''.join([*words[:keep - keep // 2], '...', *words[-(keep // 2):]])
