"""Quantised models answer as float ones do, in every form and from another process too, and say what was lost."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torchvision import transforms

import pst_timm
from pst_timm.cli import main
from pst_timm.data.samples import Samples
from pst_timm.deploy import qdq
from pst_timm.deploy.calibration import ImageBatches
from pst_timm.deploy.latency import Latency
from pst_timm.deploy.quantize import Agreement, Int8Job, Reference, quantize, report_of, slowness
from pst_timm.deploy.runtime import open_source
from pst_timm.utils.errors import PSTError
from tests.engine.helpers import write_images
from tests.models.helpers import MODELS, build

pytest.importorskip('onnxruntime')

# the last has what the others have, and more
ATTENTION = [
    pytest.param(0, 'gate', marks=pytest.mark.slow), pytest.param(8, 'gate', marks=pytest.mark.slow), (8, 'joint')]


def noise(count=16, size=64, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope='module')
def digits():
    """scikit-learn's digits as the bundled reader takes them: (images, labels), to calibrate by and to check with."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from timm.data import create_transform, resolve_data_config

    model = timm.create_model('test_resnet_pst.digits', pretrained=True)
    transform = create_transform(**resolve_data_config(model=model))
    found = load_digits()
    train, check = train_test_split(range(len(found.target)), test_size=0.2, random_state=0, stratify=found.target)
    generator = torch.Generator().manual_seed(0)

    def noisy(ids):
        pictures = [Image.fromarray((found.images[i] * 255 / 16).round().astype('uint8')) for i in ids]
        x = torch.stack([transform(p.resize((64, 64), Image.Resampling.BICUBIC).convert('RGB')) for p in pictures])
        return x + 0.5 * torch.randn(x.shape, generator=generator), torch.from_numpy(found.target[ids])

    return noisy(train[:128]), noisy(check)


def reader(topk, fusion):
    model = timm.create_model('test_resnet_pst.digits', pretrained=True).eval()
    model.set_topk(topk, fusion)
    return model


@pytest.mark.parametrize('topk, fusion', ATTENTION)
def test_noisy_digits_are_read_as_well_in_int8(topk, fusion, digits, tmp_path):
    (images, _), check = digits
    done = quantize(
        reader(topk, fusion), tmp_path / 'm.int8.onnx', images.split(32), validation=[check], timing=False)
    assert done.validation.images == 360 and 90 < done.validation.top1_float < 99
    assert done.validation.drop <= 0.56  # two of these images; 0.3 points on more of them is what was measured
    assert done.validation.agreement >= 98.5
    assert done.bytes < 0.3 * done.float_bytes and not done.float_layers and not done.warnings


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """The same model at both levels."""
    folder = tmp_path_factory.mktemp('files')
    model = build(topk=2, num_classes=3)
    for level, suffix in (('int8', '.onnx'), ('bfloat16', '.pt2')):
        quantize(model, folder / f'm{suffix}', noise(), level, img_size=64, timing=False, overwrite=True)
    return folder


def test_another_process_gets_the_same_logits_for_any_batch(files, tmp_path):
    x, here = noise(5), {}
    for suffix in ('.onnx', '.pt2'):
        with torch.inference_mode():
            here[suffix] = open_source(files / f'm{suffix}')(x)
        assert here[suffix].shape == (5, 3)
    code = (
        'import sys, torch; from pst_timm.deploy.runtime import open_source\n'
        'x = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))\n'
        'models = {s: open_source(f"{sys.argv[1]}/m{s}") for s in (".onnx", ".pt2")}\n'
        'assert torch.equal(models[".onnx"](x[:1]), models[".onnx"](x)[:1])\n'
        'torch.save({s: model(x) for s, model in models.items()}, sys.argv[2])')
    subprocess.run([sys.executable, '-c', code, files, tmp_path / 'logits.pt'], check=True)
    there = torch.load(tmp_path / 'logits.pt')
    assert all(torch.equal(there[suffix], logits) for suffix, logits in here.items())


