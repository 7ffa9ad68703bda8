"""Images on the device: timm's order, timm's crops, PIL's pixels."""
import copy
import signal
import subprocess
import sys
from argparse import Namespace

import pytest
import timm
import torch
from PIL import Image
from timm.data import resolve_data_config
from timm.data.distributed_sampler import OrderedDistributedSampler
from timm.data.loader import PrefetchLoader
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.data import DistributedSampler
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from pst_timm.data import on_device as dd
from pst_timm.data.datasets import create_eval_dataset
from pst_timm.data.loaders import create_eval_loader, create_train_data, open_train_splits
from pst_timm.engine import train, train_args, validate, validate_args
from pst_timm.engine.args import write_yaml
from pst_timm.engine.seeding import seeded_batches
from pst_timm.utils.errors import PSTError
from tests.engine.helpers import (
    ROOT,
    assert_same_weights,
    load_weights,
    script_env,
    tiny_image,
    tiny_train_args,
    tiny_validate_args,
    write_images,
)

CPU = torch.device('cpu')
# what leaves the images as they are, at their own size
STILL = dict(scale=[1., 1.], ratio=[1., 1.], hflip=0., img_size=32)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """A few images at a time are read, so that these few are several chunks."""
    monkeypatch.setattr(dd, 'READ_BYTES', 4000)


def resolved(args):
    """Arguments as a run in one process on the CPU has them after it set up device and model."""
    model = timm.create_model('test_resnet')
    args = Namespace(**dict(vars(args), rank=0, world_size=1, distributed=False, in_chans=3))
    return args, resolve_data_config(vars(args), model=model)


def train_data(images, output, **values):
    args, config = resolved(tiny_train_args(images, output, **values))
    return loaders_of(args, config)


def loaders_of(args, config, dtype=torch.float32):
    return create_train_data(args, open_train_splits(args, 3), config, dtype)


def epoch_of(loader, epoch=0, seed=42, rank=0):
    return list(seeded_batches(loader, seed, rank, epoch))


def assert_same_batches(a, b):
    assert len(a) == len(b) > 0
    for batch, other in zip(a, b):
        assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(batch, other))


def crops_of(*rows, vflip=False, hflip=False, cubic=True):
    """Crops from rows of (top, left, height, width)."""
    boxes = torch.tensor(rows, dtype=torch.float32).T
    return dd.Crops(*boxes, *(torch.full((len(rows),), flag) for flag in (vflip, hflip, cubic)))


# the same batches as timm's loader


@pytest.mark.parametrize('values', [
    dict(), dict(crop_pct=1.), dict(crop_pct=0.7, interpolation='bilinear'), dict(img_size=32, crop_pct=1.),
    dict(crop_mode='squash', crop_pct=0.9), dict(crop_mode='border'), dict(crop_border_pixels=3),
    dict(mean=[0.2, 0.3, 0.4], std=[0.5, 0.6, 0.7]), dict(workers=2), dict(channels_last=True),
], ids=lambda v: ','.join(v) or 'default')
def test_evaluation_sees_the_very_pixels_of_timms_loader(images, tmp_path, values):
    # the images are stored as timm's transform makes them, so the tolerance is none
    (tmp_path / 'validation' / 'class0').mkdir(parents=True)
    for n, size in enumerate([(32, 32), (50, 32), (32, 77), (120, 90), (20, 20)]):
        tiny_image(0, n).resize(size).save(tmp_path / 'validation' / 'class0' / f'{n}.png')
    for folder, batch in ((images, 5), (tmp_path, 2)):
        loaders = []
        for on_device in (False, True):
            args, config = resolved(tiny_validate_args(folder, data_on_device=on_device, **values))
            dataset = create_eval_dataset(args, 'validation', None)
            loaders.append(create_eval_loader(args, dataset, config, batch, torch.float32))
        assert len(loaders[0]) == len(loaders[1])
        assert_same_batches(*map(list, loaders))


