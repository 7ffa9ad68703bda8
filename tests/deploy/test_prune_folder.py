"""From a source to a pruned folder, by command and by call, and what the engine and the Hub make of the folder."""
import json
import sys

import pytest
import timm
import torch

from pst_timm.checkpoints import load_model
from pst_timm.checkpoints.folder import save_folder
from pst_timm.cli import main
from pst_timm.deploy import prune_folder
from pst_timm.deploy.prune import prune
from pst_timm.deploy.prune_folder import prune_to_folder, training_batches
from pst_timm.engine import train, validate, validate_args
from pst_timm.models.pruned import widths
from pst_timm.utils.errors import PSTError
from tests.engine.helpers import tiny_train_args
from tests.models.helpers import build
from tests.models.helpers import images as noise

pytest.importorskip('torch_pruning')

NAMES = ['class0', 'class1', 'class2']


@pytest.fixture(scope='module')
def model():
    return build(num_classes=3, pretrained_cfg_overlay={'input_size': (3, 48, 48)})


@pytest.fixture(scope='module')
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp('pruned') / 'model'
    save_folder(prune(model, 0.5, round_to=8), folder, NAMES)
    return folder


def fails(capsys, *words):
    code = None
    try:
        code = main(['prune', *map(str, words)])
    except SystemExit as e:
        code = e.code
    said = capsys.readouterr().err
    assert code, said
    return code, said[said.index('pst-timm prune: error: '):]


def test_without_images_it_is_cut_and_said_to_need_training(tmp_path, capsys):
    out = tmp_path / 'small'
    assert main(['prune', 'test_resnet_pst.digits', '-o', str(out), '--ratio', '0.4', '--topk', '2']) == 0
    said = capsys.readouterr().out
    assert 'train it further' in said and str(out) in said
    smaller = load_model(out)
    assert widths(smaller) != widths(load_model('test_resnet_pst.digits'))
    assert smaller.pretrained_cfg['label_names'] == list('0123456789') and smaller.inference_settings()['topk'] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ['small']
    assert fails(capsys, 'test_resnet_pst.digits', '-o', out)[0] == 1


@pytest.mark.parametrize('words, said', [
    (['--importance', 'taylor'], '--importance taylor needs images'),
    (['--', '--epochs', '1'], 'flags after -- are for the training, which needs --data-dir'),
    (['--ratio', '1'], 'expected a number between 0 and 1'),
    (['--ratio', '0.5', '--target-latency', '3'], 'not allowed with argument'),
    (['--target-latency', '1.2x'], 'expected a number between 0 and 1'),
    (['--target-latency', 'fast'], 'expected a number above 0'),
    (['--target-latency', '3', '--by', 'channels'], 'leave out --by'),
    (['--data-dir', 'x', '--no-finetune', '--', '--epochs', '1'], '--no-finetune leaves out'),
])
def test_flags_that_do_not_go_together_are_told(words, said, tmp_path, capsys):
    code, message = fails(capsys, 'test_resnet_pst.digits', '-o', tmp_path / 'out', *words)
    assert code == 2 and said in message and message.count('\n') == 1


