"""Open exported files as data: looked through first, and refused where opening or running them would do more.

torch reads an exported program through pickles, `sympify`, names of Python functions and generated code, and falls back
to older formats where the newer one fails. So what may be in a file is listed here, in full, and nothing falls back.
"""
import ast
import functools
import io
import json
import math
import os
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NoReturn, Set, Tuple

import torch

from pst_timm.checkpoints import rules
from pst_timm.checkpoints.reading import check_archive
from pst_timm.checkpoints.schema import PRETRAINED_CFG, check_facts, parse_json
from pst_timm.checkpoints.trust import check_ordinary
from pst_timm.utils.errors import PSTError
from pst_timm.utils.markdown import plain
from pst_timm.utils.onnx_file import METADATA, onnx_session

from .openvino import open_ir

__all__ = ['OPENERS', 'load_exported']

MOST_BYTES = 2 ** 31  # of a file; the largest model here has a twentieth of it
MOST_CODE = 2 ** 23  # of a TorchScript archive, unpacked: the one part that torch compresses
MOST_TEXT = 10_000  # characters of an expression or a guard
MOST_BATCH = 1024  # images that a file may fix its batch at

# what a file carries beside the model, and what of that has to be there
NEEDED = ('num_classes', 'input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
INFO = {
    **{key: PRETRAINED_CFG[key] for key in ('input_size', 'interpolation', 'crop_pct', 'crop_mode')},
    'mean': rules.MEANS,
    'std': rules.STDS,
    'num_classes': rules.whole(1, rules.MOST_CLASSES),
    'architecture': rules.text(4096),
    'class_names': rules.names,
    'dtype': rules.choice('float32', 'float16', 'bfloat16'),
    'memory_format': rules.choice('contiguous_format', 'channels_last'),
    'batch_size': rules.whole(1, MOST_BATCH),
    'topk': rules.whole(0, rules.MOST_PIXELS ** 2),
    'fine_fusion': rules.choice('gate', 'joint'),
    'quantization': rules.mapping({}, rules.plain),
}

# records of an archive of torch.export.save, by whoever reads them
PICKLES = ('data/weights/model.pt', 'data/constants/model.pt', 'data/sample_inputs/model.pt')  # two of torch 2.8 alone
CONFIGS = {'data/weights/model_weights_config.json': 'weight', 'data/constants/model_constants_config.json': 'tensor'}
RECORDS = re.compile('|'.join([
    *map(re.escape, (*PICKLES, *CONFIGS)), r'data/weights/weight_\d+', r'data/constants/tensor_\d+',
    r'models/model\.json', rf'extra/{re.escape(METADATA)}',
    r'archive_format', r'archive_version', r'byteorder', r'\.format_version', r'\.storage_alignment',
    r'\.data/(?:version|serialization_id)']))

OPERATORS = re.compile(
    r'_operator\.(?:add|sub|mul|floordiv|truediv|mod|neg|pos|pow|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)'
    r'|math\.(?:ceil|floor|trunc)|torch\.sym_(?:min|max|int|float|not|sum|ite)')
# those of aten's operators with words among their arguments that reach no file; any with none of them will do
WORDED = ('conv1d', 'conv2d', 'conv3d', 'div', 'div_', 'einsum', 'gelu', 'gelu_', 'meshgrid', 'pad')
FORBIDDEN_ARGUMENTS = ('as_custom_obj', 'as_operator', 'as_graph', 'as_opaque', 'custom_obj')

FUNCTIONS = (
    'Symbol|Integer|Rational|Float|Add|Mul|Min|Max|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|IntTrueDiv|CeilToInt|'
    'FloorToInt|TruncToInt|ToFloat|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|Equality|Unequality|StrictLessThan|LessThan|'
    'StrictGreaterThan|GreaterThan')
NUMBER = r'\d+(?:\.\d+)?'
# of sizes: numbers, symbols and the functions above; without powers, which grow beyond any machine
EXPRESSION = re.compile(
    rf"(?:Symbol\('[a-z]+\d+'(?:, \w+=(?:True|False))*\)|(?:{FUNCTIONS})\(|\b[a-z]+\d+\b(?![\[(.'])"
    rf"|\b{NUMBER}\b|True|False|//|\*(?!\*)|[-+/%()<>=!,& |~])*")
GUARD = re.compile(
    rf"(?:L\['\w+'\](?:\[\d+\])*\.(?:size|stride)\(\)\[\d+\]|\b{NUMBER}\b|\b(?:and|or|not|min|max|torch\.sym_\w+)\b"
    r"|//|\*(?!\*)|[-+/%()<>=!, ])*")
NAME = re.compile(r'[\w.:+-]*')
TREES = (None, 'builtins.tuple', 'builtins.list', 'builtins.dict')

# records of an archive of torch.jit.save, and what its pickles may name beside the classes of its code
SCRIPT_RECORDS = re.compile('|'.join([
    r'code/__torch__(?:/\w+)*\.py(?:\.debug_pkl)?', r'data\.pkl', r'constants\.pkl', r'(?:data|constants)/\d+',
    rf'extra/{re.escape(METADATA)}', r'version', r'byteorder', r'\.format_version', r'\.storage_alignment',
    r'\.data/(?:version|serialization_id)']))
SCRIPT_STORAGES = {  # and the bytes of an element
    f'torch {kind}Storage': size for kind, size in dict(
        Double=8, Float=4, Half=2, BFloat16=2, Long=8, Int=4, Short=2, Char=1, Byte=1, Bool=1).items()}
SCRIPT_GLOBALS = re.compile(
    rf'{"|".join(SCRIPT_STORAGES)}|collections OrderedDict|torch device|torch\._utils _rebuild_tensor_v2|'
    r'torch\.jit\._pickle (?:build_(?:int|bool|double|tensor)list|restore_type_tag)')
SCRIPT_REFUSED = ('STACK_GLOBAL', 'INST', 'OBJ', 'PERSID', 'MEMOIZE', 'DUP', 'FRAME', 'EXT1', 'EXT2', 'EXT4')
# operators of TorchScript with words among the arguments of some overload that reach no file, beside `WORDED`
SCRIPT_WORDED = (
    *WORDED, 'Delete', 'Float', 'Int', '__contains__', '__getitem__', '_convolution_mode', '_set_item', 'add', 'any',
    'clear', 'copy', 'count', 'device', 'dict', 'divide', 'endswith', 'eq', 'find', 'format', 'ge', 'get', 'gt',
    'index', 'items', 'join', 'keys', 'le', 'len', 'linalg_norm', 'list', 'lower', 'lt', 'ne', 'ord', 'percentFormat',
    'pop', 'quantile', 'remove', 'replace', 'scatter', 'scatter_', 'scatter_reduce', 'slice', 'sort', 'sorted',
    'split', 'startswith', 'strip', 'update', 'upper', 'values', 'warn')
SCRIPT_PRIMITIVES = re.compile(
    r'ops\.prim\.(?:RaiseException|abs|data|device|dtype|is_cuda|layout|max|min|name|ndim|rangelist|requires_grad|shape|'
    r'tolist|type)')
SCRIPT_ROOTS = re.compile(r'torch|ops|__torch__|getattr|fork|awaitable|rpc_\w+')  # names with a meaning of their own
SCRIPT_TEXT = re.compile(r'(?:(?!\\\n|#\s*type:)[\n -~])*')  # where Python and TorchScript see the same program


def load_exported(path: os.PathLike, format: str) -> Tuple[Callable[[torch.Tensor], torch.Tensor], Dict[str, Any]]:
    """Load what `export` wrote, ready to run.

    Args:
        path: The file; it may be a stranger's. Nothing but tensor operations can come of it: what would unpickle, call
            Python, read or write another file is refused before it is opened. A program may still compute for long.
        format: 'onnx', 'torchscript', 'exported-program' or 'openvino', whose weights are beside its graph.

    Returns:
        A function of a batch of images, and the metadata, of which `runtime.Deployed` can be made.

    Raises:
        PSTError: If the file cannot be read, is none that `export` writes, or holds more than that.
    """
    if format not in OPENERS:
        raise PSTError(f'format must be one of {", ".join(OPENERS)}, got {format!r}.')
    opener, endings, extra = OPENERS[format]
    data = [_read(Path(path).with_suffix(ending) if ending else Path(path)) for ending in endings]
    try:
        run, info = opener(*data)
    except PSTError as e:
        raise PSTError(f'{path} is refused: {e} Nothing in it was run. Export the model again.') from None
    except ImportError as e:
        raise PSTError(f"{path} cannot be opened ({e}): pip install 'pst_timm[{extra}]'.") from None
    except Exception as e:  # whatever the runtimes make of a damaged file
        # OpenVINO begins with places in its own source
        lines = [line for line in str(e).splitlines() if line.strip() and not line.startswith('Exception from')]
        raise PSTError(
            f'{path} cannot be read as {format}: it is damaged, or pst-timm did not write it '
            f'({plain((lines or [type(e).__name__])[0], 300)}).') from e
    return run, _facts(path, info)


def _facts(path: os.PathLike, text: str) -> Dict[str, Any]:
    """The metadata, held to its rules."""
    told = parse_json(text, path)
    facts = check_facts(path, told, INFO, 'its model')
    missing = next((key for key in NEEDED if key not in facts), None)
    if missing:
        raise PSTError(f'{path}: its metadata does not tell {missing}. Export the model again.')
    if facts.get('class_names') and len(facts['class_names']) != facts['num_classes']:
        raise PSTError(
            f'{path}: its metadata has {len(facts["class_names"])} names for {facts["num_classes"]} classes. Export '
            f'the model again.')
    # a batch size that is not told is 1, as older files have it; one that is null is any
    unset = {'architecture': None, 'topk': 0, 'fine_fusion': None, 'batch_size': told.get('batch_size', 1)}
    return {**unset, **facts}


def _read(path: Path) -> bytes:
    if not os.path.lexists(path):
        raise PSTError(f'There is no exported model {path}.')
    check_ordinary(path)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise PSTError(f'{path} is larger than {MOST_BYTES // 2 ** 30} GiB: no export is.')
        return path.read_bytes()
    except OSError as e:
        raise PSTError(f'{path} cannot be read ({e.strerror}).') from None


def _refuse(what: str) -> NoReturn:
    raise PSTError(f'it holds {what}, which pst-timm export does not write.')


# ONNX

def _open_onnx(data: bytes) -> Tuple[Callable[[torch.Tensor], torch.Tensor], str]:
    import onnx
    import onnxruntime  # noqa: F401, what is missing is told of before the file is

    model = onnx.load_model_from_string(data)
    own = {(function.domain, function.name) for function in model.functions}
    for part in _parts(model):
        if isinstance(part, onnx.TensorProto) and (part.external_data or part.data_location):
            _refuse('weights that are to be read from another file')
        if isinstance(part, onnx.NodeProto) and part.domain not in ('', 'ai.onnx') and (
                part.domain, part.op_type) not in own:
            _refuse(f'an operator {part.op_type[:80]!r} of {part.domain[:80]!r}')
    run, found = onnx_session(data)
    return run, found[METADATA]


def _parts(message: Any) -> Iterator[Any]:
    """A message of a protocol buffer and all that it is made of."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, 'ListFields') else value:
                yield from _parts(part)


# TorchScript

def _open_script(data: bytes) -> Tuple[Callable[[torch.Tensor], torch.Tensor], str]:
    records = _records(data, SCRIPT_RECORDS)
    code = {
        name[len('code/'):-len('.py')].replace('/', '.'): _parse(read()) for name, read in records.items()
        if name.endswith('.py')}
    defined = {
        f'{place}.{part.name}' for place, tree in code.items() for part in tree.body
        if isinstance(part, (ast.ClassDef, ast.FunctionDef))}
    for tree in code.values():
        _CodeCheck(defined).visit(tree)
    for name in records:
        if name.endswith('pkl'):
            _check_script_pickle(name, records, defined)
    files = {METADATA: ''}
    module = torch.jit.load(io.BytesIO(data), map_location='cpu', _extra_files=files)
    return module, files[METADATA]


def _records(data: bytes, allowed: 're.Pattern[str]') -> Dict[str, Callable[[], bytes]]:
    """What reads each record of an archive of torch, by its name; all names are among those that are allowed.

    torch looks a record up without regard to case, and takes a file for another format by how it begins.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = archive.infolist()
    kinds: Dict[bool, List[zipfile.ZipInfo]] = {True: [], False: []}
    for part in parts:
        kinds[part.filename.partition('/')[2].startswith('code/')].append(part)
    if sum(part.file_size for part in kinds[True]) > MOST_CODE:
        _refuse(f'more than {MOST_CODE // 2 ** 20} MiB of code')
    check_archive(kinds[False], len(data))
    found = [part.filename for part in parts]
    reader = torch._C.PyTorchFileReader(io.BytesIO(data))  # that of torch's loaders, so that both see the same records
    names = reader.get_all_records()
    for name in names:
        if not allowed.fullmatch(name):
            _refuse(f'a record {name!r}')
    root = found[0].partition('/')[0]
    twice = len({name.casefold() for name in names}) < len(names)
    if twice or not data.startswith(b'PK\3\4') or sorted(found) != sorted(f'{root}/{name}' for name in names):
        _refuse('records under the same name, or beside the archive')
    return {name: functools.partial(reader.get_record, name) for name in names}


def _parse(code: bytes) -> ast.Module:
    text = code.decode('ascii', 'replace')
    if not SCRIPT_TEXT.fullmatch(text):
        _refuse('code in other characters, or with continued lines or types in comments')
    return ast.parse(text)


class _CodeCheck(ast.NodeVisitor):
    """Makes sure that code calls tensor operators and what is defined beside it, and that none of it runs at opening.

    A name of an operator reaches it as an attribute of anything: `torch.save(x, ...)` is `x.save(...)`.

    Args:
        defined: Full names of the classes and functions of the archive.
    """
    def __init__(self, defined: Set[str]) -> None:
        self.defined = defined

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name in ('__setstate__', '__getstate__'):
            _refuse(f'{node.name!r} in its code')
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        root, names = node, []
        while isinstance(root, ast.Attribute):
            names.append(root.attr)
            root = root.value
        if isinstance(root, ast.Name) and SCRIPT_ROOTS.fullmatch(root.id):
            name = '.'.join([root.id, *reversed(names)])
            operator = root.id == 'torch' and len(names) == 1 and _is_harmless(names[0], False)
            own = name in self.defined or name.rpartition('.')[0] in self.defined  # or one of an Enum
            if not (operator or own or SCRIPT_PRIMITIVES.fullmatch(name)):
                _refuse(f'{name[:80]!r} in its code')
            return
        for name in names:
            self._check_name(name)
        self.visit(root)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id == 'getattr':
            if len(node.args) != 2 or node.keywords or not isinstance(getattr(node.args[1], 'value', None), str):
                _refuse("'getattr' of no plain name in its code")
            self._check_name(node.args[1].value)
            self.visit(node.args[0])
        else:
            self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if SCRIPT_ROOTS.fullmatch(node.id):
            _refuse(f'{node.id!r} in its code')

    def _check_name(self, name: str) -> None:
        if not _is_harmless(name, True):
            _refuse(f'{name[:80]!r} in its code')


@functools.lru_cache(maxsize=4096)
def _is_harmless(name: str, unknown: bool) -> bool:
    """Whether an operator reaches no file; `unknown` is said of a name that none has."""
    schemas = torch._C._jit_get_schemas_for_operator(f'aten::{name}')
    if not schemas:
        return unknown
    return name in SCRIPT_WORDED or not any('str' in str(part.type) for s in schemas for part in s.arguments)


def _check_script_pickle(name: str, records: Dict[str, Callable[[], bytes]], defined: Set[str]) -> None:
    """Make sure that a pickle names tensors and the classes of the archive's code, which has been looked through.

    A tensor is ('storage', its type, its record, device, number of elements); torch takes the last on trust.
    """
    before: List[Tuple[str, Any]] = []  # instructions and what each puts on the stack, if it is a plain value
    memo: Dict[int, Any] = {}
    for opcode, value, _ in pickletools.genops(records[name]()):
        if opcode.name == 'GLOBAL':
            if not SCRIPT_GLOBALS.fullmatch(value) and value.replace(' ', '.') not in defined:
                _refuse(f'{value[:80]!r} in {name!r}')
        elif opcode.name in SCRIPT_REFUSED or (opcode.name == 'PROTO' and before):
            _refuse(f'the instruction {opcode.name} in {name!r}')
        elif isinstance(value, str) and 'torch.classes' in value:
            _refuse(f"'torch.classes' in {name!r}")
        if 'PUT' in opcode.name:
            memo[value] = before[-1][1]
            continue
        if 'GET' in opcode.name:
            value = memo[value]
        if opcode.name == 'BINPERSID':
            _check_storage(name, records, before[-7:])
        before = [*before[-6:], (opcode.name, value)]


def _check_storage(name: str, records: Dict[str, Callable[[], bytes]], before: List[Tuple[str, Any]]) -> None:
    kinds, values = [kind for kind, _ in before], [value for _, value in before[1:-1]]
    plain = len(before) == 7 and all(isinstance(value, (str, int)) for value in values)
    if not plain or kinds[0] != 'MARK' or kinds[-1] != 'TUPLE':
        _refuse(f'a tensor in {name!r} of another make')
    _, kind, key, device, count = values
    record = f'{name.removesuffix(".pkl")}/{key}'
    known = kind in SCRIPT_STORAGES and re.fullmatch(r'(?:cpu|cuda)(?::\d+)?', str(device)) and record in records
    if not known or not isinstance(count, int):
        _refuse(f'a tensor in {name!r} of {kind!r} on {device!r} from {record!r}')
    if not 0 <= count * SCRIPT_STORAGES[kind] <= len(records[record]()):
        _refuse(f'a tensor of {count} elements in {name!r}, which is more than is there')


# exported programs

def _open_program(data: bytes) -> Tuple[Callable[[torch.Tensor], torch.Tensor], str]:
    from torch.export.pt2_archive import PT2ArchiveReader
    from torch.export.pt2_archive._package import load_pt2  # torch.export.load without its older formats

    names = _records(data, RECORDS)
    reader = PT2ArchiveReader(io.BytesIO(data))
    for name in PICKLES:
        if name in names:
            _check_pickle(name, reader.read_bytes(name))
    for name, kind in CONFIGS.items():
        if name in names:
            _check_tensors(reader, name, kind)
    _check_graph(json.loads(reader.read_bytes('models/model.json')))
    content = load_pt2(io.BytesIO(data))
    return content.exported_programs['model'].module(), content.extra_files[METADATA]


def _check_pickle(name: str, data: bytes) -> None:
    """Make sure that a pickle holds tensors and plain values; where it holds more, torch would unpickle that too."""
    if not data:
        return
    try:
        torch.load(io.BytesIO(data), map_location='cpu', weights_only=True)
    except Exception:
        _refuse(f'a pickle {name!r} of more than tensors and plain values')


def _check_tensors(reader: Any, name: str, kind: str) -> None:
    folder = name.rpartition('/')[0]
    for key, entry in json.loads(reader.read_bytes(name))['config'].items():
        if entry['use_pickle'] or not re.fullmatch(rf'{kind}_\d+', entry['path_name']):
            _refuse(f'{key!r} as a pickle or object {entry["path_name"]!r}')
        sizes = [size['as_int'] for size in entry['tensor_meta']['sizes']]
        # no element is smaller than a byte
        if math.prod(sizes) > len(reader.read_bytes(f'{folder}/{entry["path_name"]}')):
            _refuse(f'{key!r} of {sizes}, which is more than is there')
        if entry['tensor_meta']['device']['type'] != 'cpu':
            _refuse(f'{key!r} on another device')


def _check_graph(program: Any) -> None:
    """Make sure that a program is made of tensor operations, of names that are names, and of plain arithmetic."""
    for guard in program.get('guards_code') or ():
        if len(guard) > MOST_TEXT or not GUARD.fullmatch(guard):
            _refuse(f'a guard {guard[:80]!r}')
    _check_part({key: value for key, value in program.items() if key != 'guards_code'})


def _check_part(part: Any, key: str = '', operator: str = '') -> None:
    if isinstance(part, list):
        for value in part:
            _check_part(value, key, operator)
    elif isinstance(part, dict):
        if key == 'metadata':  # where the exporter was: shown, never run
            if not all(isinstance(value, str) for value in part.values()):
                _refuse('metadata that is no text')
            return
        if isinstance(part.get('target'), str) and 'inputs' in part:
            operator = part['target']
            _check_operator(operator)
        for name, value in part.items():
            if not NAME.fullmatch(name) or (name in FORBIDDEN_ARGUMENTS and value is not None):
                _refuse(f'an entry {name!r}')
            if name != 'target' or 'inputs' not in part:
                _check_part(value, name, operator)
    elif isinstance(part, str):
        _check_text(part, key, operator)


def _check_operator(name: str) -> None:
    if OPERATORS.fullmatch(name):
        return
    found = re.fullmatch(r'torch\.ops\.aten\.(\w+)\.(\w+)', name)
    overload = getattr(getattr(torch.ops.aten, found[1], None), found[2], None) if found else None
    if not isinstance(overload, torch._ops.OpOverload):
        _refuse(f'an operator {name!r}')
    if found[1] not in WORDED and any('str' in str(argument.type) for argument in overload._schema.arguments):
        _refuse(f'an operator {name!r}')


def _check_text(text: str, key: str, operator: str) -> None:
    if key in ('in_spec', 'out_spec'):
        fits = _is_tree(json.loads(text)[1])
    elif key == 'expr_str':
        fits = len(text) <= MOST_TEXT and EXPRESSION.fullmatch(text)
    elif key == 'as_string' and operator.startswith('torch.ops.aten.einsum.'):
        fits = re.fullmatch(r'[A-Za-z ,.>-]*', text)
    else:
        fits = NAME.fullmatch(text)
    if not fits:
        _refuse(f'{text[:80]!r} as {key}')


def _is_tree(tree: Any) -> bool:
    """Whether a structure of inputs is made of tuples, lists and dicts of names."""
    keys = json.loads(tree['context'] or 'null') or ()
    named = all(isinstance(key, str) and NAME.fullmatch(key) for key in keys)
    return tree['type'] in TREES and named and all(map(_is_tree, tree['children_spec']))


# what opens each format, the endings of its files ('' for that of the path), and the extra that it takes
OPENERS = {
    'onnx': (_open_onnx, ('',), 'export'),
    'torchscript': (_open_script, ('',), 'export'),
    'exported-program': (_open_program, ('',), 'export'),
    'openvino': (open_ir, ('', '.bin'), 'openvino'),
}
