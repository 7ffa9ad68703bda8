"""What an audit finds in data of which it is known what is wrong with them."""
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pst_timm.cli import main
from pst_timm.data.samples import Samples
from pst_timm.data.scores import score_labels
from pst_timm.engine import train, training
from pst_timm.engine.args import read_yaml
from pst_timm.review import crossing
from pst_timm.review.answers import Outputs, Subject, answers, open_labelled, open_subject
from pst_timm.review.audit import audit, check_folder, open_others, seen_in_training, write_report
from pst_timm.review.crossing import Cross, cross_answers, recipe_of
from pst_timm.review.findings import AuditReport
from pst_timm.review.sheet import Tile, draw_sheet, shown
from pst_timm.utils.errors import Interrupted, PSTError
from pst_timm.utils.files import read_csv
from tests.checkpoints.helpers import build, run_args, save_checkpoint
from tests.commands.bad_inputs import contents
from tests.data.test_duplicates import again, photo
from tests.engine.helpers import ROOT, TINY, script_env, tiny_train_args
from tests.review.helpers import CLASSES, make_source

NASTY = ('a,b.png', 'say "hi".png', '=1+1.png', "<script>alert('x')</script>.png".replace('/', '_'), 'two\nlines.png',
         'back\rto the start.png', '\x1b[31mred.png', ' space .png', 'кот.png')


class Bands(torch.nn.Module):
    """Knows the class of an image by its colour: red, green or blue; its embedding is a small copy of the image."""
    num_classes = 3

    def forward_features(self, x):
        return x

    def forward_head(self, x, pre_logits=False):
        return torch.nn.functional.adaptive_avg_pool2d(x, 6).flatten(1) if pre_logits else 30 * x.mean(dim=(2, 3))


def subject_of_bands():
    return Subject(
        Bands(), 'bands', 'bands', list(CLASSES), True, 'RGB', (3, 32, 32), to_tensor, torch.device('cpu'))


def to_tensor(image):
    return torch.from_numpy(np.array(image.resize((32, 32)))).permute(2, 0, 1).float() / 255


def tinted(label, seed, size=(64, 64)):
    """An image of its own whose colour tells its class."""
    pixels = np.asarray(photo(seed, size).convert('L')).astype(float)
    channels = [pixels * 0.5] * 3
    channels[label] = 127 + pixels * 0.5
    return Image.fromarray(np.stack(channels, axis=2).astype(np.uint8))


def write_data(folder, counts, start=0):
    """Class folders of such images; returns the data."""
    seed = start
    for split, count in counts.items():
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for n in range(count):
                tinted(label, seed).save(folder / split / name / f'{n:03d}.png')
                seed += 1
    return folder


def run(data, split='validation', **kwargs):
    subject = subject_of_bands()
    samples = open_labelled(subject, data, split)
    others = open_others(subject.mode, samples, data)
    return audit(subject, samples, others, split=split, **kwargs), samples, others


def test_flips_are_found_and_outweighed(tmp_path):
    data = write_data(tmp_path, {'validation': 30})
    flips = []
    for i in (3, 11, 20):
        target = data / 'validation' / 'class2' / f'flip{i}.png'
        (data / 'validation' / 'class0' / f'{i:03d}.png').rename(target)
        flips.append(f'class2/flip{i}.png')
    report, samples, _ = run(data)
    assert sorted(report.names[i] for i in report.order[:3]) == sorted(flips)
    assert {report.names[i] for i in np.flatnonzero(report.wrong)} == set(flips)
    rows = {row['image']: row for row in report.rows()}
    assert all(rows[name]['label'] == 'class2' and rows[name]['suggested'] == 'class0' for name in flips)
    assert sorted(int(rows[name]['wrong_rank']) for name in flips) == [1, 2, 3]
    weights = {row['image']: row['weight'] for row in report.weights()}
    assert all(weights[name] == 0 for name in flips)
    assert all(weight > 0 for name, weight in weights.items() if name not in flips)
    # and the scores are those of the model by hand
    outputs = Outputs.gather(answers(subject_of_bands(), samples))
    expected = score_labels(outputs.probabilities, outputs.labels)
    for got, want in zip(report.scores, expected):
        np.testing.assert_allclose(got, want, rtol=1e-9)
    line, = [line for line in report.summary() if line.startswith('Wrong labels: 3 of 90')]
    assert 'agrees with 96.7% of the given labels' in line and not any('NOTE' in line for line in report.summary())