@pytest.mark.parametrize('values', [
    dict(no_aug=True), dict(no_aug=True, seed=7, epochs=1), STILL, dict(STILL, train_interpolation='bicubic'),
    dict(STILL, stored_size=32), dict(STILL, mean=[0.2, 0.3, 0.4], std=[0.5, 0.6, 0.7]),
])
def test_training_has_the_order_of_timms_loader(images, tmp_path, values):
    loaders = [
        train_data(images, tmp_path, val_split='', **dict(values, data_on_device=on_device)).train
        for on_device in (False, True) if on_device or not values.get('stored_size')]
    if len(loaders) == 1:
        loaders.insert(0, train_data(images, tmp_path, val_split='', **dict(values, stored_size=None)).train)
    assert isinstance(loaders[1], dd.DeviceLoader) and not isinstance(loaders[0], dd.DeviceLoader)
    for epoch in (0, 1):
        assert_same_batches(*(epoch_of(loader, epoch) for loader in loaders))


@pytest.mark.parametrize('values', [dict(no_aug=True), dict(STILL, model_dtype='bfloat16', smoothing=0.1)])
def test_a_run_is_the_run_of_timms_loader_where_nothing_is_drawn(images, tmp_path, values):
    runs = [
        train(tiny_train_args(images, tmp_path / str(on_device), data_on_device=on_device, **values))
        for on_device in (False, True)]
    assert runs[0].history == runs[1].history
    assert_same_weights(*(load_weights(run.output_dir / 'last.pth.tar') for run in runs))


# crops


@pytest.mark.parametrize('size', [(47, 47), (23, 41), (31, 37), (89, 19)])
@pytest.mark.parametrize('cubic', [False, True])
def test_crops_are_those_of_pil(size, cubic):
    """But for halves, which round either way in each of the two passes: PIL's weights are whole numbers, ours floats.

    PIL resizes along one axis at a time here, as the order in which it takes two axes depends on its version.
    """
    torch.manual_seed(0)
    pil = [tiny_image(n % 3, n, size=36).crop((0, 0, 36, 30)) for n in range(40)]
    crops = dd.RandomCrop(size, (0.08, 1.), (0.5, 2.), 0.5, 0.5).draw(40, 30, 36, CPU)
    crops = crops._replace(cubic=torch.full((40,), cubic))
    ours = dd.take_crops(torch.stack([F.pil_to_tensor(p) for p in pil]), crops, size)
    assert ours.shape == (40, 3, *size) and crops.vflip.any() and crops.hflip.any()
    filter = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
    differences = []
    for n, image in enumerate(pil):
        top, left, height, width = (int(t[n]) for t in crops[:4])
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((size[1], height), filter).resize((size[1], size[0]), filter)
        image = F.hflip(image) if crops.hflip[n] else image
        image = F.vflip(image) if crops.vflip[n] else image
        differences.append((ours[n] - F.pil_to_tensor(image)).abs())
    differences = torch.stack(differences)
    # on this noise a shift by a tenth of a pixel would be whole levels on average
    assert differences.max() <= 2 and differences.mean() < 0.02


def test_crops_without_a_resize_are_exact():
    images = torch.randint(256, (2, 3, 20, 24), dtype=torch.uint8)
    for cubic in (False, True):
        crop = dd.take_crops(images, crops_of((0, 0, 20, 24), (0, 0, 20, 24), cubic=cubic), (20, 24))
        assert torch.equal(crop, images.float())
        crop = dd.take_crops(images, crops_of((3, 5, 10, 12), (10, 12, 10, 12), cubic=cubic), (10, 12))
        assert torch.equal(crop[0], images[0, :, 3:13, 5:17].float())
        assert torch.equal(crop[1], images[1, :, 10:, 12:].float())


