"""Costs of what can be counted by hand."""
import subprocess
import sys
from pathlib import Path

import timm
import torch
from torch import nn

from pst_timm.utils.cost import count_activations, count_gmacs, layer_gmacs, measure_activations, peak_memory

CPU = torch.device('cpu')


def test_peak_memory_counts_what_a_call_holds():
    size = 2 ** 20
    one = peak_memory(lambda: torch.empty(size), CPU)
    two = peak_memory(lambda: [torch.empty(size), torch.empty(size)], CPU)
    assert one == 4 * size and two == 8 * size


def test_peak_memory_says_nothing():
    code = ('import torch\nfrom pst_timm.utils.cost import peak_memory\n'
            'print(peak_memory(lambda: torch.empty(10), torch.device("cpu")))')
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert (done.stdout, done.stderr) == ('40\n', '')


def test_multiply_adds_and_activations_of_known_layers():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    assert count_gmacs(net, (3, 4, 4)) * 1e9 == 16 * 8 * 27 + 8 * 16 * 5
    assert count_activations(lambda: net(torch.zeros(1, 3, 4, 4))) == 8 * 16 + 5
    assert measure_activations(lambda: net(torch.zeros(1, 3, 4, 4))) == (8 * 16 + 5, 8 * 16)
    assert next(net.parameters()).device == CPU


def test_tokens_that_are_views_of_a_parameter_are_no_obstacle():
    net = timm.create_model('pit_ti_224', device='meta')
    assert 0.5 < count_gmacs(net, (3, 224, 224)) < 1
    assert all(p.requires_grad for p in net.parameters())


def test_the_layers_of_a_network_add_up_to_all_of_it():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1, groups=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    found = layer_gmacs(model, (3, 10, 10))
    assert found == {'0': 64 * 8 * 27 / 1e9, '1': 64 * 8 * 2 / 1e9, '4': 8 * 5 / 1e9}
    assert abs(sum(found.values()) - count_gmacs(model, (3, 10, 10))) < 1e-12
