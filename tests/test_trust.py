"""A file of a stranger, through every door: whatever it says, it leaves no mark on the machine that opens it.

Each hostile file would write a file, make a folder, run code or call a server on the loopback address, if what it says
were believed.
"""
import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from types import SimpleNamespace
from typing import Tuple

import pytest
import timm
import torch
from safetensors.torch import save_file

import pst_timm
from pst_timm.checkpoints import create_model, load_model, load_trunk
from pst_timm.checkpoints.reading import tensors_in
from pst_timm.checkpoints.schema import check_facts, parse_json
from pst_timm.checkpoints.trust import NEVER, check_model_args, check_origin, check_size
from pst_timm.cli import main
from pst_timm.commands.recalibrate import main as recalibrate_main
from pst_timm.deploy.loading import OPENERS, load_exported
from pst_timm.detection.checkpoint import load_initial, load_trunk_weights, open_detector
from pst_timm.study.cell import run_cell
from pst_timm.study.config import Cell
from pst_timm.utils.errors import PSTError
from tests.checkpoints.helpers import Payload, build, run_args, save_checkpoint
from tests.detection.tiny import small, write_squares
from tests.engine.helpers import TINY, tiny_image, write_images
from tests.hub.conftest import hub, registry  # noqa: F401, fixtures


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('data'), {'train': 2, 'validation': 1})


@pytest.fixture(scope='module')
def weights():
    return build().state_dict()


@pytest.fixture
def place(tmp_path, hub, registry, monkeypatch, weights):  # noqa: F811
    """A folder for the hostile file, one for what the door writes, and what would be a mark."""
    for name in ('source', 'work', 'marks'):
        (tmp_path / name).mkdir()
    # the files are open by then
    monkeypatch.setattr('pst_timm.engine.training.train_epochs', lambda run, stop, result: None)
    monkeypatch.setenv('PST_TIMM_DEBUG', '1')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'marks' / 'torch'))
    monkeypatch.chdir(tmp_path / 'work')
    place = SimpleNamespace(
        source=tmp_path / 'source', work=tmp_path / 'work', hub=hub, marks=tmp_path / 'marks', weights=weights)
    # arguments of timm.create_model that fetch a file, and write it anywhere
    place.fetching = {
        'pretrained': True, 'cache_dir': str(place.marks / 'cache'),
        'pretrained_cfg_overlay': {'url': f'{hub.url}/evil.pth', 'source': ''}}
    return place


def marks(place):
    """What was left behind: files and folders, and requests to the server."""
    return [str(path) for path in place.marks.rglob('*')] + list(place.hub.requests)


# hostile files

def run_with(place, **args):
    entries = {k: args.pop(k) for k in ('arch', 'facts', 'state_dict') if k in args}
    model = SimpleNamespace(state_dict=lambda: place.weights)
    return save_checkpoint(place.source / 'last.pth.tar', model, args=run_args(**args), **entries)


def arguments_of_a_run(place):
    return run_with(place, model_kwargs=place.fetching)


def facts_of_a_run(place):
    return run_with(place, facts={'arch': 'test_resnet_pst', 'model_args': place.fetching})


def configuration_of_a_run(place):
    return run_with(place, facts={
        'arch': 'test_resnet_pst', 'model_args': {'pretrained': True},
        'pretrained_cfg': {**place.fetching['pretrained_cfg_overlay'], 'custom_load': True, 'num_classes': 3}})


def origin_on_the_hub(place):
    return run_with(place, arch='hf-hub:evil/model')


def origin_on_the_hub_among_the_facts(place):
    return run_with(place, facts={'arch': 'hf_hub:evil/model', 'pretrained_cfg': {'num_classes': 3}})


def detector_with(place, **told):
    model = small()
    facts = {'detector': {**model.arguments, **told}}
    return save_checkpoint(place.source / 'last.pth.tar', model, args=run_args(), facts=facts)


def trunk_of_a_detector_on_the_hub(place):
    return detector_with(place, trunk='hf-hub:evil/model')


def arguments_of_a_trunk(place):
    return detector_with(place, trunk_kwargs=place.fetching)


def arguments_of_a_neck(place):
    return detector_with(place, neck_kwargs=place.fetching)


def header_of_safetensors(place):
    path = place.source / 'model.safetensors'
    save_file(place.weights, path, {
        'pst_timm': json.dumps({'arch': 'test_resnet_pst', 'model_args': place.fetching})})
    return path


def config_json(place, **entries):
    save_file(place.weights, place.source / 'model.safetensors')
    (place.source / 'config.json').write_text(json.dumps({
        'architecture': 'test_resnet_pst', 'num_classes': 3, 'model_args': place.fetching,
        'pretrained_cfg': {'num_classes': 3, 'input_size': [3, 64, 64]}, **entries}))
    return place.source


