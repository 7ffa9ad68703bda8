"""The ordinary engine trains detectors: it learns, is killed, goes on, and writes what it should."""
import json
import logging
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch

from pst_timm.cli import main
from pst_timm.data.datasets import class_names
from pst_timm.detection import open_detector, train, validate
from pst_timm.detection.batches import BoxBatches
from pst_timm.detection.datasets import open_boxes
from pst_timm.detection.evaluation import METRICS
from pst_timm.detection.job import Detection
from pst_timm.detection.task import DetectionTask
from pst_timm.engine import training
from pst_timm.engine.args import write_yaml
from pst_timm.engine.batches import Batches
from pst_timm.engine.training import prepare
from pst_timm.utils.errors import Interrupted, PSTError
from pst_timm.utils.files import read_csv
from tests.engine.helpers import ROOT, assert_same_weights, load_weights, script_env

from .box_data import voc_object, voc_xml, write_voc
from .tiny import CLASSES, batch, small, tiny_args, tiny_validate_args, write_squares

# with random decisions of data and model in every step, and an average beside the weights
RANDOM = dict(epochs=2, model_ema=True, model_ema_decay=0.9, train_topk=2, train_fine_prob=0.5, color_jitter=0.2)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp('squares'), {'train': 18, 'val': 8})


