import sys

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import LayerNorm2d

import pst_timm  # noqa: F401
from pst_timm.utils.channels import channel_groups
from pst_timm.utils.errors import PSTError

pytest.importorskip('torch_pruning')


def found(model, keep=(), size=(1, 3, 16, 16)):
    """The groups as a mapping of what hangs together to the channels of each unit."""
    groups = channel_groups(model, torch.empty(size), keep)
    return {
        frozenset((m.name, m.side) for m in group.members):
            {(m.name, m.side): m.indices.tolist() for m in group.members}
        for group in groups}


def rows(start, end, size=1):
    return [list(range(i, i + size)) for i in range(start, end, size)]


class Net(nn.Module):
    """Two branches that are concatenated, a residual sum, a squeeze-and-excite, and a classifier."""

    def __init__(self):
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.b = nn.Conv2d(3, 6, 1)
        self.c = nn.Conv2d(10, 4, 1)
        self.gate = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        a, b = self.norm_a(self.a(x)).relu(), self.b(x)
        c = self.c(torch.cat([a, b], dim=1)) + a
        c = c * self.gate(c.mean((2, 3), keepdim=True)).sigmoid()
        return self.fc(c.mean((2, 3)))


def test_a_sum_and_a_concatenation_are_followed():
    groups = found(Net())
    together = {
        ('a', 'out'), ('norm_a', 'out'), ('c', 'in'), ('c', 'out'), ('gate', 'in'), ('gate', 'out'), ('fc', 'in')}
    assert set(groups) == {frozenset(together), frozenset({('b', 'out'), ('c', 'in')})}
    assert groups[frozenset(together)] == dict.fromkeys(together, rows(0, 4))
    assert groups[frozenset({('b', 'out'), ('c', 'in')})] == {('b', 'out'): rows(0, 6), ('c', 'in'): rows(4, 10)}


def test_neither_the_output_nor_what_is_kept_is_cut():
    groups = found(Net(), keep=['gate'])
    assert set(groups) == {frozenset({('b', 'out'), ('c', 'in')})}


@pytest.mark.parametrize('groups, unit', [(2, 4), (8, 1)])
def test_a_grouped_convolution_is_cut_by_its_groups(groups, unit):
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=groups), nn.Conv2d(8, 2, 1))
    (members,) = found(net).values()
    assert members == dict.fromkeys([('0', 'out'), ('1', 'in'), ('1', 'out'), ('2', 'in')], rows(0, 8, unit))


def test_a_depthwise_convolution_may_have_several_outputs_for_each_input():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 2, 1))
    (members,) = found(net).values()
    assert members == {
        ('0', 'out'): rows(0, 4), ('1', 'in'): rows(0, 4), ('1', 'out'): rows(0, 8, 2), ('2', 'in'): rows(0, 8, 2)}


def test_a_flattened_map_enters_the_classifier_many_times():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5))
    (members,) = found(net).values()
    assert members == {('0', 'out'): rows(0, 4), ('3', 'in'): rows(0, 16, 4)}


class Split(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x):
        one, two = self.a(x).chunk(2, dim=1)
        return self.b(one * two)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.q, self.after = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.before(x)
        q = self.q(x).flatten(2).transpose(1, 2)
        return self.after((q @ q.transpose(1, 2)).softmax(-1).sum(1).reshape(-1, 1, *x.shape[2:]) * x)


def test_what_is_split_stays_whole():
    assert not found(Split())


def test_what_attention_reads_stays_whole():
    assert all(('q', 'out') not in members for members in found(Attention()))


def test_normalisation_over_all_channels_may_be_cut_and_over_some_not():
    def members(norm):
        return found(nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.Conv2d(8, 2, 1)))

    (one,) = members(LayerNorm2d(8)).values()
    assert one[('1', 'out')] == rows(0, 8)
    assert members(nn.GroupNorm(1, 8)) and not members(nn.GroupNorm(2, 8))


def test_parameters_without_a_layer_are_told_by_their_names():
    model = timm.create_model('convnext_atto', depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    names = {name for members in found(model, size=(1, 3, 64, 64)) for name, _ in members}
    assert 'stages.0.blocks.0.gamma' in names


@pytest.mark.parametrize('name', ['test_resnet_pst', 'mobilenetv4_conv_small_pst'])
def test_the_attention_of_a_model_keeps_its_width(name):
    model = timm.create_model(name)
    keep = model.unprunable()
    assert keep == ['pst.blocks.0.attn']
    touched = {name for members in found(model, keep, (1, 3, 64, 64)) for name, _ in members}
    assert not [name for name in touched if name.startswith('pst.blocks.0.attn.')]
    for name in ('fuse_down.conv', 'pst.blocks.0.mlp.0.bn', 'conv_head.conv'):
        assert name in touched


def test_the_model_stays_as_it_is():
    model = Net().train().requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found(model)
    assert model.training and not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_extra_is_named_where_it_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch_pruning', None)
    with pytest.raises(PSTError, match=r"pip install 'pst_timm\[prune\]'"):
        channel_groups(Net(), torch.empty(1, 3, 16, 16))


def test_a_network_that_does_not_run_is_said():
    with pytest.raises(PSTError, match='The channels of Net cannot be followed'):
        channel_groups(Net(), torch.empty(1, 4, 16, 16))