def test_a_model_that_is_no_judge_takes_no_image_away(tmp_path):
    report, *_ = run(write_data(tmp_path, {'validation': 30}))
    report.scores = report.scores._replace(predicted=(report.labels + 1) % 3)
    report.wrong = np.ones(len(report.labels), bool)
    assert report.agreement == 0 and all(row['weight'] > 0 for row in report.weights())
    assert any(line.startswith('NOTE: a model that agrees with so few labels') for line in report.summary())


def test_only_classes_that_are_there_are_suggested(tmp_path):
    data = write_data(tmp_path, {'validation': 6})
    shutil.rmtree(data / 'validation' / 'class0')
    tinted(0, 77).save(data / 'validation' / 'class1' / 'stranger.png')
    report, _, _ = run(data)
    assert {row['suggested'] for row in report.rows()} <= {'class1', 'class2'}
    assert report.scores.self_confidence.max() <= 1 and np.isfinite(report.scores.loss).all()


def test_copies_across_splits_are_all_found_and_said_first(tmp_path):
    data = write_data(tmp_path, {'train': 12, 'validation': 10, 'test': 4})
    train, validation = data / 'train', data / 'validation'
    planted = {}
    for i, change in enumerate((
            None, lambda im: im.resize((32, 32)), lambda im: im.resize((100, 90)), lambda im: again(im, 40))):
        for label, name in enumerate(CLASSES):
            source = train / name / f'{i:03d}.png'
            target = validation / CLASSES[(label + (i == 3)) % 3] / f'copy{i}{name}.png'
            if change is None:
                shutil.copyfile(source, target)
            else:
                change(Image.open(source)).save(target)
            planted[target.relative_to(validation).as_posix()] = f'{name}/{i:03d}.png'
    shutil.copyfile(validation / 'class1' / '005.png', validation / 'class1' / 'within.png')
    shutil.copyfile(validation / 'class2' / '005.png', data / 'test' / 'class2' / 'leak.png')
    report, _, others = run(data)
    assert list(others) == ['train', 'test']
    leaks = {copy.image: copy for copy in report.leaks if copy.of_split == 'train'}
    assert {name: copy.of for name, copy in leaks.items()} == planted
    assert [leaks[f'class0/copy{i}class0.png'].exact for i in range(3)] == [True, False, False]
    [other] = [copy for copy in report.leaks if copy.of_split == 'test']
    assert (other.image, other.of, other.exact) == ('class2/005.png', 'class2/leak.png', True)
    [within] = [copy for copy in report.copies if copy.of_split == 'validation']
    assert (within.image, within.of) == ('class1/within.png', 'class1/005.png')
    first, second, *_ = report.summary()
    assert first.startswith("LEAKAGE: 12 images of 'validation' are in 'train' too (3 pixel by pixel, 9 nearly), 3 of ")
    assert second.startswith("LEAKAGE: 1 image of 'validation' is in 'test' too")


def test_images_of_a_split_without_classes_have_no_other_label(tmp_path):
    data = write_data(tmp_path, {'validation': 4})
    (data / 'test').mkdir()
    shutil.copyfile(data / 'validation' / 'class2' / '001.png', data / 'test' / 'x.png')
    report, _, _ = run(data)
    assert "is in 'test' too (1 pixel by pixel, 0 nearly), such as" in report.summary()[0]
    assert report.duplicates() == [dict(
        image='class2/001.png', label='class2', duplicate_of='x.png', split='test', its_label='', kind='same pixels',
        likeness=1.0)]


def test_clean_data_are_not_accused(tmp_path):
    report, _, _ = run(write_data(tmp_path, {'train': 10, 'validation': 10}))
    assert not report.copies and not report.wrong.any() and not report.odd.any() and not report.broken
    assert report.summary()[:2] == [
        'Leakage: none found.',
        'Wrong labels: none of 30 looks wrong; the model agrees with 100.0% of the given labels.']


def test_leakage_is_not_denied_where_nothing_was_compared(tmp_path):
    report, _, _ = run(write_data(tmp_path, {'validation': 4}))
    assert report.summary()[0].startswith('Leakage: not looked for')


