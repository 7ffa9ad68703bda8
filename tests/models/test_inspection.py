"""What `inspect_tokens` shows is what the layers do."""
import math
import threading

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.utils import reparameterize_model

import pst_timm
from pst_timm.layers import PyramidSparseAttention
from tests.layers import oracle
from tests.layers.helpers import SIZES, build_attention, build_maps
from tests.models.helpers import ODD_SIZE, build, images


def expected_tokens(layer, x, upper, topk):
    """Attention, scores, selection and children as loops in float64, from the weights and the equations alone."""
    w = oracle.arrays(layer.state_dict())
    x, upper = x.double().numpy(), upper.double().numpy()
    q = oracle.conv_norm(oracle.part(w, 'q.'), x)
    kv = oracle.conv_norm(oracle.part(w, 'kv.'), upper)
    fine_size, coarse_size = x.shape[2:], upper.shape[2:]
    d, M = layer.head_dim, math.prod(coarse_size)
    attention, scores, selected, children = [], [], [], []
    for b in range(len(x)):
        for head in range(layer.num_heads):
            queries = q[b, head * d:(head + 1) * d].reshape(d, -1).T
            keys = kv[b, 2 * d * head:2 * d * head + d].reshape(d, -1).T
            logits = np.array([[np.dot(query, key) / math.sqrt(d) for key in keys] for query in queries])
            weights = np.exp(logits)
            attention.append(weights / weights.sum(axis=1, keepdims=True))
            scores.append(logits.mean(axis=0))
            selected.append(sorted(range(M), key=lambda m: -scores[-1][m])[:topk])
            children.append([{
                row * fine_size[1] + col
                for row, col in oracle.children(divmod(m, coarse_size[1]), fine_size, coarse_size)
            } for m in selected[-1]])
    return np.array(attention), np.array(scores), np.array(selected), children


def flat(tensor):
    return tensor.flatten(0, 1).double().numpy()


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('sizes', SIZES)
def test_a_layer_shows_what_the_equations_say(sizes, fused):
    layer = build_attention(topk=2, fused=fused)
    x, upper = build_maps(sizes=sizes)
    with torch.no_grad():
        tokens = layer.inspect(x, upper)
    attention, scores, selected, children = expected_tokens(layer, x, upper, 2)
    assert (tokens.fine_size, tokens.coarse_size) == sizes
    assert tokens.attention.shape == (2, 2, math.prod(sizes[0]), math.prod(sizes[1]))
    np.testing.assert_allclose(flat(tokens.attention), attention, atol=1e-12)
    np.testing.assert_allclose(flat(tokens.scores), scores, atol=1e-12)
    np.testing.assert_array_equal(flat(tokens.selected), selected)
    shown = tokens.children.flatten(0, 1)
    assert [[set(row.tolist()) - {-1} for row in head] for head in shown] == children


class Selections(torch.nn.Module):
    """Notes what the attention layers of a model select in a forward pass."""

    def __init__(self, model, monkeypatch):
        super().__init__()
        self.model, self.seen = model, []
        select = PyramidSparseAttention._select

        def note(layer, q, k, topk):
            self.seen.append(select(layer, q, k, topk))
            return self.seen[-1]

        monkeypatch.setattr(PyramidSparseAttention, '_select', note)

    @torch.no_grad()
    def forward(self, x, topk, fusion=None):
        self.seen.clear()
        self.model.set_topk(topk, fusion)
        return self.model(x), list(self.seen)


@pytest.mark.parametrize('fold', [None, pst_timm.reparameterize, reparameterize_model])
@pytest.mark.parametrize('fusion', ['gate', 'joint'])
def test_a_model_shows_what_it_selects_and_answers(fold, fusion, monkeypatch):
    model = build(pst_depth=2, num_classes=7)
    model = model if fold is None else fold(model)
    x = images()
    found = pst_timm.inspect_tokens(model, x, 3, fusion)
    run = Selections(model, monkeypatch)
    coarse, none = run(x, 0)
    fine, selections = run(x, 3, fusion)
    assert len(found.blocks) == len(selections) == 2 and not none
    # the second block sees what the first one answers with fine attention
    for tokens, selected in zip(found.blocks, selections):
        assert torch.equal(tokens.selected, selected)
    assert not torch.equal(*selections)
    assert torch.equal(found.coarse, coarse) and torch.equal(found.fine, fine)
    assert not torch.allclose(coarse, fine)


# built once: hypothesis runs its test many times
MODEL = build(num_classes=3)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(height=st.integers(33, 120), width=st.integers(33, 120), topk=st.integers(0, 20))
def test_any_size_and_any_k(height, width, topk):
    x = images((height, width), batch=1)
    [tokens] = pst_timm.inspect_tokens(MODEL, x, topk).blocks
    (H, W), (h, w) = tokens.fine_size, tokens.coarse_size
    assert (H, W) == (math.ceil(height / 16), math.ceil(width / 16))
    assert (h, w) == (math.ceil(height / 32), math.ceil(width / 32))
    k = min(topk, h * w)
    assert tokens.selected.shape == (1, 2, k) and tokens.children.shape == (1, 2, k, 4)
    for head in range(2):
        selected = tokens.selected[0, head].tolist()
        assert len(set(selected)) == k
        scores = tokens.scores[0, head]
        rest = [m for m in range(h * w) if m not in selected]
        assert not k or not rest or scores[selected].min() >= scores[rest].max()
        for parent, children in zip(selected, tokens.children[0, head].tolist()):
            row, col = divmod(parent, w)
            assert sorted(c for c in children if c >= 0) == [
                r * W + c for r in (2 * row, 2 * row + 1) for c in (2 * col, 2 * col + 1) if r < H and c < W]
    torch.testing.assert_close(tokens.attention.sum(dim=-1), torch.ones(1, 2, H * W))