def test_a_crop_lands_where_its_box_says():
    # a ramp of one level per pixel tells where each pixel came from
    ramp = torch.arange(100, dtype=torch.uint8)
    images = torch.stack([ramp[:, None].expand(100, 100), ramp.expand(100, 100)])[None]
    for top, left, height, width in ((0, 0, 100, 100), (10, 60, 80, 40), (55, 3, 20, 90)):
        y, x = dd.take_crops(images, crops_of((top, left, height, width), cubic=False), (16, 16))[0]
        for coordinates, start, length in ((y[:, 3], top, height), (x[3], left, width)):
            expected = start + (torch.arange(16) + 0.5) * length / 16 - 0.5
            # half a level of rounding, and at the ends half the step that the filter has no pixels for
            assert (coordinates - expected)[1:-1].abs().max() <= 0.51
            assert (coordinates - expected).abs().max() <= 0.51 + length / 16 / 4


def test_flips():
    images = torch.randint(256, (1, 3, 20, 24), dtype=torch.uint8)
    box, size = (2, 3, 15, 17), (10, 30)
    plain = dd.take_crops(images, crops_of(box), size)
    assert torch.equal(dd.take_crops(images, crops_of(box, hflip=True), size), plain.flip(3))
    assert torch.equal(dd.take_crops(images, crops_of(box, vflip=True), size), plain.flip(2))


def kolmogorov_smirnov(a, b):
    """Largest distance between the distribution functions of two samples."""
    a, b = a.sort().values.double(), b.sort().values.double()
    both = torch.cat([a, b])
    shares = [torch.searchsorted(x, both, right=True) / len(x) for x in (a, b)]
    return (shares[0] - shares[1]).abs().max().item()


@pytest.mark.parametrize('size, scale, ratio', [
    ((64, 64), (0.08, 1.), (3 / 4, 4 / 3)),
    ((64, 64), (0.9, 1.), (0.5, 2.)),  # many attempts fail
    ((40, 90), (0.3, 1.), (3 / 4, 4 / 3)),  # and the middle is what is left
    ((90, 20), (0.5, 0.8), (3 / 4, 4 / 3)),
])
def test_crops_have_the_distribution_of_timm(size, scale, ratio):
    import random

    torch.manual_seed(0)
    random.seed(0)
    count, image = 4000, Image.new('L', size[::-1])
    ours = torch.stack(dd.RandomCrop((8, 8), scale, ratio).draw(count, *size, CPU)[:4])
    timms = torch.tensor([
        RandomResizedCropAndInterpolation.get_params(image, scale, ratio) for _ in range(count)]).T.float()
    views = [lambda c: c[0], lambda c: c[1], lambda c: c[2] * c[3], lambda c: c[3] / c[2], lambda c: c[0] + c[2]]
    for view in views:
        # two samples of one distribution are further apart than this once in 1,000 seeds
        assert kolmogorov_smirnov(view(ours), view(timms)) < 1.95 * (2 / count) ** 0.5
    if size == (40, 90) or size == (90, 20):
        whole = (timms == timms.mode(1, keepdim=True).values).all(0).float().mean()
        assert abs((ours == timms.mode(1, keepdim=True).values).all(0).float().mean() - whole) < 0.05 and whole > 0.05


def test_crops_stay_inside_and_flip_as_often_as_asked(monkeypatch):
    torch.manual_seed(0)
    crops = dd.RandomCrop((8, 8), (0.0001, 1.), (0.1, 10.), hflip=0.3, vflip=0.1).draw(4000, 20, 30, CPU)
    assert crops.height.min() >= 1 and crops.width.min() >= 1 and crops.top.min() == 0 and crops.left.min() == 0
    assert (crops.top + crops.height).max() == 20 and (crops.left + crops.width).max() == 30
    for flag, share in ((crops.hflip, 0.3), (crops.vflip, 0.1), (crops.cubic, 0.5)):
        assert abs(flag.float().mean() - share) < 0.04
    for one, other in ((crops.hflip, crops.vflip), (crops.hflip, crops.cubic), (crops.hflip, crops.top > 9)):
        apart = one.float().mean() * other.float().mean()
        assert abs((one & other).float().mean() - apart) < 0.02
    for interpolation, share in (('bilinear', 0.), ('bicubic', 1.)):
        assert dd.RandomCrop((8, 8), (0.5, 1.), (1., 1.), interpolation=interpolation).draw(
            50, 20, 20, CPU).cubic.float().mean() == share
    # the largest number that is drawn
    monkeypatch.setattr(torch, 'rand', lambda *size, device: torch.full(size, 1 - 2 ** -24))
    for n in range(4, 300):
        crops = dd.RandomCrop((8, 8), (0.1, 0.3), (1., 1.)).draw(1, n, n, CPU)
        assert crops.top == n - crops.height and crops.left == n - crops.width


