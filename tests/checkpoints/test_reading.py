"""Weights are read from every form a run leaves them in, and nothing that is not weights gets through."""
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file

from pst_timm.checkpoints.building import build_model, load_model
from pst_timm.checkpoints.reading import read_checkpoint
from pst_timm.utils.errors import PSTError
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
        with pytest.raises(PSTError, match='cannot be read'):
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