def config_json_of_a_pruned_model(place):
    return config_json(place, architecture='pruned', model_args={
        'arch': 'test_resnet_pst', 'channels': {}, **place.fetching})


def config_json_of_a_pruned_model_on_the_hub(place):
    return config_json(place, architecture='pruned', model_args={'arch': 'hf-hub:evil/model', 'channels': {}})


def config_json_with_a_source(place):
    cfg = {'num_classes': 3, 'input_size': [3, 64, 64], 'custom_load': 'hf', 'hf_hub_id': 'evil/model',
           'hf_hub_filename': 'evil.pth', 'url': f'{place.hub.url}/evil.pth', 'source': 'hf-hub'}
    return config_json(place, model_args={'pretrained': True}, pretrained_cfg=cfg)


def pickle_that_runs(place):
    return run_with(place, state_dict={'fc.weight': Payload(place.marks / 'executed')})


def script_that_writes(place):
    """A TorchScript file whose code torch finds, in spite of its name, and runs when it opens the file."""
    class Writer(torch.nn.Module):
        @torch.jit.export
        def __getstate__(self):
            return (torch.zeros(1), self.training)

        @torch.jit.export
        def __setstate__(self, state: Tuple[torch.Tensor, bool]):
            torch.save('x', 'MARK')
            self.training = state[1]

        def forward(self, x):
            return x

    file = io.BytesIO()
    torch.jit.save(torch.jit.script(Writer()), file, _extra_files={'pst_timm.json': '{}'})
    path = place.source / 'model.pt'
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(path, 'w') as hostile:
        for name in archive.namelist():
            content = archive.read(name).replace(b'MARK', str(place.marks / 'written').encode())
            hostile.writestr(name.replace('/code/', '/CODE/'), content)
    return path


def bare_pickle_that_runs(place):
    path = place.source / 'last.pth.tar'
    path.write_bytes(pickle.dumps(Payload(place.marks / 'executed'), protocol=2))
    return path


KINDS = (
    arguments_of_a_run, facts_of_a_run, configuration_of_a_run, origin_on_the_hub, origin_on_the_hub_among_the_facts,
    header_of_safetensors, config_json, config_json_of_a_pruned_model, config_json_of_a_pruned_model_on_the_hub,
    config_json_with_a_source, pickle_that_runs, bare_pickle_that_runs,
    script_that_writes, trunk_of_a_detector_on_the_hub, arguments_of_a_trunk, arguments_of_a_neck)


# doors

def train(data, place, *words):
    return main(['train', '--data-dir', str(data), '--model', 'test_resnet_pst', '--num-classes', '3', '--img-size',
                 '48', '--epochs', '1', '--warmup-epochs', '0', '--batch-size', '4', '--workers', '0', '--device',
                 'cpu', '--output', str(place.work / 'runs'), *map(str, words)])


def train_resume(source, data, place):
    return train(data, place, '--resume', source)


def train_initial_checkpoint(source, data, place):
    return train(data, place, '--initial-checkpoint', source)


def train_trunk_checkpoint(source, data, place):
    return train(data, place, '--trunk-checkpoint', source)


def train_pretrained_path(source, data, place):
    return train(data, place, '--pretrained', '--pretrained-path', source)


def train_from_a_folder(source, data, place):
    return train(data, place, '--pretrained', '--model', f'local-dir:{place.source}')


def train_teacher(source, data, place):
    return train(data, place, '--kd-model-name', f'local-dir:{place.source}')


def train_teacher_in_a_file(source, data, place):
    return train(data, place, '--kd-model-name', source)


def validate(source, data, place):
    return main(['validate', '--data-dir', str(data), '--checkpoint', str(source), '--workers', '0', '-b', '4',
                 '--device', 'cpu'])


def publish(source, data, place):
    return main(['publish', str(source), '--repo-id', 'acme/tiny', '--dry-run', '--folder', str(place.work / 'out')])


def convert(source, data, place):
    return main(['convert', str(source), str(place.work / 'out.safetensors')])


def prune(source, data, place):
    return main(['prune', str(source), '-o', str(place.work / 'out'), '--ratio', '0.2', '--round-to', '8'])


def export(source, data, place):
    return main(['export', str(source), '--format', 'torchscript', '--output', str(place.work / 'out.pt')])


def quantize(source, data, place):
    return main(['quantize', str(source), '--level', 'bfloat16', '--no-timing', '-o', str(place.work / 'out.pt2')])


def visualize(source, data, place):
    image = place.work / 'image.png'
    tiny_image(0, 0).save(image)
    return main(['visualize', str(image), '--checkpoint', str(source), '--img-size', '64', '--output',
                 str(place.work / 'out.png')])


def benchmark(source, data, place):
    return main(['benchmark', '--checkpoint', str(source), '-b', '1', '--repeats', '1', '--device', 'cpu'])


def predict(source, data, place):
    return main(['predict', str(source), str(data), '--device', 'cpu', '-o', str(place.work / 'out.csv')])


