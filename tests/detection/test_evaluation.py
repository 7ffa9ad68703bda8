"""pycocotools' numbers are those of the definition, in pixels of the file, whoever has which image."""
import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pst_timm.detection.boxes import BoxCollector
from pst_timm.detection.evaluation import METRICS, CocoEvaluator, detections_of, match, shown, summarise
from pst_timm.utils.errors import PSTError

from .oracle import coco_numbers
from .random_boxes import SIZE, random_outputs, random_truth


def evaluated(dataset, outputs, targets, **kwargs):
    evaluator = CocoEvaluator(dataset, **kwargs)
    for output, target in zip(outputs, targets):
        evaluator.update([output], [target])
    return evaluator


def expected(dataset, outputs):
    known = dataset.annotations
    images = []
    for i, output in enumerate(outputs):
        at = known.of(i)
        found = list(zip(output['boxes'].double().tolist(), output['scores'].tolist(), output['labels'].tolist()))
        objects = list(zip(known.boxes[at].tolist(), known.areas[at].tolist(), known.ignored[at].tolist(),
                           known.labels[at].tolist()))
        images.append((found, objects))
    return coco_numbers(images, len(known.class_names))


@pytest.mark.parametrize('seed', range(8))
def test_all_numbers_are_those_of_plain_loops(seed):
    rng = np.random.default_rng(seed)
    dataset = random_truth(rng, crowds=seed % 2 == 0)
    outputs, targets = random_outputs(rng, dataset, shift=0.05 + 0.03 * (seed % 3))
    evaluator = evaluated(dataset, outputs, targets)
    numbers, classes = expected(dataset, outputs)
    found = evaluator.compute()
    assert tuple(found) == METRICS
    for name in METRICS:
        assert found[name] == pytest.approx(numbers[name], abs=1e-6, nan_ok=True), name
    assert list(evaluator.class_ap()) == dataset.annotations.class_names
    assert list(evaluator.class_ap().values()) == pytest.approx(classes, abs=1e-6, nan_ok=True)
    assert 0 < found['ap'] < 100 and found['ap50'] > found['ap']


def test_the_best_boxes_of_an_image_count():
    rng = np.random.default_rng(3)
    dataset = random_truth(rng, images=4, classes=1)
    outputs, targets = random_outputs(rng, dataset, wrong=30)
    for most in (3, 10, 20):
        found = evaluated(dataset, outputs, targets, max_dets=most).compute()
        best = [output['scores'].argsort(descending=True)[:most] for output in outputs]
        numbers, _ = expected(dataset, [{k: v[b] for k, v in o.items()} for o, b in zip(outputs, best)])
        assert found == pytest.approx(numbers, abs=1e-6, nan_ok=True), most


def test_a_limit_is_for_the_boxes_of_all_classes_together():
    """torchvision's detectors have it so; pycocotools counts those of each class."""
    rng = np.random.default_rng(0)
    dataset = random_truth(rng, images=1, classes=2, crowds=False, most=9)
    box, label = dataset.annotations.boxes[0], dataset.annotations.labels[0]
    output = dict(boxes=torch.tensor(np.array([[0., 0, 1, 1]] * 5 + [box])).float(),
                  scores=torch.tensor([.9] * 5 + [.1]), labels=torch.tensor([int(1 - label)] * 5 + [int(label)]))
    target = [dict(image_id=3, orig_size=(SIZE, SIZE))]
    assert evaluated(dataset, [output], target, max_dets=6).compute()['ap'] > 0
    assert evaluated(dataset, [output], target, max_dets=5).compute()['ap'] == 0


def test_perfect_boxes_have_100_percent_and_none_have_0():
    dataset = random_truth(np.random.default_rng(1), crowds=False)
    known = dataset.annotations
    targets = [dict(image_id=i, orig_size=(SIZE, SIZE)) for i in known.image_ids]
    perfect = [dict(boxes=torch.tensor(known.boxes[known.of(i)]), labels=torch.tensor(known.labels[known.of(i)]),
                    scores=torch.ones(len(known.labels[known.of(i)]))) for i in range(len(known))]
    found = evaluated(dataset, perfect, targets).compute()
    assert [found[name] for name in ('ap', 'ap50', 'ap75', 'ar100')] == pytest.approx([100.] * 4)
    nothing = [{k: v[:0] for k, v in output.items()} for output in perfect]
    found = evaluated(dataset, nothing, targets).compute()
    assert {found[name] for name in ('ap', 'ap50', 'ap75', 'ar1', 'ar10', 'ar100')} == {0.}


