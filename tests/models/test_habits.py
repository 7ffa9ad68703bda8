"""A timm user's habits: heads, classifiers, dropouts, parameter groups, initialisation, copies and checkpoints."""
import copy
import io
import pickle

import numpy as np
import pytest
import timm
import torch
from timm.models import group_parameters, load_checkpoint, safe_model_name
from timm.optim import create_optimizer_v2

import pst_timm
from tests.helpers import relative_error
from tests.layers import oracle
from tests.models.helpers import RESNETS, SOME, TINY, build, images, unused

POOLS = {'avg': 1, 'max': 1, 'avgmax': 1, 'catavgmax': 2}


class TestHead:

    def test_forward_is_features_then_head(self):
        model, x = build(num_classes=7), images()
        features = model.forward_features(x)
        assert features.shape == (2, model.num_features, 4, 3)
        assert torch.equal(model.forward_head(features), model(x))

    def test_pre_logits_are_what_the_classifier_reads(self):
        model = build(num_classes=7)
        features = model.forward_features(images())
        pre_logits = model.forward_head(features, pre_logits=True)
        assert pre_logits.shape == (2, model.head_hidden_size)
        assert torch.equal(model.get_classifier()(pre_logits), model.forward_head(features))

    def test_head_by_hand(self):
        model = build(num_classes=7)
        features = model.forward_features(images())
        conv, bn = model.conv_head.conv, model.conv_head.bn
        y = torch.einsum('oc,bchw->bohw', conv.weight[:, :, 0, 0], features)
        y = torch.batch_norm(y, bn.weight, bn.bias, bn.running_mean, bn.running_var, False, 0., bn.eps, False)
        y = (y * y.sigmoid()).mean(dim=(2, 3))
        assert relative_error(model.forward_head(features), y @ model.fc.weight.T + model.fc.bias) < 1e-5

    def test_no_classes_at_construction(self):
        model = build(num_classes=0)
        y = model(images())
        assert y.shape == (2, model.head_hidden_size)
        assert isinstance(model.get_classifier(), torch.nn.Identity) and model.num_classes == 0
        assert torch.equal(y, model.forward_head(model.forward_features(images()), pre_logits=True))

    def test_no_classes_and_no_pool_at_construction(self):
        model = build(num_classes=0, global_pool='')
        assert model(images()).shape == (2, model.head_hidden_size, 4, 3)

    def test_classes_without_a_pool_are_an_error(self):
        for act in (lambda: build(global_pool=''), lambda: build().reset_classifier(5, '')):
            with pytest.raises(ValueError, match='global_pool'):
                act()

    @pytest.mark.parametrize('pool, mult', POOLS.items())
    def test_pools_at_construction(self, pool, mult):
        model = build(num_classes=7, global_pool=pool)
        assert model.head_hidden_size == mult * build().head_hidden_size == model.fc.in_features
        assert model(images()).shape == (2, 7)

    @pytest.mark.parametrize('pool, mult', [('max', 1), ('catavgmax', 2), (None, 1)])
    @pytest.mark.parametrize('num_classes', [0, 5])
    def test_reset_classifier(self, num_classes, pool, mult):
        with torch.device('meta'):
            model = build(random=False)
            hidden = model.head_hidden_size
            x = torch.empty(2, 3, 64, 64)
            model.reset_classifier(num_classes, pool)
            assert model(x).shape == (2, num_classes or mult * hidden)
            assert (model.num_classes, model.head_hidden_size) == (num_classes, mult * hidden)
            assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, mult * hidden)
            model.reset_classifier(3, 'avg')
            assert model(x).shape == (2, 3) and model.head_hidden_size == hidden

    def test_reset_classifier_keeps_the_pool_unless_told(self):
        model = build(global_pool='catavgmax')
        model.reset_classifier(4)
        assert model.fc.in_features == 2 * build().head_hidden_size and model(images()).shape == (2, 4)

    def test_reset_classifier_to_nothing(self):
        model = build()
        model.reset_classifier(0, '')
        assert model(images()).shape == (2, model.head_hidden_size, 4, 3)
        model.reset_classifier(6, 'max')
        assert model(images()).shape == (2, 6)
        # nothing is said about the pooling, and a map has no class
        model.reset_classifier(0, '')
        model.reset_classifier(4)
        assert model(images()).shape == (2, 4) and model.global_pool.pool_type == 'avg'

    @pytest.mark.parametrize('training', [True, False])
    def test_reset_classifier_keeps_mode_dtype_and_everything_else(self, training):
        model = build().double().train(training)
        before = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith('fc.')}
        model.reset_classifier(4)
        assert all(m.training == training for m in model.modules()) and model.fc.weight.dtype == torch.float64
        after = model.state_dict()
        assert all(torch.equal(after[k], v) for k, v in before.items())

    def test_get_classifier(self):
        model = build()
        assert model.get_classifier() is model.fc and model.get_classifier(name_only=True) == 'fc'


