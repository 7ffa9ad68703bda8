"""torchvision's detectors over our pyramids: what is torchvision's stays torchvision's, on any trunk."""
import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torchvision.models.detection import FCOS, RetinaNet, fcos_resnet50_fpn

from pst_timm.checkpoints import create_model
from pst_timm.detection import create_detector, models
from pst_timm.detection.models import KINDS, NECKS, FloatAnchors
from pst_timm.engine.protocols import Adjustable
from pst_timm.utils.errors import PSTError

from .tiny import SMALL, batch, small


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('neck', NECKS)
def test_every_kind_trains_and_answers(kind, neck):
    model = small(kind, neck)
    assert isinstance(model, FCOS if kind == 'fcos' else RetinaNet)
    images, targets = batch()
    losses = model.train()(images, targets)
    sum(losses.values()).backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None]
    assert not unused, 'DDP wants every parameter used'
    assert all(loss.dtype == torch.float32 and 0 <= loss < 10 for loss in losses.values())
    with torch.inference_mode():
        outputs = model.eval()(images)
    assert [set(o) for o in outputs] == [{'boxes', 'labels', 'scores'}] * 2
    for image, output in zip(images, outputs):
        height, width = image.shape[1:]
        assert (output['boxes'] >= 0).all() and (output['boxes'] <= torch.tensor([width, height] * 2)).all()


def test_images_without_any_box_train():
    images, targets = batch()
    for kind in KINDS:
        losses = small(kind).train()(images, targets[-1:] * 2)
        assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize('kind', KINDS)
def test_bfloat16_autocast_gives_the_losses_and_boxes_of_full_precision(kind):
    model = small(kind, score_thresh=0.)
    images, targets = batch(256)
    model.train()
    full = model(images, targets)
    with torch.autocast('cpu', torch.bfloat16):
        half = model(images, targets)
    for name, loss in full.items():
        assert half[name].dtype == torch.float32
        assert half[name].item() == pytest.approx(loss.item(), rel=0.02), name


def test_anchors_are_in_full_precision_under_autocast():
    """bfloat16 has 8 bits: the middles of strides of 8 beyond 256 pixels would come twice."""
    model = small(img_size=1024)
    maps = [torch.zeros(1, 32, 128, 128, dtype=torch.bfloat16)]
    anchors = FloatAnchors(((8,),), ((1.,),))
    images = model.transform([torch.zeros(3, 1024, 1024)])[0]
    found = anchors(images, maps)[0]
    assert found.dtype == torch.float32 and len(found.unique(dim=0)) == 128 * 128


def test_anchors_follow_the_levels():
    model = small(levels=(8, 16), extra_levels=2)
    assert model.strides == (8, 16, 32, 64)
    assert model.anchor_generator.sizes == ((8,), (16,), (32,), (64,))
    retina = small('retinanet', 'fpn', levels=(8, 16, 32), extra_levels=1)
    assert [sizes[0] for sizes in retina.anchor_generator.sizes] == [32, 64, 128, 256]
    images, targets = batch()
    for m in (model, retina):
        maps = m.backbone(torch.zeros(1, 3, 64, 64))
        assert [64 // v.shape[-1] for v in maps.values()] == list(m.strides)
        m.train()(images, targets)


def test_heads_losses_and_boxes_are_those_of_torchvision():
    """The same weights in torchvision's own FCOS give the same losses and boxes."""
    ours = small(neck='fpn', neck_width=256, trunk='resnet18', head_convs=4, img_size=96, score_thresh=0.01)
    theirs = fcos_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=2, min_size=96, max_size=96, score_thresh=0.01)
    theirs.backbone = ours.backbone
    assert theirs.head.load_state_dict(ours.head.state_dict())
    images, targets = [torch.rand(3, 96, 64) for _ in range(2)], batch()[1]
    losses, expected = ours.train()(images, targets), theirs.train()(images, targets)
    assert losses.keys() == expected.keys()
    for name in losses:
        torch.testing.assert_close(losses[name], expected[name])
    with torch.inference_mode():
        for a, b in zip(ours.eval()(images), theirs.eval()(images)):
            for key in a:
                torch.testing.assert_close(a[key], b[key])


def test_training_keeps_the_size_of_an_image_and_evaluation_fits_it():
    model = small()
    image = torch.rand(3, 96, 48)
    assert model.train().transform([image])[0].image_sizes == [(96, 48)]
    assert model.eval().transform([image])[0].image_sizes == [(64, 32)]


