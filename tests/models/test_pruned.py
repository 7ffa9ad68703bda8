"""The architecture `pruned`: widths as plain data, and all of timm's habits on what comes of them."""
import pytest
import timm
import torch

import pst_timm
from pst_timm.models.pruned import Kept, cut, tensors_of, widths
from tests.helpers import randomize, relative_error
from tests.models.helpers import TINY, build, images

# C4, C5, P, D, F and the head each of a width of its own
CHANNELS = {
    'layer1.0.conv1': [32, 8], 'layer1.0.bn1': 8, 'layer1.0.conv2': [8, 32],
    'layer3.0.conv3': [48, 160], 'layer3.0.bn3': 160, 'layer3.0.downsample.0': [48, 160],
    'layer3.0.downsample.1': 160,
    'layer4.0.conv1': [160, 96], 'layer4.0.conv2': [96, 80], 'layer4.0.bn2': 80, 'layer4.0.downsample.0': [160, 80],
    'layer4.0.downsample.1': 80,
    'pst.conv_in.conv': [160, 32], 'pst.conv_upper.conv': [80, 32],
    'pst.conv_out.conv': [64, 24], 'pst.conv_out.bn': 24,
    'fuse_down.conv': [184, 48], 'fuse_down.bn': 48,
    'fuse_merge.conv': [128, 40], 'fuse_merge.bn': 40,
    'conv_head.conv': [40, 112], 'conv_head.bn': 112, 'fc': [112, None],
}


def narrow(channels=CHANNELS, arch=TINY, **kwargs):
    return build('pruned', arch=arch, channels=channels, **kwargs)


def test_the_layers_have_the_widths_that_are_told():
    model = narrow()
    found, before = widths(model), widths(build())
    assert {name: width for name, width in found.items() if width != before[name]} == {**CHANNELS, 'fc': [112, 1000]}
    assert type(model) is pst_timm.ResNetPST and model.state_dict().keys() == build().state_dict().keys()
    assert model.pretrained_cfg['architecture'] == 'pruned'
    assert model.pretrained_cfg['first_conv'] == 'conv1.0' and model.pretrained_cfg['input_size'] == (3, 160, 160)


def test_without_channels_it_is_the_architecture_itself():
    assert widths(timm.create_model('pruned', arch=TINY)) == widths(timm.create_model(TINY))
    assert timm.create_model('pruned', device='meta').plain_name == 'resnet18'


@pytest.mark.parametrize('kwargs', [
    {}, dict(head_skip=True, channels={**CHANNELS, 'fc': [192, None]}), dict(topk=8), dict(topk=4, fine_fusion='joint'),
    dict(pst_depth=0, channels={k: v for k, v in CHANNELS.items() if 'conv_upper' not in k} | {
        'pst.conv_out.conv': [32, 24]}),
    dict(pst_depth=2, channels={**CHANNELS, 'pst.conv_out.conv': [96, 24]}),
])
def test_it_is_folded_and_scripted_as_any_other(kwargs):
    model = narrow(**kwargs)
    x = images()
    expected = model(x)
    assert torch.isfinite(expected).all() and expected.shape == (2, 1000)
    assert relative_error(pst_timm.reparameterize(model)(x), expected) < 1e-5
    assert relative_error(torch.jit.script(model)(x), expected) < 1e-5


def test_it_gives_its_levels():
    model = timm.create_model('pruned', arch=TINY, channels=CHANNELS, features_only=True).eval()
    levels = model(images())
    assert [level.shape[1] for level in levels] == model.feature_info.channels() == [32, 32, 48, 184, 40]
    few = timm.create_model('pruned', arch=TINY, channels=CHANNELS, features_only=True, out_indices=(2, 3)).eval()
    assert [level.shape[1] for level in few(images())] == [48, 184]


def test_a_plain_model_gives_as_many_levels_as_ever():
    model = timm.create_model('pruned', arch='test_convnext', features_only=True)
    assert len(model(images((64, 64)))) == len(model.feature_info.channels()) == 4


@pytest.mark.parametrize('kwargs', [dict(num_classes=3), dict(num_classes=0), dict(num_classes=0, global_pool='')])
def test_it_is_made_for_other_images_and_classes(kwargs):
    """What was not cut is as it is asked for."""
    model = narrow({**CHANNELS, 'conv1.0': [None, 8], 'conv1.1': 8, 'conv1.3': [8, 16]}, in_chans=1, **kwargs)
    assert model(images((64, 64), chans=1)).shape[1] == (kwargs['num_classes'] or 112)


@pytest.mark.parametrize('classes, pool', [(7, None), (7, 'catavgmax'), (0, '')])
def test_its_classifier_is_replaced(classes, pool):
    model = narrow()
    assert (model.num_features, model.head_hidden_size) == (40, 112)
    model.reset_classifier(classes, pool)
    shape = model(images((64, 64))).shape
    assert shape == ((2, classes) if classes else (2, 112, 2, 2))


