"""Exported detectors give torchvision's boxes, and say what they are; what does not agree is not written."""
import json
import sys

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from pst_timm.checkpoints.reading import FACTS_KEY
from pst_timm.commands.detect import main
from pst_timm.detection import export
from pst_timm.detection.checkpoint import describe
from pst_timm.detection.export import DetectorGraph, export_detector, letterbox
from pst_timm.utils.errors import PSTError
from pst_timm.utils.onnx_file import METADATA
from tests.detection.tiny import small
from tests.helpers import randomize

onnxruntime = pytest.importorskip('onnxruntime')

SIZE = (48, 80)  # neither square nor a multiple of 32
TWO_LEVELS = dict(levels=(16, 32), extra_levels=0)  # a graph that is exported sooner
KINDS = [
    ('fcos', 'pst', dict(topk=0)), ('fcos', 'pst', dict(topk=8)), ('fcos', 'pst', dict(topk=8, fine_fusion='joint')),
    ('fcos', 'fpn', {}), ('fcos', 'pan', {}), ('retinanet', 'pst', dict(topk=8)), ('retinanet', 'fpn', {}),
    ('retinanet_v2', 'pst', dict(topk=8, fine_fusion='joint', neck_width=64)),
]


def detector(kind='fcos', neck='pst', size=SIZE, **values):
    """A detector with scores far apart, and many boxes that overlap; it takes images as they are."""
    torch.manual_seed(0)
    model = randomize(small(kind, neck, **{'num_classes': 3, 'img_size': max(size), **values})).eval()
    if kind == 'fcos':
        torch.nn.init.constant_(model.head.regression_head.bbox_reg.bias, 2.5)
    return model


