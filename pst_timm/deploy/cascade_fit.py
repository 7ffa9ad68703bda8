"""Fit a cascade: temperatures and thresholds from what every stage says of held-out images, and what each stage costs.

The thresholds are chosen for a budget of the mean cost, or for a floor under the accuracy that is guaranteed in the
manner of "learn then test" (Angelopoulos et al., arXiv 2110.01052): one half of the images gives temperatures and
candidates, in an order; on the other half, which has chosen nothing, each candidate in turn has to pass an exact test,
and the first that fails ends the search. So the chance that any candidate which passed is worse than promised is at
most that of one test.
"""
import copy
import logging
import math
import os
import shutil
import statistics
from functools import partial
from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn as nn
from timm.data import create_transform
from torch.utils.data import DataLoader

from pst_timm.checkpoints.folder import check_target, save_folder
from pst_timm.data.datasets import TRAINING, VALIDATION, create_eval_dataset
from pst_timm.data.images import listed
from pst_timm.data.loaders import plain_worker_errors
from pst_timm.data.samples import Samples, collate_samples
from pst_timm.engine.args import validate_args
from pst_timm.metrics.binomial import drop_p_value, fewest_images
from pst_timm.metrics.calibration import confidence_error, fit_temperature
from pst_timm.metrics.failure import failure_auroc
from pst_timm.utils.cost import count_gmacs
from pst_timm.utils.devices import check_device, choose_threads
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import check_output, write_text
from pst_timm.utils.markdown import plain
from pst_timm.utils.progress import progress_bar
from pst_timm.utils.timing import time_in_turn

from .cascade import COSTS, Cascade, Stage, confidence_of, open_stage, resolve_stage, write_cascade
from .runtime import Deployed, is_exported

__all__ = [
    'LEVEL', 'Fit', 'Goal', 'HeldOut', 'Measured', 'Route', 'answered_right', 'certify', 'choose', 'fit', 'frontier',
    'measure_stages', 'open_images', 'stage_costs',
]

_logger = logging.getLogger(__name__)

LEVEL = 0.95  # of the guarantee
FEWEST = 50  # images of a fit, or of each of its halves
PART = 0.2  # of a training split
LOWEST, HIGHEST = 0.05, 20.  # temperatures beyond these are those of images that are all right, or none
MOST_CUTS = 200  # thresholds of a stage that are tried
MOST_CANDIDATES = 50  # that are tested for a guarantee
MOST_POINTS = 41  # of a curve


class Goal(NamedTuple):
    """What thresholds are chosen for; one of the two is set."""
    max_cost: Optional[float] = None
    """Most mean cost of an image, in the measure of the cascade."""
    max_drop: Optional[float] = None
    """Most percentage points of accuracy below the last stage alone, guaranteed at `LEVEL`."""


class Route(NamedTuple):
    """Thresholds of all stages but the last, and what came of them on N images."""
    thresholds: Tuple[float, ...]
    right: int
    """Images that are answered right."""
    reached: Tuple[int, ...]
    """Images that each stage saw."""

    def cost(self, costs: Sequence[float]) -> float:
        """Mean cost of an image, of what each stage costs."""
        return sum(n * c for n, c in zip(self.reached, costs)) / self.reached[0]


class HeldOut(NamedTuple):
    """What every stage says of the held-out images."""
    logits: List[torch.Tensor]
    """float32 (N, classes) of each stage."""
    labels: torch.Tensor
    """int64 (N,)."""
    names: List[str]

    def part(self, indices: torch.Tensor) -> 'HeldOut':
        """Some of the images."""
        return HeldOut(
            [x[indices] for x in self.logits], self.labels[indices], [self.names[i] for i in indices.tolist()])


class Measured(NamedTuple):
    """What a model, or the cascade, is like on images."""
    accuracy: float
    """In percent."""
    ece: float
    """Expected calibration error, from 0 to 1, of what it gives, at its temperature."""
    failure_auroc: Optional[float]
    """None where all answers are right, or none."""
    cost: float
    """Mean, of an image."""