@pytest.fixture(scope='module')
def undisturbed(data, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp('undisturbed')
    train(tiny_args(data, output, **RANDOM))
    return output / 'run'


def test_it_learns(data, tmp_path):
    result = train(tiny_args(data, tmp_path, epochs=14, val_interval=14, log_interval=100))
    losses = [row['loss'] for row in result.history]
    assert losses[-1] < 0.7 * losses[0]
    assert result.best_metric > 10 and result.history[-1]['eval_ap50'] > 40


def test_what_a_run_leaves(undisturbed):
    names = {path.name for path in undisturbed.iterdir()}
    assert {'args.yaml', 'last.pth.tar', 'model_best.pth.tar', 'summary.csv', 'speed.csv'} <= names
    rows = read_csv(undisturbed / 'summary.csv')
    assert [row['epoch'] for row in rows] == ['0', '1']
    assert [key for key in rows[0] if key.startswith('eval_')] == [f'eval_{name}' for name in METRICS]
    detector = open_detector(undisturbed, device='cpu')
    assert detector.class_names == list(CLASSES) and detector.checkpoint_ema and not detector.training


def assert_ends_like(expected, run):
    for key in ('state_dict', 'state_dict_ema'):
        assert_same_weights(*(load_weights(folder / 'last.pth.tar', key) for folder in (expected, run)))
    rows = [[{**row, 'train_loss': ''} for row in read_csv(folder / 'summary.csv')] for folder in (expected, run)]
    assert rows[0] == rows[1]  # but for the mean loss, which is that of the steps since it went on


def crash(args, folder, step, name='SIGKILL'):
    """Run the real command with a signal after a step; returns its exit code and what it said."""
    write_yaml(args, folder / 'config.yaml')
    done = subprocess.run(
        [sys.executable, str(ROOT / 'tests' / 'detection' / 'crash.py'), f'step:{step}:{name}', '--config',
         str(folder / 'config.yaml')],
        env=script_env(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights_bitwise(data, undisturbed, tmp_path):
    args = tiny_args(data, tmp_path, recovery_interval=2, **RANDOM)
    code, said = crash(args, tmp_path, 7)  # of 4 steps in an epoch
    assert code == -signal.SIGKILL, said
    assert (tmp_path / 'run' / 'recovery-1-2.pth.tar').is_file()
    assert main(['detect', 'train', '--config', str(tmp_path / 'config.yaml'), '--resume', 'auto']) == 0
    assert_ends_like(undisturbed, tmp_path / 'run')


def test_a_run_that_is_asked_to_stop_goes_on_likewise(data, undisturbed, tmp_path, monkeypatch):
    steps, backward = [0], training.backward

    def stopping(*args):
        backward(*args)
        steps[0] += 1
        if steps[0] == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(training, 'backward', stopping)
    with pytest.raises(Interrupted, match='Stopped after step 3 of epoch 0'):
        train(tiny_args(data, tmp_path, **RANDOM))
    train(tiny_args(data, tmp_path, resume='auto', **RANDOM))
    assert_ends_like(undisturbed, tmp_path / 'run')


# P6 of 64 px is one cell, where torch 2.15 on a CPU gives a strided convolution in bfloat16 garbage for a gradient
@pytest.mark.parametrize('values', [
    dict(amp=True, amp_dtype='bfloat16', channels_last=True, img_size=128),
    dict(detector='retinanet_v2', neck='fpn', head_convs=4),
    dict(grad_accum_steps=2, grad_checkpointing=True, clip_grad=1., neck='pan'),
    dict(model_dtype='bfloat16', img_size=128),
    dict(val_split='', sched_on_updates=True, clip_grad=0.1, clip_mode='agc'),
], ids=lambda v: '-'.join(v))
def test_the_flags_of_the_engine_work(data, tmp_path, values):
    result = train(tiny_args(data, tmp_path, epochs=1, **values))
    assert 0 < result.history[0]['loss'] < 10
    assert ('eval_ap' in result.history[0]) == (values.get('val_split') != '')


def test_save_images_writes_the_batches(data, tmp_path):
    train(tiny_args(data, tmp_path, epochs=1, save_images=True, log_interval=4))
    assert list((tmp_path / 'run').glob('train-batch-0-*.jpg'))


class TestFrozen:
    def test_the_trunk_stays_as_it_is(self, data, tmp_path):
        args = tiny_args(data, tmp_path, epochs=1, freeze_trunk=True)
        before = prepare(args, Detection())
        before.hold.close()
        start = {k: v.clone() for k, v in before.task.trainable_module.state_dict().items()}
        train(tiny_args(data, tmp_path, epochs=1, freeze_trunk=True, overwrite=True))
        end = load_weights(tmp_path / 'run' / 'last.pth.tar')
        changed = [k for k in start if not torch.equal(start[k], end[k])]
        assert not [k for k in changed if k.startswith('backbone.trunk.')]  # batch-norm statistics among them
        assert any(k.startswith('backbone.neck.') for k in changed) and any(k.startswith('head.') for k in changed)

    @pytest.mark.parametrize('names, frozen', [
        (['stem'], ('backbone.trunk.conv1', 'backbone.trunk.bn1')),
        (['backbone.trunk.layer1'], ('backbone.trunk.layer1',)),
        (['neck'], ('backbone.neck',)),
    ])
    def test_parts_by_name(self, data, tmp_path, names, frozen):
        run = prepare(tiny_args(data, tmp_path, freeze=names), Detection())
        run.hold.close()
        fixed = {n for n, p in run.task.trainable_module.named_parameters() if not p.requires_grad}
        assert fixed and all(n.startswith(frozen) for n in fixed)

    def test_an_unknown_part_is_named(self, data, tmp_path):
        with pytest.raises(PSTError, match='--freeze layer9: the model has no such module'):
            prepare(tiny_args(data, tmp_path, freeze=['layer9']), Detection())


def test_a_split_of_crowds_alone_is_refused(data, tmp_path):
    other = shutil.copytree(data, tmp_path / 'other')
    path = other / 'annotations' / 'instances_val.json'
    content = json.loads(path.read_text())
    content['annotations'] = [dict(a, iscrowd=1) for a in content['annotations']]
    path.write_text(json.dumps(content))
    with pytest.raises(PSTError, match="The 'val' split has no box to find"):
        train(tiny_args(other, tmp_path, epochs=1))
    with pytest.raises(PSTError, match="The 'val' split has no box to learn from"):
        train(tiny_args(other, tmp_path, epochs=1, train_split='val', val_split=''))
    assert len(train(tiny_args(other, tmp_path, epochs=1, val_split='')).history) == 1


def test_a_split_of_difficult_objects_alone_is_nothing_to_find(tmp_path):
    root = write_voc(tmp_path / 'voc', {'train': list('abcd'), 'val': ['e']}, {
        'e': voc_xml([voc_object(difficult=1)])}, size=(40, 30))
    with pytest.raises(PSTError, match="The 'val' split has no box to find"):
        train(tiny_args(root, tmp_path, epochs=1))


def test_processes_can_compare_their_classes(data):
    assert class_names(open_boxes(data, 'train')) == list(CLASSES)


class TestBatches:
    def test_they_are_what_the_engine_asks_for(self, data):
        batches: Batches = BoxBatches(torch.device('cpu'), torch.float32)
        dataset = open_boxes(data, 'train')
        samples = [dataset[i] for i in (0, 1)]
        images = [image.float() / 255 for image, _ in samples]
        targets = [target for _, target in samples]
        prepared = batches.prepare((images, targets))
        assert batches.size(prepared) == 2
        assert [t['given_size'] for t in prepared[1]] == [(64, 64)] * 2
        assert type(prepared[0][0]) is torch.Tensor and type(prepared[1][0]['boxes']) is torch.Tensor
        trained = batches.prepare((images, targets), training=True)
        assert all(set(t) == {'boxes', 'labels'} for t in trained[1])
        loss = batches.loss(DetectionTask(small().train(), dataset), trained)
        assert loss.ndim == 0 and loss.requires_grad

    def test_images_of_several_sizes_are_padded_to_be_looked_at(self):
        batches = BoxBatches(torch.device('cpu'))
        assert batches.images(batch()).shape == (2, 3, 64, 64)


def test_the_loss_is_the_sum_of_torchvisions():
    model = small().train()
    images, targets = batch()
    found = DetectionTask(model)(images, targets)
    parts = model(images, targets)
    assert found['loss'].item() == pytest.approx(sum(v.item() for v in parts.values()), rel=1e-5)
    assert set(found) == {'loss', *parts}


@pytest.mark.slow
def test_compiling_keeps_the_names_of_the_weights():
    model = small()
    names = list(model.state_dict())
    task = DetectionTask(model)
    task.compile(backend='eager')
    assert list(task.get_eval_model().state_dict()) == names
    images, targets = batch()
    assert task.train()(images, targets)['loss'].isfinite()


@pytest.mark.slow
def test_two_processes_train_as_one_and_go_on(data, tmp_path):
    """Gloo on the CPU: the weights of both ranks are the same, and all validation images are counted once."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    args = tiny_args(data, tmp_path, epochs=2, batch_size=2, dist_bn='broadcast', train_topk=2, train_fine_prob=0.5)
    write_yaml(args, tmp_path / 'config.yaml')
    processes = []
    for rank in range(2):
        env = script_env(MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        env.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
        processes.append(subprocess.Popen(
            [sys.executable, '-m', 'pst_timm', 'detect', 'train', '--config', str(tmp_path / 'config.yaml')],
            env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    for process in processes:
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 0, said
    rows = read_csv(tmp_path / 'run' / 'summary.csv')
    alone = validate(tiny_validate_args(data, tmp_path / 'run' / 'last.pth.tar'))[0]
    assert float(rows[-1]['eval_ap']) == pytest.approx(alone['ap'], abs=0.01)


def test_another_order_of_classes_cannot_go_on(data, undisturbed, tmp_path, caplog):
    other = shutil.copytree(data, tmp_path / 'other')
    for path in (other / 'annotations').iterdir():
        content = json.loads(path.read_text())
        content['categories'] = [dict(c, name=n) for c, n in zip(content['categories'], reversed(CLASSES))]
        path.write_text(json.dumps(content))
    shutil.copytree(undisturbed, tmp_path / 'run')
    with caplog.at_level(logging.INFO), pytest.raises(PSTError, match='order'):
        train(tiny_args(other, tmp_path, resume='auto', **{**RANDOM, 'epochs': 3}))
