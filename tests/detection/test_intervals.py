"""Intervals over images: each draw is pycocotools' own number, and the ends hold what they say."""
import copy
import math

import numpy as np
import pytest
import torch

from pst_timm.detection.boxes import BoxCollector
from pst_timm.detection.evaluation import CocoEvaluator, ImageMatches
from pst_timm.detection.intervals import ap_differences, ap_intervals, by_class, weighted_ap
from pst_timm.utils.errors import PSTError

from .random_boxes import SIZE, random_outputs, random_truth


def evaluated(dataset, outputs, targets):
    evaluator = CocoEvaluator(dataset)
    evaluator.update(outputs, targets)
    return evaluator


def detector(rng, dataset, **kwargs):
    return evaluated(dataset, *random_outputs(rng, dataset, **kwargs))


def weighted(matches, weights):
    return weighted_ap(by_class(matches), np.asarray(weights, float), matches.evaluation.params.recThrs)


def repeated(dataset, outputs, counts):
    """The evaluation of a dataset in which each image stands as often as it counts."""
    known, collector = dataset.annotations, BoxCollector('repeated', None)
    again, targets = [], []
    for i, count in enumerate(counts):
        for _ in range(count):
            collector.image(len(again) + 1, f'{len(again)}.png', SIZE, SIZE)
            at = known.of(i)
            for box, label, area, crowd in zip(known.boxes[at], known.labels[at], known.areas[at], known.crowd[at]):
                collector.box(box.tolist(), int(label), 'here', float(area), bool(crowd))
            again.append(outputs[i])
            targets.append(dict(image_id=len(again), orig_size=(SIZE, SIZE)))
    truth = type('Dataset', (), dict(annotations=collector.finish(known.class_names, known.category_ids)))
    return evaluated(truth, again, targets).compute()


@pytest.mark.parametrize('seed', range(6))
def test_a_draw_has_the_numbers_of_a_dataset_with_so_many_copies(seed):
    rng = np.random.default_rng(seed)
    dataset = random_truth(rng, images=7)
    outputs, targets = random_outputs(rng, dataset)
    matches = evaluated(dataset, outputs, targets).matches()
    for counts in ([1] * 7, [2] * 7, [0, 3, 1, 0, 1, 1, 1], rng.multinomial(7, [1 / 7] * 7)):
        expected = repeated(dataset, outputs, counts)
        found = weighted(matches, counts)
        assert found.mean() == pytest.approx(expected['ap'], abs=1e-6)
        assert found[0] == pytest.approx(expected['ap50'], abs=1e-6)


def test_the_number_itself_is_pycocotools():
    rng = np.random.default_rng(1)
    dataset = random_truth(rng, images=20)
    evaluator = detector(rng, dataset)
    found, plain = ap_intervals([evaluator.matches()], draws=200), evaluator.compute()
    for name in ('ap', 'ap50'):
        assert found[name].value == pytest.approx(plain[name], abs=1e-9)
        low, high = found[name].images
        assert low < found[name].value < high and 2 < high - low < 60


def test_the_same_seed_draws_the_same():
    rng = np.random.default_rng(1)
    dataset = random_truth(rng, images=20)
    matches = [detector(rng, dataset).matches()]
    assert ap_intervals(matches, 50, seed=3) == ap_intervals(matches, 50, seed=3)
    assert ap_intervals(matches, 50, seed=3) != ap_intervals(matches, 50, seed=4)


def test_more_images_bring_shorter_intervals():
    lengths = []
    for images in (15, 240):
        rng = np.random.default_rng(0)
        dataset = random_truth(rng, images=images, classes=1)
        low, high = ap_intervals([detector(rng, dataset).matches()], 200)['ap'].images
        lengths.append(high - low)
    # a sixteenth of the variance
    assert 0.15 < lengths[1] / lengths[0] < 0.45


def test_differences_are_paired_by_image():
    rng = np.random.default_rng(2)
    dataset = random_truth(rng, images=60, classes=2)
    outputs, targets = random_outputs(rng, dataset, shift=0.08, misses=0.1)
    worse = [dict(o, boxes=o['boxes'] + 0.05 * (o['boxes'][:, 2:] - o['boxes'][:, :2]).repeat(1, 2)) for o in outputs]
    a, b = (evaluated(dataset, o, targets) for o in (outputs, worse))
    found = ap_differences([a.matches()], [b.matches()], 300)['ap']
    assert found.value == pytest.approx(a.compute()['ap'] - b.compute()['ap'], abs=1e-9)
    assert found.images.low < found.value < found.images.high
    alone = ap_intervals([a.matches()], 300)['ap'].images
    assert found.images.high - found.images.low < 0.8 * (alone.high - alone.low)
    assert found.images.excludes_zero
    same = ap_differences([a.matches()], [a.matches()], 50)['ap']
    assert same == (0, (0, 0))
    turned = ap_differences([b.matches()], [a.matches()], 300)['ap']
    assert turned.value == pytest.approx(-found.value)
    assert tuple(turned.images) == pytest.approx((-found.images.high, -found.images.low))


