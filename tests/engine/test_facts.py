"""A checkpoint knows what it is: whoever opens it need not be told again."""
import logging
import shutil

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.models import _registry, register_model

from pst_timm.checkpoints import convert, label_names, load_model, read_checkpoint
from pst_timm.engine import factories, train, validate, validate_args
from pst_timm.hub import publish, save_folder
from pst_timm.utils.errors import PSTError

from .helpers import tiny_train_args

SETTINGS = dict(
    img_size=48, crop_pct=0.8, interpolation='bilinear', mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3],
    model_kwargs=dict(topk=2, fine_fusion='joint'), model_ema=True, model_ema_decay=0.5)


@pytest.fixture(scope='module')
def run(images, tmp_path_factory):
    """A run with a size, a crop, a normalisation and an attention that are not the model's own."""
    return train(tiny_train_args(images, tmp_path_factory.mktemp('facts'), **SETTINGS, epochs=1)).output_dir


def evaluate(images, **values):
    [results] = validate(validate_args(data_dir=str(images), batch_size=6, workers=0, device='cpu', **values))
    return results


def test_what_is_in_it(run, images):
    found = read_checkpoint(run / 'last.pth.tar')
    assert found.arch == 'test_resnet_pst'
    assert found.model_args == dict(topk=2, fine_fusion='joint')
    assert found.pretrained_cfg == dict(
        num_classes=3, label_names=['class0', 'class1', 'class2'], input_size=[3, 48, 48], crop_pct=0.8,
        crop_mode='center', interpolation='bilinear', mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3])
    assert found.recipe['model'] == 'test_resnet_pst' and found.recipe['lr'] == 0.05
    assert not {'data_dir', 'output', 'workers', 'device'} & set(found.recipe)


@pytest.mark.parametrize('name', ['', 'last.pth.tar', 'converted.safetensors'])
def test_a_model_comes_with_all_of_it(run, name):
    if name.startswith('converted'):
        convert(run / 'last.pth.tar', run / name)
    model = load_model(run / name)
    config = resolve_data_config(model=model)
    assert config['input_size'] == (3, 48, 48) and config['crop_pct'] == 0.8 and config['interpolation'] == 'bilinear'
    assert list(config['mean']) == [0.4, 0.5, 0.6] and list(config['std']) == [0.2, 0.25, 0.3]
    assert label_names(model) == ['class0', 'class1', 'class2']
    assert model.inference_settings() == dict(topk=2, fine_fusion='joint')


def test_validation_needs_the_checkpoint_alone(run, images):
    """With nothing but the checkpoint it measures what the run measured, of its moving average, to the last digit."""
    alone = evaluate(images, checkpoint=str(run / 'last.pth.tar'))
    line = (run / 'summary.csv').read_text().splitlines()
    summary = dict(zip(line[0].split(','), line[1].split(',')))
    assert alone['loss'] == pytest.approx(float(summary['eval_loss']), abs=1e-5)
    assert (alone['img_size'], alone['crop_pct'], alone['interpolation']) == (48, 0.8, 'bilinear')
    assert alone['model'] == 'test_resnet_pst'
    told = evaluate(
        images, checkpoint=str(run / 'last.pth.tar'), model='test_resnet_pst', num_classes=3,
        **{k: SETTINGS[k] for k in ('img_size', 'crop_pct', 'interpolation', 'mean', 'std', 'model_kwargs')})
    assert told['loss'] == alone['loss']


def test_a_flag_overrides_and_the_difference_is_said(run, images, caplog):
    with caplog.at_level(logging.WARNING):
        results = evaluate(images, checkpoint=str(run / 'last.pth.tar'), img_size=64, crop_pct=0.8)
    assert results['img_size'] == 64
    said = [r.message for r in caplog.records if 'knows' in r.message]
    assert len(said) == 1 and 'input_size (3, 48, 48)' in said[0] and '(3, 64, 64)' in said[0]
    with pytest.raises(PSTError, match='has 3 classes, not 5'):
        evaluate(images, checkpoint=str(run / 'last.pth.tar'), num_classes=5)
    with pytest.raises(PSTError, match='not a checkpoint of resnet18_pst'):
        evaluate(images, checkpoint=str(run / 'last.pth.tar'), model='resnet18_pst')
    assert 'says that it is a test_resnet_pst; it is read as the resnet18_pst' in caplog.text