class Fit(NamedTuple):
    """A fitted cascade."""
    path: Path
    cascade: Cascade
    goal: Goal
    route: Route
    """On the images of `measured`."""
    measured: Measured
    """The cascade, on `images` images: in a fit with a guarantee those that chose nothing."""
    singles: List[Measured]
    """Every stage alone, on the same images."""
    curve: List[Tuple[float, float]]
    """Cost and accuracy in percent on these images from none passed on to all, with one threshold for all stages."""
    candidates: List[Tuple[float, float]]
    """The same of the thresholds that were to choose from, the cheapest first."""
    images: int
    plot: Optional[Path]


# arithmetic of thresholds

def _cuts(confidence: np.ndarray, most: int) -> List[Tuple[int, float]]:
    """How many of the least sure images a threshold passes on, and that threshold: between neighbours that differ.

    Args:
        confidence: Confidence (N,), sorted.
        most: Most cuts; evenly spaced ones if there are more, that pass on none and all among them.
    """
    places = 1 + np.flatnonzero(confidence[1:] > confidence[:-1])
    if len(places) > most - 2:
        places = places[np.unique(np.linspace(0, len(places) - 1, most - 2).round().astype(int))]
    found = [(0, 0.)]
    for k in places.tolist():
        low, high = float(confidence[k - 1]), float(confidence[k])
        middle = low + (high - low) / 2
        found.append((k, middle if low <= middle < high else low))
    return [*found, (len(confidence), 1.)] if len(confidence) else found


def _all_routes(confidence: np.ndarray, right: np.ndarray, costs: Sequence[float], most: int) -> List[Route]:
    count = right.shape[1]
    if len(right) == 1:
        return [Route((), int(right[0].sum()), (count,))]
    order = np.argsort(confidence[0], kind='stable')
    stopped = np.append(0, np.cumsum(right[0][order][::-1]))[::-1]  # right ones among those after place k
    found = []
    for k, threshold in _cuts(confidence[0][order], most):
        rest = order[:k]
        for inner in _pareto(_all_routes(confidence[1:, rest], right[1:, rest], costs[1:], most), costs[1:]):
            found.append(Route(
                (threshold, *inner.thresholds), int(stopped[k]) + inner.right, (count, *inner.reached)))
    return found


def _pareto(routes: List[Route], costs: Sequence[float]) -> List[Route]:
    """Those than which none costs as little and is as accurate, the cheapest first."""
    if len(routes) == 1:
        return routes
    total = [sum(n * c for n, c in zip(route.reached, costs)) for route in routes]
    kept: List[Route] = []
    for i in sorted(range(len(routes)), key=lambda i: (total[i], -routes[i].right)):
        if not kept or routes[i].right > kept[-1].right:
            kept.append(routes[i])
    return kept


def frontier(
        confidence: np.ndarray,
        right: np.ndarray,
        costs: Sequence[float],
        most: int = MOST_CUTS,
) -> List[Route]:
    """The thresholds than which none is as cheap and as accurate on some images, the cheapest first.

    Args:
        confidence: Calibrated confidence (stages, N).
        right: Which images each stage answers right (stages, N).
        costs: What an image costs each stage.
        most: Most thresholds of a stage that are tried; where there are no more distinct confidences, all are.
    """
    return _pareto(_all_routes(confidence, right, costs, most), costs)


def answered_right(
        confidence: np.ndarray,
        right: np.ndarray,
        thresholds: Sequence[float],
) -> Tuple[np.ndarray, Tuple[int, ...]]:
    """Which images (N,) a cascade answers right, and how many each stage sees.

    Args:
        confidence: Calibrated confidence (stages, N).
        right: Which images each stage answers right (stages, N).
        thresholds: Of all stages but the last.
    """
    answer, left = right[0].copy(), np.ones(right.shape[1], bool)
    reached = [right.shape[1]]
    for i, threshold in enumerate(thresholds):
        left &= confidence[i] <= threshold
        answer[left] = right[i + 1][left]
        reached.append(int(left.sum()))
    return answer, tuple(reached)


