"""Cascades: routing image by image, the file and what it refuses, evaluation, and a word when images have moved."""
import csv
import io
import json
import logging
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from scipy.stats import beta, binom
from sklearn.metrics import roc_auc_score
from timm.data import create_transform, resolve_data_config

import pst_timm
from pst_timm.checkpoints import load_model
from pst_timm.checkpoints.folder import save_folder
from pst_timm.cli import main
from pst_timm.commands.recalibrate import main as recalibrate_main
from pst_timm.data.datasets import create_eval_dataset
from pst_timm.data.samples import Samples
from pst_timm.deploy.cascade import (
    FALSE_ALARM,
    FIRST_LOOK,
    FITTED_LEVEL,
    Cascade,
    CascadeClassifier,
    Stage,
    Watch,
    confidence_of,
    open_stage,
    resolve_stage,
    write_cascade,
)
from pst_timm.deploy.export import export
from pst_timm.deploy.runtime import open_source
from pst_timm.engine import validate_args
from pst_timm.metrics.calibration import calibration_error
from pst_timm.utils.errors import PSTError
from tests.checkpoints.helpers import build
from tests.deploy.helpers import save_pair
from tests.engine.helpers import script_env
from tests.review.helpers import CLASSES

SIZES = (48, 64)


class Table(nn.Module):
    """A model that looks its logits up, so that no image's depend on the batch; counts the images it saw."""

    def __init__(self, logits, in_chans=1):
        super().__init__()
        self.logits = logits
        self.num_classes = logits.shape[1]
        self.pretrained_cfg = {
            'architecture': 'table', 'input_size': (in_chans, 4, 4), 'mean': (0.,) * in_chans, 'std': (1.,) * in_chans}
        self.seen = []

    def forward(self, x):
        self.seen.append(len(x))
        return self.logits[x[:, 0, 0, 0].long()]


def table_stages(count, images=200, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    stages = []
    for i in range(count):
        model = Table(3 * torch.randn(images, classes, generator=generator))
        stages.append(Stage(
            model, f'table {i}', resolve_data_config({}, model=model), temperature=0.7 + i, threshold=0.6 + 0.1 * i,
            cost=1. + 3 * i))
    return stages


def as_images(numbers):
    return numbers.float().view(-1, 1, 1, 1).expand(-1, 1, 4, 4)


@pytest.mark.parametrize('count', [2, 3])
def test_a_batch_is_routed_as_its_images_one_by_one(count):
    stages = table_stages(count)
    cascade = Cascade(stages)
    numbers = torch.randperm(200, generator=torch.Generator().manual_seed(1))[:64]
    together = cascade(as_images(numbers))
    assert [sum(stage.model.seen) for stage in stages] == [int((together.stage >= i).sum()) for i in range(count)]
    assert len(set(together.stage.tolist())) == count  # each stage has a say
    for i, n in enumerate(numbers.tolist()):
        cost = 0.
        for place, stage in enumerate(stages):
            logits = stage.model.logits[n] / stage.temperature
            cost += stage.cost
            if place == count - 1 or logits.double().softmax(0).max() > stage.threshold:
                break
        alone = cascade(as_images(numbers[i:i + 1]))
        for got in (alone, type(together)(*(part[i:i + 1] for part in together))):
            assert torch.equal(got.logits[0], logits) and got.stage.item() == place and got.cost.item() == cost


@pytest.mark.parametrize('threshold, stage', [(0., 0), (1., 1)])
def test_thresholds_at_the_ends_pass_on_none_and_all(threshold, stage):
    stages = table_stages(2)
    stages[0].threshold = threshold
    stages[0].model.logits[:, 0] = 1000  # as sure as can be
    output = Cascade(stages)(as_images(torch.arange(20)))
    assert output.stage.tolist() == [stage] * 20
    assert bool(stages[1].model.seen) == bool(stage)  # a stage that nothing reaches does not run


@pytest.mark.parametrize('threshold', [0., 0.5])
def test_what_is_no_number_is_passed_on(threshold):
    stages = table_stages(2)
    stages[0].threshold = threshold
    stages[0].model.logits[3] = math.nan
    output = Cascade(stages)(as_images(torch.arange(5)))
    assert output.stage[3] == 1 and torch.isfinite(output.logits).all()


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r'\(B, 1, 4, 4\), got \(2, 1, 8, 8\)'):
        Cascade(table_stages(2))(torch.zeros(2, 1, 8, 8))


