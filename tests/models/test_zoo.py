"""Contracts of every registered model: sizes, names, one pass forward and backward, pretrained configuration."""
from pathlib import Path

import pytest
import timm
import torch
from timm.models import is_model_pretrained
from torch.utils.flop_counter import FlopCounterMode

from pst_timm.layers import FINE_FUSIONS
from pst_timm.models import ResNetPST
from tests.models.helpers import MODELS, TINY, build, images

# parameters, GMACs at 224, channels of C4 and C5, fusion width, heads, trunk in timm
TABLE = {
    'resnet18_pst': (14_471_368, 1.950, 256, 512, 256, 4, 'resnet18'),
    'resnet26_pst': (19_698_632, 2.621, 1024, 2048, 256, 4, 'resnet26'),
    'resnet50_pst': (29_260_488, 4.376, 1024, 2048, 256, 4, 'resnet50'),
    'resnet101_pst': (54_423_368, 8.495, 1024, 2048, 512, 8, 'resnet101'),
}
models = pytest.mark.parametrize('name', MODELS)
published = pytest.mark.parametrize('name', TABLE)


def build_meta(name, **kwargs):
    with torch.device('meta'):
        return timm.create_model(name, **kwargs).eval()


def test_the_zoo_is_the_table_and_a_tiny_model():
    assert sorted(MODELS) == sorted([*TABLE, TINY])


@published
def test_parameters_equal_the_table(name):
    assert sum(p.numel() for p in build_meta(name).parameters()) == TABLE[name][0]


@published
def test_macs_are_within_a_percent_of_the_table(name):
    model = build_meta(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device='meta'))
    assert counter.get_total_flops() / 2e9 == pytest.approx(TABLE[name][1], rel=0.01)


@published
def test_widths_equal_the_table(name):
    _, _, c4, c5, width, heads, _ = TABLE[name]
    model = build_meta(name)
    assert (model.pst.in_chs, model.pst.upper_chs, model.pst.out_chs) == (c4, c5, width)
    assert len(model.pst.blocks) == 1
    attn = model.pst.blocks[0].attn
    assert (attn.num_heads, attn.head_dim, attn.dim) == (heads, 32, width // 2)
    assert model.num_features == width and model.head_hidden_size == 1280
    assert model.fc.weight.shape == (1000, 1280)
    assert model.feature_info[3]['num_chs'] == width + c4


@published
def test_trunk_keys_and_shapes_are_timms(name):
    ours = {k: v.shape for k, v in build_meta(name).state_dict().items()}
    timms = {k: v.shape for k, v in build_meta(TABLE[name][-1], num_classes=0).state_dict().items()}
    assert {k: v for k, v in ours.items() if k in timms} == timms
    others = {k.split('.')[0] for k in ours if k not in timms}
    assert others == {'pst', 'fuse_down', 'fuse_merge', 'conv_head', 'fc'}


def test_state_dict_names_and_shapes_are_the_recorded_ones():
    """Checkpoints live under these names: a difference here breaks every published weight."""
    recorded = Path(__file__).with_name('state_dict_names.txt').read_text().splitlines()
    current = [f'{name} {list(tensor.shape)}' for name, tensor in build(TINY, pst_depth=2).state_dict().items()]
    assert sorted(current) == sorted(recorded)


def test_the_tiny_model_is_tiny():
    assert sum(p.numel() for p in build().parameters()) < 800_000


@pytest.mark.parametrize('topk', [4, 10 ** 6])
@pytest.mark.parametrize('fusion', FINE_FUSIONS)
@models
def test_fine_attention_acts_and_repeats_bitwise(name, fusion, topk):
    model = build(name, num_classes=7)
    x = images((96, 64))
    with torch.no_grad():
        coarse = model(x)
        model.set_topk(topk, fusion=fusion)
        fine = model(x)
        assert torch.equal(model(x), fine)
        assert torch.isfinite(fine).all() and not torch.allclose(fine, coarse)
        model.set_topk(0)
        assert torch.equal(model(x), coarse)


@models
def test_configuration(name):
    model = build_meta(name)
    assert is_model_pretrained(name) == (name == TINY)
    assert model.pretrained_cfg['tag'] == 'untrained' and model.num_classes == 1000


@pytest.mark.parametrize('kwargs', [
    dict(), dict(features_only=True), dict(num_classes=5), dict(pretrained_cfg=dict(num_classes=10)),
    dict(pretrained_cfg_overlay=dict(num_classes=10)),
], ids=str)
@pytest.mark.parametrize('name, missing', [
    *((name, f'for {name} yet.') for name in TABLE),
    (f'{TINY}.untrained', f'for {TINY}.untrained, only for {TINY}.digits.'),
])
def test_without_weights_pretrained_says_which_there_are_and_the_ways_on(name, missing, kwargs):
    if name.startswith(TINY) and 'pretrained_cfg' in kwargs:
        missing = missing.replace('.untrained', '')  # a configuration of one's own has no tag
    with pytest.raises(RuntimeError) as error, torch.device('meta'):
        timm.create_model(name, pretrained=True, **kwargs)
    assert str(error.value).startswith(f'No pretrained weights exist {missing} ')
    assert all(word in str(error.value) for word in ('load_trunk', 'register_weights', 'hf-hub:org/name'))


@pytest.mark.parametrize('key', ['pretrained_cfg', 'pretrained_cfg_overlay'])
@pytest.mark.parametrize('source', ['file', 'state_dict'])
@pytest.mark.parametrize('features_only', [False, True])
def test_weights_that_are_given_are_loaded(tmp_path, key, source, features_only):
    given = build()
    torch.save(given.state_dict(), tmp_path / 'model.pth')
    where = {'file': str(tmp_path / 'model.pth'), 'state_dict': given.state_dict()}[source]
    cfg = {source: where, 'num_classes': 1000, 'classifier': 'fc', 'first_conv': 'conv1.0'}
    name = f'{TINY}.untrained' if key == 'pretrained_cfg_overlay' else TINY
    model = timm.create_model(name, pretrained=True, features_only=features_only, **{key: cfg})
    assert torch.equal(getattr(model, 'model', model).pst.conv_in.conv.weight, given.pst.conv_in.conv.weight)


@models
def test_registry(name):
    model = build_meta(name)
    assert isinstance(model, ResNetPST)
    assert timm.is_model(name) and timm.models.model_entrypoint(name).__doc__
    assert model.pretrained_cfg['architecture'] == name