def choose(routes: Sequence[Route], costs: Sequence[float], max_cost: float) -> Optional[Route]:
    """The most accurate of a frontier within a budget, None if there is none."""
    return next((route for route in reversed(routes) if route.cost(costs) <= max_cost), None)


def certify(
        routes: Sequence[Route],
        confidence: np.ndarray,
        right: np.ndarray,
        max_drop: float,
        level: float = LEVEL,
) -> Optional[Route]:
    """The cheapest of a frontier whose accuracy is certified to be near that of the last stage alone.

    With a chance of at least `level` over the draw of these images, the true accuracy of what is returned is less than
    `max_drop` below that of the last stage. Candidates are tested from the dearest to the cheapest, and the first that
    fails ends the search: an error needs that the first one whose true drop is too large passes its test.

    Args:
        routes: From `frontier`, on other images.
        confidence: Calibrated confidence (stages, N), by temperatures from other images.
        right: Which images each stage answers right (stages, N).
        max_drop: Largest drop, from 0 to 1.
        level: How sure one wants to be.

    Returns:
        The route as it is on these images; None if not even the dearest can be certified.
    """
    places = range(len(routes))
    if len(routes) > MOST_CANDIDATES:
        places = np.unique(np.linspace(0, len(routes) - 1, MOST_CANDIDATES).round().astype(int)).tolist()
    found = None
    for i in reversed(places):
        answer, reached = answered_right(confidence, right, routes[i].thresholds)
        lost, gained = (right[-1] & ~answer).sum(), (answer & ~right[-1]).sum()
        if drop_p_value(int(lost), int(gained), len(answer), max_drop) > 1 - level:
            break
        found = Route(routes[i].thresholds, int(answer.sum()), reached)
    return found


# measurements

@torch.inference_mode()
def measure_stages(
        cascade: Cascade,
        samples: Samples,
        device: torch.device,
        batch_size: int = 64,
        workers: int = 0,
) -> HeldOut:
    """Run every stage once over all images, at a temperature of 1.

    Args:
        cascade: The cascade, on its device.
        samples: The images, prepared for the cascade.
        device: The device.
        batch_size: Images at a time.
        workers: Processes that read images, 0 for this one.

    Raises:
        PSTError: If no image can be read, or a stage gives NaN.
    """
    loader = DataLoader(samples, batch_size, num_workers=workers, collate_fn=collate_samples)
    logits: List[List[torch.Tensor]] = [[] for _ in cascade.stages]
    labels, names, broken = [], [], []
    with plain_worker_errors():
        for batch, unread in progress_bar(loader, len(loader), 'Held out', True):
            broken += [samples.names[image.index] for image in unread]
            if batch is None:
                continue
            for stage, found in zip(cascade.stages, logits):
                found.append(stage(batch.image.to(device)).cpu())
                if not torch.isfinite(found[-1]).all():
                    raise PSTError(f'{plain(stage.source, 300)} gives NaN or infinite logits: use other weights.')
            labels.append(batch.label)
            names += [samples.names[i] for i in batch.index.tolist()]
    if broken:
        _logger.warning(f'Skipped {len(broken)} image(s) that cannot be read: {listed(broken)}.')
    if not labels:
        raise PSTError(f'Not one of the {len(broken)} images could be read.')
    return HeldOut([torch.cat(parts) for parts in logits], torch.cat(labels), names)


