"""load_trunk: every kind of source, what it reports, and errors that change nothing."""
import copy
import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

import pst_timm
from pst_timm.checkpoints import building
from pst_timm.models import copy_trunk
from pst_timm.utils.errors import PSTError
from tests.helpers import randomize
from tests.models.helpers import BACKBONES, SOME, TINY, build, images

HEAD = ('pst.', 'fuse_down.', 'fuse_merge.', 'conv_head.', 'fc.')


def tiny_trunk(**kwargs):
    """timm's ResNet with the trunk of the tiny model."""
    args = dict(
        block=[BasicBlock, BasicBlock, Bottleneck, BasicBlock], layers=(1, 1, 1, 1), stem_width=16, stem_type='deep',
        channels=(32, 48, 48, 96), num_classes=11)
    return randomize(ResNet(**{**args, **kwargs}), seed=42).eval()


@pytest.fixture
def source():
    return tiny_trunk()


def as_state_dict(source, tmp_path):
    return source.state_dict()


def as_pth(source, tmp_path):
    torch.save(source.state_dict(), tmp_path / 'trunk.pth')
    return str(tmp_path / 'trunk.pth')


def as_path_object(source, tmp_path):
    torch.save(source.state_dict(), tmp_path / 'trunk.pth')
    return tmp_path / 'trunk.pth'


def as_safetensors(source, tmp_path):
    save_file(source.state_dict(), tmp_path / 'trunk.safetensors')
    return str(tmp_path / 'trunk.safetensors')


def as_training_checkpoint(source, tmp_path):
    torch.save({'epoch': 3, 'arch': 'resnet', 'state_dict': source.state_dict()}, tmp_path / 'last.pth.tar')
    return str(tmp_path / 'last.pth.tar')


def as_ema_checkpoint(source, tmp_path):
    return {'epoch': 3, 'state_dict': tiny_trunk(channels=(8, 8, 8, 8)).state_dict(),
            'state_dict_ema': source.state_dict()}


def as_ddp_state_dict(source, tmp_path):
    return {f'module.{k}': v for k, v in source.state_dict().items()}


def as_compiled_ddp_state_dict(source, tmp_path):
    return {f'_orig_mod.module.{k}': v for k, v in source.state_dict().items()}


FORMS = [as_state_dict, as_pth, as_path_object, as_safetensors, as_training_checkpoint, as_ema_checkpoint,
         as_ddp_state_dict, as_compiled_ddp_state_dict]


@pytest.mark.parametrize('form', FORMS)
def test_every_form_of_source(form, source, tmp_path):
    model = build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = pst_timm.load_trunk(model, form(source, tmp_path))
    after, state = model.state_dict(), source.state_dict()
    trunk = [k for k in state if not k.startswith('fc.')]
    assert result.loaded == [k for k in after if not k.startswith(HEAD)] and sorted(result.loaded) == sorted(trunk)
    assert result.untouched == [k for k in after if k.startswith(HEAD)]
    assert sorted(result.ignored) == ['fc.bias', 'fc.weight']
    assert all(torch.equal(after[k], state[k]) for k in result.loaded)
    assert all(torch.equal(after[k], before[k]) for k in result.untouched)
    assert isinstance(result, pst_timm.TrunkLoad)


def test_the_trunk_then_computes_what_the_source_computes(source):
    model = build(features_only=True)
    pst_timm.load_trunk(model, source.state_dict())
    x = images()
    for level in (0, 1, 2):
        expected = source.forward_intermediates(x, [level], intermediates_only=True)[0]
        assert torch.equal(model(x)[level], expected)
    c4 = source.forward_intermediates(x, [3], intermediates_only=True)[0]
    assert torch.equal(model(x)[3][:, -c4.shape[1]:], c4)


