"""Backbone use: features_only, forward_intermediates, pruning, output strides, against values worked out by hand."""
import pytest
import timm
import torch

from pst_timm.layers import FINE_FUSIONS
from tests.helpers import relative_error
from tests.layers import oracle
from tests.models.helpers import LEVELS, MODELS, SOME, TINY, build, features_of, images, unused

ATTENTION = [dict(), *(dict(topk=3, fine_fusion=fusion) for fusion in FINE_FUSIONS)]
attentions = pytest.mark.parametrize('kwargs', ATTENTION, ids=['coarse', *FINE_FUSIONS])


def levels_by_hand(model, x):
    """The five levels, from the model's parts and the equations of the fusion."""
    stem = model.act1(model.bn1(model.conv1(x)))
    c2 = model.layer1(model.maxpool(stem))
    c3 = model.layer2(c2)
    c4 = model.layer3(c3)
    c5 = model.layer4(c4)
    enhanced = torch.cat([model.pst(c4, c5), c4], dim=1)
    fused = model.fuse_merge(torch.cat([model.fuse_down(enhanced), c5], dim=1))
    return [stem, c2, c3, enhanced, fused]


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        assert a.shape == b.shape and relative_error(a, b) < 1e-6


@attentions
@pytest.mark.parametrize('output_stride', [8, 16, 32])
def test_neck_equals_the_oracle(output_stride, kwargs):
    """All that follows the trunk, from C4 and C5 to the logits, in float64."""
    model = build(output_stride=output_stride, num_classes=5, **kwargs).double()
    x = images((65, 97), batch=1).double()
    c4 = model.layer3(model.layer2(model.layer1(model.maxpool(model.act1(model.bn1(model.conv1(x)))))))
    c5 = model.layer4(c4)
    p, fused, logits = oracle.fusion_head(
        oracle.arrays(model.state_dict()), c4.detach().numpy(), c5.detach().numpy(), 16,
        kwargs.get('topk', 0), kwargs.get('fine_fusion', 'gate'))
    final, levels = model.forward_intermediates(x)
    assert relative_error(levels[3], torch.cat([torch.from_numpy(p), c4], dim=1)) < 1e-10
    assert relative_error(levels[4], torch.from_numpy(fused)) < 1e-10
    assert torch.equal(final, levels[4])
    assert relative_error(model(x), torch.from_numpy(logits)) < 1e-10