def compare(source, data, place):
    for models in (['test_resnet_pst.digits', str(source)], [str(source), 'test_resnet_pst.digits']):
        main(['compare', *models, '--data-dir', str(data), '--device', 'cpu', '--repeats', '1'])


def recalibrate(source, data, place):
    return recalibrate_main([
        str(source), '--data-dir', str(data), '--device', 'cpu', '--force', '-o', str(place.work / 'calibrated')])


def audit(source, data, place):
    return main(['audit', str(source), '--data-dir', str(data), '--device', 'cpu', '-o', str(place.work / 'audit')])


def slim(source, data, place):
    return main(['slim', str(source), '--data-dir', str(data), '-o', str(place.work / 'slim'), '--', '--epochs', '1',
                 '--device', 'cpu', '--workers', '0'])


def monitor_fit(source, data, place):
    return main(['monitor', 'fit', str(source), '--data-dir', str(data), '--device', 'cpu', '--overwrite', '-o',
                 str(place.work / 'reference.safetensors')])


def monitor_check(source, data, place):
    """The file as the model, and as what it is compared with."""
    reference = place.work / 'reference.safetensors'
    if not reference.exists():
        good = save_checkpoint(place.work / 'good.pth.tar', build())
        words = ['monitor', 'fit', str(good), '--data-dir', str(data), '--device', 'cpu', '-o', str(reference)]
        assert main(words) == 0
    for words in ([str(reference), str(source)], [str(source), 'test_resnet_pst.digits']):
        main(['monitor', 'check', *words, '--data-dir', str(data), '--device', 'cpu'])


def study(source, data, place):
    flags = {k: v for k, v in TINY.items() if k not in ('num_classes', 'device')}
    cell = Cell('cell', 0, dict(flags, epochs=1, initial_checkpoint=str(source)), ['class0', 'class1', 'class2'])
    return run_cell(cell, str(data), place.work, 'cpu')


def detect_train_resume(source, data, place):
    return main(['detect', 'train', '--data-dir', str(boxes(place)), '--trunk', 'test_resnet', '--neck-width', '64',
                 '--img-size', '64', '--epochs', '1', '--warmup-epochs', '0', '-b', '4', '--workers', '0', '--device',
                 'cpu', '--output', str(place.work / 'runs'), '--resume', str(source)])


def detect_validate(source, data, place):
    return main(['detect', 'validate', '--data-dir', str(boxes(place)), '--checkpoint', str(source), '--workers', '0',
                 '--device', 'cpu'])


def detect_predict(source, data, place):
    return main(['detect', 'predict', str(source), str(data), '--device', 'cpu', '-o', str(place.work / 'drawn')])


def boxes(place):
    """A folder of images with boxes."""
    folder = place.work / 'boxes'
    return folder if folder.exists() else write_squares(folder, {'train': 4, 'val': 2})


def open_the_detector(source, data, place):
    return open_detector(source, device='cpu')


def begin_with_a_detector(source, data, place):
    model = small()
    with contextlib.suppress(PSTError):
        load_initial(model, source)
    load_trunk_weights(model, source)


def load_the_model(source, data, place):
    return load_model(source)


def load_a_folder(source, data, place):
    return load_model(f'local-dir:{place.source}')


def architecture_from_a_folder(source, data, place):
    path = place.work / 'bare.pth'
    torch.save(place.weights, path)
    return load_model(path, arch=f'local-dir:{place.source}')


def load_the_trunk(source, data, place):
    with contextlib.suppress(ValueError):  # weights of another model, which are looked at
        return load_trunk(build(), source)


def load_the_trunk_of_a_folder(source, data, place):
    return load_trunk(build(), f'local-dir:{place.source}')


def load_an_export(source, data, place):
    for format in OPENERS:
        with contextlib.suppress(PSTError):
            load_exported(source, format)


def open_a_cascade(source, data, place):
    """The file as a stage: that of a cascade beside it, and that of one that is fitted."""
    stage = {'source': source.name, 'img_size': [64, 64], 'temperature': 1., 'threshold': 0.5, 'cost': 1., 'reached': 9,
             'passed': 3}
    beside = place.source.parent / 'cascade.json' if source.is_dir() else source.parent / 'cascade.json'
    beside.write_text(json.dumps({
        'format': 'pst_timm cascade', 'version': 1, 'cost': 'macs', 'num_classes': 3, 'stages': [stage, stage]}))
    main(['validate', '--checkpoint', str(beside), '--data-dir', str(data), '--device', 'cpu', '-j', '0'])
    beside.unlink()
    main(['cascade', 'fit', str(source), str(source), '--data-dir', str(data), '--device', 'cpu', '--max-cost', '9',
          '-o', str(place.work / 'cascade.json')])


def register_weights(source, data, place):
    return pst_timm.register_weights('test_resnet_pst.evil', file=source)