def test_the_moving_average_is_one_choice_everywhere(run, images):
    checkpoint = str(run / 'last.pth.tar')
    content = torch.load(checkpoint, weights_only=False)
    key = 'conv1.0.weight'
    assert torch.equal(read_checkpoint(checkpoint).weights[key], content['state_dict_ema'][key])
    assert torch.equal(read_checkpoint(checkpoint, use_ema=True).weights[key], content['state_dict_ema'][key])
    assert torch.equal(read_checkpoint(checkpoint, use_ema=False).weights[key], content['state_dict'][key])
    losses = [evaluate(images, checkpoint=checkpoint, use_ema=e)['loss'] for e in (None, True, False)]
    assert losses[0] == losses[1] != losses[2]
    del content['state_dict_ema']
    torch.save(content, run / 'plain.pth.tar')
    assert evaluate(images, checkpoint=str(run / 'plain.pth.tar'))['loss'] == losses[2]
    with pytest.raises(PSTError, match='holds no moving average'):
        evaluate(images, checkpoint=str(run / 'plain.pth.tar'), use_ema=True)


def test_an_older_checkpoint_is_read_from_its_arguments(run, images):
    """What was written before there were facts, or by timm's own script."""
    content = torch.load(run / 'last.pth.tar', weights_only=False)
    del content['facts']
    torch.save(content, run / 'older.pth.tar')
    alone = evaluate(images, checkpoint=str(run / 'older.pth.tar'))
    assert alone['loss'] == evaluate(images, checkpoint=str(run / 'last.pth.tar'))['loss']


def test_a_folder_may_name_the_architecture(run, images):
    save_folder(load_model(run), run / 'folder')
    results = evaluate(images, checkpoint=str(run / 'last.pth.tar'), model=f'local-dir:{run / "folder"}')
    assert results['loss'] == evaluate(images, checkpoint=str(run / 'last.pth.tar'))['loss']


def test_parts_of_a_model(run):
    features = load_model(run, num_classes=0)
    assert features(torch.randn(1, 3, 48, 48)).shape == (1, features.head_hidden_size)
    with pytest.raises(PSTError, match='for feature maps'):
        load_model(run, features_only=True)


def test_a_name_is_not_a_folder_that_is_called_alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'test_resnet_pst').mkdir()
    assert load_model('test_resnet_pst').num_classes == 10
    with pytest.raises(PSTError, match='has neither'):
        load_model('./test_resnet_pst')


def test_results_tell_which_weights_were_measured(run, images, tmp_path):
    """So that the card never carries the accuracy of other weights."""
    for use_ema in (True, False):
        results = str(tmp_path / f'{use_ema}.csv')
        validate(validate_args(
            data_dir=str(images), batch_size=6, workers=0, device='cpu', checkpoint=str(run / 'last.pth.tar'),
            use_ema=use_ema, results_file=results))
        kwargs = dict(results=results, dry_run=True, folder=tmp_path / f'folder{use_ema}', overwrite=True)
        assert publish(run / 'last.pth.tar', 'acme/tiny', use_ema=use_ema, **kwargs).accuracy is not None
        with pytest.raises(PSTError, match='would not be published'):
            publish(run / 'last.pth.tar', 'acme/tiny', use_ema=not use_ema, **kwargs)


def test_the_average_stays_one_through_both_conversions(run, tmp_path):
    there, back = tmp_path / 'there.safetensors', tmp_path / 'back.pth.tar'
    convert(run / 'last.pth.tar', there)
    convert(there, back)
    for path in (there, back):
        assert read_checkpoint(path, use_ema=True).ema
        with pytest.raises(PSTError, match='holds only the moving average'):
            read_checkpoint(path, use_ema=False)


def test_a_run_of_an_older_version_goes_on_without_the_state_of_its_optimizer(images, tmp_path, caplog):
    """There the gate was no parameter of the optimizer."""
    args = dict(epochs=1, opt='adamw')
    path = train(tiny_train_args(images, tmp_path, **args)).output_dir / 'last.pth.tar'
    content = torch.load(path, weights_only=False)
    for group in content['optimizer']['param_groups']:
        group['params'] = group['params'][:-1]
    torch.save(content, path)
    again = tiny_train_args(images, tmp_path, **dict(args, epochs=2), resume='auto')
    with pytest.raises(PSTError, match=r'does not fit this run.*--no-resume-opt'):
        train(again)
    del content['facts']
    torch.save(content, path)
    with caplog.at_level(logging.WARNING):
        assert len(train(again).history) == 1
    assert 'optimizer of an older version' in caplog.text


