"""Block, module and conv-norm pairs: against the oracle, folding, errors."""
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import ConvNormAct, EvoNorm2dB0, GroupNorm1, set_layer_config

from pst_timm.layers import (
    FINE_FUSIONS,
    ConvNorm,
    FusedConvAct,
    PyramidSparseBlock,
    PyramidSparseTransformer,
)
from tests.helpers import randomize, relative_error
from tests.layers import oracle
from tests.layers.helpers import build_maps
from tests.layers.test_attention import level_sizes


def build_pst(in_chs=6, upper_chs=10, out_chs=16, seed=0, **kwargs):
    layer = PyramidSparseTransformer(in_chs, upper_chs, out_chs, **{'head_dim': 4, **kwargs})
    return randomize(layer, seed).double().eval()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=level_sizes(),
    heads=st.integers(1, 3),
    mlp_ratio=st.sampled_from([0.5, 1, 2., 3.]),
    topk=st.sampled_from([0, 1, 3, 100]),
    fusion=st.sampled_from(FINE_FUSIONS),
    seed=st.integers(0, 1000),
)
def test_block_equals_the_oracle(sizes, heads, mlp_ratio, topk, fusion, seed):
    layer = PyramidSparseBlock(4 * heads, heads, mlp_ratio=mlp_ratio, topk=topk, fine_fusion=fusion)
    layer = randomize(layer, seed).double().eval()
    x, upper = build_maps(channels=4 * heads, sizes=sizes, seed=seed + 1)
    expected = oracle.block(oracle.arrays(layer.state_dict()), x.numpy(), upper.numpy(), heads, topk, fusion)
    assert relative_error(layer(x, upper), torch.from_numpy(expected)) < 1e-10


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=level_sizes(largest=4),
    channels=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    heads=st.integers(1, 2),
    head_dim=st.sampled_from([2, 4]),
    expansion=st.sampled_from([0.5, 1.0, 2.0]),
    depth=st.integers(0, 2),
    mlp_ratio=st.sampled_from([1., 2.]),
    topk=st.sampled_from([0, 2, 100]),
    fusion=st.sampled_from(FINE_FUSIONS),
    fused=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_module_equals_the_oracle(
        sizes, channels, heads, head_dim, expansion, depth, mlp_ratio, topk, fusion, fused, seed):
    out_chs = round(heads * head_dim / expansion)
    with set_layer_config(exportable=not fused):
        layer = build_pst(
            *channels, out_chs, seed=seed, depth=depth, mlp_ratio=mlp_ratio, expansion=expansion, head_dim=head_dim,
            topk=topk, fine_fusion=fusion)
    x, upper = build_maps(channels=channels[0], upper_channels=channels[1], sizes=sizes, seed=seed + 1)
    expected = oracle.pst(oracle.arrays(layer.state_dict()), x.numpy(), upper.numpy(), head_dim, topk, fusion)
    assert relative_error(layer(x, upper), torch.from_numpy(expected)) < 1e-10


@pytest.mark.parametrize('depth', [0, 1, 2])
def test_gradient_reaches_every_trainable_parameter(depth):
    layer = build_pst(depth=depth, train_topk=2).train()
    x, upper = build_maps(channels=6, upper_channels=10)
    layer(x, upper).square().sum().backward()
    assert {name for name, p in layer.named_parameters() if p.requires_grad and p.grad is None} == set()


def test_set_topk_reaches_every_block():
    layer = build_pst(depth=2)
    layer.set_topk(3, fusion='joint')
    assert [(block.attn.topk, block.attn.fine_fusion) for block in layer.blocks] == [(3, 'joint')] * 2


def test_act_layer_is_used_everywhere_but_in_projections():
    layer = build_pst(act_layer=nn.Hardswish)
    acts = {name.removesuffix('.bn.act') for name, m in layer.named_modules() if isinstance(m, nn.Hardswish)}
    assert acts == {'conv_in', 'conv_upper', 'blocks.0.mlp.0', 'conv_out'}
    assert not any(isinstance(m, nn.SiLU) for m in layer.modules())


@pytest.mark.parametrize('kwargs, words', [
    (dict(head_dim=3), ['0.5', '16', '8', 'head_dim=3']),
    (dict(head_dim=0), ['head_dim=0']),
    (dict(head_dim=-4), ['head_dim=-4']),
    (dict(out_chs=1), ['head_dim=4']),
    (dict(depth=-1), ['depth', '-1']),
    (dict(mlp_ratio=0), ['mlp_ratio=0', '8']),
    (dict(mlp_ratio=-1.), ['mlp_ratio=-1.0']),
    (dict(topk=-2), ['topk', '-2']),
    (dict(fine_fusion='max'), ['fine_fusion', "'max'"]),
])
def test_bad_arguments_are_named(kwargs, words):
    with pytest.raises(ValueError) as error:
        build_pst(**kwargs)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize('depth', [0, 1])