def test_boxes_are_scaled_back_to_the_file():
    rng = np.random.default_rng(5)
    dataset = random_truth(rng)
    outputs, targets = random_outputs(rng, dataset)
    plain = evaluated(dataset, outputs, targets)
    scaled = [dict(o, boxes=o['boxes'] * torch.tensor([0.5, 1.5, 0.5, 1.5])) for o in outputs]
    resized = [dict(t, given_size=(300, 100)) for t in targets]
    again = evaluated(dataset, scaled, resized)
    assert again.compute() == pytest.approx(plain.compute(), abs=1e-3, nan_ok=True)
    for a, b in zip(plain.results(), again.results()):
        assert a['bbox'] == pytest.approx(b['bbox'], abs=2e-3)


def truth(boxes, size=(100, 100), classes=2):
    """Boxes of one image: (corners, label, crowd, difficult)."""
    collector = BoxCollector('here', None)
    collector.image(1, '0.png', *size)
    for corners, label, crowd, difficult in boxes:
        collector.box(corners, label, 'there', crowd=crowd, difficult=difficult)
    return type('Dataset', (), dict(annotations=collector.finish(['a', 'b'][:classes], range(1, 1 + classes))))


def ap_of(dataset, boxes, name='ap'):
    boxes, scores = zip(*boxes)
    output = dict(boxes=torch.tensor(boxes).float(), scores=torch.tensor(scores).float(),
                  labels=torch.zeros(len(boxes), dtype=torch.int64))
    evaluator = evaluated(dataset, [output], [dict(image_id=1, orig_size=(100, 100))])
    return evaluator.compute()[name]


@pytest.mark.parametrize('crowd', [True, False])
def test_crowds_and_difficult_objects_are_neither_asked_for_nor_held_against_a_detector(crowd):
    kind = (crowd, not crowd)
    dataset = truth([((0, 0, 20, 20), 0, False, False), ((50, 50, 90, 90), 0, *kind)])
    assert ap_of(dataset, [((0, 0, 20, 20), .5)]) == pytest.approx(100)
    assert ap_of(dataset, [((50, 50, 90, 90), .9), ((51, 51, 90, 90), .8), ((0, 0, 20, 20), .5)]) == pytest.approx(100)
    assert ap_of(dataset, [((0, 60, 20, 90), .9), ((0, 0, 20, 20), .5)]) == pytest.approx(50)


def test_sizes_and_classes_without_objects_have_no_number():
    dataset = truth([((0, 0, 20, 20), 0, False, False)])
    output = dict(boxes=torch.tensor([[0., 0, 20, 20]]), scores=torch.tensor([.5]), labels=torch.tensor([0]))
    evaluator = evaluated(dataset, [output], [dict(image_id=1, orig_size=(100, 100))])
    found = evaluator.compute()
    assert found['ap_small'] == pytest.approx(100) and math.isnan(found['ap_medium']) and math.isnan(found['ar_large'])
    classes = evaluator.class_ap()
    assert classes['a'] == pytest.approx(100) and math.isnan(classes['b'])
    assert shown(found['ap_medium']) == '-' == shown(None) and shown(found['ap_small']) == '100.0'
    assert shown(47.25, 2) == '47.25'


def test_nothing_is_printed(capfd):
    rng = np.random.default_rng(0)
    dataset = random_truth(rng)
    evaluator = evaluated(dataset, *random_outputs(rng, dataset))
    evaluator.compute(), evaluator.class_ap(), evaluator.results()
    assert capfd.readouterr() == ('', '')


def test_images_that_were_not_read_do_not_count():
    rng = np.random.default_rng(2)
    dataset = random_truth(rng, crowds=False)
    outputs, targets = random_outputs(rng, dataset)
    without = evaluated(dataset, outputs[:3], targets[:3]).compute()
    numbers, _ = expected(dataset, outputs[:3])
    assert without == pytest.approx(numbers, abs=1e-6, nan_ok=True)
    with pytest.raises(PSTError, match='not one image was read'):
        CocoEvaluator(dataset).compute()


def test_the_same_image_counts_once():
    rng = np.random.default_rng(2)
    dataset = random_truth(rng)
    outputs, targets = random_outputs(rng, dataset)
    once = evaluated(dataset, outputs, targets).compute()
    assert evaluated(dataset, outputs + outputs[:2], targets + targets[:2]).compute() == pytest.approx(
        once, nan_ok=True)


