"""Training semantics of the attention: coarse-only by default, the gate, noise, the draws of train_fine_prob."""
import copy
import itertools

import pytest
import torch

from pst_timm.layers import FINE_FUSIONS, PyramidSparseAttention, PyramidSparseTransformer
from tests.helpers import randomize, relative_error
from tests.layers import oracle
from tests.layers.helpers import build_attention, build_maps
from tests.layers.test_module import build_pst

fusions = pytest.mark.parametrize('fusion', FINE_FUSIONS)


def gate_grads(layer):
    return [layer.gate.weight.grad, layer.gate.bias.grad]


def count_fine(layer, calls, **kwargs):
    """How many of a number of training calls ran the fine branch, seen by kv reading the fine map."""
    x, upper = build_maps(sizes=((4, 4), (2, 2)))
    reads = []
    hook = layer.kv.register_forward_hook(lambda module, args, out: reads.append(args[0].shape[2:] == (4, 4)))
    pattern = []
    for _ in range(calls):
        reads.clear()
        layer(x, upper, **kwargs)
        pattern.append(any(reads))
    hook.remove()
    return pattern


@fusions
def test_training_is_coarse_only_by_default(fusion):
    coarse = build_attention(fine_fusion=fusion).train()
    layer = build_attention(fine_fusion=fusion, topk=4).train()
    x, upper = build_maps()
    assert torch.equal(layer(x, upper), coarse(x, upper))
    assert count_fine(layer, 3) == [False] * 3


@pytest.mark.parametrize('kwargs', [
    dict(topk=4), dict(topk=4, fine_fusion='joint'), dict(train_topk=2, fine_fusion='joint'),
    dict(train_topk=2, train_fine_prob=0.),
], ids=str)
def test_a_gate_that_does_not_run_has_a_zero_gradient_and_stays(kwargs):
    layer = build_attention(**kwargs).train()
    before = copy.deepcopy(layer.state_dict())
    x, upper = build_maps()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.)
    layer(x, upper).square().sum().backward()
    optimizer.step()
    assert all(torch.count_nonzero(grad) == 0 for grad in gate_grads(layer))
    after = layer.state_dict()
    assert {name for name in after if torch.equal(after[name], before[name])} == {'gate.weight', 'gate.bias'}


def test_train_topk_reaches_the_gate():
    layer = build_attention(train_topk=2).train()
    x, upper = build_maps()
    layer(x, upper).square().sum().backward()
    assert all(torch.count_nonzero(grad) == grad.numel() for grad in gate_grads(layer))


@pytest.mark.parametrize('trained, switched', [('gate', 'joint'), ('joint', 'gate')])
def test_the_fusion_of_inference_can_change_without_changing_what_is_trained(trained, switched):
    layer = build_attention(train_topk=2, fine_fusion=trained).train()
    x, upper = torch.randn(2, layer.dim, 6, 8).double(), torch.randn(2, layer.dim, 3, 4).double()

    def outputs():
        torch.manual_seed(0)
        return layer(x, upper), layer.eval()(x, upper)

    before = outputs()[0]
    layer.train().set_topk(2, switched)
    after, evaluated = outputs()
    assert torch.equal(before, after)
    layer.zero_grad()
    layer.train()(x, upper).square().sum().backward()
    assert layer.gate.weight.grad.any() == (trained == 'gate')
    layer.eval()
    layer.set_topk(2, trained)
    assert not torch.equal(layer(x, upper), evaluated)


@pytest.mark.parametrize('fused', [True, False], ids=['fused', 'plain'])
@pytest.mark.parametrize('batch', [1, 2])
@pytest.mark.parametrize('num_heads', [1, 2])
@pytest.mark.parametrize('train_topk', [0, 100])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@fusions
def test_gradients_equal_finite_differences(fusion, memory_format, train_topk, num_heads, batch, fused):
    # all tokens are selected, so that noise has no say, and the statistics are fixed
    layer = build_attention(4, num_heads, train_topk=train_topk, fine_fusion=fusion, fused=fused).train()
    for m in (layer.q, layer.kv, layer.proj, layer.pe):
        m.bn.eval()
    layer = layer.to(memory_format=memory_format)
    maps = [t.contiguous(memory_format=memory_format).requires_grad_()
            for t in build_maps(batch, 4, sizes=((3, 4), (2, 2)))]
    assert torch.autograd.gradcheck(lambda x, upper: layer(x, upper), maps)


