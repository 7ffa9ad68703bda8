"""Flags are timm's, and a mistake is named before any work starts."""
import csv
import re
from pathlib import Path

import pytest
import yaml

from pst_timm.engine import parse_train_args, parse_validate_args, train_args
from pst_timm.engine.args import read_yaml, write_yaml
from pst_timm.engine.flags import ROLES, TRAIN_FLAGS, VALIDATE_FLAGS, keys_with_role, recipe, shared_keys
from pst_timm.utils.errors import PSTError

HERE = Path(__file__).parent
CONFIGS = sorted((HERE.parents[1] / 'configs').glob('*.yaml'))
TYPES = {'int': int, 'float': float, 'str': str, 'utils.ParseKwargs': dict, 'ParseKwargs': dict}
# the differences from timm that docs/training.md lists
OUR_DEFAULTS = {'train': {'device': None}, 'validate': {'device': None, 'model': None, 'use_ema': None}}


def timm_flags(name):
    with open(HERE / f'timm_{name}_flags.tsv', newline='') as f:
        return list(csv.DictReader(f, delimiter='\t'))


def key_of(row):
    name = next((n for n in row['flags'].split() if n.startswith('--')), row['flags'].split()[0])
    return name.lstrip('-').replace('-', '_')


def our_flags(groups):
    return {f.key: f for _, flags in groups for f in flags}


@pytest.mark.parametrize('name,groups', [('train', TRAIN_FLAGS), ('validate', VALIDATE_FLAGS)])
def test_flags_are_those_of_timm(name, groups):
    ours = our_flags(groups)
    rows = [r for r in timm_flags(name) if key_of(r) != 'config']
    assert len(rows) > 50
    for row in rows:
        flag = ours[key_of(row)]
        assert set(flag.names) == set(row['flags'].split()), row
        if flag.refused:
            default = eval(row['default'] or 'None')
            assert not default or default == flag.off, row
            continue
        kind = bool if 'store_true' in row['action'] else TYPES.get(row['type'] or row['action'], str)
        assert flag.type is kind, row
        assert str(flag.nargs or '') == row['nargs'].strip("'"), row
        default = False if kind is bool else eval(row['default'] or 'None')
        assert flag.default == OUR_DEFAULTS[name].get(flag.key, default), row


def test_what_timms_script_wrote_names_what_is_off_too(tmp_path):
    off = {
        'fuser': '', 'aug_splits': 0, 'jsd_loss': False, 'split_bn': False, 'naflex_loader': False,
        'naflex_max_seq_len': 576, 'naflex_train_seq_lens': [128, 256, 576, 784, 1024], 'naflex_loss_scale': 'linear',
        'train_size_schedule': 'constant', 'train_size_schedule_spread': 0.65, 'train_size_random_mix': 0.1,
        'variable_batch_loss_scale': 'none', 'train_img_sizes': None, 'epochs': 7}
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(off))
    assert read_yaml(str(tmp_path / 'args.yaml')) == {'epochs': 7}
    for key, value in (('aug_splits', 3), ('naflex_max_seq_len', 128), ('train_size_schedule', 'progressive')):
        (tmp_path / 'args.yaml').write_text(yaml.safe_dump({key: value}))
        with pytest.raises(PSTError, match=key):
            read_yaml(str(tmp_path / 'args.yaml'))


@pytest.mark.parametrize('name,groups', [('train', TRAIN_FLAGS), ('validate', VALIDATE_FLAGS)])
def test_refused_flags_are_refused_with_a_sentence(name, groups):
    parse = parse_train_args if name == 'train' else parse_validate_args
    refused = [f for f in our_flags(groups).values() if f.refused]
    assert {'fuser', 'naflex_loader'} <= {f.key for f in refused}
    for flag in refused:
        for option in flag.names:
            with pytest.raises(PSTError, match=f'{option}: .*(not part|gone)'):
                parse([option] + ([] if flag.is_switch else ['1']))


@pytest.mark.parametrize('config', CONFIGS, ids=lambda p: p.name)
def test_configs_are_accepted_and_name_only_keys_of_timm(config):
    parse_train_args(['--config', str(config)])
    values = yaml.safe_load(config.read_text())
    assert set(values) <= {key_of(r) for r in timm_flags('train')}
    assert values['device_modules'] == ['pst_timm']


def write(tmp_path, text):
    path = tmp_path / 'config.yaml'
    path.write_text(text)
    return str(path)


def test_yaml_sets_and_flags_override(tmp_path):
    path = write(tmp_path, 'lr: 1e-3\nepochs: 7\nmodel_kwargs: {topk: 8}\nscale: [0.5, 1.0]\namp: true\nmean: 0.5\n')
    args = parse_train_args(['-c', path, '--epochs', '9'])
    assert (args.lr, args.epochs, args.model_kwargs) == (1e-3, 9, {'topk': 8})
    assert (args.scale, args.amp, args.mean) == ([0.5, 1.0], True, [0.5])
    assert not hasattr(args, 'config')


