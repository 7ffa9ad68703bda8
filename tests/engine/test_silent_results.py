"""What a careless flag or file once changed without a word, with a result that looked like any other."""
import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from pst_timm.commands.validate import main as validate_main
from pst_timm.engine import parse_train_args, train, train_args, validate
from pst_timm.engine.training import prepare
from pst_timm.utils.errors import PSTError

from .helpers import TINY, tiny_train_args, tiny_validate_args


def state_of(num_classes, seed=1, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model('test_resnet_pst', num_classes=num_classes, **kwargs).state_dict()


@pytest.fixture
def five(tmp_path):
    """Weights of a classifier of five classes."""
    state = state_of(5)
    torch.save(state, tmp_path / 'five.pth')
    return str(tmp_path / 'five.pth'), state


def trained(run):
    return run.task.get_eval_model().state_dict()


@pytest.mark.parametrize('pretrained', [False, True])
def test_pretrained_path_loads_with_and_without_pretrained(images, tmp_path, five, pretrained):
    path, state = five
    found = trained(prepare(tiny_train_args(images, tmp_path, pretrained_path=path, pretrained=pretrained)))
    for key, value in state.items():
        if key.startswith('fc.'):
            assert found[key].shape[0] == 3
        else:
            assert torch.equal(found[key], value), key


def test_pretrained_path_adapts_the_first_layer_as_timm_does(images, tmp_path, five):
    path, state = five
    found = trained(prepare(tiny_train_args(
        images, tmp_path, pretrained_path=path, in_chans=1, mean=[0.5], std=[0.5])))
    assert torch.allclose(found['conv1.0.weight'], state['conv1.0.weight'].sum(1, keepdim=True))


@pytest.mark.parametrize('change', [
    lambda state: {f'backbone.{k}': v for k, v in state.items()},
    lambda state: {k: v for k, v in state.items() if not k.startswith('layer3.')},
    lambda state: {},
    lambda state: {'net': {'weights': state}},
    lambda state: {k: v * float('nan') if v.is_floating_point() else v for k, v in state.items()},
], ids=['prefixed', 'some', 'empty', 'wrapped', 'nan'])
def test_pretrained_path_never_ends_in_a_random_model(images, tmp_path, change):
    torch.save(change(state_of(3)), tmp_path / 'start.pth')
    with pytest.raises(PSTError, match=r'start\.pth'):
        prepare(tiny_train_args(images, tmp_path, pretrained_path=str(tmp_path / 'start.pth'), pretrained=True))


def test_the_average_is_taken_where_it_is_asked_for(images, tmp_path):
    weights, average = state_of(3, 1), state_of(3, 2)
    torch.save({'state_dict': weights, 'state_dict_ema': average}, tmp_path / 'both.pth')
    torch.save({'state_dict': weights}, tmp_path / 'one.pth')
    for flag in ('pretrained_path', 'initial_checkpoint'):
        for use_ema, expected in ((True, average), (False, weights), (None, average)):
            args = tiny_train_args(images, tmp_path, use_ema=use_ema, **{flag: str(tmp_path / 'both.pth')})
            assert torch.equal(trained(prepare(args))['conv1.0.weight'], expected['conv1.0.weight'])
        with pytest.raises(PSTError, match='--use-ema'):
            prepare(tiny_train_args(images, tmp_path, use_ema=True, **{flag: str(tmp_path / 'one.pth')}))
    with pytest.raises(PSTError, match='neither is given'):
        tiny_train_args(images, tmp_path, use_ema=True)
    with pytest.raises(PSTError, match='none is given'):
        tiny_validate_args(images, use_ema=True, num_classes=10)


def test_weights_that_are_no_numbers_are_not_evaluated(images, tmp_path):
    state = state_of(3)
    state['layer1.0.bn1.running_mean'][0] = float('nan')
    save_file(state, tmp_path / 'nan.safetensors')
    with pytest.raises(PSTError, match=r'nan\.safetensors has NaN .* layer1\.0\.bn1\.running_mean'):
        validate(tiny_validate_args(images, checkpoint=str(tmp_path / 'nan.safetensors')))


def test_a_loss_that_is_no_number_is_no_result(images, tmp_path):
    state = {k: v * 1e25 if k == 'fc.weight' else v for k, v in state_of(3).items()}
    state['pst.conv_in.bn.weight'] *= 1e25
    state['conv_head.bn.weight'] *= 1e25
    save_file(state, tmp_path / 'large.safetensors')
    with pytest.raises(PSTError, match=r'the loss is (nan|inf)'):
        validate(tiny_validate_args(images, checkpoint=str(tmp_path / 'large.safetensors')))


def test_several_models_of_which_one_fails_end_with_a_failure(images, tmp_path, capfd):
    (tmp_path / 'classes.txt').write_text('class0\nclass1\nclass2\n')  # which the model calls 0, 1 and 2
    words = [
        '--data-dir', str(images), '-j', '0', '--device', 'cpu', '--img-size', '48', '--class-map',
        str(tmp_path / 'classes.txt')]
    assert validate_main([*words, '--model', 'test_resnet_pst,test_resnet_pst.nope']) == 1
    out, err = capfd.readouterr()
    assert [('top1' in row, 'error' in row) for row in json.loads(out.split('--result\n')[1])] == [
        (True, False), (False, True)]
    assert 'of test_resnet_pst.nope: the reasons are above' in err
    assert validate_main([*words, '--model', 'test_resnet_pst']) == 0


def test_a_published_model_keeps_its_classes(images, tmp_path):
    """A classifier of another size is a random one, which is no use in an evaluation."""
    save_file(state_of(5), tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text(json.dumps(dict(
        architecture='test_resnet_pst', num_classes=5,
        pretrained_cfg=dict(num_classes=5, input_size=[3, 48, 48], first_conv='conv1.0', classifier='fc'))))
    with pytest.raises(PSTError, match='know 5 classes, not 3'):
        validate(tiny_validate_args(images, model=f'local-dir:{tmp_path}', num_classes=3))


@pytest.mark.parametrize('flag', ['lr', 'lr_base', 'crop_pct', 'clip_grad'])
def test_zero_is_not_taken_for_unset(flag):
    with pytest.raises(PSTError, match=f'{flag} must be a number'):
        train_args(**{flag: 0})


def test_a_start_beyond_the_end_is_no_finished_run(images, tmp_path):
    with pytest.raises(PSTError, match='--start-epoch 2 is beyond the end: the epochs of this run are 0 to 1'):
        train(tiny_train_args(images, tmp_path, epochs=2, start_epoch=2))
    # cooldown and warm-up prefix are epochs of the run
    assert prepare(tiny_train_args(images, tmp_path, epochs=2, start_epoch=2, cooldown_epochs=1)).start.epoch == 2


def test_the_model_gets_the_classes_of_the_data(images, tmp_path, caplog):
    with caplog.at_level('INFO'):
        run = prepare(tiny_train_args(images, tmp_path, num_classes=None))
    assert trained(run)['fc.weight'].shape[0] == 3 and run.args.num_classes == 3
    assert 'has 3 classes, and so gets the model' in caplog.text


def test_a_teacher_does_not_answer_at_random(images, tmp_path):
    with pytest.raises(PSTError, match='knows 10 classes, and the data has 3'):
        prepare(tiny_train_args(images, tmp_path, kd_model_name='test_resnet_pst'))
    prepare(tiny_train_args(images, tmp_path, kd_model_name='test_resnet_pst', kd_distill_type='feature'))


@pytest.mark.parametrize('policy', ['rand-mhigh', 'rand-m9-tall', 'augmix-strong', 'original-std'])
def test_no_part_of_an_augmentation_is_skipped(policy):
    with pytest.raises(PSTError, match='--aa'):
        parse_train_args(['--aa', policy])


@pytest.mark.parametrize('policy', [
    '', 'rand-m9-mstd0.5-inc1', 'rand-m9-n3-mstd0.5', 'rand-mstd1-tweights', 'augmix-m5-w4-d2', 'original-mstd0.5',
    '3a', 'v0', 'rand-m6-n4-p0.5-mmax10'])
def test_the_augmentations_of_timms_documentation_are_read(policy):
    assert parse_train_args(['--aa', policy]).aa == policy


def test_strong_posterizing_makes_an_image_black_and_ends_no_run(images, tmp_path, monkeypatch):
    """Newer Pillow refuses the 0 bits that timm asks for at full strength."""
    monkeypatch.setattr('timm.data.auto_augment._RAND_INCREASING_TRANSFORMS', ['PosterizeIncreasing'])
    run = prepare(tiny_train_args(images, tmp_path, aa='rand-m10-p1.0-inc1', scale=[1., 1.]))
    [batch, _] = next(iter(run.data.train))
    assert torch.equal(batch, batch[:1, :, :1, :1].expand_as(batch))


def test_arguments_of_an_optimizer_are_not_dropped(images, tmp_path):
    for kwargs, message in ((dict(betas=[0.9, 0.9]), 'sgd has no betas'), (dict(nesterov='no'), 'True or False')):
        with pytest.raises(PSTError, match=message):
            prepare(tiny_train_args(images, tmp_path, opt_kwargs=kwargs))


def test_second_derivatives_are_to_be_had(images, tmp_path):
    """adahessian ended in a traceback beside fused attention."""
    assert train(tiny_train_args(images, tmp_path, opt='adahessian', epochs=1)).history[0]['loss'] > 0
    assert timm.layers.use_fused_attn()


@pytest.mark.parametrize('labels', ['-1 0 1', '0 0 1'])
def test_labels_are_not_counted_from_the_end_nor_twice(images, tmp_path, labels):
    save_file(state_of(3), tmp_path / 'good.safetensors')
    (tmp_path / 'labels.txt').write_text(labels)
    with pytest.raises(PSTError, match='--valid-labels'):
        validate(tiny_validate_args(
            images, checkpoint=str(tmp_path / 'good.safetensors'), valid_labels=str(tmp_path / 'labels.txt')))


def test_results_are_not_written_over_the_weights(images, tmp_path):
    save_file(state_of(3), tmp_path / 'good.safetensors')
    before = (tmp_path / 'good.safetensors').read_bytes()
    with pytest.raises(PSTError, match='holds no results'):
        validate(tiny_validate_args(
            images, checkpoint=str(tmp_path / 'good.safetensors'), results_file=str(tmp_path / 'good.safetensors')))
    assert (tmp_path / 'good.safetensors').read_bytes() == before


def test_tiny_flags_are_those_of_a_run_that_works():
    """Or the tests above would be refused for another reason."""
    train_args(**TINY)