@pytest.mark.parametrize('in_chans', [1, 4])
@pytest.mark.parametrize('name', SOME)
def test_in_chans(name, in_chans):
    with torch.device('meta'):
        assert build(name, random=False, in_chans=in_chans)(torch.empty(1, in_chans, 64, 64)).shape == (1, 1000)


def varies(model, x, layer=None):
    """Whether repeated calls differ, at the output of the model or of one layer."""
    outs = []
    handle = layer.register_forward_hook(lambda m, args, out: outs.append(out)) if layer is not None else None
    for _ in range(6):
        y = model(x)
        if layer is None:
            outs.append(y)
    if handle is not None:
        handle.remove()
    return any(not torch.equal(out, outs[0]) for out in outs)


class TestDropout:

    def test_drop_rate_acts_in_training_only(self):
        model, x = build(drop_rate=0.5), images()
        features = model.forward_features(x)
        assert torch.equal(model(x), model(x))
        model.global_pool.train()
        model.train()
        assert not torch.equal(model.forward_head(features), model.forward_head(features))
        assert not torch.equal(build(drop_rate=0.).train().forward_head(features), model.forward_head(features))

    def test_dropout_keeps_the_expectation(self):
        model = build(drop_rate=0.5).train()
        model.conv_head.eval()
        features = model.forward_features(images())
        mean = torch.stack([model.forward_head(features, pre_logits=True) for _ in range(400)]).mean(0)
        assert relative_error(mean, model.eval().forward_head(features, pre_logits=True)) < 0.1

    def test_drop_path_acts_in_training_only(self):
        model, x = build(drop_path_rate=0.5), images(batch=4)
        plain = build(drop_path_rate=0.)
        plain.load_state_dict(model.state_dict())
        assert torch.equal(model(x), plain(x))
        assert varies(model.train(), x)
        assert not varies(plain.train(), x)

    def test_drop_path_reaches_trunk_and_pst(self):
        model = build(drop_path_rate=0.3)
        rates = {n: m.drop_prob for n, m in model.named_modules() if isinstance(m, timm.layers.DropPath)}
        assert {n: r for n, r in rates.items() if n.startswith('pst.')} == {
            'pst.blocks.0.drop_path1': 0.3, 'pst.blocks.0.drop_path2': 0.3}
        trunk = [r for n, r in rates.items() if not n.startswith('pst.')]
        assert trunk == sorted(trunk) and trunk[-1] == pytest.approx(0.3)


ORDER = ['stem', 'layer1', 'layer2', 'layer3', 'layer4', 'pst', 'fuse', 'head']
PARTS = {'conv1': 'stem', 'bn1': 'stem', 'fuse_down': 'fuse', 'fuse_merge': 'fuse', 'conv_head': 'head', 'fc': 'head'}


def place(name):
    """Index into ORDER of the part of the model that a parameter belongs to; of any other trunk, the last one."""
    first = name.split('.')[0]
    return ORDER.index('layer4' if first == 'trunk' else PARTS.get(first, first))