def test_runs_are_averaged():
    rng = np.random.default_rng(3)
    dataset = random_truth(rng, images=25)
    runs = [detector(rng, dataset, shift=shift) for shift in (0.05, 0.15)]
    found = ap_intervals([run.matches() for run in runs], 100)
    assert found['ap'].value == pytest.approx(np.mean([run.compute()['ap'] for run in runs]), abs=1e-9)
    one = ap_differences([run.matches() for run in runs], [runs[0].matches()], 20)
    assert one['ap'].value == pytest.approx((runs[1].compute()['ap'] - runs[0].compute()['ap']) / 2, abs=1e-9)


def split(matches, chosen, draws, seed):
    """What `ap_intervals` says of some of the images."""
    evaluation = copy.copy(matches.evaluation)
    evaluation.params = copy.copy(evaluation.params)
    count = len(evaluation.params.imgIds)
    evaluation.params.imgIds = [evaluation.params.imgIds[i] for i in chosen]
    evaluation.evalImgs = [
        evaluation.evalImgs[start + i] for start in range(0, len(evaluation.evalImgs), count) for i in chosen]
    return ap_intervals([ImageMatches(evaluation, chosen)], draws, seed)


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    """Of splits drawn from the same images, the number of all of them lies in nearly all intervals."""
    rng = np.random.default_rng(7)
    dataset = random_truth(rng, images=800, classes=3, crowds=False, most=12)
    matches = detector(rng, dataset).matches()
    whole = ap_intervals([matches], 1)
    inside = {'ap': 0, 'ap50': 0}
    for seed in range(40):
        found = split(matches, sorted(rng.choice(800, 50, replace=False).tolist()), 60, seed)
        for name in inside:
            low, high = found[name].images
            inside[name] += low <= whole[name].value <= high
    assert min(inside.values()) >= 33, inside


def test_no_interval_reaches_beyond_what_there_can_be():
    dataset = random_truth(np.random.default_rng(5), images=12, classes=1, crowds=False, most=4)
    known = dataset.annotations
    outputs = [dict(boxes=torch.tensor(known.boxes[known.of(i)]), labels=torch.tensor(known.labels[known.of(i)]),
                    scores=torch.ones(len(known.labels[known.of(i)]))) for i in range(12)]
    last = max(i for i in range(12) if len(outputs[i]['scores']))
    outputs[last] = {k: v[:0] for k, v in outputs[last].items()}
    targets = [dict(image_id=i, orig_size=(SIZE, SIZE)) for i in known.image_ids]
    found = ap_intervals([evaluated(dataset, outputs, targets).matches()], 200)['ap']
    assert 0 <= found.images.low < found.value < found.images.high <= 100


def test_classes_without_objects_do_not_count():
    rng = np.random.default_rng(0)
    dataset = random_truth(rng, images=6, classes=2, crowds=False)
    outputs, targets = random_outputs(rng, dataset)
    dataset.annotations.labels[:] = 0
    matches = evaluated(dataset, outputs, targets).matches()
    assert weighted(matches, [1] * 6).mean() == pytest.approx(evaluated(dataset, outputs, targets).compute()['ap'])
    assert np.isnan(weighted(matches, [0] * 6)).all()


def test_draws_without_an_object_are_left_out():
    dataset = random_truth(np.random.default_rng(5), images=3, classes=1, crowds=False, most=3)
    known = dataset.annotations
    outputs = [dict(boxes=torch.tensor(known.boxes[known.of(i)]), labels=torch.tensor(known.labels[known.of(i)]),
                    scores=torch.ones(len(known.labels[known.of(i)]))) for i in range(3)]
    targets = [dict(image_id=i, orig_size=(SIZE, SIZE)) for i in known.image_ids]
    found = ap_intervals([evaluated(dataset, outputs, targets).matches()], 100)['ap']
    assert found.value == pytest.approx(100) and not math.isnan(found.images.low)


def test_detectors_are_compared_on_the_same_images():
    rng = np.random.default_rng(0)
    dataset = random_truth(rng)
    outputs, targets = random_outputs(rng, dataset)
    all_of_them, some = evaluated(dataset, outputs, targets), evaluated(dataset, outputs[1:], targets[1:])
    with pytest.raises(PSTError, match='different images: evaluate all detectors on the same split'):
        ap_differences([all_of_them.matches()], [some.matches()])
    with pytest.raises(PSTError, match='no detections to compare'):
        ap_intervals([])
