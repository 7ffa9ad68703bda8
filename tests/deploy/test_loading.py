"""An exported file of a stranger is data: none of those that would leave a mark does, and each is refused by name."""
import io
import json
import os
import pickle
import re
import struct
import zipfile

import onnx
import pytest
import timm
import torch
import torch.nn as nn

from pst_timm.deploy.export import FORMATS, export
from pst_timm.deploy.loading import load_exported
from pst_timm.deploy.runtime import open_source
from pst_timm.utils.errors import PSTError
from pst_timm.utils.onnx_file import METADATA
from tests.checkpoints.helpers import Payload
from tests.helpers import randomize

pytest.importorskip('onnxruntime')


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    """The bytes of an export in each format."""
    folder = tmp_path_factory.mktemp('good')
    torch.manual_seed(0)
    model = randomize(timm.create_model('test_resnet_pst', num_classes=3)).eval()
    files = {}
    for format, ending in FORMATS.items():
        export(model, folder / f'model{ending}', format, img_size=64)
        files[format] = (folder / f'model{ending}').read_bytes()
    return files


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """What a hostile file would make, in the folder that the test runs in."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path / 'mark'
    assert not (tmp_path / 'mark').exists()


def rewritten(data, change):
    """An archive with its records changed; `change` takes and gives a dict of names and bytes."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        root = archive.namelist()[0].split('/')[0]
        records = {name.removeprefix(f'{root}/'): archive.read(name) for name in archive.namelist()}
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
        for name, content in change(records).items():
            archive.writestr(f'{root}/{name}', content)
    return file.getvalue()


def pickled(mark):
    return pickle.dumps(Payload(mark))


def saved(mark):
    """As torch.save writes it."""
    file = io.BytesIO()
    torch.save({'a': Payload(mark)}, file)
    return file.getvalue()


def record(name, content):
    return lambda records, mark: {**records, name: content(mark)}


def json_changed(name, change):
    def changed(records, mark):
        content = json.loads(records[name])
        change(content, mark)
        return {**records, name: json.dumps(content).encode()}
    return changed


def first_weight(content):
    return next(iter(content['config'].values()))


def pickled_weight(records, mark):
    name = 'data/weights/model_weights_config.json'
    content = json.loads(records[name])
    first_weight(content)['use_pickle'] = True
    path = f'data/weights/{first_weight(content)["path_name"]}'
    return {**records, name: json.dumps(content).encode(), path: saved(mark)}


def opaque_constant(records, mark):
    entry = {'path_name': 'opaque_obj_0', 'is_param': False, 'use_pickle': True, 'tensor_meta': None}
    config = json.dumps({'config': {'c': entry}}).encode()
    folder = 'data/constants'
    return {**records, f'{folder}/model_constants_config.json': config, f'{folder}/opaque_obj_0': pickled(mark)}


def expression(content, mark):
    sizes = content['graph_module']['graph']['tensor_values']['x']['sizes']
    sizes[0] = {'as_expr': {'expr_str': f'[].__class__.__base__ and open({str(mark)!r}, "w")', 'hint': None}}


def operator(content, mark):
    node = content['graph_module']['graph']['nodes'][0]
    node.update(target='torch.os.mkdir', inputs=[{'name': '', 'arg': {'as_string': str(mark)}, 'kind': 1}])


def file_operator(content, mark):
    arguments = [
        {'name': '', 'arg': {kind: value}, 'kind': 1}
        for kind, value in (('as_string', 'mark'), ('as_bool', True), ('as_int', 8))]
    node = content['graph_module']['graph']['nodes'][0]
    node.update(target='torch.ops.aten.from_file.default', inputs=arguments)


def guard(content, mark):
    content['guards_code'] = [f'open({str(mark)!r}, "w")']


def renamed(content, mark):
    text = json.dumps(content['graph_module']['graph']).replace('"x"', json.dumps(f'x=open({str(mark)!r}, "w")'))
    content['graph_module']['graph'] = json.loads(text)