@pytest.mark.parametrize('text,message', [
    ('epoch: 7', r"config.yaml: unknown key 'epoch'. Did you mean epochs"),
    ('epochs: seven', r"config.yaml: epochs must be an integer, at least 1, got 'seven'"),
    ('epochs: 1.5', r'epochs must be an integer'),
    ('epochs: true', r'epochs must be an integer'),
    ('epochs: 0', r'epochs must be an integer, at least 1, got 0'),
    ('epochs:', r'epochs must be an integer'),
    ('amp: 1', r'amp must be true or false'),
    ('lr: fast', r'lr must be a number'),
    ('lr: .nan', r'lr must be a number'),
    ('hflip: 2', r'hflip must be a number from 0.0 to 1.0, got 2'),
    ('opt: 5', r'opt must be a text'),
    ('input_size: [3, 224]', r'input_size must be a list of 3 values'),
    ('mean: []', r'mean must be a list'),
    ('model_kwargs: topk', r'model_kwargs must be key=value pairs'),
    ('mixup_mode: half', r"mixup_mode must be one of 'batch'"),
    ('naflex_loader: true', r'naflex_loader: NaFlex'),
    ('- epochs', r'must hold one mapping'),
    ('a: [', r'not valid YAML'),
    ('scale: [1.0, 0.5]', r'smallest and a largest'),
    ('{amp: true, model_dtype: bfloat16}', r'float32 weights'),
])
def test_mistakes_in_yaml_are_named(tmp_path, text, message):
    with pytest.raises(PSTError, match=message):
        parse_train_args(['--config', write(tmp_path, text)])


def test_all_mistakes_of_a_file_are_listed(tmp_path):
    with pytest.raises(PSTError) as e:
        read_yaml(write(tmp_path, 'epoch: 7\nhflip: 2\n'))
    assert 'epochs' in str(e.value) and 'hflip' in str(e.value)


@pytest.mark.parametrize('words,message', [
    (['--epoch', '3'], r"unknown argument '--epoch'. Did you mean --epochs"),
    (['--epochs', 'x'], r"argument --epochs: expected an integer, at least 1, got 'x'"),
    (['--epochs', '0'], r'at least 1'),
    (['--clip-mode', 'half'], r"one of 'norm'"),
    (['--config', 'nowhere.yaml'], r'Cannot read the config nowhere.yaml'),
    (['--torchscript', '--torchcompile'], r'exclude each other'),
    (['--mean', '0.5', '0.5'], r'needs 1 or 3 values'),
])
def test_mistakes_on_the_command_line_are_named(words, message):
    with pytest.raises(PSTError, match=message):
        parse_train_args(words)


@pytest.mark.parametrize('parse', [parse_train_args, parse_validate_args])
def test_help_is_printed(parse, capsys):
    with pytest.raises(SystemExit) as e:
        parse(['--help'])
    assert e.value.code == 0
    printed = capsys.readouterr().out
    assert '--model-kwargs' in printed and 'naflex' not in printed


def test_keyword_arguments_are_checked_alike():
    assert train_args(epochs=3).epochs == 3
    assert train_args(epochs=3) == parse_train_args(['--epochs', '3'])
    with pytest.raises(PSTError, match='Did you mean epochs'):
        train_args(epoch=3)


def test_arguments_survive_a_round_trip_through_yaml(tmp_path):
    args = parse_train_args([
        'some/data', '--model-kwargs', 'topk=8', 'fine_fusion=joint', '--mean', '0.5', '--torchcompile', '--amp'])
    assert args.torchcompile == 'inductor' and args.data_dir == 'some/data'
    write_yaml(args, str(tmp_path / 'args.yaml'))
    assert parse_train_args(['--config', str(tmp_path / 'args.yaml')]) == args


def test_defaults_are_not_shared_between_runs():
    parse_train_args([]).model_kwargs['topk'] = 8
    train_args().scale.append(3.)
    assert parse_train_args([]).model_kwargs == {} and train_args().scale == [0.08, 1.0]


@pytest.mark.parametrize('recipe', ['paper', 'a2'])
def test_recipes_differ_in_nothing_but_the_model(recipe):
    values = [
        yaml.safe_load((HERE.parents[1] / 'configs' / f'{model}_{recipe}.yaml').read_text())
        for model in ('resnet18_pst', 'resnet26_pst', 'resnet50_pst', 'resnet101_pst')]
    assert [v.pop('model') for v in values] == ['resnet18_pst', 'resnet26_pst', 'resnet50_pst', 'resnet101_pst']
    assert all(v == values[0] for v in values)
    world = 8
    assert values[0]['batch_size'] * world == {'paper': 256, 'a2': 2048}[recipe]


