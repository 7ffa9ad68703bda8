"""Attention against the oracle, its identities, its cost and its errors."""
import copy
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import EvoNorm2dB0, GroupNorm1
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pst_timm.layers import FINE_FUSIONS, PyramidSparseAttention
from tests.helpers import relative_error
from tests.layers import oracle
from tests.layers.helpers import SIZES, build_attention, build_maps

fusions = pytest.mark.parametrize('fusion', FINE_FUSIONS)
backends = pytest.mark.parametrize('fused', [True, False], ids=['fused', 'plain'])


def expected_attention(layer, x, upper, topk, fusion):
    y = oracle.attention(
        oracle.arrays(layer.state_dict()), x.numpy(), upper.numpy(), layer.num_heads, topk, fusion, layer.kv_pool)
    return torch.from_numpy(y)


@st.composite
def level_sizes(draw, largest=5):
    h, w = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    if draw(st.booleans()):
        return (h, w), (h, w)
    return (2 * h - draw(st.integers(0, 1)), 2 * w - draw(st.integers(0, 1))), (h, w)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    sizes=level_sizes(),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 2, 5]),
    topk=st.one_of(st.integers(0, 4), st.sampled_from([9, 25, 1000])),
    fusion=st.sampled_from(FINE_FUSIONS),
    kv_pool=st.sampled_from([1, 1, 2, 3]),
    fused=st.booleans(),
    channels_last=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_oracle(sizes, batch, heads, head_dim, topk, fusion, kv_pool, fused, channels_last, seed):
    dim = heads * head_dim
    layer = build_attention(dim, heads, fused=fused, topk=topk, fine_fusion=fusion, kv_pool=kv_pool, seed=seed)
    x, upper = build_maps(batch, dim, sizes, seed=seed + 1)
    expected = expected_attention(layer, x, upper, topk, fusion)
    if channels_last:
        layer = layer.to(memory_format=torch.channels_last)
        x, upper = (t.contiguous(memory_format=torch.channels_last) for t in (x, upper))
    assert relative_error(layer(x, upper), expected) < 1e-10


@pytest.mark.parametrize('topk', [0, 1, 5, 10 ** 6])
@fusions
@pytest.mark.parametrize('sizes', SIZES, ids=str)
def test_sizes_that_backbones_make(sizes, fusion, topk):
    layer = build_attention(topk=topk, fine_fusion=fusion)
    x, upper = build_maps(batch=1, sizes=sizes)
    assert relative_error(layer(x, upper), expected_attention(layer, x, upper, topk, fusion)) < 1e-10


@fusions
def test_fused_and_plain_branches_agree(fusion):
    fused = build_attention(fused=True, topk=3, fine_fusion=fusion)
    plain = build_attention(fused=False, topk=3, fine_fusion=fusion)
    x, upper = build_maps()
    assert relative_error(fused(x, upper), plain(x, upper)) < 1e-12


def test_heads_read_their_own_channels():
    """Zeroing the values of one head changes that head's channels of the attended map and no other's."""
    layer = build_attention(dim=6, num_heads=3)
    x, upper = build_maps(channels=6)
    attended = []
    layer.proj = torch.nn.Identity()
    layer.pe = torch.nn.Identity()
    for head in (None, 1):
        if head is not None:
            with torch.no_grad():
                layer.kv.bn.weight[2 * 2 * head + 2:2 * 2 * (head + 1)] = 0.
                layer.kv.bn.bias[2 * 2 * head + 2:2 * 2 * (head + 1)] = 0.
        attended.append(layer(x, upper))
    assert torch.equal(attended[0][:, [0, 1, 4, 5]], attended[1][:, [0, 1, 4, 5]])
    assert torch.all(attended[1][:, 2:4] == 0)


def nearest_children(upper, H, W):
    """A fine map whose tokens repeat the coarse token that owns them."""
    ratio = 1 if (H, W) == upper.shape[2:] else 2
    return upper.repeat_interleave(ratio, 2).repeat_interleave(ratio, 3)[:, :, :H, :W].contiguous()


@backends
@pytest.mark.parametrize('topk', [1, 4, 50, 10 ** 6])
@pytest.mark.parametrize('sizes', SIZES, ids=str)
def test_joint_with_children_equal_to_parents_is_coarse_attention(sizes, topk, fused):
    layer = build_attention(fused=fused, fine_fusion='joint')
    _, upper = build_maps(sizes=sizes)
    x = nearest_children(upper, *sizes[0])
    coarse = layer(x, upper)
    layer.set_topk(topk)
    assert relative_error(layer(x, upper), coarse) < 1e-12
    single = copy.deepcopy(layer).float()
    assert relative_error(single(x.float(), upper.float()), coarse) < 1e-6


