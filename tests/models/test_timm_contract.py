"""What timm's own tests demand of every model of its zoo, demanded of every model of ours."""
import copy

import pytest
import timm
import torch
from timm.models import create_feature_extractor, group_parameters

from tests.helpers import relative_error
from tests.models.helpers import SOME, build, features_of, images, unused

SIZE = (64, 96)
SCRIPTED = [pytest.mark.filterwarnings('ignore:.*torch.jit.*'), pytest.mark.skipif(
    not hasattr(torch.jit, 'script'), reason='torch no longer offers TorchScript')]
FORMS = [
    pytest.param(copy.deepcopy, id='eager'),
    pytest.param(lambda model: Graph(model), id='fx'),
    pytest.param(lambda model: torch.jit.script(copy.deepcopy(model)), id='torchscript', marks=SCRIPTED),
    pytest.param(lambda model: torch.jit.script(Graph(model)), id='fx-torchscript', marks=SCRIPTED),
]
forms = pytest.mark.parametrize('form', FORMS)


class Graph(torch.nn.Module):
    """A copy of a model as a graph traced by FX, which gives the logits."""

    def __init__(self, model):
        super().__init__()
        self.graph = create_feature_extractor(copy.deepcopy(model), ['fc'])

    def forward(self, x):
        return self.graph(x)['fc']


@pytest.fixture(scope='module', params=SOME)
def model(request):
    """One of our models, which tests share: they leave it as it is."""
    return build(request.param, num_classes=7)


class TestEveryModel:

    @forms
    def test_forward(self, model, form):
        x = images(SIZE)
        with torch.no_grad():
            y = form(model).eval()(x)
            assert y.shape == (2, 7) and torch.isfinite(y).all()
            assert relative_error(y, model(x)) < 1e-5

    @forms
    def test_backward_reaches_every_parameter(self, model, form):
        x = images(SIZE)
        trained = form(model).train()
        y = trained(x)
        assert y.shape == (2, 7) and torch.isfinite(y).all()
        y.square().mean().backward()
        assert all(p.requires_grad for p in trained.parameters()) and unused(trained) == set()
        count = sum(p.grad.numel() for p in trained.parameters())
        assert count == sum(p.numel() for p in model.parameters())

    def test_gradient_checkpointing_changes_nothing(self, model):
        grads = []
        for enable in (False, True):
            trained = copy.deepcopy(model).train()
            trained.set_grad_checkpointing(enable)
            trained(images(SIZE)).square().mean().backward()
            grads.append({n: p.grad for n, p in trained.named_parameters()})
        assert all(torch.allclose(g, grads[0][n], rtol=1e-3, atol=1e-5) for n, g in grads[1].items())

    def test_features_by_index_and_by_module(self, model):
        x = images(SIZE)
        with torch.no_grad():
            final, levels = model.forward_intermediates(x)
            assert torch.equal(final, model.forward_features(x)) and torch.equal(model.forward_head(final), model(x))
            for feature_cls in ('getter', 'hook'):
                features = features_of(model, feature_cls=feature_cls)
                outs, info = features(x), features.feature_info
                assert info.reduction() == [2, 4, 8, 16, 32][-model.levels:] and len(outs) == model.levels
                for out, level, channels, stride in zip(outs, levels, info.channels(), info.reduction()):
                    assert out.shape == (2, channels, SIZE[0] // stride, SIZE[1] // stride)
                    assert relative_error(out, level) < 1e-5

    def test_pruned_models_give_their_level_and_use_what_they_keep(self, model):
        x = images(SIZE)
        with torch.no_grad():
            levels = model.forward_intermediates(x, intermediates_only=True)
        for index in range(model.levels):
            pruned = copy.deepcopy(model)
            kept = pruned.prune_intermediate_layers([index], prune_norm=True)
            with torch.no_grad():
                [level] = pruned.forward_intermediates(x, indices=kept, intermediates_only=True)
            assert relative_error(level, levels[index]) < 1e-6
            pruned.train()(x).square().mean().backward()
            assert unused(pruned) == set()


@pytest.mark.parametrize('name', timm.list_models('*_pst*', include_tags=True, exclude_filters='backbone_pst*'))
class TestConfiguration:
    """On the meta device, where shapes cost nothing."""

    def build(self, name, **kwargs):
        return timm.create_model(name, device='meta', dtype=torch.float32, **kwargs).eval()

    def test_describes_the_model(self, name):
        model = self.build(name)
        cfg, names = model.pretrained_cfg, [n for n, _ in model.named_parameters()]
        assert model.num_classes >= 1 and model.in_chans == cfg['input_size'][0]
        assert cfg['classifier'] == 'fc' == model.get_classifier(name_only=True)
        assert {cfg['classifier'] + '.weight', cfg['first_conv'] + '.weight'} <= set(names)
        assert model.no_weight_decay() <= set(names)
        assert len(set(group_parameters(model, model.group_matcher(), reverse=True).values())) > 1
        tensors = [*model.parameters(), *model.buffers()]
        assert all(t.is_meta for t in tensors)

    def test_shapes_with_and_without_pool_and_classifier(self, name):
        model = self.build(name)
        x = torch.empty(1, *model.pretrained_cfg['input_size'], device='meta')
        pool_size, width = tuple(model.pretrained_cfg['pool_size']), model.head_hidden_size
        features = model.forward_features(x)
        assert features.shape == (1, model.num_features, *pool_size)
        assert model.forward_head(features, pre_logits=True).shape == (1, width)
        assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
        model.float().reset_classifier(0)
        assert model.num_classes == 0 and model(x).shape == (1, width)
        assert self.build(name, num_classes=0)(x).shape == (1, width)
        model.reset_classifier(0, '')
        assert model(x).shape == (1, width, *pool_size)
        assert self.build(name, num_classes=0, global_pool='')(x).shape == (1, width, *pool_size)
        # without a word about the pooling a classifier gets one that it can read
        model.double().reset_classifier(2)
        assert model(x.double()).shape == (1, 2) and not any(m.training for m in model.modules())
        assert model.fc.weight.is_meta and model.fc.weight.dtype == torch.float64

    def test_a_frozen_model_stays_frozen(self, name):
        model = self.build(name).requires_grad_(False)
        model.reset_classifier(0)
        model.reset_classifier(0, '')
        assert not any(p.requires_grad for p in model.parameters())

    @pytest.mark.parametrize('depth', [0, 1])
    def test_an_unknown_argument_is_named(self, name, depth):
        with pytest.raises(TypeError, match='not_an_argument'):
            self.build(name, pst_depth=depth, not_an_argument=1)