class TestParameterGroups:

    @pytest.mark.parametrize('coarse', [False, True])
    @pytest.mark.parametrize('name', SOME)
    def test_order(self, name, coarse):
        with torch.device('meta'):
            model = timm.create_model(name, pst_depth=2)
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        names = [n for i in sorted(groups) for n in groups[i]]
        assert sorted(names) == sorted(n for n, _ in model.named_parameters())
        places = [sorted({place(n) for n in groups[i]}) for i in sorted(groups)]
        assert all(len(p) == 1 for p in places), 'a group holds parameters of one part only'
        assert places == sorted(places)
        assert {p[0] for p in places} == {place(n) for n in names}
        if coarse and name in RESNETS:
            assert len(groups) == len(ORDER)

    @pytest.mark.parametrize('name', RESNETS)
    def test_fine_groups_follow_the_blocks(self, name):
        with torch.device('meta'):
            model = timm.create_model(name, pst_depth=2)
        layer = group_parameters(model, model.group_matcher(), reverse=True)
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            prefix = next(n for n, m in model.named_modules() if m is stage)
            ids = [{i for n, i in layer.items() if n.startswith(f'{prefix}.{block}.')} for block in range(len(stage))]
            assert all(len(i) == 1 for i in ids) and [min(i) for i in ids] == sorted({min(i) for i in ids})
        assert layer['pst.conv_in.conv.weight'] < layer['pst.blocks.0.attn.q.conv.weight']
        assert layer['pst.blocks.0.mlp.1.conv.weight'] < layer['pst.blocks.1.attn.q.conv.weight']
        assert layer['pst.blocks.1.attn.q.conv.weight'] <= layer['pst.conv_out.conv.weight']

    def test_layer_decay(self):
        model = build(train_topk=2)
        optimizer = create_optimizer_v2(model, 'adamw', lr=1.0, weight_decay=0.1, layer_decay=0.5)
        scale = {}
        names = {id(p): n for n, p in model.named_parameters()}
        for group in optimizer.param_groups:
            scale.update({names[id(p)]: group['lr_scale'] for p in group['params']})
        assert scale.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
        by_place = {}
        for name, value in scale.items():
            by_place.setdefault(place(name), set()).add(value)
        for low, high in zip(range(len(ORDER) - 1), range(1, len(ORDER))):
            assert max(by_place[low]) < min(by_place[high])
        assert by_place[len(ORDER) - 1] == {1.0}

    @pytest.mark.parametrize('depth', [0, 2])
    def test_weight_decay_spares_norms_biases_and_gates(self, depth):
        model = build(pst_depth=depth)
        gates = {f'pst.blocks.{i}.attn.gate.{p}' for i in range(depth) for p in ('weight', 'bias')}
        assert model.no_weight_decay() == gates
        optimizer = create_optimizer_v2(model, 'sgd', lr=1.0, weight_decay=0.1)
        decay = {id(p) for g in optimizer.param_groups if g['weight_decay'] > 0 for p in g['params']}
        assert {n for n, p in model.named_parameters() if id(p) in decay} == {
            n for n, p in model.named_parameters() if p.ndim > 1 and n not in gates}


class TestInitialisation:

    def test_pst_convolutions_start_as_the_trunks(self):
        model = timm.create_model('resnet18_pst')
        for name, m in model.named_modules():
            if isinstance(m, torch.nn.Conv2d):
                fan_out = m.out_channels * m.kernel_size[0] * m.kernel_size[1]
                if m.weight.numel() > 2000:
                    assert m.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), name

    @pytest.mark.parametrize('kwargs', [
        dict(), dict(zero_init_last=False), dict(pst_zero_init=False), dict(zero_init_last=False, pst_zero_init=False),
    ], ids=str)
    def test_residual_branches_start_at_zero(self, kwargs):
        model = timm.create_model(TINY, **kwargs)
        zero = {n.split('.')[0].rstrip('1234') for n, m in model.named_modules()
                if isinstance(m, torch.nn.BatchNorm2d) and torch.count_nonzero(m.weight) == 0}
        wanted = {'layer': 'zero_init_last', 'pst': 'pst_zero_init'}
        assert zero == {part for part, key in wanted.items() if kwargs.get(key, True)}

    def test_init_weights_can_be_called_again(self):
        model = build()
        model.init_weights()
        assert torch.isfinite(model(images())).all()

    def test_same_seed_same_weights(self):
        states = []
        for _ in range(2):
            torch.manual_seed(5)
            states.append(timm.create_model(TINY).state_dict())
        assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


