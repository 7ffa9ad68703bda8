"""PST over any timm trunk: levels and numbers against the plain model, many families, and those that cannot."""
import copy
import re

import pytest
import timm
import torch
import torch.nn as nn
from timm.models import create_feature_extractor, group_parameters, reparameterize_model
from timm.optim import create_optimizer_v2

import pst_timm
from pst_timm.models import copy_trunk
from pst_timm.models.backbone_pst import default_cfgs, fitting_width
from pst_timm.utils.cost import count_gmacs
from tests.helpers import randomize, relative_error
from tests.layers import oracle
from tests.models.helpers import BACKBONES, images, unused

# tiny ones: batch norm, squeeze-and-excite, layer norm over channels that come last and levels that round down, NHWC
TINY_TRUNKS = ['test_efficientnet', 'test_byobnet', 'test_convnext', 'test_mambaout']
tiny = pytest.mark.parametrize('trunk', TINY_TRUNKS)
# other families, with a size that no stride divides where they take one
FAMILIES = {
    'mobilenetv3_small_100': (97, 65), 'ghostnet_100': (97, 65), 'densenet121': (97, 65), 'repvgg_a0': (97, 65),
    'mobileone_s0': (97, 65), 'regnetx_002': (97, 65), 'edgenext_xx_small': (97, 65), 'fastvit_t8': (97, 65),
    'efficientvit_b0': (97, 65), 'resnest14d': (97, 65), 'hardcorenas_a': (97, 65), 'mobilevit_xxs': (97, 65),
    'convnextv2_atto': (97, 65), 'poolformer_s12': (97, 65), 'pvt_v2_b0': (97, 65), 'dla34': (96, 64),
    'swin_tiny_patch4_window7_224': (224, 224),
}
OFTEN = ('mobilenetv3_small_100', 'ghostnet_100', 'regnetx_002', 'edgenext_xx_small', 'efficientvit_b0')


def create(trunk='test_efficientnet', random=True, **kwargs):
    """A model of 7 classes in eval mode, randomised unless told otherwise."""
    model = pst_timm.create_pst(trunk, **{'num_classes': 7, **kwargs})
    return (randomize(model) if random else model).eval()


def plain_of(model):
    """The plain model with the weights of a trunk, without a classifier."""
    plain = timm.create_model(model.plain_name, num_classes=0).eval()
    own = {k.removeprefix('trunk.'): v for k, v in model.state_dict().items() if k.startswith('trunk.')}
    assert not plain.load_state_dict(own, strict=False).unexpected_keys
    return plain


def levels_of(plain, x):
    """The levels of a plain model in NCHW."""
    return plain.forward_intermediates(x, output_fmt='NCHW', intermediates_only=True)


@tiny
@torch.no_grad()
def test_levels_are_those_of_the_plain_model_and_the_neck_equals_the_oracle(trunk):
    # the coarse map of a trunk that rounds down is 2x3 below one of 5x6
    model, x = create(trunk, topk=2).double(), images((80, 96)).double()
    *low, c4, c5 = levels_of(plain_of(model).double(), x)
    c4 = c4[:, :, :2 * c5.shape[2], :2 * c5.shape[3]]
    p, fused, logits = oracle.fusion_head(oracle.arrays(model.state_dict()), c4.numpy(), c5.numpy(), 32, 2, 'gate')
    final, levels = model.forward_intermediates(x)
    assert len(levels) == len(low) + 2 and all(torch.equal(a, b) for a, b in zip(levels, low))
    assert relative_error(levels[-2], torch.cat([torch.from_numpy(p), c4], dim=1)) < 1e-10
    assert relative_error(final, torch.from_numpy(fused)) < 1e-10 and torch.equal(final, levels[-1])
    assert relative_error(model(x), torch.from_numpy(logits)) < 1e-10
    assert model.rounds_down == (trunk == 'test_convnext') == (c5.shape[2] == 2)


