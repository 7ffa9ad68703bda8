"""What each step of deployment gives, in parts that take some minutes each on an idle machine:

    python -m scripts.measure_deploy runtimes                           # forms and runtimes, PST and its plain twin
    python -m scripts.measure_deploy digits                             # accuracy of the digit reader in each of them
    python -m scripts.measure_deploy pruned                             # time that pruning saves, random weights
    python -m scripts.measure_deploy weights SOURCE --data-dir DATA     # every step on a trained model

Each writes results/deploy/*.csv and *.json. Models that are made on the way are kept in --work and used again.
"""
import argparse
import logging
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import torch
from timm.data import ImageDataset, create_transform, resolve_data_config

from pst_timm.benchmark.models import plain_twin
from pst_timm.checkpoints import load_model
from pst_timm.commands.common import fail, split_words
from pst_timm.deploy.latency import energy, make_call, time_models
from pst_timm.deploy.prune import SCOPES
from pst_timm.metrics.calibration import calibration_error
from pst_timm.metrics.intervals import image_interval
from pst_timm.utils.errors import PSTError
from pst_timm.utils.timing import median_ratio, percentile

from .demo import write_digits
from .deploy_artefacts import EAGER, INT8, INT8_OF, RUNTIMES, make, pruned
from .deploy_steps import add_flags, measure_weights
from .deploy_table import BATCHES, Row, Table, counts_of, file_bytes, memory_of, shown_cost, where

__all__ = ['main', 'measure_digits', 'measure_pruned', 'measure_runtimes']

MODELS = ('resnet18_pst', 'resnet50_pst')
SIZE = (3, 224, 224)
READER, SIDE, SIGMA = 'test_resnet_pst.digits', 64, 0.5
ATTENTION = {'coarse': (0, 'gate'), 'k = 8, gate': (8, 'gate'), 'k = 8, joint': (8, 'joint')}


def noise(images: int = 32) -> torch.Tensor:
    """Images to calibrate random weights on, of which time does not depend."""
    return torch.randn(images, *SIZE, generator=torch.Generator().manual_seed(0))


# forms and runtimes

def measure_runtimes(args: argparse.Namespace) -> None:
    """Models and their plain twins in every form and runtime, all in turn: the tables `runtimes` and `twins`."""
    setting = f'Random weights, {SIZE[-1]} px, {where(args.rounds)}'
    runtimes = Table(args.output, 'runtimes', (
        f'{setting}; times faster than eager float32 without folding; memory of a fresh process for an image beyond '
        f'its libraries'), shown_runtime)
    twins = Table(
        args.output, 'twins', f'{setting}; latency over that of the plain twin in the same runtime', shown_twin)
    for name in args.models:
        both = (name, plain_twin(name))
        candidates = {
            (model, runtime): make(model, runtime, args.work / model, noise, SIZE[-1], pretrained=False)
            for model in both for runtime in args.runtimes}
        opened = {key: candidate.open() for key, candidate in candidates.items()}
        times = {batch: time_models(opened, SIZE, batch, args.rounds) for batch in BATCHES}
        counts = counts_of(candidates[name, EAGER].open(), SIZE)
        for runtime in args.runtimes:
            key, twin = (name, runtime), (both[1], runtime)
            about = dict(row=', '.join(key), model=name, runtime=runtime)
            ratios = {f'ratio_{batch}': median_ratio(t[name, EAGER], t[key]) for batch, t in times.items()}
            plain = name, INT8_OF.get(runtime)
            if plain in opened:
                ratios.update({f'float_{batch}': median_ratio(t[plain], t[key]) for batch, t in times.items()})
            seconds = {f'seconds_{batch}': percentile(t[key], 50) for batch, t in times.items()}
            runtimes.add(dict(
                **about, **counts, **ratios, **seconds, bytes=file_bytes(candidates[key].source, opened[key]),
                memory=memory_of(candidates[key], SIZE[-1]), joules=energy(make_call(opened[key], SIZE))))
            twins.add(dict(**about, twin=both[1], **{
                f'ratio_{batch}': median_ratio(t[key], t[twin]) for batch, t in times.items()}))


def shown_runtime(row: Row) -> Row:
    cost = shown_cost(row)
    faster = {key: cost.pop(key) for key in list(cost) if key.startswith('times faster')}
    return {
        'model': row['model'], 'runtime': row['runtime'], **faster,
        'than float32 in it, batch 1 / 8': ' / '.join(f'{row[f"float_{batch}"]:.2f}' for batch in BATCHES) if (
            'float_1' in row) else '-',
        **cost}