def test_odd_broken_and_far_images_are_named(tmp_path):
    data = write_data(tmp_path, {'train': 2, 'validation': 12})
    place = data / 'validation' / 'class1'
    tinted(1, 500, (640, 20)).save(place / 'long.png')
    (place / 'broken.png').write_bytes(b'no image')
    (data / 'train' / 'class0' / 'torn.png').write_bytes(b'\x89PNG')
    report, _, _ = run(data)
    assert report.broken == ['class1/broken.png'] and report.broken_elsewhere['train'] == ['class0/torn.png']
    assert [report.names[i] for i in np.flatnonzero(report.odd)] == ['class1/long.png']
    rows = {row['image']: row for row in report.rows()}
    assert (rows['class1/long.png']['width'], rows['class1/long.png']['height']) == (640, 20)
    assert rows['class1/broken.png']['broken'] == 'yes' and rows['class1/broken.png']['loss'] == ''
    assert len(rows) == 38
    text = '\n'.join(report.summary())
    assert "cannot be read: class1/broken.png" in text and "of 'train' cannot be read: class0/torn.png" in text
    assert 'class1/broken.png' not in {row['image'] for row in report.weights()}


def test_an_image_unlike_all_others_is_an_outlier():
    report = AuditReport(
        'x', ['a', 'b'], list(CLASSES), np.zeros(2, int), score_labels(np.full((2, 3), 1 / 3), np.zeros(2, int)),
        np.zeros(2, bool), np.zeros(2, bool), np.arange(2), np.zeros(2, int), np.array([0., 7.]), np.zeros(2, bool),
        np.ones((2, 2), int), [], [])
    assert report.outliers.tolist() == [False, True] and 'Outliers: 1 image: b.' in report.summary()


@pytest.mark.parametrize('sheet', ['sheet.png', 'sheet.pdf'])
def test_nasty_names_come_through_and_steer_nothing(tmp_path, sheet):
    data = write_data(tmp_path / 'data', {'train': 3, 'validation': 3})
    for i, name in enumerate(NASTY):
        tinted(0, 900 + i).save(data / 'validation' / 'class1' / name)
        shutil.copyfile(data / 'validation' / 'class1' / name, data / 'train' / 'class0' / name)
    before = contents(data)
    report, samples, others = run(data)
    written = write_report(report, tmp_path / 'out', samples, others, sheet)
    assert contents(data) == before
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {path.name for path in written} == {
        'audit.csv', 'weights.csv', 'duplicates.csv', sheet}
    expected = {f'class1/{name}' for name in NASTY}
    assert expected < {row['image'] for row in read_csv(tmp_path / 'out' / 'audit.csv')}
    assert {row['image'] for row in read_csv(tmp_path / 'out' / 'weights.csv')} == set(samples.names)
    assert {row['image'] for row in read_csv(tmp_path / 'out' / 'duplicates.csv')} == expected
    text = report.summary()
    assert all(line.isprintable() for line in text)
    if sheet.endswith('png'):
        assert Image.open(tmp_path / 'out' / sheet).width > 1000
    else:
        assert (tmp_path / 'out' / sheet).read_bytes().startswith(b'%PDF')


def test_names_that_are_no_text_can_be_written(tmp_path):
    data = write_data(tmp_path / 'data', {'validation': 2})
    os.rename(data / 'validation' / 'class0' / '000.png', os.fsencode(data / 'validation' / 'class0') + b'/\xff.png')
    report, samples, others = run(data)
    write_report(report, tmp_path / 'out', samples, others)
    assert r'class0/\udcff.png' in {row['image'] for row in read_csv(tmp_path / 'out' / 'audit.csv')}


def test_a_sheet_shows_small_images_as_they_are_and_long_lines_cut(tmp_path):
    small = shown(Image.new('RGB', (2, 1), 'red'))
    assert small.size == (144, 72)
    draw_sheet(tmp_path / 'a.png', {'Heading ' * 100: [Tile(small, ['x' * 500, 'b'])] * 9})
    page = np.asarray(Image.open(tmp_path / 'a.png'))
    assert (page.reshape(-1, 3) == [255, 0, 0]).all(axis=1).sum() == 9 * 144 * 72
    assert (page[:, -10:] == 255).all()  # nothing runs over the edge
    draw_sheet(tmp_path / 'b.png', {})
    assert (np.asarray(Image.open(tmp_path / 'b.png')) < 128).any()