class TestArguments:

    @pytest.mark.parametrize('depth', [0, 1, 3])
    def test_pst_depth(self, depth):
        model = build(pst_depth=depth).train()
        assert len(model.pst.blocks) == depth
        model(images()).square().sum().backward()
        assert unused(model) == set()
        model.set_topk(2)
        model.set_fine_step(3)
        assert torch.isfinite(model.eval()(images())).all()

    def test_options_that_nothing_reads_may_be_anything(self):
        # published models without attention say that they have no fusion
        assert torch.isfinite(build(pst_depth=0, topk=0, fine_fusion=None)(images())).all()

    def test_depth_0_keeps_the_fusion_and_has_no_attention(self):
        names = set(build(pst_depth=0).state_dict())
        full = set(build().state_dict())
        assert names < full
        assert all(n.startswith(('pst.blocks.', 'pst.conv_upper.')) for n in full - names)

    def test_widths(self):
        model = build(
            pst_width=96, pst_head_dim=8, pst_mlp_ratio=3, pst_pos_enc=False, head_hidden_size=40, num_classes=7)
        attn, mlp = model.pst.blocks[0].attn, model.pst.blocks[0].mlp
        assert (model.num_features, attn.dim, attn.num_heads, attn.head_dim) == (96, 48, 6, 8)
        assert not attn.pos_enc
        assert mlp[0].conv.out_channels == 144 and model.conv_head.conv.out_channels == 40
        assert model(images()).shape == (2, 7)

    @pytest.mark.parametrize('folded', [False, True])
    @pytest.mark.parametrize('topk', [0, 3])
    def test_head_skip_lets_the_classifier_read_c5(self, topk, folded):
        model = build(head_skip=True, topk=topk, num_classes=7)
        c5 = model.feature_info[4]['num_chs'], model.layer4[-1].bn2.num_features
        assert model.num_features == sum(c5) and model.head_hidden_size == 128 + c5[1] == model.fc.in_features
        x = images()
        with torch.no_grad():
            c3 = model.layer2(model.layer1(model.maxpool(model.act1(model.bn1(model.conv1(x))))))
            c4 = model.layer3(c3)
            c5 = model.layer4(c4)
            w = oracle.arrays(model.state_dict())
            classifier = w.pop('fc.weight')
            # the oracle's head reads the first columns, the skipped C5 the others
            _, fused, logits = oracle.fusion_head(
                {**w, 'fc.weight': classifier[:, :128]}, c4.double().numpy(), c5.double().numpy(),
                model.pst.blocks[0].attn.head_dim, topk)
            expected = logits + c5.double().numpy().mean(axis=(2, 3)) @ classifier[:, 128:].T
            model = pst_timm.reparameterize(model) if folded else model
            y, features = model(x), model.forward_features(x)
            final, levels = model.forward_intermediates(x)
        assert np.abs(y.numpy() - expected).max() < 1e-4 * np.abs(expected).max()
        if not folded:
            assert torch.equal(features[:, fused.shape[1]:], c5)
        assert features.shape == final.shape == (2, model.num_features, *c5.shape[2:])
        assert torch.equal(final, features) and levels[-1].shape[1] == fused.shape[1]

    def test_head_skip_changes_the_classifier_alone(self):
        plain, skip = build().state_dict(), build(head_skip=True).state_dict()
        assert [k for k in plain if plain[k].shape != skip[k].shape] == ['fc.weight'] and list(plain) == list(skip)

    def test_head_skip_has_every_habit(self):
        model = build(head_skip=True)
        assert torch.equal(torch.jit.script(model)(images()), model(images()))
        for kwargs in (dict(num_classes=0), dict(num_classes=0, global_pool=''), dict(num_classes=5)):
            model.reset_classifier(**kwargs)
            assert model(images()).shape[1] == (kwargs['num_classes'] or model.head_hidden_size)
            assert torch.equal(model.forward_head(model.forward_features(images())), model(images()))
        assert model.prune_intermediate_layers(1, prune_head=False) == [4] and model.num_features == 64 + 96
        assert model(images()).shape == (2, 5)
        model.prune_intermediate_layers(1)
        assert model.num_features == 64 == model(images()).shape[1] and not model.head_skip
        with torch.no_grad():
            maps = build(features_only=True, head_skip=True)(images())
        assert [m.shape[1] for m in maps] == [m.shape[1] for m in build(features_only=True)(images())]

    def test_act_and_norm_layers(self):
        model = build(pst_act_layer='relu', norm_layer='groupnorm1')
        assert not any(isinstance(m, (torch.nn.SiLU, torch.nn.BatchNorm2d)) for m in model.modules())
        assert torch.isfinite(model(images())).all()

    def test_topk_through_create_model(self):
        model = build(topk=3, fine_fusion='joint')
        other = build()
        other.load_state_dict(model.state_dict())
        other.set_topk(3, fusion='joint')
        x = images()
        assert torch.equal(model(x), other(x))
        model.set_topk(0)
        assert not torch.equal(model(x), other(x))

    def test_training_arguments_through_create_model(self):
        attn = build(train_topk=4, train_fine_prob=0.25).pst.blocks[0].attn
        assert (attn.train_topk, attn.train_fine_prob) == (4, 0.25)

    @pytest.mark.parametrize('kwargs, words', [
        (dict(topk=-1), ['topk', '-1']),
        (dict(topk=1.5), ['topk', '1.5']),
        (dict(fine_fusion='mix'), ["'mix'"]),
        (dict(train_topk=-2), ['train_topk', '-2']),
        (dict(train_fine_prob=2), ['train_fine_prob', '2']),
        (dict(pst_head_dim=24), ['32', 'head_dim=24']),
        (dict(pst_width=10), ['5', 'head_dim=16']),
        (dict(pst_depth=-1), ['depth', '-1']),
        (dict(pst_mlp_ratio=0), ['mlp_ratio=0']),
        (dict(output_stride=4), ['output_stride', '4']),
        (dict(layers=(1, 1, 1)), ['layers', 'four', '(1, 1, 1)']),
    ])
    def test_bad_arguments_are_named(self, kwargs, words):
        with pytest.raises(ValueError) as error:
            timm.create_model(TINY, **kwargs)
        assert all(word in str(error.value) for word in words)

    @pytest.mark.parametrize('args, word', [((-1,), '-1'), ((True,), 'True'), ((2, 'mix'), "'mix'")])
    def test_set_topk_errors(self, args, word):
        with pytest.raises(ValueError, match=word):
            build().set_topk(*args)


