"""Threads for the cores that are idle, unless the user said how many."""
import pytest
import torch

from pst_timm.utils import devices
from pst_timm.utils.devices import available_cores, busy_cores, choose_threads


@pytest.fixture
def machine(monkeypatch):
    """Of so many cores and so many busy ones, with so many threads of torch at first; returns torch's number after."""
    now = [0]
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: now[0])
    monkeypatch.setattr(torch, 'set_num_threads', lambda count: now.__setitem__(0, count))

    def threads(cores, busy, before):
        now[0] = before
        monkeypatch.setattr(devices, 'available_cores', lambda: cores)
        monkeypatch.setattr(devices, 'busy_cores', lambda: busy)
        assert choose_threads() == now[0]
        return now[0]

    return threads


@pytest.mark.parametrize('cores,busy,before,expected', [
    (8, 0., 8, 8), (8, 2.6, 8, 5), (8, 7.9, 8, 1), (8, 31., 8, 1), (2, 0.4, 2, 2), (2, 1., 2, 1),
    (8, 0., 4, 4),  # as the user set it
    (8, 6., 4, 2),
    (2, 0., 16, 2),  # a container that may use two cores of the machine
])
def test_busy_cores_are_left_to_those_who_keep_them_busy(machine, cores, busy, before, expected):
    assert machine(cores, busy, before) == expected


def test_the_environment_has_the_last_word(machine, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '8')
    assert machine(cores=8, busy=7., before=8) == 8


def test_busy_cores_are_counted_from_the_ticks_of_our_own_cores(monkeypatch):
    assert 0 <= busy_cores(0.02) <= available_cores()
    readings = iter([(100, 1000), (150, 1200)])
    monkeypatch.setattr(devices, '_core_ticks', lambda: next(readings))
    monkeypatch.setattr(devices, 'available_cores', lambda: 4)
    assert busy_cores(0.) == pytest.approx(1.)


def test_a_machine_that_does_not_tell_is_judged_by_its_load(monkeypatch):
    monkeypatch.setattr(devices.os, 'getloadavg', lambda: (3.5, 0., 0.), raising=False)
    for wrong in (lambda: (5, 5), lambda: (_ for _ in ()).throw(OSError)):
        monkeypatch.setattr(devices, '_core_ticks', wrong)
        assert busy_cores(0.) == 3.5
    monkeypatch.undo()
    monkeypatch.setattr(devices.os, 'getloadavg', lambda: (2.5, 0., 0.), raising=False)
    monkeypatch.delattr(devices.os, 'sched_getaffinity')  # as on macOS and Windows
    assert busy_cores(0.) == 2.5
