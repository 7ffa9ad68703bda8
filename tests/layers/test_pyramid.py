"""The necks: against the oracle and plain formulas, in their deployed forms, their memory, their errors."""
import copy
import io
import re
from collections import OrderedDict

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import GroupNorm1
from timm.models import reparameterize_model
from torch.autograd.graph import saved_tensors_hooks
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from pst_timm.layers import ConvNorm, FusedConvAct, MergeAct, MergeNorm, PANPyramid, PSTPyramid
from tests.helpers import randomize, relative_error
from tests.layers import oracle
from tests.layers.test_attention import LargestTensor

CHS = (5, 6, 7, 9)
# of the finest map: odd everywhere, even everywhere, mixed, one row, one token
SIZES = [(9, 7), (8, 16), (13, 10), (1, 6), (1, 1)]
OPTIONS = [dict(), dict(topk=2), dict(topk=3, fine_fusion='joint'), dict(topk=2, kv_pool=2)]

necks = pytest.mark.parametrize('neck', [PSTPyramid, PANPyramid])
options = pytest.mark.parametrize('kwargs', OPTIONS, ids=['coarse', 'gate', 'joint', 'pooled'])
levels = pytest.mark.parametrize('num', [2, 3, 4])


def build(neck=PSTPyramid, num=3, seed=0, **kwargs):
    """A randomised float64 neck in eval mode."""
    if neck is PSTPyramid:
        kwargs = {'head_dim': 4, **kwargs}
    return randomize(neck(CHS[:num], 16, **kwargs), seed).double().eval()