def test_who_was_trained_on_the_split_is_told(tmp_path):
    source = save_checkpoint(tmp_path / 'last.pth.tar', build(), args=run_args(train_split='images'))
    assert 'says that it was trained on the split' in seen_in_training(str(source), 'images')
    assert seen_in_training(str(source), 'validation') is None
    source = save_checkpoint(tmp_path / 'last.pth.tar', build(), args=run_args(train_split='train'))
    assert 'by heart' in seen_in_training(str(source), 'training')
    assert 'models are trained on' in seen_in_training('test_resnet_pst', 'train')


# --cross

def tiny_cross(folder, folds=2, **flags):
    values = {**TINY, 'epochs': 1, 'batch_size': 4, 'data_on_device': True, **flags}
    return dict(flags=values, folds=folds, folder=folder, device='cpu')


@pytest.fixture
def crossed_data(tmp_path):
    return write_data(tmp_path / 'data', {'train': 6})


def loose_samples(data):
    subject = subject_of_bands()
    samples = open_labelled(subject, data, 'train')
    return samples, [CLASSES.index(name.split('/')[0]) for name in samples.names]


def seen_and_scored(folder, fold):
    """What the model of a fold was trained on, and what it answered to, by what the links lead to."""
    seen = {path.resolve() for path in (folder / str(fold) / 'data' / 'train').glob('*/*/*')}
    return seen, {path.resolve() for path in (folder / 'parts' / str(fold)).glob('*/*')}


def test_each_image_is_scored_once_by_a_model_that_has_not_seen_it(crossed_data, tmp_path, monkeypatch):
    samples, labels = loose_samples(crossed_data)
    opened, scored = [], []

    def spied(run):
        opened.append([Path(name).resolve() for name in run.data.train.dataset.filenames(absolute=True)])

    monkeypatch.setattr(training, 'share_statistics', spied)
    answers_of = crossing.answers_of

    def answered(subject, part, *args, **kwargs):
        scored.append([path.resolve() for path in part.paths])
        return answers_of(subject, part, *args, **kwargs)

    monkeypatch.setattr(crossing, 'answers_of', answered)
    flags = dict(data_on_device=False)
    found = cross_answers(samples, labels, Cross(**tiny_cross(tmp_path / 'folds', 3, **flags)))
    everything = {path.resolve() for path in samples.paths}
    assert sorted(path for part in scored for path in part) == sorted(everything)
    assert len(opened) == len(scored) == 3
    for fold in range(3):
        seen, mine = seen_and_scored(tmp_path / 'folds', fold)
        assert set(opened[fold]) == seen and len(opened[fold]) == len(seen)
        assert set(scored[fold]) == mine and not seen & mine and seen | mine == everything
        assert {samples.paths[i].resolve() for i in np.flatnonzero(found.folds[0] == fold)} == mine
    assert found.probabilities.shape == (18, 3) and found.probabilities.sum(axis=1) == pytest.approx(1)
    # what came out is what the model in the folder of the fold says
    for fold in range(3):
        subject = open_subject(str(tmp_path / 'folds' / str(fold) / 'run'), device='cpu')
        mine = np.flatnonzero(found.folds[0] == fold)
        again = Outputs.gather(answers(subject, samples.subset(mine, subject.transform)))
        assert subject.class_names == ['00000', '00001', '00002']
        np.testing.assert_allclose(found.probabilities[mine], again.probabilities, atol=1e-6)


def test_a_class_out_of_order_keeps_its_column(crossed_data, tmp_path, monkeypatch):
    """With a model that knows more classes, in another order, than the data have."""
    samples, _ = loose_samples(crossed_data)
    names = ['zebra', 'class2', 'class0', 'ape', 'class1']
    labels = [names.index(name.split('/')[0]) for name in samples.names]
    samples.class_names = names
    found = cross_answers(samples, labels, Cross(**tiny_cross(tmp_path / 'folds', epochs=4)))
    assert (found.probabilities[:, [0, 3]] == 0).all() and found.probabilities.sum(axis=1) == pytest.approx(1)


