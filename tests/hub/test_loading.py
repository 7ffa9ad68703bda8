"""From a live Hub to a model: in new processes, offline, adapted, by tag, and never with anything but its weights."""
import json
import re
import shutil

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load, save

import pst_timm
from pst_timm.checkpoints import create_model, load_model
from pst_timm.checkpoints.fetching import fetch
from pst_timm.engine import parse_validate_args, train, train_args, validate
from pst_timm.hub.publishing import publish
from pst_timm.utils.cost import count_gmacs
from pst_timm.utils.errors import PSTError, Unavailable
from tests.checkpoints.helpers import build, images, logits, save_checkpoint
from tests.helpers import randomize

REPO = 'acme/tiny'
LOAD = """
import timm, torch, pst_timm
torch.set_num_threads({threads})
x = torch.load({images!r})
model = timm.create_model('hf-hub:acme/tiny', pretrained=True).eval()
other = timm.create_model('hf-hub:acme/tiny', pretrained=True, num_classes=7, in_chans=1).eval()
with torch.no_grad():
    torch.save(model(x), {logits!r})
    print(list(other(x[:, :1]).shape), torch.equal(other.conv_head.conv.weight, model.conv_head.conv.weight))
"""


def write_images(folder):
    """Three classes of noise of different brightness."""
    for split in ('train', 'validation'):
        for label in range(3):
            (folder / split / str(label)).mkdir(parents=True)
            for i in range(8):
                noise = (torch.rand(64, 64, 3) * 60 + 80 * label).byte().numpy()
                Image.fromarray(noise).save(folder / split / str(label) / f'{i}.png')
    return folder


def test_from_training_to_a_new_process_and_offline(hub, python, tmp_path):
    args = train_args(
        data_dir=str(write_images(tmp_path / 'data')), model='test_resnet_pst', num_classes=3, img_size=64, epochs=1,
        warmup_epochs=0, batch_size=8, workers=0, model_ema=True, model_ema_decay=0.5, output=str(tmp_path),
        experiment='run', device='cpu')
    train(args)
    publish(tmp_path / 'run', REPO)
    assert not hub.cache.exists() or not list(hub.cache.rglob('*.safetensors'))

    trained = timm.create_model('test_resnet_pst', num_classes=3)
    trained.load_state_dict(
        torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=False)['state_dict_ema'])
    expected = logits(trained)
    torch.save(images(), tmp_path / 'images.pt')
    code = LOAD.format(
        threads=torch.get_num_threads(), images=str(tmp_path / 'images.pt'), logits=str(tmp_path / 'logits.pt'))
    for environment in ({}, {'HF_HUB_OFFLINE': '1', 'HF_TOKEN': ''}):
        asked = len(hub.requests)
        assert python(code, **environment).stdout.strip() == '[2, 7] True'
        assert torch.equal(torch.load(tmp_path / 'logits.pt'), expected)
        (tmp_path / 'logits.pt').unlink()
        assert (len(hub.requests) == asked) == bool(environment), 'offline, the Hub is not asked'
    # the card's accuracy is what its command measures
    card = hub.read(REPO, 'README.md').decode()
    command = re.search(r'^pst-timm validate (.*)$', card, re.MULTILINE)[1]
    words = [*command.replace('PATH', str(tmp_path / 'data')).split(), '--workers', '0', '--device', 'cpu']
    [results] = validate(parse_validate_args(words))
    assert f'| {results["top1"]:.2f} | {results["top5"]:.2f} |' in card
    shutil.rmtree(hub.cache)
    failed = python(code, check=False, HF_HUB_OFFLINE='1')
    assert failed.returncode != 0 and not (tmp_path / 'logits.pt').exists()


@pytest.fixture
def published(hub, tmp_path):
    """A published model; what publishing left in the cache is gone."""
    model = build()
    publish(save_checkpoint(tmp_path / 'last.pth.tar', model), REPO)
    shutil.rmtree(hub.cache, ignore_errors=True)
    return model


@pytest.mark.parametrize('kind, kwargs, expected', [
    ('corrupt', {}, 'not the ones that were published'),
    ('corrupt', {'num_classes': 5}, 'not the ones that were published'),
    ('corrupt', {'in_chans': 1}, 'not the ones that were published'),
    ('corrupt', {'features_only': True}, 'not the ones that were published'),
    ('truncate', {}, 'Consistency check failed'),
    ('truncate', {'num_classes': 5}, 'Consistency check failed'),
    ('drop', {}, 'peer closed connection'),
    (404, {}, '404'),
    (500, {'num_classes': 5}, '500'),
])
def test_a_broken_download_is_an_error(hub, published, kind, kwargs, expected):
    hub.fail('GET .*/resolve/.*safetensors', kind)
    with pytest.raises(Exception, match=expected):
        timm.create_model(f'hf-hub:{REPO}', pretrained=True, **kwargs)
    assert hub.failures[0].seen