@pytest.mark.parametrize('groups', [TRAIN_FLAGS, VALIDATE_FLAGS])
def test_every_flag_has_a_role(groups):
    keys = [key for role in ROLES for key in keys_with_role(role, groups=groups)]
    assert sorted(keys) == sorted(f.key for f in our_flags(groups).values() if not f.refused)
    assert keys_with_role('data', groups=groups)[:2] == ['data', 'data_dir']


def test_training_and_validation_share_flags():
    shared = shared_keys('model', 'preprocessing', 'machine')
    assert {'model', 'model_kwargs', 'img_size', 'data_on_device', 'device', 'workers'} <= set(shared)
    # of training alone; of another role; of another role in training than in validation
    assert not {'stored_size', 'data_dir', 'batch_size'} & set(shared)


def test_a_recipe_is_what_differs_beside_the_data_and_the_machine(tmp_path):
    args = train_args(
        data_dir=str(tmp_path), output='runs', experiment='one', workers=1, device='cpu', log_interval=5, opt='sgd',
        lr=0.1, num_classes=10, img_size=64, model_kwargs={'topk': 8}, pretrained=True, seed=1)
    assert recipe(args) == recipe(vars(args)) == dict(
        model='resnet50', lr=0.1, num_classes=10, img_size=64, model_kwargs={'topk': 8}, pretrained=True, seed=1)
    assert recipe(train_args(**recipe(args))) == recipe(args)


@pytest.mark.parametrize('key', ['trunk_checkpoint', 'initial_checkpoint', 'pretrained_path'])
def test_a_recipe_names_weights_that_others_have(tmp_path, monkeypatch, key):
    monkeypatch.chdir(tmp_path)
    for name in ('resnet50.a1_in1k', 'hf-hub:timm/resnet50.a1_in1k'):
        assert recipe(train_args(**{key: name}))[key] == name
    Path('resnet50.mine').touch()
    for path in ('resnet50.mine', str(tmp_path / 'last.pth.tar'), 'gone.safetensors'):
        # of a file the name alone: no path of this machine, and no run without it by mistake
        assert recipe(train_args(**{key: path}))[key] == Path(path).name
    assert key not in recipe(train_args(**{key: ''}))


@pytest.mark.parametrize('parse', [parse_train_args, parse_validate_args])
def test_the_moving_average_is_asked_for_or_refused_or_neither(tmp_path, parse):
    words = ['--initial-checkpoint' if parse is parse_train_args else '--checkpoint', 'last.pth.tar']
    found = [parse([*words, *more]).use_ema for more in ([], ['--use-ema'], ['--no-use-ema'])]
    assert found == [None, True, False]
    for value in (None, True, False):
        path = write(tmp_path, f'use_ema: {str(value).lower() if value is not None else "null"}')
        assert parse([*words, '--config', path]).use_ema is value
    # the command line comes last
    assert parse([*words, '--config', write(tmp_path, 'use_ema: true'), '--no-use-ema']).use_ema is False
    with pytest.raises(PSTError, match='use_ema must be true or false, got 1'):
        parse([*words, '--config', write(tmp_path, 'use_ema: 1')])
    args = parse([*words, '--no-use-ema'])
    write_yaml(args, str(tmp_path / 'args.yaml'))
    assert parse(['--config', str(tmp_path / 'args.yaml')]) == args


def test_what_a_checkpoint_may_know_better_is_unset():
    """So `validate` tells what the user gave from what it may take from the checkpoint."""
    args = parse_validate_args(['--checkpoint', 'last.pth.tar'])
    keys = (
        'model', 'num_classes', 'in_chans', 'img_size', 'input_size', 'crop_pct', 'mean', 'std', 'interpolation',
        'crop_mode', 'gp', 'model_kwargs', 'use_ema')
    assert not [key for key in keys if getattr(args, key)]


def test_the_page_names_the_flags_that_timm_does_not_have():
    page = (HERE.parents[1] / 'docs' / 'training.md').read_text()
    [row] = [line for line in page.splitlines() if line.startswith('| further flags |')]
    for told, name, groups in zip(row.split('; in validation '), ('train', 'validate'), (TRAIN_FLAGS, VALIDATE_FLAGS)):
        theirs = {key_of(timm_flag) for timm_flag in timm_flags(name)}
        ours = {flag.names[0] for key, flag in our_flags(groups).items() if key not in theirs}
        assert set(re.findall(r'--[a-z-]+', told)) == ours


def test_what_the_kept_workers_would_not_hear_is_refused():
    wrong = dict(mixup=0.2, mixup_off_epoch=1, use_multi_epochs_loader=True)
    with pytest.raises(PSTError, match='--mixup-off-epoch cannot reach the workers'):
        train_args(**wrong)
    for right in (dict(workers=0), dict(no_prefetcher=True), dict(mixup_off_epoch=0)):
        train_args(**{**wrong, **right})