class TestHabits:

    @tiny
    @pytest.mark.parametrize('size', [(33, 33), (40, 95), (64, 64), (208, 112)])
    def test_any_size_and_channels_last(self, trunk, size):
        model, x = create(trunk), images(size)
        with torch.no_grad():
            y = model(x)
            last = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
        assert y.shape == (2, 7) and torch.isfinite(y).all() and relative_error(last, y) < 1e-4

    @tiny
    def test_features_only(self, trunk):
        model, x = create(trunk), images((80, 64))
        levels = model.forward_intermediates(x, intermediates_only=True)
        for indices in (None, (0,), (1, -2), (-1,)):
            kwargs = {} if indices is None else {'out_indices': indices}
            features = create(trunk, random=False, features_only=True, **kwargs)
            state = {f'model.{k}': v for k, v in model.state_dict().items()}
            features.load_state_dict({k: state[k] for k in features.state_dict()})
            wanted = range(len(levels)) if indices is None else [i % len(levels) for i in indices]
            outs = features(x)
            assert len(outs) == len(wanted)
            assert all(torch.equal(out, levels[i]) for out, i in zip(outs, sorted(wanted)))
            assert features.feature_info.channels() == [levels[i].shape[1] for i in sorted(wanted)]
            features.train()
            sum(out.square().sum() for out in features(x)).backward()
            assert unused(features) == set()

    @tiny
    def test_pruning(self, trunk):
        x = images((64, 64))
        full = create(trunk)
        levels = full.forward_intermediates(x, intermediates_only=True)
        for index in range(full.levels):
            model = copy.deepcopy(full)
            assert list(model.prune_intermediate_layers([index])) == [index]
            assert torch.equal(model(x), levels[index])
            assert any(k.startswith('pst.') for k in model.state_dict()) == (index >= full.levels - 2)
            assert model.set_topk(2) is None and (index >= full.levels - 2) == (model.tokens(64) == 4)
            model.train()(x).square().sum().backward()
            assert unused(model) == set()

    @tiny
    def test_gradient_checkpointing_changes_nothing(self, trunk):
        grads = []
        for enable in (False, True):
            model = create(trunk, train_topk=2).train()
            model.set_grad_checkpointing(enable)
            model.set_train_step(1)
            torch.manual_seed(0)
            model(images((64, 64))).square().mean().backward()
            grads.append({n: p.grad for n, p in model.named_parameters()})
        assert unused(model) == set()
        assert all(torch.allclose(g, grads[0][n], rtol=1e-3, atol=1e-5) for n, g in grads[1].items())

    @tiny
    def test_layer_decay_reaches_the_trunk_in_its_own_order(self, trunk):
        model = create(trunk, random=False)
        layer = group_parameters(model, model.group_matcher(), reverse=True)
        plain = timm.create_model(trunk, num_classes=0)
        theirs = group_parameters(plain, plain.group_matcher(), reverse=True)
        names = [n for n, _ in model.trunk.named_parameters()]
        own = [(layer[f'trunk.{n}'], theirs[n]) for n in names if theirs[n] < max(theirs.values())]
        assert len({a for a, _ in own}) > 2 and all((a < c) == (b < d) for a, b in own for c, d in own)
        below = max(layer[f'trunk.{n}'] for n in names)
        assert below < min(i for n, i in layer.items() if not n.startswith('trunk.'))
        assert len(create_optimizer_v2(model, 'adamw', layer_decay=0.5).param_groups) > 4

    @pytest.mark.parametrize('trunk', ['inception_v3', 'csatv2'])
    def test_a_trunk_that_orders_no_parameters_is_one_group(self, trunk):
        model = create(trunk, random=False, device='meta', pst_width=64)
        layer = group_parameters(model, model.group_matcher(), reverse=True)
        assert len({i for n, i in layer.items() if n.startswith('trunk.')}) == 1
        assert layer.keys() == {n for n, _ in model.named_parameters()}

    def test_the_trunk_keeps_its_own_from_weight_decay(self):
        model = create('swin_tiny_patch4_window7_224', random=False, device='meta')
        tables = {n for n, _ in model.named_parameters() if n.endswith('relative_position_bias_table')}
        gates = {n for n, _ in model.named_parameters() if '.gate.' in n}
        assert tables and gates and model.no_weight_decay() == tables | gates

    @tiny
    @pytest.mark.parametrize('fold', [reparameterize_model, pst_timm.reparameterize], ids=['timm', 'pst_timm'])
    def test_folded(self, trunk, fold):
        if (trunk, fold) == ('test_mambaout', pst_timm.reparameterize):
            pytest.skip('its blocks cannot be traced')
        model = create(trunk, topk=2)
        folded = fold(model)
        with torch.no_grad():
            for size in ((64, 64), (80, 97)):
                assert relative_error(folded(images(size)), model(images(size))) < 1e-4
        assert not any(isinstance(m, nn.BatchNorm2d) for n, m in folded.named_modules() if not n.startswith('trunk.'))

    def test_a_reparameterisable_trunk_is_folded_too(self):
        model = create('mobileone_s0')
        with torch.no_grad():
            expected = model(images((64, 64)))
            for fold in (reparameterize_model, pst_timm.reparameterize):
                folded = fold(model)
                assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
                assert relative_error(folded(images((64, 64))), expected) < 1e-3

    @pytest.mark.parametrize('trunk', ['test_efficientnet', pytest.param('test_convnext', marks=pytest.mark.slow)])
    def test_one_graph_and_export_of_any_size(self, trunk):
        from torch.export import Dim

        model = create(trunk, topk=2)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend='eager')
        # export cannot prove what a level that is rounded down and doubled comes to
        scale = 32 if model.rounds_down else 1
        sizes = {i: scale * Dim(f'side{i}', min=64 // scale) for i in (2, 3)}
        exported = torch.export.export(model, (images((96, 128)),), dynamic_shapes=({0: Dim('batch', min=1), **sizes},))
        with torch.no_grad():
            assert relative_error(compiled(images((80, 97))), model(images((80, 97)))) < 1e-5
            for size in ((64, 96), (160, 64)) if model.rounds_down else ((80, 97), (112, 64), (208, 240)):
                assert relative_error(exported.module()(images(size)), model(images(size))) < 1e-5

    @pytest.mark.skipif(not hasattr(torch.jit, 'script'), reason='torch no longer offers TorchScript')
    @pytest.mark.filterwarnings('ignore:.*torch.jit.*')
    @pytest.mark.parametrize('trunk', [*TINY_TRUNKS[:3], 'regnetx_002'])
    def test_scripted(self, trunk):
        model = create(trunk)
        before = list(model.state_dict())
        scripted = torch.jit.script(model)
        assert set(scripted.state_dict()) == set(before) == set(model.state_dict())
        scripted.set_topk(2, 'joint')
        with torch.no_grad():
            with model.with_settings(topk=2, fine_fusion='joint'):
                for size in ((64, 96), (80, 97)):
                    assert relative_error(scripted(images(size)), model(images(size))) < 1e-5
        model.prune_intermediate_layers([0])
        with pytest.raises(ValueError, match='pruned'):
            torch.jit.script(model)

    def test_tokens_are_those_that_the_layers_see(self):
        for trunk in ('test_convnext', 'test_efficientnet', 'poolformer_s12'):
            model = create(trunk)
            for size in ((80, 112), (97, 64), (64, 64)):
                [block] = pst_timm.inspect_tokens(model, images(size), topk=10 ** 6).blocks
                assert model.tokens(size) == block.scores.shape[2]

    def test_arguments_reach_trunk_and_neck(self):
        model = create(
            in_chans=1, output_stride=16, drop_path_rate=0.3, pst_width=32, pst_head_dim=16, head_hidden_size=24,
            head_skip=True, act_layer=nn.GELU, pst_norm_layer='groupnorm1')
        assert model(images((64, 64), chans=1)).shape == (2, 7)
        assert model.forward_features(images((64, 64), chans=1)).shape == (2, 32 + 64, 4, 4)
        rates = [m.drop_prob for m in model.trunk.modules() if isinstance(m, timm.layers.DropPath)]
        assert rates and max(rates) > 0.2 and model.pst.blocks[0].drop_path1.drop_prob == 0.3
        assert any(isinstance(m, nn.GELU) for m in model.trunk.modules())
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.pst.modules())
        assert model.own_args == {'pst_width': 32, 'head_hidden_size': 24}

    def test_heads(self):
        model = create()
        for kwargs, shape in ((dict(num_classes=0), (2, 256)), (dict(num_classes=3), (2, 3)),
                              (dict(num_classes=0, global_pool=''), (2, 256, 2, 2))):
            model.reset_classifier(**kwargs)
            assert model(images((64, 64))).shape == shape
        assert create(num_classes=0, global_pool='')(images((64, 64))).shape == (2, 256, 2, 2)


class TestFamilies:

    @pytest.mark.parametrize('trunk', [
        name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES])
    def test_forward_backward_and_an_odd_size(self, trunk):
        model = create(trunk, random=False, pst_zero_init=False).train()
        model(images(FAMILIES[trunk])).square().mean().backward()
        assert unused(model) == set()
        model.eval()
        with torch.no_grad():
            coarse = model(images(FAMILIES[trunk]))
            model.set_topk(3)
            assert coarse.shape == (2, 7) and not torch.equal(model(images(FAMILIES[trunk])), coarse)
        assert model.pretrained_cfg['architecture'] == 'backbone_pst'
        assert all(k.split('.')[0] in ('trunk', 'pst', 'fuse_down', 'fuse_merge', 'conv_head', 'fc')
                   for k in model.state_dict())

    @pytest.mark.parametrize('trunk, words', [
        ('vit_tiny_patch16_224', 'stride 16 with one at stride 32, and it has levels at 16 only'),
        ('nest_tiny', 'it has levels at 4, 8, 16 only'),
        ('mobilenetv3_smal_100', 'Did you mean mobilenetv3_small_100'),
        ('hf-hub:timm/resnet18.a1_in1k', 'is no model of timm'),
        ('resnet50_pst', 'has its PST already'),
        ('backbone_pst', 'has its PST already'),
    ])
    def test_one_that_cannot_says_why(self, trunk, words):
        with pytest.raises(ValueError, match=words):
            pst_timm.create_pst(trunk, device='meta')

    @pytest.mark.parametrize('trunk', [5, True, ['resnet18'], {'a': 1}])
    def test_what_is_no_name_says_so(self, trunk):
        with pytest.raises(ValueError, match='is no model of timm, named without a tag'):
            timm.create_model('backbone_pst', trunk=trunk)

    @pytest.mark.parametrize('name', ['pretrained', 'checkpoint_path', 'cache_dir', 'pretrained_cfg'])
    def test_a_trunk_reads_no_weights_by_an_argument(self, name):
        with pytest.raises(TypeError, match=f'{name}.*load_trunk'):
            pst_timm.BackbonePST('test_efficientnet', **{name: 'nowhere'})

    def test_a_model_without_levels_says_so(self, monkeypatch):
        real = timm.create_model
        monkeypatch.setattr(
            'pst_timm.models.backbone_pst.timm.create_model',
            lambda name, **kwargs: nn.Conv2d(3, 8, 1) if name == 'test_vit' else real(name, **kwargs))
        with pytest.raises(ValueError, match='test_vit does not offer its levels'):
            pst_timm.create_pst('test_vit')

    @pytest.mark.parametrize('kwargs, word', [(dict(output_stride=16), 'output_stride'), (dict(no_such=1), 'no_such')])
    def test_an_argument_that_the_trunk_does_not_take_is_named(self, kwargs, word):
        with pytest.raises(TypeError, match=f'mobilenetv4_conv_small.*{word}'):
            pst_timm.create_pst('mobilenetv4_conv_small', **kwargs)


class TestWidth:

    @pytest.mark.parametrize('name', BACKBONES)
    def test_registered_widths_follow_the_rule(self, name):
        kwargs = dict(device='meta')
        model = timm.create_model('backbone_pst', trunk=name.removesuffix('_pst'), **kwargs)
        registered = timm.create_model(name, **kwargs)
        assert model.own_args == registered.own_args
        assert [(k, v.shape) for k, v in model.state_dict().items()] == [
            (k, v.shape) for k, v in registered.state_dict().items()]

    def test_the_rule_is_the_largest_that_costs_a_tenth(self):
        infos, sizes = [dict(num_chs=112, reduction=16), dict(num_chs=320, reduction=32)], [(14, 14), (7, 7)]

        def cost(width):
            return count_gmacs(model(width), (3, 224, 224)) - trunk

        def model(width):
            return timm.create_model('efficientnet_b0_pst', pst_width=width, num_classes=0, device='meta')

        plain = timm.create_model('efficientnet_b0', num_classes=0, device='meta')
        gmacs = count_gmacs(plain, (3, 224, 224))
        plain.conv_head = plain.bn2 = nn.Identity()
        trunk = count_gmacs(plain, (3, 224, 224))
        width = fitting_width(gmacs, infos, sizes, 1280)
        assert width == 128 and cost(width) <= 0.1 * gmacs < cost(width + 64)
        assert fitting_width(1e-6, infos, sizes, 1280) == 64 and fitting_width(1e6, infos, sizes, 1280) == 512
        assert fitting_width(1e-6, infos, sizes, 1280, head_dim=16) == 32

    def test_a_width_that_is_given_is_taken(self):
        assert create(pst_width=192).num_features == 192


class TestNames:

    def test_an_architecture_of_the_package_comes_first(self):
        model = pst_timm.create_pst('resnet18', num_classes=5, device='meta')
        assert model.pretrained_cfg['architecture'] == 'resnet18_pst' and model.num_classes == 5
        assert pst_timm.create_pst('resnet18', 128, device='meta').num_features == 128
        assert pst_timm.create_pst('regnety_008.pycls_in1k', device='meta').pretrained_cfg['architecture'] == (
            'regnety_008_pst')

    def test_timms_own_call(self):
        model = timm.create_model('backbone_pst', trunk='test_convnext', pst_width=64)
        assert model.plain_name == 'test_convnext' and model._model_args['trunk'] == 'test_convnext'
        assert timm.create_model('backbone_pst', device='meta').plain_name == 'mobilenetv4_conv_small'

    @pytest.mark.parametrize('name', BACKBONES)
    def test_preprocessing_is_that_of_the_trunks_weights(self, name):
        cfg, plain = default_cfgs[name].default, timm.get_pretrained_cfg(name.removesuffix('_pst'))
        assert (cfg.mean, cfg.std) == (plain.mean, plain.std) and cfg.first_conv == f'trunk.{plain.first_conv}'

    def test_preprocessing_of_any_trunk(self):
        cfg = create('test_efficientnet').pretrained_cfg
        plain = timm.get_pretrained_cfg('test_efficientnet')
        assert (cfg['mean'], cfg['input_size'], cfg['first_conv']) == (
            plain.mean, plain.input_size, ('trunk.conv_stem',))
        assert (cfg['num_classes'], cfg['classifier'], cfg['tag']) == (1000, 'fc', 'untrained')

    @pytest.mark.parametrize('feature_cls', ['hook', 'fx'])
    def test_feature_cls(self, feature_cls):
        model, x = create(), images((64, 64))
        features = create(random=False, features_only=True, feature_cls=feature_cls)
        state = model.state_dict()
        features.load_state_dict(
            {k: state[re.sub('^(model|body|graph_module)[.]', '', k)] for k in features.state_dict()})
        levels = model.forward_intermediates(x, intermediates_only=True)
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(list(features(x)), levels))

    def test_graph_extractor(self):
        model, x = create(topk=2), images((80, 96))
        assert relative_error(create_feature_extractor(model, ['fc'])(x)['fc'], model(x)) < 1e-5


