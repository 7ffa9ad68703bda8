"""A detector as one ONNX file: pixels in, boxes out, with the suppression of overlapping boxes inside.

torchvision's detectors are lists of images in and as many boxes out as an image has, with choices on the way that
torch.export cannot follow. `DetectorGraph` does the same steps for one image of a fixed size: heads, anchors, box
transforms and suppression are still those of the detector.

An image is brought to the size of the file as `letterbox` does it, or, where only NumPy and Pillow are at hand:

    session = onnxruntime.InferenceSession('detector.onnx')
    info = json.loads(session.get_modelmeta().custom_metadata_map['pst_timm.json'])
    _, height, width = info['input_size']
    image = Image.open('photo.jpg').convert('RGB')
    scale = min(height / image.height, width / image.width)
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.BILINEAR)
    canvas = np.empty((height, width, 3), np.float32)
    canvas[:] = info['mean']
    canvas[:small.height, :small.width] = np.asarray(small, np.float32) / 255
    boxes, scores, labels = session.run(None, {'image': canvas.transpose(2, 0, 1)[None]})
    boxes *= np.float32([image.width / small.width, image.height / small.height] * 2)  # XYXY, in pixels of the photo
    boxes = boxes.clip(0, [image.width, image.height] * 2)
"""
import json
import logging
import os
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from timm.layers import to_2tuple
from torchvision.models.detection import FCOS
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou, clip_boxes_to_image, nms

from pst_timm.checkpoints import attention_settings
from pst_timm.data.images import open_image
from pst_timm.models import reparameterize
from pst_timm.utils.cost import check_image_memory
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import check_output, write_whole
from pst_timm.utils.onnx_file import onnx_bytes

from .models import Detector

__all__ = ['DetectorGraph', 'export_detector', 'letterbox']

_logger = logging.getLogger(__name__)

OUTPUTS = ('boxes', 'scores', 'labels')
THRESHOLD = 'score_thresh'  # name of the tensor in the file
LEAST_SIDE = 32
TOLERANCE = 1e-3  # of a score, and in pixels of a box in an image of 320; in proportion for larger ones
# what rounding may decide either way: which of two boxes is better, and whether they overlap too much
TIE = 1e-4
# images of noise for a check: the larger, the smoother
GRAINS = (1, 4, 16)

Boxes = Mapping[str, torch.Tensor]


