"""Forms a model is deployed in: scripted, traced by FX, compiled, exported, reparameterised; each equal to eager."""
import copy
import functools
import io

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import set_layer_config
from timm.models import reparameterize_model
from torch.fx.proxy import TraceError
from torchvision.models.feature_extraction import create_feature_extractor as torchvision_extractor

import pst_timm
from pst_timm.layers import FINE_FUSIONS
from tests.helpers import relative_error
from tests.models.helpers import SOME, TINY, build, images

ATTENTION = [dict(), *(dict(topk=3, fine_fusion=fusion) for fusion in FINE_FUSIONS)]
attentions = pytest.mark.parametrize('kwargs', ATTENTION, ids=['coarse', *FINE_FUSIONS])
# odd and even levels, non-square, 1x1 over 1x1, one token wide
SIZES = [(105, 75), (64, 64), (33, 33), (96, 200)]

scripting = pytest.mark.skipif(not hasattr(torch.jit, 'script'), reason='torch no longer offers TorchScript')


def assert_equals_eager(form, model, sizes=SIZES, batches=(1, 3), tolerance=1e-5):
    with torch.no_grad():
        for size in sizes:
            for batch in batches:
                x = images(size, batch)
                assert relative_error(form(x), model(x)) < tolerance, (size, batch)


@scripting
@pytest.mark.filterwarnings('ignore:.*torch.jit.*')
class TestScript:

    @attentions
    @pytest.mark.parametrize('output_stride', [16, 32])
    def test_equals_eager(self, output_stride, kwargs):
        model = build(num_classes=5, output_stride=output_stride, **kwargs)
        assert_equals_eager(torch.jit.script(model), model)

    @pytest.mark.parametrize('kwargs', [
        dict(num_classes=0),
        dict(num_classes=0, global_pool=''),
        dict(global_pool='max'),
        dict(pst_depth=0),
        dict(pst_depth=2),
        dict(drop_rate=0.2, drop_path_rate=0.2),
        dict(train_topk=2, train_fine_prob=0.5),
        dict(norm_layer='groupnorm1', topk=2),
    ], ids=str)
    def test_options(self, kwargs):
        model = build(**kwargs)
        assert_equals_eager(torch.jit.script(model), model, sizes=[(64, 64)], batches=(2,))

    @attentions
    def test_plain_attention(self, kwargs):
        with set_layer_config(exportable=True):
            model = build(num_classes=5, **kwargs)
        assert_equals_eager(torch.jit.script(model), model, sizes=[(105, 75)])

    @attentions
    def test_save_and_load(self, kwargs):
        model = build(num_classes=5, **kwargs)
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(model), buffer)
        buffer.seek(0)
        assert_equals_eager(torch.jit.load(buffer), model)

    def test_settings_of_the_scripted_model_are_its_own(self):
        model, x = build(num_classes=5, pst_depth=2), images()
        scripted = torch.jit.script(model)
        with torch.no_grad():
            for settings in model.sweep_settings([3, 0, 10 ** 6]):
                with scripted.with_settings(**settings):
                    assert model.inference_settings() == {'topk': 0, 'fine_fusion': 'gate'}
                    y = scripted(x)
                with model.with_settings(**settings):
                    assert relative_error(y, model(x)) < 1e-5
            scripted.set_topk(3, 'joint')
            model.set_topk(3, 'joint')
            assert relative_error(scripted(x), model(x)) < 1e-5
            assert scripted.inference_settings() == {'topk': 3, 'fine_fusion': 'joint'}

    def test_a_saved_model_has_no_switch_that_would_do_nothing(self):
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(build()), buffer)
        buffer.seek(0)
        assert not hasattr(torch.jit.load(buffer), 'set_topk')


@pytest.mark.skipif(not hasattr(torch.jit, 'trace'), reason='torch no longer offers TorchScript')
@pytest.mark.filterwarnings('ignore:.*torch.jit.*', 'ignore::torch.jit.TracerWarning')
@attentions
@pytest.mark.parametrize('output_stride', [16, 32])
def test_traced_by_jit(output_stride, kwargs):
    model = build(num_classes=5, output_stride=output_stride, **kwargs)
    assert_equals_eager(torch.jit.trace(model, images((65, 97))), model)


