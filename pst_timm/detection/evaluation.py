"""COCO's evaluation of boxes, by pycocotools, without files and without its prints.

A crowd box of COCO is nothing to find, and boxes that lie in it are not held against a detector. Difficult objects of
Pascal VOC are treated likewise. Images that could not be read are not evaluated.
"""
import io
import math
from contextlib import redirect_stdout
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.distributed as dist

from pst_timm.utils.errors import PSTError
from pst_timm.utils.markdown import plain

from .boxes import Annotations
from .datasets import BoxDataset

__all__ = [
    'METRICS', 'CocoEvaluator', 'Detections', 'ImageMatches', 'detections_of', 'in_pixels_of', 'match', 'shown',
    'summarise']

METRICS = (
    'ap', 'ap50', 'ap75', 'ap_small', 'ap_medium', 'ap_large',
    'ar1', 'ar10', 'ar100', 'ar_small', 'ar_medium', 'ar_large')
AREAS = ('all', 'small', 'medium', 'large')
NONE = math.nan  # of what there is nothing to find


class Detections(NamedTuple):
    """What a detector says of an image, in pixels of its file."""
    boxes: np.ndarray
    """XYXY (n, 4), float64."""
    scores: np.ndarray
    """(n,), float32."""
    labels: np.ndarray
    """(n,), int64."""


def shown(value: Optional[float], digits: int = 1) -> str:
    """A metric as people see it; '-' where there is nothing to find, such as no small objects."""
    return '-' if value is None or math.isnan(value) else f'{value:.{digits}f}'


def in_pixels_of(
        size: Sequence[float],
        boxes: torch.Tensor,
        given_size: Sequence[float],
) -> np.ndarray:
    """Boxes XYXY (n, 4), float64, in an image that was resized for the model.

    Args:
        size: Its height and width.
        boxes: XYXY (n, 4) as the model gave them.
        given_size: Height and width that the model was given.
    """
    (height, width), (given_height, given_width) = size, given_size
    scale = np.array([float(width) / float(given_width), float(height) / float(given_height)] * 2)
    return boxes.detach().cpu().double().numpy().reshape(-1, 4) * scale


def _coco_eval() -> Any:
    """pycocotools' evaluation, with the module that computes IoUs."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as e:
        raise PSTError(f"The evaluation of boxes needs pycocotools ({e}): pip install 'pst_timm[detect]'.") from None
    return COCO, COCOeval


class CocoEvaluator:
    """Takes in the boxes of a detector, batch by batch, and evaluates them as COCO does."""

    def __init__(self, dataset: BoxDataset, max_dets: int = 100):
        """
        Args:
            dataset: The images that are evaluated, with what is true of them.
            max_dets: Boxes of an image that count, those of the highest scores.

        Raises:
            PSTError: If pycocotools is not installed.
        """
        _coco_eval()
        self.annotations = dataset.annotations
        self.max_dets = max_dets
        self.found: Dict[int, Detections] = {}
        """By the place of the image among the annotations."""
        self._places = {key: i for i, key in enumerate(self.annotations.image_ids)}
        self._matches: Optional['ImageMatches'] = None

    def update(self, outputs: Sequence[Mapping[str, torch.Tensor]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Take in a batch.

        Args:
            outputs: Of each image `boxes` XYXY (n, 4) in pixels of the image as the model was given it, `scores` (n,)
                and `labels` (n,).
            targets: Of each image `image_id`, `orig_size` (height, width) of the file, and `given_size` of what the
                model was given, where it is another one.
        """
        self._matches = None
        for output, target in zip(outputs, targets, strict=True):
            size = target['orig_size']
            boxes = in_pixels_of(size, output['boxes'], target.get('given_size', size))
            scores = output['scores'].detach().cpu().float().numpy()
            if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
                raise PSTError(
                    'The detector gave boxes or scores that are no finite numbers: its weights have diverged, or the '
                    'precision (--amp, --model-dtype) is too low for them.')
            best = np.argsort(-scores, kind='stable')[:self.max_dets]
            self.found[self._places[int(target['image_id'])]] = Detections(
                boxes[best], scores[best], output['labels'].detach().cpu().numpy().astype(np.int64)[best])

    def summary(self) -> Dict[str, float]:
        """What there is so far in this process: images, and boxes in each."""
        images = len(self.found)
        return dict(images=float(images), boxes=sum(len(d.scores) for d in self.found.values()) / max(images, 1))

    def compute(self, distributed: bool = False) -> Dict[str, float]:
        """The twelve numbers of COCO in percent, by the names in `METRICS`; NaN where there is nothing to find.

        Args:
            distributed: Whether the images of all processes count; all of them have to ask then.
        """
        if distributed:
            everyone: List[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, self.found)
            self.found = {place: found for part in everyone for place, found in part.items()}
            self._matches = None
        return summarise(self.matches())

    def matches(self) -> 'ImageMatches':
        """Which boxes were found, image by image, for intervals."""
        if self._matches is None:
            self._matches = match(self.annotations, self.found, self.max_dets)
        return self._matches

    def class_ap(self) -> Dict[str, float]:
        """AP of each class in percent, NaN for those of which there is nothing to find; after `compute`."""
        precision = self.matches().accumulate()[0]
        return {name: _mean(precision[:, :, k, 0, -1]) for k, name in enumerate(self.annotations.class_names)}

    def results(self) -> List[Dict[str, Any]]:
        """The boxes as COCO's list of results: image_id, category_id, bbox (XYWH) and score; after `compute`."""
        known = self.annotations
        rows = []
        for place in sorted(self.found):
            for (x1, y1, x2, y2), score, label in zip(*(x.tolist() for x in self.found[place])):
                rows.append(dict(
                    image_id=known.image_ids[place],
                    category_id=known.category_ids[label],
                    bbox=[round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)],
                    score=round(score, 6),
                ))
        return rows


