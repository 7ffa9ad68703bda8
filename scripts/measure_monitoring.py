"""How often `pst-timm monitor check` raises an alarm for nothing, and which corruptions it finds.

    python -m scripts.measure_monitoring CHECKPOINT --data-dir PHOTOS --cache FOLDER --output results/monitoring

on photographs, and on the digits of the demo with the weights in the package. The answers to the images, as they are
and corrupted, are kept in the cache, so that the statistics can be made again without the models.
"""
import argparse
import io
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
from PIL import Image, ImageFilter
from scipy.special import softmax

from pst_timm.data.drift import Batch, Result, Summary, drift_tests, estimated_accuracy, summarize
from pst_timm.data.samples import LOOKS, Samples, look_of
from pst_timm.metrics.binomial import binomial_interval
from pst_timm.review.answers import Outputs, Subject, answers, open_labelled, open_subject
from pst_timm.utils.files import write_csv, write_json, write_whole

__all__ = ['CORRUPTIONS', 'corrupted', 'main']

CLEAN = 'none'
ALPHA = 0.01
COUNTS = (500, 100)  # images of a draw
FALSE_DRAWS, POWER_DRAWS = 200, 20
Answers = Dict[Tuple[str, int], Batch]
SIZE = 224  # pixels of a side for which the radii of the blur are meant, those of ImageNet-C


def _blur(image: Image.Image, radius: float, seed: int) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius * min(image.size) / SIZE))


def _noise(image: Image.Image, deviation: float, seed: int) -> Image.Image:
    pixels = np.asarray(image, np.float64)
    noise = np.random.default_rng(seed).normal(0, 255 * deviation, pixels.shape)
    return Image.fromarray((pixels + noise).round().clip(0, 255).astype(np.uint8))


def _brightness(image: Image.Image, more: float, seed: int) -> Image.Image:
    hue, saturation, value = image.convert('HSV').split()
    value = value.point(lambda v: min(255, round(v + 255 * more)))
    return Image.merge('HSV', (hue, saturation, value)).convert('RGB')


def _jpeg(image: Image.Image, quality: float, seed: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, 'JPEG', quality=int(quality))
    with Image.open(file) as read:
        return read.convert('RGB')


