"""What is known before the work: that the input fits the model, and a batch the memory."""
import pytest
import timm
import torch
import torch.nn as nn

from pst_timm.engine import dry_run, train_args
from pst_timm.engine.dry_run import check_channels, check_input, check_recipe
from pst_timm.utils.errors import PSTError

GIB = 2 ** 30


def args_of(**values):
    args = train_args(**values)
    args.device, args.world_size, args.distributed = 'cpu', 1, False
    return args


def config(size, chans=3):
    return dict(input_size=(chans, size, size), mean=(0.5,) * chans, std=(0.5,) * chans)


@pytest.fixture
def model():
    return timm.create_model('test_resnet_pst')


def test_a_batch_is_measured_against_the_memory(model, monkeypatch):
    monkeypatch.setattr(dry_run, 'total_memory', lambda device: 2 * GIB)
    args = args_of(model='test_resnet_pst')
    check_input(args, model, config(160), 256, training=True)
    with pytest.raises(PSTError, match=r'A batch of 4096 images of 3x160x160 and the model need more than .* 2\.0'):
        check_input(args, model, config(160), 4096, training=True)
    # a pass forward keeps less than one that goes back, and the data may have fewer images than the batch
    check_input(args, model, config(160), 1024)
    check_input(args, model, config(160), 10 ** 9, dataset=[None] * 20, training=True)
    # what is recomputed is not kept
    check_input(args_of(model='test_resnet_pst', grad_checkpointing=True), model, config(160), 1024, training=True)
    with pytest.raises(PSTError, match='1024 images'):
        check_input(args, model, config(160), 1024, training=True)


def test_nothing_of_the_model_is_changed(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    check_input(args_of(), model, config(64), 8)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(p.is_meta for p in model.parameters())


class NeedsNumbers(nn.Module):
    """Looks at what it is given, as no model without content can."""

    def __init__(self, classes=3):
        super().__init__()
        self.fc = nn.Linear(3, classes)

    def forward(self, x):
        if x.sum().item() > 1e9 or x.shape[-1] < 32:
            raise ValueError('too small')
        return self.fc(x.mean((2, 3)))


def test_a_model_that_needs_numbers_gets_them():
    model = NeedsNumbers().train()
    check_input(args_of(model='mine'), model, config(64), 8)
    assert model.training
    with pytest.raises(PSTError, match=r'mine does not take images of 3x16x16 \(too small\): choose'):
        check_input(args_of(model='mine'), model, config(16), 8)


def test_what_is_no_classifier_is_refused():
    model = timm.create_model('test_resnet', num_classes=0, global_pool='')
    with pytest.raises(PSTError, match=r'gives no scores of classes .*4 dimensions'):
        check_input(args_of(model='test_resnet'), model, config(64), 8)


def test_images_are_read_with_the_channels_of_the_model():
    check_channels(args_of(), 3)
    check_channels(args_of(), 1)
    check_channels(args_of(input_img_mode='RGBA'), 4)
    check_channels(args_of(dataset='torch/mnist'), 2)
    for values, chans in ((dict(), 4), (dict(input_img_mode='L'), 3)):
        with pytest.raises(PSTError, match='--input-img-mode'):
            check_channels(args_of(**values), chans)


def test_a_run_in_its_warm_up_is_said(caplog):
    check_recipe(args_of(epochs=5, warmup_epochs=5))
    assert 'The whole run of 5 epochs is warm-up' in caplog.text
    caplog.clear()
    for values in (dict(warmup_epochs=4), dict(warmup_epochs=5, warmup_prefix=True), dict(sched='none')):
        check_recipe(args_of(epochs=5, **values))
    assert not caplog.text


@pytest.mark.parametrize('opt', ['sgd', 'adamw', 'lamb', 'lookahead_adam', 'adahessian', 'adan', 'muon', 'lion'])
def test_optimizers_of_timm_pass(opt):
    check_recipe(args_of(opt=opt, lr=0.01))


def test_second_derivatives_are_for_one_process():
    args = args_of(opt='adahessian')
    args.distributed, args.world_size = True, 2
    with pytest.raises(PSTError, match='--opt adahessian needs second derivatives'):
        check_recipe(args)
