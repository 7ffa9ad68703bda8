"""No command, however careless, loses what a run has done; a run that goes on says what it does otherwise."""
import logging
import multiprocessing
import os
import pty
import shutil
import signal
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from pst_timm.engine import train, training
from pst_timm.engine.args import write_yaml
from pst_timm.engine.changes import Stream, check_changes
from pst_timm.engine.recovery import Position, find_newest
from pst_timm.engine.training import prepare
from pst_timm.utils.errors import Interrupted, PSTError
from tests.commands.bad_inputs import contents

from .helpers import ROOT, script_env, tiny_train_args


def at_step(monkeypatch, which, action):
    """Do something after the backward pass of a step, counted from 1."""
    steps, backward = [0], training.backward

    def acting_backward(*args):
        backward(*args)
        steps[0] += 1
        if steps[0] == which:
            action()

    monkeypatch.setattr(training, 'backward', acting_backward)


def stop_politely():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope='module')
def runs(images, tmp_path_factory):
    """The folders of a run that has come to its end, `ended`, and of one that was stopped in epoch 1, `stopped`."""
    output = tmp_path_factory.mktemp('runs')
    train(tiny_train_args(images, output, experiment='ended'))
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 9, stop_politely)
        with pytest.raises(Interrupted, match='Stopped after step 3 of epoch 1'):
            train(tiny_train_args(images, output, experiment='stopped'))
    return output


@pytest.fixture
def ended(runs, tmp_path):
    return shutil.copytree(runs / 'ended', tmp_path / 'run')


@pytest.fixture
def stopped(runs, tmp_path):
    return shutil.copytree(runs / 'stopped', tmp_path / 'run')


def refused(folder, args, match):
    """Make sure that a run is refused in one sentence, and that its folder is as it was."""
    before = contents(folder)
    with pytest.raises(PSTError, match=match) as e:
        train(args)
    assert len(str(e.value)) < 900 and len(str(e.value).splitlines()) == 1, str(e.value)
    assert contents(folder) == before


def keep_only(folder, *names):
    for path in folder.glob('*.pth.tar'):
        if path.name not in names:
            path.unlink()