MODEL = 'models/model.json'
PROGRAMS = {
    'sample inputs': ("'data/sample_inputs/model.pt'", record('data/sample_inputs/model.pt', saved)),
    'bare pickle': ("'data/sample_inputs/model.pt'", record('data/sample_inputs/model.pt', pickled)),
    'weights of torch 2.8': ("'data/weights/model.pt'", record('data/weights/model.pt', saved)),
    'constants of torch 2.8': ("'data/constants/model.pt'", record('data/constants/model.pt', saved)),
    'pickled weight': ('as a pickle', pickled_weight),
    'opaque constant': ("'data/constants/opaque_obj_0'", opaque_constant),
    'library': ("'data/aotinductor/model/model.so'", record('data/aotinductor/model/model.so', lambda mark: b'ELF')),
    'second model': ("'models/other.json'", record('models/other.json', lambda mark: b'{}')),
    'expression': ('as expr_str', json_changed(MODEL, expression)),
    'operator': ("'torch.os.mkdir'", json_changed(MODEL, operator)),
    'operator on files': ("'torch.ops.aten.from_file.default'", json_changed(MODEL, file_operator)),
    'guard': ('a guard', json_changed(MODEL, guard)),
    'names': ("x=open(", json_changed(MODEL, renamed)),
    'huge tensor': ('more than is there', json_changed('data/weights/model_weights_config.json', lambda c, mark: (
        first_weight(c)['tensor_meta'].update(sizes=[{'as_int': 10 ** 12}])))),
}


@pytest.mark.parametrize('case', PROGRAMS)
def test_a_program_that_holds_more_than_tensors_is_refused(case, good, mark):
    culprit, change = PROGRAMS[case]
    path = mark.with_name('model.pt2')
    path.write_bytes(rewritten(good['exported-program'], lambda records: change(records, mark)))
    with pytest.raises(PSTError, match=rf'pt2 is refused: it holds .*{re.escape(culprit)}.*Nothing in it was run'):
        load_exported(path, 'exported-program')


def test_a_program_that_is_written_anew_is_read(good, tmp_path):
    """So that the test above refuses what was changed, and not how."""
    path = tmp_path / 'model.pt2'
    path.write_bytes(rewritten(good['exported-program'], lambda records: records))
    run, info = load_exported(path, 'exported-program')
    assert run(torch.zeros(1, 3, 64, 64)).shape == (1, 3) and info['num_classes'] == 3


def test_a_program_of_an_older_format_is_not_unpickled(mark):
    path = mark.with_name('model.pt2')
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('version', '8.20')
        archive.writestr('serialized_exported_program.json', '{}')
        for name in ('state_dict', 'constants', 'example_inputs'):
            archive.writestr(f'serialized_{name}.pt', saved(mark))
    with pytest.raises(PSTError, match=r'model\.pt2 cannot be read as exported-program'):
        load_exported(path, 'exported-program')


class Writer(nn.Module):
    """A module that makes a file as soon as it is loaded."""

    @torch.jit.export
    def __getstate__(self):
        return (torch.zeros(1), self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        self.training = bool(torch.from_file('mark', True, 8).sum() > 0)

    def forward(self, x):
        return x


class Later(nn.Module):
    """A module that makes a file when it is run."""

    def forward(self, x):
        return x + torch.from_file('mark', True, 8).sum()


class Same(nn.Module):
    """A module that does nothing, to write other code into."""

    def forward(self, x):
        return x


# all that has to be told
LEAST = dict(
    num_classes=3, input_size=[3, 64, 64], mean=[0.5] * 3, std=[0.5] * 3, interpolation='bilinear', crop_pct=1.,
    crop_mode='center')


def scripted(module):
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(module), file, _extra_files={METADATA: json.dumps(LEAST)})
    return file.getvalue()


@pytest.mark.parametrize('module, word', [
    (Writer, '__setstate__|torch.from_file|__getstate__'), (Later, 'torch.from_file')])
def test_a_script_that_writes_files_is_refused(module, word, mark):
    path = mark.with_name('model.pt')
    path.write_bytes(scripted(module()))
    (mark.parent / 'mark').unlink(missing_ok=True)
    with pytest.raises(PSTError, match=rf"model\.pt is refused: it holds '({word})' in its code"):
        load_exported(path, 'torchscript')