def detections_of(annotations: Annotations, rows: Sequence[Mapping[str, Any]]) -> Dict[int, Detections]:
    """Detections of all images from COCO's list of results, such as `CocoEvaluator.results` gave.

    Args:
        annotations: What is true of the images.
        rows: Entries with image_id, category_id, bbox (XYWH) and score; images without one have no detections.

    Raises:
        PSTError: If an entry is of an image or class that is not there, or has no numbers.
    """
    places = {key: i for i, key in enumerate(annotations.image_ids)}
    labels = {key: k for k, key in enumerate(annotations.category_ids)}
    found: Dict[int, List[Tuple[List[float], float, int]]] = {i: [] for i in places.values()}
    for n, row in enumerate(rows):
        try:
            place, label = places[row['image_id']], labels[row['category_id']]
            x, y, w, h, score = map(float, [*row['bbox'], row['score']])
        except (KeyError, TypeError, ValueError):
            raise PSTError(
                f'Entry {n} of the detections, {plain(row, 120)}, is not of these images: expected image_id and '
                f'category_id as the annotations have them, a bbox of four numbers, and a score.') from None
        found[place].append(([x, y, x + w, y + h], score, label))
    return {
        place: Detections(
            np.array([box for box, _, _ in entries], np.float64).reshape(-1, 4),
            np.array([score for _, score, _ in entries], np.float32),
            np.array([label for _, _, label in entries], np.int64))
        for place, entries in found.items()}


class ImageMatches:
    """pycocotools' matches of boxes with objects, image by image, which any choice of images can be summed over."""

    def __init__(self, evaluation: Any, places: Sequence[int]):
        """
        Args:
            evaluation: A `COCOeval` that has evaluated.
            places: The images, by their places among the annotations, in its order.
        """
        self.evaluation = evaluation
        self.places = list(places)
        self.accumulated: Optional[Tuple[np.ndarray, np.ndarray]] = None

    def accumulate(self) -> Tuple[np.ndarray, np.ndarray]:
        """Precision (IoUs, recalls, classes, areas, numbers of boxes) and recall (without recalls), -1 for none."""
        if self.accumulated is None:
            with redirect_stdout(io.StringIO()):
                self.evaluation.accumulate()
            self.accumulated = self.evaluation.eval['precision'], self.evaluation.eval['recall']
        return self.accumulated


def match(annotations: Annotations, found: Mapping[int, Detections], max_dets: int = 100) -> ImageMatches:
    """Match boxes with objects by pycocotools.

    Args:
        annotations: What is true.
        found: What was found, by the place of the image among the annotations; other images do not count.
        max_dets: Boxes of an image that count.

    Raises:
        PSTError: If pycocotools is not installed, or there are no images.
    """
    COCO, COCOeval = _coco_eval()
    if not found:
        raise PSTError('There are no boxes to evaluate: not one image was read.')
    places = sorted(found)
    # identifiers from 1: pycocotools takes 0 for "not matched"
    images = [dict(id=i + 1) for i in places]
    categories = [dict(id=k + 1) for k in range(len(annotations.class_names))]
    truth, answers = [], []
    ignored = annotations.ignored
    for i in places:
        at = annotations.of(i)
        for box, label, area, crowd in zip(
                annotations.boxes[at].tolist(), annotations.labels[at].tolist(), annotations.areas[at].tolist(),
                ignored[at].tolist()):
            truth.append(dict(
                id=len(truth) + 1, image_id=i + 1, category_id=label + 1, bbox=_xywh(box), area=area,
                iscrowd=int(crowd)))
        for box, score, label in zip(*(x.tolist() for x in found[i])):
            bbox = _xywh(box)
            answers.append(dict(
                id=len(answers) + 1, image_id=i + 1, category_id=label + 1, bbox=bbox, area=bbox[2] * bbox[3],
                score=score, iscrowd=0))
    with redirect_stdout(io.StringIO()):
        sides = []
        for entries in (truth, answers):
            side = COCO()
            side.dataset = dict(images=images, categories=categories, annotations=entries)
            side.createIndex()
            sides.append(side)
        evaluation = COCOeval(*sides, 'bbox')
        evaluation.params.maxDets = sorted({1, 10, max_dets})
        evaluation.evaluate()
    return ImageMatches(evaluation, places)


def _xywh(box: Sequence[float]) -> List[float]:
    x1, y1, x2, y2 = box
    return [x1, y1, x2 - x1, y2 - y1]


def summarise(matches: ImageMatches) -> Dict[str, float]:
    """COCO's twelve numbers in percent, NaN where there is nothing to find."""
    precision, recall = matches.accumulate()
    params = matches.evaluation.params
    iou = {round(float(t), 2): i for i, t in enumerate(params.iouThrs)}
    numbers = {n: i for i, n in enumerate(params.maxDets)}
    most = len(params.maxDets) - 1
    values = [precision[:, :, :, 0, most], precision[iou[0.5], :, :, 0, most], precision[iou[0.75], :, :, 0, most]]
    values += [precision[:, :, :, a, most] for a in (1, 2, 3)]
    values += [recall[:, :, 0, numbers.get(n, most)] for n in (1, 10)]
    values += [recall[:, :, a, most] for a in range(len(AREAS))]
    return dict(zip(METRICS, map(_mean, values)))


def _mean(values: np.ndarray) -> float:
    """Mean in percent of what is there; NaN if nothing is."""
    values = values[values > -1]
    return 100 * float(values.mean()) if len(values) else NONE