@pytest.mark.parametrize('trunk, levels', [
    ('resnet18', (4, 8, 16, 32)),
    ('resnet18_pst', (8, 16, 32)),
    ('mobilenetv4_conv_small', (8, 16, 32)),
    ('mobilenetv4_conv_small_pst', (8, 16, 32)),
    ('convnext_atto', (8, 16)),  # names of modules are others in the extractor
])
def test_trunks_of_several_families(trunk, levels):
    model = small(trunk=trunk, levels=levels)
    with torch.inference_mode():
        maps = model.eval().backbone(torch.rand(1, 3, 64, 96))
    assert [m.shape[-2:] for m in maps.values()] == [(-(-64 // s), -(-96 // s)) for s in model.strides]
    assert all(m.shape[1] == 64 for m in maps.values())
    # every parameter of the trunk is in a group, and in the order of the network
    names = [n for n, _ in model.named_parameters()]
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) >= set(names)
    layers = [groups[n] for n in names if n.startswith('backbone.trunk.')]
    head = [groups[n] for n in names if n.startswith('head.')]
    assert len(set(layers)) > 2 and max(layers) < min(head)


@pytest.mark.parametrize('trunk', ['resnet18_pst', 'test_resnet_pst', 'test_resnet_pst.digits'])
def test_a_trunk_with_pst_begins_with_weights_of_imagenet_unless_a_tag_is_named(trunk, monkeypatch):
    asked = []

    def create(name, pretrained=False, pretrained_trunk=False, **kwargs):
        asked.append((pretrained, pretrained_trunk))
        return create_model(name, **kwargs)

    monkeypatch.setattr(models, 'create_model', create)
    create_detector('fcos', trunk, 'fpn', num_classes=2, pretrained_trunk=True)
    assert asked[-1] == ((True, False) if '.' in trunk else (False, True))


def test_maps_in_channels_last_order_are_turned():
    """No trunk of timm gives its features so today; one of another package may."""
    model = small(trunk='resnet18')
    turned = small(trunk='resnet18')
    turned.load_state_dict(model.state_dict())
    inner = turned.backbone.trunk
    inner.register_forward_hook(lambda module, args, output: [m.permute(0, 2, 3, 1) for m in output])
    turned.backbone.channels_last = True
    x = torch.rand(1, 3, 64, 64)
    for a, b in zip(model.eval().backbone(x).values(), turned.eval().backbone(x).values()):
        torch.testing.assert_close(a, b)


def test_channels_last_is_kept_through_trunk_and_neck():
    model = small().to(memory_format=torch.channels_last).eval()
    maps = model.backbone(torch.rand(2, 3, 128, 128))
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in list(maps.values())[:2])


def test_normalisation_is_that_of_the_trunk():
    assert small(trunk='test_resnet').transform.image_mean == [0.5, 0.5, 0.5]
    assert small(trunk='resnet18').transform.image_mean == list(timm.data.IMAGENET_DEFAULT_MEAN)
    assert small(mean=[0.1, 0.2, 0.3], std=[1., 2., 3.]).transform.image_std == [1., 2., 3.]


class TestSettings:
    def test_fine_attention_can_be_set_for_a_while(self):
        model = small(score_thresh=0.)
        with torch.no_grad():
            for attn in model.attentions():
                attn.gate.bias.fill_(3.)
        assert isinstance(model, Adjustable) and model.inference_settings() == {'topk': 0, 'fine_fusion': 'gate'}
        image = [torch.rand(3, 64, 64)]
        with torch.inference_mode():
            coarse = model.eval()(image)[0]['scores']
            with model.with_settings(topk=2, fine_fusion='joint'):
                assert model.inference_settings() == {'topk': 2, 'fine_fusion': 'joint'}
                fine = model(image)[0]['scores']
            with model.with_settings(topk=0, fine_fusion='coarse'):
                again = model(image)[0]['scores']
        assert not torch.equal(coarse, fine) and torch.equal(coarse, again)
        assert model.inference_settings() == {'topk': 0, 'fine_fusion': 'gate'}

    def test_a_sweep_and_its_columns(self):
        model = small()
        settings = model.sweep_settings([0, 8])
        assert settings == [dict(topk=0, fine_fusion='coarse'), dict(topk=8, fine_fusion='gate'),
                            dict(topk=8, fine_fusion='joint')]
        # the finest attention of 64 px looks at the map of stride 16
        assert model.settings_columns(dict(topk=99, fine_fusion='gate'), (64, 64))['selected'] == 16

    def test_a_neck_without_attention_has_one_setting(self):
        model = small(neck='pan')
        assert model.inference_settings() == {} and len(model.sweep_settings([0, 8])) == 1
        with model.with_settings(topk=0, fine_fusion='coarse'):
            pass

    def test_a_trunk_with_pst_takes_part(self):
        model = small(neck='fpn', trunk='resnet18_pst', topk=4)
        assert [attn.topk for attn in model.attentions()] == [4]

    def test_training_options_reach_the_neck(self):
        model = small(train_topk=3, train_fine_prob=0.5, topk=2, fine_fusion='joint')
        assert {(a.train_topk, a.train_fine_prob, a.topk, a.fine_fusion) for a in model.attentions()} == {
            (3, 0.5, 2, 'joint')}
        model.train()
        model.set_train_step(7, 3)
        first = [a.draw_fine() for a in model.attentions()]
        model.set_train_step(7, 3)
        assert [a.draw_fine() for a in model.attentions()] == first


def test_gates_are_kept_from_weight_decay():
    model = small()
    gates = {n for n, _ in model.named_parameters() if '.gate.' in n}
    assert gates and gates <= model.no_weight_decay()
    optimizer = create_optimizer_v2(model, opt='adamw', weight_decay=0.1)
    decayed = {id(p) for g in optimizer.param_groups if g['weight_decay'] for p in g['params']}
    named = dict(model.named_parameters())
    assert not [n for n in gates if id(named[n]) in decayed]
    assert id(named['backbone.neck.' + next(n for n in named if n.startswith('backbone.neck.') and named[
        n].ndim == 4 and 'gate' not in n).removeprefix('backbone.neck.')]) in decayed


def test_grad_checkpointing_gives_the_same_gradients():
    gradients = []
    images, targets = batch()
    for enable in (False, True):
        torch.manual_seed(3)
        model = small().train()
        model.set_grad_checkpointing(enable)
        sum(model(images, targets).values()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('values, said', [
    (dict(kind='yolo'), "Unknown detector 'yolo'. .*fcos, retinanet"),
    (dict(neck='ppst'), "Unknown neck 'ppst'. Did you mean pst"),
    (dict(trunk='resnet81'), "Unknown model 'resnet81'. Did you mean"),
    (dict(trunk='vit_tiny_patch16_224'), 'vit_tiny_patch16_224 has no maps of stride 8, 32, it has those of stride 16'),
    (dict(trunk='swin_tiny_patch4_window7_224'), 'does not take images of any size, .*strict_img_size=False'),
    (dict(trunk='eva02_tiny_patch14_224'), 'eva02_tiny_patch14_224'),
    (dict(trunk='mixer_s32_224'), 'mixer_s32_224'),
    (dict(levels=(8, 32)), 'each twice the one before'),
    (dict(levels=(32,)), 'two to four strides'),
    (dict(levels=(64, 128), img_size=320), 'has no maps of stride 64, 128, it has those of stride 2, 4, 8, 16, 32'),
    (dict(extra_levels=3), 'extra_levels must be 0, 1 or 2, got 3'),
    (dict(neck_width=80), 'must be a multiple of 32 above it, got 80'),
    (dict(neck_width=32), 'must be a multiple of 32 above it, got 32'),
    (dict(kind='retinanet', head_convs=2), "RetinaNet has 4 convolutions"),
    (dict(num_classes=0), 'needs one class or more'),
    (dict(img_size=16), 'img_size=16 is less than the largest stride'),
    (dict(neck_kwargs=dict(depht=1)), 'Cannot make the neck pst .*depht'),
    (dict(neck_kwargs=dict(head_dim=48)), 'Cannot make the neck pst .*multiple of head_dim=48'),
    (dict(neck='fpn', neck_kwargs=dict(depth=1)), 'Cannot make the neck fpn .*depth'),
    (dict(trunk_kwargs=dict(features_only=False)), 'cannot be given features_only'),
    (dict(trunk_kwargs=dict(no_such=1)), 'no_such'),
    (dict(topk=-1), 'topk must be a non-negative integer'),
])
def test_what_does_not_fit_is_a_sentence(values, said):
    with pytest.raises(PSTError, match=said) as e:
        create_detector(**{**SMALL, 'num_classes': 2, **values})
    assert len(str(e.value)) < 600 and 'Traceback' not in str(e.value)


def test_swin_is_a_trunk_once_it_takes_any_size():
    model = small(
        trunk='swin_tiny_patch4_window7_224', trunk_kwargs=dict(strict_img_size=False, depths=[1, 1, 1, 1]))
    maps = model.eval().backbone(torch.rand(1, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps.values()][:3] == [(64, 8, 12), (64, 4, 6), (64, 2, 3)]
