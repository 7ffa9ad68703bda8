"""Two processes train what one would."""
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import timm
from torch import nn

from pst_timm.engine import train
from pst_timm.engine.args import write_yaml
from pst_timm.engine.recovery import check_checkpoint

from .helpers import ROOT, assert_same_weights, load_weights, script_env, tiny_train_args, write_images

# torch has no SyncBatchNorm for the CPU: the statistics are those of each image alone, or frozen
ALONE = dict(norm_layer='groupnorm1')
FROZEN = dict(zero_init_last=False, pst_zero_init=False)  # a frozen zero would cut the residual branches off


def batch_norms():
    """Names of the batch norms of the model these tests train."""
    return [n for n, m in timm.create_model('test_resnet_pst').named_modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """As many images as the global batch, so that the order in which they are dealt does not matter."""
    return write_images(tmp_path_factory.mktemp('ddp'), {'train': 8, 'validation': 3})


def torchrun(*words, restarts=0):
    return subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
         f'--max-restarts={restarts}', *map(str, words)],
        # torch's shared store keeps the addresses of the dead across a restart
        env=script_env(TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1'), stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=240)


def train_on_two(args, folder, script=('train.py',), restarts=0):
    write_yaml(args, folder / 'config.yaml')
    return torchrun(ROOT / script[0], *script[1:], '--config', folder / 'config.yaml', restarts=restarts)


CASES = {
    'coarse': (ALONE, {}),
    'coarse-frozen': (FROZEN, {}),
    'train_topk': (ALONE, dict(train_topk=2, train_fine_prob=0.5)),
}


def settings(case):
    norm, model_kwargs = CASES[case]
    return dict(
        epochs=4, sched='none', lr=0.02, no_aug=True, model_ema=True, model_ema_decay=0.5,
        model_kwargs=dict(norm, **model_kwargs), freeze=batch_norms() if norm is FROZEN else None)


@pytest.fixture(scope='module')
def on_two(data, tmp_path_factory):
    """Folders of what two processes trained, and wrote to standard error, by case."""
    folders = {case: tmp_path_factory.mktemp(case) for case in CASES}
    for case, folder in folders.items():
        write_yaml(tiny_train_args(data, folder, batch_size=12, **settings(case)), folder / 'config.yaml')
    done = torchrun(ROOT / 'tests' / 'engine' / 'ranks.py', *folders.values())
    said = {path: path.read_text() for folder in folders.values() for path in sorted(folder.glob('stderr*.txt'))}
    assert done.returncode == 0, (done.stderr, said)
    return folders


@pytest.mark.parametrize('case', CASES)
def test_two_processes_equal_one(data, on_two, tmp_path, case):
    model_kwargs = CASES[case][1]
    folder = on_two[case]
    said = (folder / 'stderr0.txt').read_text() + (folder / 'stderr1.txt').read_text()
    one = train(tiny_train_args(data, tmp_path, batch_size=24, **settings(case)))
    two = load_weights(folder / 'run' / 'last.pth.tar')
    weights = load_weights(one.output_dir / 'last.pth.tar')
    assert weights.keys() == two.keys()
    if not model_kwargs:  # the noise of the selection differs from rank to rank
        far = max((weights[k] - two[k]).abs().max().item() for k in weights)
        assert far < 1e-4, far
    gate = 'pst.blocks.0.attn.gate.weight'
    assert bool(two[gate].any()) == bool(model_kwargs)
    # nobody had to look for unused parameters, or found any
    assert 'unused' not in said
    # one log, one summary, from the first process
    assert said.count('Train: 3 [   1/1') == 1
    rows = (folder / 'run' / 'summary.csv').read_text().splitlines()
    mine = (one.output_dir / 'summary.csv').read_text().splitlines()
    assert len(rows) == len(mine) == 5
    if not model_kwargs:
        for a, b in zip(rows[1:], mine[1:]):
            assert [float(x) for x in a.split(',')] == pytest.approx([float(x) for x in b.split(',')], abs=2e-3)


@pytest.mark.slow
def test_batch_norm_repeated_augmentation_and_resume(data, tmp_path):
    train(tiny_train_args(data, tmp_path, epochs=1))
    args = tiny_train_args(data, tmp_path, epochs=2, resume='auto', batch_size=4, aug_repeats=3., model_ema=True)
    done = train_on_two(args, tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'Train: 0' not in done.stderr and 'Train: 1' in done.stderr


@pytest.mark.slow
def test_elastic_restarts_go_on_from_the_newest_checkpoint(data, tmp_path):
    values = dict(epochs=3, batch_size=4, resume='auto')
    (tmp_path / 'calm').mkdir()
    assert train_on_two(tiny_train_args(data, tmp_path / 'calm', **values), tmp_path / 'calm').returncode == 0
    # the first process dies at every second checkpoint it writes
    done = train_on_two(
        tiny_train_args(data, tmp_path, **values), tmp_path, script=('tests/engine/crash.py', 'save:2'), restarts=3)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count('Going on from') == 2
    assert_same_weights(*(load_weights(tmp_path / name / 'last.pth.tar') for name in ('run', 'calm/run')))


def start_two(folder, scripts, *args):
    """Start two processes that find each other without torchrun, which would end one when the other ends."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank, (script, values) in enumerate(zip(scripts, args)):
        write_yaml(values, folder / f'config{rank}.yaml')
        env = script_env(MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        env.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
        processes.append(subprocess.Popen(
            [sys.executable, str(ROOT / script[0]), *script[1:], '--config', str(folder / f'config{rank}.yaml')],
            env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    return processes


def last_sentence(said):
    assert said.count('error: ') == 1 and 'Traceback' not in said, said
    return said.split('error: ')[1]


@pytest.mark.slow
def test_processes_that_see_other_classes(data, tmp_path):
    """As many of them, and as many images, so that nothing else would show it."""
    other = shutil.copytree(data, tmp_path / 'other')
    for split in ('train', 'validation'):
        (other / split / 'class0').rename(other / split / 'class9')
    processes = start_two(tmp_path, [['train.py']] * 2, *(tiny_train_args(d, tmp_path) for d in (data, other)))
    for process in processes:
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 1, said
        assert 'Process 1 sees other training data than process 0: classes of other names' in last_sentence(said)
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
@pytest.mark.parametrize('number, timeout, told', [
    (signal.SIGSTOP, 10., 'Process 0 has waited 10 s for the others at the gradients of epoch 1, step 1'),
    (signal.SIGKILL, 600., 'Process 0 has lost another of the 2 at the gradients of epoch 1, step'),
], ids=lambda v: v.name if isinstance(v, signal.Signals) else '')
def test_a_process_that_is_missing_is_said(data, tmp_path, number, timeout, told):
    args = tiny_train_args(data, tmp_path, epochs=3, batch_size=4, dist_timeout=timeout)
    first, second = start_two(
        tmp_path, [['train.py'], ['tests/engine/crash.py', f'step:4:{number.name}']], args, args)
    try:
        said = first.communicate(timeout=120)[1]
    finally:
        second.kill()
        second.communicate()
    assert first.returncode == 1, said
    sentence = last_sentence(said)
    assert told in sentence and 'start again with --resume auto' in sentence
    check_checkpoint(tmp_path / 'run' / 'last.pth.tar')
