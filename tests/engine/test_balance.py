"""What the flags for lopsided classes and hard examples do to the batches and losses of a run."""
import bisect
import collections
import itertools
import logging
import math
import shutil
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from timm.loss import create_classification_loss
from timm.task import LogitDistillationTask

from pst_timm.data.loaders import open_train_splits
from pst_timm.engine import factories, train
from pst_timm.engine.args import write_yaml
from pst_timm.engine.losses import TrainingLoss, create_loss, cross_entropies
from pst_timm.engine.processes import check_ranks
from pst_timm.engine.seeding import seeded_batches
from pst_timm.engine.training import prepare, start_epoch, train_one_epoch, validate_epoch
from pst_timm.utils.errors import PSTError

from .drawn import notes_of
from .helpers import ROOT, assert_same_weights, load_weights, tiny_train_args, write_images
from .test_distributed import torchrun
from .test_recovery import crash, go_on

CPU = torch.device('cpu')
COUNTS = [16, 8, 4]
# what leaves the images as they are: all that is random is which of them are drawn
STILL = dict(scale=[1., 1.], ratio=[1., 1.], hflip=0., img_size=32, train_interpolation='bilinear')


@pytest.fixture(scope='module')
def lopsided(tmp_path_factory):
    """A folder of classes with 16, 8 and 4 training images, and its --hard-examples. Not to be written to."""
    folder = write_images(tmp_path_factory.mktemp('lopsided'), {'train': 16, 'validation': 4})
    for label, count in enumerate(COUNTS):
        for i in range(count, 16):
            (folder / 'train' / f'class{label}' / f'{i}.png').unlink()
    rows = ''.join(f'class{label}/{i}.png,{weight_of(label, i)}\n' for label, n in enumerate(COUNTS) for i in range(n))
    (folder / 'weights.csv').write_text(f'image,weight\n{rows}')
    return folder


def weight_of(label, i):
    return (3 * i + label) % 5


def plain_chances(sampler, hard):
    """How likely each image is drawn, in the order of the images: by class, then by number."""
    weight = {'balanced': lambda n: 1 / n, 'sqrt': lambda n: n ** -0.5, None: lambda n: 1}[sampler]
    weights = [weight(n) * (weight_of(label, i) if hard else 1) for label, n in enumerate(COUNTS) for i in range(n)]
    return [w / sum(weights) for w in weights]


def plain_draw(chances, epoch, seed=42):
    """Places in a running sum, one random number each."""
    sums = list(itertools.accumulate(chances))
    generator = np.random.default_rng([seed, epoch, 2])
    return [bisect.bisect_right(sums, generator.random() * sums[-1]) for _ in chances]


def labels_of(draw):
    labels = [label for label, n in enumerate(COUNTS) for _ in range(n)]
    return [labels[i] for i in draw]


def batches_of(run, epoch):
    """The batches of an epoch as the training loop gets them."""
    start_epoch(run, epoch)
    return list(seeded_batches(run.data.train, run.args.seed, 0, epoch))