class DetectorGraph(nn.Module):
    """A detector for one image of a fixed size, in steps that torch.export can follow.

    The candidates of a level are the highest scores of all, and those below the threshold leave afterwards; which is
    what torchvision's order gives as well, but with a number of candidates that is known before.
    """

    def __init__(self, detector: Detector, size: Tuple[int, int]):
        """
        Args:
            detector: The detector, in eval mode.
            size: Height and width of the image.
        """
        super().__init__()
        transform = detector.transform
        self.backbone = detector.backbone
        self.head = detector.head
        self.centred = isinstance(detector, FCOS)
        self.decode = detector.box_coder.decode if self.centred else detector.box_coder.decode_single
        self.nms_thresh = detector.nms_thresh
        self.most = detector.detections_per_img
        self.candidates = detector.topk_candidates
        self.size = size
        self.padding = [n for side in reversed(size) for n in (0, -side % transform.size_divisible)]
        self.register_buffer('mean', torch.tensor(transform.image_mean)[:, None, None])
        self.register_buffer('std', torch.tensor(transform.image_std)[:, None, None])
        self.register_buffer(THRESHOLD, torch.tensor(float(detector.score_thresh)))
        with torch.no_grad():
            x = F.pad(torch.zeros(1, 3, *size), self.padding)
            maps = list(self.backbone(x).values())
            anchors = detector.anchor_generator(ImageList(x, [size]), maps)[0]
        self.register_buffer('anchors', anchors)
        cells = [m.shape[2] * m.shape[3] for m in maps]
        self.counts = [n * len(anchors) // sum(cells) for n in cells]

    def forward(self, image: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """An image (1, 3, H, W) in [0, 1] to boxes (n, 4) in its pixels, scores (n,) and labels (n,), best first."""
        x = F.pad((image - self.mean) / self.std, self.padding)
        outputs = {k: v[0] for k, v in self.head(list(self.backbone(x).values())).items()}
        scores = outputs['cls_logits'].sigmoid()
        if self.centred:
            scores = (scores * outputs['bbox_ctrness'].sigmoid()).sqrt()

        start, candidates = 0, []
        for level in scores.split(self.counts):
            best, index = level.flatten().topk(min(self.candidates, level.numel()))
            place = start + torch.div(index, level.shape[1], rounding_mode='floor')
            candidates.append((best, place, index % level.shape[1]))
            start += len(level)
        scores, places, labels = (torch.cat(parts) for parts in zip(*candidates))
        boxes = self.decode(outputs['bbox_regression'][places], self.anchors[places])
        boxes = clip_boxes_to_image(boxes, self.size)

        good = scores > self.score_thresh
        # classes are moved apart, as torchvision's batched_nms does it
        step = torch.where(good[:, None], boxes, 0.).max() + 1.
        index = torch.nonzero(good)[:, 0]
        boxes, scores, labels = boxes[index], scores[index], labels[index]
        kept = nms(boxes + (labels * step)[:, None], scores, self.nms_thresh)[:self.most]
        return boxes[kept], scores[kept], labels[kept]


def export_detector(
        detector: Detector,
        path: os.PathLike,
        img_size: Union[int, Tuple[int, int], None] = None,
        reparam: bool = True,
        check: bool = False,
        images: Sequence[os.PathLike] = (),
        overwrite: bool = False,
) -> List[Dict[str, Any]]:
    """Write a detector as ONNX, with its preprocessing constants, thresholds and class names as metadata.

    The file has the input `image`, float32 (1, 3, H, W) in [0, 1] of a fixed size and not normalised, and the outputs
    `boxes` (n, 4) XYXY in pixels of it, `scores` (n,) and `labels` (n,), the best first; n is different for each image
    and may be 0. The image is normalised and padded to a multiple of the largest stride in the file.

    For images all of one shape, give `img_size` as the height and width that their longer side leads to, and the boxes
    are those of the detector itself. On a square every image fits, see `letterbox`; the padding is then wider than that
    of the detector for the same image, and the boxes are those for the padded one.

    Args:
        detector: From `create_detector` or `open_detector`; `set_topk` decides its attention before the call.
        path: File to write.
        img_size: Height and width of the images, or one number for both; None for the detector's `img_size`, a square.
        reparam: Fold batch norms into convolutions.
        check: Run what is to be written in ONNX Runtime beside the detector, and write it if they agree.
        images: Photographs to check with, noise if none are given.
        overwrite: Whether a file that is there may be replaced.

    Returns:
        A row for each image and threshold that was checked: the number of boxes, and the largest differences of boxes
        in pixels and of scores.

    Raises:
        PSTError: If the file cannot be written, or must not be, or does not agree with the detector; what was there
            before is untouched.
    """
    check_output(path, overwrite, images)
    size = to_2tuple(img_size or detector.img_size)
    if len(size) != 2 or min(size) < LEAST_SIDE:
        raise PSTError(f'The image size is {"x".join(map(str, size))}; expected a height and a width of at least '
                       f'{LEAST_SIDE} pixels.')
    check_image_memory(max(size))
    reference = _at_size(detector, size)
    graph = DetectorGraph(_folded(reference) if reparam else deepcopy(reference), size).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', '.*create_unbacked_symint', FutureWarning)  # torchvision's own nms
        data = onnx_bytes(graph, torch.rand(1, 3, *size), json.dumps(_metadata(detector, size)), OUTPUTS)
    rows = _check(reference, data, size, images) if check else []
    # the native writers abort the process, or leave half a file, where the disk is full
    write_whole(path, lambda name: Path(name).write_bytes(data))
    return rows


def letterbox(image: Image.Image, size: Tuple[int, int], mean: Sequence[float]) -> Tuple[np.ndarray, Tuple[int, int]]:
    """Bring an image to a size as a whole: resized, and padded at the right and below.

    Args:
        image: The image, RGB.
        size: Height and width.
        mean: Mean of the pixels in [0, 1], with which it is padded: 0 for the detector.

    Returns:
        The image (1, 3, H, W), float32 in [0, 1], and the height and width that it takes up in it: a box is brought
        back to the image by its own size over this one.
    """
    height, width = size
    scale = min(height / image.height, width / image.width)
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.BILINEAR)
    canvas = np.empty((height, width, 3), np.float32)
    canvas[:] = mean
    canvas[:small.height, :small.width] = np.asarray(small, np.float32) / 255
    return np.ascontiguousarray(canvas.transpose(2, 0, 1)[None]), (small.height, small.width)


def _at_size(detector: Detector, size: Tuple[int, int]) -> Detector:
    """A copy on the CPU that takes images of a size as they are."""
    detector = deepcopy(detector).cpu().float().eval()
    detector.set_grad_checkpointing(False)
    detector.transform.min_size, detector.transform.max_size = (max(size),), max(size)
    return detector


def _folded(detector: Detector) -> Detector:
    """A copy with batch norms folded into convolutions, as far as its trunk can be traced."""
    detector = deepcopy(detector)
    try:
        detector.backbone = reparameterize(detector.backbone)
    except ValueError as e:
        _logger.warning(f'Exported without folding: {e}')
    return detector


def _metadata(detector: Detector, size: Tuple[int, int]) -> Dict[str, Any]:
    """What whoever runs the exported detector needs to know."""
    transform = detector.transform
    names = detector.class_names or [str(i) for i in range(detector.num_classes)]
    return {
        'detector': detector.arguments['kind'],
        'architecture': detector.arguments['trunk'],
        'neck': detector.arguments['neck'],
        'num_classes': detector.num_classes,
        'class_names': names,
        'input_size': [3, *size],
        'mean': list(transform.image_mean),
        'std': list(transform.image_std),
        'interpolation': 'bilinear',
        **{k: getattr(detector, k) for k in ('score_thresh', 'nms_thresh', 'detections_per_img', 'topk_candidates')},
        **attention_settings(detector),
    }


# the check

def _check(
        reference: Detector,
        data: bytes,
        size: Tuple[int, int],
        images: Sequence[os.PathLike],
) -> List[Dict[str, Any]]:
    """Run a file beside its detector, at its threshold and at 0, where even noise has boxes.

    Raises:
        PSTError: If they do not agree.
    """
    reference, everything = deepcopy(reference), deepcopy(reference)
    # without suppression, and with what is just beyond the other limits
    everything.nms_thresh, everything.detections_per_img = 1., 10 ** 9
    everything.topk_candidates = 2 * reference.topk_candidates
    given = _inputs(images, size, reference.transform.image_mean)
    tolerance = TOLERANCE * max(1., max(size) / 320)
    rows = []
    for threshold in dict.fromkeys((reference.score_thresh, 0.)):
        run = _runner(data, threshold)
        reference.score_thresh, everything.score_thresh = threshold, threshold - TIE
        for name, x in given.items():
            with torch.inference_mode():
                expected, candidates = reference([x[0]])[0], everything([x[0]])[0]
            got = run(x)
            pixels, score = _differences(got, expected, candidates, reference)
            rows.append({
                'image': name, THRESHOLD: threshold, 'boxes': len(got['boxes']), 'pixels': pixels, 'score': score})
            # a NaN is no agreement either
            if not (pixels <= tolerance and score <= TOLERANCE):
                raise PSTError(
                    f'The exported detector does not give the boxes of the detector: on {name}, at a threshold of '
                    f'{threshold:g}, they differ by {pixels:.2g} pixels and by {score:.2g} in their scores (allowed '
                    f'are {tolerance:.1g} and {TOLERANCE:g}). Nothing was written. Export without folding '
                    f'(--no-reparam) to see whether that is what it comes from.')
    return rows


def _inputs(
        images: Sequence[os.PathLike],
        size: Tuple[int, int],
        mean: Sequence[float],
) -> Dict[str, torch.Tensor]:
    """Images (1, 3, H, W) to check with, by name: photographs, or noise of several grains."""
    if images:
        return {str(path): torch.from_numpy(letterbox(open_image(path), size, mean)[0]) for path in images}
    generator = torch.Generator().manual_seed(0)
    found = {}
    for grain in GRAINS:
        noise = torch.rand(1, 3, *(-(-side // grain) for side in size), generator=generator)
        found[f'noise of {grain} px'] = F.interpolate(noise, size=size, mode='nearest')
    return found


def _runner(data: bytes, threshold: float) -> Callable[[torch.Tensor], Dict[str, torch.Tensor]]:
    """What runs the content of a file in ONNX Runtime, with another threshold for the scores than it has."""
    try:
        import onnx
        import onnxruntime
    except ImportError as e:
        raise PSTError(f"The exported detector cannot be checked ({e}): pip install 'pst_timm[export]'.") from None

    model = onnx.load_model_from_string(data)
    for tensor in model.graph.initializer:
        if tensor.name == THRESHOLD:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(threshold, np.float32), THRESHOLD))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])

    def run(x: torch.Tensor) -> Dict[str, torch.Tensor]:
        return {k: torch.from_numpy(v) for k, v in zip(OUTPUTS, session.run(list(OUTPUTS), {'image': x.numpy()}))}

    return run


