"""Models are timed in turn, memory is that of a fresh process, energy is never made up; no test looks at a time."""
import json
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

from pst_timm.deploy import latency
from pst_timm.deploy.latency import Form, compare_latency, energy, energy_counter, in_form, make_call, peak_memory_of
from pst_timm.utils import timing
from pst_timm.utils.errors import PSTError
from tests.models.helpers import build

SIZE = (3, 8, 8)


class Clock:
    """Stands still unless a model is called, which takes as long as it says."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0., []
        monkeypatch.setattr(timing, '_clock', lambda device: self.now)

    def model(self, name, seconds):
        def run(x):
            assert x.shape[1:] == SIZE and torch.is_inference_mode_enabled()
            self.calls.append((name, len(x)))
            self.now += next(seconds) if hasattr(seconds, '__next__') else seconds
        return run


def test_models_run_in_turn_each_after_an_untimed_call(monkeypatch):
    clock = Clock(monkeypatch)
    models = {'a': clock.model('a', 4.), 'b': clock.model('b', 1.)}
    found = compare_latency(models, SIZE, batch_size=2, rounds=3, warmup=1)
    assert clock.calls == [(name, 2) for name in 'aabb'] * 4
    assert found['a'] == (4., 1.) and found['b'] == (1., 4.)


def test_ratios_are_those_of_the_same_round_to_the_baseline(monkeypatch):
    clock = Clock(monkeypatch)
    # untimed, timed; the machine slows down from round to round
    seconds = {'a': [9., 2., 9., 20., 9., 60.], 'b': [9., 1., 9., 5., 9., 20.]}
    models = {name: clock.model(name, iter(each)) for name, each in seconds.items()}
    found = compare_latency(models, SIZE, rounds=3, baseline='b', warmup=0)
    assert found['a'] == (20., pytest.approx(1 / 3)) and found['b'] == (5., 1.)


@pytest.mark.parametrize('models, kwargs, message', [
    ({}, {}, 'nothing to time'),
    ({'a': None}, dict(rounds=0), 'nothing to time'),
    ({'a': lambda x: x}, dict(rounds=1, baseline='b'), "one of a, got 'b'"),
])
def test_what_cannot_be_compared_is_refused(models, kwargs, message):
    with pytest.raises(ValueError, match=message):
        compare_latency(models, SIZE, **kwargs)


def test_a_form_is_what_it_says():
    model = build('test_resnet_pst', num_classes=2)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.eval()(x)
        folded = in_form(model, Form(reparam=True, channels_last=True, dtype='bfloat16'))
        got = folded(x.bfloat16())
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)] and not folded.training
    weight = folded.layer1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=0.1, atol=0.1)


def test_images_come_in_the_type_of_the_weights():
    found = []
    model = nn.Conv2d(3, 1, 1).bfloat16()
    model.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    make_call(model, SIZE, 2)()
    assert found[0].dtype == torch.bfloat16 and found[0].shape == (2, *SIZE) and found[0].is_inference() is False


@pytest.mark.skipif(not latency.STATUS.is_file(), reason='memory is told by Linux')
def test_memory_is_that_of_a_fresh_process():
    held = torch.zeros(2 ** 27)  # half a GiB that the other process does not have
    found = peak_memory_of('test_resnet_pst', 2, 64, Form(reparam=True), pretrained=False, num_classes=2)
    assert 2 ** 20 < found < held.nbytes


def test_a_process_that_fails_is_told_of(monkeypatch):
    monkeypatch.setattr(sys, 'executable', '/bin/false')
    with pytest.raises(PSTError, match='memory of test_resnet_pst cannot be measured: exit code 1'):
        peak_memory_of('test_resnet_pst')


def test_memory_is_not_made_up(monkeypatch, tmp_path):
    monkeypatch.setattr(latency, 'STATUS', tmp_path / 'none')
    assert peak_memory_of('test_resnet_pst') is None


def write_counter(folder, name, energy_uj, largest=10 ** 9):
    folder.mkdir(exist_ok=True)
    (folder / 'name').write_text(name)
    (folder / 'energy_uj').write_text(f'{energy_uj}\n')
    (folder / 'max_energy_range_uj').write_text(f'{largest}\n')


def test_energy_is_the_sum_of_the_packages(monkeypatch, tmp_path):
    monkeypatch.setattr(latency, 'POWERCAP', tmp_path)
    write_counter(tmp_path / 'intel-rapl:0', 'package-0', 10 ** 6)
    write_counter(tmp_path / 'intel-rapl:1', 'package-1', 5 * 10 ** 8)
    write_counter(tmp_path / 'intel-rapl:0:0', 'core', 0)
    write_counter(tmp_path / 'intel-rapl-mmio:0', 'package-0', 0)
    read = energy_counter()
    write_counter(tmp_path / 'intel-rapl:0', 'package-0', 3 * 10 ** 6)
    write_counter(tmp_path / 'intel-rapl:1', 'package-1', 5 * 10 ** 8 + 500_000)
    write_counter(tmp_path / 'intel-rapl:0:0', 'core', 10 ** 8)
    write_counter(tmp_path / 'intel-rapl-mmio:0', 'package-0', 10 ** 8)
    assert read() == pytest.approx(2.5)


def test_a_counter_starts_again_at_its_end(monkeypatch, tmp_path):
    monkeypatch.setattr(latency, 'POWERCAP', tmp_path)
    write_counter(tmp_path / 'intel-rapl:0', 'package-0', 900_000, largest=999_999)
    read = energy_counter()
    for now, expected in ((100_000, 0.2), (900_000, 1.), (0, 1.1)):
        write_counter(tmp_path / 'intel-rapl:0', 'package-0', now, largest=999_999)
        assert read() == pytest.approx(expected)


def test_energy_is_of_an_image(monkeypatch):
    joules = iter([10., 40.])
    monkeypatch.setattr(latency, 'energy_counter', lambda device: lambda: next(joules))
    calls = []
    assert energy(lambda: calls.append(1), images=5, seconds=0.) == pytest.approx(30. / 5)
    assert len(calls) == 2  # one before the counter is read


def test_energy_is_not_made_up(monkeypatch, tmp_path):
    monkeypatch.setattr(latency, 'POWERCAP', tmp_path)
    assert energy(lambda: 1 / 0) is None
    write_counter(tmp_path / 'intel-rapl:0', 'package-0', 'not for you')
    assert energy_counter() is None


def test_a_gpu_is_asked_for_its_own_energy(monkeypatch):
    asked = []
    driver = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or 'handle',
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 2500 if handle == 'handle' else 1 / 0)
    monkeypatch.setitem(sys.modules, 'pynvml', driver)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(uuid='12-34'))
    assert energy_counter(torch.device('cuda'))() == 2.5 and asked == ['GPU-12-34']
    monkeypatch.setitem(sys.modules, 'pynvml', None)
    assert energy_counter(torch.device('cuda')) is None


def test_a_form_travels_as_json():
    assert Form(*json.loads(json.dumps(Form(True, dtype='bfloat16')))) == Form(True, False, 'bfloat16', False)