class TestFX:

    @attentions
    @pytest.mark.parametrize('output_stride', [16, 32])
    def test_timms_graph_extractor(self, output_stride, kwargs):
        model = build(num_classes=5, output_stride=output_stride, **kwargs)
        nodes = {'pst': 'P', 'fuse_merge': 'F', 'fc': 'logits'}
        extractor = timm.models.GraphExtractNet(model, nodes, return_dict=True)
        for size in SIZES:
            x = images(size)
            outs = extractor(x)
            _, levels = model.forward_intermediates(x)
            assert relative_error(outs['F'], levels[4]) < 1e-5
            assert relative_error(outs['P'], levels[3][:, :model.num_features]) < 1e-5
            assert relative_error(outs['logits'], model(x)) < 1e-5

    @pytest.mark.parametrize('train', [False, True])
    @pytest.mark.parametrize('extractor', [
        timm.models.create_feature_extractor,
        functools.partial(torchvision_extractor, tracer_kwargs=dict(
            leaf_modules=timm.layers.get_notrace_modules(),
            autowrap_functions=timm.layers.get_notrace_functions(),
        )),
    ], ids=['timm', 'torchvision'])
    def test_extractors_keep_the_attention_whole(self, extractor, train):
        model, x = build(train_topk=100).train(train), images()
        graph = extractor(model, ['pst_cat', 'fc'])
        assert graph.training == train
        for topk in (0, 2):
            model.set_topk(topk)  # the graph runs the model's own layers
            assert relative_error(graph(x)['fc'], model(x)) < 1e-5
        assert relative_error(graph.eval()(x)['pst_cat'], model.eval().forward_intermediates(x)[1][3]) < 1e-5

    def test_an_extractor_that_goes_into_the_attention_is_told_how_not_to(self):
        for train in (False, True):
            with pytest.raises(TraceError, match=r'keep it whole.*create_feature_extractor.*leaf_modules='):
                torchvision_extractor(build().train(train), ['pst_cat'])
        model, x = build(pst_depth=0), images()
        assert relative_error(torchvision_extractor(model, ['fc'])(x)['fc'], model(x)) < 1e-5

    def test_a_graph_trains(self):
        features = timm.create_model(TINY, features_only=True, feature_cls='fx', train_topk=2).train()
        sum(out.square().sum() for out in features(images())).backward()
        assert {n for n, p in features.named_parameters() if p.requires_grad and p.grad is None} == set()


def assert_compiled_equals_eager(backend, sizes, train=False, **kwargs):
    torch._dynamo.reset()
    model = build(num_classes=5, **kwargs).train(train)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    state = copy.deepcopy(model.state_dict())
    for size in sizes:
        y = compiled(images(size))
        model.load_state_dict(state)  # a training call moves the statistics
        assert relative_error(y, model(images(size))) < 1e-4
        model.load_state_dict(state)


class TestCompile:

    @pytest.mark.slow
    def test_generated_code(self):
        assert_compiled_equals_eager('inductor', [(105, 75)], topk=3)

    @pytest.mark.slow
    @pytest.mark.parametrize('output_stride', [8, 16, 32])
    @attentions
    def test_generated_code_of_all(self, output_stride, kwargs):
        assert_compiled_equals_eager('inductor', SIZES[:2], output_stride=output_stride, **kwargs)

    @pytest.mark.parametrize('kwargs', [
        *(dict(**kwargs, output_stride=stride) for kwargs in ATTENTION for stride in (16, 32)),
        dict(train=True),
        dict(train=True, train_topk=100),  # all selected, so that noise has no say
        dict(train=True, train_topk=100, fine_fusion='joint'),
    ], ids=str)
    def test_one_graph(self, kwargs):
        """What fullgraph demands, without the code generation that takes the time."""
        assert_compiled_equals_eager('eager', [(105, 75)], **kwargs)


class TestExport:

    @attentions
    @pytest.mark.parametrize('output_stride', [16, pytest.param(32, marks=pytest.mark.slow)])
    def test_dynamic_sizes(self, output_stride, kwargs):
        model = build(num_classes=5, output_stride=output_stride, **kwargs)
        exported = export(model).module()
        assert_equals_eager(exported, model, sizes=[*SIZES, (47, 330)])

    def test_plain_attention(self):
        with set_layer_config(exportable=True):
            model = build(num_classes=5, topk=3)
        exported = export(model)
        assert not any('scaled_dot_product' in str(node.target) for node in exported.graph.nodes)
        assert_equals_eager(exported.module(), model)

    def test_save_and_load(self):
        model = build(num_classes=5, topk=3, fine_fusion='joint')
        buffer = io.BytesIO()
        torch.export.save(export(model), buffer)
        buffer.seek(0)
        assert_equals_eager(torch.export.load(buffer).module(), model)

    def test_static(self):
        model = build(num_classes=5, topk=3)
        exported = torch.export.export(model, (images((32, 32), 1),))
        assert_equals_eager(exported.module(), model, sizes=[(32, 32)], batches=(1,))

    def test_features(self):
        features = build(features_only=True, topk=3)
        exported = torch.export.export(features, (images(),)).module()
        for a, b in zip(exported(images()), features(images())):
            assert relative_error(a, b) < 1e-5