# epochs


@pytest.fixture
def counted(tmp_path):
    """20 training images, each of a colour that tells its number, in two classes: even and odd."""
    for n in range(20):
        for split in ('train', 'validation')[:2 if n < 5 else 1]:
            folder = tmp_path / 'counted' / split / ('even' if n % 2 == 0 else 'odd')
            folder.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (16, 12), (10 * n,) * 3).save(folder / f'{n:02}.png')
    for label in ('even', 'odd'):
        (tmp_path / 'counted' / 'validation' / label).mkdir(parents=True, exist_ok=True)
    return tmp_path / 'counted'


LEVELS = dict(mean=[0., 0., 0.], std=[1., 1., 1.], num_classes=2, img_size=24)


def numbers(batches):
    """Which of the counted images are in some batches; whose labels must be theirs."""
    seen = []
    for images, labels in batches:
        n = (images * 255 / 10).mean((1, 2, 3)).round().long()
        assert torch.equal(labels, n % 2) and images.shape[1:] == (3, 24, 24)
        seen.append(n)
    return torch.cat(seen).tolist()


def test_an_epoch_has_every_image_once_with_its_label(counted, tmp_path):
    data = train_data(counted, tmp_path, batch_size=4, hflip=0.5, vflip=0.5, data_on_device=True, **LEVELS)
    epochs = [numbers(epoch_of(data.train, epoch)) for epoch in (0, 1)]
    assert all(sorted(e) == list(range(20)) for e in epochs) and epochs[0] != epochs[1]
    assert numbers(epoch_of(data.train, 1)) == epochs[1]
    assert len(epoch_of(train_data(
        counted, tmp_path, batch_size=6, data_on_device=True, **LEVELS).train)) == 3  # the rest is dropped
    assert numbers(data.evaluation) == [0, 2, 4, 1, 3]


def test_batches_depend_on_seed_rank_epoch_and_step(images, tmp_path):
    loader = train_data(images, tmp_path, data_on_device=True).train
    base = epoch_of(loader)
    assert_same_batches(base, epoch_of(loader))
    for other in (dict(epoch=1), dict(seed=1), dict(rank=1)):
        assert not torch.equal(epoch_of(loader, **other)[1][0], base[1][0])
    # what a model draws between two batches changes nothing
    later = []
    for batch in seeded_batches(loader, 42, 0, 0):
        later.append(batch)
        torch.rand(7)
    assert_same_batches(base, later)


@pytest.mark.parametrize('world', [2, 3])
def test_processes_share_as_those_of_timm_do(counted, tmp_path, world):
    args, config = resolved(tiny_train_args(counted, tmp_path, batch_size=2, data_on_device=True, **LEVELS))
    data = loaders_of(args, config)
    plain = copy.copy(data.train.template.loader)
    seen, evaluated = [], []
    for rank in range(world):
        template = copy.copy(data.train.template)
        template.loader = torch.utils.data.DataLoader(
            plain.dataset, batch_size=2, drop_last=True,
            sampler=DistributedSampler(plain.dataset, num_replicas=world, rank=rank))
        loader = dd.DeviceLoader(template, data.train.stored, data.train.crop)
        orders = []
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            orders.append(numbers(epoch_of(loader, epoch, rank=rank)))
            labels = data.train.stored.labels[torch.tensor(list(loader.sampler))]
            assert [n % 2 for n in orders[-1]] == labels[:len(orders[-1])].tolist()
        assert orders[0] != orders[1]
        seen.append(orders[0])
        template.loader = torch.utils.data.DataLoader(
            data.evaluation.dataset, batch_size=2,
            sampler=OrderedDistributedSampler(data.evaluation.dataset, num_replicas=world, rank=rank))
        loader = dd.DeviceLoader(template, data.evaluation.stored)
        limit = timm.task.evaluation_sample_limit(loader)
        evaluated.append(numbers(loader)[:limit])
    flat = [n for shard in seen for n in shard]
    assert len(set(flat)) == len(flat) == 20 // world // 2 * 2 * world
    assert sorted(n for shard in evaluated for n in shard) == list(range(5)) and evaluated[0][:2] != evaluated[1][:2]