def damage(path):
    content = path.read_bytes()
    path.unlink()  # one of several links
    path.write_bytes(content[:len(content) // 2])


class TestLostWork:
    def test_no_good_checkpoint_is_no_reason_to_start_afresh(self, images, ended, tmp_path):
        for path in ended.glob('*.pth.tar'):
            damage(path)
        refused(ended, tiny_train_args(images, tmp_path, resume='auto'), 'None of the 4 checkpoints in .* is good')

    def test_the_best_one_is_used_where_no_other_is_left(self, images, ended, tmp_path, caplog):
        keep_only(ended, 'last.pth.tar', 'model_best.pth.tar')
        best = torch.load(ended / 'model_best.pth.tar', weights_only=False)['epoch']
        damage(ended / 'last.pth.tar')
        with caplog.at_level(logging.INFO):
            run = prepare(tiny_train_args(images, tmp_path, epochs=3, resume='auto'))
        assert run.start == (best + 1, 0)
        assert 'last.pth.tar cannot be read: it is truncated' in caplog.text and 'Going on from' in caplog.text

    def test_what_may_not_be_opened_is_not_damaged(self, ended):
        open_to_all = Path(tempfile.mkdtemp())
        try:
            folder = shutil.copytree(ended, open_to_all / 'run')
            (folder / 'last.pth.tar').chmod(0)
            open_to_all.chmod(0o755)
            (open_to_all / 'run').chmod(0o755)
            if os.geteuid() == 0:  # who may open anything
                os.seteuid(65534)
            with pytest.raises(PSTError, match=r'last\.pth\.tar cannot be opened \(Permission denied\)'):
                find_newest(folder)
        finally:
            os.seteuid(os.getuid())
            shutil.rmtree(open_to_all)

    @pytest.mark.parametrize('values, match', [
        (dict(model='test_resnet'), 'it is of test_resnet_pst, and .*unknown to it'),
        (dict(opt='adamw'), '--opt adamw cannot go on'),
        (dict(start_epoch=9), '--start-epoch 9 is beyond the end'),
        (dict(start_epoch=1), 'has come further'),
        (dict(epochs=1), 'has trained 2 epochs already'),
        (dict(overwrite=True), 'choose one'),
    ], ids=lambda v: ','.join(v) if isinstance(v, dict) else '')
    def test_a_run_that_cannot_go_on_leaves_its_folder_as_it_was(self, images, ended, tmp_path, values, match):
        refused(ended, tiny_train_args(images, tmp_path, resume='auto', **values), match)

    def test_a_second_run_in_a_folder_has_to_be_meant(self, images, stopped, tmp_path):
        (stopped / 'notes.txt').write_text('mine')
        refused(stopped, tiny_train_args(images, tmp_path), r'holds an earlier run \(last.pth.tar\): --resume auto .*'
                                                            r'--overwrite .* another --experiment')
        elsewhere = shutil.copy(stopped / 'last.pth.tar', tmp_path)
        refused(stopped, tiny_train_args(images, tmp_path, resume=elsewhere), 'holds an earlier run')
        keep_only(stopped)
        refused(stopped, tiny_train_args(images, tmp_path), r'holds an earlier run \(summary.csv\)')

    def test_overwriting_removes_what_the_engine_wrote_and_nothing_else(self, images, stopped, tmp_path):
        (stopped / 'notes.txt').write_text('mine')
        (stopped / 'curve.png').write_text('that of the earlier run')
        result = train(tiny_train_args(images, tmp_path, epochs=1, val_split='', overwrite=True))
        assert sorted(path.name for path in stopped.iterdir()) == [
            'args.yaml', 'checkpoint-0.pth.tar', 'last.pth.tar', 'notes.txt', 'speed.csv', 'summary.csv']
        assert len(result.history) == 1 and 'overwrite: false' in (stopped / 'args.yaml').read_text()

    def test_going_back_in_a_folder_has_to_be_meant(self, images, stopped, tmp_path):
        values = dict(resume=str(stopped / 'last.pth.tar'), epochs=1)
        refused(stopped, tiny_train_args(images, tmp_path, **values), r'recovery-1-3\.pth\.tar has come further')
        train(tiny_train_args(images, tmp_path, **values, overwrite=True))
        assert find_newest(stopped).name == 'last.pth.tar'

    def test_two_runs_in_a_folder_at_once(self, images, tmp_path, monkeypatch):
        args = tiny_train_args(images, tmp_path, epochs=1, resume='auto')
        second = []

        def start_another():
            with pytest.raises(PSTError, match=rf'Another run is at work in .*process {os.getpid()} '):
                train(args)
            second.append('refused')

        at_step(monkeypatch, 2, start_another)
        assert len(train(args).history) == 1 and second == ['refused']
        assert not (tmp_path / 'run' / 'run.lock').exists()

    @pytest.mark.parametrize('link', [os.symlink, os.link, lambda victim, path: os.mkfifo(path)], ids='shp')
    def test_a_lock_that_is_a_link_leaves_its_target_alone(self, images, tmp_path, link):
        (tmp_path / 'run').mkdir()
        victim = tmp_path / 'run' / 'thesis.txt'
        victim.write_text('precious')
        link(victim, tmp_path / 'run' / 'run.lock')
        with pytest.raises(PSTError, match=r'run\.lock is no file of a lock but a link'):
            train(tiny_train_args(images, tmp_path))
        assert victim.read_text() == 'precious' and os.path.lexists(tmp_path / 'run' / 'run.lock')

    def test_a_terminal_that_is_closed_is_a_polite_end(self, images, tmp_path):
        write_yaml(tiny_train_args(images, tmp_path, epochs=200, val_split=''), tmp_path / 'config.yaml')
        pid, terminal = pty.fork()
        if pid == 0:
            os.execve(sys.executable, [
                sys.executable, str(ROOT / 'train.py'), '--config', str(tmp_path / 'config.yaml')], script_env())
        said = b''
        while b'Train: 0' not in said:
            said += os.read(terminal, 1000)
        os.close(terminal)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
        assert list((tmp_path / 'run').glob('*.pth.tar'))

    def test_a_hangup_that_is_ignored_stays_so(self, images, tmp_path, monkeypatch):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        try:
            at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGHUP))
            assert len(train(tiny_train_args(images, tmp_path, epochs=1)).history) == 1
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_a_second_interrupt_ends_at_once_in_a_sentence(self, images, tmp_path, monkeypatch):
        def interrupt_twice():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

        at_step(monkeypatch, 9, interrupt_twice)
        with pytest.raises(Interrupted, match='Stopped at once') as e:
            train(tiny_train_args(images, tmp_path, workers=1))
        assert e.value.__suppress_context__
        assert find_newest(tmp_path / 'run').name == 'last.pth.tar' and not list((tmp_path / 'run').glob('recovery*'))

    def test_an_interrupt_while_a_checkpoint_is_written(self, images, tmp_path, monkeypatch):
        save, saves = torch.save, []

        def interrupted_save(state, path):
            saves.append(path)
            if len(saves) < 2:
                return save(state, path)
            Path(path).write_bytes(b'half')
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(torch, 'save', interrupted_save)
        with pytest.raises(Interrupted, match='Stopped at once'):
            train(tiny_train_args(images, tmp_path))
        assert find_newest(tmp_path / 'run').name == 'last.pth.tar' and not list((tmp_path / 'run').glob('*tmp*'))

    def test_a_run_resumed_at_its_end_leaves_nothing_to_go_on_from(self, images, ended, tmp_path):
        for name in ('recovery-1-3.pth.tar', 'recovery_tmp.pth.tar', 'model_best.pth.tar.tmp'):
            shutil.copy(ended / 'checkpoint-0.pth.tar', ended / name)
        assert train(tiny_train_args(images, tmp_path, resume='auto')).history == []
        assert not [p.name for p in ended.iterdir() if 'recovery' in p.name or 'tmp' in p.name]

    def test_a_kill_between_the_names_of_a_checkpoint(self, images, ended, tmp_path):
        """Of the last epoch, which was the best, there is only last.pth.tar."""
        content = torch.load(ended / 'last.pth.tar', weights_only=False)
        content['metric'] = 101.
        content['saver'].update(pending=(1, 101.))
        for name in ('last', 'checkpoint-1'):
            (ended / f'{name}.pth.tar').unlink()
        torch.save(content, ended / 'last.pth.tar')
        shutil.copy(ended / 'checkpoint-0.pth.tar', ended / 'model_best.pth.tar')
        result = train(tiny_train_args(images, tmp_path, resume='auto'))
        assert (result.best_epoch, result.best_metric) == (1, 101.) and (ended / 'checkpoint-1.pth.tar').is_file()
        assert torch.load(ended / 'model_best.pth.tar', weights_only=False)['epoch'] == 1

    def test_a_folder_that_is_removed_while_the_run_trains(self, images, tmp_path, monkeypatch):
        at_step(monkeypatch, 8, lambda: shutil.rmtree(tmp_path / 'run'))
        with pytest.raises(PSTError, match=r'The folder of the run, .*, is gone'):
            train(tiny_train_args(images, tmp_path))

    def test_a_loader_worker_that_is_killed(self, images, tmp_path, monkeypatch):
        def kill_worker():
            worker = max(multiprocessing.active_children(), key=lambda process: process.pid)
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()

        at_step(monkeypatch, 8, kill_worker)
        with pytest.raises(PSTError, match=r'A process that loads images has ended .*--workers.* is intact'):
            train(tiny_train_args(images, tmp_path, workers=1, batch_size=2))
        assert find_newest(tmp_path / 'run') is None or find_newest(tmp_path / 'run').name == 'last.pth.tar'


    def test_too_little_memory(self, images, tmp_path, monkeypatch):
        def fill():
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB.')

        at_step(monkeypatch, 8, fill)
        with pytest.raises(PSTError, match=r'20\.00 GiB\): try a smaller --batch-size.* again with --resume auto'):
            train(tiny_train_args(images, tmp_path))


