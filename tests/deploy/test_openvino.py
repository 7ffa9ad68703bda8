"""Int8 in OpenVINO: answers, another process, and graphs of strangers, which it sees only when they are models."""
import re
import subprocess
import sys

import pytest
import torch

from pst_timm.deploy.openvino import MOST_XML, open_ir
from pst_timm.deploy.quantize import quantize
from pst_timm.deploy.runtime import open_source
from pst_timm.utils.errors import PSTError
from tests.deploy.test_quantize import digits, noise, reader  # noqa: F401, a fixture
from tests.models.helpers import build

pytest.importorskip('openvino')


@pytest.mark.slow
@pytest.mark.parametrize('topk, fusion', [(0, 'gate'), (8, 'gate'), (8, 'joint')])
def test_noisy_digits_are_read_as_well(topk, fusion, digits, tmp_path):  # noqa: F811
    pytest.importorskip('nncf')
    (images, _), check = digits
    done = quantize(
        reader(topk, fusion), tmp_path / 'm.xml', images.split(32), backend='openvino', validation=[check],
        timing=False)
    assert done.validation.drop <= 0.84 and done.validation.agreement >= 97


@pytest.mark.slow
def test_another_process_gets_the_same_logits(tmp_path):
    pytest.importorskip('nncf')
    done = quantize(
        build(topk=2, num_classes=3), tmp_path / 'm.xml', noise(), backend='openvino', img_size=64, timing=False,
        float_layers=['fc'])
    assert done.float_layers == ['fc'] and done.bytes > 1000
    x = noise(5)
    code = (
        'import sys, torch; from pst_timm.deploy.runtime import open_source\n'
        'torch.save(open_source(sys.argv[1])(torch.load(sys.argv[2])), sys.argv[3])')
    torch.save(x, tmp_path / 'x.pt')
    subprocess.run([sys.executable, '-c', code, done.path, tmp_path / 'x.pt', tmp_path / 'logits.pt'], check=True)
    assert torch.equal(torch.load(tmp_path / 'logits.pt'), open_source(done.path)(x))


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    """Graph and weights of a small model, as bytes."""
    import numpy as np
    import openvino
    from openvino import opset13 as ops

    from pst_timm.deploy.openvino import write_ir

    x = ops.parameter([-1, 3, 8, 8], np.float32, name='image')
    mean = ops.reduce_mean(x, np.array([2, 3]), keep_dims=False)
    model = openvino.Model([ops.matmul(mean, np.ones((3, 2), np.float32), False, False)], [x], 'm')
    path = tmp_path_factory.mktemp('ir') / 'm.xml'
    info = ('{"architecture": "m", "num_classes": 2, "class_names": [], "input_size": [3, 8, 8], "mean": [0, 0, 0], '
            '"std": [1, 1, 1], "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center", "batch_size": null}')
    write_ir(model, path, info)
    return path.read_bytes(), path.with_suffix('.bin').read_bytes()


def test_a_graph_is_read(good, tmp_path):
    (tmp_path / 'm.xml').write_bytes(good[0])
    (tmp_path / 'm.bin').write_bytes(good[1])
    assert open_source(tmp_path / 'm.xml')(torch.ones(2, 3, 8, 8)).tolist() == [[3, 3], [3, 3]]


def first(pattern, new):
    def changed(graph):
        found = re.sub(pattern, new, graph.decode(), count=1)
        assert found.encode() != graph
        return found.encode()
    return changed


PRODUCT = r'type="MatMul" version="opset1"'
HOSTILE = {
    'entities': ('definitions of its own', first(r'<net', '<!DOCTYPE net [<!ENTITY a "b">]><net')),
    'an external entity': ('definitions of its own', first(
        r'<net', '<!DOCTYPE net [<!ENTITY a SYSTEM "file:///etc/passwd">]><net')),
    'a DTD elsewhere': ('definitions of its own', first(r'<net', '<!DOCTYPE net SYSTEM "http://127.0.0.1/a.dtd"><net')),
    'instructions': ('definitions of its own', first(r'<net', '<?xml-stylesheet href="a"?><net')),
    'an extension': ("'Evil' of 'extension'", first(PRODUCT, 'type="Evil" version="extension"')),
    'a loop': ("'Loop' of 'opset5'", first(PRODUCT, 'type="Loop" version="opset5"')),
    'a body': ("an element 'body'", first(r'<edges', '<body/><edges')),
    'state': ("'ReadValue'", first(PRODUCT, 'type="ReadValue" version="opset6"')),
    'a path': ('a path', first(r'<rt_info', '<rt_info weights_path="/etc/passwd"')),
    'weights beyond the end': ('bytes of weights', first(r'offset="\d+"', 'offset="999999"')),
    'weights before the start': ("a constant at '-8'", first(r'offset="\d+"', 'offset="-8"')),
    'a constant without end': ('bytes of weights', first(r'size="\d+"', 'size="999999999999"')),
    'depth': ('elements 12 deep', first(r'<edges', '<edge>' * 20 + '</edge>' * 20 + '<edges')),
    'a long name': ('an attribute of', first(r'name="image"', f'name="{"a" * 20000}"')),
    'much': ('MiB', lambda graph: graph + b' ' * MOST_XML),
}


@pytest.mark.parametrize('case', HOSTILE)
def test_a_graph_that_is_more_than_a_model_is_refused(case, good, tmp_path):
    culprit, change = HOSTILE[case]
    (tmp_path / 'm.xml').write_bytes(change(good[0]))
    (tmp_path / 'm.bin').write_bytes(good[1])
    with pytest.raises(PSTError, match=rf'm\.xml is refused: it holds .*{re.escape(culprit)}.*Nothing in it was run'):
        open_source(tmp_path / 'm.xml')


@pytest.mark.parametrize('share', [0, 0.3, 0.9])
def test_what_was_cut_off_ends_in_a_sentence(share, good, tmp_path):
    path = tmp_path / 'm.xml'
    path.write_bytes(good[0][:int(share * len(good[0]))])
    path.with_suffix('.bin').write_bytes(good[1])
    with pytest.raises(PSTError, match=r'm\.xml cannot be read as openvino'):
        open_source(path)
    path.write_bytes(good[0])
    path.with_suffix('.bin').write_bytes(good[1][:int(share * len(good[1]))])
    with pytest.raises(PSTError, match=r'm\.xml is refused: .*bytes of weights'):
        open_source(path)
    path.with_suffix('.bin').unlink()
    with pytest.raises(PSTError, match=r'no exported model .*m\.bin'):
        open_source(path)


def test_openvino_gets_no_file_that_was_not_looked_at(good):
    run, info = open_ir(*good)
    assert run(torch.ones(1, 3, 8, 8)).shape == (1, 2) and '"num_classes": 2' in info