def test_an_interrupted_audit_goes_on_where_it_was(crossed_data, tmp_path, monkeypatch):
    samples, labels = loose_samples(crossed_data)
    whole = cross_answers(samples, labels, Cross(**tiny_cross(tmp_path / 'whole')))
    trained, real = [], crossing.train

    def stopping(args):
        trained.append(Path(args.output).name)
        if len(trained) == 2:
            raise Interrupted('Stopped.')
        return real(args)

    monkeypatch.setattr(crossing, 'train', stopping)
    with pytest.raises(Interrupted):
        cross_answers(samples, labels, Cross(**tiny_cross(tmp_path / 'folds')))
    first = tmp_path / 'folds' / '0' / 'run' / 'last.pth.tar'
    before = first.stat().st_mtime_ns
    with pytest.raises(PSTError, match='--resume auto goes on with them'):
        cross_answers(samples, labels, Cross(**tiny_cross(tmp_path / 'folds')))
    found = cross_answers(samples, labels, Cross(**tiny_cross(tmp_path / 'folds'), resume=True))
    assert trained == ['0', '1', '1'] and first.stat().st_mtime_ns == before
    np.testing.assert_array_equal(found.probabilities, whole.probabilities)
    for changed, named in (
            (dict(epochs=2), '--epochs'), (dict(folds=3), '--cross'), (dict(lr=0.01), '--lr')):
        with pytest.raises(PSTError, match=f'written for another audit.*{named}'):
            cross_answers(samples, labels, Cross(**tiny_cross(tmp_path / 'folds', **changed), resume=True))
    swapped = [labels[-1], *labels[1:-1], labels[0]]
    with pytest.raises(PSTError, match='the images or their labels'):
        cross_answers(samples, swapped, Cross(**tiny_cross(tmp_path / 'folds'), resume=True))
    trained.clear()
    monkeypatch.setattr(crossing, 'train', real)
    kept = contents(crossed_data)
    cross_answers(samples, labels, Cross(**tiny_cross(tmp_path / 'folds', epochs=2), overwrite=True))
    assert contents(crossed_data) == kept  # the links went, and not what they lead to


@pytest.mark.slow
def test_a_killed_audit_goes_on(crossed_data, tmp_path):
    """SIGKILL in the second training of the command, in a process of its own."""
    code = (
        'import os, signal, sys\n'
        'from pst_timm.engine import training\n'
        'backward, steps = training.backward, [0]\n'
        'def dying(*args):\n'
        '    backward(*args)\n'
        '    steps[0] += 1\n'
        '    if steps[0] == 3: os.kill(os.getpid(), signal.SIGKILL)\n'
        'training.backward = dying\n'
        'from pst_timm.cli import main\n'
        'sys.exit(main(sys.argv[1:]))')
    (tmp_path / 'recipe.yaml').write_text(
        'model: test_resnet_pst\nimg_size: 32\nbatch_size: 4\nworkers: 0\nepochs: 1\nlr: 0.05\nwarmup_epochs: 0\n'
        'hflip: 0.0\ncolor_jitter: 0.0\n')
    words = [
        'audit', '--cross', '2', '--config', str(tmp_path / 'recipe.yaml'), '--data-dir', str(crossed_data),
        '--split', 'train', '--device', 'cpu', '--output', str(tmp_path / 'out')]
    killed = subprocess.run(
        [sys.executable, '-c', code, *words], cwd=ROOT, env=script_env(), capture_output=True, timeout=300)
    assert killed.returncode == -9, killed.stderr
    assert (tmp_path / 'out' / 'folds' / '0' / 'finished.json').is_file()
    assert not (tmp_path / 'out' / 'audit.csv').exists()
    first = tmp_path / 'out' / 'folds' / '0' / 'run' / 'last.pth.tar'
    before = first.stat().st_mtime_ns
    assert main(words) == 1
    assert main([*words, '--resume', 'auto']) == 0
    assert first.stat().st_mtime_ns == before
    assert len(read_csv(tmp_path / 'out' / 'audit.csv')) == 18