def test_the_extra_is_named_where_it_is_absent(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch_pruning', None)
    code, message = fails(capsys, 'test_resnet_pst.digits', '-o', tmp_path / 'out')
    assert code == 1 and "pip install 'pst_timm[prune]'" in message and message.count('\n') == 1


def test_what_cannot_be_done_is_one_sentence(tmp_path, capsys):
    code, message = fails(capsys, 'test_resnet_pst.digits', '-o', tmp_path / 'out', '--ratio', '0.95')
    assert code == 1 and 'ask for less' in message and message.count('\n') == 1
    assert not (tmp_path / 'out').exists()


def test_a_latency_becomes_a_ratio(model, tmp_path, monkeypatch):
    asked = {}

    def found(whole, images=None, **options):
        asked.update(options)
        return 0.3

    monkeypatch.setattr(prune_folder, 'ratio_for_latency', found)
    save_folder(model, tmp_path / 'model')
    done = prune_to_folder(
        str(tmp_path / 'model'), tmp_path / 'out', latency={'milliseconds': 7.}, round_to=8, scope='global')
    assert asked == {'milliseconds': 7., 'round_to': 8, 'scope': 'global'}
    assert done.ratio == 0.3 and done.gmacs['after'] <= 0.7 * done.gmacs['before']


def test_training_images_come_with_their_labels(model, images):
    batches = training_batches(model, 'it', {'data_dir': str(images)}, images=20)
    x, labels = (torch.cat(part) for part in zip(*batches))
    assert x.shape == (20, 3, 48, 48) and set(labels.tolist()) == {0, 1, 2}
    again, other = (training_batches(model, 'it', {'data_dir': str(images)}, 20, seed)[0][0] for seed in (0, 1))
    assert torch.equal(again, batches[0][0]) and not torch.equal(other, again)
    with pytest.raises(PSTError, match=r'3 classes, and the model has 1000 without names'):
        training_batches(build(), 'it', {'data_dir': str(images)})


def test_it_is_trained_validated_and_published_as_any_other(folder, images, tmp_path, capsys):
    args = dict(model=f'local-dir:{folder}', pretrained=True, model_ema=True)
    done = train(tiny_train_args(images, tmp_path, epochs=1, **args))
    done = train(tiny_train_args(images, tmp_path, epochs=2, resume='auto', **args))
    assert len(done.history) == 1  # it went on
    checkpoint = done.output_dir / 'last.pth.tar'
    trained, before = load_model(checkpoint), load_model(folder)
    assert widths(trained) == widths(before)
    assert not torch.equal(trained.fc.weight, before.fc.weight)
    [result] = validate(validate_args(
        data_dir=str(images), checkpoint=str(checkpoint), batch_size=8, workers=0, device='cpu'))
    assert result['model'] == 'pruned' and result['top1'] >= 0
    assert main(['publish', str(checkpoint), '--repo-id', 'a/b', '--dry-run', '--folder', str(tmp_path / 'card')]) == 0
    assert 'a `test_resnet_pst` with fewer channels' in (tmp_path / 'card' / 'README.md').read_text()
    published = timm.create_model(f'local-dir:{tmp_path / "card"}', pretrained=True).eval()
    assert torch.equal(published(noise((48, 48))), trained(noise((48, 48))))


def test_it_learns_other_classes(folder):
    other = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=7).eval()
    assert other(noise((48, 48))).shape == (2, 7)
    assert torch.equal(other.conv_head.conv.weight, load_model(folder).conv_head.conv.weight)


@pytest.mark.slow
def test_it_is_trained_between_the_steps_and_after_them(model, images, tmp_path):
    pytest.importorskip('pst_timm.deploy.finetune')
    save_folder(model, tmp_path / 'model', NAMES)
    flags = dict(epochs=1, warmup_epochs=0, batch_size=16, workers=0, lr=0.01, device='cpu')
    done = prune_to_folder(
        str(tmp_path / 'model'), tmp_path / 'out', 0.4, data_args={'data_dir': str(images)}, images=16,
        teacher=str(tmp_path / 'model'), train_flags=flags, steps=2, round_to=8)
    work = tmp_path / 'out.finetune'
    assert done.checkpoint == work / 'run-2' / 'last.pth.tar'
    assert sorted(path.name for path in work.iterdir()) == ['pruned-1', 'pruned-2', 'run-1', 'run-2']
    cut = [json.loads((work / f'pruned-{i}' / 'config.json').read_text())['model_args']['channels'] for i in (1, 2)]
    assert len(cut[0]) <= len(cut[1]) and cut[0] != cut[1]
    smaller, trained = load_model(tmp_path / 'out'), load_model(done.checkpoint)
    x = noise((48, 48))
    assert torch.equal(smaller(x), trained(x)) and smaller.pretrained_cfg['label_names'] == NAMES
