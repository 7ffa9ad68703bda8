"""Every flag that should change training does, in a way that can be seen."""
import copy

import pytest
import timm
import torch
from timm.layers import convert_sync_batchnorm
from timm.models import load_checkpoint

from pst_timm.checkpoints import create_model, load_model, read_checkpoint
from pst_timm.checkpoints.folder import save_folder
from pst_timm.data.loaders import note_workers
from pst_timm.engine import factories, jobs, train, train_args, transfer
from pst_timm.engine.jobs import expected_channels, run_title
from pst_timm.engine.training import prepare
from pst_timm.utils.devices import available_cores
from pst_timm.utils.errors import PSTError, Unavailable

from .helpers import assert_same_weights, load_weights, tiny_train_args


def last_weights(result, key='state_dict'):
    return load_weights(result.output_dir / 'last.pth.tar', key)


def assert_close(after, expected):
    far = {k: (after[k].float() - v.float()).abs().max().item() for k, v in expected.items()}
    assert max(far.values()) < 1e-3, max(far.items(), key=lambda item: item[1])


def changed(before, after):
    """Names of the weights that differ."""
    return {k for k in before if not torch.equal(before[k], after[k])}


@pytest.fixture(scope='module')
def start(images, tmp_path_factory):
    """A checkpoint to start from, and the arguments of a run of one epoch from it."""
    output = tmp_path_factory.mktemp('start')
    path = train(tiny_train_args(images, output, epochs=1, experiment='start')).output_dir / 'last.pth.tar'
    return path, load_weights(path)


@pytest.fixture
def run(images, start, tmp_path):
    """Train an epoch from the common start with some flags changed; each call in a folder of its own."""
    calls = []

    def call(**values):
        calls.append(values)
        return train(tiny_train_args(
            images, tmp_path / str(len(calls)), **{'epochs': 1, 'initial_checkpoint': str(start[0]), **values}))

    return call


def test_training_learns_and_is_reproducible(images, tmp_path):
    results = [train(tiny_train_args(images, tmp_path / name, epochs=5, lr=0.02)) for name in 'ab']
    losses = [row['loss'] for row in results[0].history]
    assert losses[-1] < 0.8 * losses[0]
    assert results[0].history == results[1].history
    assert_same_weights(*map(last_weights, results))
    other = train(tiny_train_args(images, tmp_path / 'c', epochs=5, lr=0.02, seed=1))
    assert other.history != results[0].history


def test_arguments_are_left_as_they_were(images, tmp_path):
    args = tiny_train_args(images, tmp_path, epochs=1, lr=None)
    before = copy.deepcopy(args)
    train(args)
    assert args == before


def test_any_timm_model_trains(images, tmp_path):
    for model in ('test_resnet', 'test_vit'):
        kwargs = dict(img_size=32, patch_size=8) if model == 'test_vit' else {}
        result = train(tiny_train_args(images, tmp_path / model, model=model, epochs=1, model_kwargs=kwargs))
        assert result.history[0]['loss'] > 0


def test_accumulated_batches_are_one_large_batch(run):
    # a norm of each image alone does not see how the batch is cut
    alone = dict(model_kwargs=dict(norm_layer='groupnorm1'), initial_checkpoint='', sched='none', no_aug=True)
    small = last_weights(run(batch_size=4, grad_accum_steps=4, **alone))
    large = last_weights(run(batch_size=16, **alone))
    once = last_weights(run(batch_size=4, **alone))
    assert_close(small, large)
    assert max((small[k] - once[k]).abs().max() for k in small) > 0.01


def test_the_last_group_of_batches_may_be_smaller(run):
    # 48 images in batches of 8 are groups of 4 and 2 batches
    result = run(grad_accum_steps=4, sched='none', model_ema=True, model_ema_decay=0.5)
    ema, weights = last_weights(result, 'state_dict_ema'), last_weights(result)
    assert changed(ema, weights)


def test_moving_average_follows_slowly(run, start):
    result = run(model_ema=True, model_ema_decay=0.99)
    weights, ema = last_weights(result), last_weights(result, 'state_dict_ema')
    key = 'fc.weight'
    # the first update copies the weights, the others hardly count
    assert 0 < (ema[key] - start[1][key]).norm() < 0.5 * (weights[key] - start[1][key]).norm()
    forced = run(model_ema=True, model_ema_force_cpu=True, model_ema_decay=0.99)
    assert_same_weights(last_weights(forced, 'state_dict_ema'), ema)