class TestWithoutAWord:
    """What came out wrong, and nothing was said."""

    @pytest.mark.parametrize('values, match', [
        (dict(batch_size=6), r'--batch-size 6 \(was 8\)'),
        (dict(grad_accum_steps=2), r'--grad-accum-steps 2 \(was 1\)'),
        (dict(seed=7), r'--seed 7 \(was 42\)'),
    ], ids=lambda v: ','.join(v) if isinstance(v, dict) else '')
    def test_other_batches_in_the_middle_of_an_epoch(self, images, stopped, tmp_path, values, match):
        refused(stopped, tiny_train_args(images, tmp_path, resume='auto', **values), match)

    def test_other_images_in_the_middle_of_an_epoch(self, images, stopped, tmp_path):
        data = shutil.copytree(images, tmp_path / 'images')
        (data / 'train' / 'class0' / '0.png').unlink()
        refused(stopped, tiny_train_args(data, tmp_path, resume='auto'), r'47 training images \(were 48\)')

    def test_other_processes_in_the_middle_of_an_epoch(self, images, tmp_path, caplog):
        args = tiny_train_args(images, tmp_path)
        args.rank = 0
        saved = dict(args=args, stream=dict(world_size=1, batches=6, images=48))
        values = dict(saved=saved, path=tmp_path, args=args, stream=Stream(2, 3, 48), names=None)
        with pytest.raises(PSTError, match=r'middle of epoch 1, .*2 processes \(were 1\)'):
            check_changes(position=Position(1, 3), **values)
        check_changes(position=Position(2), **values)
        assert '2 processes (were 1)' in caplog.text

    def test_what_a_checkpoint_says_of_itself_is_told_in_short(self, images, tmp_path, caplog):
        args = tiny_train_args(images, tmp_path)
        args.rank = 0
        told = Namespace(**{**vars(args), 'model': 'x' * 10_000 + '\x1b[2J', 'lr': torch.ones(3)})
        saved = dict(args=told, stream=dict(world_size=torch.ones(3), images='\x1b[2J'))
        check_changes(saved, tmp_path, args, Position(), Stream(1, 6, 48), ['a'])
        assert 'xxxxx' in caplog.text and len(caplog.text) < 1000 and '\x1b' not in caplog.text

    def test_another_recipe_from_the_end_of_an_epoch_is_done_and_said(self, images, ended, tmp_path, caplog):
        values = dict(lr=0.01, weight_decay=0.1, epochs=5, batch_size=4, model_ema=True, sched='step')
        run = prepare(tiny_train_args(images, tmp_path, resume='auto', **values))
        assert run.start == (2, 0) and run.num_epochs == 5 and run.lr == 0.01 and run.task.has_ema()
        assert {g['weight_decay'] for g in run.optimizer.param_groups} == {0., 0.1}
        assert any('momentum_buffer' in state for state in run.optimizer.state.values())
        for said in ('--lr 0.01 (was 0.05)', '--weight-decay 0.1 (was 2e-05)', '--epochs 5 (was 2)',
                     '--batch-size 4 (was 8)', '--model-ema True (was False)', '--sched step (was cosine)'):
            assert said in caplog.text

    def test_the_same_recipe_is_not_worth_a_word(self, images, stopped, tmp_path, caplog):
        run = prepare(tiny_train_args(images, tmp_path, resume='auto', workers=1, log_interval=3))
        assert run.start == (1, 3) and not caplog.records

    def test_an_optimizer_of_another_kind_starts_with_a_fresh_state(self, images, ended, tmp_path):
        run = prepare(tiny_train_args(images, tmp_path, resume='auto', epochs=3, opt='adamw', no_resume_opt=True))
        assert run.start == (2, 0) and not run.optimizer.state

    def test_another_metric_ranks_anew(self, images, ended, tmp_path):
        content = torch.load(ended / 'last.pth.tar', weights_only=False)
        content['args'].eval_metric = 'top5'
        content['saver'] = dict(
            checkpoint_files=[('checkpoint-0.pth.tar', 100.)], best_epoch=0, best_metric=100., pending=(1, 100.))
        keep_only(ended, 'checkpoint-0.pth.tar')
        torch.save(content, ended / 'last.pth.tar')
        result = train(tiny_train_args(images, tmp_path, resume='auto', epochs=3, checkpoint_hist=2))
        assert result.best_epoch == 2 and result.best_metric < 100
        assert sorted(p.name for p in ended.glob('checkpoint*')) == ['checkpoint-1.pth.tar', 'checkpoint-2.pth.tar']

    def test_classes_of_other_names(self, images, ended, tmp_path):
        data = tmp_path / 'images'
        for split in ('train', 'validation'):
            for i, name in enumerate(('cat', 'class1', 'dog')):
                shutil.copytree(images / split / f'class{i}', data / split / name)
        args = tiny_train_args(data, tmp_path, resume='auto', epochs=3)
        refused(ended, args, 'lacks class0, class2 and alone has cat')

    def test_the_newest_state_is_that_of_the_run_that_took_the_place(self, images, stopped, tmp_path, monkeypatch):
        with pytest.raises(PSTError, match='--overwrite'):
            train(tiny_train_args(images, tmp_path))
        at_step(monkeypatch, 2, stop_politely)
        with pytest.raises(Interrupted):
            train(tiny_train_args(images, tmp_path, overwrite=True))
        assert prepare(tiny_train_args(images, tmp_path, resume='auto')).start == Position(0, 2)

    @pytest.mark.parametrize('position', [[1], 'ab', [1, -1], [1., 2.], None])
    def test_a_position_that_makes_no_sense(self, images, ended, tmp_path, position):
        keep_only(ended, 'last.pth.tar')
        content = torch.load(ended / 'last.pth.tar', weights_only=False)
        torch.save({**content, 'position': position}, ended / 'last.pth.tar')
        refused(ended, tiny_train_args(images, tmp_path, resume='auto'), 'does not tell in numbers')

    @pytest.mark.parametrize('entry, value', [('optimizer', 7), ('optimizer', {}), ('state_dict', [1])])
    def test_a_state_that_makes_no_sense(self, images, ended, tmp_path, entry, value):
        content = torch.load(ended / 'last.pth.tar', weights_only=False)
        torch.save({**content, entry: value}, tmp_path / 'odd.pth.tar')
        refused(ended, tiny_train_args(
            images, tmp_path, experiment='other', epochs=3, resume=str(tmp_path / 'odd.pth.tar')), 'does not fit')
        assert not (tmp_path / 'other').exists()

    @pytest.mark.parametrize('place', ['args.opt_kwargs', 'optimizer', 'facts', 'saver', 'epoch'])
    def test_a_list_that_shares_itself_is_refused_at_once(self, images, ended, tmp_path, place):
        content = torch.load(ended / 'last.pth.tar', weights_only=False)
        bomb = [0]
        for _ in range(10 if place == 'optimizer' else 60):  # the first is in bounds, but no state
            bomb = [bomb, bomb]
        if place == 'optimizer':
            content['optimizer']['state'][0]['step'] = bomb
        elif place.startswith('args'):
            setattr(content['args'], place.split('.')[1], bomb)
        else:
            content[place] = bomb
        torch.save(content, tmp_path / 'odd.pth.tar')
        refused(ended, tiny_train_args(
            images, tmp_path, experiment='other', epochs=3, resume=str(tmp_path / 'odd.pth.tar')),
            'in the state of its optimizer, step is neither' if place == 'optimizer' else 'expected')
        assert not (tmp_path / 'other').exists()

    @pytest.mark.parametrize('entry, value, said', [
        ('facts', dict(pretrained_cfg=dict(label_names=[['cat']])), r'label_names\.\[0\]|label_names\[0\]'),
        ('args', Namespace(opt_kwargs=torch.zeros(2)), 'at args.opt_kwargs: expected plain values'),
        ('args', [1], 'at args: expected a mapping'),
    ], ids=['label_names', 'tensor', 'list'])
    def test_facts_that_make_no_sense(self, images, ended, tmp_path, entry, value, said):
        content = torch.load(ended / 'last.pth.tar', weights_only=False)
        torch.save({**content, entry: value}, tmp_path / 'odd.pth.tar')
        refused(ended, tiny_train_args(
            images, tmp_path, experiment='other', epochs=3, resume=str(tmp_path / 'odd.pth.tar')), said)

    def odd(self, ended, images, tmp_path, change, **values):
        """Arguments to go on from a run whose last checkpoint was changed."""
        content = torch.load(ended / 'last.pth.tar', weights_only=False)
        change(content)
        torch.save(content, tmp_path / 'odd.pth.tar')
        return tiny_train_args(
            images, tmp_path, experiment='other', epochs=3, resume=str(tmp_path / 'odd.pth.tar'), **values)

    def test_the_settings_of_the_optimizer_are_those_of_the_flags(self, images, ended, tmp_path):
        def change(content):
            for group in content['optimizer']['param_groups']:
                group.update(
                    weight_decay=None, momentum='zz', maximize=True, lr=[1], initial_lr=-1., lr_scale=9., step=3)

        run = prepare(self.odd(ended, images, tmp_path, change))
        fresh = prepare(tiny_train_args(images, tmp_path, experiment='fresh'))
        kept = ('weight_decay', 'momentum', 'maximize', 'initial_lr')
        for group, own in zip(run.optimizer.param_groups, fresh.optimizer.param_groups, strict=True):
            assert {k: group[k] for k in kept} == {k: own[k] for k in kept}
            assert 'lr_scale' not in group and group['step'] == 3 and group['lr'] == run.lr
        assert any('momentum_buffer' in state for state in run.optimizer.state.values())

    @pytest.mark.parametrize('entry, name', [
        ('state_dict', 'fc.weight'), ('state_dict_ema', 'fc.weight'), ('optimizer', 'state.0.momentum_buffer')])
    @pytest.mark.parametrize('value, match', [
        (torch.nan, 'has NaN or infinite weights in 1 tensors, the first is {}'),
        (torch.zeros(1).expand(10 ** 12), '{} says that it is larger than what the file holds'),
        (torch.zeros(3).to_sparse(), '{} is no dense tensor'),
    ], ids=['nan', 'stride', 'sparse'])
    def test_a_tensor_that_is_no_use_is_named(self, images, ended, tmp_path, entry, name, value, match):
        def change(content):
            content['state_dict_ema'] = {k: v.clone() for k, v in content['state_dict'].items()}
            *path, last = name.split('.') if entry == 'optimizer' else [name]
            tensors = content[entry]
            for key in path:
                tensors = tensors[int(key) if key.isdigit() else key]
            if value is torch.nan:
                tensors[last].view(-1)[-1] = value
            else:
                tensors[last] = value

        args = self.odd(ended, images, tmp_path, change, model_ema=True)
        refused(ended, args, match.format(f'{entry}.{name}'))
        assert not (tmp_path / 'other').exists()

    @pytest.mark.parametrize('name, value, match', [
        ('momentum_buffer', torch.zeros(10 ** 5), 'momentum_buffer has 100000 values for a parameter of'),
        ('step', float('nan'), 'step is neither finite numbers'),
        ('step', 'zz', 'step is neither finite numbers'),
    ])
    def test_an_optimizer_that_holds_what_it_never_writes(self, images, ended, tmp_path, name, value, match):
        def change(content):
            content['optimizer']['state'][0][name] = value

        refused(ended, self.odd(ended, images, tmp_path, change), match)
        assert prepare(self.odd(ended, images, tmp_path, change, no_resume_opt=True)).start == (2, 0)

    @pytest.mark.parametrize('lr, match', [(0.01, None), (float('nan'), 'its lr is no'), ('zz', 'its lr is no')])
    def test_a_learning_rate_that_no_schedule_leads_stays(self, images, ended, tmp_path, lr, match):
        def change(content):
            for group in content['optimizer']['param_groups']:
                group['lr'] = lr

        args = self.odd(ended, images, tmp_path, change, sched='none')
        if match is None:
            assert prepare(args).lr == lr
        else:
            refused(ended, args, match)
            assert not (tmp_path / 'other').exists()


