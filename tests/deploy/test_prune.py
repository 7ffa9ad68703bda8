import math

import pytest
import timm
import torch
import torch.nn as nn

from pst_timm.checkpoints import load_model
from pst_timm.checkpoints.folder import save_folder
from pst_timm.deploy import importance as importance_module
from pst_timm.deploy.prune import prune, ratio_for_latency, reestimate_norms
from pst_timm.models.pruned import widths
from pst_timm.utils.channels import Group
from pst_timm.utils.cost import count_gmacs
from pst_timm.utils.errors import PSTError
from tests.models.helpers import TINY, build, images

pytest.importorskip('torch_pruning')

SIZE = (3, 64, 64)


def tiny(**kwargs):
    return build(TINY, pretrained_cfg_overlay={'input_size': SIZE}, num_classes=3, **kwargs)


def batches(count=2):
    return [(images((64, 64), seed=i), torch.arange(2)) for i in range(count)]


def removed(model, smaller):
    size = model.pretrained_cfg['input_size']
    return 1 - count_gmacs(smaller, size) / count_gmacs(model, size)


@pytest.fixture(scope='module')
def pair():
    model = tiny()
    return model, prune(model, 0.5, round_to=8)


@pytest.mark.parametrize('scope', ['uniform', 'global'])
def test_so_many_multiply_adds_are_removed(scope):
    model = tiny()
    smaller = prune(model, 0.4, scope=scope, round_to=4)
    assert 0.4 <= removed(model, smaller) < 0.48


def test_widths_are_multiples_and_the_attention_stays_whole(pair):
    model, smaller = pair
    before, after = widths(model), widths(smaller)
    changed = {name for name in before if before[name] != after[name]}
    assert 20 < len(changed) < len(before)
    assert not [name for name in changed if '.attn.' in name]
    for name in changed:
        now, then = (w if isinstance(w, list) else [w] for w in (after[name], before[name]))
        # what enters a layer may come from several, one of which is whole
        assert now[-1] == then[-1] or now[-1] % 8 == 0


def test_the_model_stays_as_it_was(pair):
    model, smaller = pair
    again = tiny().state_dict()
    assert all(torch.equal(v, again[k]) for k, v in model.state_dict().items())
    assert model.pretrained_cfg['architecture'] == TINY and not hasattr(model, 'own_args')
    assert type(smaller) is type(model) and smaller.state_dict().keys() == model.state_dict().keys()


def test_the_weights_that_stay_are_those_of_the_model(pair):
    model, smaller = pair
    # no group norm stands between: of each convolution some rows and columns are left, in their order
    wide, narrow = model.layer1[0].conv1.weight, smaller.layer1[0].conv1.weight
    assert narrow.shape < wide.shape
    assert torch.isin(narrow, wide).all()