def test_processes_share_the_images(monkeypatch):
    rng = np.random.default_rng(4)
    dataset = random_truth(rng, images=7)
    outputs, targets = random_outputs(rng, dataset)
    ranks = [evaluated(dataset, outputs[r::2], targets[r::2]) for r in range(2)]
    parts = [dict(evaluator.found) for evaluator in ranks]
    monkeypatch.setattr(dist, 'get_world_size', lambda: 2)
    monkeypatch.setattr(dist, 'all_gather_object', lambda into, own: into.__setitem__(slice(None), parts))
    together = evaluated(dataset, outputs, targets)
    for evaluator in ranks:
        alone = evaluator.compute()
        assert evaluator.compute(distributed=True) == pytest.approx(together.compute(), nan_ok=True)
        assert alone != evaluator.compute()
        assert evaluator.results() == together.results()


def test_results_are_cocos_with_the_numbers_of_the_file():
    from pycocotools.coco import COCO

    rng = np.random.default_rng(6)
    dataset = random_truth(rng)
    outputs, targets = random_outputs(rng, dataset)
    evaluator = evaluated(dataset, outputs, targets)
    rows = json.loads(json.dumps(evaluator.results()))
    assert {row['category_id'] for row in rows} <= {2, 7, 12} and {row['image_id'] for row in rows} <= {
        *dataset.annotations.image_ids}
    assert len(rows) == sum(len(output['scores']) for output in outputs)
    coco = COCO()
    coco.dataset = dict(images=[dict(id=i) for i in dataset.annotations.image_ids], annotations=[], categories=[])
    coco.createIndex()
    assert len(coco.loadRes(rows).anns) == len(rows)
    # and they can be evaluated again
    again = summarise(match(dataset.annotations, detections_of(dataset.annotations, rows)))
    assert again == pytest.approx(evaluator.compute(), abs=0.05, nan_ok=True)


@pytest.mark.parametrize('row', [
    dict(image_id=999, category_id=2, bbox=[1, 2, 3, 4], score=.5),
    dict(image_id=3, category_id=1, bbox=[1, 2, 3, 4], score=.5),
    dict(image_id=3, category_id=2, bbox=[1, 2, 3], score=.5),
    dict(image_id=3, category_id=2, bbox=[1, 2, 3, 'x'], score=.5),
    dict(image_id=3, category_id=2, bbox=None, score=.5),
    dict(image_id=3, category_id=2, bbox=[1, 2, 3, 4]),
    {},
    dict(image_id=[], category_id=2, bbox=[1, 2, 3, 4], score=.5),
])
def test_results_of_other_images_are_refused(row):
    known = random_truth(np.random.default_rng(0)).annotations
    good = dict(image_id=3, category_id=2, bbox=[1, 2, 3, 4], score=.5)
    assert len(detections_of(known, [good])[0].scores) == 1
    with pytest.raises(PSTError, match='Entry 1 of the detections'):
        detections_of(known, [good, row])


@pytest.mark.parametrize('key, value', [('boxes', math.nan), ('boxes', math.inf), ('scores', math.nan)])
def test_boxes_that_are_no_numbers_are_an_error(key, value):
    rng = np.random.default_rng(0)
    dataset = random_truth(rng)
    outputs, targets = random_outputs(rng, dataset)
    i = next(i for i, output in enumerate(outputs) if len(output['scores']))
    outputs[i][key].view(-1)[0] = value
    with pytest.raises(PSTError, match='no finite numbers: its weights have diverged'):
        evaluated(dataset, outputs, targets)


def test_without_pycocotools_there_is_a_sentence(monkeypatch):
    for name in [name for name in sys.modules if name.startswith('pycocotools')] + ['pycocotools', 'pycocotools.coco']:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(PSTError, match=r"needs pycocotools \(.*\): pip install 'pst_timm\[detect\]'"):
        CocoEvaluator(random_truth(np.random.default_rng(0)))


def test_the_summary_is_cheap_and_counts():
    rng = np.random.default_rng(0)
    dataset = random_truth(rng)
    outputs, targets = random_outputs(rng, dataset)
    evaluator = CocoEvaluator(dataset)
    assert evaluator.summary() == dict(images=0, boxes=0)
    evaluator.update(outputs, targets)
    assert evaluator.summary() == dict(
        images=len(outputs), boxes=sum(len(o['scores']) for o in outputs) / len(outputs))