CODE = 'code/__torch__/tests/deploy/test_loading.py'
GLOBAL = b'c__torch__.tests.deploy.test_loading\nSame\n'


def in_pickle(name):
    def changed(records):
        assert GLOBAL in records['data.pkl']
        return {**records, 'data.pkl': records['data.pkl'].replace(GLOBAL, b'c' + name + b'\n')}
    return changed


SCRIPTS = {
    'code by another name': ("a record 'CODE/", lambda r: {
        name.replace('code/', 'CODE/'): content for name, content in r.items()}),
    'code twice': ('records under the same name', lambda r: {**r, CODE.replace('tests', 'Tests'): r[CODE]}),
    'a record of the older format': ("a record 'model.json'", lambda r: {**r, 'model.json': b'{}'}),
    'a class of C++': ("torch.classes.dist_rpc X' in 'data.pkl'", in_pickle(b'__torch__.torch.classes.dist_rpc\nX')),
    'a class of Python': ("'os system' in 'data.pkl'", in_pickle(b'os\nsystem')),
    'a class that is not there': ("Other' in 'data.pkl'", in_pickle(b'__torch__.tests.deploy.test_loading\nOther')),
    'a pickle of positions': ("'os system' in", lambda r: {
        **r, f'{CODE}.debug_pkl': b'\x80\x02cos\nsystem\n.'}),
    'much code': ('MiB of code', lambda r: {**r, CODE: r[CODE] + b' ' * 2 ** 23}),
}


@pytest.mark.parametrize('case', SCRIPTS)
def test_a_script_of_other_records_is_refused(case, mark):
    culprit, change = SCRIPTS[case]
    path = mark.with_name('model.pt')
    path.write_bytes(rewritten(scripted(Same()), change))
    with pytest.raises(PSTError, match=rf'pt is refused: it holds .*{re.escape(culprit)}.*Nothing in it was run'):
        load_exported(path, 'torchscript')


def preceded(line):
    """What puts a line of code before the end of the function."""
    return lambda records: {
        **records, CODE: records[CODE].replace(b'    return x', f'    {line}\n    return x'.encode())}


@pytest.mark.parametrize('line', [
    'torch.save(x, "mark")', 'x.save("mark")', '"mark".from_file(True, 8)', 'y = x.save', 'y = getattr(x, "save")',
    'y = getattr(x, name)', 'y = getattr', 'y = torch', 'torch.autograd.save(x, "mark")', 'ops.aten.save(x, "mark")',
    'ops.prim.PythonOp(x)', 'y = ops.prim', 'y = __torch__.torch.classes.dist_rpc.X()', 'y = fork(x)',
    'y = x  # type: Tensor', 'y = \\\n      x', 'torch.\N{LATIN SMALL LETTER LONG S}in(x)',
    '\ftorch.add(x, x)', 'torch.no_such(x)'])
def test_a_script_calls_tensor_operators_alone(line, mark):
    path = mark.with_name('model.pt')
    path.write_bytes(rewritten(scripted(Same()), preceded(line)))
    with pytest.raises(PSTError, match=r'pt is refused: it holds .*(in its code|code in other characters)'):
        load_exported(path, 'torchscript')


def test_a_script_with_another_line_is_read(tmp_path):
    """So that the test above refuses the line, and not that there is one."""
    path = tmp_path / 'model.pt'
    path.write_bytes(rewritten(scripted(Same()), preceded('x = torch.add(x, x)')))
    run, _ = load_exported(path, 'torchscript')
    assert run(torch.ones(2)).tolist() == [2, 2]


class Held(nn.Module):
    """A module that gives its weights away."""

    def __init__(self):
        super().__init__()
        self.register_buffer('weight', torch.ones(300))

    def forward(self, x):
        return self.weight