class TestDrawnBatches:
    @pytest.mark.parametrize('flags', [
        dict(sampler='balanced'), dict(sampler='sqrt'), dict(hard=True), dict(sampler='balanced', hard=True)],
        ids=lambda flags: '-'.join(map(str, flags.values())))
    def test_batches_hold_what_was_drawn(self, lopsided, tmp_path, flags):
        hard, sampler = flags.get('hard'), flags.get('sampler')
        run = prepare(tiny_train_args(
            lopsided, tmp_path, batch_size=4, sampler=sampler,
            hard_examples=str(lopsided / 'weights.csv') if hard else None, **STILL))
        chances = plain_chances(sampler, hard)
        images = run.data.train.dataset
        plain = {images[i][0].numpy().tobytes(): i for i in range(28)}  # by their pixels, which are all different
        assert len(plain) == 28
        mean, std = run.data.train.mean, run.data.train.std
        counts = np.zeros(28)
        for epoch in range(30):
            batches = batches_of(run, epoch)
            images = torch.cat([images * std + mean for images, _ in batches]).round().byte().numpy()
            found = [plain[image.tobytes()] for image in images]
            draw = plain_draw(chances, epoch)
            assert collections.Counter(found) == collections.Counter(draw) and found != draw
            assert torch.cat([labels for _, labels in batches]).tolist() == labels_of(found)
            counts += np.bincount(found, minlength=28)
        # chi-squared of the 840 draws against theory: 99.9% lie below the bound (by Wilson and Hilferty)
        expected = 30 * 28 * np.array(chances)
        drawable = expected > 0
        degrees = drawable.sum() - 1
        bound = degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3
        assert ((counts - expected)[drawable] ** 2 / expected[drawable]).sum() < bound
        assert ((counts - 30) ** 2 / 30).sum() > bound  # which images that come once an epoch each are far from

    @pytest.mark.parametrize('mixup', [0., 0.5])
    def test_images_on_the_device_are_drawn_alike(self, lopsided, tmp_path, mixup):
        values = dict(
            batch_size=4, sampler='balanced', mixup=mixup, smoothing=0.1, no_prefetcher=False, **STILL)
        usual = prepare(tiny_train_args(lopsided, tmp_path / 'a', **values))
        device = prepare(tiny_train_args(lopsided, tmp_path / 'b', data_on_device=True, **values))
        for epoch in (0, 3):
            a, b = batches_of(usual, epoch), batches_of(device, epoch)
            if mixup:  # which draws other numbers
                assert len(a) == len(b) and b[0][1].shape == (4, 3)
            else:
                assert all(torch.equal(x[1], y[1]) and torch.allclose(x[0], y[0], atol=1e-5) for x, y in zip(a, b))

    def test_without_the_flags_each_image_comes_once(self, lopsided, tmp_path):
        run = prepare(tiny_train_args(lopsided, tmp_path, batch_size=4))
        assert labels_of(range(28)) == sorted(torch.cat([labels for _, labels in batches_of(run, 0)]).tolist())

    def test_the_log_tells_the_shares(self, lopsided, tmp_path, caplog):
        with caplog.at_level(logging.INFO):
            prepare(tiny_train_args(lopsided, tmp_path, sampler='balanced'))
        assert 'the shares of the classes are 33.33% to 33.33% (of the images: 14.29% to 57.14%)' in caplog.text


class TestRareClasses:
    def test_rare_images_alone_are_augmented(self, lopsided, tmp_path):
        values = dict(rare_aa='rand-m9-n2-p1', rare_below=8, **STILL)
        dataset = prepare(tiny_train_args(lopsided, tmp_path, **values)).data.train.dataset
        plain = prepare(tiny_train_args(lopsided, tmp_path / 'plain', **STILL)).data.train.dataset
        same = {label: [] for label in range(3)}
        for i in range(28):
            (image, label), (expected, _) = dataset[i], plain[i]
            same[label].append(bool((image.numpy() == expected.numpy()).all()))
        assert all(same[0]) and all(same[1]), 'class 1 has 8 images, and so is not below 8'
        assert sum(same[2]) <= 1  # of 4; an operation may leave an image as it is

    def test_it_stands_instead_of_aa(self, lopsided, tmp_path):
        dataset = prepare(tiny_train_args(
            lopsided, tmp_path, aa='augmix-m3', rare_aa='rand-m9-n2', rare_below=5)).data.train.dataset
        assert list(dataset.class_transforms) == [2]
        rare, others = str(dataset.class_transforms[2]), str(dataset.transform)
        assert 'RandAugment' in rare and 'AugMixAugment' not in rare
        assert 'AugMixAugment' in others and 'RandAugment' not in others
        # all else is alike
        assert rare.split('RandAugment')[0] == others.split('AugMixAugment')[0]

    def test_who_has_no_rare_class_is_told(self, lopsided, tmp_path, caplog):
        prepare(tiny_train_args(lopsided, tmp_path, rare_aa='rand-m9', rare_below=4))
        assert '0 classes have fewer images, so --rare-aa does nothing' in caplog.text