def _rotation(image: Image.Image, degrees: float, seed: int) -> Image.Image:
    """A camera that hangs askew sees no black corners: the image is continued by its reflection."""
    pixels = np.asarray(image)
    rows, columns = (side // 2 for side in pixels.shape[:2])
    wide = Image.fromarray(np.pad(pixels, ((rows, rows), (columns, columns), (0, 0)), 'reflect'))
    wide = wide.rotate(degrees if seed % 2 else -degrees, Image.Resampling.BICUBIC)
    return wide.crop((columns, rows, columns + image.width, rows + image.height))


# five strengths each. Blur and brightness are those of ImageNet-C; its noise and JPEG are meant for images of 224
# pixels and leave little of those of 64: here they are as in Tiny ImageNet-C. It has no rotation.
CORRUPTIONS: Dict[str, Tuple[Callable[..., Image.Image], Sequence[float]]] = {
    'blur': (_blur, (1, 2, 3, 4, 6)),
    'noise': (_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    'brightness': (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    'jpeg': (_jpeg, (65, 58, 50, 40, 25)),
    'rotation': (_rotation, (5, 10, 15, 20, 30)),
}


def corrupted(image: Image.Image, name: str, strength: int, seed: int) -> Image.Image:
    """An RGB image with a corruption.

    Args:
        image: The image.
        name: One of `CORRUPTIONS`.
        strength: From 1 to 5.
        seed: For what is random in it.
    """
    corrupt, levels = CORRUPTIONS[name]
    return corrupt(image, levels[strength - 1], seed)


def cached_answers(
        subject: Subject,
        samples: Samples,
        chosen: Sequence[int],
        cache: Path,
        name: str,
        strength: int,
) -> Dict[str, np.ndarray]:
    """A model's answers to some of the images with a corruption, from the cache if they are there.

    Returns:
        `logits`, `embeddings`, `labels` and `looks`, as in `Outputs`.
    """
    path = cache / f'{name}-{strength}.npz'
    if not path.is_file():
        start = time.monotonic()

        part = Samples(
            [samples.names[i] for i in chosen], lambda i: _read(samples, int(chosen[i]), name, strength),
            subject.transform, samples.class_names)
        got = Outputs.gather(answers(subject, part, 100))
        arrays = {key: getattr(got, key) for key in ('logits', 'embeddings', 'labels', 'looks')}
        write_whole(path, partial(_save, arrays))
        print(f'{path}: {len(chosen)} images, {time.monotonic() - start:.0f} s', file=sys.stderr)
    with np.load(path) as file:
        arrays = dict(file)
    if arrays['looks'].shape[1] != len(LOOKS):  # of a version that looked at less
        looks = (look_of(_read(samples, int(i), name, strength)[0]) for i in chosen)
        arrays['looks'] = np.array(list(looks), np.float64)
        write_whole(path, partial(_save, arrays))
    return arrays


def _read(samples: Samples, index: int, name: str, strength: int) -> Tuple[Image.Image, int]:
    image, label = samples.read(index)
    return (image if name == CLEAN else corrupted(image, name, strength, index)), label


def _save(arrays: Dict[str, np.ndarray], path: str) -> None:
    with open(path, 'wb') as file:
        np.savez(file, **arrays)


def collect(source: str, data_dir: Path, split: str, cache: Path, most: int) -> Answers:
    """Answers to all images as they are, and to those of the second half, `most` at most, with each corruption.

    The order of the images is drawn first, so that either half is a sample of all of them.
    """
    cache.mkdir(parents=True, exist_ok=True)
    subject = open_subject(source, device='cpu')
    samples = open_labelled(subject, data_dir, split)
    order = np.random.default_rng(0).permutation(len(samples))
    found = {(CLEAN, 0): cached_answers(subject, samples, order, cache, CLEAN, 0)}
    second = order[len(order) // 2:][:most]
    for strength in (3, 2, 4, 1, 5):  # what matters most comes first
        for name in CORRUPTIONS:
            found[name, strength] = cached_answers(subject, samples, second, cache, name, strength)
    return {key: as_batch(value) for key, value in found.items()}


def as_batch(arrays: Dict[str, np.ndarray]) -> Batch:
    """What the tests take, labels included."""
    probabilities = softmax(arrays['logits'].astype(np.float64), axis=1)
    return Batch(probabilities.max(axis=1), probabilities.argmax(axis=1), *(
        arrays[key] for key in ('labels', 'looks', 'embeddings')))


def rows_of(batch: Batch, chosen: np.ndarray, labels: bool = True) -> Batch:
    """Some of the images, with their labels or without."""
    part = Batch(*(values[chosen] for values in batch))
    return part if labels else part._replace(labels=None)


# ------------------------------------------------------------------------------------------------------- the draws

def unmoved(clean: Batch, classes: int, images: int, fresh: bool) -> Iterator[Tuple[Summary, Batch]]:
    """References and draws of images like theirs: with halves of their own, or all from the halves of a user."""
    half = len(clean.confidence) // 2
    order = np.arange(2 * half)
    reference = None
    for draw in range(FALSE_DRAWS):
        rng = np.random.default_rng([1, images, fresh, draw])
        if fresh:
            order = rng.permutation(2 * half)
        if fresh or reference is None:
            reference = summarize(rows_of(clean, order[:half]), classes, seed=draw)
        yield reference, rows_of(clean, rng.choice(order[half:], images, replace=False), labels=False)


def moved(reference: Summary, batch: Batch, images: int) -> Iterator[Tuple[Summary, Batch]]:
    """Draws of corrupted images."""
    for draw in range(POWER_DRAWS):
        rng = np.random.default_rng([2, images, draw])
        yield reference, rows_of(batch, rng.choice(len(batch.confidence), images, replace=False), labels=False)


class Tally:
    """How many draws raised an alert, all in all and by test; kept in the cache, so that it can be gone on with."""

    def __init__(self, path: Path):
        self.path = path
        self.cells: Dict[str, Dict[str, int]] = json.loads(path.read_text()) if path.is_file() else {}

    def count(self, key: str, draws: Iterator[Tuple[Summary, Batch]]) -> Dict[str, int]:
        """`draws`, `alerts`, and the alerts of each test."""
        if key not in self.cells:
            start = time.monotonic()
            results: List[List[Result]] = [
                drift_tests(reference, batch, LOOKS, ALPHA, seed) for seed, (reference, batch) in enumerate(draws)]
            self.cells[key] = {
                'draws': len(results), 'alerts': sum(any(r.alert for r in found) for found in results),
                **{r.name: sum(found[i].alert for found in results) for i, r in enumerate(results[0])}}
            write_json(self.path, self.cells)
            print(f'{key}: {self.cells[key]}, {time.monotonic() - start:.0f} s', file=sys.stderr)
        return self.cells[key]


def false_alarms(name: str, found: Answers, classes: int, tally: Tally) -> List[Dict[str, Any]]:
    """A row for each way to draw images that did not move."""
    rows = []
    for images, fresh in ((500, True), (500, False), (100, True)):
        halves = 'new halves for each draw' if fresh else 'one reference for all draws'
        cell = tally.count(f'{name} {images} {halves}', unmoved(found[CLEAN, 0], classes, images, fresh))
        low, high = binomial_interval(cell['alerts'], cell['draws'])
        rows.append({
            'data': name, 'reference': halves, 'images': images, 'draws': cell['draws'], 'alerts': cell['alerts'],
            'share': cell['alerts'] / cell['draws'], '95% interval': f'{low:.3f} to {high:.3f}'})
    return rows


def power(name: str, found: Answers, classes: int, tally: Tally) -> List[Dict[str, Any]]:
    """A row for each corruption and strength."""
    clean = found[CLEAN, 0]
    half = len(clean.confidence) // 2
    reference = summarize(rows_of(clean, np.arange(half)), classes)
    rows = []
    for corruption, (_, levels) in CORRUPTIONS.items():
        for strength, level in enumerate(levels, 1):
            batch = found[corruption, strength]
            cells = {n: tally.count(f'{name} {corruption} {strength} {n}', moved(reference, batch, n)) for n in COUNTS}
            most = cells[max(COUNTS)]
            seen = [key for key, count in most.items() if key not in ('draws', 'alerts') and 2 * count >= most['draws']]
            rows.append({
                'data': name, 'corruption': corruption, 'strength': strength, 'level': str(level),
                **{f'{n} images': cells[n]['alerts'] / cells[n]['draws'] for n in sorted(COUNTS)},
                'accuracy': float((batch.predicted == batch.labels).mean()),
                'estimated': estimated_accuracy(batch.confidence, reference.threshold),
                'seen by': ', '.join(seen) or 'none'})
    return rows


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Measure and write the tables; returns the exit code."""
    parser = argparse.ArgumentParser(prog='python -m scripts.measure_monitoring', description=__doc__.split('\n')[0])
    parser.add_argument('source', help='checkpoint of a model of photographs')
    parser.add_argument('--model-note', default='', help='what to say of it in the tables')
    parser.add_argument('--data-dir', type=Path, required=True, help='photographs that it was not trained on')
    parser.add_argument('--split', default='val')
    parser.add_argument('--cache', type=Path, required=True, help='folder of the answers')
    parser.add_argument('--output', type=Path, default=Path('results/monitoring'))
    parser.add_argument('--most', type=int, default=1500, help='most images to corrupt (default: %(default)s)')
    args = parser.parse_args(argv)
    data = {
        'photos': collect(args.source, args.data_dir, args.split, args.cache / 'photos', args.most),
        'digits': collect('test_resnet_pst', write_all_digits(args.cache), 'train', args.cache / 'digits', args.most)}
    tally = Tally(args.cache / 'tally.json')
    args.output.mkdir(parents=True, exist_ok=True)
    tables: Dict[str, List[Dict[str, Any]]] = {'false_alarms': [], 'power': []}
    for which, found in data.items():
        classes = 1 + int(max(batch[i].max() for batch in found.values() for i in (1, 2)))
        for name, make in (('false_alarms', false_alarms), ('power', power)):
            tables[name] += make(which, found, classes, tally)
            write_csv(args.output / f'{name}.csv', tables[name])
            write_json(args.output / f'{name}.json', {'setting': setting(data, args.model_note, name)})
    return 0


def write_all_digits(cache: Path) -> Path:
    """The digits of the demo in one split: either half has its share of those that the model was trained on."""
    from scripts.demo import write_digits

    digits = cache / 'digits-images'
    if not digits.is_dir():
        write_digits(digits)
        for path in sorted((digits / 'validation').rglob('*.png')):
            path.rename(digits / 'train' / path.parent.name / path.name)
    return digits / 'train'


def setting(data: Dict[str, Answers], note: str, name: str) -> str:
    """How it was measured, in a sentence without its full stop."""
    what = []
    for which, found in data.items():
        clean = found[CLEAN, 0]
        right = float((clean.predicted == clean.labels).mean())
        what.append(f'{which}: {len(clean.labels)} images, half of them the reference, accuracy {100 * right:.1f}%')
    pools = [len(found['blur', 3].labels) for found in data.values()]
    draws = f'{FALSE_DRAWS} draws without replacement' if name == 'false_alarms' else (
        f'share of {POWER_DRAWS} draws with an alert, of {" and ".join(map(str, pools))} of the other half')
    return f'`--alpha {ALPHA}`, no labels used; {draws}; {"; ".join(what)}{"; " if note else ""}{note}'


if __name__ == '__main__':
    sys.exit(main())
