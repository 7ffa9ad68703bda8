"""A model folder is trained further as the engine would, from where it is, and to its end whatever comes between."""
import json
import shutil

import pytest
import timm
import torch

from pst_timm.checkpoints import load_model
from pst_timm.checkpoints.folder import save_folder
from pst_timm.deploy import finetune as module
from pst_timm.deploy.finetune import finetune, finetune_flags, work_folder
from pst_timm.engine import train, training
from pst_timm.utils.errors import Interrupted, PSTError
from tests.engine.helpers import assert_same_weights, load_weights, tiny_train_args
from tests.engine.test_resume import at_step, stop_politely

NAMES = ['class0', 'class1', 'class2']
FLAGS = dict(
    img_size=48, batch_size=8, workers=0, device='cpu', epochs=2, hflip=0., color_jitter=0., lr=0.02, log_interval=1)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp('models') / 'model'
    save_folder(timm.create_model('test_resnet_pst', num_classes=3), folder, NAMES)
    return folder


@pytest.fixture
def folder(model, tmp_path):
    return shutil.copytree(model, tmp_path / 'model')


@pytest.fixture
def data(images):
    return dict(data_dir=str(images))


def test_it_is_a_training_of_the_engine_from_the_weights_of_the_folder(folder, data, images, tmp_path, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    path = finetune(folder, data, teacher=str(folder), model_ema=True, model_ema_decay=0.5, **FLAGS)
    expected = train(tiny_train_args(
        images, tmp_path / 'expected', model=f'local-dir:{folder}', pretrained=True, epochs=2, lr=0.02, smoothing=0.1,
        kd_model_name=f'local-dir:{folder}', model_ema=True, model_ema_decay=0.5, sched_on_updates=True))
    expected = expected.output_dir / 'last.pth.tar'
    for key in ('state_dict', 'state_dict_ema'):
        assert_same_weights(load_weights(path, key), load_weights(expected, key))
    assert_same_weights(load_model(path).state_dict(), load_weights(path, 'state_dict_ema'))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    # the log stays, and one checkpoint
    assert path.parent == work_folder(folder) and path.name == 'last.pth.tar'
    assert not list(path.parent.glob('checkpoint-*')) and not (path.parent / 'model_best.pth.tar').exists()
    assert len((path.parent / 'summary.csv').read_text().splitlines()) == 3
    # what is done is not done again
    monkeypatch.setattr(module, 'train', None)
    assert finetune(folder, data, teacher=str(folder), model_ema=True, model_ema_decay=0.5, **FLAGS) == path


def test_it_goes_on_where_it_was_stopped(folder, data, tmp_path, monkeypatch):
    whole = load_weights(finetune(folder, data, work=tmp_path / 'whole', **FLAGS))
    with monkeypatch.context() as patch:
        at_step(patch, 8, stop_politely)
        with pytest.raises(Interrupted, match='the same command goes on') as e:
            finetune(folder, data, **FLAGS)
    assert e.value.exit_code == 75
    steps = []
    backward = training.backward
    monkeypatch.setattr(training, 'backward', lambda *args: (steps.append(1), backward(*args)))
    assert_same_weights(load_weights(finetune(folder, data, **FLAGS)), whole)
    assert len(steps) == 4  # of 12


def test_a_run_of_something_else_is_left_alone_or_replaced(folder, data, tmp_path):
    flags = dict(FLAGS, epochs=1)
    path = finetune(folder, data, **flags)
    first = path.read_bytes()
    with pytest.raises(PSTError, match=r'began otherwise \(--lr\)'):
        finetune(folder, data, **dict(flags, lr=0.01))
    torch.manual_seed(2)
    save_folder(timm.create_model('test_resnet_pst', num_classes=3), folder, NAMES)
    with pytest.raises(PSTError, match=r'began otherwise \(the model\)'):
        finetune(folder, data, **flags)
    assert path.read_bytes() == first
    assert finetune(folder, data, overwrite=True, **flags).read_bytes() != first
    foreign = tmp_path / 'foreign'
    foreign.mkdir()
    (foreign / 'thesis.tex').write_text('mine')
    with pytest.raises(PSTError, match='holds no fine-tuning'):
        finetune(folder, data, work=foreign, overwrite=True, **flags)
    for hostile in ('{', '[1]', json.dumps({'plan': 'x', 'done': True})):
        (foreign / 'finetune.json').write_text(hostile)
        with pytest.raises(PSTError, match=r'holds no fine-tuning|finetune\.json'):
            finetune(folder, data, work=foreign, **flags)
    assert (foreign / 'thesis.tex').read_text() == 'mine'


def test_data_of_other_classes_is_refused_before_the_work(folder, data, tmp_path):
    save_folder(load_model(folder), folder, ['class1', 'class0', 'class2'])
    with pytest.raises(PSTError, match='same classes in another order'):
        finetune(folder, data, **FLAGS)
    save_folder(timm.create_model('test_resnet_pst', num_classes=4), folder)
    with pytest.raises(PSTError, match=r'has 3 classes .* and the model has 4'):
        finetune(folder, data, **FLAGS)
    (folder / 'model.safetensors').unlink()
    with pytest.raises(PSTError, match=r'model\.safetensors cannot be read'):
        finetune(folder, data, **FLAGS)


def test_the_flags_begin_with_how_the_source_augmented_its_images(images, tmp_path):
    source = train(tiny_train_args(images, tmp_path, epochs=1, hflip=0.25, scale=[0.5, 1.])).output_dir
    plain, told = finetune_flags(), finetune_flags(['--epochs', '3'], str(source))
    assert plain['hflip'] == 0.5 and plain['epochs'] == module.DEFAULTS['epochs'] and told['epochs'] == 3
    assert (told['hflip'], told['scale'], told['smoothing']) == (0.25, [0.5, 1.], 0.)
    assert told['batch_size'] == plain['batch_size'], 'how the images are augmented, and no more'
    assert finetune_flags(['--hflip', '0.1'], str(source))['hflip'] == 0.1
    assert finetune_flags((), 'resnet18')['hflip'] == 0.5
    assert not {'model', 'data_dir', 'output'} & set(plain)


def test_a_config_says_what_it_says_and_no_more(tmp_path):
    path = tmp_path / 'recipe.yaml'
    path.write_text('opt: adamw\nlr: 0.001\nepochs: 5\nopt_betas: [0.9, 0.99]\n')
    flags = finetune_flags(['--config', str(path), '--epochs', '7'])
    assert (flags['opt'], flags['lr'], flags['epochs'], flags['opt_betas']) == ('adamw', 0.001, 7, [0.9, 0.99])
    assert flags['warmup_epochs'] == 0 and flags['sched_on_updates']
    path.write_text('epoch: 5\n')
    with pytest.raises(PSTError, match=r"recipe\.yaml: unknown key 'epoch'"):
        finetune_flags(['-c', str(path)])
    path.write_text('model: resnet18\n')
    with pytest.raises(PSTError, match='--model: a fine-tuning begins with the model'):
        finetune_flags(['-c', str(path)])


@pytest.mark.parametrize('words, said', [
    (['--model', 'resnet18'], '--model'), (['--experiment', 'x', '--output', 'y'], '--output, --experiment'),
    (['images'], '--data'), (['--resume', 'auto'], '--resume'), (['--epoch', '3'], '--epochs'),
    (['--val-split', 'test'], '--val-split is no flag for the training alone'),
])
def test_what_the_command_decides_is_not_for_the_flags(words, said):
    with pytest.raises(PSTError, match=said):
        finetune_flags(words)