@torch.inference_mode()
def stage_costs(
        cascade: Cascade,
        kind: str = 'latency',
        device: Optional[torch.device] = None,
        batch_size: int = 1,
        rounds: int = 30,
) -> List[float]:
    """What an image costs each stage: milliseconds, measured in turn, or billions of multiply-adds.

    Args:
        cascade: The cascade, on its device. What it does beside the models (resizing, confidences) is timed too.
        kind: One of `COSTS`.
        device: The device, the CPU if None.
        batch_size: Images of a batch, where it is timed.
        rounds: Timed rounds.

    Raises:
        PSTError: If multiply-adds are asked of an exported file, which does not tell them.
    """
    if kind == 'macs':
        exported = next((stage for stage in cascade.stages if isinstance(stage.model, Deployed)), None)
        if exported is not None:
            raise PSTError(
                f'{plain(exported.source, 300)} is an exported model, whose multiply-adds are not known: take --cost '
                f'latency.')
        return [count_gmacs(stage.model, stage.input_size) for stage in cascade.stages]
    x = torch.randn(batch_size, *cascade.input_size, generator=torch.Generator().manual_seed(0)).to(device)

    def call(stage: Stage) -> None:
        confidence_of(stage(x))
    calls = {str(i): partial(call, stage) for i, stage in enumerate(cascade.stages)}
    times = time_in_turn(calls, rounds, warmup=3, device=device)
    return [1000 * statistics.median(mine) / batch_size for mine in times.values()]


def open_images(cascade: Cascade, data_dir: str, split: str, part: Optional[float], seed: int) -> Samples:
    """The held-out images: a split, or a seeded part of it."""
    channels = cascade.input_size[0]
    if channels not in (1, 3):
        raise PSTError(f'The stages take images of {channels} channels; images from files have 3, or 1 if grey.')
    args = validate_args(data_dir=str(data_dir), split=split, in_chans=channels)
    samples = Samples.labelled(
        create_eval_dataset(args, split, None), create_transform(**cascade.config), cascade.class_names)
    if len(samples.class_names) != cascade.num_classes:
        raise PSTError(
            f'{data_dir} has {len(samples.class_names)} classes, and the stages have {cascade.num_classes} without '
            f'names: which is which is not known. Name models of these classes.')
    if part is None:
        part = PART if split in TRAINING else 1.
    if part == 1:
        return samples
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    return samples.subset(sorted(order[:math.ceil(part * len(samples))].tolist()))


def _temperature(logits: torch.Tensor, labels: torch.Tensor, stage: Stage) -> float:
    """The temperature of a stage, within bounds where nearly all answers are right, or wrong."""
    found = fit_temperature(logits.double(), labels)
    bounded = min(max(found, LOWEST), HIGHEST) if math.isfinite(found) else 1.
    if bounded != found:
        _logger.warning(
            f'{plain(stage.source, 300)}: the best temperature is {found:.3g}, as '
            f'{(logits.argmax(dim=1) == labels).float().mean():.1%} of the images are answered right; {bounded:g} is '
            f'taken.')
    return bounded


def _measured(confidence: np.ndarray, right: np.ndarray, cost: float) -> Measured:
    confidence, right = torch.from_numpy(confidence), torch.from_numpy(right)
    return Measured(
        100 * right.double().mean().item(), confidence_error(confidence, right), failure_auroc(confidence, right), cost)


# the whole

