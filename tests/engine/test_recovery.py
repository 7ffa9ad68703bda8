"""Nothing is lost to a crash: a run that is killed and resumed ends with the weights of one that was not."""
import logging
import os
import re
import resource
import signal
import subprocess
import sys
from copy import deepcopy

import pytest
import torch

from pst_timm.engine import train, validate
from pst_timm.engine.args import write_yaml
from pst_timm.engine.recovery import check_checkpoint, find_newest
from pst_timm.utils.errors import Interrupted, PSTError

from .helpers import (
    ROOT,
    assert_same_weights,
    load_weights,
    script_env,
    tiny_train_args,
    tiny_validate_args,
)

# everything that draws random numbers, in the loader and in the model
RANDOM = dict(
    epochs=3, hflip=0.5, scale=[0.5, 1.], color_jitter=0.4, reprob=0.5, mixup=0.2, smoothing=0.1, drop=0.2,
    drop_path=0.1, model_ema=True, model_ema_decay=0.9, model_kwargs=dict(train_topk=1, train_fine_prob=0.5))


def tiny(images, output, **values):
    return tiny_train_args(images, output, **{**RANDOM, **values})


@pytest.fixture(scope='module')
def undisturbed(images, tmp_path_factory):
    """Weights of a run from start to end, by number of loader workers."""
    weights = {}
    for workers in (0, 1):
        last = train(tiny(images, tmp_path_factory.mktemp('undisturbed'), workers=workers)).output_dir / 'last.pth.tar'
        weights[workers] = load_weights(last), load_weights(last, 'state_dict_ema')
    return weights


def assert_ends_like(undisturbed, output):
    last = output / 'run' / 'last.pth.tar'
    assert_same_weights(load_weights(last), undisturbed[0])
    assert_same_weights(load_weights(last, 'state_dict_ema'), undisturbed[1])
    rows = (output / 'run' / 'summary.csv').read_text().splitlines()
    assert [r.split(',')[0] for r in rows] == ['epoch', '0', '1', '2']


def go_on(args, caplog):
    """Resume a run and return its log."""
    args = deepcopy(args)
    args.resume = 'auto'
    with caplog.at_level(logging.INFO):
        train(args)
    return caplog.text