class TestTables:
    def rows(self, folder, name='summary.csv'):
        return [line.split(',')[0] for line in (folder / name).read_text().splitlines()]

    @pytest.mark.parametrize('harm', [
        lambda text: text[:-20],
        lambda text: text + b'2,0.1',
        lambda text: text + b'\0' * 512,
        lambda text: text + b'\xff\xfe\x80,"\n\r,,\n',
        lambda text: text + b'9,1,2,3,4,5\n',
    ], ids=['cut off', 'half a row more', 'zeros', 'bytes', 'a row to come'])
    def test_what_a_crash_leaves_is_mended(self, images, ended, tmp_path, harm):
        for name in ('summary.csv', 'speed.csv'):
            (ended / name).write_bytes(harm((ended / name).read_bytes()))
        first = (ended / 'summary.csv').read_bytes().splitlines()[1]
        result = train(tiny_train_args(images, tmp_path, epochs=3, resume='auto'))
        assert len(result.history) == 1
        for name in ('summary.csv', 'speed.csv'):
            assert self.rows(ended, name) in (['epoch', '0', '1', '2'], ['epoch', '0', '2'])
        assert (ended / 'summary.csv').read_bytes().splitlines()[1] == first
        kept = ended / 'summary.damaged.csv'
        assert self.rows(ended) == ['epoch', '0', '1', '2'] or kept.is_file()

    def test_other_columns_stay(self, images, ended, tmp_path):
        text = (ended / 'summary.csv').read_text().splitlines()
        (ended / 'summary.csv').write_text('\n'.join(
            [f'{text[0]},note', *(f'{line},"good, I think"' for line in text[1:])]))
        train(tiny_train_args(images, tmp_path, epochs=3, resume='auto'))
        lines = (ended / 'summary.csv').read_text().splitlines()
        assert self.rows(ended) == ['epoch', '0', '1', '2']
        assert lines[0].endswith(',note') and lines[1].endswith('"good, I think"') and lines[3].endswith(',')

    @pytest.mark.parametrize('content', [b'\x89PNG\r\n\x1a\n\0\0', b'a;b\n1;2\n', b'epoch,epoch\n0,0\n'])
    def test_no_table_at_all(self, images, ended, tmp_path, content):
        (ended / 'speed.csv').write_bytes(content)
        refused(ended, tiny_train_args(images, tmp_path, epochs=3, resume='auto'), r'speed\.csv is no table')