@pytest.mark.parametrize('values,still', [
    (dict(freeze=['stem', 'layer1']), ('conv1', 'bn1', 'layer1')),
    (dict(freeze=['layer4.0', 'pst.blocks']), ('layer4.0', 'pst.blocks')),
    (dict(freeze_trunk=True), ('conv1', 'bn1', 'layer1', 'layer2', 'layer3', 'layer4')),
])
def test_frozen_parts_stay_bitwise_and_the_rest_moves(run, start, values, still):
    after = last_weights(run(weight_decay=0.1, **values))
    moved = changed(start[1], after)
    assert not [k for k in moved if k.startswith(still)]
    rest = [k for k in after if not k.startswith(still) and not k.startswith('pst.blocks.0.attn.gate')]
    # batch norms that train move their statistics too
    assert moved == set(rest)


@pytest.mark.parametrize('model, flags', [
    ('resnet10t', dict(freeze=['stem'])), ('test_resnet_pst', dict(freeze_trunk=True)),
    ('test_efficientnet', dict(linear_probe=True))])
def test_what_is_frozen_rests_behind_synchronised_batch_norms_too(model, flags):
    args = train_args(model=model, device_modules=['pst_timm'], **flags)
    net = timm.create_model(model, num_classes=3)
    frozen = transfer.apply_transfer(args, net)
    net = convert_sync_batchnorm(net)
    net.train()
    frozen.rest()
    norms = [m for m in net.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    resting = [m for m in norms if not m.training]
    assert resting and all(not p.requires_grad for m in resting for p in m.parameters())
    assert all(m.weight.requires_grad for m in norms if m.training)


def test_linear_probe_moves_the_classifier_alone(run, start):
    assert changed(start[1], last_weights(run(linear_probe=True))) == {'fc.weight', 'fc.bias'}


def test_freezing_mistakes_are_named(images, tmp_path):
    with pytest.raises(PSTError, match=r'--freeze layer5: the model has no such module. Did you mean layer'):
        train(tiny_train_args(images, tmp_path, freeze=['layer5']))
    everything = [n for n, _ in timm.create_model('test_resnet_pst', num_classes=3).named_children()]
    with pytest.raises(PSTError, match='Nothing is left to train'):
        train(tiny_train_args(images, tmp_path, freeze=everything))


def test_trunk_warm_start(images, tmp_path):
    source = timm.create_model('test_resnet_pst', num_classes=3)
    trunk = {k: v + 1 for k, v in source.state_dict().items() if k.startswith(('conv1', 'bn1', 'layer'))}
    torch.save(trunk, tmp_path / 'trunk.pth')
    result = train(tiny_train_args(
        images, tmp_path / 'good', epochs=1, trunk_checkpoint=str(tmp_path / 'trunk.pth'), freeze_trunk=True))
    after = last_weights(result)
    assert all(torch.equal(after[k], v) for k, v in trunk.items())
    with pytest.raises(PSTError, match=r'--trunk-checkpoint resnet50.pth: .*[Nn]o checkpoint'):
        train(tiny_train_args(images, tmp_path, trunk_checkpoint='resnet50.pth'))
    torch.save(timm.create_model('test_resnet').state_dict(), tmp_path / 'other.pth')
    with pytest.raises(PSTError, match=r'--trunk-checkpoint .*other.pth: The source is not a ResNet of this trunk'):
        train(tiny_train_args(images, tmp_path, trunk_checkpoint=str(tmp_path / 'other.pth')))


def test_what_is_cheap_to_check_comes_before_weights_are_fetched(images, tmp_path, monkeypatch):
    fetched = []

    def fetch(model, source):
        fetched.append(source)
        raise Unavailable('not now.')

    monkeypatch.setattr(transfer, 'load_trunk', fetch)
    values = dict(trunk_checkpoint='resnet18.a1_in1k', epochs=1)
    for wrong, message in (
            (dict(data_dir='/nowhere'), 'There is no /nowhere'),
            (dict(num_classes=4), 'use --num-classes 3'),
            (dict(val_split='test'), "has no 'test' split"),
            (dict(freeze=['layer5']), '--freeze layer5'),
            (dict(data_on_device=True, aa='rand-m9'), '--data-on-device cannot do --aa')):
        with pytest.raises(PSTError, match=message):
            train(tiny_train_args(images, tmp_path, **{**values, **wrong}))
    assert fetched == []
    with pytest.raises(Unavailable, match=r'--trunk-checkpoint resnet18\.a1_in1k: not now'):
        train(tiny_train_args(images, tmp_path, **values))
    assert fetched == ['resnet18.a1_in1k'] and not (tmp_path / 'run').exists()


def test_the_data_is_opened_before_a_pretrained_model_is_made(images, tmp_path, monkeypatch):
    monkeypatch.setattr(timm, 'create_model', None)
    with pytest.raises(PSTError, match='There is no /nowhere'):
        train(tiny_train_args('/nowhere', tmp_path, pretrained=True))


@pytest.mark.parametrize('model,values,expected', [
    ('test_resnet', {}, 3), ('test_resnet', dict(in_chans=1), 1), ('test_resnet', dict(input_size=[4, 48, 48]), 4),
    ('test_resnet', dict(model_kwargs=dict(in_chans=2)), 2), ('hf-hub:org/name', {}, 3), ('test_resnet.no_tag', {}, 3),
])
def test_the_channels_of_a_model_are_known_before_it_is_made(model, values, expected):
    assert expected_channels(train_args(model=model, **values)) == expected


def test_the_data_is_opened_again_for_a_model_with_other_channels_than_expected(images, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, 'expected_channels', lambda args: 3)
    run = prepare(tiny_train_args(images, tmp_path, model_kwargs=dict(in_chans=1), mean=[0.5], std=[0.5]))
    assert next(iter(run.data.train))[0].shape[1] == next(iter(run.data.evaluation))[0].shape[1] == 1


def test_loader_warnings_come_once(images, tmp_path, caplog, recwarn):
    note_workers.cache_clear()
    train(tiny_train_args(images, tmp_path, workers=5, pin_mem=True, epochs=2))
    said = [str(w.message) for w in recwarn]
    assert not [text for text in said if 'DataLoader' in text or 'pin_memory' in text]
    few = available_cores() < 5
    assert caplog.text.count('5 loader workers share') == few


def test_a_model_is_told_the_step_that_all_processes_share(images, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(
        timm.models.ResNet, 'set_train_step', lambda self, seed, step=0: told.append((seed, step)), raising=False)
    train(tiny_train_args(images, tmp_path, model='test_resnet', epochs=3, seed=7))
    assert told == [(7, 0), (7, 6), (7, 12)]


def test_the_curve_says_of_what_it_is(images, tmp_path, monkeypatch, drawn):
    figure = pytest.importorskip('matplotlib.figure')
    said = []
    title = figure.Figure.suptitle
    monkeypatch.setattr(
        figure.Figure, 'suptitle', lambda self, text, **kwargs: said.append(text) or title(self, text, **kwargs))
    train(tiny_train_args(images, tmp_path, epochs=1))
    assert said == [f'test_resnet_pst on {images.name}']
    assert run_title(train_args(model='resnet18', dataset='torch/cifar10', data_dir='x')) == 'resnet18 on cifar10'
    assert run_title(train_args(model='resnet18', dataset='wds/', data_dir='some/shards')) == 'resnet18 on shards'


def test_a_new_class_count_starts_the_classifier_anew(images, start, tmp_path, caplog):
    run = prepare(tiny_train_args(
        images, tmp_path / 'same', num_classes=3, initial_checkpoint=str(start[0])))
    assert_same_weights(run.task.get_eval_model().state_dict(), start[1])
    with pytest.raises(PSTError, match='use --num-classes 3'):
        prepare(tiny_train_args(images, tmp_path, num_classes=4, initial_checkpoint=str(start[0])))
    five = {'fc.weight': start[1]['fc.weight'].repeat(2, 1)[:5], 'fc.bias': start[1]['fc.bias'].repeat(2)[:5]}
    torch.save({**start[1], **five}, tmp_path / 'five.pth')
    # without a number, the model gets the classes of the data
    args = tiny_train_args(images, tmp_path, initial_checkpoint=str(tmp_path / 'five.pth'), num_classes=None)
    with caplog.at_level('INFO'):
        state = prepare(args).task.get_eval_model().state_dict()
    assert "The 'train' split has 3 classes, and so gets the model" in caplog.text
    assert state['fc.weight'].shape[0] == 3
    assert torch.equal(state['conv_head.conv.weight'], start[1]['conv_head.conv.weight'])


def test_initial_checkpoint_of_another_model_is_refused(images, start, tmp_path):
    with pytest.raises(PSTError, match='is of another model'):
        train(tiny_train_args(images, tmp_path, model='test_resnet', initial_checkpoint=str(start[0])))
    with pytest.raises(PSTError, match=r'There is no checkpoint nowhere.pth'):
        train(tiny_train_args(images, tmp_path, initial_checkpoint='nowhere.pth'))


def test_layer_decay_orders_the_learning_rates(images, tmp_path):
    run = prepare(tiny_train_args(images, tmp_path, layer_decay=0.5))
    names = {id(p): n for n, p in run.task.get_eval_model().named_parameters()}
    scale = {names[id(p)]: g['lr_scale'] for g in run.optimizer.param_groups for p in g['params']}
    order = ['conv1.0.weight', 'layer2.0.conv1.weight', 'layer4.0.conv1.weight', 'pst.conv_in.conv.weight', 'fc.weight']
    values = [scale[n] for n in order]
    assert values == sorted(values) and len(set(values)) == len(order) and values[-1] == 1.


def test_learning_rate_follows_the_global_batch(images, tmp_path):
    def lr(**values):
        run = prepare(tiny_train_args(images, tmp_path, lr=None, lr_base=0.1, lr_base_size=16, sched='none', **values))
        return run.lr

    assert lr(batch_size=8) == pytest.approx(0.05)
    assert lr(batch_size=8, grad_accum_steps=2) == pytest.approx(0.1)
    assert lr(batch_size=4, opt='adamw') == pytest.approx(0.05)
    assert lr(batch_size=4, opt='adamw', lr_base_scale='linear') == pytest.approx(0.025)


@pytest.fixture
def teacher(images, tmp_path, monkeypatch):
    """A registered model with 'published' weights, in a file."""
    state = train(tiny_train_args(images, tmp_path / 'teacher', model='test_resnet', epochs=2)).output_dir
    model = timm.create_model('test_resnet', num_classes=3)
    load_checkpoint(model, str(state / 'last.pth.tar'))

    def entrypoint(pretrained=False, **kwargs):
        assert pretrained
        return copy.deepcopy(model)

    entrypoint.__name__ = 'test_teacher'
    entrypoint.__module__ = 'timm.models.resnet'
    create = factories.create_model
    model.pretrained_cfg['num_classes'] = 3
    monkeypatch.setattr(factories, 'create_model', lambda name, **kwargs: (
        entrypoint(pretrained=kwargs['pretrained']) if name == 'test_teacher' else create(name, **kwargs)))
    monkeypatch.setattr('timm.is_model', lambda name: True)
    return 'test_teacher'


@pytest.mark.parametrize('kind', ['logit', 'feature'])
def test_distillation_pulls_towards_the_teacher(run, teacher, kind):
    plain = last_weights(run())
    weight = dict(kd_model_name=teacher, kd_distill_type=kind)
    nothing = last_weights(run(**weight, distill_loss_weight=0.))
    assert {k for k in changed(plain, nothing) if not k.startswith('projection')} == set() or kind == 'feature'
    taught = last_weights(run(**weight, distill_loss_weight=1.))
    assert changed(nothing, taught)


def test_token_distillation_needs_a_model_with_a_token(run, teacher):
    with pytest.raises(PSTError, match='distilled_training'):
        run(kd_model_name=teacher, kd_distill_type='token')


def test_a_teacher_of_other_classes_is_refused(run):
    """timm gives it a classifier of random weights."""
    with pytest.raises(PSTError, match='test_resnet_pst knows 10 classes, and the data has 3'):
        run(kd_model_name='test_resnet_pst', kd_distill_type='logit')


def test_a_teacher_that_does_not_take_the_images_is_refused(images, tmp_path, teacher, monkeypatch):
    fixed = timm.create_model('test_vit', num_classes=3)
    monkeypatch.setattr(
        factories, 'create_model',
        lambda name, **kwargs: fixed if name == teacher else create_model(name, **kwargs))
    with pytest.raises(PSTError, match='test_teacher does not take images of 3x50x50'):
        prepare(tiny_train_args(images, tmp_path, kd_model_name=teacher, img_size=50))


def test_unknown_teachers_are_named(run):
    with pytest.raises(PSTError, match=r"Unknown model 'resnet5o'"):
        run(kd_model_name='resnet5o')
    with pytest.raises(PSTError, match='Cannot distil from vovnet39a'):
        run(kd_model_name='vovnet39a')  # without published weights


@pytest.fixture(scope='module')
def taught_by(start, images, tmp_path_factory):
    """The checkpoint of the common start as whatever may hold it: by kind, what --kd-model-name is given."""
    folder = tmp_path_factory.mktemp('teachers') / 'model'
    save_folder(load_model(start[0]), folder)
    return {'file': str(start[0]), 'folder': str(folder)}


def test_a_teacher_comes_from_whatever_holds_a_model(run, start, taught_by):
    """All of them teach the same, which is what timm's task does with that model."""
    plain = last_weights(run(seed=1))
    taught = {kind: last_weights(run(seed=1, kd_model_name=name)) for kind, name in taught_by.items()}
    assert changed(plain, taught['file'])
    for weights in taught.values():
        assert_same_weights(weights, taught['file'])


def test_a_distilling_run_goes_on_with_its_teacher(images, tmp_path, taught_by, caplog):
    args = tiny_train_args(
        images, tmp_path, epochs=1, sched='constant', kd_model_name=taught_by['file'], kd_distill_type='feature')
    told = read_checkpoint(train(args).output_dir).recipe
    assert told['kd_model_name'] == 'last.pth.tar', 'a path of this machine must not be told'
    with caplog.at_level('WARNING'):
        prepare(train_args(**dict(vars(args), epochs=2, resume='auto'))).hold.close()
        assert 'kd-model-name' not in caplog.text
        prepare(train_args(**dict(vars(args), epochs=2, resume='auto', kd_model_name=taught_by['folder'])))
    before = taught_by['file'][:30]  # a long path is cut
    assert f'--kd-model-name {taught_by["folder"]} (was {before}' in caplog.text


def test_a_teacher_in_a_file_is_checked_as_any_other(run, images, tmp_path, taught_by):
    with pytest.raises(PSTError, match=r'--kd-model-name: there is no checkpoint .*nowhere/last.pth.tar'):
        run(kd_model_name=str(tmp_path / 'nowhere' / 'last.pth.tar'))
    with pytest.raises(PSTError, match='there is no checkpoint output/nothing'):
        run(kd_model_name='output/nothing')
    for bundled in (create_model('test_resnet_pst', pretrained=True), create_model('test_resnet', num_classes=3)):
        folder = tmp_path / str(bundled.num_classes)
        names = None if bundled.num_classes == 10 else ['class1', 'class0', 'class2']
        save_folder(bundled, folder, names)
    with pytest.raises(PSTError, match='knows 10 classes, and the data has 3'):
        run(kd_model_name=str(tmp_path / '10'))
    with pytest.raises(PSTError, match=r"the teacher .* same classes in another order: class 0 is 'class0'"):
        run(kd_model_name=str(tmp_path / '3'))
    prepare(tiny_train_args(images, tmp_path, kd_model_name=str(tmp_path / '10'), kd_distill_type='feature'))


FLAGS = [
    dict(clip_grad=0.01), dict(clip_grad=0.01, clip_mode='agc'), dict(clip_grad=1e-4, clip_mode='value'),
    dict(bce_loss=True), dict(smoothing=0.2), dict(mixup=0.5), dict(cutmix=1.), dict(mixup=0.5, no_prefetcher=True),
    dict(reprob=1.), dict(hflip=1.), dict(scale=[0.2, 0.4]), dict(drop=0.5), dict(drop_path=0.5), dict(opt='adamw'),
    dict(momentum=0.5), dict(weight_decay=0.5), dict(sched_on_updates=True), dict(aa='rand-m9-n2'),
    dict(channels_last=True), dict(amp=True, amp_dtype='bfloat16'), dict(head_init_scale=0.), dict(no_aug=True),
    dict(layer_decay=0.5), dict(model_kwargs=dict(train_topk=1)), dict(opt_kwargs=dict(nesterov=False)),
    dict(lr=0.001), dict(train_interpolation='bicubic', scale=[0.5, 0.6]), dict(model_dtype='bfloat16'),
]


@pytest.fixture(scope='module')
def plain(images, start, tmp_path_factory):
    output = tmp_path_factory.mktemp('plain')
    return last_weights(train(tiny_train_args(images, output, epochs=1, initial_checkpoint=str(start[0]))))


@pytest.mark.parametrize('values', FLAGS, ids=lambda v: ','.join(v))
def test_flags_change_training(run, plain, values):
    after = last_weights(run(**values))
    assert changed(plain, after)
    assert all(w.isfinite().all() for w in after.values() if w.is_floating_point())


@pytest.mark.parametrize('values', [
    dict(grad_checkpointing=True), dict(log_interval=3), dict(recovery_interval=2), dict(seed=42),
    dict(synchronize_step=True), dict(torchscript=True), dict(img_size=None, input_size=[3, 48, 48]),
    dict(use_multi_epochs_loader=True),
    dict(mixup=0.5, mixup_off_epoch=0, mixup_prob=0., smoothing=0.), dict(validation_batch_size=3),
], ids=lambda v: ','.join(v))
def test_flags_that_only_concern_the_how_change_little(run, plain, values):
    after = last_weights(run(**values))
    # recomputed activations pass the batch norms' statistics twice
    assert_close(after, {k: v for k, v in plain.items() if 'running' not in k and 'tracked' not in k})


def test_low_precision_on_a_cpu_is_bfloat16(run, caplog):
    half, low = run(amp=True), run(amp=True, amp_dtype='bfloat16')
    assert half.history == low.history and 'takes bfloat16' in caplog.text


def test_pretrained_weights_from_a_file(images, tmp_path):
    source = timm.create_model('test_resnet_pst')  # 1000 classes
    torch.save(source.state_dict(), tmp_path / 'weights.pth')
    args = tiny_train_args(images, tmp_path, pretrained=True, pretrained_path=str(tmp_path / 'weights.pth'))
    state = prepare(args).task.get_eval_model().state_dict()
    same = {k for k, v in source.state_dict().items() if torch.equal(v, state[k])}
    assert set(state) - same == {'fc.weight', 'fc.bias'} and state['fc.weight'].shape[0] == 3


def test_views_of_an_image_are_averaged(run, plain):
    result = run(tta=2, validation_batch_size=4)  # here neighbours in the folder instead of views
    assert_same_weights(last_weights(result), plain)
    assert result.history[0]['eval_loss'] != run().history[0]['eval_loss']


def test_what_cannot_work_here_is_said(run):
    for values, message in (
            (dict(device='cuda:77'), '--device cuda:77 cannot be used here'),
            (dict(device_modules=['no_such_package']), '--device-modules no_such_package: cannot import it'),
            (dict(bn_momentum=0.5), 'Cannot create test_resnet_pst: .*bn_momentum'),
            (dict(opt_kwargs=dict(colour=1)), 'Cannot create the optimizer sgd: .*colour'),
            (dict(freeze_trunk=True, torchscript=True), '--freeze')):
        with pytest.raises(PSTError, match=message):
            run(**values)


def test_mixup_goes_off(run, images, start, tmp_path):
    values = dict(mixup=0.5, epochs=2)
    on, off = run(**values), run(**values, mixup_off_epoch=1)
    assert on.history[0] == off.history[0] and on.history[1] != off.history[1]


def test_validation_interval_and_metric(run, tmp_path):
    result = run(epochs=3, val_interval=2, eval_metric='loss', checkpoint_hist=1)
    assert ['eval_loss' in row for row in result.history] == [False, True, True]
    best = min((row['eval_loss'], i) for i, row in enumerate(result.history) if 'eval_loss' in row)
    assert (result.best_metric, result.best_epoch) == best
    assert len(list(result.output_dir.glob('checkpoint-*'))) == 1
    rows = (result.output_dir / 'summary.csv').read_text().splitlines()
    assert len({len(r.split(',')) for r in rows}) == 1


def test_tensorboard_and_images_are_written(run):
    pytest.importorskip('tensorboard')
    result = run(log_tensorboard=True, save_images=True)
    assert list((result.output_dir / 'tensorboard').glob('events*'))
    assert list(result.output_dir.glob('train-batch-*.jpg'))


def test_wandb_is_told(run, monkeypatch):
    import sys
    import types

    told = []
    fake = types.SimpleNamespace(
        init=lambda **kwargs: told.append(kwargs), log=lambda row: told.append(row), finish=lambda: told.append('end'))
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    monkeypatch.setattr('timm.utils.summary.wandb', fake, raising=False)
    run(log_wandb=True, wandb_project='zoo', wandb_tags=['a'])
    assert told[0]['project'] == 'zoo' and told[0]['tags'] == ['a']
    assert told[1]['epoch'] == 0 and 'eval_top1' in told[1] and told[-1] == 'end'


def test_missing_loggers_are_an_error(run, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(PSTError, match='pip install wandb'):
        run(log_wandb=True)


@pytest.mark.slow
def test_compiled_training(run, plain):
    after = last_weights(run(torchcompile='eager', model_ema=True))
    assert_close(after, plain)
