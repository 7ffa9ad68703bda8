"""Whatever stands in the metadata of weights, in config.json or in a YAML file: a PSTError, or it works.

The ordinary suite looks for seconds; the test marked slow for ten minutes (PST_TIMM_FUZZ_SECONDS).
"""
import argparse
import json
import os
import time

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pst_timm.checkpoints import convert, load_model, load_trunk, read_checkpoint
from pst_timm.checkpoints.schema import ARGS, FACTS, PRETRAINED_CFG
from pst_timm.checkpoints.trust import COMMON_ARGS
from pst_timm.engine import factories
from pst_timm.engine.args import read_yaml, train_args, validate_args
from pst_timm.engine.flags import TRAIN_FLAGS, VALIDATE_FLAGS
from pst_timm.engine.training import prepare
from pst_timm.hub.publishing import publish
from pst_timm.hub.registry import register_weights
from pst_timm.utils.errors import PSTError
from tests.checkpoints.helpers import build
from tests.engine.helpers import tiny_train_args, write_images
from tests.hub.conftest import registry  # noqa: F401, fixture

SECONDS = float(os.environ.get('PST_TIMM_FUZZ_SECONDS', 600))
# each example writes and opens files, at a speed that the machine decides
QUIET = dict(deadline=None, suppress_health_check=list(HealthCheck), database=None)

NUMBERS = st.one_of(
    st.integers(-3, 300), st.integers(), st.floats(), st.sampled_from([2 ** 31, 2 ** 63, -1, 0, 10 ** 30, 1e308]))
TEXTS = st.one_of(
    st.sampled_from([
        '', 'avg', 'test_resnet_pst', 'resnet50.a1_in1k', 'hf-hub:a/b', 'local-dir:.', '../x', 'bicubic', 'gate',
        'relu', 'fc', 'conv1.0', '\x00', '\x1b[2J', '{', 'None', 'x' * 5000]),
    st.text(max_size=20), st.text(st.characters(), max_size=5))
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
JUNK = st.recursive(
    LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8)
TENSORS = st.sampled_from([
    torch.zeros(()), torch.zeros(3), torch.zeros(3, 128), torch.zeros(3, dtype=torch.int8), torch.zeros(0),
    torch.full((3,), torch.nan), torch.zeros(3, dtype=torch.complex64), torch.zeros(3).to_sparse(),
    torch.zeros(3, device='meta'), torch.zeros(1).expand(10 ** 10), torch.zeros(3, dtype=torch.float64)])

CFGS = st.dictionaries(st.one_of(st.sampled_from([*PRETRAINED_CFG, 'url', 'file', 'source']), TEXTS), JUNK, max_size=4)
MODEL_ARGS = st.dictionaries(
    st.one_of(
        st.sampled_from([*COMMON_ARGS, 'pst_width', 'pst_depth', 'pst_head_dim', 'pst_mlp_ratio', 'layers', 'channels',
                         'block_args', 'act_layer', 'norm_layer', 'stem_width', 'stem_type', 'cardinality', 'aa_layer',
                         'pretrained', 'cache_dir', 'features_only']),
        TEXTS),
    st.one_of(JUNK, st.integers(0, 64), st.lists(st.integers(0, 64), max_size=4)), max_size=3)
RUN_ARGS = st.dictionaries(st.one_of(st.sampled_from([*ARGS]), TEXTS), JUNK, max_size=4)


def mostly(likely):
    """What is likely to be looked into, or anything."""
    return st.one_of(likely, likely, JUNK)


FACTS_OF_WEIGHTS = st.fixed_dictionaries(
    {'arch': st.sampled_from(['test_resnet_pst', 'test_resnet_pst.digits'])},
    optional={
        **{name: JUNK for name in FACTS if name != 'arch'}, 'model_args': mostly(MODEL_ARGS), 'args': mostly(RUN_ARGS),
        'pretrained_cfg': mostly(CFGS)})
METADATA = st.one_of(FACTS_OF_WEIGHTS, FACTS_OF_WEIGHTS, st.dictionaries(st.sampled_from([*FACTS]), JUNK), JUNK)
CONFIGS = st.one_of(
    st.fixed_dictionaries({'architecture': st.just('test_resnet_pst')}, optional={
        'pretrained_cfg': mostly(CFGS), 'model_args': mostly(MODEL_ARGS), 'num_classes': JUNK, 'label_names': JUNK,
        'labels': JUNK, 'label_descriptions': JUNK, 'global_pool': JUNK, 'num_features': JUNK}),
    JUNK)
OPTIMIZERS = st.fixed_dictionaries({
    'state': mostly(st.dictionaries(st.integers(0, 3), mostly(st.dictionaries(
        st.sampled_from(['momentum_buffer', 'step', 'x']), st.one_of(JUNK, TENSORS), max_size=2)), max_size=2)),
    'param_groups': mostly(st.just('as they are'))})
CHECKPOINTS = st.fixed_dictionaries({}, optional={
    'arch': mostly(st.just('test_resnet_pst')), 'args': mostly(RUN_ARGS.map(lambda args: argparse.Namespace(
        **{str(k): v for k, v in args.items()}))), 'epoch': mostly(st.just(0)), 'metric': JUNK,
    'position': mostly(st.just([1, 0])), 'optimizer': mostly(OPTIMIZERS), 'saver': JUNK, 'stream': JUNK,
    'facts': METADATA, 'state_dict_ema': st.one_of(JUNK, TENSORS),
    'change': st.dictionaries(st.one_of(st.sampled_from(['fc.bias', 'fc.weight', 'conv1.0.weight']), TEXTS), TENSORS,
                              max_size=2)})


