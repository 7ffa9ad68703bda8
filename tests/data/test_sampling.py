"""Which images are drawn: those of a plain loop over the weights, as often as theory says, the same everywhere."""
import bisect
import collections
import io
import itertools
import logging
import os
import shutil
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.data import create_loader
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from pst_timm.data.datasets import create_eval_dataset
from pst_timm.data.sampling import (
    LARGEST_FILE,
    SAMPLERS,
    DrawnImages,
    TrainImages,
    class_weights,
    draw_with,
    labels_of,
    open_train_images,
    rare_classes,
    read_weights,
)
from pst_timm.engine import train_args, validate_args
from pst_timm.engine.flags import TRAIN_FLAGS
from pst_timm.utils.errors import PSTError
from tests.engine.helpers import tiny_image

COUNTS = [500, 100, 20, 3]


def plain_weight(sampler, n):
    """The formulas of the papers."""
    if sampler == 'effective':
        beta = (max(COUNTS) - 1) / max(COUNTS)
        return 1 / sum(beta ** i for i in range(n))  # (1 - beta^n) / (1 - beta), added up
    return {'balanced': 1 / n, 'sqrt': n ** -0.5}[sampler]


def shuffled_labels(counts=COUNTS):
    labels = np.repeat(np.arange(len(counts)), counts)
    return np.random.default_rng(5).permutation(labels)


def chances_of(sampler, labels):
    weights = class_weights(np.bincount(labels), sampler)[labels]
    return weights / weights.sum()


def plain_draw(chances, seed, epoch):
    """Places in a running sum, one random number each."""
    sums = list(itertools.accumulate(map(float, chances)))
    generator = np.random.default_rng([seed, epoch, 2])
    return [bisect.bisect_right(sums, generator.random() * sums[-1]) for _ in chances]


def drawn(chances, seed=42, epoch=0, places=None):
    sampler = DrawnImages(chances, seed, SequentialSampler(range(len(chances))) if places is None else places)
    sampler.set_epoch(epoch)
    return list(sampler)


class TestWeights:
    def test_the_flag_offers_all_of_them(self):
        [choices] = [flag.choices for _, flags in TRAIN_FLAGS for flag in flags if flag.key == 'sampler']
        assert choices == SAMPLERS

    @pytest.mark.parametrize('sampler', SAMPLERS)
    def test_they_are_those_of_the_papers(self, sampler):
        expected = np.array([plain_weight(sampler, n) for n in COUNTS])
        found = class_weights(COUNTS, sampler)
        assert found / found[0] == pytest.approx(expected / expected[0], rel=1e-6)

    def test_what_they_make_of_the_shares(self):
        labels = shuffled_labels()
        shares = {s: TrainImages(labels, chances_of(s, labels)).class_shares(4) for s in SAMPLERS}
        assert shares['balanced'] == pytest.approx([0.25] * 4, rel=1e-6)
        root = np.sqrt(COUNTS)
        assert shares['sqrt'] == pytest.approx(root / root.sum(), rel=1e-6)
        assert TrainImages(labels, None).class_shares(4) == pytest.approx(np.array(COUNTS) / sum(COUNTS))
        # between all classes alike and the square root
        ratio = {s: shares[s][0] / shares[s][-1] for s in SAMPLERS}
        assert 1 < ratio['effective'] < ratio['sqrt'] < COUNTS[0] / COUNTS[-1]

    @pytest.mark.parametrize('sampler', SAMPLERS)
    def test_classes_without_images_and_of_one_image(self, sampler):
        assert np.isfinite(class_weights([3, 0, 1], sampler)).all()
        assert class_weights([1, 0, 1], sampler)[[0, 2]].tolist() == [1, 1]

    def test_rare_classes_have_images_but_few(self):
        labels = shuffled_labels([20, 0, 3, 4])
        assert rare_classes(labels, 4) == [2] and rare_classes(labels, 5) == [2, 3] and rare_classes(labels, 3) == []


