"""A new temperature: fitted where it is known, in the weights, and refused where it does not help."""
import json
import shutil

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image

from pst_timm.checkpoints import convert, load_model, read_checkpoint, temperature_of
from pst_timm.cli import main
from pst_timm.commands.recalibrate import main as command
from pst_timm.engine import train
from pst_timm.hub.publishing import publish
from pst_timm.review.answers import Outputs, Subject, answers, open_labelled, open_loose, open_subject
from pst_timm.review.recalibrate import bake_temperature, default_folder, recalibrate
from pst_timm.utils.errors import PSTError
from tests.checkpoints.helpers import build, images, run_args, save_checkpoint
from tests.engine.helpers import tiny_train_args, write_images
from tests.review.helpers import CLASSES, make_source

TRUE = 2.5  # by which the logits are too large
COUNT = 400


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A model, and images whose labels are drawn at its probabilities over a temperature."""
    root = tmp_path_factory.mktemp('recalibrate')
    source = make_source(root)
    model = load_model(source)
    generator = torch.Generator().manual_seed(0)
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 16, 16, 3), dtype=np.uint8)
    (root / 'loose').mkdir()
    for i in range(COUNT):
        Image.fromarray(pixels[i] // (1 + i % 5)).resize((64, 64)).save(root / 'loose' / f'{i:03}.png')
    subject = open_subject(str(source), device='cpu')
    logits = Outputs.gather(answers(subject, open_loose(subject, [root / 'loose']))).logits
    spread = float(logits.std(axis=0).mean())
    with torch.no_grad():  # logits that differ from image to image, and are not sure of one class
        model.fc.weight.mul_(4 / spread)
        model.fc.bias.sub_(torch.from_numpy(logits.mean(axis=0))).mul_(4 / spread)
    source = save_checkpoint(root / 'last.pth.tar', model, args=run_args(), facts=read_checkpoint(source).facts() | {
        'epoch': None, 'metric': None, 'args': None, 'ema': None})
    subject = open_subject(str(source), device='cpu')
    logits = torch.from_numpy(Outputs.gather(answers(subject, open_loose(subject, [root / 'loose']))).logits)
    labels = torch.multinomial((logits / TRUE).softmax(dim=1), 1, generator=generator).squeeze(1)
    for i, label in enumerate(labels.tolist()):
        folder = root / 'data' / 'validation' / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / 'loose' / f'{i:03}.png', folder)
    return source, root / 'data'


@pytest.fixture(scope='module')
def done(place, tmp_path_factory):
    """The folder of the calibrated model, and what was told."""
    folder = tmp_path_factory.mktemp('done') / 'calibrated'
    return recalibrate(open_subject(str(place[0]), device='cpu'), place[1], folder)


def test_the_temperature_is_found_and_helps(done):
    assert done.temperature == done.fit.temperature == pytest.approx(TRUE, rel=0.2)
    assert done.fit.loss_refitted < done.fit.loss and done.fit.ece_refitted < done.fit.ece and done.images == COUNT


def test_every_consumer_gets_calibrated_logits(place, done):
    old = load_model(place[0])
    x = images()
    with torch.inference_mode():
        expected = old(x) / done.temperature
        for source in (str(done.folder), f'local-dir:{done.folder}'):
            model = load_model(source)
            torch.testing.assert_close(model(x), expected)
            assert temperature_of(model) == pytest.approx(done.temperature)
            assert model.pretrained_cfg['label_names'] == list(CLASSES)
        by_timm = timm.create_model(f'local-dir:{done.folder}', pretrained=True).eval()
        torch.testing.assert_close(by_timm(x), expected)
        assert (by_timm(x).argmax(dim=1) == old(x).argmax(dim=1)).all()
    assert sorted(path.name for path in done.folder.iterdir()) == ['config.json', 'model.safetensors']
    config = json.loads((done.folder / 'config.json').read_text())
    assert config['temperature'] == pytest.approx(done.temperature) and 'temperature' not in config['pretrained_cfg']


def test_the_temperature_goes_along(done, tmp_path, capsys):
    told = pytest.approx(done.temperature)
    convert(done.folder, tmp_path / 'model.safetensors')
    convert(tmp_path / 'model.safetensors', tmp_path / 'model.pth.tar')
    convert(done.folder, tmp_path / 'half.safetensors', 'float16')
    publish(done.folder, 'acme/tiny', dry_run=True, folder=tmp_path / 'published')
    for source in ('model.safetensors', 'model.pth.tar', 'half.safetensors', 'published'):
        assert temperature_of(load_model(tmp_path / source)) == told, source
    assert temperature_of(load_model(f'local-dir:{tmp_path / "published"}')) == told
    assert temperature_of(load_model(f'local-dir:{tmp_path / "published"}', pretrained=False)) is None
    timm.create_model(f'local-dir:{tmp_path / "published"}', pretrained=True)
    image = tmp_path / 'image.png'
    Image.new('RGB', (64, 64), 'red').save(image)
    assert main(['predict', str(done.folder), str(image), '--device', 'cpu']) == 0
    assert f'calibrated probabilities (T = {done.temperature:.4g})' in capsys.readouterr().err


def test_what_is_calibrated_needs_no_second_time(place, done, tmp_path):
    subject = open_subject(str(done.folder), device='cpu')
    with pytest.raises(PSTError, match=r'no better calibrated on images held out: loss .*Nothing was written.*--force'):
        recalibrate(subject, place[1], tmp_path / 'again')
    assert not (tmp_path / 'again').exists()
    again = recalibrate(subject, place[1], tmp_path / 'again', force=True)
    assert again.fit.temperature == pytest.approx(1, abs=0.01)
    assert again.temperature == pytest.approx(done.temperature, rel=0.01)
    assert temperature_of(load_model(tmp_path / 'again')) == pytest.approx(again.temperature)


def test_images_that_tell_no_temperature_are_refused(place, tmp_path):
    source, data = place
    few = tmp_path / 'few'
    shutil.copytree(data, few)
    names = sorted((few / 'validation').rglob('*.png'))
    for path in names[20:]:
        path.unlink()
    for folder in (few / 'validation').iterdir():
        if not list(folder.iterdir()):
            folder.rmdir()
    with pytest.raises(PSTError, match='20 images are too few'):
        recalibrate(open_subject(str(source), device='cpu'), few, tmp_path / 'out')
    # every label is what the model says
    subject = open_subject(str(source), device='cpu')
    outputs = Outputs.gather(answers(subject, open_labelled(subject, data)))
    for name, label in zip(outputs.names, outputs.logits.argmax(axis=1)):
        folder = tmp_path / 'sure' / 'validation' / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(data / 'validation' / name, folder)
    with pytest.raises(PSTError, match=r'does not tell a temperature.*100.0% of the 400 images'):
        recalibrate(subject, tmp_path / 'sure', tmp_path / 'out', force=True)
    assert not (tmp_path / 'out').exists()


class Two(nn.Module):
    """Two classifiers, as models that were distilled have them."""

    def __init__(self, second):
        super().__init__()
        self.body = nn.Linear(12, 4)
        self.head, self.head_dist = nn.Linear(4, 3), second
        self.pretrained_cfg = {}

    def get_classifier(self):
        return self.head, self.head_dist

    def forward(self, x):
        x = self.body(x.flatten(1))
        return (self.head(x) + self.head_dist(x)) / 2


class Unit(nn.Linear):
    """Weights whose size does not matter."""

    def forward(self, x):
        return nn.functional.linear(x, nn.functional.normalize(self.weight), self.bias)


def test_all_classifiers_are_divided():
    subject = open_subject_of(Two(nn.Linear(4, 3)))
    x = torch.randn(2, 3, 2, 2)
    expected = subject.model(x) / 4
    bake_temperature(subject, 4.)
    torch.testing.assert_close(subject.model(x), expected)
    shared = Two(nn.Linear(4, 3))
    shared.head_dist = shared.head
    expected = shared(x) / 4
    bake_temperature(open_subject_of(shared), 4.)
    torch.testing.assert_close(shared(x), expected)


@pytest.mark.parametrize('second, said', [
    (nn.Sequential(nn.Linear(4, 3)), 'its classifier is a Sequential'),
    (nn.Identity(), 'its classifier is a Identity'),
    (Unit(4, 3), 'does not shrink with its weights'),
])
def test_other_classifiers_are_refused(second, said):
    with pytest.raises(PSTError, match=f'cannot take a temperature: .*{said}'):
        bake_temperature(open_subject_of(Two(second)), 2.)


def open_subject_of(model):
    return Subject(
        model.eval(), 'two', 'two.pth', list(CLASSES), True, 'RGB', (3, 2, 2), None, torch.device('cpu'))


@pytest.mark.parametrize('source, folder', [
    ('resnet18.a1_in1k', 'resnet18.a1_in1k-calibrated'), ('hf-hub:acme/tiny@v1', 'tiny-calibrated'),
    ('hf-hub:acme/tiny', 'tiny-calibrated')])
def test_models_by_name_are_written_here(source, folder):
    assert str(default_folder(source)) == folder


def test_models_of_files_are_written_beside_them(tmp_path, monkeypatch):
    (tmp_path / 'run.v1').mkdir()
    save_checkpoint(tmp_path / 'run.v1' / 'last.pth.tar', build())
    assert default_folder(str(tmp_path / 'run.v1')) == tmp_path / 'run.v1-calibrated'
    assert default_folder(f'local-dir:{tmp_path / "run.v1"}/') == tmp_path / 'run.v1-calibrated'
    assert default_folder(str(tmp_path / 'run.v1' / 'last.pth.tar')) == tmp_path / 'run.v1' / 'last-calibrated'
    monkeypatch.chdir(tmp_path / 'run.v1')
    assert default_folder('.') == tmp_path / 'run.v1-calibrated' and str(default_folder('b.pth')) == 'b-calibrated'
    assert default_folder(str(tmp_path / 'a.v2.safetensors')) == tmp_path / 'a.v2-calibrated'


def test_the_command(place, tmp_path, capsys):
    source = tmp_path / 'model.pth.tar'
    shutil.copy(place[0], source)
    before = source.read_bytes()
    words = [str(source), '--data-dir', str(place[1]), '--device', 'cpu']
    assert command(words) == 0
    out, err = capsys.readouterr()
    assert f'from {COUNT} images' in out and f'Written: {tmp_path / "model-calibrated"}' in out
    assert f'pst-timm predict {tmp_path / "model-calibrated"} IMAGE' in err
    assert command(words) == 1  # there already
    assert 'add --overwrite' in capsys.readouterr().err
    assert command([*words, '--overwrite']) == 0
    assert command([*words, '-o', str(tmp_path), '--overwrite']) == 1
    assert 'is where the checkpoint is read from' in capsys.readouterr().err
    assert source.read_bytes() == before


def test_settings_and_size_are_those_that_it_was_calibrated_at(place, tmp_path):
    subject = open_subject(str(place[0]), device='cpu', topk=2, img_size=96)
    recalibrate(subject, place[1], tmp_path / 'out', force=True)
    model = load_model(tmp_path / 'out')
    assert model.inference_settings()['topk'] == 2 and tuple(model.pretrained_cfg['input_size']) == (3, 96, 96)
    assert open_subject(str(tmp_path / 'out'), device='cpu').input_size == (3, 96, 96)


def test_what_is_trained_on_is_calibrated_no_more(done, tmp_path):
    data = write_images(tmp_path / 'data', {'train': 4, 'validation': 2})
    result = train(tiny_train_args(
        data, tmp_path / 'runs', model=f'local-dir:{done.folder}', pretrained=True, epochs=1, batch_size=4))
    assert temperature_of(load_model(result.best_checkpoint)) is None