DOORS = (
    train_resume, train_initial_checkpoint, train_trunk_checkpoint, train_pretrained_path, train_from_a_folder,
    train_teacher, validate, publish, prune, convert, export, quantize, visualize, benchmark, predict, compare, slim,
    recalibrate, audit, monitor_fit, monitor_check, study, load_the_model, load_a_folder, architecture_from_a_folder,
    load_the_trunk, load_the_trunk_of_a_folder, load_an_export, open_a_cascade, register_weights, detect_train_resume,
    detect_validate, detect_predict, open_the_detector, begin_with_a_detector)
# as `load_the_model`, with a run around it
LONG = (train_teacher_in_a_file,)


@pytest.mark.parametrize(
    'door', [*DOORS, *(pytest.param(door, marks=pytest.mark.slow) for door in LONG)], ids=lambda door: door.__name__)
def test_a_hostile_file_leaves_no_mark(door, data, place):
    left = {}
    for kind in KINDS:
        shutil.rmtree(place.source)
        place.source.mkdir()
        with contextlib.suppress(PSTError):
            door(kind(place), data, place)
        if marks(place):
            left[kind.__name__] = marks(place)
            shutil.rmtree(place.marks)
            place.marks.mkdir()
            place.hub.requests.clear()
    assert left == {}


# from the Hub

def publish_hostile(place, config):
    place.hub.create('evil/model')
    path = place.source / 'weights'
    save_file(place.weights, path)
    place.hub.commit('evil/model', 'main', 'first', {
        'config.json': json.dumps(config).encode(), 'model.safetensors': path.read_bytes()})


@pytest.mark.parametrize('config, said', [
    ({'model_args': {'cache_dir': 'MARK', 'pretrained_cfg_overlay': {}}}, 'cache_dir'),
    ({'model_args': {'layers': [9999, 1, 1, 1]}}, 'layers'),
    ({'architecture': 'hf-hub:evil/second'}, 'not name an architecture'),
    ({'pretrained_cfg': {'hf_hub_filename': 'evil.pth', 'custom_load': 'hf', 'num_classes': 3}}, ''),
])
@pytest.mark.parametrize('door', [
    lambda: load_model('hf-hub:evil/model'),
    lambda: pst_timm.register_weights('test_resnet_pst.evil', hf_hub_id='evil/model'),
    lambda: load_trunk(build(), 'hf-hub:evil/model'),
], ids=['load_model', 'register_weights', 'load_trunk'])
def test_a_hostile_repository_leaves_no_mark(config, said, door, place):
    text = json.dumps({
        'architecture': 'test_resnet_pst', 'num_classes': 3, 'pretrained_cfg': {'num_classes': 3}, **config})
    publish_hostile(place, json.loads(text.replace('MARK', str(place.marks / 'cache'))))
    if said:
        with pytest.raises(PSTError, match=said):
            door()
    else:
        door()
    assert list(place.marks.iterdir()) == []
    assert not [r for r in place.hub.requests if 'evil.pth' in r or 'second' in r]


def tuples_within_tuples():
    """A pickle whose only key would take years to hash."""
    twice = b')' + b'q\0h\0\x86' * 40  # an empty tuple; then, again and again, that twice
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        archive.writestr('archive/data.pkl', b'\x80\x02}' + twice + b'K\x01s.')
        archive.writestr('archive/version', b'3\n')
    return buffer.getvalue()


def with_an_expanded_weight(weights):
    """Weights of which one claims to be larger than what is stored of it."""
    buffer = io.BytesIO()
    torch.save({**weights, 'fc.weight': torch.zeros(1).expand(weights['fc.weight'].shape)}, buffer)
    return buffer.getvalue()