def build_maps(num=3, size=(9, 7), batch=2, seed=1, chs=CHS):
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for c in chs[:num]:
        maps.append(torch.randn(batch, c, *size, generator=generator, dtype=torch.float64))
        size = (-(-size[0] // 2), -(-size[1] // 2))
    return maps


def largest_error(actual, expected):
    assert len(actual) == len(expected)
    return max(relative_error(a, b) for a, b in zip(actual, expected))


def expected_pst(neck, maps):
    attentions = neck.attentions()
    pools = [level.attentions()[0].kv_pool for level in reversed(neck.top_down)] if attentions else None
    outs = oracle.pyramid(
        oracle.arrays(neck.state_dict()), [t.numpy() for t in maps], 4, attentions[0].topk, attentions[0].fine_fusion,
        pools)
    return [torch.from_numpy(y) for y in outs]


@levels
@options
def test_equals_the_oracle(num, kwargs):
    neck, maps = build(num=num, **kwargs), build_maps(num)
    assert largest_error(neck(maps), expected_pst(neck, maps)) < 1e-10


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('bottom_up', [True, False])
def test_sizes_that_trunks_make(size, bottom_up):
    neck, maps = build(topk=1, bottom_up=bottom_up, depth=2), build_maps(size=size)
    outs = neck(maps)
    assert [y.shape for y in outs] == [(2, 16, *x.shape[2:]) for x in maps]
    assert largest_error(outs, expected_pst(neck, maps)) < 1e-10


def test_each_level_may_pool_on_its_own():
    neck, maps = build(kv_pool=(3, 1)), build_maps(size=(14, 11))
    assert [attn.kv_pool for attn in neck.attentions()] == [1, 3]  # they run from the coarsest
    outs = neck(maps)
    assert largest_error(outs, expected_pst(neck, maps)) < 1e-10
    plain = build()
    assert largest_error(outs, plain(maps)) > 1e-3


def conv(module, x, act=True):
    """What a ConvNorm in eval mode is, with torch's functions alone."""
    y = F.conv2d(x, module.conv.weight, stride=module.conv.stride, padding=module.conv.kernel_size[0] // 2)
    y = F.batch_norm(y, module.bn.running_mean, module.bn.running_var, module.bn.weight, module.bn.bias)
    return F.silu(y) if act else y


def repeat(x, like):
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :like.shape[2], :like.shape[3]]


@levels
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_pan_equals_its_equations(num, size):
    neck, maps = build(PANPyramid, num), build_maps(num, size)
    sums = [conv(lateral, x, act=False) for lateral, x in zip(neck.lateral, maps)]
    for i in reversed(range(num - 1)):
        sums[i] = sums[i] + repeat(sums[i + 1], sums[i])
    fused = [conv(m, x) for m, x in zip(neck.top_down, sums)]
    expected = fused[:1]
    for i in range(1, num):
        expected.append(conv(neck.merge[i - 1], conv(neck.down[i - 1], expected[-1]) + fused[i]))
    assert largest_error(neck(maps), expected) < 1e-10


@necks
@pytest.mark.parametrize('extra_levels, names', [(0, []), (1, ['p6']), (2, ['p6', 'p7']), ('pool', ['pool'])])
def test_lists_and_dicts(neck, extra_levels, names):
    neck, maps = build(neck, extra_levels=extra_levels), build_maps()
    outs = neck(maps)
    assert isinstance(outs, list) and len(outs) == neck.num_levels == 3 + len(names)
    assert neck.out_channels == neck.out_chs == 16 and neck.in_chs == list(CHS[:3])
    assert {y.shape[1] for y in outs} == {16}
    assert all(torch.equal(a, b) for a, b in zip(outs, neck(tuple(maps)), strict=True))
    for kind in (dict, OrderedDict):
        named = neck(kind(zip(('c3', 'a', 'z'), maps)))
        assert isinstance(named, OrderedDict)
        assert list(named) == ['c3', 'a', 'z', *names]  # in their order, not that of their names
        assert all(torch.equal(a, b) for a, b in zip(outs, named.values(), strict=True))


@pytest.mark.parametrize('name, extra_levels', [('p6', 1), ('pool', 'pool')])
def test_an_extra_level_takes_the_place_of_no_map(name, extra_levels):
    maps = dict(zip(('p4', 'p5', name), build_maps()))
    with pytest.raises(ValueError, match=f"'{name}' has the name of an extra level"):
        build(extra_levels=extra_levels)(maps)


def test_the_maps_that_are_given_stay_as_they_are():
    neck, maps = reparameterize_model(build(topk=2)), build_maps()
    before = [x.clone() for x in maps]
    neck(maps)
    assert len(maps) == 3 and all(torch.equal(a, b) for a, b in zip(maps, before))


@necks
def test_extra_levels_are_torchvisions(neck):
    neck, maps = build(neck, extra_levels=2), build_maps(size=(37, 22))
    theirs = LastLevelP6P7(16, 16).double()
    theirs.load_state_dict({
        f'{name}.{kind}': getattr(c, kind)
        for name, c in zip(('p6', 'p7'), neck.extra.convs) for kind in ('weight', 'bias')})
    outs = neck(maps)
    expected, _ = theirs(outs[:3], maps, ['0', '1', '2'])
    assert largest_error(outs, expected) < 1e-12
    pooled = build(type(neck), extra_levels='pool')(maps)
    expected, _ = LastLevelMaxPool()(pooled[:3], maps, ['0', '1', '2'])
    assert all(torch.equal(a, b) for a, b in zip(pooled, expected, strict=True))


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('size', [(6, 4), (5, 3), (3, 2)], ids=['even', 'odd', 'equal'])
@pytest.mark.parametrize('norm_layer', [nn.BatchNorm2d, GroupNorm1])
def test_merge_equals_the_convolution_of_the_concatenation(norm_layer, size, training):
    merge = randomize(MergeNorm(3, 4, 8, norm_layer=norm_layer, act_layer=nn.SiLU)).double().train(training)
    whole = ConvNorm(7, 8, 1, norm_layer=norm_layer, act_layer=nn.SiLU).double().train(training)
    whole.load_state_dict(merge.state_dict())
    a, b = torch.randn(2, 3, 3, 2, dtype=torch.float64), torch.randn(2, 4, *size, dtype=torch.float64)
    a_up = a if size == (3, 2) else repeat(a, b)
    assert relative_error(merge(a, b), whole(torch.cat([a_up, b], dim=1))) < 1e-12
    assert all(torch.allclose(x, y) for x, y in zip(merge.state_dict().values(), whole.state_dict().values()))
    fused = merge.eval().fuse()
    assert isinstance(fused, MergeAct if norm_layer is nn.BatchNorm2d else MergeNorm)
    assert relative_error(fused(a, b), whole.eval()(torch.cat([a_up, b], dim=1))) < 1e-12


def test_set_topk_reaches_every_level():
    neck, maps = build(num=4, depth=2), build_maps(4, (16, 16))
    coarse = neck(maps)
    neck.set_topk(2, fusion='joint')
    assert {(attn.topk, attn.fine_fusion) for attn in neck.attentions()} == {(2, 'joint')}
    assert len(neck.attentions()) == 6
    assert all(relative_error(a, b) > 1e-4 for a, b in zip(neck(maps), coarse))
    neck.set_topk(0)
    assert all(torch.equal(a, b) for a, b in zip(neck(maps), coarse))


def test_levels_draw_alike():
    neck = build(num=4, depth=2, train_topk=2, train_fine_prob=0.5).train()
    draws = []
    for step in range(20):
        neck.set_fine_step(3, step)
        each = [attn.draw_fine() for attn in neck.attentions()]
        assert len(set(each)) == 1
        neck.set_fine_step(3, step)
        assert neck.draw_fine() == each[0]
        draws += each[:1]
    assert set(draws) == {True, False}


def test_training_options_arrive():
    neck = build(
        zero_init=True, drop_path=0.25, pos_enc=False, train_topk=3, train_fine_prob=0.5, mlp_ratio=3.,
        norm_layer=GroupNorm1)
    for level in neck.top_down:
        block = level.blocks[0]
        assert block.drop_path1.drop_prob == 0.25 and not block.attn.pos_enc
        assert (block.attn.train_topk, block.attn.train_fine_prob) == (3, 0.5)
        assert block.mlp[0].conv.out_channels == 24
    fresh = PSTPyramid(CHS[:3], 16, head_dim=4, zero_init=True)
    assert all(torch.count_nonzero(level.blocks[0].attn.proj.bn.weight) == 0 for level in fresh.top_down)


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('neck, kwargs', [
    (PANPyramid, dict()),
    (PSTPyramid, dict()),
    (PSTPyramid, dict(bottom_up=False)),
    (PSTPyramid, dict(depth=0)),
    (PSTPyramid, dict(train_topk=2)),
    (PSTPyramid, dict(train_topk=2, train_fine_prob=0.)),
], ids=str)
def test_gradients_reach_every_parameter(neck, kwargs, checkpointing):
    """DDP wants one for each in every step, whether it runs the fine branch or not."""
    neck, maps = build(neck, extra_levels=2, **kwargs).train(), build_maps(size=(16, 16))
    neck.set_grad_checkpointing(checkpointing)
    sum(y.square().mean() for y in neck(maps)).backward()
    assert {name for name, p in neck.named_parameters() if p.grad is None} == set()
    idle = {name for name, p in neck.named_parameters() if torch.count_nonzero(p.grad) == 0}
    fine = neck.draw_fine() if isinstance(neck, PSTPyramid) else False
    assert idle == set() if fine else all('.gate.' in name for name in idle)


@necks
def test_checkpointing_keeps_less_and_changes_no_gradient(neck):
    maps, grads, saved, sizes = build_maps(size=(16, 16)), [], [], []
    for checkpointing in (False, True):
        kwargs = dict(train_topk=2, train_fine_prob=0.5) if neck is PSTPyramid else {}
        module = build(neck, **kwargs).train()
        module.set_grad_checkpointing(checkpointing)
        for step in range(3):
            torch.manual_seed(step)
            sum(y.square().mean() for y in module(maps)).backward()
        grads.append([p.grad for p in module.parameters()])
        with saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
            module(maps)
        saved.append(sum(sizes))
        sizes.clear()
    assert saved[1] < 0.7 * saved[0]
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*grads, strict=True))