def test_a_step_with_the_branch_off_gives_the_gate_a_zero_gradient():
    layer = build_attention(train_topk=2, train_fine_prob=0.5).train()
    x, upper = build_maps()
    layer(x, upper, False).square().sum().backward()
    assert all(torch.count_nonzero(grad) == 0 for grad in gate_grads(layer))


@pytest.mark.parametrize('fine', [False, True])
def test_the_caller_may_decide_the_step(fine):
    layer = build_attention(train_topk=2, train_fine_prob=0.5).train()
    assert count_fine(layer, 8, fine=fine) == [fine] * 8


def test_training_attends_as_the_oracle_where_noise_has_no_say():
    """Batch statistics are those of the whole maps; with all tokens selected the result follows from the equations."""
    layer = build_attention(train_topk=100, dim=4).train()
    x, upper = build_maps(channels=4)
    for m in (layer.q, layer.kv, layer.proj, layer.pe):
        m.bn.eval()
    expected = oracle.attention(oracle.arrays(layer.state_dict()), x.numpy(), upper.numpy(), 2, 100, 'gate')
    assert relative_error(layer(x, upper), torch.from_numpy(expected)) < 1e-10


@fusions
def test_batch_statistics_do_not_depend_on_the_selection(fusion):
    stats = []
    for topk in (1, 3):
        layer = build_attention(train_topk=topk, fine_fusion=fusion).train()
        layer(*build_maps())
        stats.append(layer.kv.bn.running_var.clone())
    assert torch.equal(*stats)


def test_noise_perturbs_the_selection_in_training_only():
    layer = build_attention(topk=1, train_topk=1)
    for m in (layer.q, layer.kv, layer.proj, layer.pe):
        m.bn.momentum = 0.  # calls leave the statistics as they are
    x, upper = build_maps()
    layer.train()
    outs = [layer(x, upper) for _ in range(10)]
    assert any(not torch.equal(out, outs[0]) for out in outs)
    torch.manual_seed(3)
    first = layer(x, upper)
    torch.manual_seed(3)
    assert torch.equal(layer(x, upper), first)
    layer.eval()
    state = torch.get_rng_state()
    outs = [layer(x, upper) for _ in range(10)]
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_is_gumbel():
    """The best of mean logits plus Gumbel noise is a token with the probability softmax(mean logits)."""
    layer = build_attention(dim=2, num_heads=1).train()
    q = torch.tensor([[2., 0.], [0., 1.], [1., -1.]]).reshape(1, 1, 3, 2).double()  # (1, 0) on average
    scores = torch.tensor([1.0, 0.0, -1.0, 0.5]).double()
    k = torch.stack([scores / layer.scale, torch.zeros(4).double()], dim=-1).reshape(1, 1, 4, 2)
    draws = 20000
    picked = layer._select(q.expand(draws, -1, -1, -1), k.expand(draws, -1, -1, -1), 1).flatten()
    shares = torch.bincount(picked, minlength=4) / draws
    assert torch.allclose(shares.double(), scores.softmax(0), atol=0.015)


def draws(layer, count, seed=0, step=0):
    layer.train().set_fine_step(seed, step)
    return [layer.draw_fine() for _ in range(count)]


