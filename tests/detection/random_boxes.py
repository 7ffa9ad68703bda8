"""Random ground truth, and random detections that find some of it."""
from types import SimpleNamespace

import numpy as np
import torch

from pst_timm.detection.boxes import BoxCollector

SIZE = 200


def random_truth(rng, images=6, classes=3, crowds=True, most=6):
    """Annotations, in a dataset that has nothing else."""
    collector = BoxCollector('random', None)
    for i in range(images):
        collector.image(10 * i + 3, f'{i}.png', SIZE, SIZE)
        for _ in range(rng.integers(0, most)):
            x, y = rng.uniform(0, SIZE - 10, 2)
            w, h = rng.uniform(4, 10 ** rng.uniform(1, 2.2), 2)
            box = [x, y, min(x + w, SIZE), min(y + h, SIZE)]
            collector.box(box, int(rng.integers(classes)), 'here', crowd=crowds and rng.random() < 0.15,
                          area=float((box[2] - box[0]) * (box[3] - box[1]) * rng.uniform(0.6, 1)))
    return SimpleNamespace(annotations=collector.finish(
        [f'class {k}' for k in range(classes)], [5 * k + 2 for k in range(classes)]))


def random_outputs(rng, dataset, shift=0.12, misses=0.3, wrong=2, ties=False):
    """Outputs of a detector that is right now and then, and targets, image by image."""
    known = dataset.annotations
    outputs, targets = [], []
    for i in range(len(known)):
        boxes, labels = [], []
        for box, label in zip(known.boxes[known.of(i)], known.labels[known.of(i)]):
            for _ in range(rng.integers(1, 4)):
                if rng.random() > misses:
                    side = np.tile(box[2:] - box[:2], 2)
                    boxes.append(np.sort((box + side * rng.normal(0, shift, 4)).reshape(2, 2), axis=0).reshape(-1))
                    labels.append(label if rng.random() > 0.1 else rng.integers(len(known.class_names)))
        for _ in range(rng.integers(0, wrong + 1)):
            boxes.append(np.sort(rng.uniform(0, SIZE, (2, 2)), axis=0).reshape(-1))
            labels.append(rng.integers(len(known.class_names)))
        scores = rng.uniform(0.05, 1, len(boxes))
        outputs.append(dict(
            boxes=torch.tensor(np.array(boxes).reshape(-1, 4), dtype=torch.float32),
            scores=torch.tensor(scores.round(1) if ties else scores, dtype=torch.float32),
            labels=torch.tensor(np.array(labels, int), dtype=torch.int64)))
        targets.append(dict(image_id=known.image_ids[i], orig_size=(SIZE, SIZE)))
    return outputs, targets