def shown_twin(row: Row) -> Row:
    return {
        'model': row['model'], 'twin': row['twin'], 'runtime': row['runtime'],
        **{f'latency, batch {batch}': f'{row[f"ratio_{batch}"]:.3f}' for batch in BATCHES}}


# the digit reader

def digit_images(folder: Path, split: str) -> Tuple[torch.Tensor, torch.Tensor]:
    """The digits of a split as the reader sees them, and their labels."""
    if not folder.is_dir():
        write_digits(folder, SIDE)
    transform = create_transform(**resolve_data_config({}, model=load_model(READER)))
    images, labels = zip(*ImageDataset(str(folder / split), transform=transform))
    return torch.stack(images), torch.tensor(labels)


def noisy(images: torch.Tensor, seed: int) -> torch.Tensor:
    """Normalised images with Gaussian noise."""
    return images + SIGMA * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))


def measure_digits(args: argparse.Namespace) -> None:
    """Accuracy and calibration of the digit reader on noisy digits, in every runtime and attention: `digits`."""
    images, labels = digit_images(args.work / 'digits', 'validation')
    train, _ = digit_images(args.work / 'digits', 'train')
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    calibration = partial(noisy, train[order[:args.images]], 1000)  # as the images that it will meet
    draws = [noisy(images, seed) for seed in range(args.draws)]
    table = Table(args.output, 'digits', (
        f'{READER}, {len(images)} held-out digits at {SIDE} px with Gaussian noise of {SIGMA:g} on the normalised '
        f'images, {args.draws} draws of it; int8 calibrated on {args.images} training images with such noise; percent '
        f'with 95% intervals over the images; {where()}'), shown_digits)
    for attention, (topk, fusion) in ATTENTION.items():
        folder = args.work / f'reader-{topk}-{fusion}'
        float_logits = None
        for runtime in args.runtimes:
            model = make(READER, runtime, folder, calibration, topk=topk, fine_fusion=fusion).open()
            logits = torch.stack([answer(model, draw) for draw in draws])
            float_logits = logits if float_logits is None else float_logits
            answers, first = logits.argmax(dim=-1), float_logits.argmax(dim=-1)
            right, before = (a.eq(labels).numpy() for a in (answers, first))
            table.add(dict(
                row=f'{attention}, {runtime}', attention=attention, runtime=runtime,
                top1=100 * right.mean().item(), interval=image_interval(right, right & False),
                difference=100 * (right.mean() - before.mean()).item(), change=image_interval(right, before),
                agreement=100 * answers.eq(first).float().mean().item(),
                ece=calibration_error(logits.flatten(0, 1), labels.repeat(len(draws)))))


@torch.inference_mode()
def answer(model: torch.nn.Module, images: torch.Tensor, batch_size: int = 60) -> torch.Tensor:
    """Logits of images, in float32."""
    dtype = next((p.dtype for p in model.parameters()), images.dtype)
    return torch.cat([model(part.to(dtype)).float() for part in images.split(batch_size)])


def shown_digits(row: Row) -> Row:
    def between(interval: Sequence[float], sign: str = '') -> str:
        low, high = interval
        return f'{low:{sign}.2f} to {high:{sign}.2f}'

    return {
        'attention': row['attention'], 'runtime': row['runtime'],
        'top-1 (%)': f'{row["top1"]:.2f}', '95%': between(row['interval']),
        'over eager float32': f'{row["difference"]:+.2f}', '95% of that': between(row['change'], '+'),
        'same answer (%)': f'{row["agreement"]:.2f}', 'ECE': f'{row["ece"]:.3f}'}


# pruned models