def fit(
        sources: Sequence[os.PathLike],
        output: os.PathLike,
        data_dir: str,
        split: str = 'train',
        *,
        max_cost: Optional[float] = None,
        relative: bool = False,
        max_drop: Optional[float] = None,
        img_sizes: Optional[Sequence[int]] = None,
        topk: Optional[Sequence[int]] = None,
        fine_fusion: Optional[str] = None,
        reparam: bool = False,
        part: Optional[float] = None,
        seed: int = 0,
        cost: str = 'latency',
        cost_batch_size: int = 1,
        rounds: int = 30,
        device: str = '',
        batch_size: int = 64,
        workers: int = 0,
        plot: bool = True,
        overwrite: bool = False,
) -> Fit:
    """Fit a cascade, and write it with its curve.

    Args:
        sources: Two or three models, the cheapest first: what `open_source` takes, but for cascades. Those that are not
            beside the output or below are copied to a folder next to it.
        output: The .json file to write; the curve has its name, and ends with .png.
        data_dir: Labelled images that no stage was trained on, and that no accuracy will be reported on.
        split: Split of the data.
        max_cost: Most mean cost of an image; this, or a `max_drop`.
        relative: Whether `max_cost` is a multiple of what the last stage costs.
        max_drop: Most points of accuracy below the last stage alone.
        img_sizes: Height and width of each stage, or of all; the models' own if None.
        topk: Coarse tokens that fine attention selects in each stage, or in all; the models' own if None.
        fine_fusion: How fine attention is added where `topk` sets it.
        reparam: Whether to fold the stages for inference.
        part: Share of the split that is taken, drawn with the seed; of a training split a fifth if None, else all.
        seed: Seed of that draw, and of the halves.
        cost: 'latency', in milliseconds, or 'macs', in billions of multiply-adds.
        cost_batch_size: Images of a batch that is timed.
        rounds: Timed rounds.
        device: 'cpu', 'cuda', ...; the best there is if empty.
        batch_size: Images at a time, where the stages are run over the images.
        workers: Processes that read images, 0 for this one.
        plot: Whether to draw the curve.
        overwrite: Whether files of an earlier cascade may be replaced.

    Raises:
        PSTError: If the stages do not go together, the goal cannot be reached on these images, or a file cannot be
            written.
    """
    output = Path(output)
    if output.suffix != '.json':
        raise PSTError(f'--output {output} must end with .json.')
    if (max_cost is None) == (max_drop is None):
        raise PSTError('Say what the thresholds are for: a --max-cost or a --max-drop, and not both.')
    picture = output.with_suffix('.png') if plot else None
    for path in filter(None, (output, picture)):
        check_output(path, overwrite, sources)
    if plot:
        from .cascade_plot import check_plots, draw_curve
        check_plots()
    place = check_device(device)
    if place.type == 'cpu':
        choose_threads()
    sizes, ks = (_one_each(values, len(sources), flag) for values, flag in (
        (img_sizes, '--img-sizes'), (topk, '--topk')))
    stages = [
        open_stage(source, None if size is None else (size, size), k, fine_fusion if k else None)
        for source, size, k in zip(sources, sizes, ks)]
    cascade = Cascade(stages, cost)
    homes = [Home(output, i, stage, overwrite) for i, stage in enumerate(stages)]
    samples = open_images(cascade, data_dir, split, part, seed)
    _say_what_it_takes(split, len(samples), max_drop)
    whole = [copy.deepcopy(stage.model) if home.copy else None for stage, home in zip(stages, homes)]
    cascade.fold([reparam and not isinstance(stage.model, Deployed) for stage in stages])
    cascade.check_runs()
    cascade.to(place)
    costs = stage_costs(cascade, cost, place, cost_batch_size, rounds)
    for stage, value in zip(stages, costs):
        stage.cost = value
    if costs != sorted(costs):
        told = ', '.join(f'{value:.3g}' for value in costs)
        _logger.warning(f'The stages cost {told} {COSTS[cost]}: name the cheapest one first, or nothing is saved.')
    data = measure_stages(cascade, samples, place, batch_size, workers)
    goal = Goal(max_cost * costs[-1] if max_cost is not None and relative else max_cost, max_drop)
    route, reported, routes = _fit_thresholds(cascade, data, goal, seed)
    confidence, right = _answers(cascade, reported)
    candidates = sorted(_point(confidence, right, other.thresholds, costs) for other in routes)
    sweep = [threshold for _, threshold in _cuts(np.sort(confidence[0]), MOST_POINTS)]
    curve = [_point(confidence, right, [threshold] * (len(stages) - 1), costs) for threshold in sweep]
    answer, _ = answered_right(confidence, right, route.thresholds)
    measured = _measured(_final_confidence(confidence, route.thresholds), answer, route.cost(costs))
    singles = [_measured(c, r, value) for c, r, value in zip(confidence, right, costs)]
    count = len(data.labels)
    cascade.facts = {
        'split': split, 'images': count, 'seed': seed, 'goal': {k: v for k, v in goal._asdict().items() if v},
        'measured_on': len(reported.labels), 'cascade': measured._asdict(),
        'stages': [{'model': stage.name, **single._asdict()} for stage, single in zip(stages, singles)],
        'curve': [list(point) for point in curve], 'candidates': [list(point) for point in candidates]}
    if max_drop is not None:
        cascade.facts['guaranteed'] = {
            'max_drop': max_drop, 'level': LEVEL, 'below': 'the last stage alone', 'images': len(reported.labels)}
    if picture is not None:
        alone = [(stage.name, stage.input_size, single) for stage, single in zip(stages, singles)]
        draw_curve(picture, curve, candidates, alone, measured, COSTS[cost])
    for model, home in zip(whole, homes):
        home.write(model)
    write_text(output, write_cascade(cascade, [home.told for home in homes]))
    return Fit(
        output, cascade, goal, route, measured, singles, curve, candidates, len(reported.labels), picture)