@pytest.mark.parametrize('old, new, said', [
    (b'M' + struct.pack('<H', 300), b'J' + struct.pack('<i', 30000), 'tensor of 30000 elements'),
    (b'M' + struct.pack('<H', 300) + b't', b'J' + struct.pack('<i', -1) + b't', 'tensor of -1 elements'),
    (b'FloatStorage', b'DoubleStorage', 'tensor of 300 elements'),
    (b'X\1\0\0\0000', b'X\1\0\0\0001', "from 'data/1'"),
    (b'X\3\0\0\0cpu', b'X\4\0\0\0meta', "on 'meta'"),
    (b'M' + struct.pack('<H', 300) + b't', b'J' + struct.pack('<i', 30000) + b'\x80\2q\x20M\1\0000h\x20t', 'PROTO'),
    (b'X\7\0\0\0storage', b')0X\7\0\0\0storage', 'of another make'),
])
def test_a_tensor_that_claims_more_than_its_record_is_refused(old, new, said, tmp_path):
    """torch would show what lies in memory behind it."""
    path = tmp_path / 'model.pt'
    data = scripted(Held())
    path.write_bytes(data)
    assert load_exported(path, 'torchscript')[0](torch.zeros(1)).sum() == 300

    def changed(records):
        assert old in records['data.pkl']
        return {**records, 'data.pkl': records['data.pkl'].replace(old, new)}
    path.write_bytes(rewritten(data, changed))
    with pytest.raises(PSTError, match=f'pt is refused: it holds .*{said}'):
        load_exported(path, 'torchscript')


@pytest.mark.parametrize('arch, kwargs, options', [
    ('test_vit', {}, {}),
    ('mobilenetv3_small_050', {}, {}),
    ('test_resnet_pst', dict(topk=2, fine_fusion='joint'), dict(reparam=False)),
    ('test_resnet_pst', dict(topk=2), dict(dtype=torch.float16)),
])
def test_scripts_of_other_models_are_read(arch, kwargs, options, tmp_path):
    export(timm.create_model(arch, **kwargs), tmp_path / 'model.pt', 'torchscript', **options)
    assert load_exported(tmp_path / 'model.pt', 'torchscript')[1]['architecture'] == arch


@pytest.mark.parametrize('format', ['torchscript', 'exported-program'])
def test_archives_that_unpack_to_more_are_refused(format, good, tmp_path):
    path = tmp_path / 'model'
    with zipfile.ZipFile(io.BytesIO(good[format])) as archive, zipfile.ZipFile(path, 'w') as packed:
        for name in archive.namelist():
            bomb = name.endswith(('data/0', 'weight_0'))
            packed.writestr(name, archive.read(name), zipfile.ZIP_DEFLATED if bomb else zipfile.ZIP_STORED)
    with pytest.raises(PSTError, match='its parts are compressed, or overlap'):
        load_exported(path, format)


@pytest.mark.parametrize('format', ['torchscript', 'exported-program'])
def test_an_archive_behind_something_else_is_refused(format, good, tmp_path):
    path = tmp_path / 'model'
    path.write_bytes(b'\0\0\0\0PTMF' + good[format])
    with pytest.raises(PSTError, match=r'model is refused|model cannot be read'):
        load_exported(path, format)


@pytest.mark.parametrize('format', FORMATS)
def test_a_pipe_is_called_by_its_name(format, tmp_path):
    os.mkfifo(tmp_path / 'model')
    with pytest.raises(PSTError, match='model is not an ordinary file, but a pipe or device'):
        load_exported(tmp_path / 'model', format)


def test_an_onnx_file_reads_no_other_file(good, mark):
    secret, path = mark.with_name('secret'), mark.with_name('model.onnx')
    secret.write_bytes(bytes(4096))
    model = onnx.load_model_from_string(good['onnx'])
    tensor = model.graph.initializer[0]
    tensor.ClearField('raw_data')
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key='location', value='secret')
    path.write_bytes(model.SerializeToString())
    with pytest.raises(PSTError, match=r'onnx is refused: it holds weights that are to be read from another file'):
        load_exported(path, 'onnx')


def test_an_onnx_file_has_standard_operators_alone(good, tmp_path):
    """Of those of ONNX Runtime some open what their attributes name."""
    model = onnx.load_model_from_string(good['onnx'])
    node = onnx.helper.make_node('EPContext', [], ['x'], domain='com.microsoft', embed_mode=0, ep_cache_context='../x')
    model.graph.node.append(node)
    (tmp_path / 'model.onnx').write_bytes(model.SerializeToString())
    with pytest.raises(PSTError, match=r"it holds an operator 'EPContext' of 'com\.microsoft'"):
        load_exported(tmp_path / 'model.onnx', 'onnx')