@pytest.mark.slow
@pytest.mark.parametrize('topk, fusion', [(0, 'gate'), (8, 'gate'), (8, 'joint')])
@pytest.mark.parametrize('level, suffix, allowed', [('int8', '.onnx', 0.15), ('bfloat16', '.pt2', 0.05)])
def test_fine_attention_agrees_with_its_eager_twin(level, suffix, allowed, topk, fusion, tmp_path):
    model = build(topk=topk, fine_fusion=fusion, num_classes=3)
    quantize(model, tmp_path / f'm{suffix}', noise(32), level, img_size=64, timing=False)
    x = noise(8, seed=1)
    with torch.inference_mode():
        expected, got = model(x), open_source(tmp_path / f'm{suffix}')(x)
    assert (got - expected).abs().max() / expected.abs().max() < allowed
    assert not torch.equal(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize('name', [
    'test_convnext', 'test_resnet', 'mobilenetv3_small_050', 'test_efficientnet', 'resnet18'])
def test_plain_models_of_timm(name, tmp_path):
    model = timm.create_model(name, num_classes=3).eval()
    x = noise(4)
    done = quantize(model, tmp_path / 'm.onnx', noise(8), img_size=64, timing=False, held_out=[(x, -torch.ones(4))])
    with torch.inference_mode():
        expected, got = model(x), open_source(done.path)(x)
    assert (got - expected).norm() / expected.norm() < 0.3
    assert done.held_out.top1 is None and done.held_out.images == 4


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_the_whole_zoo(name, tmp_path):
    model = build(name, topk=2, num_classes=3)
    x = noise(4, 96)
    for level, suffix in (('int8', '.onnx'), ('bfloat16', '.pt2')):
        done = quantize(model, tmp_path / f'{level}{suffix}', x, level, img_size=96, timing=False)
        with torch.inference_mode():
            expected, got = model(x), open_source(done.path)(x)
        assert (got - expected).norm() / expected.norm() < 0.3, level


def nodes(path, kind):
    import onnx

    return [node for node in onnx.load(path).graph.node if node.op_type == kind]


def test_nothing_but_convolutions_of_the_attention_is_quantised():
    model = pst_timm.reparameterize(build(topk=2, fine_fusion='joint'))
    graph = qdq.trace(model, (3, 64, 64))
    kinds = {node.name: node.op_type for node in graph.proto.graph.node}
    inside = {kinds[name] for name, scope in graph.scopes.items() if 'pst.blocks.0.attn' in scope}
    assert inside == {'Conv'}
    assert {'Conv', 'Gemm', 'Add', 'Relu', 'MaxPool', 'Concat'} <= {kinds[name] for name in graph.scopes}
    assert set(qdq.chosen_nodes(graph)) == set(graph.scopes)
    assert qdq.chosen_nodes(graph, graph.layers) == []  # what follows float layers is float too


def test_layers_stay_in_float_by_name(files, tmp_path):
    model = build(topk=2, num_classes=3)
    done = quantize(
        model, tmp_path / 'm.onnx', noise(), img_size=64, timing=False, float_layers=['layer[12]*', 'fc'])
    assert done.float_layers[0].startswith('layer1.0') and done.float_layers[-1] == 'fc'
    assert json.loads(report_of(done.path).read_text())['float_layers'] == done.float_layers
    assert done.bytes > (files / 'm.onnx').stat().st_size


def test_with_all_layers_in_float_the_model_is_what_it_was(files, tmp_path):
    model = build(topk=2, num_classes=3)
    done = quantize(model, tmp_path / 'm.onnx', noise(), img_size=64, timing=False, float_layers=['*'])
    assert nodes(files / 'm.onnx', 'QuantizeLinear') and not nodes(done.path, 'QuantizeLinear')
    with torch.inference_mode():
        torch.testing.assert_close(open_source(done.path)(noise(2)), model(noise(2)), rtol=1e-3, atol=1e-4)


def test_images_that_cannot_be_read_are_told_once(tmp_path, caplog):
    folder = write_images(tmp_path / 'data', {'train': 2})
    (folder / 'train' / 'class0' / 'broken.png').write_bytes(b'')
    samples = Samples.loose([folder], transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()]))
    batches = ImageBatches(samples)
    counts = [sum(len(x) for x, _ in batches) for _ in range(3)]
    assert counts == [len(samples) - 1] * 3
    assert caplog.text.count('cannot be read') == 1


def test_a_layer_that_there_is_not_is_named():
    graph = qdq.Graph(None, {'n': ('layer1', 'layer1.0'), 'm': ('fc',)}, ['layer1.0', 'fc'])
    assert qdq.layers_like(graph, ['fc', 'lay*']) == ['fc', 'layer1.0']
    with pytest.raises(PSTError, match=r"called 'layr1'\. Did you mean layer1"):
        qdq.layers_like(graph, ['layr1'])


def test_the_search_leaves_the_most_sensitive_layers_in_float(tmp_path, monkeypatch):
    """In place of int8, a model whose answers are wrong unless two certain layers are in float."""
    class Job(Int8Job):
        def call(self, kept):
            wrong = sum(weight for layer, weight in (('b', 3), ('d', 2), ('c', .1)) if layer not in kept)
            return lambda x: self.folded(x) + wrong * torch.tensor([0., 1.])

    images = torch.linspace(-3, 3, 64).reshape(-1, 1)  # so that an error of w changes w / 6 of the answers
    held_out = [(images, (images[:, 0] < 0).long())]
    folded = torch.nn.Linear(1, 2)
    with torch.no_grad():
        folded.weight.copy_(torch.tensor([[.5], [-.5]]))
        folded.bias.zero_()
    job = Job(folded, (1,), 'onnxruntime', 'minmax', [images], tmp_path, False)
    job.graph = qdq.Graph(None, {}, ['a', 'b', 'c', 'd'])
    assert job.search([], 3., Reference(folded, held_out)) == ['b', 'd']
    assert job.search(['a'], 3., Reference(folded, held_out)) == ['a', 'b', 'd']
    assert job.search([], 40., Reference(folded, held_out)) == ['b']
    assert job.search([], 100., Reference(folded, held_out)) == []
    monkeypatch.setattr(Job, 'call', lambda self, kept: lambda x: -self.folded(x))
    with pytest.raises(PSTError, match='cannot be kept, not even with all layers in float'):
        job.search([], 3., Reference(folded, held_out))


