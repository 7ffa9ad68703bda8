"""Weights are read from every form a run leaves them in, and nothing that is not weights gets through."""
import argparse
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from pst_timm.checkpoints.building import build_model, create_model, load_model
from pst_timm.checkpoints.reading import is_file, read_checkpoint
from pst_timm.utils.errors import PSTError
from pst_timm.utils.fitting import misfits
from tests.checkpoints.helpers import Payload, build, images, logits, run_args, save_checkpoint
from tests.helpers import randomize


def test_every_form_gives_the_same_model(tmp_path):
    model = build(topk=5)
    model.pretrained_cfg['input_size'] = (3, 64, 64)
    folder, run = tmp_path / 'folder', tmp_path / 'run'
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    run.mkdir()
    save_checkpoint(run / 'model_best.pth.tar', model)
    save_checkpoint(run / 'last.pth.tar', randomize(build(), seed=1))
    model.set_topk(0)
    expected = logits(model)
    for source in (
            folder, f'local-dir:{folder}', folder / 'model.safetensors', run, run / 'model_best.pth.tar',
    ):
        assert torch.equal(logits(load_model(source, topk=0)), expected), source
    assert not torch.equal(logits(load_model(run / 'last.pth.tar')), expected)


def test_what_is_not_a_source_is_said(tmp_path):
    with pytest.raises(PSTError, match='Did you mean resnet50_pst'):
        load_model('resnt50_pst')
    with pytest.raises(PSTError, match=r'neither config\.json with model\.safetensors nor a checkpoint'):
        load_model(tmp_path)
    with pytest.raises(PSTError, match='There is no checkpoint'):
        read_checkpoint(tmp_path / 'none.pth.tar')
    (tmp_path / 'notes.txt').write_text('')
    with pytest.raises(PSTError, match=r'is not a checkpoint: expected \.safetensors'):
        read_checkpoint(tmp_path / 'notes.txt')
    for name in ('junk.pth', 'junk.safetensors'):
        (tmp_path / name).write_bytes(b'junk')
        with pytest.raises(PSTError, match='is truncated or not a'):
            load_model(tmp_path / name)
    torch.save({'state_dict': {}}, tmp_path / 'empty.pth')
    with pytest.raises(PSTError, match='holds no weights'):
        load_model(tmp_path / 'empty.pth')
    save_file(build().state_dict(), tmp_path / 'nameless.safetensors')
    with pytest.raises(PSTError, match='does not name a known architecture'):
        load_model(tmp_path / 'nameless.safetensors')


def test_a_truncated_file_is_an_error(tmp_path):
    whole = tmp_path / 'whole.safetensors'
    save_file(build().state_dict(), whole)
    checkpoint = save_checkpoint(tmp_path / 'whole.pth.tar', build())
    for path in (whole, checkpoint):
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(PSTError, match=r'truncated|damaged'):
            read_checkpoint(path)


def test_the_moving_average_is_preferred_and_named(tmp_path):
    plain, ema = build(), randomize(build(), seed=1)
    path = save_checkpoint(tmp_path / 'last.pth.tar', plain, ema)
    averaged, trained = read_checkpoint(path), read_checkpoint(path, use_ema=False)
    assert (averaged.ema, trained.ema) == (True, False)
    assert torch.equal(logits(build_model(averaged)), logits(ema))
    assert torch.equal(logits(build_model(trained)), logits(plain))


def test_what_the_run_used_goes_along(tmp_path):
    model = build(in_chans=1, num_classes=7, topk=4, fine_fusion='joint')
    args = run_args(model_kwargs={'topk': 4, 'fine_fusion': 'joint'}, num_classes=None)
    checkpoint = read_checkpoint(save_checkpoint(tmp_path / 'last.pth.tar', model, args=args))
    assert (checkpoint.epoch, checkpoint.metric) == (1, 71.5)
    built = build_model(checkpoint)
    cfg = built.pretrained_cfg
    assert (built.num_classes, cfg['num_classes'], tuple(cfg['input_size'])) == (7, 7, (1, 64, 64))
    assert (cfg['mean'], cfg['crop_pct'], cfg['interpolation']) == ((0.5,), 1.0, 'bilinear')
    x = images(channels=1)
    assert torch.equal(logits(built, x), logits(model, x))