def with_a_nan(weights):
    buffer = io.BytesIO()
    torch.save({**weights, 'fc.bias': torch.full_like(weights['fc.bias'], float('nan'))}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize('make, said', [
    (lambda weights: tuples_within_tuples(), 'tuples within tuples'),
    (with_an_expanded_weight, 'says that it is larger than what the file holds'),
    (with_a_nan, 'NaN or infinite'),
], ids=['tuples', 'expanded', 'nan'])
@pytest.mark.parametrize('door', [
    lambda source: load_model(source),
    lambda source: load_trunk(build(), source),
    lambda source: create_model(source, pretrained=True, num_classes=7, in_chans=1),
    lambda source: create_model(source, pretrained=True, features_only=True),
], ids=['load_model', 'load_trunk', 'teacher', 'features'])
def test_a_pickle_behind_a_name_is_read_as_any_other(make, said, door, place):
    content = {
        'config.json': json.dumps({'architecture': 'test_resnet_pst', 'num_classes': 3}).encode(),
        'pytorch_model.bin': make(place.weights)}
    place.hub.create('evil/model')
    place.hub.commit('evil/model', 'other', 'first', content)
    for name, value in content.items():
        (place.source / name).write_bytes(value)
    for source in ('hf-hub:evil/model@other', f'local-dir:{place.source}'):
        with pytest.raises(PSTError, match=said):
            door(source)


@pytest.mark.parametrize('make, said', [
    (lambda weights: tuples_within_tuples(), 'tuples within tuples'), (with_a_nan, 'NaN or infinite'),
], ids=['tuples', 'nan'])
def test_weights_behind_a_tag_are_read_as_any_other(make, said, place):
    publish_hostile(place, {'architecture': 'test_resnet_pst', 'num_classes': 3})
    pst_timm.register_weights('test_resnet_pst.evil', hf_hub_id='evil/model')
    assert load_model('test_resnet_pst.evil').pretrained_cfg['hf_hub_id'] == 'evil/model'
    place.hub.commit(
        'evil/model', 'main', 'second', {'pytorch_model.bin': make(place.weights)}, deleted=['model.safetensors'])
    shutil.rmtree(place.hub.cache)
    for name in ('test_resnet_pst.evil', 'test_resnet_pst'):
        if name == 'test_resnet_pst':
            pst_timm.register_weights('test_resnet_pst.evil', hf_hub_id='evil/model', default=True)
        with pytest.raises(PSTError, match=said):
            load_model(name)


def test_a_pickle_behind_a_name_is_adapted_as_timm_does(place):
    place.hub.create('good/model')
    buffer = io.BytesIO()
    torch.save(place.weights, buffer)
    layers = {k: timm.get_pretrained_cfg_value('test_resnet_pst', k) for k in ('first_conv', 'classifier')}
    config = {'architecture': 'test_resnet_pst', 'num_classes': 3, 'pretrained_cfg': {'num_classes': 3, **layers}}
    place.hub.commit('good/model', 'main', 'first', {
        'config.json': json.dumps(config).encode(), 'pytorch_model.bin': buffer.getvalue()})
    for kwargs in ({}, {'num_classes': 7}, {'num_classes': 0}, {'in_chans': 1}, {'features_only': True}):
        ours = create_model('hf-hub:good/model', pretrained=True, **kwargs)
        timms = timm.create_model('hf-hub:good/model', pretrained=True, **kwargs)
        assert ours.pretrained_cfg == timms.pretrained_cfg
        for (name, a), b in zip(ours.state_dict().items(), timms.state_dict().values()):
            random = kwargs.get('num_classes') == 7 and name.startswith('fc.')
            assert random or torch.equal(a, b), name


def test_a_class_count_that_the_weights_do_not_have_is_refused_before_the_model_is_made(place, monkeypatch):
    (place.source / 'config.json').write_text(json.dumps({'architecture': 'vgg11', 'num_classes': 200_000}))
    torch.save(place.weights, place.source / 'pytorch_model.bin')
    made = []
    create = timm.create_model

    def watch(*args, **kwargs):
        made.append(torch.empty(0).device.type)
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, 'create_model', watch)
    with pytest.raises(PSTError, match=r'Missing key|size mismatch'):
        load_model(f'local-dir:{place.source}')
    assert set(made) == {'meta'}


# how much a file may ask for

@pytest.mark.parametrize('name, value', [
    ('pst_depth', 10 ** 6), ('pst_depth', 300), ('num_classes', 10 ** 9), ('num_classes', -3), ('in_chans', 10 ** 5),
    ('img_size', 10 ** 6), ('img_size', [224, 10 ** 6]), ('pst_width', 10 ** 7), ('head_hidden_size', 10 ** 7),
    ('topk', -1), ('topk', 2.5), ('topk', 'all'), ('topk', True), ('fine_fusion', 'evil'), ('drop_rate', 7),
    ('drop_rate', float('nan')), ('train_fine_prob', float('inf')), ('layers', [10 ** 4] * 4), ('layers', [200] * 4),
    ('global_pool', '../../x'), ('act_layer', 'torch.nn.ReLU'), ('act_layer', ['relu', {}]), ('norm_layer', {'a': {}}),
    ('block', 'Bottleneck'), ('features_only', True), ('pretrained_strict', False), ('pruned', True),
    ('checkpoint_path', 'x.pth'), ('cache_dir', '.'), ('pretrained', True), ('pretrained_cfg', {}),
    ('pretrained_filter_fn', 'x'), ('device', 'meta'), ('dtype', 'float16'), ('kwargs_filter', ['x']),
    ('no such thing', 1), ('__class__', 'x'),
])
def test_an_argument_out_of_bounds_is_named(name, value):
    with pytest.raises(PSTError, match=f'file.*{name}'):
        check_model_args('the file', 'test_resnet_pst', {name: value})


PRUNED = {'arch': 'test_resnet_pst', 'channels': {'layer1.0.bn1': 8}}