@pytest.mark.parametrize('topk', [0, 1, 10 ** 6])
@pytest.mark.parametrize('kv_pool', [2, 3])
@pytest.mark.parametrize('sizes', SIZES, ids=str)
def test_pooling_equal_tokens_changes_nothing(sizes, kv_pool, topk):
    """Coarse tokens that repeat their mean, and children that repeat them, give what an unpooled layer gives."""
    pooled, plain = (build_attention(fine_fusion='joint', topk=topk, kv_pool=p) for p in (kv_pool, 1))
    (H, W), (h, w) = sizes
    _, means = build_maps(sizes=(sizes[0], (-(-h // kv_pool), -(-w // kv_pool))))
    upper = means.repeat_interleave(kv_pool, 2).repeat_interleave(kv_pool, 3)[:, :, :h, :w].contiguous()
    x = nearest_children(upper, H, W)
    assert relative_error(pooled(x, upper), plain(x, upper)) < 1e-12


@fusions
def test_topk_above_the_number_of_tokens_selects_all(fusion):
    layer = build_attention(fine_fusion=fusion)
    x, upper = build_maps()
    tokens = upper[0, 0].numel()
    layer.set_topk(tokens)
    everything = layer(x, upper)
    for topk in (tokens + 1, 10 ** 9):
        layer.set_topk(topk)
        assert torch.equal(layer(x, upper), everything)


def test_set_topk_and_back():
    layer = build_attention()
    x, upper = build_maps()
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    coarse = layer(x, upper)
    layer.set_topk(2)
    gate = layer(x, upper)
    layer.set_topk(2, fusion='joint')
    joint = layer(x, upper)
    assert not torch.allclose(coarse, gate) and not torch.allclose(gate, joint) and not torch.allclose(coarse, joint)
    layer.set_topk(2, fusion='gate')
    assert torch.equal(layer(x, upper), gate)
    layer.set_topk(0)
    assert torch.equal(layer(x, upper), coarse)
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())


def test_a_fresh_gate_is_an_even_mix():
    layer = PyramidSparseAttention(8, 2)
    assert torch.count_nonzero(layer.gate.weight) == 0 and torch.count_nonzero(layer.gate.bias) == 0


@fusions
def test_without_position_encoding(fusion):
    """It is the layer whose encoding is zero, and has none of its weights."""
    layer = build_attention(topk=3, fine_fusion=fusion)
    bare = build_attention(topk=3, fine_fusion=fusion, pos_enc=False)
    state = {k: v for k, v in layer.state_dict().items() if not k.startswith('pe.')}
    bare.load_state_dict(state)
    x, upper = build_maps(sizes=((13, 21), (7, 11)))
    assert relative_error(bare(x, upper), layer(x, upper)) > 1e-2
    for p in (layer.pe.bn.weight, layer.pe.bn.bias):
        torch.nn.init.zeros_(p)
    assert relative_error(bare(x, upper), layer(x, upper)) < 1e-12
    assert relative_error(torch.jit.script(bare)(x, upper), bare(x, upper)) < 1e-12


@backends
@fusions
def test_repeated_calls_are_bitwise_equal(fusion, fused):
    layer = build_attention(fused=fused, topk=3, fine_fusion=fusion)
    x, upper = build_maps(sizes=((13, 21), (7, 11)))
    first = layer(x, upper)
    torch.manual_seed(1234)
    assert torch.equal(layer(x, upper), first)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-6), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
@backends
@fusions
def test_lower_precisions_come_close_to_float64(fusion, fused, dtype, tolerance):
    # every token is selected, as rounding may swap two whose scores are nearly equal
    layer = build_attention(fused=fused, topk=10 ** 6, fine_fusion=fusion)
    x, upper = build_maps()
    expected = layer(x, upper)
    y = layer.to(dtype)(x.to(dtype), upper.to(dtype))
    assert y.dtype == dtype
    assert relative_error(y, expected) < tolerance


class LargestTensor(TorchDispatchMode):
    """Records the size in bytes of the largest storage that any operation returns."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.nbytes = max(self.nbytes, leaf.untyped_storage().nbytes())
        return out


def largest_storage(layer, size):
    x, upper = build_maps(batch=1, sizes=((2 * size, 2 * size), (size, size)))
    with torch.no_grad(), LargestTensor() as largest:
        layer(x.float(), upper.float())
    return largest.nbytes


@pytest.mark.parametrize('topk', [0, 4])
@fusions
def test_no_tensor_of_queries_times_keys(fusion, topk):
    layer = build_attention(topk=topk, fine_fusion=fusion).float()
    small, large = largest_storage(layer, 8), largest_storage(layer, 32)
    assert large <= 17 * small  # 16 times the queries
    logits = 4 * 64 * 64 * 32 * 32  # bytes of one head's
    assert large < logits / 4


def test_the_plain_branch_would_be_seen():
    """Guards the test above: the plain formula does hold every logit."""
    layer = build_attention(fused=False).float()
    assert largest_storage(layer, 8) >= 4 * 16 * 16 * 8 * 8


@fusions
def test_fine_keys_and_values_are_projected_at_selected_places_only(fusion):
    layer = build_attention(topk=2, fine_fusion=fusion)
    shapes = []
    layer.kv.register_forward_hook(lambda module, args, out: shapes.append(args[0].shape[2:]))
    x, upper = build_maps(sizes=((12, 12), (6, 6)))
    layer(x, upper)
    assert shapes == [(6, 6)]


def test_fine_attention_costs_what_it_selects():
    """The multiply-adds of the fine branch: projections and attention over 4k tokens per head, and the gate."""
    dim, heads, topk, size = 16, 2, 3, 8
    d, queries = dim // heads, (2 * size) ** 2
    layer = build_attention(dim, heads, fused=False)
    x, upper = build_maps(batch=1, channels=dim, sizes=((2 * size, 2 * size), (size, size)))
    flops = []
    for k in (0, topk):
        layer.set_topk(k, 'gate')
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(x, upper)
        flops.append(counter.get_total_flops())
    children = 4 * topk
    selection = heads * d * size ** 2
    projection = heads * children * dim * 2 * d
    attention = 2 * heads * queries * children * d
    gate = heads * queries * 2 * d * d
    assert flops[1] - flops[0] == 2 * (selection + projection + attention + gate)


@fusions
def test_only_the_children_of_the_best_tokens_are_read(fusion):
    """With queries that do not depend on x, the gradient of x is zero except at the children of the selected."""
    heads, topk, sizes = 2, 2, ((7, 6), (4, 3))
    layer = build_attention(num_heads=heads, topk=topk, fine_fusion=fusion)
    with torch.no_grad():
        layer.q.conv.weight.zero_()
    x, upper = build_maps(batch=1, sizes=sizes)
    x.requires_grad_()
    layer(x, upper).square().sum().backward()
    touched = {tuple(place) for place in x.grad[0].abs().sum(0).nonzero().tolist()}

    w = oracle.arrays(layer.state_dict())
    d = layer.head_dim
    kv = oracle.conv_norm(oracle.part(w, 'kv.'), upper.numpy())[0]
    query = oracle.conv_norm(oracle.part(w, 'q.'), x.detach().numpy())[0, :, 0, 0]
    owned = set()
    for head in range(heads):
        keys = kv[2 * d * head:2 * d * head + d]
        scores = np.tensordot(query[d * head:d * (head + 1)], keys, 1)
        best = np.argsort(-scores, axis=None)[:topk]
        for token in zip(*np.unravel_index(best, sizes[1])):
            owned.update(oracle.children(token, *sizes))
    assert touched == {tuple(map(int, place)) for place in owned}


@pytest.mark.parametrize('kwargs, words', [
    (dict(topk=-1), ['topk', '-1']),
    (dict(topk=2.0), ['topk', '2.0']),
    (dict(topk=True), ['topk', 'True']),
    (dict(topk='4'), ['topk', "'4'"]),
    (dict(topk=None), ['topk', 'None']),
    (dict(train_topk=-3), ['train_topk', '-3']),
    (dict(train_topk=1.5), ['train_topk', '1.5']),
    (dict(train_topk=False), ['train_topk', 'False']),
    (dict(fine_fusion='sum'), ['fine_fusion', "'sum'", 'gate', 'joint']),
    (dict(fine_fusion=None), ['fine_fusion', 'None']),
    (dict(train_fine_prob=-0.1), ['train_fine_prob', '-0.1']),
    (dict(train_fine_prob=1.5), ['train_fine_prob', '1.5']),
    (dict(train_fine_prob=float('nan')), ['train_fine_prob', 'nan']),
    (dict(train_fine_prob='half'), ['train_fine_prob', "'half'"]),
    (dict(kv_pool=0), ['kv_pool', '0']),
    (dict(kv_pool=2.), ['kv_pool', '2.0']),
    (dict(kv_pool=True), ['kv_pool', 'True']),
    (dict(num_heads=3), ['dim=8', 'num_heads=3']),
    (dict(num_heads=0), ['dim=8', 'num_heads=0']),
    (dict(num_heads=-2), ['dim=8', 'num_heads=-2']),
])
def test_bad_arguments_are_named(kwargs, words):
    with pytest.raises(ValueError) as error:
        PyramidSparseAttention(8, **{'num_heads': 2, **kwargs})
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize('dim', [0, -4])
def test_no_channels_are_an_error(dim):
    with pytest.raises(ValueError, match=f'dim={dim}'):
        PyramidSparseAttention(dim, 2)


@fusions
@pytest.mark.parametrize('topk', [0, 2])
def test_an_empty_batch_gives_an_empty_batch(fusion, topk):
    layer = build_attention(topk=topk, fine_fusion=fusion)
    x, upper = build_maps(2, layer.dim, ((5, 4), (3, 2)))
    assert layer(x[:0], upper[:0]).shape == (0, layer.dim, 5, 4)


@pytest.mark.parametrize('args, words', [
    ((-1,), ['topk', '-1']),
    ((1.0,), ['topk', '1.0']),
    ((True,), ['topk', 'True']),
    ((4, 'mean'), ['fine_fusion', "'mean'"]),
    ((-1, 'joint'), ['topk', '-1']),
])
def test_set_topk_errors_change_nothing(args, words):
    layer = build_attention(topk=2)
    with pytest.raises(ValueError) as error:
        layer.set_topk(*args)
    assert all(word in str(error.value) for word in words)
    assert (layer.topk, layer.fine_fusion) == (2, 'gate')


def test_topk_takes_integers_of_other_libraries():
    layer = build_attention(topk=np.int64(3))
    assert layer.topk == 3 and type(layer.topk) is int


@pytest.mark.parametrize('sizes', [
    ((8, 8), (2, 2)),
    ((6, 6), (4, 4)),
    ((4, 4), (8, 8)),
    ((7, 8), (3, 4)),
    ((9, 8), (4, 4)),
    ((8, 4), (4, 4)),
    ((5, 4), (5, 2)),
], ids=str)
@pytest.mark.parametrize('topk', [0, 2])
def test_other_size_ratios_are_errors(sizes, topk):
    (H, W), (h, w) = sizes
    x, upper = build_maps(sizes=sizes)
    with pytest.raises(ValueError, match=rf'{H}x{W}.*{h}x{w}'):
        build_attention(topk=topk)(x, upper)


@pytest.mark.parametrize('shapes, message', [
    (((2, 6, 4, 4), (2, 8, 2, 2)), 'x has shape [2, 6, 4, 4], expected (batch, 8, height, width).'),
    (((2, 8, 4, 4), (2, 10, 2, 2)), 'upper has shape [2, 10, 2, 2], expected (batch, 8, height, width).'),
    (((8, 4, 4), (2, 8, 2, 2)), 'x has shape [8, 4, 4], expected (batch, 8, height, width).'),
    (((2, 8, 4, 4), (8, 4)), 'upper has shape [8, 4], expected (batch, 8, height, width).'),
    (((2, 8, 4, 4), (3, 8, 2, 2)), 'x holds 2 images and upper 3: both must be maps of the same batch.'),
    (((1, 8, 4, 4), (3, 8, 2, 2)), 'x holds 1 images and upper 3: both must be maps of the same batch.'),
])
@pytest.mark.parametrize('call', ['forward', 'inspect'])
def test_maps_that_do_not_fit_are_errors(call, shapes, message):
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        getattr(build_attention().float(), call)(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize('topk', [0, 2])
@pytest.mark.parametrize('form', [
    torch.jit.script,
    lambda layer: torch.compile(layer, fullgraph=True, backend='eager'),
], ids=['scripted', 'compiled'])
def test_maps_of_different_batches_are_errors_in_other_forms_too(form, topk):
    layer = form(build_attention(topk=topk).float())
    for images in ((4, 1), (1, 4)):  # which would broadcast
        with pytest.raises(Exception, match='both must be maps of the same batch'):
            layer(torch.zeros(images[0], 8, 4, 4), torch.zeros(images[1], 8, 2, 2))


def test_device_and_dtype_reach_every_tensor():
    layer = PyramidSparseAttention(8, 2, device='meta', dtype=torch.bfloat16)
    tensors = [*layer.parameters(), *(b for b in layer.buffers() if b.is_floating_point())]
    assert all(t.is_meta and t.dtype == torch.bfloat16 for t in tensors)


@pytest.mark.parametrize('norm_layer', [GroupNorm1, EvoNorm2dB0])
@fusions
def test_other_norms_project_the_whole_map(fusion, norm_layer):
    """A norm that may depend on the whole map rules out projecting the selected places alone."""
    layer = PyramidSparseAttention(8, 2, topk=3, fine_fusion=fusion, norm_layer=norm_layer).double().eval()
    x, upper = build_maps()
    shapes = []
    layer.kv.register_forward_hook(lambda module, args, out: shapes.append(args[0].shape[2:]))
    y = layer(x, upper)
    assert shapes == [upper.shape[2:], x.shape[2:]]
    assert torch.isfinite(y).all()