@pytest.mark.parametrize('suffix', ['.pth.tar', '.pth', '.bin'])
@pytest.mark.parametrize('where', ['args', 'state_dict', 'alone'])
def test_code_in_a_pickle_is_never_run(suffix, where, tmp_path):
    mark = tmp_path / 'executed'
    path = tmp_path / f'evil{suffix}'
    if where == 'alone':
        path.write_bytes(pickle.dumps(Payload(mark), protocol=2))
    else:
        save_checkpoint(path, build(), **{where: {'fc.weight': Payload(mark)}})
    with pytest.raises(PSTError, match=r'could run code .*Nothing in it was run'):
        read_checkpoint(path)
    assert not mark.exists()
    if where == 'alone':  # the payload does work where it is let
        pickle.loads(path.read_bytes())
        assert mark.exists()


@pytest.mark.parametrize('kwargs, message', [
    ({'pst_depth': 2}, 'are unknown to it'),
    ({'pst_width': 32}, 'have another shape'),
    ({'pst_depth': 0}, 'tensors are missing'),
])
def test_weights_of_another_architecture_are_refused(kwargs, message, tmp_path):
    path = save_checkpoint(tmp_path / 'last.pth.tar', build(**kwargs))
    with pytest.raises(PSTError, match=rf'is not a checkpoint of test_resnet_pst \(3 classes\): .*{message}'):
        load_model(path)


def test_arguments_that_do_not_fit_the_weights_are_named(tmp_path):
    path = save_checkpoint(tmp_path / 'last.pth.tar', build(), args=run_args(in_chans=1))
    with pytest.raises(PSTError, match=r'arguments in .* do not fit its weights: Requested 1 input channels'):
        load_model(path)


@pytest.mark.parametrize('wrap', [
    lambda state: {'state_dict': state},
    lambda state: {'model': {'state_dict': state}},
    lambda state: {'model_state_dict': state, 'epoch': 3},
    lambda state: {'state_dict': {f'module.{k}': v for k, v in state.items()}},
    lambda state: {'state_dict': {f'model.{k}': v for k, v in state.items()}, 'pytorch-lightning_version': '2'},
    lambda state: {f'_orig_mod.module.{k}': v for k, v in state.items()},
    lambda state: {f'module.model.{k}': v for k, v in state.items()},
])
def test_wrapped_and_prefixed_weights_are_the_same(wrap, tmp_path):
    model = build()
    torch.save(wrap(model.state_dict()), tmp_path / 'wrapped.pth')
    loaded = load_model(tmp_path / 'wrapped.pth', arch='test_resnet_pst')
    assert torch.equal(logits(loaded), logits(model))


def test_a_model_that_is_its_own_wrapper(tmp_path):
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = timm.create_model('test_resnet', num_classes=3)
            self.num_classes, self.pretrained_cfg = 3, dict(self.model.pretrained_cfg)

    @timm.models.register_model
    def wrapped_net(pretrained=False, **kwargs):
        return Wrapped()

    try:
        model = Wrapped()
        torch.save({'state_dict': model.state_dict()}, tmp_path / 'wrapped.pth')
        loaded = load_model(tmp_path / 'wrapped.pth', arch='wrapped_net')
        assert torch.equal(loaded.model.fc.weight, model.model.fc.weight)
    finally:
        del timm.models._registry._model_entrypoints['wrapped_net']


def test_a_model_that_cannot_be_planned_without_memory(tmp_path):
    @timm.models.register_model
    def eager_net(pretrained=False, **kwargs):
        torch.ones(1).item()  # which the meta device does not have
        return timm.create_model('test_resnet', **{**kwargs, 'num_classes': 3})

    try:
        torch.save({'state_dict': eager_net().state_dict()}, tmp_path / 'eager.pth')
        assert load_model(tmp_path / 'eager.pth', arch='eager_net').num_classes == 3
    finally:
        del timm.models._registry._model_entrypoints['eager_net']


def test_names_files_and_folders_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'resnet18').mkdir()
    (tmp_path / 'notes').touch()
    assert not is_file('pruned')
    (tmp_path / 'pruned').mkdir()
    for source in ('resnet18', 'resnet18.a1_in1k', 'hf-hub:acme/weights.pt', 'local-dir:resnet18', 'resnt18'):
        assert not is_file(source), source
    for source in (
            'pruned', './resnet18', 'notes', 'nowhere.pth', 'resnet50.pth', tmp_path / 'nowhere', Path('resnet18')):
        assert is_file(source), source