@pytest.mark.parametrize('change, said', [
    ({'arch': 'pruned'}, 'does not name the architecture that was pruned'),
    ({'arch': 'resnet18.a1_in1k'}, 'without a tag'),
    ({'arch': 'hf-hub:evil/model'}, "does not name the architecture that was pruned .arch: 'hf-hub:evil/model'"),
    ({'arch': ['test_resnet_pst']}, 'does not name the architecture'),
    ({'arch': None}, 'does not name the architecture'),
    ({'channels': [8]}, 'channels must be a mapping'),
    ({'channels': {'layer1.0.bn1': -8}}, 'channels.layer1.0.bn1 must be a whole number from 1'),
    ({'channels': {'layer1.0.bn1': 0}}, 'must be a whole number from 1'),
    ({'channels': {'layer1.0.bn1': 10 ** 30}}, 'must be a whole number from 1'),
    ({'channels': {'layer1.0.bn1': 8.5}}, 'must be a whole number from 1'),
    ({'channels': {'layer1.0.bn1': True}}, 'must be a whole number from 1'),
    ({'channels': {'layer1.0.bn1': 'os.system'}}, 'must be a whole number from 1'),
    ({'channels': {'layer1.0.conv1': [8, 8, 8]}}, 'a list of 2 values'),
    ({'channels': {'layer1.0.conv1': [[8], 8]}}, 'must be a whole number from 1'),
    ({'channels': {'x' * 2000: 8}}, 'short names as keys'),
    ({'block': 'Bottleneck'}, "gives test_resnet_pst the argument 'block'"),
    ({'cache_dir': '.'}, "the argument 'cache_dir'"),
    ({'trunk': 'hf-hub:evil/model', 'arch': 'backbone_pst'}, 'the model argument trunk'),
    ({'pst_width': 10 ** 7}, 'the model argument pst_width'),
])
def test_a_pruned_model_is_told_in_bounds(change, said):
    with pytest.raises(PSTError, match=f'^the file.*{said}') as error:
        check_model_args('the file', 'pruned', {**PRUNED, **change})
    assert '\n' not in str(error.value) and len(str(error.value)) < 500
    assert check_model_args('the file', 'pruned', PRUNED) == PRUNED


@pytest.mark.parametrize('channels, said', [
    ({'layer1.0.bn1': 33}, 'layer1.0.bn1 can have at most 32 channels'),
    ({'layer1.0.bn1': 8}, 'layer1.0.bn1 takes 8 channels and is given 32'),
    ({'no such layer': 8}, "has no layer 'no such layer'"),
    ({'pst.blocks.0.attn': 8}, 'has no layer'),
    ({'fc': [128, 60000]}, 'fc can have at most 128 and 3 channels'),
])
@pytest.mark.parametrize('door', [
    lambda folder: load_model(folder), lambda folder: create_model(f'local-dir:{folder}', pretrained=True)])
def test_channels_that_do_not_fit_end_in_one_sentence(channels, said, door, weights, tmp_path):
    save_file(weights, tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text(json.dumps({
        'architecture': 'pruned', 'num_classes': 3, 'model_args': {'arch': 'test_resnet_pst', 'channels': channels},
        'pretrained_cfg': {'num_classes': 3, 'input_size': [3, 64, 64]}}))
    with pytest.raises(PSTError, match=said) as error:
        door(tmp_path)
    assert '\n' not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize('arch, args', [
    ('pruned', dict(arch='backbone_pst', trunk='test_convnext', pst_width=64, channels={'fuse_down.conv': [None, 64]})),
    ('resnet50_pst', dict(topk=8, fine_fusion='joint', pst_depth=2, pst_mlp_ratio=1.5, pst_zero_init=True)),
    ('resnet50', dict(stem_type='deep', act_layer='silu', avg_down=True, block_args=dict(attn_layer='eca'))),
    ('vit_tiny_patch16_224', dict(img_size=[96, 96], depth=6, init_values=1e-5, class_token=False, global_pool='avg')),
    ('convnext_atto', dict(drop_path_rate=0.1, depths=[2, 2, 2, 2], dims=(32, 64, 64, 64))),
    ('swin_tiny_patch4_window7_224', dict(window_size=8, img_size=256)),
    ('efficientvit_b0', dict(num_classes=7, in_chans=1)),
])
def test_what_models_are_made_of_passes(arch, args):
    checked = check_model_args('the file', arch, args)
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in checked.items()} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in args.items()}
    check_size('the file', arch, checked)


def test_no_argument_that_opens_or_fetches_is_allowed_by_any_class():
    for name in ('cache_dir', 'checkpoint_path', 'pretrained_cfg', 'weights_url', 'file', 'block_cfg', 'filter_fn'):
        assert NEVER.search(name), name
    assert not NEVER.search('drop_path_rate'.replace('_path', '')) and not NEVER.search('profile_rate')