def test_gates_are_kept_from_weight_decay():
    neck = build(num=4, depth=2)
    assert len(neck.no_weight_decay()) == 2 * len(neck.attentions())
    assert neck.no_weight_decay() <= {name for name, _ in neck.named_parameters()}
    assert build(PANPyramid).no_weight_decay() == set()


@pytest.mark.parametrize('neck, kwargs', [
    (PANPyramid, dict()),
    (PSTPyramid, dict()),
    (PSTPyramid, dict(topk=2)),
    (PSTPyramid, dict(bottom_up=False)),
    (PSTPyramid, dict(kv_pool=2)),
], ids=str)
def test_folded_equals_unfolded(neck, kwargs):
    neck, maps = build(neck, extra_levels=1, **kwargs), build_maps()
    folded = reparameterize_model(neck)
    assert not any(isinstance(m, (nn.BatchNorm2d, ConvNorm)) for m in folded.modules())
    assert any(isinstance(m, FusedConvAct) for m in folded.modules())
    assert largest_error(folded(maps), neck(maps)) < 1e-10
    single = copy.deepcopy(folded).float()
    assert largest_error(single([x.float() for x in maps]), neck(maps)) < 1e-4


@necks
def test_channels_last(neck):
    neck, maps = build(neck), build_maps()
    expected = neck(maps)
    neck = neck.to(memory_format=torch.channels_last)
    outs = neck([x.contiguous(memory_format=torch.channels_last) for x in maps])
    assert largest_error(outs, expected) < 1e-10