class TestFeaturesOnly:

    @attentions
    def test_values(self, kwargs):
        model = build(**kwargs)
        assert_same(features_of(model, **kwargs)(images()), levels_by_hand(model, images()))

    @pytest.mark.parametrize('output_stride', [8, 16, 32])
    @pytest.mark.parametrize('size', [(64, 64), (105, 75)])
    def test_strides(self, size, output_stride):
        features = build(features_only=True, output_stride=output_stride)
        info = features.feature_info
        assert info.reduction() == [min(2 ** (level + 1), output_stride) for level in range(LEVELS)]
        for out, channels, stride in zip(features(images(size)), info.channels(), info.reduction()):
            assert out.shape == (2, channels, *(-(-side // stride) for side in size))

    @pytest.mark.parametrize(
        'out_indices', [(0,), (1, 2), (3,), (4,), (0, 3), (2, 3, 4), (-1,), (-2, -1), (-4, 2), 1, 3, 5])
    def test_out_indices(self, out_indices):
        model = build()
        features = features_of(model, out_indices=out_indices)
        if isinstance(out_indices, int):
            indices = list(range(LEVELS - out_indices, LEVELS))
        else:
            indices = [i % LEVELS for i in out_indices]
        expected = levels_by_hand(model, images())
        assert_same(features(images()), [expected[i] for i in indices])
        assert features.feature_info.channels() == [expected[i].shape[1] for i in indices]

    @pytest.mark.parametrize('out_indices', [(5,), (-6,), (0, 7)])
    def test_indices_out_of_range(self, out_indices):
        with pytest.raises(AssertionError, match='out of range'):
            build(features_only=True, out_indices=out_indices)

    @pytest.mark.parametrize('out_indices', [(0, 1, 2, 3, 4), (2, 3), (3,), (4,)])
    @pytest.mark.parametrize('feature_cls', ['getter', 'fx', 'hook'])
    def test_feature_cls(self, feature_cls, out_indices):
        model = build(topk=3)
        features = features_of(model, feature_cls=feature_cls, out_indices=out_indices, topk=3)
        levels = levels_by_hand(model, images())
        assert_same(list(features(images())), [levels[i] for i in out_indices])
        assert features.feature_info.channels() == [levels[i].shape[1] for i in out_indices]

    @pytest.mark.parametrize('feature_cls', ['list', 'dict'])
    def test_chains_of_modules_are_refused(self, feature_cls):
        with pytest.raises(ValueError, match=f"feature_cls='{feature_cls}'.*{TINY}.*getter"):
            timm.create_model(TINY, features_only=True, feature_cls=feature_cls)

    @pytest.mark.parametrize('out_indices', [(0,), (1,), (2,), (1, 2), (3,), (2, 3), (4,), (0, 1, 2, 3, 4), (2, 4)])
    @pytest.mark.parametrize('train_topk', [0, 3])
    def test_no_parameter_is_unused(self, out_indices, train_topk):
        features = timm.create_model(TINY, features_only=True, out_indices=out_indices, train_topk=train_topk).train()
        sum(out.square().sum() for out in features(images())).backward()
        assert unused(features) == set()

    def test_low_levels_neither_own_nor_run_the_pst(self):
        low = build(features_only=True, out_indices=(1, 2))
        names = set(low.state_dict())
        assert not any(part in name for name in names for part in ('layer3', 'layer4', 'pst', 'fuse', 'head', 'fc'))
        trunk = timm.create_model('resnet18', features_only=True, out_indices=(1, 2))
        ours = timm.create_model('resnet18_pst', features_only=True, out_indices=(1, 2))
        assert [p.shape for p in ours.parameters()] == [p.shape for p in trunk.parameters()]

    @pytest.mark.parametrize('name', SOME)
    def test_features_of_a_classifiers_checkpoint(self, name):
        with torch.device('meta'):
            full, features = timm.create_model(name), timm.create_model(name, features_only=True)
        kept = {k for k in full.state_dict() if not k.startswith(('conv_head', 'fc'))}
        assert {k.removeprefix('model.') for k in features.state_dict()} == kept

    def test_grad_checkpointing(self):
        features = build(features_only=True).train()
        expected = features(images())
        features.model.set_grad_checkpointing(True)
        assert_same(features(images()), expected)


class TestForwardIntermediates:

    @attentions
    def test_all(self, kwargs):
        model, x = build(**kwargs), images()
        final, levels = model.forward_intermediates(x)
        assert_same(levels, levels_by_hand(model, x))
        assert torch.equal(final, model.forward_features(x))
        assert torch.equal(model.forward_head(final), model(x))

    @pytest.mark.parametrize('indices, expected', [
        (None, [0, 1, 2, 3, 4]),
        (1, [4]),
        (3, [2, 3, 4]),
        ([0, 2], [0, 2]),
        ((1, 3), [1, 3]),
        ([-1], [4]),
        ([-5, 3], [0, 3]),
        ([], None),
        (0, None),
        (6, None),
        ([5], None),
        ([-6], None),
    ])
    @pytest.mark.parametrize('stop_early', [False, True])
    @pytest.mark.parametrize('intermediates_only', [False, True])
    def test_indices(self, indices, expected, stop_early, intermediates_only):
        model, x = build(), images()

        def call():
            return model.forward_intermediates(
                x, indices=indices, stop_early=stop_early, intermediates_only=intermediates_only)

        if expected is None:
            with pytest.raises((AssertionError, ValueError)):
                call()
            return
        levels = levels_by_hand(model, x)
        out = call()
        intermediates = out if intermediates_only else out[1]
        assert isinstance(intermediates, list)
        assert_same(intermediates, [levels[i] for i in expected])
        if not intermediates_only:
            assert_same([out[0]], [levels[max(expected) if stop_early else 4]])

    @pytest.mark.parametrize('index', range(LEVELS))
    def test_stop_early_runs_nothing_beyond(self, index):
        model = build()
        ran = []
        for name, child in model.named_children():
            child.register_forward_hook(lambda m, args, out, name=name: ran.append(name))
        model.forward_intermediates(images(), indices=[index], stop_early=True, intermediates_only=True)
        last = ['act1', 'layer1', 'layer2', 'pst_cat', 'fuse_merge'][index]
        assert ran[-1] == last and len(ran) == len(set(ran))

    def test_norm_is_accepted_and_changes_nothing(self):
        model, x = build(), images()
        assert_same(model.forward_intermediates(x, norm=True)[1], model.forward_intermediates(x)[1])

    @pytest.mark.parametrize('output_fmt', ['NHWC', 'NLC', ''])
    def test_output_fmt(self, output_fmt):
        with pytest.raises(AssertionError, match='NCHW'):
            build().forward_intermediates(images(), output_fmt=output_fmt)

    @attentions
    def test_grad_checkpointing(self, kwargs):
        model, x = build(**kwargs), images()
        expected = model.forward_intermediates(x)[1]
        model.set_grad_checkpointing(True)
        assert_same(model.forward_intermediates(x)[1], expected)


class TestPruning:

    @pytest.mark.parametrize('indices, kept', [
        (1, [4]), (2, [3, 4]), ([2], [2]), ([0, 3], [0, 3]), ([-1], [4]), ([-3, 1], [2, 1]), ((0,), [0]),
    ])
    def test_returns_the_indices_and_keeps_their_values(self, indices, kept):
        model, x = build(), images()
        levels = levels_by_hand(model, x)
        assert list(model.prune_intermediate_layers(indices)) == kept
        expected = [levels[i] for i in sorted(kept)]  # levels come in the order of the network
        assert_same(model.forward_intermediates(x, indices=kept, intermediates_only=True), expected)

    def test_a_pruned_level_is_a_clear_error(self):
        model = build()
        model.prune_intermediate_layers([2])
        with pytest.raises(ValueError, match=r'Level 4.*2'):
            model.forward_intermediates(images(), indices=[4])

    @pytest.mark.parametrize('index, gone', [
        (4, {'conv_head', 'fc'}),
        (3, {'conv_head', 'fc', 'fuse_down', 'fuse_merge'}),
        (2, {'conv_head', 'fc', 'fuse_down', 'fuse_merge', 'pst', 'layer3', 'layer4'}),
        (1, {'conv_head', 'fc', 'fuse_down', 'fuse_merge', 'pst', 'layer3', 'layer4', 'layer2'}),
        (0, {'conv_head', 'fc', 'fuse_down', 'fuse_merge', 'pst', 'layer3', 'layer4', 'layer2', 'layer1'}),
    ])
    def test_what_goes(self, index, gone):
        model = build()
        before = {name.split('.')[0] for name in model.state_dict()}
        channels = model.feature_info[index]['num_chs']
        model.prune_intermediate_layers([index])
        assert before - {name.split('.')[0] for name in model.state_dict()} == gone
        assert model.num_features == model.head_hidden_size == channels and model.num_classes == 0

    def test_the_head_may_stay(self):
        model, x = build(num_classes=7), images()
        expected = model(x)
        model.prune_intermediate_layers([1, 4], prune_head=False)
        assert torch.equal(model(x), expected)
        assert torch.equal(model.forward_head(model.forward_features(x)), expected)

    @pytest.mark.parametrize('prune_norm', [False, True])
    def test_prune_norm_changes_nothing(self, prune_norm):
        model, x = build(), images()
        model.prune_intermediate_layers([3], prune_norm=prune_norm)
        assert_same(model.forward_intermediates(x, [3], intermediates_only=True), [levels_by_hand(build(), x)[3]])

    @pytest.mark.parametrize('index', range(LEVELS))
    def test_a_pruned_model_still_runs(self, index):
        """forward gives the deepest level kept, as timm's own ResNet does."""
        model, x = build(), images()
        expected = levels_by_hand(model, x)[index]
        model.prune_intermediate_layers([index])
        assert_same([model.forward_features(x)], [expected])
        assert_same([model(x)], [expected])
        model.set_fine_step(3)
        model.set_topk(2)
        assert torch.equal(model(x), expected) == (index < 3)


class TestOutputStride:

    @attentions
    @pytest.mark.parametrize('output_stride, size', [(16, (4, 3)), (8, (8, 6))])
    def test_dilated_stages(self, output_stride, size, kwargs):
        model = build(output_stride=output_stride, num_classes=4, **kwargs)
        x = images((64, 48))
        assert model.forward_features(x).shape[2:] == size
        assert model(x).shape == (2, 4)
        assert model.fuse_down.conv.stride == (1, 1)

    @pytest.mark.parametrize('output_stride', [8, 16])
    @pytest.mark.parametrize('name', [name for name in MODELS if not name.startswith('mobilenetv4')])
    def test_names_and_parameters_are_those_of_stride_32(self, name, output_stride):
        with torch.device('meta'):
            a, b = timm.create_model(name), timm.create_model(name, output_stride=output_stride)
            assert b(torch.empty(1, 3, 64, 64)).shape == (1, 1000)
        assert [(k, v.shape) for k, v in a.state_dict().items()] == [(k, v.shape) for k, v in b.state_dict().items()]


@attentions
@pytest.mark.parametrize('size', [(32, 32), (33, 33), (1, 1), (15, 200), (47, 31), (224, 160)])
def test_any_size_and_channels_last(size, kwargs):
    model, x = build(num_classes=4, **kwargs), images(size)
    y = model(x)
    assert y.shape == (2, 4) and torch.isfinite(y).all()
    last = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert relative_error(last, y) < 1e-5