@pytest.mark.parametrize('importance', ['l2', 'bn', 'taylor'])
def test_what_matters_least_is_cut(importance):
    model = tiny()
    layer = model.layer3[0]  # the bottleneck, whose first channels hang together with nothing else
    weak = torch.randperm(layer.conv1.out_channels)[:layer.conv1.out_channels // 2]
    with torch.no_grad():
        for tensor in (layer.conv1.weight, layer.bn1.weight, layer.bn1.bias):
            tensor[weak] *= 1e-3
        layer.conv2.weight[:, weak] *= 1e-3
        strong = [i for i in range(layer.conv1.out_channels) if i not in weak]
        layer.bn1.bias[strong] = 4.  # what its activation lets pass
    smaller = prune(model, 0.5, importance=importance, by='channels', round_to=1, images=batches())
    kept = smaller.layer3[0].conv1.out_channels
    assert kept == len(strong)
    assert torch.allclose(smaller.layer3[0].bn1.weight, layer.bn1.weight[strong])


def test_global_importance_spares_the_layers_that_matter():
    model = tiny()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(10. if name.startswith('layer3') else 1.).mul_(torch.rand_like(module.weight) + 0.5)
    smaller = prune(model, 0.3, importance='bn', scope='global', by='channels', round_to=1)
    assert smaller.layer3[0].bn1.num_features == model.layer3[0].bn1.num_features
    assert smaller.layer1[0].bn1.num_features < model.layer1[0].bn1.num_features


def test_the_share_may_be_of_channels(pair):
    smaller = prune(pair[0], 0.5, by='channels', round_to=1)
    assert smaller.conv_head.out_channels == 64


def test_steps_come_to_the_same_share_with_training_between(pair):
    model = pair[0]
    seen = []

    def between(smaller, step):
        seen.append((step, removed(model, smaller)))
        return smaller

    smaller = prune(model, 0.6, round_to=4, steps=3, between=between, images=batches())
    assert [step for step, _ in seen] == [1, 2]
    assert [share for _, share in seen] == [pytest.approx(s, abs=0.05) for s in (0.2, 0.4)]
    assert removed(model, smaller) == pytest.approx(0.6, abs=0.05)
    # no layer was cut by far more than another in the same steps
    left = [smaller.layer1[0].bn1.num_features / 32, smaller.conv_head.out_channels / 128]
    assert max(left) - min(left) < 0.2


def test_a_pruned_model_is_pruned_again_and_rebuilt(pair, tmp_path):
    smaller = pair[1]
    again = prune(smaller, 0.3, round_to=8)
    assert removed(smaller, again) >= 0.3
    save_folder(again, tmp_path / 'again')
    x = images((64, 64))
    assert torch.equal(load_model(tmp_path / 'again')(x), again(x))


def test_statistics_are_those_of_the_images():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    parts = [images((8, 8), seed=i) for i in range(3)]
    reestimate_norms(net, parts)
    seen = [net[0](part) for part in parts]
    assert torch.allclose(net[1].running_mean, torch.stack([y.mean((0, 2, 3)) for y in seen]).mean(0), atol=1e-6)
    assert torch.allclose(net[1].running_var, torch.stack([y.var((0, 2, 3)) for y in seen]).mean(0), atol=1e-5)
    assert net.training and net[1].momentum == 0.1


def test_images_give_a_pruned_model_statistics(pair):
    smaller = prune(pair[0], 0.5, round_to=8, images=batches())
    assert not torch.equal(smaller.bn1.running_mean, pair[1].bn1.running_mean)


def test_channels_that_hang_together_unnoticed_are_noticed(pair, monkeypatch):
    found = importance_module.cuttable_groups

    def wrong(*args):
        """What enters is no longer what leaves."""
        return [
            Group([m._replace(indices=m.indices.flip(0)) if m.side == 'in' else m for m in group.members])
            for group in found(*args)]

    monkeypatch.setattr(importance_module, 'cuttable_groups', wrong)
    with pytest.raises(PSTError, match='ResNetPST cannot be pruned: channels of it hang together'):
        prune(pair[0], 0.5)


def test_a_model_that_misses_a_layer_is_refused(pair, monkeypatch):
    found = importance_module.cuttable_groups
    monkeypatch.setattr(importance_module, 'cuttable_groups', lambda *args: [
        Group([m for m in group.members if m.name != 'layer4.0.conv1']) for group in found(*args)])
    with pytest.raises(PSTError, match='cannot be pruned'):
        prune(pair[0], 0.5)


@pytest.mark.parametrize('options, said', [
    (dict(ratio=0.), 'ratio is the share to remove'),
    (dict(ratio=1.), 'ratio is the share to remove'),
    (dict(ratio=math.nan), 'ratio is the share to remove'),
    (dict(importance='l1'), 'importance must be one of l2, bn, taylor'),
    (dict(scope='local'), 'scope must be one of'),
    (dict(by='parameters'), 'by must be one of'),
    (dict(importance='taylor'), 'needs labelled images'),
    (dict(round_to=0), 'round_to must be a positive whole number'),
    (dict(steps=0), 'steps must be a positive whole number'),
])
def test_a_wrong_option_is_told(pair, options, said):
    with pytest.raises(ValueError, match=said):
        prune(pair[0], **options)


def test_more_than_there_is_cannot_be_cut(pair):
    with pytest.raises(PSTError, match=r'are left at least, .* ask for less'):
        prune(pair[0], 0.97)


def test_a_model_without_channels_to_cut_is_refused(pair, monkeypatch):
    monkeypatch.setattr(importance_module, 'cuttable_groups', lambda *args: [])
    with pytest.raises(PSTError, match='ResNetPST has no channels that can be cut'):
        prune(pair[0], 0.5)


def test_batch_norms_cannot_tell_where_there_are_none():
    with pytest.raises(PSTError, match=r"no batch norms .* choose 'l2' or 'taylor'"):
        prune(timm.create_model('test_convnext'), 0.5, importance='bn')


@pytest.mark.slow
def test_a_latency_is_searched_for(pair):
    model = pair[0]

    def measure(whole, smaller):
        assert whole is model
        left = 1 - removed(whole, smaller)
        return left / 10, left

    ratio = ratio_for_latency(model, measure=measure, round_to=4, share=0.62)
    # what comes of it is fast enough, and less would not be
    assert ratio == pytest.approx(0.38, abs=0.1)
    reached, less = (removed(model, prune(model, r, round_to=4)) for r in (ratio, ratio - 0.1))
    assert reached >= 0.38 > less


def test_a_latency_that_cannot_be_reached_is_said(pair):
    with pytest.raises(PSTError, match='5 ms cannot be reached by pruning'):
        ratio_for_latency(pair[0], milliseconds=5, measure=lambda whole, smaller: (0.1, 0.9))
