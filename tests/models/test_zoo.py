"""Contracts of every registered model: sizes, names, one pass forward and backward, pretrained configuration."""
from pathlib import Path

import pytest
import timm
import torch
from timm.models import is_model_pretrained
from torch.utils.flop_counter import FlopCounterMode

from pst_timm.layers import FINE_FUSIONS
from pst_timm.models import PSTModel, ResNetPST
from pst_timm.utils.cost import count_gmacs
from tests.models.helpers import BACKBONES, MODELS, SOME, TINY, build, images

# parameters, GMACs at 224, channels of C4 and C5, fusion width, heads, channels of the head
BUNDLED = {'resnet18_pst': 'resnet18_pst.tin200', TINY: f'{TINY}.digits'}
TABLE = {
    'resnet18_pst': (14_471_368, 1.950, 256, 512, 256, 4, 1280),
    'resnet26_pst': (19_698_632, 2.621, 1024, 2048, 256, 4, 1280),
    'resnet50_pst': (29_260_488, 4.376, 1024, 2048, 256, 4, 1280),
    'resnet101_pst': (54_423_368, 8.495, 1024, 2048, 512, 8, 1280),
    # these are not published ones
    'resnet34_pst': (24_579_528, 3.794, 256, 512, 256, 4, 1280),
    'resnext50_32x4d_pst': (28_732_360, 4.494, 1024, 2048, 256, 4, 1280),
    'mobilenetv4_conv_small_pst': (2_835_592, 0.201, 96, 960, 64, 1, 1280),
    'efficientnet_b0_pst': (5_460_676, 0.402, 112, 320, 128, 2, 1280),
    'regnety_008_pst': (7_119_840, 0.849, 320, 768, 128, 2, 768),
    'convnext_atto_pst': (4_212_736, 0.581, 160, 320, 128, 2, 320),
}
SMALLEST = 'mobilenetv4_conv_small_pst'
models = pytest.mark.parametrize('name', SOME)
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
    _, _, c4, c5, width, heads, hidden = TABLE[name]
    model = build_meta(name)
    assert (model.pst.in_chs, model.pst.upper_chs, model.pst.out_chs) == (c4, c5, width)
    assert len(model.pst.blocks) == 1
    attn = model.pst.blocks[0].attn
    assert (attn.num_heads, attn.head_dim, attn.dim) == (heads, 32, width // 2)
    assert model.num_features == width and model.head_hidden_size == hidden
    assert model.fc.weight.shape == (1000, hidden)
    assert model.feature_info[-2]['num_chs'] == width + c4


@published
def test_trunk_keys_and_shapes_are_timms(name):
    ours = {k.removeprefix('trunk.'): v.shape for k, v in build_meta(name).state_dict().items()}
    plain = timm.create_model(name.removesuffix('_pst'), num_classes=0)
    if name in BACKBONES:
        plain.prune_intermediate_layers(list(range(len(plain.feature_info))), prune_norm=True)
        own = {k.split('.')[0] for k in build_meta(name).state_dict()}
        assert own == {'trunk', 'pst', 'fuse_down', 'fuse_merge', 'conv_head', 'fc'}
    timms = {k: v.shape for k, v in plain.state_dict().items()}
    assert {k: v for k, v in ours.items() if k in timms} == timms
    others = {k.split('.')[0] for k in ours if k not in timms}
    assert others == {'pst', 'fuse_down', 'fuse_merge', 'conv_head', 'fc'}


# resnet26 is half of resnet50, of which it has the width
@pytest.mark.parametrize('name', [name for name in TABLE if name != 'resnet26_pst'])
def test_what_pst_adds_is_within_its_bound(name):
    plain, ours = (count_gmacs(build_meta(n), (3, 224, 224)) for n in (name.removesuffix('_pst'), name))
    assert 0.02 < ours / plain - 1 < (0.15 if name == SMALLEST else 0.1)


@pytest.mark.parametrize('file, kwargs', [
    ('state_dict_names.txt', dict(name=TINY)),
    ('state_dict_names_backbone.txt', dict(name='backbone_pst', trunk='test_efficientnet')),
])
def test_state_dict_names_and_shapes_are_the_recorded_ones(file, kwargs):
    """Checkpoints live under these names: a difference here breaks every published weight."""
    recorded = Path(__file__).with_name(file).read_text().splitlines()
    current = [f'{name} {list(tensor.shape)}' for name, tensor in build(**kwargs, pst_depth=2).state_dict().items()]
    assert sorted(current) == sorted(recorded)


def test_the_tiny_model_is_tiny():
    assert sum(p.numel() for p in build().parameters()) < 800_000


@pytest.mark.parametrize('topk', [4, 10 ** 6])
@pytest.mark.parametrize('fusion', FINE_FUSIONS)
@pytest.mark.parametrize('name', SOME)
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
    assert is_model_pretrained(name) == (name in BUNDLED)
    assert model.pretrained_cfg['tag'] == 'untrained' and model.num_classes == 1000


@pytest.mark.parametrize('kwargs', [
    dict(), dict(features_only=True), dict(num_classes=5), dict(pretrained_cfg=dict(num_classes=10)),
    dict(pretrained_cfg_overlay=dict(num_classes=10)),
], ids=str)
@pytest.mark.parametrize('name, missing', [
    *((name, f'for {name} yet, only for {", ".join(BUNDLED.values())}:') for name in TABLE if name not in BUNDLED),
    *((f'{name}.untrained', f'for {name}.untrained, only for {weights}:') for name, weights in BUNDLED.items()),
])
def test_without_weights_pretrained_says_which_there_are_and_the_ways_on(name, missing, kwargs):
    if name.endswith('.untrained') and 'pretrained_cfg' in kwargs:
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


def test_weights_elsewhere_take_the_place_of_those_in_the_package(tmp_path):
    given = build()
    torch.save(given.state_dict(), tmp_path / 'model.pth')
    overlay = dict(url=(tmp_path / 'model.pth').as_uri(), num_classes=1000)
    model = timm.create_model(TINY, pretrained=True, cache_dir=str(tmp_path / 'cache'), pretrained_cfg_overlay=overlay)
    assert torch.equal(model.fc.weight, given.fc.weight)
    # without one, and where the place is the empty text, those of the package
    model = timm.create_model(TINY, pretrained=True, pretrained_cfg_overlay=dict(url='', mean=(0, 0, 0)))
    assert model.num_classes == 10


@pytest.mark.parametrize('kwargs, found', [
    (dict(pst_depth=0), 'are unknown to it (the first: pst.blocks.0'),
    (dict(pst_width=128), 'have another shape (the first: pst.conv_in.conv.weight'),
    (dict(head_skip=True), 'have another shape (the first: fc.weight'),
    (dict(num_classes=5, pst_pos_enc=False), 'are unknown to it'),
    (dict(features_only=True, layers=(1, 1, 1, 2)), 'tensors are missing (the first: layer4.1'),
    (dict(stem_type=''), 'tensors are missing (the first: conv1.weight)'),
], ids=str)
def test_arguments_that_weights_do_not_fit_are_an_error_for_people(kwargs, found):
    with pytest.raises(RuntimeError) as error:
        timm.create_model(TINY, pretrained=True, **kwargs)
    message = str(error.value)
    assert message.startswith(f'The weights {BUNDLED[TINY]} do not fit the arguments') and found in message
    assert 'load_trunk' in message and len(message) < 600


def test_arguments_that_weights_do_not_fit_may_be_had_as_with_any_model():
    model = timm.create_model(TINY, pretrained=True, pst_pos_enc=False, pretrained_strict=False)
    assert torch.equal(model.fc.bias, timm.create_model(TINY, pretrained=True).fc.bias)


@pytest.mark.parametrize('pretrained', [True, False])
@pytest.mark.parametrize('name', [f'{TINY}.digit', 'resnet50_pst.a1_in1k'])
def test_a_wrong_tag_is_told_those_there_are(name, pretrained):
    with pytest.raises(RuntimeError) as error:
        timm.create_model(name, pretrained=pretrained)
    assert str(error.value).startswith(f"There are no weights '{name}'. Did you mean")
    with pytest.raises(RuntimeError, match='The tags of the model: '):
        timm.create_model(name.split('.')[0], pretrained=pretrained, pretrained_cfg='wrong')


@models
def test_registry(name):
    model = build_meta(name)
    assert isinstance(model, PSTModel) and isinstance(model, ResNetPST) == (name not in BACKBONES)
    assert timm.is_model(name) and timm.models.model_entrypoint(name).__doc__
    assert model.pretrained_cfg['architecture'] == name