def test_equal_maps_of_a_dilated_stage_have_one_child():
    model = build(output_stride=16)
    [tokens] = pst_timm.inspect_tokens(model, images((64, 96)), 5).blocks
    assert tokens.fine_size == tokens.coarse_size == (4, 6)
    assert torch.equal(tokens.children.squeeze(-1), tokens.selected)


def state(model):
    layers = [m for m in model.modules() if isinstance(m, PyramidSparseAttention)]
    return [(m.topk, m.fine_fusion, m.train_topk, m.training, len(m._forward_hooks)) for m in layers]


def test_the_model_is_as_before():
    model = build(topk=2, fine_fusion='joint', pst_depth=2)
    model.pst.blocks[1].attn.set_topk(5, 'gate')
    before, weights = state(model), {k: v.clone() for k, v in model.state_dict().items()}
    found = pst_timm.inspect_tokens(model, images())
    assert [tokens.selected.shape[2] for tokens in found.blocks] == [2, 5]  # None leaves each layer as it is
    pst_timm.inspect_tokens(model, images(), 3, 'gate')
    assert state(model) == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert not found.fine.requires_grad and next(model.parameters()).requires_grad


@pytest.mark.parametrize('topk, fusion, message', [
    (-1, None, 'topk must be a non-negative integer'),
    (1.5, None, 'topk must be a non-negative integer'),
    (2, 'both', 'fine_fusion must be one of'),
])
def test_the_model_is_as_before_after_an_error(topk, fusion, message):
    model = build(topk=4, pst_depth=2)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        pst_timm.inspect_tokens(model, images(), topk, fusion)
    assert state(model) == before


def test_the_model_is_as_before_when_it_fails_in_between(monkeypatch):
    model = build(topk=4)
    before = state(model)
    monkeypatch.setattr(model.fuse_merge, 'forward', lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pst_timm.inspect_tokens(model, images(), 2)
    assert state(model) == before


def test_feature_extractors_show_their_tokens_too():
    features = timm.create_model('test_resnet_pst', features_only=True).eval()
    found = pst_timm.inspect_tokens(features, images(), 2)
    assert len(found.fine) == 5 and found.blocks[0].selected.shape == (2, 2, 2)


@pytest.mark.parametrize('model', [
    lambda: timm.create_model('test_resnet'),
    lambda: build(pst_depth=0),
    lambda: timm.create_model('test_resnet_pst', features_only=True, out_indices=(1, 2)),
    lambda: torch.jit.script(build()),
], ids=['plain', 'no block', 'pruned', 'scripted'])
def test_models_without_attention_are_named(model):
    with pytest.raises(ValueError, match='has no PST attention to look at'):
        pst_timm.inspect_tokens(model().eval(), images())


def test_training_mode_compiled_models_and_single_images_are_refused():
    model = build()
    with pytest.raises(ValueError, match=r'expected a batch of images \(B, in_chans, H, W\)'):
        pst_timm.inspect_tokens(model, images()[0])
    with pytest.raises(ValueError, match='compiled model'):
        pst_timm.inspect_tokens(torch.compile(model), images())
    statistics = model.bn1.running_mean.clone()
    with pytest.raises(ValueError, match='training mode'):
        pst_timm.inspect_tokens(model.train(), images(ODD_SIZE))
    assert model.training and torch.equal(model.bn1.running_mean, statistics)


def test_other_threads_run_the_model_undisturbed():
    model, x = build(topk=0), torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        expected = model(x)
    alone = pst_timm.inspect_tokens(model, x, 4, 'joint')
    seen, inspecting = [], threading.current_thread()

    def meanwhile(*args):
        if threading.current_thread() is inspecting:
            def infer():
                with torch.no_grad():
                    seen.append((model(x), model.inference_settings()))

            other = threading.Thread(target=infer)
            other.start()
            other.join()

    model.layer4.register_forward_hook(meanwhile)
    found = pst_timm.inspect_tokens(model, x, 4, 'joint')
    assert len(seen) == 2, 'once in each pass'
    for y, setting in seen:
        assert torch.equal(y, expected) and setting == {'topk': 0, 'fine_fusion': 'gate'}
    assert torch.equal(found.fine, alone.fine) and len(found.blocks) == len(alone.blocks)
    assert not torch.equal(found.fine, expected)


def test_a_model_compiled_in_place_is_looked_at():
    model, x = build(topk=0), torch.randn(1, 3, 64, 64)
    expected = pst_timm.inspect_tokens(model, x, 2)
    model.compile(backend='eager')
    found = pst_timm.inspect_tokens(model, x, 2)
    assert torch.equal(found.fine, expected.fine) and len(found.blocks) == 1
