"""The boxes that a detector finds in image files: drawn on them, and as data."""
import logging
import os
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from pst_timm.data.images import find_images, open_image
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import check_output, write_json, write_whole
from pst_timm.utils.markdown import plain
from pst_timm.utils.progress import progress_bar

from .drawing import draw_boxes
from .evaluation import in_pixels_of
from .transforms import eval_transforms

__all__ = ['Prediction', 'coco_results', 'find', 'predict']

_logger = logging.getLogger(__name__)

MOST_NAME = 300  # characters of a path in a message
DRAWN = {'.jpg': 'JPEG', '.jpeg': 'JPEG', '.png': 'PNG', '.webp': 'WEBP'}  # formats in which pictures are written


class Prediction(NamedTuple):
    """What a detector found in an image."""
    path: str
    size: Tuple[int, int] = (0, 0)
    """Width and height in pixels, of the image as it is shown."""
    boxes: np.ndarray = np.zeros((0, 4))
    """XYXY (n, 4) in its pixels, the highest scores first."""
    scores: np.ndarray = np.zeros(0)
    """(n,), from 0 to 1."""
    labels: np.ndarray = np.zeros(0, np.int64)
    """(n,)."""
    reason: str = ''
    """Why the image could not be read, empty if it could."""


def find(
        detector: nn.Module,
        paths: Sequence[str],
        threshold: float = 0.5,
        batch_size: int = 8,
        show: bool = True,
) -> Iterator[Tuple[Prediction, Optional[Image.Image]]]:
    """What a detector finds in image files, in their order, with the image; no image is kept.

    Args:
        detector: The detector, from `open_detector`; `img_size` is the longer side that it takes.
        paths: The files.
        threshold: Least score of a box.
        batch_size: Images at a time.
        show: Whether there is a bar, where standard error is a terminal.
    """
    prepare = eval_transforms(detector.img_size)
    parameter = next(detector.parameters(), torch.zeros(()))
    for start in progress_bar(range(0, len(paths), batch_size), -(-len(paths) // batch_size), 'Predict', show):
        read = [_read(path) for path in paths[start:start + batch_size]]
        images = [prepare(tv_tensors.Image(F.pil_to_tensor(image))) for image, _ in read if image is not None]
        with torch.inference_mode():
            outputs = iter(detector([image.to(parameter) for image in images]) if images else ())
        sizes = iter([image.shape[-2:] for image in images])
        for path, (image, reason) in zip(paths[start:start + batch_size], read):
            if image is None:
                yield Prediction(path, reason=reason), None
            else:
                yield _prediction(path, image.size, next(outputs), next(sizes), threshold), image


def _read(path: str) -> Tuple[Optional[Image.Image], str]:
    try:
        return open_image(path), ''
    except PSTError as e:
        return None, str(e)


def _prediction(
        path: str,
        size: Tuple[int, int],
        output: Dict[str, torch.Tensor],
        given_size: Sequence[int],
        threshold: float,
) -> Prediction:
    width, height = size
    scores = output['scores'].cpu().float().numpy()
    kept = np.argsort(-scores, kind='stable')
    kept = kept[scores[kept] >= threshold]
    boxes = in_pixels_of((height, width), output['boxes'], given_size)[kept]
    boxes = np.clip(boxes, 0, [width, height] * 2)
    return Prediction(path, size, boxes, scores[kept], output['labels'].cpu().numpy()[kept])


def predict(
        source: Union[str, os.PathLike, nn.Module],
        images: Sequence[os.PathLike],
        output: Optional[os.PathLike] = None,
        json: Optional[os.PathLike] = None,
        threshold: float = 0.5,
        batch_size: int = 8,
        overwrite: bool = False,
        show: bool = True,
        **settings: Any,
) -> List[Prediction]:
    """Find objects in images; draw them, and write them as data, where that is asked for.

    Args:
        source: A detector, or what `open_detector` opens.
        images: Image files, and folders of them.
        output: Folder for the images with boxes drawn on them, under their own names.
        json: File for the boxes, see `coco_results`.
        threshold: Least score of a box.
        batch_size: Images at a time.
        overwrite: Whether files that are there may be replaced; images that are read never are.
        show: Whether there is a bar, where standard error is a terminal.
        settings: For `open_detector`.

    Returns:
        What was found in each image, in their order; those that could not be read are logged, and have a `reason`.

    Raises:
        PSTError: If there are no images, not one can be read, or a file cannot be written or must not be.
    """
    if not 0 <= threshold <= 1:
        raise PSTError(f'The threshold of the scores is {threshold}; expected a number from 0 to 1.')
    if batch_size < 1:
        raise PSTError(f'The batch size is {batch_size}; expected 1 or more.')
    named = _named(images)
    paths = [path for path, _ in named]
    drawn = _drawn_paths(Path(output), named) if output is not None else None
    outputs = [*(drawn or ()), *([Path(json)] if json is not None else ())]
    if drawn is not None:
        _make_folders(Path(output), drawn)
    for path in outputs:
        check_output(path, overwrite, paths)
    detector = source if isinstance(source, nn.Module) else _open(source, **settings)
    class_names = list(detector.class_names)
    found = []
    for i, (prediction, image) in enumerate(find(detector, paths, threshold, batch_size, show)):
        found.append(prediction)
        if image is None:
            _logger.warning(f'Skipped: {plain(prediction.reason, 2 * MOST_NAME)}')
        elif drawn is not None:
            picture = draw_boxes(image, prediction.boxes, prediction.labels, prediction.scores, class_names)
            _save(picture, drawn[i])
    if all(prediction.reason for prediction in found):
        raise PSTError(
            f'Not one of {len(found)} image(s) could be read, such as {plain(paths[0], MOST_NAME)}.')
    if json is not None:
        write_json(json, coco_results(found, class_names))
    return found


def coco_results(found: Sequence[Prediction], class_names: Sequence[str]) -> List[Dict[str, Any]]:
    """Boxes as COCO's list of results, with the name of file and class.

    `image_id` counts the images from 1, `category_id` the classes likewise, and `bbox` is XYWH in pixels of the image
    as it is shown.

    Args:
        found: What was found in each image.
        class_names: Names in the order of the labels.
    """
    rows = []
    for i, prediction in enumerate(found):
        for (x1, y1, x2, y2), score, label in zip(
                prediction.boxes.tolist(), prediction.scores.tolist(), prediction.labels.tolist()):
            rows.append(dict(
                image_id=i + 1,
                file_name=prediction.path,
                category_id=label + 1,
                category=class_names[label],
                bbox=[round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)],
                score=round(score, 4),
            ))
    return rows


def _open(source: Union[str, os.PathLike], **settings: Any) -> nn.Module:
    from .checkpoint import open_detector

    return open_detector(source, **settings)


def _named(images: Sequence[os.PathLike]) -> List[Tuple[str, Path]]:
    """Path of each image, and what it is called among the pictures: relative to its folder where that was named."""
    named = []
    for path in map(Path, images):
        if path.is_dir():
            named += [(str(file), file.relative_to(path)) for file in find_images(path)[0]]
        else:
            named.append((str(path), Path(path.name)))
    if not named:
        raise PSTError('No images are named.')
    return named


def _drawn_paths(folder: Path, named: Sequence[Tuple[str, Path]]) -> List[Path]:
    """File of each picture.

    Raises:
        PSTError: If two images would have the same.
    """
    seen: Dict[Path, str] = {}
    for path, name in named:
        # what is written in every format as it was read would lose some of it
        target = folder / (name if name.suffix.lower() in DRAWN else name.with_name(f'{name.name}.png'))
        if target in seen:
            raise PSTError(
                f'{plain(seen[target], MOST_NAME)} and {plain(path, MOST_NAME)} would both be drawn as '
                f'{plain(target, MOST_NAME)}: name the folder above them, or draw one after the other.')
        seen[target] = path
    return list(seen)


def _make_folders(folder: Path, drawn: Sequence[Path]) -> None:
    if folder.exists() and not folder.is_dir():
        raise PSTError(f'Cannot draw to {folder}: it is no folder.')
    if not folder.absolute().parent.is_dir():
        raise PSTError(f'Cannot draw to {folder}: there is no folder {folder.parent}. Make it first.')
    try:
        for parent in sorted({path.parent for path in drawn}):
            parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise PSTError(f'Cannot draw to {folder}: {e.strerror}.') from e


def _save(picture: Image.Image, path: Path) -> None:
    write_whole(path, lambda temporary: picture.save(temporary, DRAWN[path.suffix.lower()], quality=92))