def test_a_damaged_download_is_explained(hub, published):
    hub.fail('GET .*/resolve/.*safetensors', 'corrupt', times=1)
    with pytest.raises(RuntimeError, match=r'not the ones that were published.*Delete it from the cache'):
        timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    shutil.rmtree(hub.cache)
    assert torch.equal(logits(timm.create_model(f'hf-hub:{REPO}', pretrained=True)), logits(published))


def test_an_interrupted_download_goes_on(hub, published):
    hub.fail('GET .*/resolve/.*safetensors', 'drop', times=2)
    assert torch.equal(logits(timm.create_model(f'hf-hub:{REPO}', pretrained=True)), logits(published))


def test_a_damaged_cache_or_folder_is_an_error(hub, published, tmp_path):
    timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    [cached] = hub.cache.rglob('snapshots/*/model.safetensors')
    blob = cached.resolve()
    whole = blob.read_bytes()
    folder = tmp_path / 'folder'
    shutil.copytree(cached.parent, folder)
    for broken in (whole[:-4], whole[:-4] + b'\0\0\0\1'):
        blob.write_bytes(broken)
        (folder / 'model.safetensors').write_bytes(broken)
        for source in (f'hf-hub:{REPO}', f'local-dir:{folder}'):
            with pytest.raises(Exception, match=r'not the ones that were published|deserializing'):
                timm.create_model(source, pretrained=True)


def test_a_loaded_model_can_be_trained_and_saved_again(hub, published, tmp_path):
    model = timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    untrained = timm.create_model(f'hf-hub:{REPO}')
    for i, m in enumerate((model, untrained)):
        randomize(m, seed=i)
        timm.models.save_for_hf(m, tmp_path / str(i), safe_serialization=True)
        again = timm.create_model(f'local-dir:{tmp_path / str(i)}', pretrained=True)
        assert torch.equal(again.fc.weight, m.fc.weight)


def test_resnet50_pst_is_served_from_the_hub_by_tag(hub, tmp_path, registry):
    model = randomize(timm.create_model('resnet50_pst', num_classes=3)).eval()
    publish(
        save_checkpoint(tmp_path / 'last.pth.tar', model, arch='resnet50_pst'), 'acme/r50',
        class_names=['a', 'b', 'c'])
    with pytest.raises(RuntimeError, match='No pretrained weights'):
        timm.create_model('resnet50_pst', pretrained=True)
    pst_timm.register_weights('resnet50_pst.acme', hf_hub_id='acme/r50')
    assert timm.list_pretrained('*50_pst*') == ['resnet50_pst.acme']
    served = timm.create_model('resnet50_pst', pretrained=True)
    assert torch.equal(logits(served), logits(model))
    assert served.pretrained_cfg['label_names'] == ['a', 'b', 'c'] and served.pretrained_cfg['crop_pct'] == 1.0
    assert hub.count('GET .*/acme/r50/resolve/.*safetensors') == 1


def test_a_tag_is_refused_where_it_could_not_load(hub, tmp_path, registry):
    deep = save_checkpoint(tmp_path / 'deep.pth.tar', build(pst_depth=2))
    content = torch.load(deep, weights_only=False)
    content['args'].model_kwargs = {'pst_depth': 2}
    torch.save(content, deep)
    publish(deep, REPO)
    with pytest.raises(PSTError, match="load it as 'hf-hub:acme/tiny'"):
        pst_timm.register_weights('test_resnet_pst.deep', hf_hub_id=REPO)
    with pytest.raises(PSTError, match='holds weights of test_resnet_pst, not of resnet18_pst'):
        pst_timm.register_weights('resnet18_pst.deep', hf_hub_id=REPO)
    with pytest.raises(PSTError, match='neither from the Hub nor from the cache'):
        pst_timm.register_weights('test_resnet_pst.none', hf_hub_id='acme/none')
    assert timm.list_pretrained('*pst*') == ['resnet18_pst.tin200', 'test_resnet_pst.digits']


def test_arguments_that_change_no_shape_are_not_dropped(hub, tmp_path, registry):
    for name, kwargs in (('acme/max', {'global_pool': 'max'}), ('acme/fine', {'topk': 4, 'train_topk': 4})):
        facts = {'arch': 'test_resnet_pst', 'model_args': kwargs, 'pretrained_cfg': {'input_size': (3, 64, 64)}}
        publish(save_checkpoint(tmp_path / 'last.pth.tar', build(**kwargs), facts=facts), name)
    with pytest.raises(PSTError, match=r"arguments \({'global_pool': 'max'}\), .* load it as 'hf-hub:acme/max'"):
        pst_timm.register_weights('test_resnet_pst.max', hf_hub_id='acme/max')
    pst_timm.register_weights('test_resnet_pst.fine', hf_hub_id='acme/fine')
    assert torch.equal(logits(timm.create_model('test_resnet_pst.fine', pretrained=True)), logits(build()))


def test_the_server_keeps_what_it_got_on_disk(hub, published):
    stored = json.loads((hub.folder / 'repositories' / f'{REPO}.json').read_text())
    files = stored['commits'][stored['branches']['main']]['files']
    weights = load((hub.blobs / files['model.safetensors']['blob']).read_bytes())
    assert torch.equal(weights['fc.weight'], published.fc.weight)


