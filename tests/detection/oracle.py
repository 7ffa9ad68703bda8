"""COCO's average precision and recall as plain loops, written from its definition."""
import math

import numpy as np

THRESHOLDS = [0.5 + 0.05 * i for i in range(10)]
RECALLS = np.linspace(0, 1, 101).tolist()  # whose 0.7 is a little more than 7 / 10, as COCO has it
RANGES = {'all': (0, 1e10), 'small': (0, 1024), 'medium': (1024, 9216), 'large': (9216, 1e10)}


def iou(box, truth, crowd):
    width = min(box[2], truth[2]) - max(box[0], truth[0])
    height = min(box[3], truth[3]) - max(box[1], truth[1])
    if width <= 0 or height <= 0:
        return 0.
    own = (box[2] - box[0]) * (box[3] - box[1])
    both = own if crowd else own + (truth[2] - truth[0]) * (truth[3] - truth[1]) - width * height
    return width * height / both


def matched(found, objects, threshold, low, high, most):
    """(score, hit) of the boxes of an image that count, and how many objects there are to find.

    found: (box, score); objects: (box, area, crowd).
    """
    free = [not (crowd or not low <= area <= high) for _, area, crowd in objects]
    taken = [False] * len(objects)
    rows = []
    for box, score in sorted(found, key=lambda f: -f[1])[:most]:
        best, choice = threshold, None
        for wanted in (True, False):  # objects to find come before those that do not count
            if choice is not None:
                break
            for j, (truth, _, crowd) in enumerate(objects):
                if free[j] is not wanted or (taken[j] and not crowd):
                    continue
                overlap = iou(box, truth, crowd)
                if overlap >= best:
                    best, choice = overlap, j
        if choice is not None:
            taken[choice] = True
            if free[choice]:
                rows.append((score, True))
        elif low <= (box[2] - box[0]) * (box[3] - box[1]) <= high:
            rows.append((score, False))
    return rows, sum(free)


def curve(images, threshold, low, high, most):
    """Average precision and recall of a class, None where there is nothing to find."""
    rows, count = [], 0
    for found, objects in images:
        more, free = matched(found, objects, threshold, low, high, most)
        rows += more
        count += free
    if not count:
        return None
    rows.sort(key=lambda row: -row[0])
    points, hits = [], 0
    for n, (_, hit) in enumerate(rows):
        hits += hit
        points.append((hits / count, hits / (n + 1)))
    precision = sum(max((p for r, p in points if r >= least), default=0.) for least in RECALLS) / 101
    return precision, hits / count


def mean(values):
    values = [v for v in values if v is not None]
    return 100 * sum(values) / len(values) if values else math.nan


def coco_numbers(images, classes, most=100):
    """The twelve numbers in percent, and the AP of each class.

    images: of each image a pair: found boxes (box, score, label) and objects (box, area, crowd, label).
    """
    def of(k):
        return [([f[:2] for f in found if f[2] == k], [o[:3] for o in objects if o[3] == k])
                for found, objects in images]

    def curves(name, thresholds=THRESHOLDS, most=most, classes=range(classes)):
        return [curve(of(k), t, *RANGES[name], most) for k in classes for t in thresholds]

    def part(i, values):
        return mean([v and v[i] for v in values])

    numbers = dict(
        ap=part(0, curves('all')), ap50=part(0, curves('all', THRESHOLDS[:1])),
        ap75=part(0, curves('all', THRESHOLDS[5:6])),
        **{f'ap_{name}': part(0, curves(name)) for name in ('small', 'medium', 'large')},
        ar1=part(1, curves('all', most=1)), ar10=part(1, curves('all', most=10)), ar100=part(1, curves('all')),
        **{f'ar_{name}': part(1, curves(name)) for name in ('small', 'medium', 'large')})
    return numbers, [part(0, curves('all', classes=[k])) for k in range(classes)]
