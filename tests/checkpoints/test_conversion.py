"""Conversion keeps weights and facts, says what precision costs, and writes files whole or not at all."""
import json

import pytest
import torch
from safetensors import safe_open

from pst_timm.checkpoints.building import build_model, load_model
from pst_timm.checkpoints.conversion import convert
from pst_timm.checkpoints.reading import read_checkpoint
from pst_timm.cli import main
from pst_timm.utils.errors import PSTError
from tests.checkpoints.helpers import build, logits, save_checkpoint
from tests.helpers import randomize


def test_there_and_back_is_the_same_checkpoint(tmp_path):
    model = build(topk=3)
    source = save_checkpoint(tmp_path / 'last.pth.tar', model)
    there = convert(source, tmp_path / 'there.safetensors')
    back = convert(there.path, tmp_path / 'back.pth.tar')
    assert there.difference == back.difference == 0 and there.agreement == back.agreement == 1
    before, after = read_checkpoint(source), read_checkpoint(back.path)
    assert before.weights.keys() == after.weights.keys()
    assert all(torch.equal(v, after.weights[k]) for k, v in before.weights.items())
    assert before.facts() == after.facts() and after.args['lr'] == 0.003
    assert torch.equal(logits(load_model(back.path, topk=3)), logits(model))


def test_the_header_tells_what_the_weights_are(tmp_path):
    plain, ema = build(), randomize(build(), seed=1)
    done = convert(save_checkpoint(tmp_path / 'last.pth.tar', plain, ema), tmp_path / 'a.safetensors')
    assert done.ema
    with safe_open(done.path, 'pt') as file:
        facts = json.loads(file.metadata()['pst_timm'])
    assert (facts['arch'], facts['epoch'], facts['metric'], facts['ema']) == ('test_resnet_pst', 1, 71.5, True)
    assert torch.equal(logits(load_model(done.path)), logits(ema))
    other = convert(tmp_path / 'last.pth.tar', tmp_path / 'b.safetensors', use_ema=False)
    assert not other.ema and torch.equal(logits(load_model(other.path)), logits(plain))


@pytest.mark.parametrize('dtype, largest', [('float16', 5e-3), ('bfloat16', 5e-2)])
def test_the_price_of_precision_is_measured(dtype, largest, tmp_path):
    model = build()
    source = save_checkpoint(tmp_path / 'last.pth.tar', model)
    done = convert(source, tmp_path / 'half.safetensors', dtype=dtype)
    weights = read_checkpoint(done.path).weights
    assert weights['fc.weight'].dtype == getattr(torch, dtype)
    assert weights['bn1.num_batches_tracked'].dtype == torch.int64
    expected = logits(model)
    error = (logits(build_model(read_checkpoint(done.path))) - expected).abs().max() / expected.abs().max()
    assert 0 < done.difference < largest and 0 < error < largest
    assert done.path.stat().st_size < 0.6 * source.stat().st_size


def test_what_cannot_be_converted_leaves_nothing(tmp_path, capsys):
    model = build()
    source = save_checkpoint(tmp_path / 'last.pth.tar', model)
    target = tmp_path / 'out.safetensors'
    model.fc.weight.data[0, 0] = 1e6
    large = save_checkpoint(tmp_path / 'large.pth.tar', model)
    model.fc.weight.data[0, 0] = float('nan')
    broken = save_checkpoint(tmp_path / 'nan.pth.tar', model)
    for words, message in (
            ([broken, target], 'NaN or infinite weights in 1 tensors, the first is fc.weight'),
            ([large, target, '--dtype', 'float16'], 'too large for float16'),
            ([source, tmp_path / 'out.onnx'], 'must end with .safetensors'),
            ([source, tmp_path / 'nowhere' / 'out.safetensors'], 'Cannot write'),
    ):
        assert main(['convert', *map(str, words)]) == 1
        error = capsys.readouterr().err
        assert message in error and error.startswith('pst-timm convert: error: ') and error.count('\n') == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ['large.pth.tar', 'last.pth.tar', 'nan.pth.tar']


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    source = save_checkpoint(tmp_path / 'last.pth.tar', build())
    target = tmp_path / 'out.safetensors'
    target.write_bytes(b'old')

    def full_disk(tensors, path, metadata):
        with open(path, 'wb') as file:
            file.write(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('pst_timm.checkpoints.conversion.save_file', full_disk)
    with pytest.raises(PSTError, match='No space left'):
        convert(source, target, overwrite=True)
    assert target.read_bytes() == b'old'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['last.pth.tar', 'out.safetensors']


def test_command(tmp_path, capsys):
    source = save_checkpoint(tmp_path / 'last.pth.tar', build(), randomize(build(), seed=1))
    target = tmp_path / 'out.safetensors'
    assert main(['convert', str(source), str(target), '--dtype', 'bfloat16']) == 0
    out = capsys.readouterr().out
    assert 'moving average (EMA)' in out and 'Logits differ from the source by' in out
    assert main(['convert', str(source), str(target), '--no-ema', '--overwrite']) == 0
    assert 'no EMA' in capsys.readouterr().out