def crash(moment, args, folder):
    """Run train.py with a signal at a moment, see crash.py; returns its exit code and what it said."""
    write_yaml(args, folder / 'config.yaml')
    done = subprocess.run(
        [sys.executable, str(ROOT / 'tests' / 'engine' / 'crash.py'), moment, '--config', str(folder / 'config.yaml')],
        env=script_env(), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        timeout=120, start_new_session=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize('workers,recovery', [pytest.param(0, 2, marks=pytest.mark.slow), (1, 0)])
def test_sigkill_in_an_epoch(images, undisturbed, tmp_path, caplog, workers, recovery):
    args = tiny(images, tmp_path, workers=workers, recovery_interval=recovery)
    code, said = crash('step:10:SIGKILL', args, tmp_path)
    assert code == -signal.SIGKILL and 'Train: 1 [   3/6' in said
    assert bool(list((tmp_path / 'run').glob('recovery-1-2.pth.tar'))) == bool(recovery)
    log = go_on(args, caplog)
    assert 'Train: 0' not in log
    assert ('Train: 1 [   1/6' in log) == (not recovery)
    assert_ends_like(undisturbed[workers], tmp_path)


def test_sigkill_while_a_checkpoint_is_written(images, undisturbed, tmp_path, caplog):
    args = tiny(images, tmp_path)
    assert crash('save:2', args, tmp_path)[0] == -signal.SIGKILL
    assert list((tmp_path / 'run').glob('*tmp*'))
    check_checkpoint(tmp_path / 'run' / 'last.pth.tar')
    assert 'Train: 0' not in go_on(args, caplog)
    assert_ends_like(undisturbed[0], tmp_path)


def test_truncated_checkpoint_is_refused_and_the_one_before_is_used(images, undisturbed, tmp_path, caplog):
    args = tiny(images, tmp_path)
    assert crash('step:14:SIGKILL', args, tmp_path)[0] == -signal.SIGKILL
    run = tmp_path / 'run'
    last = run / 'last.pth.tar'
    whole = last.read_bytes()
    for path in run.glob('*.pth.tar'):  # hard links of one file
        if path.samefile(last) and path != last:
            path.unlink()
    last.write_bytes(whole[:len(whole) // 2])
    log = go_on(args, caplog)
    assert 'last.pth.tar cannot be read: it is truncated' in log and 'Looking further' in log
    assert 'Train: 0' not in log and 'Train: 1 [   1/6' in log
    assert_ends_like(undisturbed[0], tmp_path)


def test_a_checkpoint_that_is_named_has_to_be_good(images, tmp_path):
    (tmp_path / 'half.pth.tar').write_bytes(b'PK half a file')
    for name, message in (
            ('half.pth.tar', 'truncated or not a checkpoint'),
            ('none.pth.tar', 'There is no checkpoint')):
        with pytest.raises(PSTError, match=message):
            train(tiny(images, tmp_path, resume=str(tmp_path / name)))


@pytest.mark.parametrize('number,group', [
    (signal.SIGTERM, False),
    (signal.SIGINT, True),  # Ctrl-C reaches the loader workers too
    pytest.param(signal.SIGTERM, True, marks=pytest.mark.slow),
    pytest.param(signal.SIGINT, False, marks=pytest.mark.slow),
])
def test_signals_end_politely(images, undisturbed, tmp_path, caplog, number, group):
    args = tiny(images, tmp_path, workers=1)
    moment = f'step:9:{signal.Signals(number).name}' + (':group' if group else '')
    code, said = crash(moment, args, tmp_path)
    assert code == Interrupted.exit_code == 75, said
    assert 'Stopped' in said and 'start again with --resume auto' in said and 'Traceback' not in said
    saved = (tmp_path / 'run' / 'recovery-1-3.pth.tar').is_file()
    log = go_on(args, caplog)
    assert 'Train: 0' not in log
    if (number, group) != (signal.SIGTERM, True):  # which may take a worker from under the step
        assert saved and 'Train: 1 [   1/6' not in log
    assert not list((tmp_path / 'run').glob('recovery-*'))
    assert_ends_like(undisturbed[1], tmp_path)


def test_resuming_a_finished_run_is_no_work(images, tmp_path):
    args = tiny_train_args(images, tmp_path, epochs=1)
    first = train(args)
    again = train(tiny_train_args(images, tmp_path, epochs=1, resume='auto'))
    assert again.history == [] and (again.best_metric, again.best_epoch) == (first.best_metric, first.best_epoch)
    assert again.best_checkpoint.is_file()


def test_resume_auto_starts_afresh_and_needs_a_name(images, tmp_path):
    assert len(train(tiny_train_args(images, tmp_path, epochs=1, resume='auto')).history) == 1
    with pytest.raises(PSTError, match='needs --experiment'):
        train(tiny_train_args(images, tmp_path, resume='auto', experiment=''))


def test_corrupt_bytes_are_noticed(images, tmp_path):
    folder = train(tiny_train_args(images, tmp_path, epochs=2)).output_dir
    last = folder / 'last.pth.tar'
    damaged = bytearray(last.read_bytes())
    middle = slice(len(damaged) // 2, len(damaged) // 2 + 256)  # longer than the padding between two tensors
    damaged[middle] = bytes(b ^ 0xFF for b in damaged[middle])
    (folder / 'recovery-9-9.pth.tar').write_bytes(damaged)
    with pytest.raises(PSTError, match='corrupt'):
        check_checkpoint(folder / 'recovery-9-9.pth.tar')
    assert find_newest(folder).name in ('last.pth.tar', 'checkpoint-1.pth.tar')


def limit_file_size():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


@pytest.mark.slow
def test_full_disk_leaves_the_last_checkpoint_intact(images, tmp_path):
    train(tiny(images, tmp_path, epochs=1))
    before = load_weights(tmp_path / 'run' / 'last.pth.tar')
    write_yaml(tiny(images, tmp_path, epochs=2, resume='auto'), tmp_path / 'config.yaml')
    full = subprocess.run(
        [sys.executable, str(ROOT / 'train.py'), '--config', str(tmp_path / 'config.yaml')], env=script_env(),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, preexec_fn=limit_file_size)
    assert full.returncode == 1 and 'Cannot write a checkpoint' in full.stderr, full.stderr
    assert 'The last one there is intact' in full.stderr
    check_checkpoint(tmp_path / 'run' / 'last.pth.tar')
    assert_same_weights(load_weights(tmp_path / 'run' / 'last.pth.tar'), before)
    assert not list((tmp_path / 'run').glob('*tmp.pth.tar'))


def test_unwritable_output_is_an_error_before_any_work(images, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(PSTError, match='choose another --output'):
        train(tiny_train_args(images, tmp_path / 'file'))


def test_nan_loss_stops_the_run(images, tmp_path):
    with pytest.raises(PSTError) as e:
        train(tiny_train_args(images, tmp_path, warmup_epochs=1, warmup_lr=0.01, lr=1e25, epochs=3, log_interval=50))
    message = str(e.value)
    assert re.search(r'NaN or infinite in epoch 1, step \d, at a learning rate of \d\.?\d*e\+2\d\.', message)
    assert f'last good checkpoint is {tmp_path}/run/' in message
    weights = load_weights(find_newest(tmp_path / 'run'))
    assert all(w.isfinite().all() for w in weights.values() if w.is_floating_point())


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_never_run(images, tmp_path):
    trap = tmp_path / 'trap'
    bad = tmp_path / 'bad.pth.tar'
    torch.save(dict(state_dict={}, epoch=0, extra=Malicious(trap)), bad)
    for values in (dict(resume=str(bad)), dict(initial_checkpoint=str(bad))):
        with pytest.raises(PSTError, match='loading it could run code'):
            train(tiny_train_args(images, tmp_path, **values))
    for values in (dict(trunk_checkpoint=str(bad)), dict(pretrained=True, pretrained_path=str(bad))):
        with pytest.raises(PSTError, match=r'weights_only=True blocked|loading it could run code'):
            train(tiny_train_args(images, tmp_path, **values))
    with pytest.raises(PSTError, match='loading it could run code'):
        validate(tiny_validate_args(images, checkpoint=str(bad)))
    assert not trap.exists()
    torch.load(bad, weights_only=False)
    assert trap.exists(), 'the trap would not have worked'


def test_a_checkpoint_of_another_model_does_not_fit(images, tmp_path):
    folder = train(tiny_train_args(images, tmp_path, epochs=1)).output_dir
    with pytest.raises(PSTError, match='does not fit'):
        train(tiny_train_args(
            images, tmp_path / 'other', model='test_resnet', resume=str(folder / 'last.pth.tar')))
    with pytest.raises(PSTError, match='is not a checkpoint of test_resnet '):
        validate(tiny_validate_args(images, model='test_resnet', checkpoint=str(folder / 'last.pth.tar')))


def test_a_run_that_ends_well_leaves_what_is_of_use_with_the_modes_of_the_umask(images, tmp_path, drawn):
    before = os.umask(0o027)
    try:
        folder = train(tiny_train_args(images, tmp_path, epochs=1, recovery_interval=2)).output_dir
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes == dict.fromkeys([
        'args.yaml', 'checkpoint-0.pth.tar', 'curve.png', 'last.pth.tar', 'model_best.pth.tar', 'speed.csv',
        'summary.csv'], 0o640)


def test_a_run_that_does_not_end_well_keeps_its_recovery_checkpoints(images, tmp_path):
    with pytest.raises(PSTError, match='NaN or infinite'):
        train(tiny_train_args(
            images, tmp_path, warmup_epochs=1, warmup_lr=0.01, lr=1e25, epochs=3, recovery_interval=2, log_interval=1))
    assert list((tmp_path / 'run').glob('recovery-*'))


def rewrite(path, **entries):
    """Write a checkpoint anew with other entries, and let it be the only one of its folder."""
    content = {**torch.load(path, weights_only=False), **entries}
    for other in path.parent.glob('*.pth.tar'):
        other.unlink()
    torch.save(content, path)


@pytest.mark.parametrize('named', [False, True], ids=['auto', 'by name'])
def test_a_checkpoint_cannot_have_files_deleted_that_its_saver_did_not_write(images, tmp_path, named, caplog):
    folder = train(tiny_train_args(images, tmp_path, epochs=1, checkpoint_hist=2)).output_dir
    outside, inside = tmp_path / 'checkpoint-7.pth.tar', folder / 'thesis.pth.tar'
    listed = [(str(outside), 0.), ('../far.txt', 0.), ('thesis.pth.tar', 0.), ('checkpoint-8.pth.tar', 0.)]
    rewrite(folder / 'last.pth.tar', saver=dict(
        checkpoint_files=[*listed, ('checkpoint-0.pth.tar', 'best'), (3, 4), 'x'], best_epoch='../best',
        best_metric=0., pending=('../../far', 0.)))
    for path in (outside, inside, tmp_path / 'far.txt'):
        path.write_text('precious')
    (folder / 'checkpoint-8.pth.tar').symlink_to(outside)
    train(tiny_train_args(
        images, tmp_path, epochs=4, checkpoint_hist=2, resume=str(folder / 'last.pth.tar') if named else 'auto'))
    assert all(path.read_text() == 'precious' for path in (outside, inside, tmp_path / 'far.txt'))
    assert (folder / 'checkpoint-8.pth.tar').is_symlink()
    assert 'cannot have written' in caplog.text


@pytest.mark.parametrize('saver', [7, [], dict(checkpoint_files=5, pending=3, best_metric=[1])])
def test_a_garbled_history_is_left_behind(images, tmp_path, saver):
    folder = train(tiny_train_args(images, tmp_path, epochs=1)).output_dir
    rewrite(folder / 'last.pth.tar', saver=saver)
    result = train(tiny_train_args(images, tmp_path, epochs=2, resume='auto'))
    assert len(result.history) == 1 and result.best_epoch == 1
