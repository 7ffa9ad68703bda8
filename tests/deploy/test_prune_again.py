"""A pruning that was stopped goes on as it began, its teacher is the model as it was opened, and its source stays."""
import pytest
import torch
import torch.nn as nn

from pst_timm.checkpoints import load_model
from pst_timm.checkpoints.folder import save_folder
from pst_timm.cli import main
from pst_timm.deploy import prune_folder as module
from pst_timm.deploy.prune import reestimate_norms
from pst_timm.deploy.prune_folder import prune_to_folder
from pst_timm.utils.errors import Interrupted, PSTError
from tests.models.helpers import build

pytest.importorskip('torch_pruning')
NAMES = ['class0', 'class1', 'class2']


@pytest.fixture
def source(tmp_path):
    save_folder(build(num_classes=3, pretrained_cfg_overlay={'input_size': (3, 48, 48)}), tmp_path / 'source', NAMES)
    return str(tmp_path / 'source')


@pytest.fixture
def calls(monkeypatch):
    """What the trainings were asked for; each of them is stopped."""
    calls = []

    def finetune(*args, **kwargs):
        calls.append(args)
        raise Interrupted('Stopped.')

    monkeypatch.setattr(module, 'finetune', finetune)
    return calls


def stopped(source, folder, images, **kwargs):
    with pytest.raises(Interrupted):
        prune_to_folder(
            source, folder, data_args={'data_dir': str(images)}, images=8, round_to=8, teacher=source, **kwargs)


@pytest.mark.slow
def test_a_latency_is_not_measured_again_for_a_model_in_training(source, calls, images, tmp_path, monkeypatch):
    ratios = [0.5, 0.4, 0.3, 0.2]
    monkeypatch.setattr(module, 'ratio_for_latency', lambda *args, **kwargs: ratios.pop())
    share = {'share': 0.6}
    stopped(source, tmp_path / 'out', images, latency=share)
    begun = (tmp_path / 'out.finetune' / 'pruned-1' / 'model.safetensors').read_bytes()
    stopped(source, tmp_path / 'out', images, latency=share)
    assert len(ratios) == 3 and calls[0] == calls[1]
    assert (tmp_path / 'out.finetune' / 'pruned-1' / 'model.safetensors').read_bytes() == begun
    stopped(source, tmp_path / 'out', images, latency={'share': 0.5})
    stopped(source, tmp_path / 'out', images, latency={'share': 0.5}, overwrite=True)
    assert ratios == [0.5], 'another target and a new beginning are measured'


def test_the_teacher_is_the_model_as_it_was_opened(source, calls, images, tmp_path):
    stopped(source, tmp_path / 'plain', images, load_args=dict(arch=None, topk=None))
    stopped(source, tmp_path / 'fine', images, load_args=dict(arch=None, topk=2))
    plain, fine = (args[2] for args in calls)
    assert plain == source
    assert load_model(fine).inference_settings()['topk'] == 2
    assert torch.equal(load_model(fine).fc.weight, load_model(source).fc.weight)


def test_a_command_that_was_asked_to_stop_ends_with_the_code_of_that(source, calls, images, tmp_path, capsys):
    assert main(['prune', source, '-o', str(tmp_path / 'out'), '--data-dir', str(images), '--round-to', '8']) == 75
    assert capsys.readouterr().err.endswith('pst-timm prune: error: Stopped.\n') and len(calls) == 1


def test_the_source_is_not_written_over(source, capsys):
    with pytest.raises(PSTError, match='is where the checkpoint is read from'):
        prune_to_folder(f'local-dir:{source}', source, overwrite=True)
    assert main(['prune', f'local-dir:{source}', '-o', source, '--overwrite']) == 1
    assert 'is where the checkpoint is read from' in capsys.readouterr().err


def test_data_of_other_classes_is_told_with_what_can_be_done(tmp_path, images, capsys):
    words = ['prune', 'test_resnet_pst', '--no-pretrained', '-o', str(tmp_path / 'out'), '--data-dir', str(images)]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert 'has 3 classes' in said and 'name a model of these classes' in said and '--num-classes' not in said


def test_one_image_too_many_does_not_stop_what_is_pooled():
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    parts = torch.randn(5, 3, 8, 8).split(4)
    reestimate_norms(net, parts)
    assert torch.allclose(net[2].running_mean, net[:2](parts[0]).mean((0, 2, 3)), atol=1e-6)