def measure_pruned(args: argparse.Namespace) -> None:
    """Time that pruning saves, in float and in int8, all in turn: the table `pruned`."""
    table = Table(args.output, 'pruned', (
        f'Random weights, {SIZE[-1]} px, {where(args.rounds)}; times faster than the whole model in eager float32, and '
        f'than the whole model in the same runtime'), shown_pruned)
    for name in args.models:
        sources = {(0., '-', 0): name}
        for ratio, scope, to in product(args.ratios, args.scopes, args.round_to):
            sources[ratio, scope, to] = pruned(
                name, ratio, args.work / f'{name}-{100 * ratio:.0f}-{scope}-{to}', dict(scope=scope, round_to=to),
                pretrained=False)
        candidates = {
            (cut, runtime): make(
                source, runtime, args.work / f'{Path(source).name}-files', noise, SIZE[-1],
                **({} if cut[0] else {'pretrained': False}))
            for cut, source in sources.items() for runtime in args.runtimes}
        whole = next(iter(sources))
        opened = {key: candidate.open() for key, candidate in candidates.items()}
        times = {batch: time_models(opened, SIZE, batch, args.rounds) for batch in BATCHES}
        for cut, runtime in candidates:
            key = cut, runtime
            ratio, scope, to = cut
            row = dict(
                row=f'{name}, {ratio:.0%}, {scope}, {to}, {runtime}', model=name, ratio=ratio, scope=scope, round_to=to,
                runtime=runtime, bytes=file_bytes(candidates[key].source, opened[key]),
                **counts_of(candidates[cut, EAGER].open(), SIZE))
            for batch, t in times.items():
                row[f'ratio_{batch}'] = median_ratio(t[whole, EAGER], t[key])
                row[f'same_{batch}'] = median_ratio(t[whole, runtime], t[key])
            table.add(row)


def shown_pruned(row: Row) -> Row:
    return {
        'model': row['model'], 'removed': f'{row["ratio"]:.0%}', 'scope': row['scope'],
        'widths': f'multiples of {row["round_to"]}' if row['round_to'] else 'whole', 'GMACs': f'{row["gmacs"]:.3f}',
        'M parameters': f'{row["params"] / 1e6:.2f}', 'runtime': row['runtime'],
        'file (MB)': f'{row["bytes"] / 1e6:.1f}',
        **{f'times faster, batch {batch}': f'{row[f"ratio_{batch}"]:.2f}' for batch in BATCHES},
        **{f'than whole in it, batch {batch}': f'{row[f"same_{batch}"]:.2f}' for batch in BATCHES}}


ACTIONS: Dict[str, Callable[[argparse.Namespace], None]] = {
    'runtimes': measure_runtimes, 'digits': measure_digits, 'pruned': measure_pruned, 'weights': measure_weights}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Measure a part, and write its tables; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m scripts.measure_deploy', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest='part', required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument('--output', type=Path, default=Path('results/deploy'), help='default: %(default)s')
    common.add_argument('--work', type=Path, default=Path('output/deploy'), help='default: %(default)s')
    common.add_argument('--rounds', type=int, default=20, help='timed rounds (default: %(default)s)')
    common.add_argument('--threads', type=int, help='of torch and the runtimes (default: the idle cores)')

    def part(name: str, models: Sequence[str] = (), **kwargs: Any) -> Any:
        one = parts.add_parser(name, parents=[common], help=ACTIONS[name].__doc__.splitlines()[0], **kwargs)
        if models:
            one.add_argument('--models', nargs='+', default=models, metavar='NAME')
        return one

    every = dict(nargs='+', choices=RUNTIMES, metavar='RUNTIME')
    one = part('runtimes', MODELS)
    one.add_argument('--runtimes', **every, default=RUNTIMES, help=f'of {", ".join(RUNTIMES)}; the first is needed')
    one = part('digits')
    one.add_argument('--runtimes', **every, default=[r for r in RUNTIMES if r != 'compiled'])
    one.add_argument('--images', type=int, default=128, help='for calibration (default: %(default)s)')
    one.add_argument('--draws', type=int, default=10, help='of the noise (default: %(default)s)')
    one = part('pruned', MODELS[:1])
    one.add_argument('--ratios', nargs='+', type=float, default=[0.3, 0.5, 0.7])
    one.add_argument('--scopes', nargs='+', choices=SCOPES, default=SCOPES)
    one.add_argument('--round-to', nargs='+', type=int, default=[16, 32], help='widths are multiples of these')
    one.add_argument('--runtimes', **every, default=[EAGER, *INT8])
    add_flags(part('weights', epilog='Flags of pst-timm train for the fine-tuning follow after --.'))
    words, train_words = split_words(argv)
    args = parser.parse_args(words)
    args.train_words = train_words
    if getattr(args, 'runtimes', [EAGER])[0] != EAGER:
        parser.error(f'--runtimes begins with {EAGER!r}, which the others are compared with')
    logging.basicConfig(level=logging.WARNING)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        args.work.mkdir(parents=True, exist_ok=True)
        ACTIONS[args.part](args)
    except PSTError as e:
        return fail(parser.prog, e)
    return 0


if __name__ == '__main__':
    sys.exit(main())