def test_copies_are_not_parted_by_the_folds(crossed_data, tmp_path):
    for i in range(4):
        shutil.copyfile(crossed_data / 'train' / 'class0' / '000.png', crossed_data / 'train' / 'class1' / f'c{i}.png')
    subject = subject_of_bands()
    samples = open_labelled(subject, crossed_data, 'train')
    report = audit(subject, samples, split='train', cross=Cross(**tiny_cross(tmp_path / 'folds')))
    assert len(report.copies) == 4
    parts = [{path.resolve().name for path in (tmp_path / 'folds' / 'parts' / fold).glob('*/*')} for fold in '01']
    copies = [{'c0.png', 'c1.png', 'c2.png', 'c3.png'} & part for part in parts]
    assert sorted(map(len, copies)) == [0, 4]


@pytest.mark.parametrize('folds, images, said', [
    (2, {'class0': 1}, "The class class0 has too few different images"), (40, {}, '--cross 40: there are not so many')])
def test_what_cannot_be_dealt_is_named(crossed_data, tmp_path, folds, images, said):
    for name, count in images.items():
        for path in sorted((crossed_data / 'train' / name).iterdir())[count:]:
            path.unlink()
    samples, labels = loose_samples(crossed_data)
    with pytest.raises(PSTError, match=said):
        cross_answers(samples, labels, Cross(**tiny_cross(tmp_path / 'folds', folds)))
    assert not (tmp_path / 'folds').exists()


def test_the_recipe_of_a_checkpoint_fetches_opens_and_imports_nothing(tmp_path, caplog):
    facts = {'arch': 'test_resnet_pst', 'model_args': {'pst_depth': 1}, 'recipe': {
        'lr': 0.01, 'epochs': 3, 'gp': 'avg', 'model': 'hf-hub:evil/model', 'model_kwargs': {'cache_dir': '/tmp/x'},
        'device_modules': ['evil'], 'pretrained': True, 'pretrained_path': '/etc/passwd',
        'initial_checkpoint': 'http://evil/x.pth', 'trunk_checkpoint': 'evil', 'kd_model_name': 'hf-hub:evil/teacher',
        'num_classes': 3, 'data_dir': '/secret', 'output': '/etc', 'resume': '/etc/x', 'unknown': 1}}
    source = save_checkpoint(tmp_path / 'last.pth.tar', build(), facts=facts)
    assert recipe_of(str(source)) == dict(
        lr=0.01, epochs=3, gp='avg', model='test_resnet_pst', model_kwargs={'pst_depth': 1})
    assert 'was trained with --pretrained and --pretrained-path and --initial-checkpoint' in caplog.text
    for bad in (make_source(tmp_path), 'test_resnet_pst'):
        with pytest.raises(PSTError, match='does not tell how it was trained'):
            recipe_of(str(bad))


@pytest.mark.slow
def test_the_recipe_of_a_run_trains_its_folds_but_for_the_flags_that_follow(crossed_data, tmp_path, capsys):
    shutil.copytree(crossed_data / 'train', crossed_data / 'validation')
    result = train(tiny_train_args(
        crossed_data, tmp_path, epochs=1, img_size=32, batch_size=4, lr=0.0123, model_kwargs={'pst_depth': 1}))
    words = [
        'audit', str(result.output_dir), '--data-dir', str(crossed_data), '--split', 'train', '--cross', '2',
        '--device', 'cpu', '--output', str(tmp_path / 'out')]
    assert main([*words, '--', '--epochs', '2', '--log-interval', '7']) == 0
    for fold in '01':
        args = read_yaml(str(tmp_path / 'out' / 'folds' / fold / 'run' / 'args.yaml'))
        assert (args['model'], args['lr'], args['img_size'], args['batch_size']) == ('test_resnet_pst', 0.0123, 32, 4)
        assert (args['epochs'], args['log_interval'], args['val_split'], args['num_classes']) == (2, 7, '', None)
        assert args['model_kwargs']['pst_depth'] == 1
    # an audit that is done asks before it is done again, and then keeps the folds
    out = capsys.readouterr().out
    assert out.startswith("LEAKAGE: 18 images of 'train' are in 'validation' too (18 pixel by pixel")
    assert main([*words, '--resume', 'auto', '--', '--epochs', '2']) == 1
    assert main([*words, '--resume', 'auto', '--overwrite', '--', '--epochs', '2']) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize('mirror, crops', [(False, False), (True, False), (False, True), (True, True)])