def _one_each(values: Optional[Sequence[int]], count: int, flag: str) -> List[Optional[int]]:
    if values is None:
        return [None] * count
    if len(values) not in (1, count):
        raise PSTError(f'{flag} has {len(values)} values for {count} stages: name one for each, or one for all.')
    return list(values) * (count if len(values) == 1 else 1)


def _say_what_it_takes(split: str, images: int, max_drop: Optional[float]) -> None:
    """What the images have to be, and whether they are enough.

    Raises:
        PSTError: If they are too few.
    """
    told = f'{images:,} images of the {split!r} split choose the thresholds'
    if split in TRAINING:
        _logger.warning(
            f'{told}: no stage may have been trained on them, or it is surer of them than of others, and what is found '
            f'here does not hold elsewhere. Keep a split of its own for it (--split).')
    elif split in VALIDATION:
        _logger.warning(
            f'{told}: accuracy that is reported on the same images flatters the cascade. Keep a split of its own for '
            f'it (--split).')
    halves = 1 if max_drop is None else 2
    if images // halves < FEWEST:
        raise PSTError(f'{images} images are too few to fit a cascade: {halves * FEWEST} at least, better thousands.')
    if max_drop is not None and drop_p_value(0, 0, images // 2, max_drop / 100) > 1 - LEVEL:
        needed = f'it takes {2 * fewest_images(max_drop / 100):,} at least' if max_drop else 'no number could'
        raise PSTError(
            f'{images:,} images cannot guarantee a drop below {max_drop:g} points at {LEVEL:.0%}, not even if no '
            f'answer changed: {needed} (half of them choose candidates, half test them). Take more images, a larger '
            f'--max-drop, or a --max-cost.')


def _point(
        confidence: np.ndarray,
        right: np.ndarray,
        thresholds: Sequence[float],
        costs: Sequence[float],
) -> Tuple[float, float]:
    """Mean cost, and accuracy in percent."""
    answer, reached = answered_right(confidence, right, thresholds)
    return Route(tuple(thresholds), int(answer.sum()), reached).cost(costs), 100 * float(answer.mean())


def _fit_thresholds(
        cascade: Cascade,
        data: HeldOut,
        goal: Goal,
        seed: int,
) -> Tuple[Route, HeldOut, List[Route]]:
    """Set temperatures and thresholds of a cascade.

    Returns:
        The route on the images to report on, these images, and all routes that were to choose from.

    Raises:
        PSTError: If the goal cannot be reached.
    """
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(seed + 1))
    guaranteed = goal.max_drop is not None
    chosen_on = data.part(order[:len(order) // 2]) if guaranteed else data
    reported = data.part(order[len(order) // 2:]) if guaranteed else data
    stages = list(cascade.stages)
    for stage, logits in zip(stages, chosen_on.logits):
        stage.temperature = _temperature(logits, chosen_on.labels, stage)
    costs = [stage.cost for stage in stages]
    routes = frontier(*_answers(cascade, chosen_on), costs)
    if guaranteed:
        route = certify(routes, *_answers(cascade, reported), goal.max_drop / 100)
        if route is None:
            raise PSTError(
                f'No cascade of these stages is certain to lose less than {goal.max_drop:g} points, as far as '
                f'{len(reported.labels):,} images can tell: take more images, a larger --max-drop, or other stages.')
    else:
        route = choose(routes, costs, goal.max_cost)
        if route is None:
            raise PSTError(
                f'No cascade costs {goal.max_cost:.4g} {cascade.unit} or less: the first stage alone costs '
                f'{costs[0]:.4g}, as every image passes it.')
    _, reached = answered_right(*_answers(cascade, data), route.thresholds)  # of all images, to compare with later
    for stage, threshold, saw, passed in zip(stages, route.thresholds, reached, reached[1:]):
        stage.threshold, stage.reached, stage.passed = threshold, saw, passed
    stages[-1].threshold, stages[-1].reached, stages[-1].passed = 0., reached[-1], 0
    return route, reported, routes


def _answers(cascade: Cascade, data: HeldOut) -> Tuple[np.ndarray, np.ndarray]:
    """Calibrated confidence and which images are answered right, both (stages, N)."""
    confidence = [confidence_of(logits / stage.temperature) for stage, logits in zip(cascade.stages, data.logits)]
    right = [logits.argmax(dim=1) == data.labels for logits in data.logits]
    return torch.stack(confidence).numpy(), torch.stack(right).numpy()


def _final_confidence(confidence: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """That of the stage which answers each image."""
    final, left = confidence[0].copy(), np.ones(confidence.shape[1], bool)
    for i, threshold in enumerate(thresholds):
        left &= confidence[i] <= threshold
        final[left] = confidence[i + 1][left]
    return final


# where stages are

class Home:
    """Where the file of a cascade finds a stage: where it is, or a copy next to the file."""

    def __init__(self, output: Path, index: int, stage: Stage, overwrite: bool):
        """
        Args:
            output: The file of the cascade.
            index: Place of the stage.
            stage: The stage.
            overwrite: Whether an earlier copy may be replaced.

        Raises:
            PSTError: If it cannot be copied there.
        """
        source = stage.source.removeprefix('local-dir:')
        self.copy: Optional[Path] = None
        root = Path(os.path.realpath(output.parent))
        if os.path.exists(source) and Path(os.path.realpath(source)).is_relative_to(root):
            self.told = Path(os.path.realpath(source)).relative_to(root).as_posix()
            try:
                resolve_stage(output, self.told)
                return
            except PSTError:  # what is read of it lies elsewhere in part
                pass
        self.source, self.exported = Path(source), is_exported(source)
        name = Path(source).name if self.exported else plain(stage.name, 60).replace(os.sep, '-')
        self.copy = output.with_suffix('') / f'{index + 1}-{name}'
        self.told = self.copy.relative_to(output.parent).as_posix()
        folder = self.copy.parent
        if os.path.lexists(folder) and not folder.is_dir():
            raise PSTError(
                f'{plain(stage.source, 300)} is to be copied to a folder {folder}, which is a file: name another '
                f'--output.')
        if self.exported:
            if folder.is_dir():
                check_output(self.copy, overwrite, [source])
                if self.copy.suffix == '.xml':
                    check_output(self.copy.with_suffix('.bin'), overwrite)
        else:
            check_target(self.copy, Path(source), overwrite)

    def write(self, model: Optional[nn.Module]) -> None:
        """Make the copy, if there is to be one, of a model as it was opened."""
        if self.copy is None:
            return
        try:
            self.copy.parent.mkdir(exist_ok=True)
            if self.exported:
                shutil.copyfile(self.source, self.copy)
                weights = self.source.with_suffix('.bin')
                if self.source.suffix == '.xml' and weights.exists():
                    shutil.copyfile(weights, self.copy.with_suffix('.bin'))
                return
        except OSError as e:
            raise PSTError(f'Cannot write {self.copy}: {e.strerror or e}.') from e
        save_folder(model, self.copy)
