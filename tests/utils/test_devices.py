"""One resolver of devices."""
import pytest
import torch

from pst_timm.utils.devices import best_device, check_device, hardware_name, total_memory
from pst_timm.utils.errors import PSTError


def test_the_best_device_is_there():
    assert check_device().type == best_device() == check_device('').type
    assert check_device('cpu') == torch.device('cpu')
    torch.empty(1, device=best_device())


def test_the_accelerator_is_preferred(monkeypatch):
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda check_available: torch.device('mps'))
    assert best_device() == 'mps'
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda check_available: None)
    assert best_device() == 'cpu'


@pytest.mark.parametrize('name', ['abacus', 'cuda:99', 'cpu:cpu', 'mps:7', 'hpu', 'meta'])
def test_devices_that_are_not_there_are_named(name):
    with pytest.raises(PSTError, match=f'--device {name} cannot be used here: .* Leave the flag out.') as e:
        check_device(name)
    assert '\n' not in str(e.value)


def test_a_gpu_is_counted_and_not_touched(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert check_device('cuda:1') == torch.device('cuda', 1)
    with pytest.raises(PSTError, match='torch sees 2 GPUs'):
        check_device('cuda:2')


def test_hardware_has_a_name():
    assert hardware_name(torch.device('cpu')).strip()


def test_the_memory_of_a_machine_is_known(monkeypatch):
    found = total_memory(torch.device('cpu'))
    assert 2 ** 28 < found < 2 ** 50
    monkeypatch.setattr('pst_timm.utils.devices.Path.read_text', lambda self: '1000\n')
    assert total_memory(torch.device('cpu')) == 1000
    monkeypatch.setattr('pst_timm.utils.devices.Path.read_text', lambda self: 'max\n')
    assert total_memory(torch.device('cpu')) >= found