def plain_losses(logits, target, smoothing=0., offsets=(0., 0., 0.), kind='ce'):
    """The loss of each image, a number at a time in float64."""
    losses = []
    for row, true in zip(logits.double().tolist(), target.tolist()):
        row = [x + o for x, o in zip(row, offsets)]
        k = len(row)
        if not isinstance(true, list):
            true = [(1 - smoothing) * (i == true) + smoothing / k for i in range(k)]
        if kind == 'ce':
            norm = math.log(sum(map(math.exp, row)))
            losses.append(-sum(t * (x - norm) for t, x in zip(true, row)))
        else:
            each = [-t * math.log(1 / (1 + math.exp(-x))) - (1 - t) * math.log(1 / (1 + math.exp(x)))
                    for t, x in zip(true, row)]
            losses.append(sum(each) / (1 if kind == 'bce-sum' else k))
    return losses


def hardest(losses, fraction):
    """Mean of the largest."""
    kept = sorted(losses, reverse=True)[:math.ceil(round(fraction * len(losses), 6))]
    return sum(kept) / len(kept)


def targets(kind, count=10):
    generator = torch.Generator().manual_seed(1)
    if kind == 'soft':
        return torch.rand(count, 3, generator=generator, dtype=torch.float64).softmax(1)
    return torch.randint(3, (count,), generator=generator)