def _differences(got: Boxes, expected: Boxes, candidates: Boxes, detector: Detector) -> Tuple[float, float]:
    """Largest difference of boxes in pixels and of scores, infinite where there is nothing to compare with.

    Every box has to be among the candidates of the detector. Which of them are left is compared as a set, without those
    that rounding may decide either way.

    Args:
        got: Boxes of the exported detector.
        expected: Boxes of the detector.
        candidates: Its boxes before overlapping ones are suppressed.
        detector: The detector.
    """
    found = [_nearest(got, candidates), _missing(got, expected, detector), _missing(expected, got, detector)]
    # max would pass over a NaN
    return tuple(torch.cat([torch.zeros(1), *parts]).max().item() for parts in zip(*found))


def _nearest(some: Boxes, others: Boxes) -> Tuple[torch.Tensor, torch.Tensor]:
    """How far each box is from the nearest of its label: in pixels (n,), and in its score (n,)."""
    count = len(some['boxes'])
    if not count or not len(others['boxes']):
        return (torch.full((count,), torch.inf),) * 2
    same = some['labels'][:, None] == others['labels']
    pixels = (some['boxes'][:, None] - others['boxes']).abs().amax(2)
    scores = (some['scores'][:, None] - others['scores']).abs()
    # boxes without area do not suppress each other, so that a place alone may not tell them apart
    nearest = torch.where(same, pixels + scores, torch.inf).argmin(1, keepdim=True)
    return tuple(torch.where(same.any(1), x.gather(1, nearest)[:, 0], torch.inf) for x in (pixels, scores))


def _missing(some: Boxes, others: Boxes, detector: Detector) -> Tuple[torch.Tensor, torch.Tensor]:
    """As `_nearest`, of the boxes that the others lack and that rounding cannot have left out."""
    pixels, scores = _nearest(some, others)
    full = len(others['boxes']) == detector.detections_per_img
    cutoff = others['scores'].min().item() if full and len(others['boxes']) else detector.score_thresh
    # suppressed by one as good, or by a better one that overlaps as much as is just allowed
    overlap = box_iou(some['boxes'], others['boxes'])
    tied = (some['scores'][:, None] - others['scores']).abs() <= TIE
    better = others['scores'] >= some['scores'][:, None] - TIE
    rival = tied & (overlap >= detector.nms_thresh - TIE) | better & ((overlap - detector.nms_thresh).abs() <= TIE)
    rival &= some['labels'][:, None] == others['labels']
    told = ((pixels > TOLERANCE) | (scores > TOLERANCE)) & (some['scores'] > cutoff + TIE) & ~rival.any(1)
    return pixels[told], scores[told]