def test_gmacs_do_not_depend_on_the_device():
    with torch.device('meta'):
        model = timm.create_model('test_resnet_pst')
    assert count_gmacs(model, (3, 64, 64)) == count_gmacs(timm.create_model('test_resnet_pst'), (3, 64, 64))


def test_a_repository_that_is_not_there_is_one_sentence(hub):
    with pytest.raises(PSTError, match=r'^hf-hub:acme/nope cannot be looked up [^\n]*$'):
        load_model('hf-hub:acme/nope')


def test_a_hub_that_does_not_answer_may_do_so_later(hub, monkeypatch):
    monkeypatch.setattr('huggingface_hub.hf_api.api.endpoint', 'http://127.0.0.1:9')
    with pytest.raises(Unavailable, match='cannot be reached') as error:
        load_model('hf-hub:acme/tiny')
    assert error.value.exit_code == 75


@pytest.fixture
def offline(hub, monkeypatch):
    """Takes the network away."""
    def go():
        monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
        monkeypatch.setattr('pst_timm.checkpoints.fetching.HF_HUB_OFFLINE', True)
    return go


def test_a_revision_is_the_one_that_is_looked_for(hub, tmp_path, registry, offline):
    model = build()
    publish(save_checkpoint(tmp_path / 'last.pth.tar', model), REPO, revision='v2')
    shutil.rmtree(hub.cache, ignore_errors=True)
    assert hub.names(REPO) == [] and hub.names(REPO, 'v2')
    pst_timm.register_weights('test_resnet_pst.v2', hf_hub_id=f'{REPO}@v2')
    names = f'hf-hub:{REPO}@v2', 'test_resnet_pst.v2'
    for _ in range(2):
        for name in names:
            assert torch.equal(logits(load_model(name)), logits(model))
        offline()
    with pytest.raises(Unavailable, match='HF_HUB_OFFLINE is set'):
        load_model(f'hf-hub:{REPO}')
    with pytest.raises(PSTError, match=f'hf-hub:{REPO}@v1@v2 cannot be looked up'):
        load_model(f'hf-hub:{REPO}@v1@v2')


def test_another_cache_is_the_one_that_is_used(hub, published, tmp_path, offline):
    cache = tmp_path / 'elsewhere'
    hub.create('timm/test_efficientnet.r160_in1k')
    plain = randomize(timm.create_model('test_efficientnet'))
    hub.commit('timm/test_efficientnet.r160_in1k', 'main', 'weights', {'model.safetensors': save(plain.state_dict())})

    def load(**kwargs):
        assert torch.equal(logits(load_model(f'hf-hub:{REPO}', **kwargs)), logits(published))
        assert torch.equal(logits(load_model('test_efficientnet', **kwargs)), logits(plain))
        file = tmp_path / 'last.pth.tar'
        assert torch.equal(logits(load_model(file, arch=f'hf-hub:{REPO}', **kwargs)), logits(published))
        begun = create_model('backbone_pst', trunk='test_efficientnet', pretrained_trunk=True, **kwargs)
        assert torch.equal(begun.trunk.conv_stem.weight, plain.conv_stem.weight)

    load(cache_dir=cache)
    assert not list(hub.cache.rglob('model.safetensors')) and len(list(cache.rglob('model.safetensors'))) == 2
    offline()
    load(cache_dir=cache)
    with pytest.raises(Unavailable, match='not in the cache'):
        load_model('test_efficientnet')


@pytest.mark.parametrize('file', ['config.json', 'model.safetensors'])
def test_a_hub_that_is_silent_is_not_waited_for_for_ever(hub, published, monkeypatch, file):
    monkeypatch.setenv('HF_HUB_DOWNLOAD_TIMEOUT', '0.5')
    hub.fail(f'/resolve/.*{file}', 'stall')
    with pytest.raises(Unavailable, match=rf'did not send {file}.* 0.5 s.*HF_HUB_DOWNLOAD_TIMEOUT') as error:
        load_model(f'hf-hub:{REPO}')
    assert error.value.exit_code == 75


def test_a_silent_hub_is_no_fault_where_the_files_are_here(hub, published, monkeypatch):
    assert torch.equal(logits(load_model(f'hf-hub:{REPO}')), logits(published))
    monkeypatch.setenv('HF_HUB_DOWNLOAD_TIMEOUT', '0.5')
    hub.fail('/resolve/', 'stall')
    assert torch.equal(logits(load_model(f'hf-hub:{REPO}')), logits(published))


def test_a_large_file_has_the_time_that_it_takes(hub, published, monkeypatch):
    waited = []

    def watch(call, seconds, message):
        waited.append(seconds)
        return call()

    monkeypatch.setattr('pst_timm.checkpoints.fetching.in_time', watch)
    monkeypatch.setenv('HF_HUB_DOWNLOAD_TIMEOUT', '7')
    path = fetch(REPO, 'model.safetensors')
    assert waited == [7, 7 + path.stat().st_size / 2 ** 17]
