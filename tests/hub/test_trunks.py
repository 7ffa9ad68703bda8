"""Trunks that begin with weights from the Hub, and models over any trunk as checkpoints and folders."""
import json
import os
import pickle

import pytest
import timm
import torch
from safetensors.torch import save
from timm.models import adapt_input_conv

import pst_timm
from pst_timm.checkpoints import create_model, load_model, read_checkpoint
from pst_timm.checkpoints.folder import save_folder
from pst_timm.engine import train
from pst_timm.utils.errors import PSTError, Unavailable
from tests.engine.helpers import tiny_train_args
from tests.helpers import randomize

PLAIN = 'test_efficientnet'
REPO = f'timm/{PLAIN}.r160_in1k'
BUILDERS = pytest.mark.parametrize('make', [timm.create_model, create_model], ids=['timm', 'our door'])


@pytest.fixture
def source(hub):
    """The plain model whose weights are on the Hub under timm's name for them."""
    model = randomize(timm.create_model(PLAIN), seed=5)
    hub.create(REPO)
    hub.commit(REPO, 'main', 'weights', {'model.safetensors': save(model.state_dict())})
    return model.state_dict()


def is_begun(model, source):
    net = getattr(model, 'model', model)
    trunk = {k: v for k, v in net.state_dict().items() if k.startswith('trunk.')}
    return bool(trunk) and all(torch.equal(v, source[k.removeprefix('trunk.')]) for k, v in trunk.items())


@BUILDERS
@pytest.mark.parametrize('which', [True, 'r160_in1k', f'{PLAIN}.r160_in1k'])
def test_one_call_begins_the_trunk(make, which, source):
    assert is_begun(make('backbone_pst', trunk=PLAIN, pretrained_trunk=which), source)
    low = make('backbone_pst', trunk=PLAIN, pretrained_trunk=which, features_only=True, out_indices=(1,))
    assert is_begun(low, source)
    grey = make('backbone_pst', trunk=PLAIN, pretrained_trunk=which, in_chans=1)
    assert torch.equal(grey.trunk.conv_stem.weight, adapt_input_conv(1, source['conv_stem.weight']))


@BUILDERS
def test_every_model_of_the_zoo_takes_it(make, hub):
    plain = timm.create_model('resnet18')
    hub.create('timm/resnet18.a1_in1k')
    hub.commit('timm/resnet18.a1_in1k', 'main', 'weights', {'model.safetensors': save(plain.state_dict())})
    model = make('resnet18_pst', pretrained_trunk=True)
    assert torch.equal(model.layer4[0].conv1.weight, plain.layer4[0].conv1.weight)
    assert model.num_classes == 1000 and model.pretrained_cfg['tag'] == 'untrained'


@BUILDERS
def test_images_are_prepared_as_the_weights_know_it(make, hub):
    name = 'mobilenetv4_conv_small.e3600_r256_in1k'
    hub.create(f'timm/{name}')
    weights = timm.create_model('mobilenetv4_conv_small').state_dict()
    hub.commit(f'timm/{name}', 'main', 'weights', {'model.safetensors': save(weights)})
    half = (0.5, 0.5, 0.5)
    assert timm.get_pretrained_cfg(name).mean == half
    plain = make('mobilenetv4_conv_small_pst')
    for arch, kwargs in (
            ('mobilenetv4_conv_small_pst', {}), ('mobilenetv4_conv_small_pst', dict(features_only=True)),
            ('backbone_pst', dict(trunk='mobilenetv4_conv_small'))):
        model = make(arch, pretrained_trunk='e3600_r256_in1k', **kwargs)
        assert tuple(model.pretrained_cfg['mean']) == tuple(model.pretrained_cfg['std']) == half, arch
    told = make(
        'mobilenetv4_conv_small_pst', pretrained_trunk='e3600_r256_in1k', pretrained_cfg_overlay=dict(mean=(0, 0, 0)))
    assert told.pretrained_cfg['mean'] == (0, 0, 0) and tuple(told.pretrained_cfg['std']) == half
    for key in ('mean', 'input_size'):  # of others nothing has changed
        assert make('mobilenetv4_conv_small_pst').pretrained_cfg[key] == plain.pretrained_cfg[key]


def test_by_name_and_by_tag(source):
    model = pst_timm.create_pst(PLAIN)
    assert not is_begun(model, source)
    assert len(pst_timm.load_trunk(model, f'{PLAIN}.r160_in1k').loaded) > 20 and is_begun(model, source)
    assert is_begun(pst_timm.create_pst(f'{PLAIN}.r160_in1k', pretrained_trunk=True), source)
    assert not is_begun(pst_timm.create_pst(f'{PLAIN}.r160_in1k'), source)