class TestDraws:

    def build(self, prob=0.5):
        return PyramidSparseAttention(8, 2, train_topk=2, train_fine_prob=prob)

    @pytest.mark.parametrize('prob', [0.1, 0.5, 0.9])
    def test_frequency(self, prob):
        assert sum(draws(self.build(prob), 4000)) / 4000 == pytest.approx(prob, abs=0.03)

    @pytest.mark.parametrize('prob, expected', [(0., False), (0, False), (1., True), (1, True)])
    def test_certain(self, prob, expected):
        assert draws(self.build(prob), 200) == [expected] * 200

    def test_are_those_of_the_forward_pass(self):
        layer = build_attention(train_topk=2, train_fine_prob=0.5)
        expected = draws(layer, 20, seed=5)
        layer.set_fine_step(5)
        assert count_fine(layer, 20) == expected
        assert True in expected and False in expected

    def test_same_seed_and_step_give_the_same_sequence(self):
        layer = self.build()
        assert draws(layer, 50, seed=7) == draws(self.build(), 50, seed=7)
        assert draws(layer, 30, seed=7, step=20) == draws(layer, 50, seed=7)[20:]

    def test_seeds_differ(self):
        sequences = {tuple(draws(self.build(), 50, seed=seed)) for seed in range(20)}
        assert len(sequences) == 20

    def test_neighbouring_seeds_and_steps_are_unrelated(self):
        a, b = draws(self.build(), 2000, seed=1), draws(self.build(), 2000, seed=2)
        assert sum(x == y for x, y in zip(a, b)) / 2000 == pytest.approx(0.5, abs=0.05)
        assert sum(x == y for x, y in itertools.pairwise(a)) / 1999 == pytest.approx(0.5, abs=0.05)

    def test_leave_torchs_generator_alone_and_do_not_read_it(self):
        layer = self.build()
        expected = draws(layer, 50)
        torch.manual_seed(99)
        state = torch.get_rng_state()
        assert draws(layer, 50) == expected
        assert torch.equal(torch.get_rng_state(), state)

    def test_nothing_is_drawn_in_eval_or_without_train_topk(self):
        layer = self.build().eval()
        assert not any(layer.draw_fine() for _ in range(50)) and layer.fine_step == 0
        layer = PyramidSparseAttention(8, 2, train_fine_prob=0.5).train()
        assert not any(layer.draw_fine() for _ in range(50)) and layer.fine_step == 0

    def test_evaluation_in_between_does_not_shift_them(self):
        layer = self.build()
        expected = draws(layer, 20)
        layer.set_fine_step(0)
        first = [layer.draw_fine() for _ in range(10)]
        layer.eval()
        layer(torch.randn(1, 8, 4, 4), torch.randn(1, 8, 2, 2))
        layer.train()
        assert first + [layer.draw_fine() for _ in range(10)] == expected

    @pytest.mark.parametrize('drawn_outside', [False, True])
    def test_all_blocks_of_a_module_agree(self, drawn_outside):
        module = build_pst(depth=3, train_topk=2, train_fine_prob=0.5).train()
        module.set_fine_step(11)
        reads = []
        for block in module.blocks:
            block.attn.kv.register_forward_hook(lambda m, args, out: reads.append(args[0].shape[2:] == (6, 5)))
        x, upper = build_maps(channels=6, upper_channels=10)
        pattern = []
        for _ in range(12):
            reads.clear()
            module(x, upper, module.draw_fine() if drawn_outside else None)
            assert sum(reads) in (0, 3)
            pattern.append(sum(reads) == 3)
        assert pattern == draws(self.build(), 12, seed=11)
        assert {block.attn.fine_step for block in module.blocks} == {12}


@pytest.mark.parametrize('topk', [0, 3])
@pytest.mark.parametrize('depth', [0, 2])
def test_drop_path_acts_in_training_only(topk, depth):
    layer = randomize(PyramidSparseTransformer(6, 10, 16, depth=depth, head_dim=4, drop_path=0.5, topk=topk))
    plain = PyramidSparseTransformer(6, 10, 16, depth=depth, head_dim=4, topk=topk)
    plain.load_state_dict(layer.state_dict())
    x, upper = (t.float() for t in build_maps(batch=8, channels=6, upper_channels=10))
    assert torch.equal(layer.eval()(x, upper), plain.eval()(x, upper))
    outs = [layer.train()(x, upper) for _ in range(4)]
    varied = any(not torch.equal(out, outs[0]) for out in outs[1:])
    assert varied == (depth > 0)


@pytest.mark.parametrize('train_topk', [0, 3])
@fusions
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_forward_and_backward(dtype, fusion, train_topk):
    layer = build_attention(topk=3, fine_fusion=fusion, train_topk=train_topk).float()
    x, upper = (t.float().requires_grad_() for t in build_maps())
    with torch.autocast('cpu', dtype=dtype):
        assert torch.isfinite(layer(x, upper)).all()
        y = layer.train()(x, upper)
    y.float().square().mean().backward()
    grads = [x.grad, upper.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]
    assert all(torch.isfinite(grad).all() for grad in grads)
