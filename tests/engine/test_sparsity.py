"""The penalty on batch-norm scales is what it says, whatever else trains the model, and nothing where it is off."""
import sys

import pytest
import timm
import torch
import torch.nn as nn

from pst_timm.engine import train, training
from pst_timm.engine.args import write_yaml
from pst_timm.engine.batches import LabelledImages
from pst_timm.engine.sparsity import CoupledScales, Sparsity, coupled_scales
from pst_timm.engine.training import prepare
from pst_timm.utils.errors import Interrupted, PSTError

from .helpers import assert_same_weights, load_weights, tiny_train_args
from .test_distributed import torchrun
from .test_resume import at_step, stop_politely

pytest.importorskip('torch_pruning')

# what hangs together in timm's test_resnet, read off its code: what a residual connection adds to, and the rest alone
TOGETHER = [
    ['bn1', 'layer1.0.bn2'], ['layer2.0.bn2', 'layer2.0.downsample.2'], ['layer3.0.bn3', 'layer3.0.downsample.2'],
    ['layer4.0.bn2', 'layer4.0.downsample.2']]
ALONE = [
    'conv1.1', 'conv1.4', 'layer1.0.bn1', 'layer2.0.bn1', 'layer3.0.bn1', 'layer3.0.bn2', 'layer4.0.bn1']


def penalty(model):
    """The mathematics again: the sum over channels of the norm of the scales that belong to each."""
    with torch.autocast('cpu', enabled=False):
        scales = dict(model.named_parameters())
        groups = [*TOGETHER, *([name] for name in ALONE)]
        return sum(
            torch.stack([scales[f'{name}.weight'].double() for name in group]).square().sum(dim=0).sqrt().sum()
            for group in groups)


@pytest.fixture
def in_the_loss(monkeypatch):
    """Have the penalty in the loss, where autograd finds its gradient."""
    plain = LabelledImages.loss

    def use(weight):
        monkeypatch.setattr(LabelledImages, 'loss', lambda self, task, batch: (
            plain(self, task, batch) + weight * penalty(task.trainable_module)))
        return monkeypatch.undo

    return use


def tiny(images, folder, **values):
    # scales that begin at zero have no slope, and no norm that autograd differentiates
    return tiny_train_args(images, folder, **{
        'model': 'test_resnet', 'epochs': 1, 'model_kwargs': dict(zero_init_last=False), 'lr': 0.02, **values})


@pytest.mark.parametrize('flags', [
    {},
    # 6 batches; the last group is smaller
    dict(amp=True, amp_dtype='bfloat16', opt='adamw', lr=0.002, grad_accum_steps=4, model_ema=True),
    pytest.param(dict(opt='lookahead_momentum', channels_last=True), marks=pytest.mark.slow),
    pytest.param(dict(torchscript=True), marks=pytest.mark.slow),
], ids=['plain', 'accumulated-amp', 'lookahead', 'scripted'])
def test_it_equals_a_penalty_in_the_loss(images, tmp_path, in_the_loss, flags):
    def trained(name, **more):
        return load_weights(train(tiny(images, tmp_path / name, **flags, **more)).output_dir / 'last.pth.tar')

    hooked = trained('hook', sparsity_weight=0.05)
    undo = in_the_loss(0.05)
    expected = trained('loss')
    undo()
    without = trained('none')
    names = [k for k, v in expected.items() if v.is_floating_point()]
    far = max((hooked[k] - expected[k]).abs().max().item() for k in names)
    effect = max((without[k] - expected[k]).abs().max().item() for k in names)
    assert far < 1e-3 * effect, (far, effect)


