"""Weights of one's own behind timm's names."""
import pytest
import timm
import torch
from timm.models import get_pretrained_cfg, is_model_pretrained

import pst_timm
from pst_timm.checkpoints.conversion import convert
from pst_timm.utils.errors import PSTError
from tests.checkpoints.helpers import build, images, logits, save_checkpoint
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