def test_answers_are_the_means_over_the_views_of_an_image(tmp_path, mirror, crops):
    data = write_data(tmp_path, {'validation': 2})
    subject = subject_of_bands()
    samples = open_labelled(subject, data)
    found = crossing.answers_of(subject, samples, mirror=mirror, crops=crops)
    for i in range(len(samples)):
        image = samples[i].image
        views = [image]
        if crops:  # 28 of 32 pixels, from the corners and the middle
            views = [torch.nn.functional.interpolate(image[None, :, y:y + 28, x:x + 28], (32, 32), mode='bicubic')[0]
                     for y, x in ((0, 0), (0, 4), (4, 0), (4, 4), (2, 2))]
        views += [view.flip(-1) for view in views] if mirror else []
        outputs = [subject.model.forward_head(view[None], pre_logits) for pre_logits in (0, 1) for view in views]
        logits, embeddings = (torch.cat(part).mean(dim=0) for part in (outputs[:len(views)], outputs[len(views):]))
        np.testing.assert_allclose(found.logits[i], logits, atol=1e-4)
        np.testing.assert_allclose(found.embeddings[i], embeddings, atol=1e-5)


def test_repeats_deal_anew_and_are_averaged(crossed_data, tmp_path):
    samples, labels = loose_samples(crossed_data)
    both = cross_answers(samples, labels, Cross(**tiny_cross(tmp_path / 'folds'), repeats=2))
    one, two = (cross_answers(samples, labels, Cross(**tiny_cross(tmp_path / name), seed=seed, resume=True))
                for seed, name in enumerate(('folds', 'folds-2')))
    np.testing.assert_allclose(both.probabilities, (one.probabilities + two.probabilities) / 2)
    np.testing.assert_array_equal(both.folds, [one.folds[0], two.folds[0]])
    assert (both.folds[0] != both.folds[1]).any()


# the folder

def test_what_is_there_is_kept_without_overwrite(tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'audit.csv').write_text('mine')
    with pytest.raises(PSTError, match='is there already'):
        check_folder(tmp_path / 'out')
    check_folder(tmp_path / 'out', overwrite=True)
    check_folder(tmp_path / 'new')
    assert not (tmp_path / 'new').exists()
    with pytest.raises(PSTError, match='there is no folder'):
        check_folder(tmp_path / 'no' / 'where')


@pytest.mark.parametrize('place', ['data/validation', 'data/validation/class0', 'data/validation/new', 'link'])
def test_images_stay_what_they_are(tmp_path, place):
    data = write_data(tmp_path / 'data', {'validation': 1})
    (tmp_path / 'link').symlink_to(data / 'validation')
    with pytest.raises(PSTError, match='is among the images'):
        check_folder(tmp_path / place, data=data / 'validation')


def test_the_command_says_where_everything_is(tmp_path, capsys):
    data = write_data(tmp_path / 'data', {'train': 3, 'validation': 3})
    source = make_source(tmp_path)
    words = ['audit', str(source), '--data-dir', str(data), '-o', str(tmp_path / 'out'), '--device', 'cpu']
    assert main([*words, '--split', 'train']) == 0
    out = capsys.readouterr().out
    assert out.startswith("NOTE: 'train' is what models are trained on") and out.count('Written: ') == 4
    assert 'Leakage: none found.' in out
    rows = {name: (tmp_path / 'out' / name).read_bytes() for name in ('audit.csv', 'weights.csv', 'duplicates.csv')}
    assert main([*words, '--split', 'train']) == 1
    assert main([*words, '--split', 'train', '--overwrite', '--workers', '1', '--batch-size', '2']) == 0
    # rounding of other batches aside, the same command says the same
    for name in ('duplicates.csv',):
        assert (tmp_path / 'out' / name).read_bytes() == rows[name]
    again = read_csv(tmp_path / 'out' / 'audit.csv')
    assert [row['image'] for row in again] == [row['image'] for row in read_csv_text(rows['audit.csv'])]


def read_csv_text(content):
    import csv

    return list(csv.DictReader(io.StringIO(content.decode())))


def test_images_without_labels_cannot_be_audited(tmp_path):
    photo(0).save(tmp_path / 'a.png')
    with pytest.raises(PSTError, match='have no labels'):
        audit(subject_of_bands(), Samples.loose([tmp_path], to_tensor))