def with_info(good, change):
    """An ONNX file whose metadata is changed."""
    model = onnx.load_model_from_string(good['onnx'])
    entry = next(entry for entry in model.metadata_props if entry.key == METADATA)
    info = json.loads(entry.value)
    entry.value = json.dumps({**info, **change} if isinstance(change, dict) else change)
    return model.SerializeToString()


@pytest.mark.parametrize('change, said', [
    ([1], 'expected a mapping'),
    (dict(num_classes=None), 'does not tell num_classes'),
    (dict(num_classes='x'), 'num_classes: expected a whole number'),
    (dict(num_classes=-3), 'num_classes: expected a whole number'),
    (dict(mean='abc'), 'mean: expected a list'),
    (dict(mean=[float('nan')] * 3), 'NaN is no number'),
    (dict(std=[0, 0, 0]), r'std\[0\]: expected a number'),
    (dict(input_size=[3, 10 ** 7, 10 ** 7]), 'input_size: expected channels, height and width'),
    (dict(dtype='load'), "dtype: expected one of .*'load'"),
    (dict(memory_format='save'), "memory_format: expected one of .*'save'"),
    (dict(batch_size=0), 'batch_size: expected a whole number'),
    (dict(batch_size=10 ** 9), 'batch_size: expected a whole number'),
    (dict(crop_pct=-1), 'crop_pct: expected a number'),
    (dict(interpolation='evil'), 'an interpolation such as'),
    (dict(class_names=['a']), '1 names for 3 classes'),
    (dict(topk={}), 'topk: expected a whole number'),
])
def test_metadata_is_held_to_rules(change, said, good, tmp_path):
    path = tmp_path / 'model.onnx'
    path.write_bytes(with_info(good, change))
    with pytest.raises(PSTError, match=said):
        load_exported(path, 'onnx')


@pytest.mark.parametrize('change, size, said', [
    (dict(num_classes=7), 64, r'knows 7 classes, and gives \(2, 3\) for 2'),
    (dict(dtype='float16'), 64, 'does not take images of 3x64x64 .*in float16'),
    ({}, 96, 'does not take images of 3x96x96 .*it says that it takes 3x64x64, in float32'),
])
def test_a_model_that_is_not_what_it_says_ends_in_one_sentence(change, size, said, good, tmp_path):
    path = tmp_path / 'model.onnx'
    path.write_bytes(with_info(good, change))
    with pytest.raises(PSTError, match=said):
        open_source(path)(torch.zeros(2, 3, size, size))


def test_a_function_in_a_foreign_domain_does_not_open_it(good, tmp_path):
    model = onnx.load_model_from_string(good['onnx'])
    model.functions.append(onnx.helper.make_function(
        'com.microsoft', 'Nothing', ['x'], ['y'], [onnx.helper.make_node('Identity', ['x'], ['y'])],
        [onnx.helper.make_opsetid('', 18)]))
    model.graph.node.append(onnx.helper.make_node(
        'EPContext', ['image'], ['z'], domain='com.microsoft', ep_cache_context='secret', embed_mode=0))
    path = tmp_path / 'model.onnx'
    path.write_bytes(model.SerializeToString())
    with pytest.raises(PSTError, match="an operator 'EPContext' of 'com\\.microsoft'"):
        load_exported(path, 'onnx')


@pytest.mark.parametrize('format', FORMATS)
def test_damaged_and_foreign_files_are_named(format, good, tmp_path):
    path = tmp_path / 'model'
    for content in (b'', b'junk', good[format][:1000], good[next(f for f in FORMATS if f != format)]):
        path.write_bytes(content)
        with pytest.raises(PSTError, match=f'model cannot be read as {format}|model is refused'):
            load_exported(path, format)
    with pytest.raises(PSTError, match='There is no exported model'):
        load_exported(tmp_path / 'none', format)
    with pytest.raises(PSTError, match="got 'tflite'"):
        load_exported(path, 'tflite')