def picture(seed, size=SIZE):
    """Rectangles on noise (1, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(1, 3, *size, generator=generator) * 0.3
    for _ in range(4):
        y, x, h, w = (int(torch.randint(4, 30, (), generator=generator)) for _ in range(4))
        image[:, :, y:y + h, x:x + w] = torch.rand(1, 3, 1, 1, generator=generator)
    return image


def session_of(path):
    return onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])


def run(path, image):
    boxes, scores, labels = session_of(path).run(None, {'image': image.numpy()})
    return dict(boxes=torch.from_numpy(boxes), scores=torch.from_numpy(scores), labels=torch.from_numpy(labels))


@torch.no_grad()
def assert_same(got, expected):
    """The same boxes in the same order, but for those whose scores are equal as far as rounding goes."""
    assert {k: (v.shape, v.dtype) for k, v in got.items()} == {k: (v.shape, v.dtype) for k, v in expected.items()}
    assert torch.allclose(got['scores'], expected['scores'], atol=1e-5)
    for label in expected['labels'].unique():
        a, b = (v['boxes'][v['labels'] == label] for v in (got, expected))
        assert len(a) == len(b)
        assert torch.cdist(a, b, p=torch.inf).amin(0).max() < 1e-3
        assert torch.cdist(b, a, p=torch.inf).amin(0).max() < 1e-3


@pytest.mark.parametrize('kind, neck, values', KINDS)
def test_the_graph_gives_what_torchvision_gives(kind, neck, values):
    model = detector(kind, neck, **values)
    graph = DetectorGraph(model, SIZE).eval()
    counts = set()
    for seed, threshold in enumerate((0.05, 0.6, 0.95, 0.999)):
        model.score_thresh = threshold
        graph.score_thresh.fill_(threshold)
        with torch.no_grad():
            expected, got = model([picture(seed)[0]])[0], graph(picture(seed))
        assert_same(dict(zip(export.OUTPUTS, got)), expected)
        counts.add(len(got[0]))
    assert len(counts) > 1 and max(counts) > 20


@pytest.mark.parametrize('values', [
    dict(nms_thresh=0.2), dict(detections_per_img=7), dict(topk_candidates=11), dict(mean=[0.1, 0.2, 0.3]),
    dict(std=[0.5, 0.1, 0.2]), dict(nms_thresh=0.95, detections_per_img=10 ** 4, topk_candidates=10 ** 5),
], ids=lambda values: next(iter(values)))
def test_every_setting_of_the_detector_counts(values):
    model, plain = detector(**values), detector()
    with torch.no_grad():
        expected = model([picture(0)[0]])[0]
        assert_same(dict(zip(export.OUTPUTS, DetectorGraph(model, SIZE)(picture(0)))), expected)
        other = plain([picture(0)[0]])[0]
    assert expected['boxes'].shape != other['boxes'].shape or not torch.equal(expected['boxes'], other['boxes'])


@pytest.mark.parametrize('kind, neck, values', [
    ('fcos', 'pst', dict(topk=3)), pytest.param('retinanet', 'pst', {}, marks=pytest.mark.slow),
    pytest.param('retinanet', 'fpn', {}, marks=pytest.mark.slow)])
def test_the_file_gives_what_torchvision_gives(kind, neck, values, tmp_path):
    model = detector(kind, neck, **TWO_LEVELS, **values)
    path = tmp_path / 'model.onnx'
    rows = export_detector(model, path, SIZE, check=True)
    assert {row['score_thresh'] for row in rows} == {0.05, 0.} and max(row['boxes'] for row in rows) > 10
    with torch.no_grad():
        for seed in range(4):
            assert_same(run(path, picture(seed)), model([picture(seed)[0]])[0])
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert 'NonMaxSuppression' in operators and 'BatchNormalization' not in operators


@pytest.mark.slow
def test_an_image_without_boxes_and_what_the_file_tells(tmp_path):
    model = detector('fcos', 'fpn', **TWO_LEVELS, score_thresh=0.999, class_names=['a', 'b', 'c'])
    path = tmp_path / 'model.onnx'
    export_detector(model, path)
    with torch.no_grad():
        expected = model([torch.zeros(3, 80, 80)])[0]
    got = run(path, torch.zeros(1, 3, 80, 80))
    assert len(expected['boxes']) == 0 and got['boxes'].shape == (0, 4)
    assert_same(got, expected)
    info = json.loads(session_of(path).get_modelmeta().custom_metadata_map[METADATA])
    assert info == {
        'detector': 'fcos', 'architecture': 'test_resnet', 'neck': 'fpn', 'num_classes': 3,
        'class_names': ['a', 'b', 'c'], 'input_size': [3, 80, 80], 'mean': list(model.transform.image_mean),
        'std': list(model.transform.image_std), 'interpolation': 'bilinear', 'score_thresh': 0.999, 'nms_thresh': 0.6,
        'detections_per_img': 100, 'topk_candidates': 1000, 'topk': 0, 'fine_fusion': None}


def as_file(monkeypatch, change):
    """Let the export write another graph than it should, without the time that ONNX takes."""
    class Session:
        def __init__(self, graph):
            self.graph = graph

        def __call__(self, x):
            with torch.no_grad():
                return change(dict(zip(export.OUTPUTS, self.graph(x))))

    graphs = []
    monkeypatch.setattr(export, 'onnx_bytes', lambda graph, *args: graphs.append(graph) or b'onnx')

    def runner(data, threshold):
        graphs[-1].score_thresh.fill_(threshold)
        return Session(graphs[-1])

    monkeypatch.setattr(export, '_runner', runner)


@pytest.mark.parametrize('change, said', [
    (lambda out: {**out, 'boxes': out['boxes'] + 0.01}, '0.01 pixels'),
    (lambda out: {**out, 'scores': out['scores'] - 0.01}, '0.01 in their scores'),
    (lambda out: {**out, 'labels': (out['labels'] + 1) % 3}, 'they differ'),
    (lambda out: {k: v[1:] for k, v in out.items()}, 'they differ'),
    (lambda out: {k: torch.cat([v, v[:1] + 5]) for k, v in out.items()}, 'they differ'),
    (lambda out: {**out, 'boxes': out['boxes'] * torch.nan}, 'differ by nan'),
    (lambda out: {k: v[:0] for k, v in out.items()}, 'they differ by inf'),
], ids=['boxes', 'scores', 'labels', 'missing', 'more', 'nan', 'none'])
def test_what_does_not_agree_is_not_written(change, said, tmp_path, monkeypatch):
    as_file(monkeypatch, change)
    with pytest.raises(PSTError, match=f'does not give the boxes of the detector.*{said}'):
        export_detector(detector(), tmp_path / 'model.onnx', SIZE, check=True)
    assert not list(tmp_path.iterdir())


def test_an_order_that_rounding_decides_is_no_difference(tmp_path, monkeypatch):
    def change(out):
        order = torch.randperm(len(out['scores']), generator=torch.Generator().manual_seed(0))
        return {k: v[order] for k, v in out.items()}

    as_file(monkeypatch, change)
    rows = export_detector(detector(), tmp_path / 'model.onnx', SIZE, check=True)
    assert max(row['pixels'] for row in rows) < 1e-3


@pytest.mark.parametrize('got, expected, same', [
    ([(0.5, 0)], [(0.5, 0)], True),
    ([(0.5, 0)], [(0.5, 9)], False),
    # at the threshold, with and without
    ([(0.5, 0), (0.05005, 40)], [(0.5, 0)], True),
    ([(0.5, 0), (0.06, 40)], [(0.5, 0)], False),
    # one of two equal boxes that overlap
    ([(0.5, 0)], [(0.50005, 2)], True),
    ([(0.5, 0)], [(0.51, 2)], False),
    # an overlap of exactly 0.6
    ([(0.5, 0), (0.4, 5)], [(0.5, 0)], True),
    ([(0.5, 0), (0.4, 6)], [(0.5, 0)], False),
    ([], [(0.5, 0)], False),
    ([], [], True),
])
def test_what_rounding_may_decide(got, expected, same):
    """Scores and left edges of boxes of 20 x 20."""
    def boxes(rows):
        left = torch.tensor([x for _, x in rows], dtype=torch.float32)
        top = torch.zeros_like(left)
        return dict(
            boxes=torch.stack([left, top, left + 20, top + 20], 1).view(-1, 4),
            scores=torch.tensor([s for s, _ in rows]), labels=torch.zeros(len(rows), dtype=torch.long))

    pixels, score = export._differences(boxes(got), boxes(expected), boxes([*got, *expected]), detector())
    assert (pixels <= 1e-3 and score <= 1e-3) == same
    if got:
        others = [(s, x + 0.01) for s, x in [*got, *expected]]
        pixels, score = export._differences(boxes(got), boxes(expected), boxes(others), detector())
        assert pixels > 1e-3


def test_the_letterbox_is_what_the_detector_sees():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8))
    x, size = letterbox(image, SIZE, [0.1, 0.2, 0.3])
    assert x.shape == (1, 3, *SIZE) and x.dtype == np.float32 and size == (48, 80)
    x, size = letterbox(image.rotate(90, expand=True), SIZE, [0.1, 0.2, 0.3])
    assert size == (48, 29)
    assert np.allclose(x[0, :, :, 29:], np.array([0.1, 0.2, 0.3])[:, None, None])
    model = detector(mean=[0.1, 0.2, 0.3])
    padded, _ = model.transform([torch.from_numpy(x[0])])
    assert padded.tensors[..., 29:].abs().max() < 1e-6


def test_files_and_sizes_are_checked_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(export, 'onnx_bytes', lambda *args: pytest.fail('too late'))
    path = tmp_path / 'model.onnx'
    for size in (31, (64, 16)):
        with pytest.raises(PSTError, match=r'image size is .*at least 32'):
            export_detector(detector(), path, size)
    with pytest.raises(PSTError, match='choose a smaller size'):
        export_detector(detector(), path, 10 ** 7)
    path.write_text('as it was')
    with pytest.raises(PSTError, match='is there already'):
        export_detector(detector(), path)
    assert path.read_text() == 'as it was'


def test_without_onnx_there_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(PSTError, match=r"cannot be written .*onnxscript.*pip install 'pst_timm\[export\]'"):
        export_detector(detector(), tmp_path / 'model.onnx')


def test_a_trunk_that_cannot_be_traced_is_exported_unfolded(monkeypatch, caplog):
    def refuse(model):
        raise ValueError('no way')

    monkeypatch.setattr(export, 'reparameterize', refuse)
    model = detector()
    assert len(export._folded(model).state_dict()) == len(model.state_dict())
    assert 'Exported without folding: no way' in caplog.text


@pytest.mark.slow
def test_the_command(tmp_path, capsys, monkeypatch):
    model = detector(**TWO_LEVELS, class_names=['a', 'b', 'c'])
    source, path = tmp_path / 'last.pth.tar', tmp_path / 'model.onnx'
    torch.save({'state_dict': model.state_dict(), 'arch': 'fcos', FACTS_KEY: describe(model)}, source)
    photo = tmp_path / 'photo.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)).save(photo)
    words = ['export', str(source), '-o', str(path), '--img-size', '48x80', '--check', '--images', str(photo)]
    assert main([*words, '--topk', '2', '--fine-fusion', 'joint']) == 0
    assert f'Written: {path}' in (said := capsys.readouterr().out) and f'{photo}: ' in said
    info = json.loads(session_of(path).get_modelmeta().custom_metadata_map[METADATA])
    assert (info['input_size'], info['topk'], info['fine_fusion']) == ([3, 48, 80], 2, 'joint')
    assert main(words) == 1 and 'is there already' in capsys.readouterr().err
    mistakes = {'--img-size 16x80': 'at least 32, or HEIGHTxWIDTH', '--images none.png': 'no image at none.png'}
    for wrong, message in mistakes.items():
        with pytest.raises(SystemExit):
            main(['export', str(source), '-o', str(path), '--check', *wrong.split()])
        assert message in capsys.readouterr().err
    as_file(monkeypatch, lambda out: {**out, 'boxes': out['boxes'] + 1})
    assert main([*words, '--overwrite']) == 1
    assert 'Nothing was written' in capsys.readouterr().err
    assert session_of(path).get_modelmeta().custom_metadata_map[METADATA] == json.dumps(info)