def test_options_are_those_of_the_layers_below(depth):
    """Each option has one home, and a mistake is one whether or not a block reads it."""
    with pytest.raises(TypeError, match='topkk'):
        build_pst(depth=depth, topkk=3)
    with pytest.raises(TypeError, match='num_heads'):
        build_pst(depth=depth, num_heads=3)
    with pytest.raises(ValueError, match='train_fine_prob'):
        build_pst(depth=depth, train_fine_prob=2.)
    for block in build_pst(depth=depth, topk=3, fine_fusion='joint', pos_enc=False, mlp_ratio=3.).blocks:
        attn = block.attn
        assert (attn.topk, attn.fine_fusion, attn.pos_enc) == (3, 'joint', False)
        assert block.mlp[0].conv.out_channels == 3 * attn.dim


def test_checking_options_draws_no_random_numbers():
    state = torch.get_rng_state()
    PyramidSparseTransformer(6, 10, 16, head_dim=4, depth=0, device='meta')
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('shapes, words', [
    (((1, 5, 4, 4), (1, 10, 2, 2)), ['x', '1, 5, 4, 4', '6']),
    (((1, 6, 4, 4), (1, 9, 2, 2)), ['upper', '1, 9, 2, 2', '10']),
    (((6, 4, 4), (1, 10, 2, 2)), ['x', '6, 4, 4']),
    (((1, 6, 4, 4), (10, 2, 2)), ['upper', '10, 2, 2']),
    (((2, 6, 4, 4), (3, 10, 2, 2)), ['x holds 2 images', 'upper 3', 'same batch']),
    (((1, 6, 9, 4), (1, 10, 4, 2)), ['9x4', '4x2']),
])
@pytest.mark.parametrize('depth', [1, 2])
def test_bad_inputs_are_named(shapes, words, depth):
    with pytest.raises(ValueError) as error:
        build_pst(depth=depth).float()(*(torch.zeros(shape) for shape in shapes))
    assert all(word in str(error.value) for word in words)


def test_device_and_dtype_reach_every_tensor():
    layer = PyramidSparseTransformer(6, 10, 16, head_dim=4, depth=2, device='meta', dtype=torch.bfloat16)
    tensors = [*layer.parameters(), *(b for b in layer.buffers() if b.is_floating_point())]
    assert all(t.is_meta and t.dtype == torch.bfloat16 for t in tensors)


CONVS = {
    '1x1': dict(kernel_size=1),
    'no act': dict(kernel_size=1, apply_act=False),
    'stride': dict(kernel_size=3, stride=2),
    'depthwise': dict(kernel_size=7, groups=4),
    'conv bias': dict(kernel_size=3, bias=True),
}


def build_conv(**kwargs):
    return randomize(ConvNorm(4, 4, **{'act_layer': nn.SiLU, **kwargs})).double()


@pytest.mark.parametrize('kwargs', CONVS.values(), ids=CONVS)
class TestConvNorm:

    def test_has_the_names_and_values_of_timms_layer(self, kwargs):
        ours, timms = build_conv(**kwargs), ConvNormAct(4, 4, **{'act_layer': nn.SiLU, **kwargs}).double()
        assert list(ours.state_dict()) == list(timms.state_dict())
        timms.load_state_dict(ours.state_dict())
        x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
        assert torch.equal(ours.eval()(x), timms.eval()(x))

    def test_fuse_keeps_the_output(self, kwargs):
        layer = build_conv(**kwargs).eval()
        fused = layer.fuse()
        x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
        assert isinstance(fused, FusedConvAct)
        assert relative_error(fused(x), layer(x)) < 1e-12
        assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())

    def test_folded_is_the_single_convolution(self, kwargs):
        layer = build_conv(**{**kwargs, 'apply_act': False}).eval()
        x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
        for form in (layer, layer.fuse()):
            weight, bias = form.folded()
            conv = layer.conv
            y = torch.nn.functional.conv2d(x, weight, bias, conv.stride, conv.padding, groups=conv.groups)
            assert relative_error(y, layer(x)) < 1e-12


def test_fuse_leaves_the_source_and_its_mode_alone():
    layer = build_conv(kernel_size=1).train()
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    fused = layer.fuse()
    assert layer.training and layer.conv.training and layer.bn.training and fused.training
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize('norm_layer', [
    GroupNorm1,
    EvoNorm2dB0,
    lambda chs, **kw: nn.BatchNorm2d(chs, track_running_stats=False),
    lambda chs, **kw: nn.BatchNorm2d(chs, affine=False),
])
def test_a_norm_without_running_statistics_is_not_folded(norm_layer):
    layer = ConvNorm(4, 4, 1, norm_layer=norm_layer)
    assert not layer.can_fold() and layer.fuse() is layer


def test_zero_init_starts_every_block_as_the_identity():
    """Both residual branches end in a norm of weight zero, as timm's ResNet starts its own."""
    block = PyramidSparseBlock(32, 2, zero_init=True).eval()
    x, upper = torch.randn(2, 32, 6, 6), torch.randn(2, 32, 3, 3)
    assert torch.equal(block(x, upper), x)
    block.train()(x, upper).square().sum().backward()
    assert block.attn.proj.bn.weight.grad.abs().sum() > 0 and block.mlp[1].bn.weight.grad.abs().sum() > 0
    assert not torch.equal(PyramidSparseBlock(32, 2).eval()(x, upper), x)
