"""Weights of one's own behind timm's names."""
import re
import shlex

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg, is_model_pretrained

import pst_timm
from pst_timm import cli
from pst_timm.checkpoints.conversion import convert
from pst_timm.checkpoints.folder import save_folder
from pst_timm.models import resnet_pst
from pst_timm.utils.errors import PSTError
from tests.checkpoints.helpers import build, images, logits, run_args, save_checkpoint
from tests.helpers import randomize

pytestmark = pytest.mark.usefixtures('registry')


def test_a_tag_of_ones_own_is_served_by_name(tmp_path):
    model = build()
    source = convert(save_checkpoint(tmp_path / 'last.pth.tar', model), tmp_path / 'mine.safetensors').path
    pst_timm.register_weights('test_resnet_pst.mine', file=source, default=True)
    assert 'test_resnet_pst.mine' in timm.list_pretrained('*pst*')
    assert torch.equal(logits(timm.create_model('test_resnet_pst.mine', pretrained=True)), logits(model))
    by_default = timm.create_model('test_resnet_pst', pretrained=True)
    assert torch.equal(logits(by_default), logits(model))
    assert by_default.num_classes == 3 and by_default.pretrained_cfg['input_size'] == (3, 64, 64)
    assert by_default.pretrained_cfg['crop_pct'] == 1.0
    # what was not asked for changes nothing
    untrained = timm.create_model('test_resnet_pst')
    assert untrained.num_classes == 1000 and untrained.pretrained_cfg['input_size'] == (3, 160, 160)


def test_resnet50_pst_gets_its_first_weights_and_adapts(tmp_path):
    assert not is_model_pretrained('resnet50_pst')
    model = randomize(timm.create_model('resnet50_pst', num_classes=5)).eval()
    path = save_checkpoint(tmp_path / 'last.pth.tar', model, arch='resnet50_pst')
    pst_timm.register_weights('resnet50_pst.acme', file=path, label_names=('a', 'b', 'c', 'd', 'e'))
    assert timm.list_pretrained('resnet50_pst*') == ['resnet50_pst.acme']
    served = timm.create_model('resnet50_pst', pretrained=True)
    assert torch.equal(logits(served), logits(model))
    assert served.pretrained_cfg['label_names'] == ('a', 'b', 'c', 'd', 'e')
    other = timm.create_model('resnet50_pst.acme', pretrained=True, num_classes=2, in_chans=1)
    assert logits(other, images(channels=1)).shape == (2, 2)
    assert torch.equal(other.conv_head.conv.weight, model.conv_head.conv.weight)
    assert not torch.equal(other.fc.weight[:2], model.fc.weight[:2])


def test_a_second_tag_does_not_become_the_default_unasked(tmp_path):
    first, second = build(), randomize(build(), seed=1)
    pst_timm.register_weights(
        'test_resnet_pst.first', file=save_checkpoint(tmp_path / 'first.pth.tar', first), default=True)
    pst_timm.register_weights('test_resnet_pst.second', file=save_checkpoint(tmp_path / 'second.pth.tar', second))
    assert get_pretrained_cfg('test_resnet_pst').tag == 'first'
    assert torch.equal(logits(timm.create_model('test_resnet_pst.second', pretrained=True)), logits(second))
    pst_timm.register_weights('test_resnet_pst.second', file=tmp_path / 'second.pth.tar', default=True)
    assert get_pretrained_cfg('test_resnet_pst').tag == 'second'
    assert timm.list_pretrained('test_resnet_pst*').count('test_resnet_pst.second') == 1


def test_a_run_that_began_with_published_weights(tmp_path):
    """timm's script notes the name with its tag."""
    model = build()
    path = save_checkpoint(tmp_path / 'last.pth.tar', model, arch='test_resnet_pst.digits')
    pst_timm.register_weights('test_resnet_pst.further', file=path)
    assert torch.equal(logits(timm.create_model('test_resnet_pst.further', pretrained=True)), logits(model))


def test_class_names_come_with_a_file(tmp_path):
    names = ['cat', 'dog', 'newt']
    facts = {'arch': 'test_resnet_pst', 'pretrained_cfg': {'num_classes': 3, 'label_names': names}}
    path = save_checkpoint(tmp_path / 'last.pth.tar', build(), facts=facts)
    pst_timm.register_weights('test_resnet_pst.named', file=path)
    assert timm.create_model('test_resnet_pst.named', pretrained=True).pretrained_cfg['label_names'] == names