def export(model):
    from torch.export import Dim

    return torch.export.export(
        model,
        (images((96, 128)),),
        dynamic_shapes=({0: Dim('batch', min=1), 2: Dim('height', min=33), 3: Dim('width', min=33)},),
    )


def has_batch_norm(module):
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())


@pytest.mark.parametrize('fold', [reparameterize_model, pst_timm.reparameterize], ids=['timm', 'pst_timm'])
class TestReparameterize:
    """timm's folding of the neck and the head, and the package's own, which folds the trunk as well."""

    @attentions
    @pytest.mark.parametrize('name', SOME)
    def test_every_model(self, fold, name, kwargs):
        model = build(name, num_classes=5, **kwargs)
        folded = fold(model)
        assert_equals_eager(folded, model, sizes=[(97, 64)], batches=(2,), tolerance=1e-4)
        assert not any(has_batch_norm(part) for part in (
            folded.pst, folded.fuse_down, folded.fuse_merge, folded.conv_head))
        if fold is pst_timm.reparameterize:
            assert not has_batch_norm(folded)

    @pytest.mark.parametrize('kwargs', [
        dict(output_stride=8, topk=3),
        dict(output_stride=16, topk=3, fine_fusion='joint'),
        dict(pst_depth=0),
        dict(pst_depth=2, topk=3),
        dict(num_classes=0, global_pool=''),
        dict(norm_layer='groupnorm1', topk=3),
    ], ids=str)
    def test_options(self, fold, kwargs):
        model = build(**kwargs)
        assert_equals_eager(fold(model), model, tolerance=1e-4)

    def test_float64_agrees_to_rounding(self, fold):
        model = build(topk=3, num_classes=5).double()
        x = images().double()
        assert relative_error(fold(model)(x), model(x)) < 1e-12

    def test_the_source_is_left_alone_unless_inplace(self, fold):
        model = build()
        expected, names = model(images()), list(model.state_dict())
        fold(model)
        assert list(model.state_dict()) == names and torch.equal(model(images()), expected)
        assert fold(model, inplace=True) is model
        assert list(model.state_dict()) != names

    @pytest.mark.parametrize('fusion', FINE_FUSIONS)
    def test_topk_can_still_be_set(self, fold, fusion):
        model = build(num_classes=5)
        folded = fold(model)
        for topk in (3, 0, 10 ** 6):
            model.set_topk(topk, fusion=fusion)
            folded.set_topk(topk, fusion=fusion)
            assert_equals_eager(folded, model, batches=(2,), tolerance=1e-4)

    @pytest.mark.parametrize('out_indices', [(0, 1, 2, 3, 4), (3,), (1, 2)])
    def test_features(self, fold, out_indices):
        features = build(features_only=True, out_indices=out_indices, topk=3)
        for a, b in zip(fold(features)(images()), features(images())):
            assert relative_error(a, b) < 1e-4

    @scripting
    @pytest.mark.filterwarnings('ignore:.*torch.jit.*')
    @attentions
    def test_then_script(self, fold, kwargs):
        model = build(num_classes=5, **kwargs)
        assert_equals_eager(torch.jit.script(fold(model)), model, tolerance=1e-4)

    @attentions
    def test_then_export(self, fold, kwargs):
        model = build(num_classes=5, **kwargs)
        assert_equals_eager(export(fold(model)).module(), model, tolerance=1e-4)

    def test_half_precision_after_folding(self, fold):
        model = build(num_classes=5, topk=10 ** 6)
        y = fold(model).bfloat16()(images().bfloat16())
        assert y.dtype == torch.bfloat16 and relative_error(y, model(images())) < 0.05

    def test_a_plain_resnet(self, fold):
        model = build('test_resnet')
        assert_equals_eager(fold(model), model, tolerance=1e-4)


def test_a_model_that_cannot_be_traced_is_an_error():
    class Untraceable(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match='Untraceable'):
        pst_timm.reparameterize(Untraceable())