def test_a_model_that_would_not_fit_into_memory_is_refused_before_it_is_made(tmp_path, weights):
    with pytest.raises(PSTError, match='elements, where it usually has'):
        check_size('the file', 'vit_tiny_patch16_224', dict(embed_dim=8192, num_heads=8, depth=64))
    # as many classes as the configuration says, and no classifier among the weights
    headless = {k: v for k, v in weights.items() if not k.startswith('fc.')}
    for classes, said in ((10 ** 6, 'elements, where it usually has'), (10 ** 5, '2 tensors are missing')):
        save_file(headless, tmp_path / 'headless.safetensors', {'pst_timm': json.dumps({
            'arch': 'test_resnet_pst', 'pretrained_cfg': {'num_classes': classes}})})
        with pytest.raises(PSTError, match=said):
            load_model(tmp_path / 'headless.safetensors')


@pytest.mark.parametrize('arch', [
    'hf-hub:evil/model', 'local-dir:/tmp', 'no_such_net', '', None, 3, '../resnet50', 'a' * 999])
def test_an_architecture_is_one_that_is_known_here(arch):
    with pytest.raises(PSTError, match='does not name an architecture that is known here'):
        check_origin('the file', arch, {})


def test_an_architecture_may_have_a_tag():
    assert check_origin('the file', 'resnet50.a1_in1k', {'num_classes': None}) == ('resnet50', {})


# what the user types is no stranger's

def test_what_the_user_gives_is_not_asked_about(tmp_path):
    path = save_checkpoint(
        tmp_path / 'last.pth.tar', build(), args=run_args(model_kwargs={'device': 'meta', 'topk': 'all'}))
    with pytest.raises(PSTError, match="the argument 'device'"):
        load_model(path)
    assert load_model(path, device=None, topk=2).inference_settings()['topk'] == 2


def test_a_run_of_timms_script_that_began_on_the_hub_is_read_when_the_user_names_it(place):
    """What such a checkpoint tells of its origin is the name alone."""
    config = {'architecture': 'test_resnet_pst', 'num_classes': 3, 'model_args': {'topk': 2}, 'pretrained_cfg': {
        'num_classes': 3, 'input_size': [3, 64, 64], 'crop_pct': 0.9}}
    publish_hostile(place, config)
    path = save_checkpoint(place.source / 'last.pth.tar', build(), args=None, arch='hf-hub:evil/model')
    with pytest.raises(PSTError, match=r'hf-hub:evil/model.*is not fetched.*--model'):
        load_model(path)
    assert place.hub.requests == []
    model = load_model(path, arch='hf-hub:evil/model')
    assert model.inference_settings()['topk'] == 2 and model.pretrained_cfg['crop_pct'] == 0.9
    assert load_model(path, arch='test_resnet_pst').num_classes == 3


# the schema

def nested(depth, leaf=1):
    for _ in range(depth):
        leaf = [leaf]
    return leaf


def itself():
    value = []
    value.append(value)
    return value


def doubled(times):
    value = ['x']
    for _ in range(times):
        value = [value, value]
    return value


@pytest.mark.parametrize('facts, said', [
    ([1], 'a mapping of names to values, not a list'),
    ({'colour': 'red'}, 'at colour: expected one of arch'),
    ({'epoch': 'three'}, "at epoch: expected a whole number.*got 'three'"),
    ({'epoch': True}, 'at epoch'),
    ({'metric': [71.5]}, 'at metric'),
    ({'arch': 5}, 'at arch: expected a text'),
    ({'arch': 'x' * 10 ** 6}, 'at arch: expected a text of at most'),
    ({'ema': 1}, 'at ema: expected true or false'),
    ({'args': ['--lr', '1']}, 'at args: expected a mapping'),
    ({'args': {'crop_pct': 1e-9}}, 'at args.crop_pct: expected a number from 0.05'),
    ({'args': {'crop_pct': float('nan')}}, 'at args.crop_pct'),
    ({'args': {'img_size': 10 ** 6}}, 'at args.img_size'),
    ({'args': {'mean': 'red'}}, 'at args.mean'),
    ({'args': {'std': [0.]}}, r'at args.std\[0\]'),
    ({'args': {'interpolation': 'sharp'}}, 'at args.interpolation'),
    ({'args': {'model_kwargs': 'topk=1'}}, 'at args.model_kwargs'),
    ({'args': {'gp': ['avg']}}, 'at args.gp'),
    ({'args': {7: 1}}, 'short names as keys'),
    ({'args': {'x': torch.zeros(2)}}, 'at args.x: expected plain values, not a Tensor'),
    ({'args': {'x': 10 ** 40}}, 'at args.x'),
    ({'model_args': [1]}, 'at model_args'),
    ({'pretrained_cfg': {'input_size': [3, 64]}}, 'at pretrained_cfg.input_size: expected channels, height and width'),
    ({'pretrained_cfg': {'input_size': [3, 10 ** 6, 64]}}, 'at pretrained_cfg.input_size'),
    ({'pretrained_cfg': {'label_names': 'cat'}}, 'at pretrained_cfg.label_names'),
    ({'pretrained_cfg': {'label_names': ['cat', None]}}, r'at pretrained_cfg.label_names\[1\]'),
    ({'pretrained_cfg': {'first_conv': '../x'}}, 'at pretrained_cfg.first_conv'),
    ({'pretrained_cfg': {'num_classes': 1e3}}, 'at pretrained_cfg.num_classes'),
    ({'pretrained_cfg': {'notes': 'x'}}, 'at pretrained_cfg.notes'),
    ({'pretrained_cfg': {'temperature': 0}}, 'at pretrained_cfg.temperature: expected a number from 0.001'),
    ({'pretrained_cfg': {'temperature': float('nan')}}, 'at pretrained_cfg.temperature'),
    ({'recipe': 3}, 'at recipe'),
    ({'recipe': {'\x1b[2J': torch.zeros(1)}}, 'at recipe.\N{REPLACEMENT CHARACTER}'),
    ({'\x1b[2J': 1}, 'at \N{REPLACEMENT CHARACTER}'),
    ({'recipe': {'x': nested(50)}}, 'nested at most'),
    ({'recipe': {'x': itself()}}, 'nested at most|at most'),
    ({'recipe': {'x': doubled(18)}}, 'at most'),
    ({'recipe': {'x': doubled(60)}}, 'at most'),
])
def test_the_key_that_does_not_fit_is_named(facts, said):
    with pytest.raises(PSTError, match=f'the file: what it tells about its weights is garbled.*{said}') as error:
        check_facts('the file', facts)
    assert len(str(error.value)) < 600 and str(error.value).isprintable()


