"""How often `pst-timm monitor check` raises an alarm for nothing, and which corruptions it finds.

    python -m scripts.measure_monitoring CHECKPOINT --data-dir PHOTOS --cache FOLDER --output results/monitoring

on photographs, and on the digits of the demo with the weights in the package. The answers to the images, as they are
and corrupted, are kept in the cache, so that the statistics can be made again without the models.
"""
import argparse
import io
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import numpy as np
from PIL import Image, ImageFilter

from pst_timm.data.samples import Samples
from pst_timm.review.answers import Outputs, Subject, answers, open_labelled, open_subject
from pst_timm.utils.files import write_whole

__all__ = ['CORRUPTIONS', 'corrupted', 'main']

CLEAN = 'none'
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

        def read(i: int) -> Tuple[Image.Image, int]:
            image, label = samples.read(chosen[i])
            return (image if name == CLEAN else corrupted(image, name, strength, int(chosen[i]))), label

        part = Samples([samples.names[i] for i in chosen], read, subject.transform, samples.class_names)
        got = Outputs.gather(answers(subject, part, 100))
        arrays = {key: getattr(got, key) for key in ('logits', 'embeddings', 'labels', 'looks')}
        write_whole(path, partial(_save, arrays))
        print(f'{path}: {len(chosen)} images, {time.monotonic() - start:.0f} s', file=sys.stderr)
    with np.load(path) as file:
        return dict(file)


def _save(arrays: Dict[str, np.ndarray], path: str) -> None:
    with open(path, 'wb') as file:
        np.savez(file, **arrays)


def collect(source: str, data_dir: Path, split: str, cache: Path, most: int) -> Dict[Tuple[str, int], Any]:
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
    return found


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Measure and write the tables; returns the exit code."""
    parser = argparse.ArgumentParser(prog='python -m scripts.measure_monitoring', description=__doc__.split('\n')[0])
    parser.add_argument('source', help='checkpoint of a model of photographs')
    parser.add_argument('--data-dir', type=Path, required=True, help='photographs that it was not trained on')
    parser.add_argument('--split', default='val')
    parser.add_argument('--cache', type=Path, required=True, help='folder of the answers')
    parser.add_argument('--output', type=Path, default=Path('results/monitoring'))
    parser.add_argument('--most', type=int, default=1500, help='most images to corrupt (default: %(default)s)')
    args = parser.parse_args(argv)
    from scripts.demo import write_digits

    digits = args.cache / 'digits-images'
    if not digits.is_dir():
        write_digits(digits)
        (digits / 'validation').rename(digits / 'rest')
        for path in sorted((digits / 'rest').rglob('*.png')):  # all in one: either half has its share of both
            path.rename(digits / 'train' / path.parent.name / path.name)
    collect('test_resnet_pst', digits / 'train', 'train', args.cache / 'digits', args.most)
    collect(args.source, args.data_dir, args.split, args.cache / 'photos', args.most)
    return 0


if __name__ == '__main__':
    sys.exit(main())