@pytest.fixture(scope='module')
def weights():
    return build().state_dict()


@pytest.fixture
def folder(tmp_path, monkeypatch, registry):  # noqa: F811
    monkeypatch.setenv('PST_TIMM_DEBUG', '1')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'source').mkdir()
    return tmp_path


DOORS = (
    lambda source, folder: load_model(source, num_classes=3),
    lambda source, folder: convert(source, folder / 'out.pth'),
    lambda source, folder: publish(source, 'acme/tiny', dry_run=True, folder=folder / 'out'),
    lambda source, folder: register_weights('test_resnet_pst.fuzz', file=source),
    lambda source, folder: load_trunk(build(), source),
    lambda source, folder: factories.load_initial_checkpoint(build(), str(source)),
)


def through_the_doors(source, folder, doors):
    """Open a file or folder in several ways; anything but a PSTError is a fault."""
    try:
        read_checkpoint(source)
    except PSTError:
        doors = doors[:1]  # all others begin alike
    for door in doors:
        try:
            door(source, folder)
        except PSTError as e:
            assert str(e).isprintable()  # nothing that steers a terminal
    assert sorted(path.name for path in folder.iterdir()) in (
        ['source'], ['out', 'source'], ['out.pth', 'source'], ['out', 'out.pth', 'source'])


def open_header(metadata, weights, folder, doors):
    path = folder / 'source' / 'model.safetensors'
    save_file(weights, path, {'pst_timm': json.dumps(metadata)})
    through_the_doors(path, folder, doors)


def open_config(config, weights, folder, doors):
    save_file(weights, folder / 'source' / 'model.safetensors')
    (folder / 'source' / 'config.json').write_text(json.dumps(config))
    through_the_doors(folder / 'source', folder, doors)
    try:
        load_model(f'local-dir:{folder / "source"}')
    except PSTError:
        pass


def open_checkpoint(content, weights, folder, doors):
    content = dict(content)
    content['state_dict'] = {**weights, **content.pop('change', {})}
    data = folder / 'source' / 'data'
    if not data.exists():
        write_images(data, {'train': 1, 'validation': 1})
    args = tiny_train_args(data, folder / 'source' / 'runs', batch_size=2, overwrite=True, model_ema=True)
    if isinstance(content.get('optimizer'), dict) and content['optimizer'].get('param_groups') == 'as they are':
        content['optimizer']['param_groups'] = factories.optimizer_for(args, build()).state_dict()['param_groups']
    path = folder / 'source' / 'last.pth.tar'
    torch.save(content, path)
    through_the_doors(path, folder, doors)
    args.resume = str(path)
    try:
        prepare(args).hold.close()
    except PSTError as e:
        assert str(e).isprintable()


def open_yaml(text, weights, folder, doors):
    path = folder / 'source' / 'args.yaml'
    path.write_bytes(text if isinstance(text, bytes) else text.encode(errors='surrogatepass'))
    for groups, parse in ((TRAIN_FLAGS, train_args), (VALIDATE_FLAGS, validate_args)):
        try:
            parse(**read_yaml(str(path), groups))
        except PSTError:
            pass


KEYS = sorted({flag.key for groups in (TRAIN_FLAGS, VALIDATE_FLAGS) for _, flags in groups for flag in flags})
YAMLS = st.one_of(
    st.dictionaries(st.one_of(st.sampled_from(KEYS), TEXTS), JUNK, max_size=4).map(
        lambda values: yaml.dump(values, allow_unicode=True)),
    JUNK.map(yaml.dump), st.text(max_size=60), st.binary(max_size=60),
    st.sampled_from([
        '&a [*a]', 'lr: !!python/object/apply:os.system [x]', 'lr: *x', '? [a]\n: 1', '1: 2', 'lr: 1\nlr: 2',
        'epochs: 2001-01-01', 'lr: !!binary aGk=', 'lr: !!set {a}', '--- 1\n--- 2', '\t', '{' * 2000,
        '- ' * 3000 + 'a', 'a: &a [x, x]\nb: &b [*a, *a]\nlr: [*b, *b]']))
CASES = {
    'header': (METADATA, open_header),
    'config': (CONFIGS, open_config),
    'checkpoint': (CHECKPOINTS, open_checkpoint),
    'yaml': (YAMLS, open_yaml),
}


@pytest.mark.parametrize('case', CASES)
def test_nothing_but_a_pst_error(case, weights, folder):
    strategy, check = CASES[case]

    @settings(max_examples=100 if case == 'yaml' else 15, derandomize=True, **QUIET)
    @given(strategy)
    def examples(value):
        check(value, weights, folder, DOORS[:2])

    examples()


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_nothing_but_a_pst_error_in_ten_minutes(case, weights, folder):
    strategy, check = CASES[case]
    end = time.monotonic() + SECONDS / len(CASES)

    @settings(max_examples=50, **QUIET)
    @given(strategy)
    def examples(value):
        check(value, weights, folder, DOORS)

    while time.monotonic() < end:
        examples()