def test_what_cannot_harm_is_mended():
    checked = check_facts('the file', {
        'epoch': None,
        'pretrained_cfg': {'label_names': ['a\nb', 'c\x1b[31m'], 'url': 'http://x', 'custom_load': 'hf', 'tag': 'x'}})
    replaced = '\N{REPLACEMENT CHARACTER}'
    assert checked == {'pretrained_cfg': {'label_names': [f'a{replaced}b', f'c{replaced}[31m']}}


@pytest.mark.parametrize('text, said', [
    ('{"a": 1, "a": 2}', 'the key a is there twice'), ('{"a": NaN}', 'NaN'), ('[' * 10 ** 5, 'nested too deeply'),
    ('{"a": -Infinity}', 'Infinity'), (b'{"a": "\xff"}', 'codec'), ('{', 'Expecting'), ('', 'Expecting'),
    ('{"a": ' + '9' * 10 ** 4 + '}', 'digits'), (' ' * (2 ** 24 + 1), 'more than 16 MiB'),
])
def test_json_is_read_strictly(text, said):
    with pytest.raises(PSTError, match=f'the file is not JSON as it should be.*{said}'):
        parse_json(text, 'the file')


def test_every_tensor_has_a_name_that_can_be_shown():
    one = torch.ones(1)
    content = {'a': [one, 5], 10 ** 5000: one, '\x1b' * 100: {'b': one}, 'a.0': one}
    names = [name for name, _ in tensors_in(content)]
    assert names == ['a.0', 'int', '\N{REPLACEMENT CHARACTER}' * 60 + '....b', 'a.0']


# files that are none

@pytest.mark.parametrize('make', [os.mkfifo, lambda path: os.symlink('/dev/zero', path)], ids=['pipe', 'device'])
@pytest.mark.parametrize('name', ['last.pth.tar', 'model.safetensors', 'config.json'])
def test_pipes_and_devices_are_refused_at_once(make, name, tmp_path, weights):
    if name == 'config.json':
        save_file(weights, tmp_path / 'model.safetensors')
    else:
        (tmp_path / 'config.json').write_text('{"architecture": "test_resnet_pst"}')
    make(tmp_path / name)
    for source in (tmp_path, *([tmp_path / name] if name != 'config.json' else []), f'local-dir:{tmp_path}'):
        with pytest.raises(PSTError, match=r'not an ordinary file|There is no'):
            load_model(source)


def test_a_header_larger_than_its_file_is_refused(tmp_path):
    path = tmp_path / 'model.safetensors'
    path.write_bytes(struct.pack('<Q', 2 ** 62) + b'{}')
    with pytest.raises(PSTError, match='cannot be read'):
        load_model(path)


def test_a_null_in_the_preprocessing_says_nothing():
    assert check_facts('the file', {'pretrained_cfg': {'input_size': None, 'crop_pct': 0.9}}) == {
        'pretrained_cfg': {'crop_pct': 0.9}}


@pytest.mark.parametrize('temperature', [0, -1, 'hot', [1.], True, 1e99])
def test_a_temperature_that_cannot_be_is_refused(temperature, place):
    folder = config_json(place, model_args={}, temperature=temperature)
    for source in (folder, f'local-dir:{folder}'):
        with pytest.raises(PSTError, match='at temperature'):
            load_model(source)
