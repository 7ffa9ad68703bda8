"""What is kept of a model's images, whether it comes back as it was, and what is said of later images."""
import copy
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import ImageFilter
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from pst_timm.cli import main
from pst_timm.data.drift import Batch
from pst_timm.data.images import open_image
from pst_timm.metrics.calibration import calibration_error, fit_temperature
from pst_timm.review.answers import Outputs, answers, open_subject
from pst_timm.review.monitor import (
    HEADER_KEY,
    batch_of,
    check,
    check_subject,
    fit,
    open_images,
    read_answers,
    read_reference,
    write_reference,
)
from pst_timm.review.page import render
from pst_timm.utils.errors import PSTError
from tests.engine.helpers import script_env
from tests.review.helpers import CLASSES, make_data, make_source

EVIL = '<script>alert(1)</script>'


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A model, and images under names that no file may tell."""
    root = tmp_path_factory.mktemp('monitor')
    data = make_data(root / 'secretplace', validation=24)
    for path in (data / 'validation').rglob('*.png'):
        path.rename(path.with_name(f'secretname{path.name}'))
    blurred = root / 'blurred'
    for path in (data / 'validation').rglob('*.png'):
        moved = blurred / path.relative_to(data / 'validation')
        moved.parent.mkdir(parents=True, exist_ok=True)
        open_image(path).filter(ImageFilter.GaussianBlur(2)).save(moved)
    return root, make_source(root), data, blurred


@pytest.fixture(scope='module')
def subject(place):
    return open_subject(str(place[1]), device='cpu')


@pytest.fixture(scope='module')
def outputs(place, subject):
    return Outputs.gather(answers(subject, open_images(subject, place[2])))


@pytest.fixture(scope='module')
def reference(subject, outputs):
    return fit(subject, outputs)


@pytest.fixture
def written(reference, tmp_path):
    write_reference(tmp_path / 'reference.safetensors', reference)
    return tmp_path / 'reference.safetensors'


# ------------------------------------------------------------------------------------------------------- the reference

def test_a_reference_tells_what_the_answers_were(reference, outputs, subject):
    logits, labels = torch.from_numpy(outputs.logits).double(), torch.from_numpy(outputs.labels)
    right = logits.argmax(dim=1) == labels
    assert reference.summary.images == 72 and reference.accuracy == pytest.approx(right.double().mean().item())
    assert reference.ece == pytest.approx(calibration_error(logits, labels), abs=1e-6)
    assert reference.temperature == pytest.approx(fit_temperature(logits, labels))
    assert reference.class_names == list(CLASSES) and reference.named
    assert reference.settings['input_size'] == [3, 64, 64]
    np.testing.assert_allclose(
        np.sort(reference.summary.confidence), logits.softmax(dim=1).amax(dim=1).sort().values, rtol=1e-5)
    assert reference.summary.true.tolist() == [24, 24, 24]


def test_a_reference_comes_back_as_it_was(reference, written):
    read = read_reference(written)
    for key, value in reference.summary._asdict().items():
        assert np.array_equal(getattr(read.summary, key), value) if isinstance(value, np.ndarray) else (
            getattr(read.summary, key) == value), key
    assert read._replace(summary=None) == reference._replace(summary=None)


def test_a_reference_without_labels_comes_back_too(subject, outputs, tmp_path):
    reference = fit(subject, outputs._replace(labels=np.full(72, -1)))
    assert reference.accuracy is reference.ece is reference.summary.threshold is reference.summary.true is None
    write_reference(tmp_path / 'bare.safetensors', reference)
    read = read_reference(tmp_path / 'bare.safetensors')
    assert read._replace(summary=None) == reference._replace(summary=None) and read.accuracy is None
    report = check(read, Batch(np.full(60, 0.5), np.zeros(60, int)))
    assert report.accuracy['estimated'] is None and 'no labels' in ' '.join(report.notes)


def test_there_is_no_name_no_path_and_no_image_in_the_file(written, place, outputs):
    content = written.read_bytes()
    for word in (b'secret', str(place[0]).encode(), b'.png', b'last.pth', b'\x89PNG'):
        assert word not in content
    with safe_open(written, 'np') as file:
        assert set(file.keys()) == {'confidence', 'looks', 'embeddings', 'predicted', 'true'}
        assert list(file.metadata()) == [HEADER_KEY]
    assert 'secretname' in str(outputs.names)  # there was something to hide


# ------------------------------------------------------------------------------------------------------- hostile files

def rewritten(path, header=None, drop=(), **arrays):
    """A reference with another header, or other arrays."""
    with safe_open(path, 'np') as file:
        facts = json.loads(file.metadata()[HEADER_KEY])
    facts.update(header or {})
    facts = {key: value for key, value in facts.items() if value != 'DROP'}
    kept = {key: value for key, value in {**load_file(path), **arrays}.items() if key not in drop}
    save_file(kept, path, {HEADER_KEY: json.dumps(facts)})


@pytest.mark.parametrize('change, said', [
    (dict(header={'digest': 'sha'}), 'garbled at digest'),
    (dict(header={'digest': 'DROP'}), 'does not tell digest'),
    (dict(header={'version': 2}), 'later version'),
    (dict(header={'images': 10 ** 12}), 'garbled at images'),
    (dict(header={'images': 71}), 'values are not'),
    (dict(header={'right': 73}), 'values are not'),
    (dict(header={'right': 'DROP'}), 'some, not all'),
    (dict(header={'threshold': -1}), 'garbled at threshold'),
    (dict(header={'class_names': ['a', 'b']}), 'arrays are not'),
    (dict(header={'class_names': [['a']]}), 'garbled at class_names'),
    (dict(header={'input_size': [3, 10 ** 9, 64]}), 'garbled at input_size'),
    (dict(drop=['looks']), 'arrays are not'),
    (dict(drop=['true']), 'values are not'),
    (dict(others=np.zeros(3)), 'arrays are not'),
    (dict(looks=np.zeros((72, 5), np.float32)), 'arrays are not'),
    (dict(looks=np.zeros((72, 6))), 'arrays are not'),
    (dict(confidence=np.full(72, np.nan, np.float32)), 'values are not'),
    (dict(confidence=np.full(72, 7, np.float32)), 'values are not'),
    (dict(confidence=np.zeros(20_000, np.float32), looks=np.zeros((20_000, 6), np.float32)), 'arrays are not'),
    (dict(embeddings=np.full((72, 128), np.inf, np.float32)), 'values are not'),
    (dict(embeddings=np.zeros((72, 129), np.float32)), 'arrays are not'),
    (dict(embeddings=np.zeros((1, 128), np.float32)), 'arrays are not'),
    (dict(projection=np.zeros((300, 64), np.float32)), 'arrays are not'),
    (dict(predicted=np.array([-1, 72, 1])), 'values are not'),
    (dict(predicted=np.array([2 ** 62, 2 ** 62, 72])), 'values are not'),
    (dict(predicted=np.zeros(3)), 'arrays are not'),
])
def test_a_reference_that_was_tampered_with_is_refused(change, said, written):
    rewritten(written, **change)
    with pytest.raises(PSTError, match=said) as refused:
        read_reference(written)
    assert 'reference.safetensors' in str(refused.value) and len(str(refused.value)) < 400


def test_a_reference_may_be_cut_anywhere(written):
    whole = written.read_bytes()
    for length in (0, 1, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        written.write_bytes(whole[:length])
        with pytest.raises(PSTError, match='truncated or not a safetensors file'):
            read_reference(written)
    written.write_bytes((2 ** 63).to_bytes(8, 'little') + whole[8:])
    with pytest.raises(PSTError, match='truncated'):
        read_reference(written)
    save_file({'fc.weight': np.zeros(3)}, written)
    with pytest.raises(PSTError, match='is no reference'):
        read_reference(written)
    with open(written, 'wb') as file:
        file.truncate(2 ** 30)  # takes no room
    with pytest.raises(PSTError, match='more than 256 MiB'):
        read_reference(written)


# ------------------------------------------------------------------------------------------------------- the check

def test_the_same_images_raise_no_alert_and_others_do(reference, outputs, subject, place):
    same = check(reference, batch_of(outputs), logits=outputs.logits)
    assert not same.alert and [result.name for result in same.tests] == [
        'embeddings', 'confidence', 'predicted classes', 'accuracy', 'brightness', 'contrast', 'sharpness', 'grain',
        'width', 'height']
    assert same.accuracy['measured'] == same.accuracy['reference']
    assert same.accuracy['estimated'] == pytest.approx(same.accuracy['reference'], abs=1e-6)
    low, high = same.accuracy['interval']
    assert low < same.accuracy['measured'] < high
    assert same.calibration['ece'] == same.calibration['reference_ece']
    assert same.calibration['temperature'] == pytest.approx(same.calibration['reference_temperature'])
    moved = Outputs.gather(answers(subject, open_images(subject, place[3], labels=False)))
    report = check(reference, batch_of(moved))
    assert report.alert and 'sharpness' in [result.name for result in report.tests if result.alert]
    assert report.accuracy['measured'] is None and report.calibration['ece'] is None
    assert json.loads(json.dumps(report.as_json()))['tests'][0]['name'] == 'embeddings'


def test_few_images_are_said(reference):
    few = check(reference, Batch(np.full(9, 0.5), np.zeros(9, int)))
    assert any('9 images are few' in note for note in few.notes)
    assert not any('few' in note for note in check(reference, Batch(np.full(50, 0.5), np.zeros(50, int))).notes)
    assert few.resolution > 0.5


def test_the_model_must_be_that_of_the_reference(reference, subject, place, tmp_path):
    assert check_subject(reference, subject).class_names == list(CLASSES)
    other = subject._replace(model=copy.deepcopy(subject.model))
    with torch.no_grad():
        other.model.fc.bias += 1e-3
    with pytest.raises(PSTError, match='has other weights than the model of the reference'):
        check_subject(reference, other)
    with pytest.raises(PSTError, match=r'input_size \[3, 64, 64\].*--img-size'):
        check_subject(reference, open_subject(str(place[1]), img_size=48, device='cpu'))


def test_labels_are_taken_where_folders_are_classes(subject, place, tmp_path):
    assert open_images(subject, place[3]).class_names == list(CLASSES)
    days = tmp_path / 'days'
    for name in ('monday', 'tuesday'):
        (days / name).mkdir(parents=True)
        open_image(next((place[3] / 'class0').iterdir())).save(days / name / '0.png')
    assert open_images(subject, days).class_names is None and len(open_images(subject, days)) == 2
    with pytest.raises(PSTError, match="knows no class 'monday'"):
        open_images(subject, days, labels=True)
    assert open_images(subject, place[2], labels=False).class_names is None
    assert len(open_images(subject, place[2], labels=False)) == 72  # those of the split
    # whatever it is called
    assert len(open_images(subject, place[2], split='val', labels=False)) == 72
    (place[2] / 'validation').rename(place[2] / 'val')
    (place[2] / 'train').mkdir()
    open_image(next(place[3].rglob('*.png'))).save(place[2] / 'train' / '0.png')
    try:
        assert len(open_images(subject, place[2], labels=False)) == 72
    finally:
        shutil.rmtree(place[2] / 'train')
        (place[2] / 'val').rename(place[2] / 'validation')


def test_a_model_without_names_takes_those_of_the_reference(place, tmp_path):
    """Or the folders of a later batch, some of the classes, would count from 0 anew."""
    bare = open_subject(str(make_source(tmp_path, names=())), device='cpu')
    assert open_images(bare, place[2]).class_names is None
    samples = open_images(bare, place[2], labels=True)
    reference = fit(bare, Outputs.gather(answers(bare, samples)), samples.class_names)
    assert reference.class_names == list(CLASSES) and not reference.named
    known = check_subject(reference, bare)
    some = tmp_path / 'some' / 'class2'
    some.mkdir(parents=True)
    open_image(next((place[3] / 'class2').iterdir())).save(some / '0.png')
    assert open_images(known, tmp_path / 'some').read(0)[1] == 2


# ------------------------------------------------------------------------------------------------------- answers

def test_answers_of_a_file(tmp_path):
    path = tmp_path / 'answers.csv'
    path.write_text('image,confidence,predicted,label\na,0.5,cat,dog\nb,1,2,cat\nc,0,dog,1\n')
    got = read_answers(path, ['cat', 'dog', 'owl', '2 dogs'])
    assert got.confidence.tolist() == [0.5, 1, 0] and got.predicted.tolist() == [0, 2, 1]
    assert got.labels.tolist() == [1, 0, 1] and got.looks is None
    path.write_text('confidence,predicted,label\n0.5,3,\n')
    assert read_answers(path, ['1', '3', '4', '5']).predicted.tolist() == [1]  # a name comes before a number
    assert read_answers(path, ['1', '3', '4', '5']).labels is None


def test_labels_that_came_for_some_answers_count(reference, tmp_path):
    path = tmp_path / 'answers.csv'
    path.write_text('confidence,predicted,label\n0.5,class0,\n0.6,class1,class1\n0.7,class2,class0\n0.8,class2,\n')
    got = read_answers(path, CLASSES)
    assert got.labels.tolist() == [-1, 1, 0, -1] and got.right.tolist() == [True, False]
    report = check(reference, got)
    assert report.accuracy['measured'] == 0.5 and [test.name for test in report.tests].count('accuracy') == 1
    # confidence 0.6 right and 0.7 wrong, each in a bin of its own
    assert report.calibration['ece'] == pytest.approx((0.4 + 0.7) / 2)


def test_folders_that_are_no_classes_are_told(subject, tmp_path, caplog):
    data = make_data(tmp_path / 'data', validation=1)
    (data / 'validation' / 'class1').rename(data / 'validation' / 'zebra')
    assert open_images(subject, data).class_names is None
    assert "The folders are not taken for labels: The model knows no class 'zebra'" in caplog.text


def test_answers_as_predict_writes_them(tmp_path):
    path = tmp_path / 'predictions.csv'
    path.write_text('image,class1,probability1,class2,probability2,error\na,dog,0.987654,cat,0.01,\nb,,,,,no image\n'
                    'c,cat,0.999999,dog,0.000001,\nd,zebra,0.5,dog,0.1,\n')
    with pytest.raises(PSTError, match="line 5: predicted 'zebra'"):  # counted with those of errors
        read_answers(path, ['cat', 'dog'])
    path.write_text(path.read_text().replace('zebra', 'dog'))
    got = read_answers(path, ['cat', 'dog'])
    assert got.confidence.tolist() == [0.9877, 1, 0.5] and got.predicted.tolist() == [1, 0, 1]


def test_digits_that_a_file_leaves_out_are_no_drift(reference):
    """A model that is sure of all: 0.9999999 in memory, 0.999999 or 1 in a file."""
    sure = np.random.default_rng(0).uniform(0.9999990, 0.9999999, 72).astype(np.float32)
    known = reference._replace(summary=reference.summary._replace(confidence=sure, threshold=float(sure.min())))
    for shown in (0.999999, 1.):
        report = check(known, Batch(np.full(72, shown).round(4), np.repeat(np.arange(3), reference.summary.predicted)))
        assert not report.alert and report.accuracy['estimated'] == 1


def test_answers_alone_are_compared(reference, outputs, written, tmp_path, capsys):
    confidence = outputs.probabilities.max(axis=1)
    lines = [f'{c},{CLASSES[k]}' for c, k in zip(confidence, outputs.logits.argmax(axis=1))]
    (tmp_path / 'same.csv').write_text('\n'.join(['confidence,predicted', *lines]))
    (tmp_path / 'other.csv').write_text('\n'.join(['confidence,predicted', *['0.34,class1'] * 72]))
    words = ['monitor', 'check', str(written), '--answers']
    assert main([*words, str(tmp_path / 'same.csv')]) == 0
    told = capsys.readouterr().out
    assert 'No alert' in told and 'embeddings' not in told and 'Embeddings and looks' in told
    assert main([*words, str(tmp_path / 'other.csv')]) == 3
    assert 'ALERT: confidence, predicted classes moved.' in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- the page

def test_the_page_shows_names_as_text(reference, outputs):
    hostile = reference._replace(architecture=EVIL, class_names=[EVIL, '$\\frac{', 'a & b'])
    report = replace(check(hostile, batch_of(outputs)), notes=[EVIL])
    page = render(report, hostile, batch_of(outputs))
    assert '<script' not in page and page.count('&lt;script&gt;alert(1)&lt;/script&gt;') == 2
    images = re.findall(r'<img alt="[^"]+" src="data:image/png;base64,([A-Za-z0-9+/=]+)">', page)
    assert len(images) == 2 and all(image.startswith('iVBORw0KGgo') for image in images)
    # nothing that is fetched, nothing that runs
    assert not re.search(r'(?:src|href)="(?!data:)', page) and 'http:' not in page and 'https:' not in page
    assert page.count('<tr') == page.count('</tr>') > 9


def test_the_page_marks_what_moved(reference):
    moved = Batch(np.full(60, 0.34), np.ones(60, int))
    report = check(reference, moved)
    page = render(report, reference, moved)
    assert 'Moved: confidence, predicted classes.' in page and page.count('class="alert"') == 2
    assert 'Nothing is seen to have moved' not in page


# ------------------------------------------------------------------------------------------------------- the command

def test_an_alert_as_a_cron_job_sees_it(place, tmp_path):
    """In a process of its own: exit code 3, a line on standard output, a report in each form."""
    _, source, data, blurred = place
    reference = str(tmp_path / 'reference.safetensors')
    assert main(['monitor', 'fit', str(source), '--data-dir', str(data), '-o', reference, '--device', 'cpu']) == 0
    alert = subprocess.run(
        [sys.executable, '-m', 'pst_timm', 'monitor', 'check', reference, str(source), '--data-dir', str(blurred),
         '--device', 'cpu', '-o', 'report.json', '-o', 'report.html'], cwd=tmp_path, env=script_env(),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert alert.returncode == 3 and re.search('^ALERT: .*sharpness.* moved', alert.stdout, re.MULTILINE), alert.stderr
    report = json.loads((tmp_path / 'report.json').read_text())
    assert report['alert'] and report['images'] == 72 and report['accuracy']['measured'] is not None
    assert (tmp_path / 'report.html').read_text().startswith('<!DOCTYPE html>')


def test_the_same_command_gives_the_same_report(place, written, tmp_path):
    words = ['monitor', 'check', str(written), str(place[1]), '--data-dir', str(place[2]), '--device', 'cpu', '-o']
    for name in ('a.json', 'b.json'):
        assert main([*words, str(tmp_path / name)]) == 0
    assert (tmp_path / 'a.json').read_text() == (tmp_path / 'b.json').read_text()


def test_broken_images_are_counted(place, written, tmp_path, capsys):
    folder = tmp_path / 'new'
    folder.mkdir()
    for i, path in enumerate(sorted((place[2] / 'validation').rglob('*.png'))):
        (folder / f'{i}.png').write_bytes(path.read_bytes() if i else b'no image')
    assert main(['monitor', 'check', str(written), str(place[1]), '--data-dir', str(folder), '--device', 'cpu']) == 0
    assert '1 image(s) could not be read' in capsys.readouterr().out


def test_help_tells_of_both_actions(capsys):
    for words, said in ((['--help'], 'compare new images'), (['fit', '--help'], '--output'), (
            ['check', '--help'], '--answers')):
        with pytest.raises(SystemExit) as stop:
            main(['monitor', *words])
        assert stop.value.code == 0 and said in capsys.readouterr().out