def test_a_stage_takes_images_prepared_for_another_one():
    """Resized as fitted, and normalised as the stage knows it."""
    seen = []

    class Spy(nn.Module):
        def __init__(self, side, mean, std):
            super().__init__()
            self.num_classes = 2
            self.pretrained_cfg = {'input_size': (3, side, side), 'mean': (mean,) * 3, 'std': (std,) * 3}

        def forward(self, x):
            seen.append(x)
            return torch.zeros(len(x), 2)

    models = Spy(16, 0., 1.), Spy(32, 0.5, 0.2)
    cascade = Cascade([Stage(m, 'spy', resolve_data_config({}, model=m), threshold=1.) for m in models])
    assert cascade.input_size == (3, 32, 32)
    pixels = torch.rand(2, 3, 32, 32)
    cascade((pixels - 0.5) / 0.2)
    small = torch.nn.functional.interpolate(pixels, (16, 16), mode='bilinear', antialias=True)
    torch.testing.assert_close(seen[0], small)
    torch.testing.assert_close(seen[1], (pixels - 0.5) / 0.2)


# the file

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A cascade of two small models beside it, with data of their classes."""
    folder = save_pair(tmp_path_factory.mktemp('cascade'))
    write(folder)
    return folder


def write(folder, names=('small', 'large'), data=None):
    """A cascade in a folder that passes on about half of the validation images."""
    stages = [open_stage(folder / name, (size, size)) for name, size in zip(names, SIZES)]
    for stage, cost in zip(stages, (1., 4.)):
        stage.temperature, stage.cost, stage.reached, stage.passed = 1.5, cost, 100, 50
    cascade = Cascade(stages)
    with torch.no_grad():
        confidence = confidence_of(stages[0](photos(data or folder)[0])).sort().values
    stages[0].threshold = confidence[17:19].mean().item()
    (folder / 'cascade.json').write_text(write_cascade(cascade, list(names)))


def photos(folder):
    """The validation images (36, 3, 64, 64) and labels as the cascade takes them."""
    config = resolve_data_config({}, model=load_model(folder / 'large'))
    dataset = create_eval_dataset(validate_args(data_dir=str(folder / 'data')), 'validation', None)
    samples = Samples.labelled(dataset, create_transform(**config), CLASSES)
    images, labels = zip(*((sample.image, sample.label) for sample in samples))
    return torch.stack(images), torch.tensor(labels)


def read(place):
    return json.loads((place / 'cascade.json').read_text())


def test_a_cascade_survives_a_round_trip(place):
    x = photos(place)[0]
    cascade = Cascade.from_file(place / 'cascade.json')
    assert not cascade.training and cascade.class_names == list(CLASSES) and cascade.num_classes == 3
    again = place / 'again.json'
    again.write_text(write_cascade(cascade, ['small', 'large']))
    assert json.loads(again.read_text()) == read(place)
    for a, b in zip(cascade(x), Cascade.from_file(again)(x)):
        assert torch.equal(a, b)
    model = load_model(place / 'small')
    small = torch.nn.functional.interpolate(x, (48, 48), mode='bilinear', antialias=True)
    with torch.no_grad():
        first = model(small) / 1.5
    sure = confidence_of(first) > cascade.stages[0].threshold
    assert sure.sum() == 18
    torch.testing.assert_close(cascade(x).logits[sure], first[sure])


@pytest.mark.slow
def test_another_process_gets_the_same_logits(place):
    code = (
        'import torch, pst_timm; torch.manual_seed(0);'
        f'out = pst_timm.Cascade.from_file({str(place / "cascade.json")!r})(torch.randn(6, 3, 64, 64));'
        'print([part.tolist() for part in out])')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=script_env(), check=True)
    torch.manual_seed(0)
    expected = pst_timm.Cascade.from_file(place / 'cascade.json')(torch.randn(6, 3, 64, 64))
    assert json.loads(done.stdout) == [part.tolist() for part in expected]


def test_the_user_may_name_the_stages(place, tmp_path):
    (tmp_path / 'cascade.json').write_text((place / 'cascade.json').read_text())
    with pytest.raises(PSTError, match="'small', which is not there"):
        Cascade.from_file(tmp_path / 'cascade.json')
    cascade = Cascade.from_file(tmp_path / 'cascade.json', stages=[place / 'small', place / 'large'])
    x = torch.randn(4, 3, 64, 64)
    assert torch.equal(cascade(x).logits, Cascade.from_file(place / 'cascade.json')(x).logits)
    with pytest.raises(PSTError, match='has 2 stages, and 1 are named'):
        Cascade.from_file(tmp_path / 'cascade.json', stages=[place / 'small'])


@pytest.mark.slow
def test_an_exported_file_is_a_stage_as_any_other(place, tmp_path):
    export(load_model(place / 'large'), tmp_path / 'large.pt2', 'exported-program', img_size=64, class_names=CLASSES)
    save_folder(load_model(place / 'small'), tmp_path / 'small')
    write(tmp_path, ('small', 'large.pt2'), place)
    x = photos(place)[0]
    got, expected = (Cascade.from_file(folder / 'cascade.json')(x) for folder in (tmp_path, place))
    assert torch.equal(got.stage, expected.stage) and got.stage.sum() == 18
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-3, atol=1e-4)
    words = ['validate', '--checkpoint', str(tmp_path / 'cascade.json'), '--data-dir', str(place / 'data'), '-j', '0',
             '--device', 'cpu', '-b', '8']
    assert main(words) == 0


# what a file may not say

def stage_with(**values):
    return lambda value: value['stages'][0].update(values)


def without(key):
    return lambda value: value['stages'][0].pop(key)


def top(**values):
    return lambda value: value.update(values)


HOSTILE = {
    'an absolute path': (stage_with(source='/etc/passwd'), 'not beside it or below'),
    'a path above': (stage_with(source='../other'), 'not beside it or below'),
    'a path above and below': (stage_with(source='small/../../other'), 'not beside it or below'),
    'the folder itself': (stage_with(source='.'), 'not beside it or below'),
    'no path': (stage_with(source=''), 'not beside it or below'),
    'a path without end': (stage_with(source='small' * 300), 'at most 1000 characters'),
    'a name too long for a file': (stage_with(source='s' * 900), 'cannot be read|is not there'),
    'a zero': (stage_with(source='small\0'), 'is not there'),
    'a repository': (stage_with(source='hf-hub:evil/model'), 'is not there'),
    'a folder by its prefix': (stage_with(source='local-dir:small'), 'is not there'),
    'the name of a model': (stage_with(source='resnet18.a1_in1k'), 'is not there'),
    'itself': (stage_with(source='hostile.json'), 'no single model'),
    'another cascade': (stage_with(source='cascade.json'), 'no single model'),
    'a number for a path': (stage_with(source=3), r'stages\[0\]\.source: expected a text'),
    'a threshold above 1': (stage_with(threshold=1.5), r'stages\[0\]\.threshold: expected a number from 0 to 1'),
    'a threshold without end': (stage_with(threshold=math.inf), 'Infinity is no number'),
    'a threshold that is none': (stage_with(threshold=math.nan), 'NaN is no number'),
    'a threshold in words': (stage_with(threshold='0.5'), r'threshold: expected a number'),
    'a temperature of zero': (stage_with(temperature=0), r'temperature: expected a number'),
    'a cost of nothing': (stage_with(cost=-1), r'cost: expected a number'),
    'no threshold': (without('threshold'), r'does not tell stages\[0\]\.threshold'),
    'no size': (without('img_size'), r'does not tell stages\[0\]\.img_size'),
    'a null': (stage_with(cost=None), r'does not tell stages\[0\]\.cost'),
    'a huge size': (stage_with(img_size=[10 ** 6, 64]), r'img_size\[0\]: expected a whole number'),
    'more passed on than seen': (stage_with(passed=101), 'passed on more images than it saw'),
    'one stage': (lambda value: value['stages'].pop(), 'expected a list of 2 to 3 values'),
    'many stages': (lambda value: value['stages'].extend(2 * value['stages']), 'expected a list of 2 to 3 values'),
    'stages in words': (top(stages='small'), 'stages: expected a list'),
    'a stage in words': (top(stages=['small', 'large']), r'stages\[0\]: expected a mapping'),
    'another version': (top(version=2), 'version: expected'),
    'no version': (lambda value: value.pop('version'), 'does not tell version'),
    'another cost': (top(cost='euros'), 'cost: expected one of'),
    'other classes': (top(num_classes=7), 'fitted for 7 classes, and its stage .* has 3'),
    'other names': (top(class_names=['x', 'y', 'z']), 'has 3 of other names'),
    'another format': (top(format='something'), 'is not a cascade'),
    'deep values': (top(fit=json.loads('[' * 60 + ']' * 60)), 'fit|nested'),
}


@pytest.mark.parametrize('change, said', HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_ends_in_one_sentence(place, change, said, capsys):
    value = read(place)
    change(value)
    path = place / 'hostile.json'
    path.write_text(json.dumps(value))
    with pytest.raises(PSTError, match=said):
        Cascade.from_file(path)
    path.unlink()


@pytest.mark.parametrize('content, said', [
    (b'', 'not JSON'), (b'{', 'not JSON'), (b'[1, 2]', 'is not a cascade'), (b'null', 'is not a cascade'),
    (b'\x80\x02}', 'not JSON'), (b'{"a": 1, "a": 2}', 'there twice'), (b'[' * 10 ** 5, 'nested too deeply'),
    (b' ' * (2 ** 24 + 1), 'more than 16 MiB'), (b'{"format": "pst_timm cascade"}', 'does not tell version'),
], ids=['empty', 'cut', 'list', 'null', 'pickle', 'twice', 'deep', 'huge', 'bare'])
def test_what_is_no_cascade_ends_in_one_sentence(tmp_path, content, said):
    (tmp_path / 'cascade.json').write_bytes(content)
    with pytest.raises(PSTError, match=said):
        open_source(tmp_path / 'cascade.json')


def test_every_cut_of_a_file_is_refused(place, tmp_path):
    text = (place / 'cascade.json').read_text().rstrip()
    for end in range(0, len(text), 97):
        (tmp_path / 'cut.json').write_text(text[:end])
        with pytest.raises(PSTError, match='not JSON'):
            Cascade.from_file(tmp_path / 'cut.json')


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / 'pipe.json')
    for name, said in (('pipe.json', 'pipe'), ('none.json', 'There is no file')):
        with pytest.raises(PSTError, match=said):
            Cascade.from_file(tmp_path / name)


def test_links_do_not_lead_out(place, tmp_path):
    inside = tmp_path / 'inside'
    inside.mkdir()
    (inside / 'cascade.json').write_text('{}')
    (inside / 'linked').symlink_to(place / 'small')
    (inside / 'real').mkdir()
    for name in ('model.safetensors', 'config.json'):
        (inside / 'real' / name).symlink_to(place / 'small' / name)
    (inside / 'config.json').symlink_to(place / 'small' / 'config.json')
    (inside / 'alone.safetensors').write_bytes((place / 'small' / 'model.safetensors').read_bytes())
    (inside / 'circle').symlink_to('circle')
    for name in ('linked', 'real', 'alone.safetensors'):  # reading the last would read the config.json beside it
        with pytest.raises(PSTError, match='not beside it or below'):
            resolve_stage(inside / 'cascade.json', name)
    with pytest.raises(PSTError):
        Cascade.from_file(inside / 'cascade.json', stages=[inside / 'circle', inside / 'circle'])
    (inside / 'sound').mkdir()
    (inside / 'near').symlink_to('sound')
    assert resolve_stage(inside / 'cascade.json', 'near') == inside / 'near'


def test_stages_have_to_know_the_same(place, tmp_path):
    def saved(name, labels, **kwargs):
        model = build(num_classes=len(labels), **kwargs)
        model.pretrained_cfg.update(input_size=(kwargs.get('in_chans', 3), 64, 64), label_names=labels)
        save_folder(model, tmp_path / name)
        return tmp_path / name
    others = [
        (saved('four', ['a', 'b', 'c', 'd']), 'know 3 and 4 classes'),
        (saved('names', ['class0', 'class2', 'class1']), "class 1 is 'class1' in the former and 'class2' in"),
        (saved('grey', list(CLASSES), in_chans=1), '3 and 1 channels')]
    for other, said in others:
        with pytest.raises(PSTError, match=said):
            Cascade([open_stage(place / 'small'), open_stage(other)])
        assert main(['cascade', 'fit', str(place / 'small'), str(other), '--data-dir', str(place / 'data'), '--device',
                     'cpu', '--max-cost', '1', '-o', str(tmp_path / 'out.json')]) == 1
    assert not (tmp_path / 'out.json').exists() and not (tmp_path / 'out').exists()


def test_what_takes_no_cascade_says_so(place, tmp_path, capsys):
    path, data = str(place / 'cascade.json'), str(place / 'data')
    for words in (
            ['predict', path, data], ['monitor', 'fit', path, '--data-dir', data],
            ['audit', path, '--data-dir', data, '-o', str(tmp_path / 'out')],
            ['compare', path, path, '--data-dir', data], ['export', path]):
        assert main(words) == 1, words
        assert 'A cascade is run by pst-timm cascade run' in capsys.readouterr().err
    assert recalibrate_main([path, '--data-dir', data]) == 1
    assert 'name one of them' in capsys.readouterr().err
    with pytest.raises(PSTError, match='cannot be a stage: it is a cascade'):
        open_stage(path)


@pytest.mark.parametrize('kwargs', [dict(num_classes=7), dict(reparam=True), dict(arch='resnet18'), dict(topk=4)])
def test_it_stays_as_it_was_fitted(place, kwargs):
    with pytest.raises(PSTError, match=f'leave out {next(iter(kwargs))}.*or fit it so'):
        open_source(place / 'cascade.json', **kwargs)


# evaluation

def validated(place, capsys, *words, name='cascade.json'):
    assert main(['validate', '--checkpoint', str(place / name), '--data-dir', str(place / 'data'), '-j', '0',
                 '--device', 'cpu', *words]) == 0
    return json.loads(capsys.readouterr().out.partition('--result\n')[2])


def test_validate_measures_a_cascade(place, capsys):
    found = validated(place, capsys, '-b', '7')
    other = validated(place, capsys, '-b', '36', '--calibrate')
    images, labels = photos(place)
    output = Cascade.from_file(place / 'cascade.json')(images)
    right = output.logits.argmax(dim=1) == labels
    share = 100 * output.stage.double().mean().item()
    assert 0 < share < 100
    for row in (found, other):
        assert row['top1'] == pytest.approx(100 * right.double().mean().item(), abs=1e-3)
        assert row['stage1_share'] == pytest.approx(100 - share, abs=1e-3)
        assert row['stage2_share'] == pytest.approx(share, abs=1e-3)
        assert row['mean_cost'] == pytest.approx(1 + 4 * share / 100, abs=1e-5) and row['cost_unit'] == 'ms'
        assert row['ece'] == pytest.approx(calibration_error(output.logits.double(), labels), abs=1e-5)
        assert row['failure_auroc'] == pytest.approx(roc_auc_score(right, confidence_of(output.logits)), abs=1e-4)
        assert row['model'] == 'cascade'


def test_validate_refuses_another_size(place, capsys):
    words = ['validate', '--checkpoint', str(place / 'cascade.json'), '--data-dir', str(place / 'data'), '-j', '0',
             '--device', 'cpu', '--img-size', '96']
    assert main(words) == 1
    assert '(B, 3, 64, 64), got (1, 3, 96, 96)' in capsys.readouterr().err


def test_a_predict_like_caller_gets_logits(place):
    model = open_source(place / 'cascade.json')
    x = torch.randn(5, 3, 64, 64)
    assert isinstance(model, CascadeClassifier)
    assert torch.equal(model(x), model.cascade(x).logits)
    assert resolve_data_config({}, model=model)['input_size'] == (3, 64, 64)


def test_run_tells_classes_and_stages(place, tmp_path, capsys):
    words = ['cascade', 'run', str(place / 'cascade.json'), str(place / 'data' / 'validation'), '--device', 'cpu']
    assert main(words) == 0
    shown = capsys.readouterr()
    assert main([*words, '-b', '5', '-o', str(tmp_path / 'out.csv')]) == 0
    for text in (shown.out, (tmp_path / 'out.csv').read_text()):
        rows = list(csv.DictReader(io.StringIO(text)))
        assert len(rows) == 36 and {row['stage'] for row in rows} == {'1', '2'}
        assert all(row['class'] in CLASSES for row in rows)
        assert {(row['cost'], row['stage']) for row in rows} == {('1.0', '1'), ('5.0', '2')}
    share = sum(row['stage'] == '1' for row in rows) / 36
    assert f'36 images: stage 1 answered {share:.1%}' in shown.err


# images that have moved

def watched(reached, passed):
    stages = table_stages(2)
    stages[0].reached, stages[0].passed = reached, passed
    return Watch(stages)


def told(watch, caplog, counts, now=False):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        watch.add(counts)
        watch.look(now)
    return caplog.messages


def test_far_more_images_passed_on_are_told_once(caplog):
    watch = watched(1000, 100)
    assert told(watch, caplog, [(FIRST_LOOK - 1, FIRST_LOOK - 1)]) == []  # too few to look
    [message] = told(watch, caplog, [(1, 1)])
    assert '100.0% of 64 images after stage 1' in message and '10.0% of 1,000' in message
    assert told(watch, caplog, [(10 ** 4, 10 ** 4)]) == []


def test_the_line_is_where_the_exact_test_has_it(caplog):
    top = beta.ppf(1 - FITTED_LEVEL, 101, 900)
    least = next(k for k in range(500) if binom.sf(k - 1, 500, top) <= FALSE_ALARM)
    assert told(watched(1000, 100), caplog, [(500, least)], now=True)
    assert not told(watched(1000, 100), caplog, [(500, least - 1)], now=True)
    assert 0.1 < least / 500 < 0.25


def test_nothing_is_said_where_nothing_has_moved(caplog):
    generator = torch.Generator().manual_seed(0)
    for share in (0.3, 0.1):  # as many, or fewer
        warned = 0
        for _ in range(60):
            watch = watched(500, int(torch.binomial(torch.tensor(500.), torch.tensor(0.3), generator=generator)))
            for _ in range(12):
                part = int(torch.binomial(torch.tensor(100.), torch.tensor(share), generator=generator))
                warned += bool(told(watch, caplog, [(100, part)]))
        assert warned <= 1
    assert told(watched(0, 0), caplog, [(10 ** 4, 10 ** 4)], now=True) == []  # never fitted


def test_a_cascade_warns_by_itself_and_an_evaluation_at_its_end(place, caplog, capsys):
    value = read(place)
    value['stages'][0].update(passed=0, reached=10 ** 6, threshold=1.)
    (place / 'moved.json').write_text(json.dumps(value))
    cascade = Cascade.from_file(place / 'moved.json')
    with caplog.at_level(logging.WARNING):
        for _ in range(10):
            cascade(torch.randn(16, 3, 64, 64))
    assert len([m for m in caplog.messages if 'passes on 100.0%' in m]) == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        validated(place, capsys, '-b', '9', name='moved.json')
    assert len([m for m in caplog.messages if 'passes on 100.0% of 36' in m]) == 1