class TestCopyTrunk:

    @tiny
    @pytest.mark.parametrize('in_chans', [1, 3])
    def test_every_weight_of_the_trunk(self, trunk, in_chans):
        source = randomize(timm.create_model(trunk, num_classes=11), seed=3)
        model = create(trunk, in_chans=in_chans)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        result = copy_trunk(model, source.state_dict())
        after = model.state_dict()
        assert result.loaded == [k for k in after if k.startswith('trunk.')]
        assert all(torch.equal(after[k], before[k]) for k in result.untouched) and result.ignored
        same = timm.create_model(trunk, in_chans=in_chans, num_classes=11)
        first = timm.get_pretrained_cfg(trunk).first_conv + '.weight'
        for k in result.loaded:
            expected = source.state_dict()[k.removeprefix('trunk.')]
            if k == f'trunk.{first}':
                expected = timm.models.adapt_input_conv(in_chans, expected)
            assert torch.equal(after[k], expected)
            assert same.state_dict()[k.removeprefix('trunk.')].shape == after[k].shape

    def test_a_pruned_one_and_one_of_its_own_kind(self):
        source = randomize(timm.create_model('test_efficientnet'), seed=3).state_dict()
        low = create(random=False, features_only=True, out_indices=(1,))
        result = copy_trunk(low, source)
        assert result.loaded == list(low.model.state_dict()) and len(result.loaded) < len(source) / 2
        model, other = create(), randomize(create(), seed=9)
        assert copy_trunk(model, other.state_dict()).loaded == [k for k in model.state_dict() if k.startswith('trunk.')]
        assert torch.equal(model.trunk.conv_stem.weight, other.trunk.conv_stem.weight)
        assert not torch.equal(model.fc.weight, other.fc.weight)

    @pytest.mark.parametrize('other, words', [
        ('test_byobnet', 'is not a test_efficientnet of this trunk: the model has conv_stem.weight'),
        ('test_vit', 'conv_stem.weight'),
        ('wider', r'blocks.*is \(.*\) in the source'),
        ('deeper', 'it has blocks.9.0.conv.weight, which the model has not'),
    ])
    def test_another_trunk_changes_nothing(self, other, words):
        state = timm.create_model('test_efficientnet' if other in ('wider', 'deeper') else other).state_dict()
        if other == 'wider':
            key = [k for k in state if k.startswith('blocks') and state[k].ndim == 4][-1]
            state[key] = torch.cat([state[key]] * 2)
        if other == 'deeper':
            state['blocks.9.0.conv.weight'] = torch.zeros(1)
        model = create()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=words):
            copy_trunk(model, state)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