def test_the_force_points_at_zero_and_stops_there():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0., 3., -4., 1.]))
    # channels 0 and 3 on their own, 1 and 2 together
    scales = CoupledScales(['1.weight'], torch.tensor([[0, -1], [1, 2], [3, -1]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.)
    Sparsity(scales, model, 0.5).attach(optimizer)
    optimizer.step()  # without any other gradient
    torch.testing.assert_close(model[1].weight.detach(), torch.tensor([0., 3. - 0.3, -4. + 0.4, 0.5]))


def test_channels_that_hang_together_are_found_for_models_with_attention():
    """Fine attention cannot be followed; the model is left as it is."""
    model = timm.create_model('test_resnet_pst', num_classes=3, topk=4).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    scales = coupled_scales(model, (3, 48, 48), 'it')
    assert model.training and model.inference_settings()['topk'] == 4
    assert_same_weights(model.state_dict(), before)
    assert not [name for name in scales.names if '.attn.' in name]
    assert {'fuse_merge.bn.weight', 'layer4.0.bn1.weight', 'pst.blocks.0.mlp.0.bn.weight'} <= set(scales.names)
    used = scales.places[scales.places >= 0]
    assert len(used) == len(used.unique()), 'no scale is in two groups'


def test_a_loss_scaler_that_a_fused_optimizer_takes_out_does_not_weaken_it():
    def step(scaled):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        places = torch.arange(4).unsqueeze(1)
        Sparsity(CoupledScales(['1.weight'], places), model, 0.5).attach(optimizer)
        loss = model(torch.randn(2, 3, 4, 4)).square().sum()
        scaler = torch.amp.GradScaler('cpu', init_scale=1024., enabled=scaled)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        return model[1].weight.detach()

    torch.testing.assert_close(step(True), step(False))


def test_a_stopped_run_goes_on_bit_for_bit(images, tmp_path, monkeypatch, caplog):
    flags = dict(epochs=2, sparsity_weight=0.05, opt='adamw', lr=0.002)
    with caplog.at_level('INFO'):
        whole = train(tiny(images, tmp_path / 'whole', **flags)).output_dir
    assert caplog.text.count('channels all but empty') == 2
    with monkeypatch.context() as patch:
        at_step(patch, 9, stop_politely)
        with pytest.raises(Interrupted):
            train(tiny(images, tmp_path / 'half', **flags))
    half = train(tiny(images, tmp_path / 'half', resume='auto', **flags)).output_dir
    for key in ('state_dict', 'optimizer'):
        a, b = (load_weights(folder / 'last.pth.tar', key) for folder in (whole, half))
        assert_same_weights(*((x if key == 'state_dict' else {
            f'{i}.{k}': torch.as_tensor(v) for i, s in x['state'].items() for k, v in s.items()}) for x in (a, b)))
    caplog.clear()
    prepare(tiny(images, tmp_path / 'half', resume='auto', **dict(flags, epochs=3, sparsity_weight=0.01)))
    assert '--sparsity-weight 0.01 (was 0.05)' in caplog.text


def test_off_it_neither_follows_channels_nor_adds_a_step(images, tmp_path, monkeypatch):
    monkeypatch.setattr(training, 'coupled_scales', None)
    run = prepare(tiny(images, tmp_path))
    assert run.sparsity is None and not run.optimizer._optimizer_step_pre_hooks


REFUSED = [
    (dict(model='test_vit', model_kwargs={}, img_size=160), 'test_vit has none that are trained'),
    (dict(linear_probe=True), 'test_resnet has none that are trained'),
    (dict(model_kwargs=dict(norm_layer='groupnorm1')), 'test_resnet has none that are trained'),
    (dict(opt='adahessian'), '--opt adahessian needs second derivatives'),
]


@pytest.mark.parametrize('flags, said', REFUSED, ids=['no-norm', 'frozen', 'group-norm', 'second-order'])
def test_what_cannot_be_penalised_is_refused_before_the_work(images, tmp_path, flags, said):
    with pytest.raises(PSTError, match=said):
        prepare(tiny(images, tmp_path, sparsity_weight=0.01, **flags))
    assert not (tmp_path / 'run').exists()


def test_without_the_extra_a_sentence_says_what_to_install(images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch_pruning', None)
    monkeypatch.setattr(training, 'on_first', None)  # nothing is claimed, made or read
    with pytest.raises(PSTError, match=r"pip install 'pst_timm\[prune\]'"):
        prepare(tiny(images, tmp_path, sparsity_weight=0.01, data_dir='nowhere'))


@pytest.mark.parametrize('weight', [-0.1, float('nan'), float('inf')])
def test_the_weight_is_a_number_from_zero_up(weight):
    with pytest.raises(PSTError, match='sparsity_weight must be a number, at least 0'):
        tiny('x', 'y', sparsity_weight=weight)


SCRIPT = """
import hashlib, sys
import torch
from pst_timm.engine import parse_train_args, train, training
from pst_timm.engine.args import read_yaml

finish = training.finish_epoch
def note(run, *args):
    scales = torch.cat([p.detach().flatten() for p in run.task.get_trainable_module().parameters()])
    with open(f'{sys.argv[2]}.{run.args.rank}', 'a') as file:
        file.write(hashlib.sha256(scales.numpy().tobytes()).hexdigest() + '\\n')
    finish(run, *args)
training.finish_epoch = note
train(parse_train_args(['--config', sys.argv[1]]))
"""


@pytest.mark.slow
def test_all_processes_take_the_same_steps(images, tmp_path):
    (tmp_path / 'run.py').write_text(SCRIPT)
    write_yaml(tiny(images, tmp_path, epochs=2, sparsity_weight=0.05), tmp_path / 'config.yaml')
    done = torchrun(tmp_path / 'run.py', tmp_path / 'config.yaml', tmp_path / 'sums')
    assert done.returncode == 0, done.stderr
    first, second = ((tmp_path / f'sums.{rank}').read_text().split() for rank in (0, 1))
    assert first == second and len(set(first)) == 2
