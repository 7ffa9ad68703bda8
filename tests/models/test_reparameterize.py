"""The fast form answers as the readable form does, and keeps its habits."""
import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import FrozenBatchNormAct2d, convert_sync_batchnorm, freeze_batch_norm_2d
from timm.utils import ModelEmaV3
from torch import nn

import pst_timm
from pst_timm.layers import Pair, SplitConvAct
from tests.helpers import randomize, relative_error


def build(name='test_resnet_pst', dtype=torch.float32, **kwargs):
    return randomize(timm.create_model(name, num_classes=7, **kwargs)).to(dtype).eval()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    height=st.integers(33, 100),
    width=st.integers(33, 100),
    topk=st.integers(0, 20),
    fine_fusion=st.sampled_from(('gate', 'joint')),
    kwargs=st.sampled_from(({}, {'output_stride': 16}, {'pst_depth': 0}, {'pst_depth': 2}, {'in_chans': 1})),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@torch.no_grad()
def test_fast_form_equals_the_readable_one(dtype, tolerance, height, width, topk, fine_fusion, kwargs, seed):
    torch.manual_seed(seed)
    model = build(dtype=dtype, topk=topk, fine_fusion=fine_fusion, **kwargs)
    x = torch.randn(2, model.in_chans, height, width, dtype=dtype)
    assert relative_error(pst_timm.reparameterize(model)(x), model(x)) < tolerance


@pytest.mark.parametrize('name', ['resnet18_pst', 'resnet18', 'resnet26', 'test_resnet', 'efficientnet_b0'])
@torch.no_grad()
def test_no_batch_norm_is_left_and_plain_models_fold_too(name):
    model = randomize(timm.create_model(name)).eval()
    folded = pst_timm.reparameterize(model)
    x = torch.randn(1, 3, 64, 64)
    assert relative_error(folded(x), model(x)) < 1e-4
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    assert any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())  # the copy was folded


def test_inplace_and_training_mode():
    model = build().train()
    assert pst_timm.reparameterize(model, inplace=True) is model
    assert not model.training
    assert isinstance(model.fuse_down, SplitConvAct) and isinstance(model.pst_cat, Pair)


@torch.no_grad()
def test_the_concatenations_are_not_made():
    folded = pst_timm.reparameterize(build())
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.cat.default:
                seen.append(sum(t.shape[1] for t in args[0]))
            return func(*args, **(kwargs or {}))

    with Watch():
        folded(torch.randn(1, 3, 64, 64))
    assert seen == [64]  # the module's own, of the block input and output


@torch.no_grad()
def test_attention_can_still_be_changed():
    model = build()
    folded = pst_timm.reparameterize(model)
    x = torch.randn(2, 3, 96, 64)
    for topk, fusion in ((3, 'gate'), (3, 'joint'), (0, None)):
        model.set_topk(topk, fusion)
        folded.set_topk(topk, fusion)
        assert relative_error(folded(x), model(x)) < 1e-5


@pytest.mark.parametrize('out_indices', [(3,), (2, 4), (0, 1, 2, 3, 4), (1,)])
@torch.no_grad()
def test_features(out_indices):
    model = randomize(timm.create_model('test_resnet_pst', features_only=True, out_indices=out_indices)).eval()
    folded = pst_timm.reparameterize(model)
    x = torch.randn(1, 3, 64, 96)
    for a, b in zip(folded(x), model(x), strict=True):
        assert relative_error(a, b) < 1e-5


@torch.no_grad()
def test_scripted_and_copied():
    folded = pst_timm.reparameterize(build(topk=3))
    x = torch.randn(2, 3, 65, 97)
    expected = folded(x)
    assert relative_error(torch.jit.script(folded)(x), expected) < 1e-6
    assert torch.equal(copy.deepcopy(folded)(x), expected)


def test_batch_norms_shared_or_behind_other_users_are_left_alone():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.conv2, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(x)  # read twice: by the norm and by the sum
            y = y + self.bn(y)
            return self.bn2(self.conv2(self.bn2(self.conv2(y))))  # applied twice

    model = randomize(Odd()).eval()
    folded = pst_timm.reparameterize(model)
    x = torch.randn(2, 3, 4, 4)
    assert relative_error(folded(x), model(x)) < 1e-6
    assert isinstance(folded.bn, nn.BatchNorm2d) and isinstance(folded.bn2, nn.BatchNorm2d)


@torch.no_grad()
def test_synchronised_batch_norms_are_folded_too():
    model = convert_sync_batchnorm(build(topk=3))
    folded = pst_timm.reparameterize(model)
    x = torch.randn(2, 3, 64, 96)
    assert relative_error(folded(x), model(x)) < 1e-5
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())


@pytest.mark.parametrize('name', ['pst_cat', 'fuse_merge', 'layer1.0.bn1'])
def test_hooks_that_would_be_lost_are_an_error(name):
    model = build()
    model.get_submodule(name).register_forward_hook(lambda module, args, out: None)
    with pytest.raises(ValueError, match=f'{name} is replaced.*hooks'):
        pst_timm.reparameterize(model)


def test_an_error_leaves_the_model_as_it_was():
    model = build()
    model.pst_cat.register_forward_hook(lambda module, args, out: None)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match='pst_cat is replaced'):
        pst_timm.reparameterize(model, inplace=True)
    assert dict(model.named_modules()) == before


@torch.no_grad()
def test_frozen_batch_norms_are_folded_too():
    model = randomize(build(topk=3)).eval()
    freeze_batch_norm_2d(model)
    folded = pst_timm.reparameterize(model)
    x = torch.randn(2, 3, 64, 96)
    assert relative_error(folded(x), model(x)) < 1e-5
    assert not any(isinstance(m, FrozenBatchNormAct2d) for m in folded.modules())


def test_hooks_elsewhere_stay():
    model, seen = build(), []
    model.layer2.register_forward_hook(lambda module, args, out: seen.append(out))
    folded = pst_timm.reparameterize(model, inplace=True)
    seen.clear()  # tracing calls it as well
    folded(torch.randn(1, 3, 64, 64))
    assert len(seen) == 1


@pytest.mark.parametrize('wrap, words', [
    (nn.DataParallel, 'DataParallel .*[.]module'),
    (ModelEmaV3, 'ModelEmaV3 .*[.]module'),
    (torch.compile, 'OptimizedModule .*[.]_orig_mod'),
])
def test_wrapped_models_are_an_error_that_says_what_to_pass(wrap, words):
    with pytest.raises(ValueError, match=words):
        pst_timm.reparameterize(wrap(build()))


def test_untraceable_model_is_a_clear_error():
    class Untraceable(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match='Untraceable cannot be traced'):
        pst_timm.reparameterize(Untraceable())