@pytest.mark.skipif(not hasattr(torch.jit, 'script'), reason='torch no longer offers TorchScript')
@pytest.mark.filterwarnings('ignore:.*torch.jit.*')
@pytest.mark.parametrize('fold', [False, True])
@pytest.mark.parametrize('neck, kwargs', [(PANPyramid, dict()), *((PSTPyramid, kwargs) for kwargs in OPTIONS)], ids=str)
def test_scripted_equals_eager(neck, kwargs, fold):
    neck = build(neck, extra_levels=2, **kwargs)
    if fold:
        neck = reparameterize_model(neck)
    scripted = torch.jit.script(neck)
    for size in ((9, 7), (16, 8)):
        maps = build_maps(size=size)
        with torch.no_grad():
            assert largest_error(scripted(maps), neck(maps)) < 1e-10
    with pytest.raises(Exception, match='Got 2 maps, expected 3'):
        scripted(build_maps()[:2])
    if isinstance(neck, PSTPyramid):
        for each in (neck, scripted):
            each.set_topk(1, fusion='gate')
        with torch.no_grad():
            assert largest_error(scripted(maps), neck(maps)) < 1e-10


def run_onnx(data, maps):
    onnxruntime = pytest.importorskip('onnxruntime')
    session = onnxruntime.InferenceSession(data, providers=['CPUExecutionProvider'])
    feed = {given.name: x.numpy() for given, x in zip(session.get_inputs(), maps, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, feed)]


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kwargs', [dict(), dict(topk=8)], ids=str)
def test_onnx_of_open_sizes_equals_eager(kwargs):
    pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    neck = reparameterize_model(build(num=2, **kwargs).float())
    batch, h, w = (torch.export.Dim(name, min=3, max=256) for name in 'bhw')
    maps = [x.float() for x in build_maps(2, (12, 10), batch=3)]
    file = io.BytesIO()
    torch.onnx.export(
        neck, (maps,), dynamo=True, verbose=False,
        dynamic_shapes={'maps': [{0: batch, 2: 2 * h, 3: 2 * w}, {0: batch, 2: h, 3: w}]}).save(file)
    for size, n in (((12, 10), 3), ((26, 18), 4)):
        maps = [x.float() for x in build_maps(2, size, batch=n)]
        with torch.no_grad():
            assert largest_error(run_onnx(file.getvalue(), maps), neck(maps)) < 1e-4


@pytest.mark.filterwarnings('ignore')
def test_onnx_of_odd_sizes_equals_eager():
    pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    neck = build(topk=8, fine_fusion='joint', extra_levels=2, kv_pool=(2, 1)).float()
    maps = [x.float() for x in build_maps(size=(13, 10))]
    file = io.BytesIO()
    torch.onnx.export(neck, (maps,), dynamo=True, verbose=False).save(file)
    with torch.no_grad():
        assert largest_error(run_onnx(file.getvalue(), maps), neck(maps)) < 1e-4