class TestCopies:

    @pytest.mark.parametrize('round_trip', [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
    ], ids=['deepcopy', 'pickle'])
    def test_round_trip(self, round_trip):
        model = build(topk=3, fine_fusion='joint', train_topk=2)
        again = round_trip(model)
        assert torch.equal(again(images()), model(images()))
        assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]

    def test_state_dict_round_trip(self):
        model, other = build(), timm.create_model(TINY).eval()
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        assert torch.equal(other(images()), model(images()))

    @pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
    def test_load_checkpoint(self, suffix, tmp_path):
        model, other = build(), timm.create_model(TINY).eval()
        path = str(tmp_path / f'{safe_model_name(TINY)}.{suffix}')
        if suffix == 'pth':
            torch.save({'state_dict': model.state_dict()}, path)
        else:
            from safetensors.torch import save_file
            save_file(model.state_dict(), path)
        load_checkpoint(other, path)
        assert torch.equal(other(images()), model(images()))
        third = timm.create_model(TINY, checkpoint_path=path).eval()
        assert torch.equal(third(images()), model(images()))

    def test_new_classes_over_a_local_checkpoint(self, tmp_path):
        path = tmp_path / 'model.pth'
        model = build()
        torch.save(model.state_dict(), path)
        tuned = timm.create_model(
            TINY, pretrained=True, num_classes=5, in_chans=1, pretrained_cfg_overlay=dict(file=str(path))).eval()
        assert tuned(images(chans=1)).shape == (2, 5)
        assert torch.equal(tuned.pst.conv_in.conv.weight, model.pst.conv_in.conv.weight)

    def test_device_and_dtype(self):
        model = timm.create_model(TINY, device='meta', dtype=torch.bfloat16)
        tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
        assert all(t.is_meta and t.dtype == torch.bfloat16 for t in tensors)