@pytest.mark.parametrize('change, said', [
    ({}, None),
    ({'num_classes': 5}, 'know 3 classes, not 5'),
])
def test_a_folder_by_timms_name_has_the_classes_it_has(change, said, tmp_path):
    timm.models.save_for_hf(build(), tmp_path / 'folder', safe_serialization=True)
    source = f'local-dir:{tmp_path / "folder"}'
    if said is None:
        assert load_model(source, **change).num_classes == 3
        assert load_model(source, num_classes=0)(images()).shape == (2, 128)
    else:
        with pytest.raises(PSTError, match=said):
            load_model(source, **change)


@pytest.mark.parametrize('spoil, said', [
    (lambda state: {}, 'tensors are missing|no weights'),
    (lambda state: {f'net.{k}': v for k, v in state.items()}, 'tensors are missing'),
    (lambda state: {k: v for k, v in state.items() if not k.startswith('pst.')}, 'tensors are missing'),
    (lambda state: {**state, 'bn1.weight': state['bn1.weight'] * torch.nan}, 'NaN or infinite'),
])
def test_other_classes_are_no_reason_to_begin_with_random_weights(spoil, said, tmp_path):
    """timm loads what fits, be it nothing, where the classifier starts anew."""
    model = build()
    timm.models.save_for_hf(model, tmp_path / 'folder', safe_serialization=True)
    source = f'local-dir:{tmp_path / "folder"}'
    assert torch.equal(create_model(source, pretrained=True, num_classes=5).bn1.weight, model.bn1.weight)
    spoilt = spoil(model.state_dict())
    (tmp_path / 'folder' / 'model.safetensors').unlink()
    save_file(spoilt, tmp_path / 'folder' / 'model.safetensors')
    torch.save(spoilt, tmp_path / 'path.pth')
    with pytest.raises(PSTError, match=said):
        create_model(source, pretrained=True, num_classes=5)
    with pytest.raises(PSTError, match=said):
        create_model('test_resnet_pst', pretrained=True, num_classes=5, pretrained_cfg_overlay=dict(
            file=str(tmp_path / 'path.pth'), num_classes=-1))


def test_older_files_lack_the_counters_of_batch_norms(tmp_path):
    model = build()
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith('num_batches_tracked')}
    torch.save(weights, tmp_path / 'old.pth')
    assert torch.equal(logits(load_model(tmp_path / 'old.pth', arch='test_resnet_pst')), logits(model))


def test_the_name_of_a_strange_tensor_does_not_steer_a_terminal():
    own = build().state_dict()
    found = misfits(own, {**own, '\x1b[2J\U0008f6d2\u202e' + 1000 * 'x': torch.zeros(1)})
    assert len(found) == 1 and found[0].isprintable() and len(found[0]) < 300


def test_threads_that_read_at_once_do_not_disturb_each_other(tmp_path, monkeypatch):
    """What a pickle may hold torch allows in the whole process; the first to be done must not take it away."""
    paths = [save_checkpoint(tmp_path / f'{i}.pth.tar', build()) for i in range(2)]
    torch_load, meeting, first_done, arrived = torch.load, threading.Barrier(2), threading.Event(), []

    def load(*args, **kwargs):
        arrived.append(threading.get_ident())
        try:
            meeting.wait(timeout=0.3)
        except threading.BrokenBarrierError:  # the other one is kept out, as it should be
            pass
        else:
            if arrived[0] != threading.get_ident():
                first_done.wait(timeout=20)
        return torch_load(*args, **kwargs)

    def read(path):
        try:
            return read_checkpoint(path)
        finally:
            first_done.set()

    monkeypatch.setattr(torch, 'load', load)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(read, paths))
    assert [checkpoint.arch for checkpoint in found] == ['test_resnet_pst'] * 2
    assert not any('Namespace' in str(entry) for entry in torch.serialization.get_safe_globals())


def test_timms_reader_in_another_thread_does_not_disturb(tmp_path, monkeypatch):
    path, torch_load = save_checkpoint(tmp_path / 'last.pth.tar', build()), torch.load

    def load(*args, **kwargs):
        with torch.serialization.safe_globals([argparse.Namespace]):  # as timm does around its own
            pass
        return torch_load(*args, **kwargs)

    monkeypatch.setattr(torch, 'load', load)
    assert read_checkpoint(path).arch == 'test_resnet_pst'
