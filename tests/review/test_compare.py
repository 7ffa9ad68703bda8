"""The roll-out gate, with planted losses: what is worse is found, and nothing else."""
import csv
import json
import math
import subprocess
import sys

import pytest
import timm
import torch

from pst_timm.cli import main
from pst_timm.metrics.intervals import holm, mcnemar, paired_interval
from pst_timm.review.answers import Outputs, Subject, answers, open_labelled, open_subject
from pst_timm.review.compare import CHANGES, compare, judge, report, verdict
from pst_timm.utils.errors import PSTError
from tests.checkpoints.helpers import run_args, save_checkpoint
from tests.engine.helpers import ROOT, script_env, write_images
from tests.review.helpers import CLASSES, make_source

EACH = 20


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('compare') / 'data', {'validation': EACH})


class Oracle(torch.nn.Module):
    """Knows the answers by the order in which images come, but for those that it is to get wrong."""

    def __init__(self, wrong, classes, shift=1, confidence=4.):
        super().__init__()
        self.wrong, self.classes, self.shift, self.at = set(wrong), classes, shift, 0
        self.confidence = torch.nn.Parameter(torch.tensor(confidence))

    def forward_features(self, x):
        labels = [((self.at + i) // EACH) % 3 for i in range(len(x))]
        labels = [(k + self.shift) % 3 if self.at + i in self.wrong else k for i, k in enumerate(labels)]
        self.at = (self.at + len(x)) % (3 * EACH)
        places = [self.classes.index(f'class{k}') for k in labels]
        return self.confidence * torch.nn.functional.one_hot(torch.tensor(places), 3).float()

    def forward_head(self, x, pre_logits=False):
        return x

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def oracle(wrong=(), classes=CLASSES, knows=True, **kwargs):
    from torchvision.transforms.functional import to_tensor

    model = Oracle(wrong, list(classes), **kwargs)
    names = list(classes) if knows else [f'class {i}' for i in range(3)]
    return Subject(model, 'oracle', f'{len(set(wrong))}-wrong', names, knows, 'RGB', (3, 32, 32), to_tensor,
                   torch.device('cpu'))


def compared(data, old, new, **kwargs):
    return compare(old, new, data, **{'repeats': 0, **kwargs})


def test_the_numbers_are_those_of_the_planted_changes(data):
    # both wrong on 0 and 1 (in another way), lost 20 to 22, gained 40
    found = compared(data, oracle([0, 1, 40]), oracle([0, 1, 20, 21, 22], shift=2))
    assert (found.images, found.classes, found.lost, found.gained) == (60, 3, 3, 1)
    assert found.old.accuracy == pytest.approx(100 * 57 / 60) and found.new.accuracy == pytest.approx(100 * 55 / 60)
    assert found.difference == pytest.approx(-100 * 2 / 60)
    assert found.test == mcnemar(3, 1) and found.negative_flip_rate == pytest.approx(100 * 3 / 60)
    assert found.interval == paired_interval(3, 1, 60)
    assert [(f.label, f.old, f.new, f.change) for f in found.flips] == [
        *[('class0', 'class1', 'class2', 'wrong to wrong')] * 2,
        *[('class1', 'class1', 'class0', 'right to wrong')] * 3, ('class2', 'class0', 'class2', 'wrong to right')]
    assert [f.image.split('/')[0] for f in found.flips] == [f.label for f in found.flips]
    [fallen] = found.fallen
    assert fallen[:6] == ('class1', 20, 20, 17, 3, 0)
    assert fallen.p == holm([1., mcnemar(3, 0).worse, mcnemar(0, 1).worse])[1]


def test_calibration_of_both_is_by_hand(data):
    found = compared(data, oracle(range(6)), oracle(range(6), confidence=1.))
    for side, confidence in ((found.old, 4.), (found.new, 1.)):
        p = math.exp(confidence) / (math.exp(confidence) + 2)
        assert side.ece == pytest.approx(100 * abs(p - 0.9), abs=1e-3)
        assert side.loss == pytest.approx(-0.9 * math.log(p) - 0.1 * math.log((1 - p) / 2), abs=1e-5)
        assert (side.parameters, side.img_size) == (1, [32, 32]) and side.latency_ms is None
        assert side.weights_mib == pytest.approx(4 / 2 ** 20)


@pytest.mark.parametrize('old, new, worse', [
    ([], [0, 20, 40, 41], False),  # 1 / 16
    ([], [0, 1, 20, 21, 40], True),  # 1 / 32
    (range(5), [], False),
    ([0, 1], [20, 21, 22, 40, 41], False),
    ([], [], False),
])
def test_a_loss_that_is_not_chance_is_worse(data, old, new, worse):
    found = compared(data, oracle(old), oracle(new))
    assert bool(judge(found, per_class=False)) is worse is (found.test.worse <= 0.05)


def test_a_class_that_falls_is_worse_although_the_whole_gains(data):
    found = compared(data, oracle(range(40, 52)), oracle(range(8)))
    assert found.difference > 0 and not judge(found, per_class=False)
    [reason] = judge(found)
    assert reason == 'it has lost in 1 class: class0 (20 to 12 of 20)'
    assert [c.name for c in found.fallen] == ['class0'] and found.fallen[0].p == pytest.approx(3 / 2 ** 8)
    # five of one class would be worse alone, but not as one of three
    assert not judge(compared(data, oracle(range(40, 52)), oracle(range(5))))


@pytest.mark.parametrize('lost, tolerance, worse', [
    (6, 10., False), (6, 9.99, True), (7, 10., True), (1, 0., True), (0, 0., False)])
def test_a_tolerance_stands_in_for_chance(data, lost, tolerance, worse):
    found = compared(data, oracle(), oracle(range(lost)))
    assert bool(judge(found, tolerance, per_class=False)) is worse
    assert not judge(compared(data, oracle(range(lost)), oracle()), tolerance)


def test_times_are_in_turn_and_have_a_limit(data, monkeypatch):
    asked = []

    def times(calls, repeats, warmup, device):
        asked.append((list(calls), repeats))
        for call in calls.values():
            assert call().shape == (1, 3)
        return {'old': [0.010, 0.020, 0.010], 'new': [0.030, 0.030, 0.030]}

    monkeypatch.setattr('pst_timm.review.compare.time_in_turn', times)
    found = compared(data, oracle(), oracle(), repeats=3)
    assert asked == [(['old', 'new'], 3)]
    assert (found.old.latency_ms, found.new.latency_ms, found.latency_ratio) == (10, 30, 3)
    assert not judge(found, max_latency_ratio=3.)
    assert judge(found, max_latency_ratio=2.9) == ['an image takes 3.00 times as long, more than the 2.9 accepted']


def test_classes_are_aligned_by_name(data):
    found = compared(data, oracle([3]), oracle([3, 25], classes=('class2', 'class0', 'class1')))
    assert (found.lost, found.gained) == (1, 0) and found.new.accuracy == pytest.approx(100 * 58 / 60)
    assert found.flips[0][1:] == ('class1', 'class1', 'class2', 'right to wrong')
    unnamed = compared(data, oracle([3], knows=False), oracle([3, 25], classes=('class2', 'class0', 'class1')))
    assert unnamed.flips == found.flips


@pytest.mark.parametrize('other, said', [
    (('class0', 'class1', 'class2', 'zebra'), "only new knows 'zebra'"),
    (('class0', 'class1', 'class2', 'class2'), 'classes of the same name'),
])
def test_other_classes_are_refused(data, other, said, monkeypatch):
    new = oracle()._replace(class_names=list(other), source='new')
    with pytest.raises(PSTError, match=said):
        compared(data, oracle()._replace(source='old'), new)


def test_what_is_said(data):
    same = compared(data, oracle([1]), oracle([1]))
    assert verdict(same, judge(same)) == 'The new model gives the same answers.'
    better = compared(data, oracle(range(0, 60, 6)), oracle())
    assert verdict(better, judge(better)).startswith('The new model is better (p = 0.00')
    unclear = compared(data, oracle([1, 2]), oracle([3, 25]))
    said = verdict(unclear, judge(unclear))
    # (1.645 + 0.842) * sqrt(4) / 60
    assert 'as far as 60 images can tell: they would show a loss of 8.3 points in four of five cases' in said
    told = report(unclear, judge(unclear))
    assert json.loads(json.dumps(told))['worse'] is False and told['p_values']['worse'] == unclear.test.worse


def test_broken_images_are_left_out_for_both(tmp_path, caplog):
    data = write_images(tmp_path / 'data', {'validation': 3})
    (data / 'validation' / 'class1' / '9.png').write_bytes(b'noise')
    source = str(make_source(tmp_path))
    found = compare(*(open_subject(source, device='cpu') for _ in range(2)), data, repeats=0)
    assert found.images == 9 and found.broken == ['class1/9.png'] and not found.flips


# the command

@pytest.fixture(scope='module')
def models(tmp_path_factory, data):
    """A model, one of another architecture and size, and the first with its classifier turned round."""
    root = tmp_path_factory.mktemp('models')
    old = make_source(root)
    (root / 'plain').mkdir()
    facts = {'arch': 'test_resnet', 'pretrained_cfg': {
        'input_size': [3, 32, 32], 'num_classes': 3, 'label_names': list(reversed(CLASSES))}}
    torch.manual_seed(0)
    plain = save_checkpoint(
        root / 'plain' / 'last.pth.tar', timm.create_model('test_resnet', num_classes=3), arch='test_resnet',
        args=run_args(model='test_resnet', img_size=32), facts=facts)
    return old, plain


def test_the_exit_code_tells_the_worse_model(models, data, tmp_path, capsys, monkeypatch):
    old, plain = models
    subject = open_subject(str(old), device='cpu')
    outputs = Outputs.gather(answers(subject, open_labelled(subject, data)))
    # a model that is right as often as may be: class by class as this one answers, and its classes moved on by one
    words = ['compare', str(old), str(plain), '--data-dir', str(data), '--device', 'cpu', '--repeats', '2']
    code = main([*words, '-o', str(tmp_path / 'out.json')])
    out = capsys.readouterr().out
    told = json.loads((tmp_path / 'out.json').read_text())
    assert code == (3 if told['worse'] else 0) and told['verdict'] in out
    assert told['old']['img_size'] == [64, 64] and told['new']['img_size'] == [32, 32] and told['images'] == 60
    assert told['old']['accuracy'] == pytest.approx(100 * (outputs.logits.argmax(1) == outputs.labels).mean())
    assert told['lost'] == sum(flip['change'] == CHANGES[0] for flip in told['flips'])
    # in both directions, one of them is the worse one, or neither is
    back = main(['compare', str(plain), str(old), *words[3:], '-o', str(tmp_path / 'back.csv')])
    capsys.readouterr()
    flips = list(csv.DictReader(open(tmp_path / 'back.csv', newline='')))
    assert len(flips) == len(told['flips']) and {code, back} <= {0, 3} and list(flips[0]) == [
        'image', 'label', 'old', 'new', 'change']
    strict = main([*words, '--max-latency-ratio', '1e-9'])
    assert strict == 3 and 'times as long' in capsys.readouterr().out
    assert main(['compare', str(old), str(old), *words[3:], '-o', str(tmp_path / 'same.csv')]) == 0
    assert (tmp_path / 'same.csv').read_text() == 'image,label,old,new,change\n'
    assert main([*words, '-o', str(tmp_path / 'out.json')]) == 1
    assert 'there already' in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_command_ends_with_its_exit_codes(models, data, tmp_path):
    words = [sys.executable, '-m', 'pst_timm', 'compare', str(models[0]), str(models[1]), '--data-dir', str(data),
             '--device', 'cpu', '--no-per-class', '--tolerance', '100', '--repeats', '1']
    for more, code in ((['--max-latency-ratio', '1e-9'], 3), (['--split', 'tset'], 1)):
        result = subprocess.run(
            [*words, *more], cwd=ROOT, env=script_env(), capture_output=True, text=True, timeout=300)
        assert result.returncode == code, result.stderr
        assert ('The new model is worse: an image takes' in result.stdout) == (code == 3)