def test_its_attention_is_set_as_ever():
    model = narrow()
    x = images()
    coarse = model(x)
    model.set_topk(8)
    assert not torch.equal(model(x), coarse)
    model.set_topk(0)
    assert torch.equal(model(x), coarse)


def test_it_is_trained():
    model = narrow(num_classes=3).train()
    model(images((64, 64))).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('name, channels', [
    ('test_convnext', {'stages.0.blocks.0.mlp.fc1': [24, 40], 'stages.0.blocks.0.mlp.fc2': [40, 24]}),
    ('test_efficientnet', {'conv_head': [64, 96], 'bn2': 96, 'classifier': [96, None]}),
])
def test_any_architecture_will_do(name, channels):
    wide = timm.create_model(name)
    model = timm.create_model('pruned', arch=name, channels=channels).eval()
    assert type(model) is type(wide)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in wide.parameters())
    model.reset_classifier(5)
    assert model(images((64, 64))).shape == (2, 5)


def test_it_takes_the_arguments_of_the_architecture():
    model = timm.create_model('pruned', arch='backbone_pst', trunk='test_convnext', pst_width=64, topk=2, num_classes=3)
    assert model.plain_name == 'test_convnext' and model.inference_settings()['topk'] == 2
    assert model.own_args == {'pst_width': 64, 'head_hidden_size': model.head_hidden_size, 'arch': 'backbone_pst',
                              'channels': {}}


@pytest.mark.parametrize('change, said', [
    ({'layer9.conv1': 8}, "has no layer 'layer9.conv1' with channels"),
    ({'layer1.0.bn11': 8}, 'Did you mean layer1.0.bn1'),
    ({'layer1': 8}, "has no layer 'layer1' with channels"),
    ({'layer1.0.bn1': -8}, 'layer1.0.bn1 can have at most 32 channels, and at least one; got -8'),
    ({'layer1.0.bn1': 0}, 'at least one; got 0'),
    ({'layer1.0.bn1': 33}, 'at most 32 channels'),
    ({'layer1.0.bn1': 8.}, 'got 8.0'),
    ({'layer1.0.bn1': True}, 'got True'),
    ({'layer1.0.bn1': None}, 'got None'),
    ({'layer1.0.conv1': [None, 0]}, r'got \[None, 0\]'),
    ({'layer1.0.bn1': '8'}, "got '8'"),
    ({'layer1.0.bn1': [8, 8]}, r'got \[8, 8\]'),
    ({'layer1.0.conv1': 8}, 'at most 32 and 32 channels'),
    ({'layer1.0.conv1': [32, 64]}, 'at most 32 and 32 channels'),
    ({'layer1.0.conv1': [32, 10 ** 12]}, 'at most 32 and 32 channels'),
    ({'layer1.0.conv1': [32, 1]}, 'layer1.0.bn1 takes 8 channels and is given 1'),
    ({'layer1.0.bn1': 1}, 'layer1.0.bn1 takes 1 channels and is given 8'),
    ({'conv1.0': [1, 16]}, 'conv1.0 takes 1 channels and is given 3'),
    ({'layer1.0.conv2': [8, 16]}, 'do not fit together'),
    ({'pst.blocks.0.attn.kv.conv': [32, 8]}, 'do not fit together'),
    ({'pst.blocks.0.attn.pe.conv': [32, 8]}, 'convolves 1 channels to 1 in each of its groups'),
])
def test_channels_that_do_not_fit_are_told_in_one_sentence(change, said):
    with pytest.raises(ValueError, match=said) as error:
        timm.create_model('pruned', arch=TINY, channels={**CHANNELS, **change}, device='meta')
    assert '\n' not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize('arch', ['pruned', 'resnet18.a1_in1k', 'hf-hub:a/b', 'resnet19', 7])
def test_what_is_pruned_is_an_architecture(arch):
    with pytest.raises(ValueError, match='is no architecture of timm that could be pruned'):
        timm.create_model('pruned', arch=arch)


def test_a_layer_keeps_the_channels_that_are_told():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 1), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 8, 3, groups=4), torch.nn.Conv2d(8, 5, 1))
    randomize(net).eval()
    x, kept = images((8, 8)), torch.tensor([0, 1, 4, 5, 6, 7])
    with torch.no_grad():
        net[3].weight[:, 2:4] = 0.  # so that nothing reads the rest
    expected = net(x)
    cut(net, {'0': Kept(None, kept), '1': Kept(None, kept), '2': Kept(kept, kept), '3': Kept(kept, None)})
    assert (net[2].groups, net[2].in_channels, net[2].out_channels) == (3, 6, 6)
    assert [t.shape[0] for _, t, _ in tensors_of(net, '1', 'out')] == [6] * 4
    assert relative_error(net(x), expected) < 1e-6


def test_what_is_frozen_stays_frozen():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1).requires_grad_(False))
    cut(net, {'0': Kept(None, torch.arange(4))})
    assert not any(p.requires_grad for p in net.parameters())