def test_mistakes_are_named(tmp_path):
    path = save_checkpoint(tmp_path / 'last.pth.tar', build())
    deep = save_checkpoint(tmp_path / 'deep.pth.tar', build(pst_depth=2))
    before = timm.list_pretrained()
    for name, kwargs, message in (
            ('test_resnet_pst', {'file': path}, 'an architecture and a new tag'),
            ('test_resnet_pst.untrained', {'file': path}, 'an architecture and a new tag'),
            ('test_resnet_pts.mine', {'file': path}, 'Did you mean test_resnet_pst'),
            ('test_resnet_pst.mine', {}, 'either hf_hub_id or file'),
            ('test_resnet_pst.mine', {'file': path, 'hf_hub_id': 'a/b'}, 'either hf_hub_id or file'),
            ('test_resnet_pst.mine', {'file': path, 'crop_pc': 1.}, 'Did you mean crop_pct'),
            ('test_resnet_pst.mine', {'file': tmp_path / 'none.pth.tar'}, 'There is no checkpoint'),
            ('test_resnet_pst.mine', {'file': deep}, 'is not a checkpoint of test_resnet_pst'),
            ('resnet50_pst.mine', {'file': path}, 'holds weights of test_resnet_pst, not of resnet50_pst'),
    ):
        with pytest.raises(PSTError, match=message):
            pst_timm.register_weights(name, **kwargs)
    assert timm.list_pretrained() == before


@pytest.mark.parametrize('kwargs', [
    {'global_pool': 'max'}, {'output_stride': 16}, {'pst_act_layer': 'relu'}, {'act_layer': 'silu'},
], ids=str)
def test_arguments_that_change_no_shape_are_not_dropped(tmp_path, kwargs):
    """The folder tells them, and a tag has no place for them."""
    model = build(**kwargs)
    save_folder(model, tmp_path / 'folder')
    plain = build()
    plain.load_state_dict(model.state_dict())
    assert not torch.equal(logits(plain), logits(model))
    [argument] = kwargs
    before = timm.list_pretrained()
    with pytest.raises(PSTError, match=rf'test_resnet_pst with other arguments \(.*{argument}.*a tag does not') as e:
        pst_timm.register_weights('test_resnet_pst.other', file=tmp_path / 'folder')
    assert timm.list_pretrained() == before
    # the way on that it names
    source = re.search(r"load_model\('(.*)'\)", str(e.value))[1]
    assert torch.equal(logits(pst_timm.load_model(source)), logits(model))


def test_numbers_that_no_layer_shows_are_seen(tmp_path):
    save_folder(timm.create_model('test_vit', num_heads=4), tmp_path / 'folder')
    with pytest.raises(PSTError, match=r"test_vit with other arguments .*'num_heads': 4"):
        pst_timm.register_weights('test_vit.mine', file=tmp_path / 'folder')


@pytest.mark.parametrize('entries', [
    {'args': run_args(gp='max')}, {'args': run_args(model_kwargs={'global_pool': 'max'})},
    {'facts': {'arch': 'test_resnet_pst', 'model_args': {'global_pool': 'max'}}},
], ids=['a flag', 'a keyword', 'facts'])
def test_what_a_run_tells_is_heeded(tmp_path, entries):
    path = save_checkpoint(tmp_path / 'last.pth.tar', build(global_pool='max'), **entries)
    with pytest.raises(PSTError, match=r"other arguments .*'global_pool': 'max'"):
        pst_timm.register_weights('test_resnet_pst.other', file=path)


def test_arguments_without_a_say_are_no_hindrance(tmp_path):
    """Those of training, those that a tag has a place for, and those that are what the architecture has."""
    model = build(
        topk=4, fine_fusion='joint', train_topk=2, train_fine_prob=0.5, drop_rate=0.1, drop_path_rate=0.1,
        pst_zero_init=True, zero_init_last=False, in_chans=1, global_pool='avg', pst_width=64, pst_head_dim=16,
        pretrained_cfg_overlay={'input_size': (1, 64, 64)})
    save_folder(model, tmp_path / 'folder')
    pst_timm.register_weights('test_resnet_pst.mine', file=tmp_path / 'folder', default=True)
    served = timm.create_model('test_resnet_pst', pretrained=True)
    model.set_topk(0)
    x = images(channels=1)
    assert torch.equal(logits(served, x), logits(model, x)) and served.get_classifier().out_features == 3


