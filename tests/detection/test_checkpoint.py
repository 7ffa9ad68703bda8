"""Detectors from checkpoints: whole, or refused in a sentence; and where a detector begins."""
import json
import re
from argparse import Namespace

import pytest
import timm
import torch

from pst_timm import load_model
from pst_timm.detection import open_detector, train
from pst_timm.detection.checkpoint import check_stored, describe, load_initial, load_trunk_weights
from pst_timm.engine.recovery import FACTS_KEY
from pst_timm.utils.errors import PSTError
from tests.engine.helpers import assert_same_weights

from .tiny import CLASSES, small, tiny_args, write_squares


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    data = write_squares(tmp_path_factory.mktemp('squares'), {'train': 4})
    output = tmp_path_factory.mktemp('run')
    train(tiny_args(data, output, epochs=1, val_split='', model_ema=True, topk=2, fine_fusion='joint'))
    return output / 'run'


@pytest.fixture(scope='module')
def content(run):
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(run / 'last.pth.tar', weights_only=True)


@pytest.fixture
def altered(content, tmp_path):
    """A checkpoint whose facts say something else of the detector."""
    def write(**changes):
        facts = json.loads(json.dumps(content[FACTS_KEY]))
        for key, value in changes.items():
            facts['detector'][key] = value
            if value is None:
                del facts['detector'][key]
        path = tmp_path / 'altered.pth.tar'
        torch.save({**content, FACTS_KEY: facts}, path)
        return path
    return write


def test_it_comes_back_as_it_was(run, content):
    detector = open_detector(run / 'last.pth.tar', use_ema=False, device='cpu')
    assert_same_weights(detector.state_dict(), content['state_dict'])
    assert detector.checkpoint_ema is False and open_detector(run, device='cpu').checkpoint_ema
    assert detector.class_names == list(CLASSES) and detector.img_size == 64
    assert detector.inference_settings() == dict(topk=2, fine_fusion='joint')
    assert detector.transform.image_mean == [0.5] * 3
    assert describe(detector) == {k: content[FACTS_KEY][k] for k in ('detector', 'pretrained_cfg')}


def test_settings_may_be_others(run):
    detector = open_detector(run, topk=0, device='cpu', img_size=96, score_thresh=0.4, detections_per_img=7)
    assert detector.inference_settings() == dict(topk=0, fine_fusion='joint')
    assert (detector.img_size, detector.score_thresh, detector.detections_per_img) == (96, 0.4, 7)
    with pytest.raises(PSTError, match='topk must be a non-negative integer'):
        open_detector(run, topk=-2, device='cpu')
    with pytest.raises(PSTError, match='fine_fusion must be one of'):
        open_detector(run, fine_fusion='both', device='cpu')


def test_a_detector_without_attention_takes_no_topk(tmp_path):
    model = small(neck='fpn')
    torch.save({'state_dict': model.state_dict(), FACTS_KEY: describe(model)}, tmp_path / 'fpn.pth.tar')
    assert open_detector(tmp_path / 'fpn.pth.tar', topk=0, device='cpu').class_names == ['0', '1']
    with pytest.raises(PSTError, match='holds a detector without attention'):
        open_detector(tmp_path / 'fpn.pth.tar', topk=8, device='cpu')


def test_a_detector_is_no_classifier_and_the_other_way_round(run, tmp_path):
    with pytest.raises(PSTError, match='holds an object detector, no classifier: use pst-timm detect'):
        load_model(run)
    plain = timm.create_model('test_resnet')
    torch.save({'state_dict': plain.state_dict(), 'arch': 'test_resnet'}, tmp_path / 'classifier.pth.tar')
    with pytest.raises(PSTError, match=r'holds a classifier \(test_resnet\), no object detector'):
        open_detector(tmp_path / 'classifier.pth.tar')
    torch.save(plain.state_dict(), tmp_path / 'weights.pth')
    with pytest.raises(PSTError, match='holds weights that it tells nothing about, no object detector'):
        open_detector(tmp_path / 'weights.pth')