@pytest.mark.parametrize('out_indices, stages', [((0, 1, 2, 3, 4), 4), ((3,), 4), ((1, 2), 2), ((0,), 0)])
def test_features_only(out_indices, stages, source):
    model = build(features_only=True, out_indices=out_indices)
    result = pst_timm.load_trunk(model, source.state_dict())
    kept = ('conv1', 'bn1', *(f'layer{i}' for i in range(1, stages + 1)))
    assert sorted(result.loaded) == sorted(k for k in source.state_dict() if k.split('.')[0] in kept)
    state = model.model.state_dict()
    assert all(torch.equal(state[k], source.state_dict()[k]) for k in result.loaded)


@pytest.mark.parametrize('name', SOME)
def test_timms_own_weights_by_name(name, monkeypatch):
    """A name with tag goes to timm with pretrained=True; here timm answers without downloading."""
    trunk = name.removesuffix('_pst')
    source = tiny_trunk() if name == TINY else randomize(timm.create_model(trunk))
    tagged, asked = timm.list_pretrained(f'{trunk}.*')[0], []

    def create_model(model_name, pretrained=False, **kwargs):
        if not pretrained:
            return create(model_name, **kwargs)
        asked.append((model_name, pretrained))
        return source

    model, create = timm.create_model(name), timm.create_model
    monkeypatch.setattr(timm, 'create_model', create_model)
    monkeypatch.setattr(building, 'check_fetchable', lambda name, cache_dir: None)
    monkeypatch.setattr(building, 'find_pretrained', lambda cfg, cache_dir: None)
    result = pst_timm.load_trunk(model, tagged)
    assert asked == [(tagged, True)]
    own, prefix = model.state_dict(), 'trunk.' if name in BACKBONES else ''
    assert result.loaded == [k for k in own if not k.startswith(HEAD)]
    assert set(result.ignored) == {k for k in source.state_dict() if prefix + k not in own or k.startswith('fc.')}
    assert all(torch.equal(own[k], source.state_dict()[k.removeprefix(prefix)]) for k in result.loaded)


def test_local_dir(tmp_path):
    source = timm.create_model('resnet18', num_classes=4)
    save_file(source.state_dict(), tmp_path / 'model.safetensors')
    config = {'architecture': 'resnet18', 'num_classes': 4, 'pretrained_cfg': {'num_classes': 4, 'classifier': 'fc'}}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    model = timm.create_model('resnet18_pst')
    pst_timm.load_trunk(model, f'local-dir:{tmp_path}')
    assert torch.equal(model.conv1.weight, source.conv1.weight)


@pytest.mark.parametrize('in_chans', [1, 4, 6])
def test_first_convolution_is_adapted_as_timm_does(in_chans, source):
    model = build(in_chans=in_chans)
    result = pst_timm.load_trunk(model, source.state_dict())
    expected = timm.models.adapt_input_conv(in_chans, source.state_dict()['conv1.0.weight'])
    assert torch.equal(model.conv1[0].weight, expected)
    assert 'conv1.0.weight' in result.loaded
    assert source.state_dict()['conv1.0.weight'].shape[1] == 3


def test_a_source_of_its_own_kind():
    """A ResNet-PST is a ResNet of this trunk as well: its trunk is taken, its neck is not."""
    model, other = build(), build()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.)
    result = pst_timm.load_trunk(model, other.state_dict())
    assert torch.equal(model.conv1[0].weight, other.conv1[0].weight)
    assert not torch.equal(model.fuse_down.conv.weight, other.fuse_down.conv.weight)
    assert all(k.startswith(HEAD) for k in result.ignored)


def test_counters_may_be_missing(source):
    state = {k: v for k, v in source.state_dict().items() if not k.endswith('num_batches_tracked')}
    result = pst_timm.load_trunk(build(), state)
    assert not any(k.endswith('num_batches_tracked') for k in result.loaded)
    assert any(k.endswith('num_batches_tracked') for k in result.untouched)


def test_dtype_of_the_model_is_kept(source):
    model = build().double()
    pst_timm.load_trunk(model, source.state_dict())
    assert model.layer1[0].conv1.weight.dtype == torch.float64