def test_any_trunk_that_is_not_the_default_is_refused_in_words(tmp_path):
    model = randomize(pst_timm.create_pst('test_efficientnet', num_classes=3)).eval()
    save_folder(model, tmp_path / 'folder')
    with pytest.raises(PSTError, match=r"backbone_pst with other arguments .*'trunk': 'test_efficientnet'"):
        pst_timm.register_weights('backbone_pst.mine', file=tmp_path / 'folder')


def tags_of(arch):
    return list(resnet_pst.default_cfgs[arch].tags)


def test_a_tag_that_is_replaced_keeps_its_place(tmp_path):
    first, again = randomize(build(), seed=1), randomize(build(), seed=2)
    path = save_checkpoint(tmp_path / 'last.pth.tar', first)
    for tag, default in (('x', True), ('y', None)):
        pst_timm.register_weights(f'test_resnet_pst.{tag}', file=path, default=default)
    assert tags_of('test_resnet_pst') == ['x', 'digits', 'y', 'untrained']
    other = save_checkpoint(tmp_path / 'other.pth.tar', again)
    for tag, default in (('x', None), ('y', None), ('y', False)):
        pst_timm.register_weights(f'test_resnet_pst.{tag}', file=other, default=default)
        assert tags_of('test_resnet_pst') == ['x', 'digits', 'y', 'untrained']
    assert torch.equal(logits(timm.create_model('test_resnet_pst', pretrained=True)), logits(again))
    pst_timm.register_weights('test_resnet_pst.x', file=other, default=False)
    assert tags_of('test_resnet_pst') == ['digits', 'y', 'x', 'untrained']


def test_the_only_weights_registered_again_stay_the_default(tmp_path):
    model = randomize(timm.create_model('resnet26_pst', num_classes=3))
    path = save_checkpoint(tmp_path / 'last.pth.tar', model, arch='resnet26_pst')
    for tag, tags in (('x', 'x'), ('x', 'x'), ('y', 'xy'), ('x', 'xy')):
        pst_timm.register_weights(f'resnet26_pst.{tag}', file=path)
        assert tags_of('resnet26_pst') == [*tags, 'untrained']
    assert torch.equal(timm.create_model('resnet26_pst', pretrained=True).fc.weight, model.fc.weight)
    pst_timm.register_weights('resnet34_pst.x', file=save_checkpoint(
        tmp_path / 'other.pth.tar', timm.create_model('resnet34_pst', num_classes=3), arch='resnet34_pst'),
        default=False)
    assert tags_of('resnet34_pst') == ['untrained', 'x']


@pytest.mark.parametrize('wrap', [
    lambda weights: {'model_state_dict': weights},
    lambda weights: {f'model.{k}': v for k, v in weights.items()},
    lambda weights: {'model': {'state_dict': weights}},
    lambda weights: {'state_dict': None, 'model': weights},
], ids=['another name', 'a prefix', 'nested', 'an empty place'])
def test_files_that_timm_does_not_know_are_refused_with_the_way_on(tmp_path, wrap):
    model = build()
    path, target = tmp_path / 'a file.pth', tmp_path / 'mine.safetensors'
    torch.save(wrap(model.state_dict()), path)
    with pytest.raises(PSTError, match=r'timm does not find the weights in .*pst-timm convert .*FILE.safetensors') as e:
        pst_timm.register_weights('test_resnet_pst.mine', file=path)
    words = shlex.split(re.search('pst-timm (.*safetensors --model [a-z_]*)', str(e.value))[1])
    assert cli.main([str(target) if word == 'FILE.safetensors' else word for word in words]) == 0
    pst_timm.register_weights('test_resnet_pst.mine', file=target)
    assert torch.equal(logits(timm.create_model('test_resnet_pst.mine', pretrained=True)), logits(model))


def test_weights_of_any_trunk_keep_their_own_preprocessing(tmp_path):
    model = timm.create_model('backbone_pst', num_classes=3, pretrained_cfg_overlay=dict(
        mean=(0.1, 0.2, 0.3), input_size=(3, 96, 96)))
    save_folder(model, tmp_path / 'folder')
    pst_timm.register_weights('backbone_pst.mine', file=tmp_path / 'folder')
    for name in ('backbone_pst', 'backbone_pst.mine'):
        cfg = timm.create_model(name, pretrained=True).pretrained_cfg
        assert tuple(cfg['mean']) == (0.1, 0.2, 0.3) and tuple(cfg['input_size']) == (3, 96, 96)