class TestDraw:
    @pytest.mark.parametrize('sampler', SAMPLERS)
    def test_it_is_that_of_a_plain_loop(self, sampler):
        chances = chances_of(sampler, shuffled_labels())
        for seed, epoch in ((42, 0), (42, 1), (7, 0), (4_000_000_000, 299)):
            assert drawn(chances, seed, epoch) == plain_draw(chances, seed, epoch)

    @pytest.mark.parametrize('sampler', SAMPLERS)
    def test_classes_come_as_often_as_theory_says(self, sampler):
        labels, epochs = shuffled_labels(), 40
        counts = np.zeros(4)
        for epoch in range(epochs):
            counts += np.bincount(labels[drawn(chances_of(sampler, labels), epoch=epoch)], minlength=4)
        weights = np.array([n * plain_weight(sampler, n) for n in COUNTS])
        draws = epochs * len(labels)

        def far(weights):
            share = weights / weights.sum()
            return np.abs(counts - draws * share) / np.sqrt(draws * share * (1 - share))

        # of four classes, one beyond 4.5 standard deviations comes once in 37,000 seeds
        assert far(weights).max() < 4.5
        for other in {*SAMPLERS} - {sampler}:
            assert far(np.array([n * plain_weight(other, n) for n in COUNTS])).max() > 4.5, other
        assert far(np.array(COUNTS)).max() > 4.5

    def test_images_come_as_often_as_their_weights_say(self):
        weights = np.array([0., 0., 1., 0., 5., 2., 0.] * 50 + [0.])
        counts = np.bincount(np.concatenate([drawn(weights / weights.sum(), epoch=e) for e in range(100)]))
        assert len(counts) <= len(weights) and not counts[weights[:len(counts)] == 0].any()
        for weight in (1., 2., 5.):
            mean, share = counts[weights[:len(counts)] == weight].mean(), weight / weights.sum()
            draws = 100 * len(weights)
            assert abs(mean - draws * share) < 4.5 * np.sqrt(draws * share / 50)

    def test_no_draw_falls_beyond_the_last_image(self, monkeypatch):
        class Edges:
            def random(self, count):
                return np.resize([0., np.nextafter(1., 0.)], count)

        monkeypatch.setattr(np.random, 'default_rng', lambda words: Edges())
        # whose running sum ends below one, by rounding
        chances = np.array([0., *[0.1] * 10, 0.])
        assert np.cumsum(chances)[-1] < 1
        assert set(drawn(chances)) == {1, 10}

    def test_it_depends_on_seed_and_epoch_alone(self):
        chances = chances_of('balanced', shuffled_labels())
        torch.manual_seed(3)
        np.random.seed(3)
        first = drawn(chances, 42, 5)
        assert drawn(chances, 42, 5) == first
        assert drawn(chances, 42, 6) != first and drawn(chances, 43, 5) != first

    @pytest.mark.parametrize('processes', [2, 3])
    def test_processes_share_one_draw(self, processes):
        chances = chances_of('sqrt', shuffled_labels())
        n = len(chances)
        shares = [
            drawn(chances, 42, 4, DistributedSampler(range(n), processes, rank)) for rank in range(processes)]
        whole = collections.Counter(plain_draw(chances, 42, 4))
        together = collections.Counter(itertools.chain(*shares))
        assert {len(share) for share in shares} == {-(-n // processes)}
        # each place of the draw once; torch repeats the first where they do not divide
        assert together >= whole and (together - whole).total() == -n % processes
        # one process alone takes all of it
        assert collections.Counter(drawn(chances, 42, 4, RandomSampler(range(n)))) == whole

    @pytest.mark.parametrize('repeats', [3, 2.5])
    def test_repeated_augmentation_repeats_what_was_drawn(self, repeats):
        chances = chances_of('balanced', shuffled_labels())
        n, epoch = len(chances), 4
        shares = [
            drawn(chances, 42, epoch, RepeatAugSampler(range(n), 2, rank, num_repeats=repeats)) for rank in (0, 1)]
        order = torch.randperm(n, generator=torch.Generator().manual_seed(epoch)).tolist()
        draw = plain_draw(chances, 42, epoch)
        expected = [draw[order[int(i // repeats)]] for i in range(2 * len(shares[0]))]
        # dealt out one by one, so that the copies of an image are with different processes
        assert shares == [expected[0::2], expected[1::2]]
        assert sum(map(len, shares)) == n // 256 * 256


class Images(torch.utils.data.Dataset):
    """Images whose pixels are their numbers."""
    transform = None

    def __len__(self):
        return 100

    def __getitem__(self, index):
        return torch.full((3, 4, 4), index, dtype=torch.uint8), index % 3


@pytest.mark.parametrize('prefetch', [True, False])
@pytest.mark.parametrize('workers', [0, 1])
def test_a_loader_made_anew_is_the_same_but_for_its_images(prefetch, workers):
    torch.manual_seed(0)
    made = create_loader(
        Images(), 4, 8, is_training=True, num_workers=workers, use_prefetcher=prefetch, device=torch.device('cpu'),
        mean=(0., 0., 0.), std=(1 / 255, 1 / 255, 1 / 255), persistent_workers=False)
    before = made.loader if prefetch else made
    chances = np.arange(100.) / np.arange(100.).sum()
    state = torch.get_rng_state()
    loader = draw_with(made, chances, 42)
    inner = loader.loader if prefetch else loader
    assert torch.equal(torch.get_rng_state(), state), 'nothing is drawn from the random state of the run'
    for key in ('num_workers', 'collate_fn', 'worker_init_fn', 'pin_memory', 'drop_last', 'batch_size', 'dataset',
                'persistent_workers'):
        assert getattr(inner, key) is getattr(before, key) or getattr(inner, key) == getattr(before, key), key
    loader.sampler.set_epoch(2)
    numbers = torch.cat([images for images, _ in loader])[:, 0, 0, 0].round().int().tolist()
    assert len(loader) == 12 and len(numbers) == 96  # an epoch has as many batches as before
    whole = plain_draw(chances, 42, 2)
    assert collections.Counter(numbers) <= collections.Counter(whole) and numbers != whole[:96]


class TestLabels:
    def test_of_folders_and_tar_files(self, images, tmp_path):
        with tarfile.open(tmp_path / 'data.tar', 'w') as tar:
            for label, count in enumerate((1, 3, 2)):
                for i in range(count):
                    data = io.BytesIO()
                    tiny_image(label, i).save(data, 'PNG')
                    info = tarfile.TarInfo(f'class{label}/{i}.png')
                    info.size = data.tell()
                    data.seek(0)
                    tar.addfile(info, data)
        for path, counts in ((images / 'train', [16, 16, 16]), (tmp_path / 'data.tar', [1, 3, 2])):
            dataset = create_eval_dataset(validate_args(data_dir=str(path)), 'validation', None)
            labels = labels_of(dataset)
            assert np.bincount(labels).tolist() == counts
            assert labels.tolist() == [dataset[i][1] for i in range(len(dataset))]

    def test_of_datasets_with_a_list_of_them(self):
        class Plain(Images):
            targets = torch.arange(100) % 3

        class Named(Images):
            reader = SimpleNamespace(iter_targets=lambda: iter([2, 0] * 50))

        assert labels_of(Plain()).tolist() == [i % 3 for i in range(100)]
        assert labels_of(Named()).tolist() == [2, 0] * 50

    @pytest.mark.parametrize('targets', [None, [0.5] * 100, [-1] * 100, [0] * 99, [[0, 1]] * 100, ['a'] * 100])
    def test_where_they_are_not_told(self, targets):
        class Odd(Images):
            pass

        if targets is not None:
            Odd.targets = targets
        assert labels_of(Odd()) is None

    @pytest.mark.parametrize('flags', [
        dict(sampler='balanced'), dict(logit_adjust=1.), dict(rare_aa='rand-m5', rare_below=3),
        dict(hard_examples='weights.csv')])
    def test_streams_are_refused_in_a_sentence(self, flags):
        class Stream(IterableDataset):
            def __iter__(self):
                raise AssertionError('it was read')

        name = next(iter(flags)).replace('_', '-')
        with pytest.raises(PSTError, match=f'--{name} .* needs the labels of all training images .* a stream') as e:
            open_train_images(train_args(**flags), Stream())
        assert len(str(e.value).splitlines()) == 1
        assert open_train_images(train_args(), Stream()) is None


NAMES = ['cats/1.png', 'cats/2.png', 'dogs/1.png', 'dogs/ä, "1".png']


def write_weights(folder, text):
    path = folder / 'weights.csv'
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


class TestWeightsOfImages:
    def test_they_are_put_in_the_order_of_the_images(self, tmp_path, caplog):
        path = write_weights(tmp_path, 'weight,loss,image\n0,9,dogs/1.png\n2.5,1,cats/1.png\n1e-3,,"dogs/ä, ""1"".png"')
        assert read_weights(path, NAMES).tolist() == [2.5, 1, 0, 0.001]
        assert 'does not name 1 of the 4 training images: they get the weight 1' in caplog.text

    def test_names_that_are_not_there(self, tmp_path, caplog):
        text = 'image,weight\ncats/1.png,3\nbirds/1.png,4\n'
        with caplog.at_level(logging.WARNING):
            assert read_weights(write_weights(tmp_path, text), NAMES).tolist() == [3, 1, 1, 1]
        assert 'names 1 images that are not there: birds/1.png' in caplog.text

    @pytest.mark.parametrize('text, told', [
        ('', 'is empty'),
        ('image,weight\n', 'names no image'),
        ('image,loss\ncats/1.png,1\n', 'has no column weight'),
        ('name,weight\ncats/1.png,1\n', 'has no column image'),
        ('image,weight\ncats/1.png,nan\n', r'line 2 gives cats/1\.png the weight nan'),
        ('image,weight\ncats/1.png,1\ncats/2.png,-1\n', r'line 3 gives cats/2\.png the weight -1'),
        ('image,weight\ncats/1.png,inf\n', 'the weight inf'),
        ('image,weight\ncats/1.png,\n', 'the weight : expected a number'),
        ('image,weight\ncats/1.png,heavy\n', 'the weight heavy'),
        ('image,weight\ncats/1.png\n', 'as many fields as the header'),
        ('image,weight\ncats/1.png,1\ncats/1.png,2\n', r'line 3 names cats/1\.png again'),
        ('image,weight\nbirds/1.png,1\n', 'names none of the training images: its first is birds/1.png'),
        ('image,weight\n' + ''.join(f'{n},0\n' for n in NAMES[:3]) + '"dogs/ä, ""1"".png",0\n', 'nothing to draw'),
        ('image,weight\ncats/1.png,1e308\n', 'the weight 1e308: expected a number from 0 to 1e.09'),
        (b'image,weight\ncats/\xff.png,1\n', 'is not a CSV file'),
        (b'\x89PNG\r\n\x1a\n\0\0', 'CSV'),
        ('image,weight\n\x1b[2J,heavy\n', r"'\\x1b\[2J'"),
    ])
    def test_what_is_wrong_is_named(self, tmp_path, text, told):
        path = write_weights(tmp_path, text)
        with pytest.raises(PSTError, match=told) as e:
            read_weights(path, NAMES)
        assert path in str(e.value) and '\x1b' not in str(e.value)

    def test_what_is_no_file_or_too_large(self, tmp_path):
        with pytest.raises(PSTError, match='is no file'):
            read_weights(str(tmp_path / 'none.csv'), NAMES)
        with open(tmp_path / 'large.csv', 'wb') as f:
            f.truncate(LARGEST_FILE + 1)
        with pytest.raises(PSTError, match='has more than 256 MiB'):
            read_weights(str(tmp_path / 'large.csv'), NAMES)

    def test_names_that_are_no_text(self, images, tmp_path):
        shutil.copytree(images / 'train' / 'class0', tmp_path / 'class0')
        shutil.copytree(images / 'train' / 'class1', tmp_path / 'class1')
        (tmp_path / 'class0' / '3.png').rename(os.fsdecode(os.fsencode(tmp_path) + b'/class0/\xff.png'))
        dataset = create_eval_dataset(validate_args(data_dir=str(tmp_path)), 'validation', None)
        path = write_weights(tmp_path, 'image,weight\nclass0/\\udcff.png,9\n')
        found = open_train_images(train_args(hard_examples=path), dataset)
        assert sorted(found.chances * (31 + 9)) == pytest.approx([1.] * 31 + [9.])

    def test_they_multiply_those_of_the_classes(self, images, tmp_path):
        data = validate_args(data_dir=str(images))
        dataset = create_eval_dataset(data, 'train', None)
        rows = ''.join(f'class{c}/{i}.png,{1 + c * i}\n' for c in range(2) for i in range(16))
        path = write_weights(tmp_path, f'image,weight\n{rows}')
        found = open_train_images(train_args(hard_examples=path), dataset)
        both = open_train_images(train_args(hard_examples=path, sampler='balanced'), dataset)
        weights = [1 + c * i if c < 2 else 1 for c, i in
                   ((int(n[5]), int(n[7:-4])) for n in dataset.filenames())]
        assert found.chances == pytest.approx(np.array(weights) / sum(weights))
        assert both.chances == pytest.approx(found.chances)  # the classes have as many images
        assert found.digest not in (None, open_train_images(train_args(sampler='balanced'), dataset).digest)
