"""Contracts of every registered model: sizes, names, one pass forward and backward, pretrained configuration."""
from pathlib import Path

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg, is_model_pretrained
from torch.utils.flop_counter import FlopCounterMode

from pst_timm.layers import FINE_FUSIONS
from pst_timm.models import ResNetPST
from tests.models.helpers import LEVELS, MODELS, TINY, build, images, unused

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


@models
def test_forward_and_backward(name):
    model = build(name, random=False, num_classes=7).train()
    y = model(images((64, 64)))
    assert y.shape == (2, 7) and torch.isfinite(y).all()
    y.square().sum().backward()
    assert unused(model) == set()
    gates = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert gates == [f'pst.blocks.0.attn.gate.{n}' for n in ('weight', 'bias')]


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
def test_features(name):
    model = build(name, features_only=True, random=False)
    x = images((64, 96))
    with torch.no_grad():
        features = model(x)
    assert model.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert [tuple(f.shape) for f in features] == [
        (2, chs, 64 // stride, 96 // stride)
        for chs, stride in zip(model.feature_info.channels(), model.feature_info.reduction())
    ]
    assert len(features) == LEVELS


@models
def test_configuration(name):
    cfg = get_pretrained_cfg(f'{name}.untrained')
    assert is_model_pretrained(name) == (name == TINY)
    model = build_meta(name)
    assert model.pretrained_cfg['tag'] == 'untrained'
    assert cfg.num_classes == model.num_classes == 1000
    assert cfg.classifier == 'fc' == model.get_classifier(name_only=True)
    first = model.get_submodule(cfg.first_conv)
    assert isinstance(first, torch.nn.Conv2d) and first.in_channels == 3
    size = model.forward_features(torch.empty(1, *cfg.input_size, device='meta')).shape[2:]
    assert tuple(size) == tuple(cfg.pool_size)


def pretrained_error(name):
    with pytest.raises(Exception) as error, torch.device('meta'):
        timm.create_model(name, pretrained=True)
    return error.type, str(error.value).replace(name, '{name}')


@published
def test_pretrained_without_weights_is_timms_own_error(name):
    untrained = next(m for m in timm.list_models('*net*') if m not in MODELS and not is_model_pretrained(m))
    kind, message = pretrained_error(name)
    assert (kind, message) == pretrained_error(untrained)
    assert '{name}' in message


@models
def test_registry(name):
    model = build_meta(name)
    assert isinstance(model, ResNetPST)
    assert timm.is_model(name) and timm.models.model_entrypoint(name).__doc__
    assert model.pretrained_cfg['architecture'] == name