def deeper():
    return tiny_trunk(layers=(1, 2, 1, 1)).state_dict(), ['layer2.1.conv1.weight']


def shallower():
    state = tiny_trunk().state_dict()
    return {k: v for k, v in state.items() if not k.startswith('layer4')}, ['layer4.0.conv1.weight']


def wider():
    return tiny_trunk(channels=(32, 48, 56, 96)).state_dict(), ['layer3.0.conv1.weight', '56', '48']


def another_block():
    return tiny_trunk(block=BasicBlock).state_dict(), ['layer3.0.', 'trunk']


def another_stem():
    return tiny_trunk(stem_type='').state_dict(), ['conv1.0.weight']


def another_kind():
    return timm.create_model('test_vit').state_dict(), ['conv1.0.weight']


def empty():
    return {}, ['conv1.0.weight']


@pytest.mark.parametrize('case', [deeper, shallower, wider, another_block, another_stem, another_kind, empty])
def test_another_trunk_is_an_error_that_names_the_layer_and_changes_nothing(case):
    state, words = case()
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as error:
        pst_timm.load_trunk(model, state)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('name, other, words', [
    ('resnet50_pst', 'resnet101', ['layer3.6.']),
    ('resnet101_pst', 'resnet50', ['layer3.6.']),
    ('resnet18_pst', 'resnet50', ['layer1.0.']),
    ('resnet50_pst', 'wide_resnet50_2', ['layer1.0.conv']),
])
def test_neighbouring_architectures(name, other, words):
    with torch.device('meta'):
        model, state = timm.create_model(name), timm.create_model(other).state_dict()
    with pytest.raises(ValueError) as error:
        pst_timm.load_trunk(model, state)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize('path', ['nowhere/trunk.pth', 'nowhere/trunk.safetensors'])
def test_a_missing_file_is_named(path):
    with pytest.raises(PSTError, match=f'There is no checkpoint {path}'):
        pst_timm.load_trunk(build(), path)


@pytest.mark.parametrize('name', ['trunk.ckpt', 'trunk'])
def test_a_file_needs_no_known_ending(name, source, tmp_path):
    torch.save(source.state_dict(), tmp_path / name)
    assert pst_timm.load_trunk(build(), str(tmp_path / name)).ignored == ['fc.weight', 'fc.bias']


@pytest.mark.parametrize('name, content', [
    ('empty.pth', b''), ('noise.pth', b'noise'), ('noise.safetensors', b'noise'), ('list.pth', [1, 2]),
])
def test_a_file_that_is_no_state_dict_is_named(name, content, tmp_path):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(PSTError, match=rf'{name} (is|cannot be read: it is truncated|cannot be read as)'):
        pst_timm.load_trunk(build(), str(tmp_path / name))


@pytest.mark.parametrize('source', [None, 3, ['resnet18'], torch.nn.Identity()])
def test_other_sources_are_type_errors(source):
    with pytest.raises(TypeError, match=f'model name, a file or a state dict, got {type(source).__name__}'):
        pst_timm.load_trunk(build(), source)


def test_a_model_without_a_trunk_is_an_error(source):
    with pytest.raises(ValueError, match='VisionTransformer'):
        pst_timm.load_trunk(timm.create_model('test_vit'), source.state_dict())


def test_the_result_prints_in_a_line():
    result = pst_timm.TrunkLoad(loaded=['a'] * 122, untouched=['b'] * 48, ignored=['fc.weight', 'fc.bias'])
    assert repr(result) == str(result) == 'TrunkLoad(loaded 122, untouched 48, ignored 2)'
    assert result.ignored == ['fc.weight', 'fc.bias'] and tuple(result) == (*result,)


def test_copy_trunk_is_load_trunk_without_the_reading(source):
    model, other = build(), build()
    assert copy_trunk(model, source.state_dict()) == pst_timm.load_trunk(other, {'state_dict': source.state_dict()})
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match='which the source has not'):
        copy_trunk(model, {'state_dict': source.state_dict()})
