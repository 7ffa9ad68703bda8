"""Draw what PST looks at: coarse attention, the tokens that each head selects, and what they do to the prediction."""
import io
import logging
import os
from pathlib import Path
from typing import Any, Iterable, List, Optional, Sequence, Tuple

import torch
from timm.data import create_transform, resolve_input_data_config

from pst_timm.checkpoints import label_names, readable_names
from pst_timm.data.images import find_images, open_image
from pst_timm.layers import PyramidSparseAttention
from pst_timm.models import PSTModel, inspect_tokens
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import check_output, write_whole

from .drawing import View, draw_sheet, draw_view

__all__ = ['DPI', 'FORMATS', 'MIN_SIDE', 'check_outputs', 'look', 'visualize']

_logger = logging.getLogger(__name__)

FORMATS = ('.png', '.pdf', '.svg')
DPI = 400
MIN_SIDE = 32  # a coarse token


def look(
        model: PSTModel,
        path: os.PathLike,
        topk: Optional[int] = None,
        fusion: Optional[str] = None,
        img_size: Optional[int] = None,
        class_names: Optional[Sequence[str]] = None,
        block: int = -1,
) -> View:
    """What a figure of one image is drawn from.

    Args:
        model: A classifier with PST, in eval mode; its settings are not changed.
        path: The image, preprocessed as the model's `pretrained_cfg` says.
        topk: Coarse tokens to select per head, as the model is set if None.
        fusion: 'gate' or 'joint', as the model is set if None.
        img_size: Height and width of the input, the model's own if None.
        class_names: Names of the classes in order, those of the model for people if None, or else numbers.
        block: The PST block to look at.

    Raises:
        PSTError: If the model is no classifier, selects nothing, or has another number of classes; if there is no such
            block, or the image cannot be read.
        ValueError: If the model has no PST, or cannot be inspected as it is.
    """
    if model.num_classes == 0:
        raise PSTError('The model has no classifier, whose prediction could be drawn.')
    names = class_names
    if names is None:
        known = label_names(model)
        names = readable_names(
            known or [f'class {i}' for i in range(model.num_classes)], model.pretrained_cfg, known=bool(known))
    if len(names) != model.num_classes:
        raise PSTError(f'{len(names)} class names for a model of {model.num_classes} classes.')
    config = resolve_input_data_config(model, {'img_size': img_size} if img_size else {})
    channels = config['input_size'][0]
    x = create_transform(**config)(open_image(path, 'L' if channels == 1 else 'RGB'))[None]
    coarse, fine, blocks = inspect_tokens(model, x.to(next(model.parameters())), topk, fusion)
    if not -len(blocks) <= block < len(blocks):
        raise PSTError(f'There is no PST block {block}: the model has {len(blocks)}, counted from 0.')
    tokens = blocks[block]
    if tokens.selected.shape[2] == 0:
        raise PSTError('topk must be at least 1 to draw what is selected: with 0 nothing is.')
    mean, std = (torch.tensor(config[k])[:, None, None] for k in ('mean', 'std'))
    fine_cell = model.feature_info[-2]['reduction']
    layers = [m for m in model.modules() if isinstance(m, PyramidSparseAttention)]
    ratio = 2 if tokens.children.shape[3] == 4 else 1
    return View(
        name=Path(path).name,
        pixels=(x[0] * std + mean).clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy(),
        coarse_size=tokens.coarse_size,
        fine_size=tokens.fine_size,
        coarse_cell=ratio * fine_cell,
        fine_cell=fine_cell,
        attention=_array(tokens.attention.mean(dim=(1, 2))[0].reshape(tokens.coarse_size)),
        scores=_array(tokens.scores[0].unflatten(1, tokens.coarse_size)),
        selected=tokens.selected[0].cpu().numpy(),
        children=tokens.children[0].cpu().numpy(),
        coarse=_array(coarse[0].softmax(dim=0)),
        fine=_array(fine[0].softmax(dim=0)),
        class_names=list(names),
        model=model.pretrained_cfg.get('architecture') or type(model).__name__,
        fusion=fusion or layers[block].fine_fusion,
    )


def _array(x: torch.Tensor) -> Any:
    return x.float().cpu().numpy()


def visualize(
        source: os.PathLike,
        model: PSTModel,
        output: os.PathLike,
        limit: int = 12,
        each: bool = False,
        overwrite: bool = False,
        **kwargs: Any,
) -> List[Path]:
    """Draw what a model looks at in an image, or in the images of a folder.

    Args:
        source: An image, or a folder: then a contact sheet with one row per image is drawn.
        model: A classifier with PST, in eval mode.
        output: File to write, .png, .pdf or .svg.
        limit: Most images of a folder to draw.
        each: Of a folder, also write the figure of each image, beside the sheet.
        overwrite: Whether files that are there may be replaced; never the images.
        kwargs: Further arguments of `look`.

    Returns:
        The files written.

    Raises:
        PSTError: If the output is no such file or cannot be written, matplotlib is missing, or as `look` does.
        ValueError: As `look` does.
    """
    paths, outputs = check_outputs(output, source, limit, each, overwrite)
    views = [look(model, path, **kwargs) for path in paths]
    if views[0].selects_all:
        _logger.warning(
            f'Every head selects all {views[0].attention.size} coarse tokens, so the picture shows no choice: select '
            f'fewer with topk, or take a larger img_size.')
    if not Path(source).is_dir():
        return [_save(draw_view(views[0]), outputs[0], views[0].name)]
    _save(draw_sheet(views), outputs[0], Path(source).name)
    for path, view in zip(outputs[1:], views):
        _save(draw_view(view), path, view.name)
    return outputs


def check_outputs(
        output: os.PathLike,
        source: os.PathLike,
        limit: int = 12,
        each: bool = False,
        overwrite: bool = False,
        inputs: Iterable[os.PathLike] = (),
) -> Tuple[List[Path], List[Path]]:
    """Make sure, before anything is computed, that figures can be drawn, and that no file is lost by it.

    Args:
        output: See `visualize`, as for the next four.
        source: An image, or a folder.
        limit: Most images of a folder to draw.
        each: Of a folder, also write the figure of each image.
        overwrite: Whether files that are there may be replaced.
        inputs: What is read beside the images.

    Returns:
        The images to draw, and the files to write.

    Raises:
        PSTError: If a file cannot be written, or must not be; if there is no image, or no matplotlib.
    """
    output, source = Path(output), Path(source)
    if output.suffix.lower() not in FORMATS:
        raise PSTError(f'The output must be a {", ".join(FORMATS)} file, got {output}.')
    paths, outputs = [source], [output]
    if source.is_dir():
        paths = [Path(path) for path in find_images(source, limit)[0]]
        # numbered, as two folders may each have an image of that name
        outputs += [output.with_name(f'{output.stem}-{i + 1:02d}-{path.stem}{output.suffix}')
                    for i, path in enumerate(paths if each else ())]
    for path in outputs:
        if source.is_dir() and path.exists() and path.resolve().is_relative_to(source.resolve()):
            raise PSTError(f'{path} is in the folder that is read: name a file elsewhere.')
        check_output(path, overwrite, [*inputs, *paths])
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PSTError("Figures need matplotlib: pip install matplotlib, or 'pst_timm[train]'.") from None
    return paths, outputs


def _save(figure: Any, path: Path, title: str) -> Path:
    data = io.BytesIO()  # drawn in memory, as the writer of PDF trips over a full disk
    figure.savefig(data, format=path.suffix[1:].lower(), dpi=DPI, metadata={'Title': title})
    write_whole(path, lambda name: Path(name).write_bytes(data.getvalue()))
    return path
