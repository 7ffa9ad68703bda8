"""Training a model: what the gate sees, gradient checkpointing, mixed precision, distributed training."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

from pst_timm.layers import FINE_FUSIONS
from tests.helpers import relative_error
from tests.models.helpers import TINY, build, images, unused

ROOT = Path(__file__).resolve().parents[2]


def step(model, optimizer, x):
    loss = model(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def changed(model, act):
    """Names of the parameters that an action changes."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    act()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


class TestGate:

    @pytest.mark.parametrize('kwargs, trains', [
        (dict(), False),
        (dict(topk=3), False),
        (dict(topk=3, fine_fusion='joint'), False),
        (dict(train_topk=3, fine_fusion='joint'), False),
        (dict(train_topk=3, train_fine_prob=0.), False),
        (dict(train_topk=3), True),
    ], ids=str)
    @pytest.mark.parametrize('opt', [
        dict(opt='momentum'), dict(opt='adamw'), dict(opt='lamb'), dict(opt='adamw', layer_decay=0.7)], ids=str)
    def test_moves_where_it_is_run_in_training_and_nowhere_else(self, opt, kwargs, trains):
        model = build(pst_depth=2, **kwargs).train()
        gates = {name for name, _ in model.named_parameters() if '.gate.' in name}
        assert len(gates) == 4 and all(model.get_parameter(name).any() for name in gates)
        optimizer = create_optimizer_v2(model, lr=0.01, weight_decay=0.1, **opt)
        moved = changed(model, lambda: [step(model, optimizer, images(seed=i)) for i in range(2)])
        assert moved & gates == (gates if trains else set())
        # what stands before a batch norm may have a bias whose gradient is nothing but rounding
        assert moved >= {name for name, p in model.named_parameters() if p.ndim > 1} - gates

    def test_set_topk_does_not_change_training(self):
        model, x = build().train(), images()
        other = build(topk=3).train()
        other.set_topk(5)
        assert torch.equal(model(x), other(x))


@pytest.mark.parametrize('fusion', FINE_FUSIONS)
@pytest.mark.parametrize('train_topk, train_fine_prob', [(0, 1.0), (2, 1.0), (2, 0.5)])
def test_gradient_checkpointing_changes_nothing(fusion, train_topk, train_fine_prob):
    results = []
    for enable in (False, True):
        model = build(pst_depth=2, train_topk=train_topk, train_fine_prob=train_fine_prob, fine_fusion=fusion).train()
        model.set_grad_checkpointing(enable)
        model.set_fine_step(1)
        outs = []
        torch.manual_seed(0)  # the same noise
        for i in range(6):
            y = model(images(seed=i))
            y.square().mean().backward()
            outs.append(y.detach())
        assert unused(model) == set()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        results.append((outs, grads, [block.attn.fine_step for block in model.pst.blocks]))
    (plain, plain_grads, plain_steps), (outs, grads, steps) = results
    assert steps == plain_steps
    assert all(torch.equal(a, b) for a, b in zip(outs, plain))
    for name, grad in grads.items():
        scale = plain_grads[name].abs().max().clamp(min=1e-8)
        assert ((grad - plain_grads[name]).abs().max() / scale).item() < 1e-4, name


@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize('topk', [0, 10 ** 6])
@pytest.mark.parametrize('fusion', FINE_FUSIONS)
def test_autocast(fusion, topk, dtype, tolerance):
    # all tokens are selected, as rounding may swap two whose scores are nearly equal
    model, x = build(num_classes=16, topk=topk, fine_fusion=fusion), images()
    with torch.no_grad():
        expected = model(x)
        with torch.autocast('cpu', dtype=dtype):
            y = model(x)
    assert relative_error(y, expected) < tolerance


@pytest.mark.parametrize('train_topk', [0, 3])
@pytest.mark.parametrize('fusion', FINE_FUSIONS)
def test_bfloat16_training(fusion, train_topk):
    model = build(num_classes=16, train_topk=train_topk, fine_fusion=fusion).train()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = model(images()).float().square().mean()
    loss.backward()
    assert unused(model) == set()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize('kwargs', [dict(), dict(train_topk=4)])
def test_a_tiny_problem_is_learnt(kwargs):
    torch.manual_seed(0)
    model = timm.create_model(TINY, num_classes=3, **kwargs).train()
    optimizer = create_optimizer_v2(model, 'adamw', lr=3e-3)
    x, target = torch.randn(12, 3, 48, 48), torch.arange(12) % 3
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


DISTRIBUTED = [
    dict(),
    dict(train_topk=2),
    dict(train_topk=2, train_fine_prob=0.5),
    dict(train_topk=2, train_fine_prob=0.5, fine_fusion='joint', pst_depth=2),
]


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    """What each of two processes saved, for every case of DISTRIBUTED."""
    if not torch.distributed.is_available():
        pytest.skip('torch without distributed')
    folder = tmp_path_factory.mktemp('ranks')
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    outs = [folder / f'rank{rank}.pt' for rank in range(2)]
    workers = [
        subprocess.Popen(
            [sys.executable, '-m', 'tests.models.ddp_worker', str(rank), '2', str(folder / 'init'), str(out),
             json.dumps(DISTRIBUTED)],
            cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
        for rank, out in enumerate(outs)
    ]
    try:
        errors = [worker.communicate(timeout=120)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], errors
    return [torch.load(out) for out in outs]


@pytest.mark.slow
@pytest.mark.parametrize('case, modes', list(enumerate([{False}, {True}, {True, False}, {True, False}])))
def test_two_processes_stay_alike(ranks, case, modes):
    """DistributedDataParallel with its defaults: no parameter goes unused, and the ranks keep the same weights."""
    first, second = (rank[case] for rank in ranks)
    assert all(torch.equal(p, second['parameters'][name]) for name, p in first['parameters'].items())
    assert first['fine_steps'] == second['fine_steps']
    assert set(first['fine_steps']) == modes
