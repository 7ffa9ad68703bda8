"""What a model tells of itself: its settings, those worth a comparison, its tokens, its place in training."""
import pytest
import timm
import torch

import pst_timm
from pst_timm.models import ResNetPST
from tests.models.helpers import TINY, build, images

SIZES = [(64, 64), (105, 75), (33, 200), (1, 1)]


def settings_of(model):
    return [(attn.topk, attn.fine_fusion) for attn in model.pst.attentions()]


def pruned():
    model = build()
    model.prune_intermediate_layers([2])
    return model


WITHOUT = {'pst_depth=0': lambda: build(pst_depth=0), 'pruned': pruned}
without_attention = pytest.mark.parametrize('make', WITHOUT.values(), ids=WITHOUT)


def test_settings_make_the_same_model_again():
    model, x = build(), images()
    assert model.inference_settings() == {'topk': 0, 'fine_fusion': 'gate'}
    model.set_topk(3, 'joint')
    assert model.inference_settings() == {'topk': 3, 'fine_fusion': 'joint'}
    other = timm.create_model(TINY, **model.inference_settings()).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize('settings, inside', [
    (dict(topk=5, fine_fusion='joint'), [(5, 'joint')] * 2),
    (dict(topk=5), [(5, 'gate'), (5, 'joint')]),
    (dict(fine_fusion='gate'), [(2, 'gate'), (0, 'gate')]),
    (dict(topk=0, fine_fusion='coarse'), [(0, 'gate'), (0, 'joint')]),
    (dict(), [(2, 'gate'), (0, 'joint')]),
])
def test_settings_for_a_while(settings, inside):
    model = build(pst_depth=2)
    first, second = model.pst.attentions()
    first.set_topk(2, 'gate')
    second.set_topk(0, 'joint')
    before = settings_of(model)
    with model.with_settings(**settings):
        assert settings_of(model) == inside
        with model.with_settings(topk=1):
            assert [k for k, _ in settings_of(model)] == [1, 1]
        assert settings_of(model) == inside
    assert settings_of(model) == before
    with pytest.raises(KeyboardInterrupt), model.with_settings(**settings):
        raise KeyboardInterrupt
    assert settings_of(model) == before


@pytest.mark.parametrize('settings, error, words', [
    (dict(topk=-1), ValueError, 'topk.*-1'),
    (dict(topk=4, fine_fusion='mix'), ValueError, "'mix'"),
    (dict(topk=4, fine_fusion='coarse'), ValueError, 'topk=4'),
    (dict(fine_fusion='coarse'), ValueError, 'topk=None'),
    (dict(top_k=4), TypeError, 'top_k'),
])
def test_settings_that_there_are_not_change_nothing(settings, error, words):
    model = build(topk=2)
    with pytest.raises(error, match=words), model.with_settings(**settings):
        pytest.fail('entered')
    assert model.inference_settings() == {'topk': 2, 'fine_fusion': 'gate'}


def test_a_sweep_has_every_setting_once():
    model, x = build(), images()
    settings = model.sweep_settings([4, 0, 2, 4, 0])
    assert [(s['topk'], s['fine_fusion']) for s in settings] == [
        (4, 'gate'), (4, 'joint'), (0, 'coarse'), (2, 'gate'), (2, 'joint')]
    outs = []
    for s in settings:
        with model.with_settings(**s), torch.no_grad():
            outs.append(model(x))
    assert not any(torch.equal(a, b) for i, a in enumerate(outs) for b in outs[:i])
    assert model.sweep_settings([]) == []


def test_a_table_names_what_is_selected():
    model = build()
    rows = [model.settings_columns(s, (64, 96)) for s in model.sweep_settings([0, 3, 64])]
    assert [(row['topk'], row['fine_fusion'], row['selected']) for row in rows] == [
        (0, 'coarse', 0), (3, 'gate', 3), (3, 'joint', 3), (64, 'gate', 6), (64, 'joint', 6)]
    assert model.settings_columns(dict(topk=64, fine_fusion='gate'), 64)['selected'] == 4


@without_attention
def test_a_model_without_attention_has_one_setting(make):
    model = make()
    assert model.inference_settings() == {} and model.tokens((64, 64)) == 0
    [only] = model.sweep_settings([0, 2, 4])
    assert model.settings_columns(only, 64) == dict(topk=0, fine_fusion='coarse', selected=0)
    expected = model(images())
    with model.with_settings(**only):
        assert torch.equal(model(images()), expected)
    model.set_train_step(1, 2)


@pytest.mark.parametrize('output_stride', [8, 16, 32])
@pytest.mark.parametrize('size', SIZES)
def test_tokens_are_those_that_the_layers_see(size, output_stride):
    model = build(output_stride=output_stride)
    [block] = pst_timm.inspect_tokens(model, images(size), topk=10 ** 6).blocks
    assert model.tokens(size) == block.scores.shape[2] == block.selected.shape[2]
    assert model.tokens(64) == model.tokens((64, 64))


def test_the_training_step_has_two_names():
    assert ResNetPST.set_fine_step is ResNetPST.set_train_step
    model = build(train_topk=2, train_fine_prob=0.5, pst_depth=2)
    model.set_train_step(7, 20)
    assert [(attn.fine_seed, attn.fine_step) for attn in model.pst.attentions()] == [(7, 20)] * 2