def test_a_model_that_is_registered_without_a_configuration(tmp_path):
    @register_model
    def bare_net(pretrained=False, **kwargs):
        return timm.create_model('test_resnet', num_classes=3)

    try:
        torch.save({'state_dict': bare_net().state_dict()}, tmp_path / 'bare.pth')
        assert load_model(tmp_path / 'bare.pth', arch='bare_net').num_classes == 3
    finally:
        del _registry._model_entrypoints['bare_net']


def test_other_names_of_the_classes_are_refused_and_can_be_mapped(run, images, tmp_path):
    for i, name in enumerate(('cat', 'class1', 'dog')):
        shutil.copytree(images / 'validation' / f'class{i}', tmp_path / 'validation' / name)
    checkpoint = str(run / 'last.pth.tar')
    expected = evaluate(images, checkpoint=checkpoint)
    with pytest.raises(PSTError, match=r'lacks class0, class2 and alone has cat, dog.*--class-map'):
        evaluate(tmp_path, checkpoint=checkpoint)
    (tmp_path / 'map.txt').write_text('cat\nclass1\ndog\n')
    mapped = evaluate(tmp_path, checkpoint=checkpoint, class_map=str(tmp_path / 'map.txt'))
    assert mapped['loss'] == expected['loss']
    (tmp_path / 'map.txt').write_text('class1\ncat\ndog\n')
    with pytest.raises(PSTError, match=r"gives 'class1' the index 0, and in .* it is class 1"):
        evaluate(tmp_path, checkpoint=checkpoint, class_map=str(tmp_path / 'map.txt'))


def test_a_trunk_from_a_file_is_said_and_stays_in_the_recipe(images, tmp_path, caplog):
    torch.save(timm.create_model('test_resnet_pst').state_dict(), tmp_path / 'trunk.pth')
    with caplog.at_level(logging.INFO):
        folder = train(tiny_train_args(
            images, tmp_path, epochs=1, trunk_checkpoint=str(tmp_path / 'trunk.pth'))).output_dir
    assert 'trunk.pth: TrunkLoad(loaded' in caplog.text
    assert read_checkpoint(folder).recipe['trunk_checkpoint'] == 'trunk.pth'


def test_a_checkpoint_that_does_not_tell_its_size_says_so(run, images, tmp_path, caplog):
    content = torch.load(run / 'last.pth.tar', weights_only=False)
    torch.save({'state_dict': content['state_dict']}, tmp_path / 'bare.pth')
    kwargs = dict(checkpoint=str(tmp_path / 'bare.pth'), model='test_resnet_pst')
    assert evaluate(images, **kwargs, img_size=48)['img_size'] == 48
    assert 'does not tell the image size' not in caplog.text
    assert evaluate(images, **kwargs)['img_size'] == 160
    assert 'does not tell the image size it was trained at; the 160 px' in caplog.text


def test_garbled_facts_are_one_sentence(run):
    content = torch.load(run / 'last.pth.tar', weights_only=False)
    for facts in ({'colour': 'red'}, [1, 2], 'resnet'):
        torch.save({**content, 'facts': facts}, run / 'garbled.pth.tar')
        with pytest.raises(PSTError, match='garbled'):
            read_checkpoint(run / 'garbled.pth.tar')


def test_a_name_without_weights_is_said_to_be_random(caplog):
    load_model('resnet34_pst')
    assert 'resnet34_pst has no published weights, so these are random ones' in caplog.text
    caplog.clear()
    assert label_names(load_model('test_resnet_pst')) == list('0123456789') and not caplog.records
    with pytest.raises(PSTError, match='know 10 classes, not 4'):
        load_model('test_resnet_pst', num_classes=4)


def test_the_folded_model_answers_alike(run):
    x = torch.randn(2, 3, 48, 48)
    plain, folded = load_model(run), load_model(run, reparam=True)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    with torch.no_grad():
        assert torch.allclose(plain(x), folded(x), atol=1e-4)
    assert timm.data.resolve_data_config(model=folded)['input_size'] == (3, 48, 48)


def test_training_starts_from_the_weights_that_are_asked_for(run, images, tmp_path):
    checkpoint, key = str(run / 'last.pth.tar'), 'conv1.0.weight'
    content = torch.load(checkpoint, weights_only=False)
    for use_ema, entry in ((None, 'state_dict_ema'), (True, 'state_dict_ema'), (False, 'state_dict')):
        args = tiny_train_args(images, tmp_path / str(use_ema), initial_checkpoint=checkpoint, use_ema=use_ema)
        assert torch.equal(factories.create_train_model(args).state_dict()[key], content[entry][key])