SHARES = np.array([4 / 7, 2 / 7, 1 / 7])
LOGITS = torch.randn(10, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class TestLosses:
    @pytest.mark.parametrize('kind', ['hard', 'soft'])
    @pytest.mark.parametrize('smoothing', [0., 0.1])
    @pytest.mark.parametrize('tau', [None, 1., 0.3])
    @pytest.mark.parametrize('fraction', [None, 0.01, 0.25, 0.5, 0.7, 1.])
    def test_they_are_those_of_a_plain_formula(self, kind, smoothing, tau, fraction, tmp_path):
        args = tiny_train_args(
            tmp_path, tmp_path, logit_adjust=tau, hard_loss_fraction=fraction, hard_loss_warmup=0 if fraction else None,
            smoothing=smoothing, mixup=0.2 if kind == 'soft' else 0.)
        loss = create_loss(args, SHARES)
        if tau is None and fraction is None:
            assert loss is None
            return
        if tau:
            assert loss.offsets.tolist() == pytest.approx([tau * math.log(s) for s in SHARES])
            loss.offsets = tau * torch.from_numpy(SHARES).log()
        expected = plain_losses(
            LOGITS, targets(kind), smoothing, [(tau or 0.) * math.log(share) for share in SHARES])
        assert loss(LOGITS, targets(kind)).item() == pytest.approx(hardest(expected, fraction or 1.), rel=1e-12)

    @pytest.mark.parametrize('kind', ['hard', 'soft'])
    @pytest.mark.parametrize('add_up', [False, True])
    def test_binary_cross_entropy(self, kind, add_up, tmp_path):
        loss = create_loss(tiny_train_args(
            tmp_path, tmp_path, bce_loss=True, bce_sum=add_up, smoothing=0.1, mixup=0.2 if kind == 'soft' else 0.,
            hard_loss_fraction=0.3))
        expected = plain_losses(LOGITS, targets(kind), 0.1, kind='bce-sum' if add_up else 'bce')
        assert loss(LOGITS, targets(kind)).item() == pytest.approx(hardest(expected, 0.3), rel=1e-12)

    @pytest.mark.parametrize('values', [
        dict(), dict(smoothing=0.1), dict(mixup=0.2, smoothing=0.1), dict(bce_loss=True),
        dict(bce_loss=True, mixup=0.2),
        dict(bce_loss=True, bce_sum=True, bce_target_thresh=0.2, bce_pos_weight=2.),
        dict(bce_loss=True, smoothing=0.1),
    ], ids=lambda v: '-'.join(v) or 'plain')
    def test_of_whole_batches_they_are_timms(self, values, tmp_path):
        args = tiny_train_args(tmp_path, tmp_path, **values)
        task = factories.create_task(args, timm.create_model('test_resnet', num_classes=3), CPU, torch.float32)
        args.hard_loss_fraction = 1.
        target = targets('soft' if args.mixup else 'hard')
        expected = task.criterion(LOGITS, target).item()
        assert create_loss(args)(LOGITS, target).item() == pytest.approx(expected, rel=1e-12)

    def test_all_count_until_the_warm_up_is_over(self, tmp_path):
        values = dict(hard_loss_fraction=0.5, warmup_epochs=3)
        losses = plain_losses(LOGITS, targets('hard'))
        for more, first in (({}, 3), (dict(hard_loss_warmup=1), 1), (dict(hard_loss_warmup=0), 0)):
            loss = create_loss(tiny_train_args(tmp_path, tmp_path, **values, **more))
            for epoch in range(5):
                loss.set_epoch(epoch)
                expected = hardest(losses, 0.5 if epoch >= first else 1.)
                assert loss(LOGITS, targets('hard')).item() == pytest.approx(expected, rel=1e-12)

    def test_the_others_give_no_gradient(self):
        logits = LOGITS.clone().requires_grad_()
        TrainingLoss(cross_entropies, fraction=0.3)(logits, targets('hard')).backward()
        largest = np.argsort(plain_losses(LOGITS, targets('hard')))[-3:]
        assert set(np.flatnonzero(logits.grad.abs().sum(1))) == set(largest)
        # and those that count what a mean over them alone gives
        alone = LOGITS[largest].clone().requires_grad_()
        create_classification_loss('ce')(alone, targets('hard')[largest]).backward()
        assert torch.allclose(logits.grad[largest], alone.grad, atol=1e-15)

    def test_a_class_that_is_never_seen_has_no_logarithm(self, tmp_path):
        with pytest.raises(PSTError, match='class 1 has no image that is seen'):
            create_loss(tiny_train_args(tmp_path, tmp_path, logit_adjust=1.), np.array([0.5, 0., 0.5]))

    def test_low_precision(self):
        """Under autocast the logits are bfloat16, and the losses that are compared are not."""
        loss = TrainingLoss(cross_entropies, torch.from_numpy(SHARES).log().float(), 0.5)
        model = torch.nn.Linear(3, 3)
        with torch.autocast('cpu', torch.bfloat16):
            logits = model(LOGITS.float())
            found = loss(logits, targets('hard'))
        assert logits.dtype == torch.bfloat16 and found.dtype == torch.float32
        expected = hardest(plain_losses(logits.detach(), targets('hard'), offsets=np.log(SHARES)), 0.5)
        assert found.item() == pytest.approx(expected, rel=1e-5)


class TestLossesOfARun:
    @pytest.mark.parametrize('values', [
        dict(), dict(mixup=0.5, smoothing=0.1), dict(mixup=0.5, no_prefetcher=True),
        dict(amp=True, amp_dtype='bfloat16'), dict(sampler='balanced'), dict(bce_loss=True, logit_adjust=None),
    ], ids=lambda v: '-'.join(v) or 'plain')
    def test_a_step_has_the_loss_of_the_formula(self, lopsided, tmp_path, values):
        flags = {**dict(logit_adjust=1., hard_loss_fraction=0.5, hard_loss_warmup=1, batch_size=8), **values}
        run = prepare(tiny_train_args(lopsided, tmp_path, **flags))
        shares = np.full(3, 1 / 3) if 'sampler' in flags else np.array(COUNTS) / 28
        offsets = np.log(shares) if flags['logit_adjust'] else np.zeros(3)
        for epoch in (0, 1):
            batch = run.batches.prepare(batches_of(run, epoch)[0], training=True)
            with run.autocast():
                found = run.batches.loss(run.task, batch).item()
                logits = run.task.get_trainable_module()(batch[0]).detach()
            losses = plain_losses(
                logits, batch[1], run.args.smoothing, offsets, 'bce' if run.args.bce_loss else 'ce')
            assert found == pytest.approx(hardest(losses, 0.5 if epoch else 1.), rel=1e-4)
            assert found != pytest.approx(hardest(losses, 1. if epoch else 0.5), rel=1e-2)

    def test_each_batch_of_an_update_is_ranked_for_itself(self, lopsided, tmp_path, monkeypatch):
        run = prepare(tiny_train_args(
            lopsided, tmp_path, hard_loss_fraction=0.5, batch_size=4, grad_accum_steps=2, drop=0., epochs=1))
        kept = []
        forward = TrainingLoss.forward

        def noting(self, output, target):
            loss = forward(self, output, target)
            kept.append((plain_losses(output.detach(), target), loss.item()))
            return loss

        monkeypatch.setattr(TrainingLoss, 'forward', noting)
        calm = type('Calm', (), dict(distributed=False, agreed=lambda self: False))()
        metrics, _ = train_one_epoch(run, 0, calm)
        assert len(kept) == 7
        for losses, found in kept:
            assert found == pytest.approx(hardest(losses, 0.5), rel=1e-5)
        assert metrics['loss'] == pytest.approx(np.mean([found for _, found in kept]), rel=1e-6)

    def test_evaluation_is_as_ever(self, lopsided, tmp_path):
        flags = dict(logit_adjust=1., hard_loss_fraction=0.5)
        metrics = [
            validate_epoch(prepare(tiny_train_args(lopsided, tmp_path / name, **values)))
            for name, values in (('with', flags), ('without', {}))]
        assert metrics[0] == metrics[1] and metrics[0]['loss'] > 0

    def test_a_teacher_keeps_its_loss(self, tmp_path):
        """Of a distilling student, the loss of the labels is adjusted, and nothing else."""
        args = tiny_train_args(tmp_path, tmp_path, logit_adjust=1., hard_loss_fraction=0.5)
        models = [timm.create_model('test_resnet', num_classes=3) for _ in range(2)]
        images, target = torch.randn(8, 3, 32, 32), torch.arange(8) % 3
        found = []
        for criterion in (None, create_loss(args, SHARES)):
            task = LogitDistillationTask(*models, criterion=criterion, verbose=False)
            found.append(task.eval()(images, target))
        assert torch.equal(found[0]['kd_loss'], found[1]['kd_loss'])
        losses = plain_losses(found[0]['output'].detach(), target, offsets=np.log(SHARES))
        assert found[1]['task_loss'].item() == pytest.approx(hardest(losses, 0.5), rel=1e-5)

    def test_frequent_classes_lose_their_lead(self, lopsided, tmp_path):
        """Trained on logits that know the shares, a model without a clue finds all classes alike likely."""
        found = {}
        for tau in (None, 1.):
            result = train(tiny_train_args(
                lopsided, tmp_path / str(tau), logit_adjust=tau, epochs=10, batch_size=14, sched='none', lr=0.05,
                linear_probe=True, no_aug=True, head_init_scale=0.))
            found[tau] = load_weights(result.output_dir / 'last.pth.tar')['fc.bias']
        assert found[None][0] > found[None][2]
        assert (found[None][0] - found[None][2]) > (found[1.][0] - found[1.][2]) + 0.2


ALL = dict(
    batch_size=4, sampler='balanced', logit_adjust=1., hard_loss_fraction=0.5, hard_loss_warmup=1,
    rare_aa='rand-m5-n1', rare_below=5, epochs=3, hflip=0.5, mixup=0.2, smoothing=0.1)


@pytest.fixture(scope='module')
def killed(lopsided, tmp_path_factory):
    """The folder of a run that was killed in its second epoch, after 11 steps, of which an epoch has 7."""
    folder = tmp_path_factory.mktemp('killed')
    args = tiny_train_args(
        lopsided, folder, **ALL, recovery_interval=1, hard_examples=str(lopsided / 'weights.csv'))
    assert crash('step:11:SIGKILL', args, folder)[0] == -signal.SIGKILL
    return folder


class TestResume:
    @pytest.fixture
    def stopped(self, lopsided, killed, tmp_path):
        """Arguments with which that run goes on."""
        shutil.copytree(killed / 'run', tmp_path / 'run')
        return tiny_train_args(
            lopsided, tmp_path, **ALL, recovery_interval=1, resume='auto',
            hard_examples=shutil.copy(lopsided / 'weights.csv', tmp_path))

    def calm(self, lopsided, output, **values):
        return tiny_train_args(lopsided, output, **ALL, hard_examples=str(lopsided / 'weights.csv'), **values)

    @pytest.mark.slow
    def test_the_weights_are_those_of_a_run_that_was_not_killed(self, lopsided, stopped, tmp_path, caplog):
        calm = train(self.calm(lopsided, tmp_path / 'calm')).output_dir
        log = go_on(stopped, caplog)
        assert 'Train: 0' not in log and 'Train: 1 [   1/7' not in log
        assert_same_weights(*(load_weights(folder / 'last.pth.tar') for folder in (calm, tmp_path / 'run')))

    @pytest.mark.slow
    def test_with_loader_workers_and_no_recovery_checkpoint(self, lopsided, tmp_path, caplog):
        args = self.calm(lopsided, tmp_path, workers=1)
        assert crash('step:11:SIGKILL', args, tmp_path)[0] == -signal.SIGKILL
        calm = train(self.calm(lopsided, tmp_path / 'calm', workers=1)).output_dir
        log = go_on(args, caplog)
        assert 'Train: 0' not in log and 'Train: 1 [   1/7' in log
        assert_same_weights(*(load_weights(folder / 'last.pth.tar') for folder in (calm, tmp_path / 'run')))

    def test_what_was_drawn_goes_on(self, lopsided, stopped, tmp_path):
        calm, run = prepare(self.calm(lopsided, tmp_path / 'calm')), prepare(stopped)
        assert run.start == (1, 3)
        for epoch in (1, 2):
            pairs = list(zip(batches_of(run, epoch), batches_of(calm, epoch)))
            assert len(pairs) == 7 and all(torch.equal(x, y) for a, b in pairs for x, y in zip(a, b))
            assert run.task.criterion.epoch == epoch

    def test_other_draws_in_the_middle_of_an_epoch_are_refused(self, stopped, caplog):
        stopped.sampler = 'sqrt'
        with pytest.raises(PSTError, match=r'middle of epoch 1, .*--sampler sqrt \(was balanced\)'):
            prepare(stopped)
        stopped.sampler = 'balanced'
        path = Path(stopped.hard_examples)
        stopped.hard_examples = str(path.rename(path.with_name('moved.csv')))
        prepare(stopped)  # the same weights under another name
        assert 'moved.csv (was ' in caplog.text
        for content in ('image,weight\nclass0/0.png,2\n', None):
            if content is None:
                stopped.hard_examples = None
            else:
                Path(stopped.hard_examples).write_text(content)
            with pytest.raises(PSTError, match=r'middle of epoch 1, .*images drawn with other weights'):
                prepare(stopped)

    def test_other_losses_are_told(self, stopped, caplog):
        stopped.logit_adjust, stopped.hard_loss_fraction, stopped.hard_loss_warmup = 0.5, None, None
        prepare(stopped)
        assert '--logit-adjust 0.5 (was 1.0)' in caplog.text and '--hard-loss-fraction None (was 0.5)' in caplog.text


# torch has no SyncBatchNorm for the CPU: the statistics are those of each image alone
ALONE = dict(norm_layer='groupnorm1')
TWO = {
    'drawn': dict(sampler='balanced', rare_aa='rand-m9-n2-p1', rare_below=8, batch_size=7, epochs=3, **STILL),
    'repeated': dict(sampler='sqrt', aug_repeats=2., batch_size=7, epochs=2, **STILL),
    'losses': dict(logit_adjust=1., hard_loss_fraction=0.3, batch_size=14, epochs=1, no_aug=True, model_kwargs=ALONE),
}


@pytest.fixture(scope='module')
def folders(lopsided, tmp_path_factory):
    """What two processes trained, and which images each of them read, by case."""
    folders = {case: tmp_path_factory.mktemp(case) for case in TWO}
    for case, folder in folders.items():
        hard = None if case == 'losses' else str(lopsided / 'weights.csv')
        write_yaml(tiny_train_args(lopsided, folder, hard_examples=hard, **TWO[case]), folder / 'config.yaml')
    done = torchrun(ROOT / 'tests' / 'engine' / 'drawn.py', *folders.values())
    said = {path: path.read_text() for folder in folders.values() for path in sorted(folder.glob('stderr*.txt'))}
    assert done.returncode == 0, (done.stderr, said)
    return folders


@pytest.mark.slow
class TestTwoProcesses:
    def test_they_share_one_draw(self, folders):
        shares = [notes_of(folders['drawn'] / f'drawn{rank}.txt', 28) for rank in (0, 1)]
        for epoch in range(3):
            draw = plain_draw(plain_chances('balanced', True), epoch)
            order = torch.randperm(28, generator=torch.Generator().manual_seed(epoch)).tolist()
            for rank in (0, 1):
                # torch's DistributedSampler: the places of the draw in random order, every second one
                assert [i for i, _ in shares[rank][epoch]] == [draw[place] for place in order[rank::2]]

    def test_repeated_augmentation_repeats_what_was_drawn(self, folders):
        shares = [notes_of(folders['repeated'] / f'drawn{rank}.txt', 28) for rank in (0, 1)]
        for epoch in range(2):
            draw = plain_draw(plain_chances('sqrt', True), epoch)
            order = torch.randperm(28, generator=torch.Generator().manual_seed(epoch)).tolist()
            expected = [draw[place] for place in order[:14]]  # each image of half of the draw, once with each process
            assert [[i for i, _ in share[epoch]] for share in shares] == [expected, expected]

    def test_rare_images_alone_are_augmented(self, lopsided, folders, tmp_path):
        dataset = prepare(tiny_train_args(lopsided, tmp_path, **STILL)).data.train.dataset
        plain = [zlib.crc32(dataset[i][0].numpy().tobytes()) for i in range(28)]
        for rank in (0, 1):
            read = list(itertools.chain(*notes_of(folders['drawn'] / f'drawn{rank}.txt', 28)))
            changed = [[checksum != plain[i] for i, checksum in read if labels_of([i]) == [c]] for c in range(3)]
            assert len(changed[2]) >= 5 and np.mean(changed[2]) > 0.5  # an operation may leave an image as it is
            assert not any(changed[0]) and not any(changed[1])

    def test_each_counts_the_largest_losses_of_its_own(self, lopsided, folders, tmp_path):
        values = dict(TWO['losses'], logit_adjust=None, hard_loss_fraction=None, batch_size=28)
        run = prepare(tiny_train_args(lopsided, tmp_path, **values))
        dataset = run.data.train.dataset
        batch = torch.stack([torch.from_numpy(np.asarray(dataset[i][0])) for i in range(28)])
        images = (batch.float() - run.data.train.mean) / run.data.train.std
        with torch.no_grad():
            logits = run.task.get_trainable_module()(images)
        losses = plain_losses(logits, torch.tensor(labels_of(range(28))), offsets=np.log(np.array(COUNTS) / 28))
        order = torch.randperm(28, generator=torch.Generator().manual_seed(0)).tolist()
        expected = np.mean([hardest([losses[i] for i in order[rank::2]], 0.3) for rank in (0, 1)])
        rows = (folders['losses'] / 'run' / 'summary.csv').read_text().splitlines()
        found = float(dict(zip(rows[0].split(','), rows[1].split(',')))['train_loss'])
        assert found == pytest.approx(expected, rel=1e-4)
        assert found != pytest.approx(hardest(losses, 0.3), rel=1e-3), 'which would be those of all processes'

    def test_other_weights_in_another_process_are_refused(self, lopsided, tmp_path, monkeypatch):
        args = tiny_train_args(lopsided, tmp_path, sampler='balanced')
        args.distributed, args.world_size, args.rank = True, 2, 0
        splits = open_train_splits(args, 3)

        def check_with(other):
            def all_gather(everyone, mine):
                everyone[:] = [mine, (*mine[:3], other)]

            monkeypatch.setattr(dist, 'all_gather_object', all_gather)
            check_ranks(args, splits)

        check_with(splits.images.digest)
        for other in (None, splits.images.digest + 1):
            with pytest.raises(PSTError, match='Process 1 has other weights of the images than process 0'):
                check_with(other)