def test_what_has_no_end_is_left_out(monkeypatch):
    class Endless(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)
            self.register_buffer('mask', torch.tensor([0., float('-inf'), 0., 0.]).reshape(1, 4, 1, 1))

        def forward(self, x):
            return (self.conv(x) + self.mask).softmax(dim=1).mean((2, 3))

    for method in qdq.METHODS:
        graph = qdq.trace(Endless().eval(), (3, 32, 32))
        assert len(graph.scopes) == 2
        ranges = qdq.calibrate(graph, [noise(4, 32)], method)
        assert len(graph.scopes) == 1
        assert any(node.op_type == 'QuantizeLinear' for node in qdq.quantized_graph(graph, ranges).graph.node)


def test_no_place_of_this_machine_travels_in_a_file(files):
    data = (files / 'm.onnx').read_bytes()
    for place in (str(Path(pst_timm.__file__).parent), str(Path(torch.__file__).parent), str(files)):
        assert place.encode() not in data


@pytest.mark.parametrize('kwargs, said', [
    (dict(level='int4'), "level must be one of .*'int4'"),
    (dict(backend='tflite'), 'backend must be one of'),
    (dict(method='mean'), 'method must be one of'),
    (dict(images=()), 'name --data-dir'),
    (dict(max_drop=1.), 'held out'),
    (dict(level='bfloat16', output='m.pt2', max_drop=1.), 'are for int8'),
    (dict(output='m.bin'), 'must end with .onnx'),
    (dict(images=noise(2, 32)), r'images of \(3, 64, 64\)'),
])
def test_what_does_not_fit_is_said_before_the_work(kwargs, said, tmp_path):
    kwargs = {'output': 'm.onnx', 'images': noise(2), **kwargs}
    with pytest.raises((PSTError, ValueError), match=said):
        quantize(build(num_classes=3), tmp_path / kwargs.pop('output'), img_size=64, timing=False, **kwargs)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('missing, backend, said', [
    ('onnx', 'onnxruntime', r"pip install 'pst_timm\[export\]'"),
    ('onnxruntime', 'onnxruntime', r"pip install 'pst_timm\[export\]'"),
    ('nncf', 'openvino', r"pip install 'pst_timm\[openvino\]'"),
    ('openvino', 'openvino', r"pip install 'pst_timm\[openvino\]'"),
])
def test_what_is_not_installed_is_named(missing, backend, said, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(PSTError, match=said):
        quantize(build(num_classes=3), tmp_path / f'm.{"xml" if backend == "openvino" else "onnx"}', noise(), 'int8',
                 backend, img_size=64)
    assert not list(tmp_path.iterdir())


def test_a_slow_level_is_not_kept_quiet():
    times = {'eager float32': Latency(4., 1.), 'onnxruntime float32': Latency(2., 2.), 'int8': Latency(4., 1.)}
    [warning] = slowness(times, 'int8')
    assert '0.50 times as fast as onnxruntime float32' in warning
    assert slowness({**times, 'int8': Latency(1., 4.)}, 'int8') == slowness({}, 'int8') == []


def test_a_drop_without_labels_is_what_changed():
    assert Agreement(10, 90., None, None).drop == 10
    assert Agreement(10, 90., 80., 79.5).drop == 0.5


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('data'), {'train': 12, 'validation': 4})


def test_the_command_measures_on_splits_it_does_not_calibrate_by(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ['quantize', 'test_resnet_pst', '--no-pretrained', '--data-dir', str(data), '--images', '10',
             '--img-size', '64', '--topk', '2', '--no-labels']
    assert main(words) == 0
    out = capsys.readouterr().out
    report = json.loads(report_of('test_resnet_pst.int8.onnx').read_text())
    assert report['images'] == 10 and report['held_out']['images'] == 26 and report['validation']['images'] == 12
    assert report['topk'] == 2 and report['validation']['top1'] is None and set(report['latency']) == {
        'eager float32', 'onnxruntime float32', 'int8'}
    assert '12 validation' in out and 'times as fast' in out
    assert main(words) == 1  # never over what is there
    assert 'is there already' in capsys.readouterr().err
    assert open_source('test_resnet_pst.int8.onnx').info['quantization']['method'] == 'minmax'
    with pytest.raises(SystemExit):
        main(['quantize', 'test_resnet_pst'])
    assert '--data-dir' in capsys.readouterr().err
