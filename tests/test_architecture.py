"""The plan of the house: who may import whom, what an import costs, and the promises of the package's files."""
import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import pst_timm
from pst_timm.layers import ConvNorm
from tests.models.helpers import MODELS, build

PACKAGE = Path(pst_timm.__file__).parent
# what each room may know of the others; a room's own modules always
FLOOR = {'utils', 'metrics', 'layers'}
UPSTAIRS = FLOOR | {'models', 'checkpoints', 'data'}
ROOMS = {
    'utils': set(),
    'metrics': {'utils'},
    'layers': set(),
    'models': {'layers', 'utils'},
    'checkpoints': FLOOR | {'models'},
    'data': {'utils', 'metrics'},
    'engine': {'utils', 'metrics', 'checkpoints', 'data'},
    # side by side: none of these knows another
    'hub': UPSTAIRS,
    'benchmark': UPSTAIRS,
    'visualize': UPSTAIRS,
    'deploy': UPSTAIRS | {'engine'},
    'study': UPSTAIRS | {'engine'},
    'review': UPSTAIRS | {'engine'},
    'detection': UPSTAIRS | {'engine'},
    'commands': UPSTAIRS | {'engine', 'hub', 'benchmark', 'visualize', 'deploy', 'study', 'review', 'detection'},
    'cli': {'utils'},
}
LATER = (
    'matplotlib', 'sklearn', 'scipy', 'torch_pruning',
    *(f'pst_timm.{room}' for room in ROOMS if room not in FLOOR | {'models'}))
FRONT_DOOR = ('__init__.py', '__main__.py', 'version.py')


def sources(folder=''):
    return sorted((PACKAGE / folder).rglob('*.py'))