@pytest.mark.parametrize('kwargs', [dict(), dict(topk=4), dict(topk=4, kv_pool=2)], ids=str)
def test_memory_grows_with_the_pixels(kwargs):
    """No tensor of queries times keys: 16 times the pixels take 16 times the memory, not 256 times."""
    neck, largest = build(**kwargs).float(), []
    for size in (16, 64):
        with torch.no_grad(), LargestTensor() as mode:
            neck([x.float() for x in build_maps(size=(size, size), batch=1)])
        largest.append(mode.nbytes)
    assert largest[1] <= 16.5 * largest[0]
    assert largest[1] < 4 * 64 ** 2 * 32 ** 2 / 4  # the logits of one head


@necks
@pytest.mark.parametrize('change, words', [
    (lambda maps: maps[:2], ['Got 2 maps', 'expected 3', '[5, 6, 7]']),
    (lambda maps: [*maps, maps[-1]], ['Got 4 maps', 'expected 3']),
    (lambda maps: maps[::-1], ['Map 0', '[2, 7, 3, 2]', '(batch, 5, height, width)', 'finest first']),
    (lambda maps: dict(zip(('c5', 'c4', 'c3'), maps[::-1])), ["Map 'c5'", 'finest first']),
    (lambda maps: [maps[0], maps[1][0], maps[2]], ['Map 1', '[6, 5, 4]', '(batch, 6, height, width)']),
    (lambda maps: [maps[0], maps[1][:1], maps[2]], ['Map 1 holds 1 images', 'map 0 2']),
    (lambda maps: [maps[0], maps[1], maps[2][:, :, :2]], ['Map 1 is 5x4', 'map 2 is 2x2', '2n or 2n - 1']),
    (lambda maps: [maps[0], F.pad(maps[1], (1, 0)), maps[2]], ['Map 0 is 9x7', 'map 1 is 5x5']),
    (lambda maps: [x[:, :, :3, :2] for x in maps], ['Map 0 is 3x2', 'map 1 is 3x2']),
])
def test_maps_that_do_not_fit_are_errors(neck, change, words):
    with pytest.raises(ValueError) as error:
        build(neck)(change(build_maps()))
    assert all(word in str(error.value) for word in words), error.value


@necks
@pytest.mark.parametrize('args, kwargs, message', [
    (((8,), 16), dict(), 'two levels or more, got in_chs=[8]'),
    (((8, 0), 16), dict(), 'must be positive, got in_chs=[8, 0] and out_chs=16'),
    (((8, 8), 0), dict(), 'must be positive, got in_chs=[8, 8] and out_chs=0'),
    (((8, 8), 16), dict(extra_levels=-1), "a number of convolved levels (0 for none) or 'pool', got -1"),
    (((8, 8), 16), dict(extra_levels='p6'), "got 'p6'"),
    (((8, 8), 16), dict(extra_levels=True), 'got True'),
])
def test_bad_arguments_are_named(neck, args, kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        neck(*args, **kwargs)


@pytest.mark.parametrize('kwargs, message', [
    (dict(head_dim=32), 'expansion * out_chs = 0.5 * 16 = 8, must be a multiple of head_dim=32'),
    (dict(kv_pool=(2, 2)), 'kv_pool must be one number, or one for each of the 1 PSTs, got (2, 2)'),
    (dict(kv_pool=0), 'kv_pool must be a positive integer (1 pools nothing), got 0'),
    (dict(topk=-1), 'topk must be a non-negative integer'),
])
def test_bad_options_are_named(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PSTPyramid((8, 8), 16, **{'head_dim': 4, **kwargs})
    with pytest.raises(TypeError, match='windows'):
        PSTPyramid((8, 8), 16, head_dim=4, windows=2)


@necks
def test_device_and_dtype_reach_every_tensor(neck):
    neck = neck((64, 64, 64), 128, extra_levels=2, device='meta', dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in neck.parameters()} == {('meta', torch.bfloat16)}