def test_no_file_and_a_truncated_one(run, tmp_path):
    with pytest.raises(PSTError, match='There is no checkpoint'):
        open_detector(tmp_path / 'nothing.pth.tar')
    whole = (run / 'last.pth.tar').read_bytes()
    for share in (0, 10, 1000, len(whole) // 2, len(whole) - 10):
        (tmp_path / 'cut.pth.tar').write_bytes(whole[:share])
        with pytest.raises(PSTError, match='truncated or not a checkpoint'):
            open_detector(tmp_path / 'cut.pth.tar')


@pytest.mark.parametrize('changes, said', [
    (dict(kind='yolo'), r'garbled at detector\.kind: expected one of fcos'),
    (dict(kind=None), 'does not tell the kind'),
    (dict(num_classes=None), 'does not tell the num_classes'),
    (dict(trunk='hf-hub:stranger/model'), 'does not name an architecture that is known here'),
    (dict(trunk='local-dir:/etc'), 'does not name an architecture that is known here'),
    (dict(trunk_kwargs=dict(pretrained=True)), "the argument 'pretrained', which a file may not give"),
    (dict(trunk_kwargs=dict(checkpoint_path='/x')), "the argument 'checkpoint_path'"),
    (dict(trunk_kwargs=dict(features_only=False)), "the argument 'features_only'"),
    (dict(neck_kwargs=dict(norm_layer=['os', 'system'])), 'its neck is garbled at norm_layer'),
    (dict(neck_kwargs=dict(depth=10 ** 6)), 'its neck is garbled at depth'),
    (dict(neck_kwargs=dict(device='cuda')), 'garbled at device: expected an argument that this neck has'),
    (dict(neck_kwargs=dict(out_chs=64)), 'garbled at out_chs'),
    (dict(neck_kwargs=dict(act_layer='eval')), 'describes no detector|eval'),
    (dict(num_classes=10 ** 9), 'expected a whole number from 1 to 100000'),
    (dict(num_classes=90_000), 'is not a checkpoint of the detector that it describes: .*another shape'),
    (dict(neck_width=4096), 'is not a checkpoint of the detector that it describes'),
    (dict(neck_width=72), 'must be a multiple of 32'),
    (dict(levels=[8, 16, 33]), 'each twice the one before'),
    (dict(levels='8'), 'expected a list'),
    (dict(img_size=10 ** 6), 'expected a whole number from 32 to 4096'),
    (dict(score_thresh=float('nan')), 'expected a number from 0 to 1'),
    (dict(topk=True), 'expected a whole number'),
    (dict(trunk='resnet50'), 'is not a checkpoint of the detector that it describes'),
    (dict(neck='pan'), 'is not a checkpoint of the detector that it describes'),
], ids=lambda v: str(v)[:40])
def test_what_a_file_says_is_checked(altered, changes, said):
    path = altered(**changes)
    with pytest.raises(PSTError, match=said) as e:
        open_detector(path, device='cpu')
    assert str(path) in str(e.value) and len(str(e.value)) < 800


def test_nothing_larger_than_the_file_is_made(altered, monkeypatch):
    """Before the weights fit, a detector is shapes alone."""
    made = []
    init = torch.nn.Conv2d.__init__

    def watched(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(self.weight.device.type)

    monkeypatch.setattr(torch.nn.Conv2d, '__init__', watched)
    with pytest.raises(PSTError, match='is not a checkpoint of the detector'):
        open_detector(altered(neck_width=4096), device='cpu')
    assert made and set(made) == {'meta'}


def test_names_of_classes_that_are_too_few_are_not_believed(content, tmp_path):
    facts = json.loads(json.dumps(content[FACTS_KEY]))
    facts['pretrained_cfg']['label_names'] = ['only one']
    torch.save({**content, FACTS_KEY: facts}, tmp_path / 'a.pth.tar')
    assert open_detector(tmp_path / 'a.pth.tar', device='cpu').class_names == ['0', '1']


@pytest.mark.parametrize('values', [
    dict(neck_kwargs=dict(kv_pool=(2, 1))), dict(neck_kwargs=dict(kv_pool=2)),
    dict(trunk_kwargs=dict(drop_path_rate=0.1)), dict(neck='pan', neck_kwargs=dict(act_layer='gelu'))], ids=str)
def test_what_can_be_trained_can_be_opened(tmp_path, values):
    model = small(**values)
    check_stored(model)
    torch.save({'state_dict': model.state_dict(), FACTS_KEY: describe(model)}, tmp_path / 'a.pth.tar')
    again = open_detector(tmp_path / 'a.pth.tar', device='cpu')
    x = [torch.rand(3, 64, 64)]
    assert_same_weights(again.state_dict(), model.state_dict())
    assert torch.equal(again(x)[0]['scores'], model.eval()(x)[0]['scores'])


def test_what_could_not_be_opened_is_not_trained(tmp_path):
    data = write_squares(tmp_path / 'data', {'train': 4})
    with pytest.raises(PSTError, match=r"could not be opened again.*'norm_layer'.*--trunk-kwargs"):
        train(tiny_args(data, tmp_path, val_split='', trunk_kwargs=dict(norm_layer='layernorm2d')))


class TestTrunkWeights:
    def weights_of(self, folder, name, **kwargs):
        model = timm.create_model(name, **kwargs)
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.add_(0.01 * (i + 1))
        path = folder / f'{name}.pth'
        torch.save(model.state_dict(), path)
        return path, model

    @pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet', 'test_convnext'])
    def test_a_classifier_fills_the_trunk(self, tmp_path, name):
        path, classifier = self.weights_of(tmp_path, name)
        levels = (8, 16) if name == 'test_convnext' else (8, 16, 32)
        model = small(trunk=name, levels=levels)
        head = model.head.state_dict()
        load_trunk_weights(model, path)
        body = timm.create_model(name, features_only=True, out_indices=model.backbone.trunk.feature_info.out_indices)
        x = torch.rand(1, 3, 64, 64)
        classifier.eval()
        expected = classifier.forward_intermediates(x, intermediates_only=True) if hasattr(
            classifier, 'forward_intermediates') else None
        found = model.eval().backbone.trunk(x)
        assert body.feature_info.channels() == [m.shape[1] for m in found]
        for m in found:
            assert any(m.shape == e.shape and torch.allclose(m, e, atol=1e-5) for e in expected)
        assert_same_weights(model.head.state_dict(), head)

    @pytest.mark.parametrize('name', ['resnet18', 'mobilenetv4_conv_small'])
    def test_a_model_with_pst_gives_its_trunk(self, tmp_path, name):
        path, classifier = self.weights_of(tmp_path, f'{name}_pst')
        plain, whole = small(trunk=name), small(trunk=f'{name}_pst')
        ignored = load_trunk_weights(plain, path)
        assert any(k.startswith('pst.') for k in ignored) and any('fc' in k or 'classifier' in k for k in ignored)
        load_trunk_weights(whole, path)
        weights = classifier.state_dict()
        for model, prefix in ((plain, '' if name == 'resnet18' else 'trunk.'), (whole, '')):
            own = {k.removeprefix('model.'): v for k, v in model.backbone.trunk.state_dict().items()}
            assert_same_weights(own, {k: weights[prefix + k] for k in own})

    @pytest.mark.parametrize('name', ['resnet18', 'mobilenetv4_conv_small'])
    def test_a_plain_classifier_fills_the_trunk_of_one_with_pst(self, tmp_path, name):
        path, classifier = self.weights_of(tmp_path, name)
        model = small(trunk=f'{name}_pst')
        load_trunk_weights(model, path)
        own = {re.sub(r'^model\.(trunk\.)?', '', k): v for k, v in model.backbone.trunk.state_dict().items()}
        shared = {k: v for k, v in classifier.state_dict().items() if k in own}
        assert len(shared) > 100
        assert_same_weights({k: own[k] for k in shared}, shared)

    def test_another_detector_gives_its_trunk(self, run, content):
        model = small(neck='fpn', num_classes=5)
        load_trunk_weights(model, run, use_ema=False)
        own = model.backbone.trunk.state_dict()
        assert_same_weights(own, {k: content['state_dict'][f'backbone.trunk.{k}'] for k in own})

    @pytest.mark.parametrize('source, trunk, said', [
        ('resnet34', 'resnet18', r'it has layer1\.2\..*, which the trunk has not'),
        ('resnet18', 'resnet34', r'the trunk has layer1\.2\..*which the source has not'),
        ('test_vit', 'resnet18', 'the trunk has conv1.weight, which the source has not'),
        ('resnet18', 'test_resnet', 'is not a test_resnet'),
    ])
    def test_another_trunk_is_refused_and_nothing_is_copied(self, tmp_path, source, trunk, said):
        path, _ = self.weights_of(tmp_path, source)
        model = small(trunk=trunk)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(PSTError, match=f'--trunk-checkpoint {path}: .*{said}'):
            load_trunk_weights(model, path)
        assert_same_weights(model.state_dict(), before)

    def test_another_width_is_refused(self, tmp_path):
        path, _ = self.weights_of(tmp_path, 'resnet18', base_width=64, in_chans=1)
        with pytest.raises(PSTError, match=r'conv1\.weight is .* in the source and .* in the trunk'):
            load_trunk_weights(small(trunk='resnet18'), path)


class TestInitial:
    def test_for_other_classes_what_tells_them_starts_anew(self, run, content):
        model = small(num_classes=5)
        fresh = model.head.classification_head.cls_logits.weight.clone()
        load_initial(model, run / 'last.pth.tar', use_ema=False)
        assert torch.equal(model.head.classification_head.cls_logits.weight, fresh)
        kept = {k: v for k, v in model.state_dict().items() if '.cls_logits.' not in k}
        assert_same_weights(kept, {k: content['state_dict'][k] for k in kept})

    def test_for_the_same_classes_all_is_taken(self, run, content):
        model = small()
        load_initial(model, run / 'last.pth.tar', use_ema=False)
        assert_same_weights(model.state_dict(), content['state_dict'])

    def test_another_detector_is_refused(self, run):
        with pytest.raises(PSTError, match=r'--initial-checkpoint: .* is of another detector'):
            load_initial(small(neck='fpn'), run)