def files(paths):
    return pytest.mark.parametrize('path', paths, ids=lambda path: str(path.relative_to(PACKAGE)))


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def imports(path):
    """(module, name) pairs of everything that a file imports, with relative imports resolved."""
    package = ['pst_timm', *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            module = '.'.join([*base, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def own_imports(path):
    for module, name in imports(path):
        if module.split('.')[0] == 'pst_timm':
            yield module, name


def entered(module, name):
    """The room that an import enters, None for one that leaves all open."""
    inside = module.split('.')[1:]
    if inside:
        return inside[0]
    if name in ROOMS or name in pst_timm._SUBPACKAGES:
        return name
    return 'version' if name in ('version', '__version__') else pst_timm._ROOMS.get(name)


@files([path for path in sources() if path.parent != PACKAGE or path.name not in FRONT_DOOR])
def test_knowledge_flows_one_way(path):
    assert room(path) in ROOMS, 'a new room needs its place in the plan'
    allowed = ROOMS[room(path)] | {room(path)}
    for module, name in own_imports(path):
        assert entered(module, name) in {*allowed, 'version'}, f'{path.name} imports {module} ({name})'


@pytest.mark.parametrize('module, name, room', [
    ('pst_timm', 'publish', 'hub'),
    ('pst_timm', 'load_model', 'checkpoints'),
    ('pst_timm', 'reparameterize', 'models'),
    ('pst_timm', 'hub', 'hub'),
    ('pst_timm', 'study', 'study'),
    ('pst_timm', '__version__', 'version'),
    ('pst_timm', 'version', 'version'),
    ('pst_timm.version', '__version__', 'version'),
    ('pst_timm.study', None, 'study'),
    ('pst_timm', None, None),
    ('pst_timm', '*', None),
])
def test_the_front_door_hides_no_room(module, name, room):
    assert entered(module, name) == room


@files(sources())
def test_no_private_name_of_another_file_is_imported(path):
    for module, name in own_imports(path):
        private = [part for part in (*module.split('.'), name or '') if part.startswith('_')]
        assert not [part for part in private if not part.startswith('__')], f'{module}.{name}'


@files(sources('engine'))
def test_the_engine_knows_no_model_of_ours(path):
    found = words_of_ours(path.read_text(), strings=path.name != 'flags.py')  # the help of a flag may give an example
    assert not found


OURS = (
    'topk', 'tokens', 'fine_fusion', 'fine atten', 'fine_step', 'fine_prob', 'resnetpst', 'backbonepst', 'backbone_pst',
    'pyramidsparse', *MODELS)


def words_of_ours(code, strings):
    """Where the names of a source, and its strings if they count, speak of our models; but for one flag's own name."""
    texts = set()
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Constant):
            # identifiers: of names, attributes, arguments, keywords, functions, classes, imports
            texts |= {value for _, value in ast.iter_fields(node) if isinstance(value, str)}
        elif strings:
            texts.add(str(node.value))
    plain = {text: text.lower().replace('--topk-sweep', '').replace('topk_sweep', '') for text in texts}
    return [(text, word) for text in sorted(plain) for word in OURS if word in plain[text]]


@pytest.mark.parametrize('code', [
    'model.tokens(48)', 'model.set_topk(2)', "setting['topk']", 'run(topk=2)', 'def f(fine_fusion): pass',
    'class TopK: pass', 'from pst_timm.models import ResNetPST', "'needs one, such as resnet50_pst.'",
    "f'{model} has no Fine Attention'", 'args.topk_sweeps_topk',
])
def test_a_word_of_ours_is_found(code):
    assert words_of_ours(code, strings=True)
    assert not words_of_ours("args.topk_sweep, '--topk-sweep cannot', 'topk_sweep'", strings=True)
    assert bool(words_of_ours(code, strings=False)) == ("'" not in code)


def test_layers_know_torch_and_timms_layers_only():
    for path in (PACKAGE / 'layers').glob('*.py'):
        for module, _ in imports(path):
            top = module.split('.')[0]
            assert top in {'torch', 'pst_timm', *sys.stdlib_module_names} or module == 'timm.layers', module


def run(code):
    """What a fresh interpreter prints."""
    result = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    return result.stdout.strip()


def test_import_is_light_and_registers_the_models():
    assert run(
        'import sys, timm\n'
        'before = set(timm.list_models())\n'
        'import pst_timm\n'
        f'print([name for name in {LATER!r} if name in sys.modules])\n'
        'print(*sorted(set(timm.list_models()) - before))'
    ).splitlines() == ['[]', ' '.join(sorted([*MODELS, 'backbone_pst', 'pruned']))]


def test_all_names_exist():
    for path in sources():
        if path.name == '__init__.py':
            module = importlib.import_module('.'.join(['pst_timm', *path.relative_to(PACKAGE).parts[:-1]]))
            assert not [name for name in getattr(module, '__all__', []) if not hasattr(module, name)], module


def test_the_package_is_typed():
    assert (PACKAGE / 'py.typed').is_file()


def test_every_pair_of_the_neck_is_a_conv_and_a_norm():
    """Checkpoints know these pairs as `.conv` and `.bn`."""
    model = build(pst_depth=2)
    block = ['attn.q', 'attn.kv', 'attn.pe', 'attn.proj', 'mlp.0', 'mlp.1']
    expected = {'pst.conv_in', 'pst.conv_upper', 'pst.conv_out', 'fuse_down', 'fuse_merge', 'conv_head'}
    expected |= {f'pst.blocks.{i}.{name}' for i in range(2) for name in block}
    pairs = {name: m for name, m in model.named_modules() if isinstance(m, ConvNorm)}
    assert set(pairs) == expected
    for pair in pairs.values():
        names = {name for name, _ in pair.named_parameters()}
        assert names == {'conv.weight', 'bn.weight', 'bn.bias'}


def test_every_room_is_reached_through_the_package():
    names = sorted(path.parent.name for path in PACKAGE.glob('*/__init__.py'))
    hidden = [name for name in names if name not in (*pst_timm._SUBPACKAGES, 'commands')]
    assert hidden == [] and callable(pst_timm.deploy.loading.load_exported) and pst_timm.detection.open_detector