@pytest.mark.slow
def test_two_processes_train(images, tmp_path):
    args = tiny_train_args(images, tmp_path, epochs=2, data_on_device=True)
    write_yaml(args, tmp_path / 'config.yaml')
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(ROOT / 'train.py'),
         '--config', str(tmp_path / 'config.yaml')],
        env=script_env(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count('Train: 1 [   3/3') == 1 and done.stderr.count('48 training images') == 1


# augmentation


def test_erasing_mixup_and_low_precision(images, tmp_path):
    values = dict(STILL, data_on_device=True)
    [(plain, labels), *_] = epoch_of(train_data(images, tmp_path, **values).train)
    [(erased, _), *_] = epoch_of(train_data(images, tmp_path, reprob=1., remode='const', **values).train)
    changed = (erased != plain).any(1).float().mean((1, 2))
    assert ((changed > 0.01) & (changed < 0.4)).all() and (erased[erased != plain] == 0).all()

    data = train_data(images, tmp_path, mixup=1., smoothing=0.1, **values)
    assert data.mixup_fn is None and data.train.mixup_enabled
    [(mixed, soft), *_] = epoch_of(data.train)
    lam = (mixed - plain.flip(0))[0, 0, 0, 0] / (plain - plain.flip(0))[0, 0, 0, 0]
    assert torch.allclose(mixed, lam * plain + (1 - lam) * plain.flip(0), atol=1e-4) and 0 < lam < 1
    hard = torch.nn.functional.one_hot(labels, 3) * 0.9 + 0.1 / 3
    assert torch.allclose(soft, lam * hard + (1 - lam) * hard.flip(0), atol=1e-4)
    data.train.mixup_enabled = False
    [(unmixed, soft), *_] = epoch_of(data.train)
    assert torch.equal(unmixed, plain) and torch.allclose(soft, hard)

    args, config = resolved(tiny_train_args(images, tmp_path, channels_last=True, **values))
    loader = loaders_of(args, config, torch.bfloat16).train
    [(low, _), *_] = epoch_of(loader)
    assert low.dtype == torch.bfloat16 and low.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(low.float(), plain, atol=0.05)


def test_a_batch_is_made_on_the_device_without_waiting_for_it(images, tmp_path):
    # tensors without values on a GPU that is not there: to ask one for a value, or to mix devices, is an error
    data = train_data(images, tmp_path, data_on_device=True, reprob=1., mixup=1., cutmix=1., smoothing=0.1).train
    with FakeTensorMode():
        gpu = torch.device('cuda')
        try:
            torch.empty(1, device=gpu)[0]
        except RuntimeError as e:
            pytest.skip(f'This torch looks for a driver: {e}')
        template = PrefetchLoader(data.template.loader, device=gpu, re_prob=1., re_mode='pixel')
        stored = dd.StoredImages(*(torch.empty(t.shape, dtype=t.dtype, device=gpu) for t in data.stored))
        loader = dd.DeviceLoader(template, stored, data.crop, data.mixup_fn, torch.channels_last)
        for _ in range(4):  # Mixup and CutMix
            batch, target = loader.batch(torch.arange(8, device=gpu))
        assert batch.device.type == target.device.type == 'cuda'
        assert batch.shape == (8, 3, 48, 48) and target.shape == (8, 3)
        with pytest.raises(DataDependentOutputException):
            batch.sum().item()


def test_mixup_goes_off_in_its_epoch(images, tmp_path):
    runs = [
        train(tiny_train_args(images, tmp_path / str(off), data_on_device=True, mixup=0.5, mixup_off_epoch=off))
        for off in (0, 1)]
    assert runs[0].history[0] == runs[1].history[0] and runs[0].history[1] != runs[1].history[1]


def test_training_learns_and_validation_agrees(images, tmp_path):
    values = dict(epochs=6, lr=0.02, scale=[0.5, 1.], ratio=[0.9, 1.1], workers=1)
    results = {
        on_device: train(tiny_train_args(images, tmp_path / str(on_device), data_on_device=on_device, **values))
        for on_device in (False, True)}
    for result in results.values():
        assert result.history[-1]['loss'] < 0.6 * result.history[0]['loss']
        assert result.best_metric > 80
    checkpoint = str(results[True].best_checkpoint)
    rows = [
        validate(tiny_validate_args(images, checkpoint=checkpoint, data_on_device=on_device))[0]
        for on_device in (False, True)]
    assert all(rows[0][key] == rows[1][key] for key in ('top1', 'top5', 'loss'))
    assert rows[0]['top1'] == results[True].best_metric


def test_a_killed_run_resumes_as_the_same_run(images, tmp_path):
    values = dict(
        epochs=2, data_on_device=True, hflip=0.5, scale=[0.5, 1.], reprob=0.5, mixup=0.2, cutmix=0.5, smoothing=0.1,
        drop=0.2)
    whole = train(tiny_train_args(images, tmp_path / 'whole', **values)).output_dir
    args = tiny_train_args(images, tmp_path, recovery_interval=2, **values)
    write_yaml(args, tmp_path / 'config.yaml')
    killed = subprocess.run(
        [sys.executable, str(ROOT / 'tests' / 'engine' / 'crash.py'), 'step:10:SIGKILL', '--config',
         str(tmp_path / 'config.yaml')],
        env=script_env(), stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / 'run' / 'recovery-1-2.pth.tar').is_file()
    args.resume = 'auto'
    assert len(train(args).history) == 1
    assert_same_weights(*(load_weights(folder / 'last.pth.tar') for folder in (whole, tmp_path / 'run')))


# what is refused, and what is said


@pytest.mark.parametrize('values, message', [
    (dict(color_jitter=0.4), r"cannot do --color-jitter 0.4.* set it to 0 \(0.4 is timm's default\)"),
    (dict(aa='rand-m9'), 'cannot do --aa rand-m9.* leave it out'),
    (dict(grayscale_prob=0.1), 'cannot do --grayscale-prob 0.1'),
    (dict(gaussian_blur_prob=0.1), 'cannot do --gaussian-blur-prob 0.1'),
    (dict(aug_repeats=3), 'cannot do --aug-repeats 3'),
    (dict(train_crop_mode='rkrc'), 'cannot do --train-crop-mode rkrc.* take rrc'),
    (dict(train_interpolation='lanczos'), 'cannot do --train-interpolation lanczos: take one of bilinear, bicubic'),
])
def test_flags_for_loader_workers_are_refused(images, tmp_path, values, message):
    with pytest.raises(PSTError, match=message):
        train(tiny_train_args(images, tmp_path, data_on_device=True, **values))
    assert not (tmp_path / 'run').exists()


def test_all_refused_flags_are_named_and_none_without_augmentation(images, tmp_path):
    values = dict(color_jitter=0.4, aa='rand-m9', data_on_device=True)
    with pytest.raises(PSTError) as e:
        train(tiny_train_args(images, tmp_path, **values))
    assert '--color-jitter' in str(e.value) and '--aa' in str(e.value)
    assert train(tiny_train_args(images, tmp_path, no_aug=True, epochs=1, **values)).history


def test_flags_that_exclude_each_other():
    for make in (train_args, validate_args):
        with pytest.raises(PSTError, match='--data-on-device and --no-prefetcher exclude each other'):
            make(data_on_device=True, no_prefetcher=True)
    with pytest.raises(PSTError, match='--stored-size is for --data-on-device'):
        train_args(stored_size=64)


def test_streams_are_refused(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from ()

    with pytest.raises(PSTError, match='not a stream'):
        dd.reading_loader(Stream(), 0, False)


@pytest.mark.parametrize('workers', [0, 2])
def test_images_of_different_sizes_need_a_size(tmp_path, workers):
    data = write_images(tmp_path / 'data', {'train': 8, 'validation': 2})
    odd = data / 'train' / 'class1' / '3.png'
    # a grey margin left and right, which is what the square in the middle leaves out
    wide = Image.new('RGB', (64, 32), (128, 128, 128))
    wide.paste(tiny_image(1, 3), (16, 0))
    wide.save(odd)
    values = dict(data_on_device=True, workers=workers)
    with pytest.raises(PSTError) as e:
        train(tiny_train_args(data, tmp_path, **values))
    assert f'{odd} of 64x32 pixels' in str(e.value) and '--stored-size 32' in str(e.value)
    assert 'Traceback' not in str(e.value)
    stored = train_data(data, tmp_path, stored_size=32, **values).train.stored
    assert stored.images.shape == (24, 3, 32, 32) and stored.images.dtype == torch.uint8
    assert torch.equal(stored.images[8 + 3], F.pil_to_tensor(tiny_image(1, 3)))
    smaller = train_data(data, tmp_path, stored_size=20, **values).train.stored.images[8 + 3]
    expected = F.center_crop(F.resize(wide, 20, InterpolationMode.BICUBIC), 20)
    assert torch.equal(smaller, F.pil_to_tensor(expected))


def test_images_that_do_not_fit_are_an_error_with_numbers(images, tmp_path, monkeypatch):
    monkeypatch.setattr(dd, 'free_memory', lambda device: 150_000)
    with pytest.raises(PSTError) as e:
        train(tiny_train_args(images, tmp_path, data_on_device=True))
    assert '48 training images of 3x32x32 bytes need 0.00 GB, and cpu has 0.00 GB free' in str(e.value)
    assert '--stored-size' in str(e.value)
    assert train_data(images, tmp_path, stored_size=8, img_size=16, data_on_device=True)
    monkeypatch.setattr(dd, 'free_memory', lambda device: None)
    assert train_data(images, tmp_path, data_on_device=True)


def test_free_memory_is_that_of_the_machine():
    assert 2 ** 24 < dd.free_memory(CPU) < 2 ** 50


def test_free_memory_of_a_gpu_counts_what_torch_keeps_unused(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, 'memory_reserved', lambda device: 300)
    monkeypatch.setattr(torch.cuda, 'memory_allocated', lambda device: 100)
    assert dd.free_memory(torch.device('cuda')) == 1200


@pytest.mark.parametrize('workers', [0, 2])
def test_unreadable_images_are_counted_named_and_limited(tmp_path, caplog, workers):
    data = write_images(tmp_path / 'data', {'train': 16, 'validation': 6})
    names = [data / 'train' / 'class0' / '0.png', data / 'train' / 'class1' / '4.png']
    for name in names:
        name.write_text('not an image')
    values = dict(data_on_device=True, workers=workers)
    result = train(tiny_train_args(data, tmp_path, epochs=2, max_bad_share=0.05, **values))
    assert len(result.history) == 2 and '(2 so far)' in caplog.text
    assert all(caplog.text.count(str(name)) == 1 for name in names)
    with pytest.raises(PSTError) as e:
        train(tiny_train_args(data, tmp_path / 'strict', max_bad_images=1, max_bad_share=1., **values))
    assert '2 images could not be read, more than the 1 of --max-bad-images' in str(e.value)
    assert str(names[0]) in str(e.value) and 'Traceback' not in str(e.value)


def test_reading_leaves_the_random_state_as_it_was(images, tmp_path):
    args, config = resolved(tiny_train_args(images, tmp_path, data_on_device=True, workers=1))
    before = torch.get_rng_state()
    loaders_of(args, config)
    assert torch.equal(torch.get_rng_state(), before)