@BUILDERS
def test_weights_that_there_are_not(make, hub):
    with pytest.raises(ValueError, match=r'no weights test_efficientnet.r161_in1k. Did you mean .*r160_in1k'):
        make('backbone_pst', trunk=PLAIN, pretrained_trunk='r161_in1k')
    with pytest.raises((ValueError, TypeError), match='pretrained_trunk'):
        make(PLAIN, pretrained_trunk=True)
    with pytest.raises(ValueError, match='leave pretrained_trunk out'):
        make('test_resnet_pst', pretrained=True, pretrained_trunk=True)
    with pytest.raises((OSError, PSTError)):  # the Hub has no such repository
        make('backbone_pst', trunk='test_byobnet', pretrained_trunk=True)


def test_a_hub_that_is_not_there_says_so(hub, monkeypatch):
    monkeypatch.setattr('pst_timm.checkpoints.fetching.HF_HUB_OFFLINE', True)
    with pytest.raises(Unavailable, match=f'{PLAIN}.*not in the cache'):
        create_model('backbone_pst', trunk=PLAIN, pretrained_trunk=True)


class Evil:

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@BUILDERS
def test_nothing_that_is_fetched_is_unpickled(make, hub, tmp_path):
    hub.create(REPO)
    evil = pickle.dumps({'conv_stem.weight': Evil(str(tmp_path / 'x'))}, protocol=2)
    hub.commit(REPO, 'main', 'weights', {'pytorch_model.bin': evil})
    with pytest.raises(RuntimeError, match=r'blocked|Nothing in it was run'):
        make('backbone_pst', trunk=PLAIN, pretrained_trunk=True)
    assert not (tmp_path / 'x').exists()


@BUILDERS
def test_a_folder_gives_the_same_model_again(make, source, tmp_path):
    model = make('backbone_pst', trunk=PLAIN, pretrained_trunk=True, num_classes=3, topk=2, pst_depth=2).eval()
    save_folder(randomize(model), tmp_path / 'model', class_names=['a', 'b', 'c'])
    config = json.loads((tmp_path / 'model' / 'config.json').read_text())
    assert config['architecture'] == 'backbone_pst'
    told = config['model_args']
    assert (told['trunk'], told['pst_width'], told['head_hidden_size'], told['topk']) == (PLAIN, 64, 256, 2)
    assert 'pretrained_trunk' not in json.dumps(config)
    x, folder = torch.randn(2, 3, 64, 64), tmp_path / 'model'
    for again in (load_model(folder), timm.create_model(f'local-dir:{folder}', pretrained=True)):
        assert torch.equal(again.eval()(x), model(x))


def test_a_run_begins_freezes_and_is_loaded_again(source, images, tmp_path):
    folder = train(tiny_train_args(
        images, tmp_path, epochs=1, model='backbone_pst', freeze_trunk=True,
        model_kwargs={'trunk': PLAIN, 'pretrained_trunk': True})).output_dir
    model = load_model(folder)
    assert is_begun(model, source) and model.plain_name == PLAIN
    found = read_checkpoint(folder)
    assert found.model_args['pst_width'] == 64 and 'pretrained_trunk' not in found.model_args


def test_a_run_of_other_channels_and_the_trunk_of_a_file(images, tmp_path):
    plain = randomize(timm.create_model(PLAIN), seed=5)
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    folder = train(tiny_train_args(
        images, tmp_path, epochs=1, model='backbone_pst', in_chans=1, mean=[0.5], std=[0.25],
        trunk_checkpoint=str(tmp_path / 'plain.pth'),
        freeze_trunk=True, model_kwargs={'trunk': PLAIN, 'act_layer': 'gelu'})).output_dir
    model = load_model(folder)
    assert model.in_chans == 1 and any(type(m).__name__ == 'GELU' for m in model.trunk.modules())
    stem = adapt_input_conv(1, plain.state_dict()['conv_stem.weight'])
    assert torch.equal(model.trunk.conv_stem.weight, stem)


@pytest.mark.parametrize('args, words', [
    ({'trunk': 'hf-hub:evil/model'}, 'trunk'), ({'trunk': 'no_such_model'}, 'no_such_model'),
    ({'trunk': PLAIN, 'checkpoint_path': 'x'}, 'checkpoint_path'), ({'trunk': PLAIN, 'pretrained': True}, 'pretrained'),
    ({'trunk': PLAIN, 'no_such': 1}, 'no_such'),
])
def test_a_file_cannot_ask_for_what_is_not_there(args, words, tmp_path):
    save_folder(pst_timm.create_pst(PLAIN, num_classes=3), tmp_path / 'model')
    config = json.loads((tmp_path / 'model' / 'config.json').read_text())
    config['model_args'] = args
    (tmp_path / 'model' / 'config.json').write_text(json.dumps(config))
    with pytest.raises(PSTError, match=words):
        load_model(tmp_path / 'model')


def test_a_folder_of_a_grey_model_made_by_name(tmp_path):
    model = timm.create_model('test_resnet_pst', pretrained=True, in_chans=1).eval()
    save_folder(model, tmp_path / 'model')
    x = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / 'model')(x), model(x))
