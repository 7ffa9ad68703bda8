"""Whether a new model may replace an old one: both on the same labelled images, image by image."""
import statistics
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from pst_timm.data.samples import Samples
from pst_timm.metrics.calibration import calibration_error
from pst_timm.metrics.intervals import (
    Interval,
    PairedTest,
    detectable_difference,
    holm,
    mcnemar,
    paired_interval,
)
from pst_timm.utils.cost import weight_bytes
from pst_timm.utils.errors import PSTError
from pst_timm.utils.markdown import plain
from pst_timm.utils.timing import median_ratio, time_in_turn

from .answers import Outputs, Subject, answers, open_labelled

__all__ = ['CHANGES', 'ClassChange', 'Comparison', 'Flip', 'Side', 'compare', 'judge', 'report', 'verdict']

CHANGES = ('right to wrong', 'wrong to right', 'wrong to wrong')
LEVEL = 0.05


class Side(NamedTuple):
    """One of the two models, and what it is like on the images."""
    source: str
    model: str
    """Architecture."""
    img_size: Sequence[int]
    """Height and width."""
    accuracy: float
    """In percent."""
    loss: float
    """Cross-entropy."""
    ece: float
    """Expected calibration error, in percent."""
    latency_ms: Optional[float]
    """Median of one image; None where it was not measured."""
    parameters: int
    weights_mib: float
    """What all tensors take, in MiB."""


class ClassChange(NamedTuple):
    """A class of which the new model classifies fewer images right."""
    name: str
    images: int
    old: int
    """Images that the old model classifies right."""
    new: int
    lost: int
    """Images that the old model alone classifies right."""
    gained: int
    p: float
    """Of the one-sided paired test, corrected by Holm over all classes that there are images of."""


class Flip(NamedTuple):
    """An image whose answer has changed."""
    image: str
    label: str
    old: str
    new: str
    change: str
    """One of `CHANGES`."""


class Comparison(NamedTuple):
    """Two models on the same images."""
    old: Side
    new: Side
    images: int
    classes: int
    """With images."""
    difference: float
    """Accuracy of the new model minus that of the old one, in percentage points."""
    interval: Interval
    """What other images may bring, at 95%."""
    test: PairedTest
    lost: int
    """Images that the old model alone classifies right."""
    gained: int
    flips: List[Flip]
    fallen: List[ClassChange]
    """Classes whose accuracy fell, the least probable by chance first."""
    latency_ratio: Optional[float]
    """Median over the rounds of new over old."""
    detectable: float
    """True loss in percentage points that these images would show in four of five cases."""
    broken: List[str]
    """Names of the images that could not be read."""

    @property
    def negative_flip_rate(self) -> float:
        """Share of all images that were right and are wrong, in percent."""
        return 100 * self.lost / self.images


def compare(
        old: Subject,
        new: Subject,
        data_dir: str,
        split: str = 'validation',
        repeats: int = 30,
        batch_size: int = 64,
        workers: int = 0,
) -> Comparison:
    """Measure two models on the same labelled images, each at its own size and preprocessing, and time them in turn.

    Args:
        old: The model in use.
        new: The one that may replace it; it must know the same classes, in any order.
        data_dir: Labelled images.
        split: Split of the data.
        repeats: Timed rounds, 0 for none.
        batch_size: Images at a time; times are those of one.
        workers: Processes that read images, 0 for this one.

    Raises:
        PSTError: If the two know other classes, or fewer than two images can be read.
    """
    if old.knows_names and new.knows_names:
        _order((old.class_names, new.class_names), (old.source, new.source))  # before the data have their say
    data = [open_labelled(subject, data_dir, split) for subject in (old, new)]
    names = [_names(subject, samples) for subject, samples in zip((old, new), data)]
    order = _order(names, (old.source, new.source))
    outputs = [
        Outputs.gather(answers(subject, samples, batch_size, workers, title, embeddings=False))
        for subject, samples, title in zip((old, new), data, ('Old', 'New'))]
    read = [{name: i for i, name in enumerate(found.names)} for found in outputs]
    both = [name for name in read[0] if name in read[1]]
    if len(both) < 2:
        raise PSTError(f'Two models are compared on many images: {data_dir} has {len(both)} that can be read.')
    rows = [[places[name] for name in both] for places in read]
    logits = [found.logits[chosen] for found, chosen in zip(outputs, rows)]
    logits[1] = logits[1][:, order]  # as the old model has its classes
    labels = outputs[0].labels[rows[0]]
    guesses = [x.argmax(axis=1) for x in logits]
    right = [guess == labels for guess in guesses]
    lost, gained = right[0] & ~right[1], right[1] & ~right[0]
    times = _times((old, new), repeats) if repeats else None
    sides = [
        _side(subject, x, labels, times and times[key])
        for subject, x, key in zip((old, new), logits, ('old', 'new'))]
    flips = [
        Flip(both[i], *(names[0][k[i]] for k in (labels, *guesses)), CHANGES[0 if lost[i] else 1 if gained[i] else 2])
        for i in np.flatnonzero(guesses[0] != guesses[1])]
    return Comparison(
        *sides,
        images=len(both),
        classes=len(set(labels.tolist())),
        difference=sides[1].accuracy - sides[0].accuracy,
        interval=paired_interval(int(lost.sum()), int(gained.sum()), len(both)),
        test=mcnemar(int(lost.sum()), int(gained.sum())),
        lost=int(lost.sum()),
        gained=int(gained.sum()),
        flips=flips,
        fallen=_fallen(labels, right, names[0]),
        latency_ratio=median_ratio(times['new'], times['old']) if times else None,
        detectable=detectable_difference(len(both), int(lost.sum() + gained.sum()), LEVEL),
        broken=sorted({*outputs[0].broken, *outputs[1].broken}),
    )


def _names(subject: Subject, samples: Samples) -> List[str]:
    """Names of a model's classes: its own, or those of the data where it knows none and they are as many."""
    fits = len(samples.class_names) == len(subject.class_names)
    return subject.class_names if subject.knows_names or not fits else samples.class_names


def _order(names: Sequence[List[str]], sources: Sequence[str]) -> List[int]:
    """Where each class of the first model is among those of the second one."""
    old, new = names
    only = [sorted(set(a) - set(b)) for a, b in ((old, new), (new, old))]
    for mine, source in zip(only, sources):
        if mine:
            raise PSTError(
                f'{sources[0]} and {sources[1]} do not know the same classes ({len(old)} and {len(new)}): only '
                f'{source} knows {plain(mine[0])!r}. Compare models of the same classes.')
    if len(set(old)) < len(old) or len(set(new)) < len(new):
        if old == new:
            return list(range(len(old)))
        raise PSTError(f'{sources[0]} and {sources[1]} have classes of the same name, which cannot be told apart.')
    return [new.index(name) for name in old]


def _side(subject: Subject, logits: np.ndarray, labels: np.ndarray, times: Optional[List[float]]) -> Side:
    x, y = torch.from_numpy(logits).double(), torch.from_numpy(labels)
    return Side(
        subject.source,
        subject.name,
        list(subject.input_size[1:]),
        100 * float((logits.argmax(axis=1) == labels).mean()),
        F.cross_entropy(x, y).item(),
        100 * calibration_error(x, y),
        1000 * statistics.median(times) if times else None,
        sum(p.numel() for p in subject.model.parameters()),
        weight_bytes(subject.model) / 2 ** 20,
    )


@torch.inference_mode()
def _times(subjects: Sequence[Subject], repeats: int) -> Dict[str, List[float]]:
    """Seconds of one image through each, in turn."""
    inputs = [torch.randn(1, *subject.input_size, device=subject.device) for subject in subjects]
    calls = {
        key: lambda subject=subject, x=x: subject.model(x)
        for key, subject, x in zip(('old', 'new'), subjects, inputs)}
    return time_in_turn(calls, repeats, warmup=3, device=subjects[0].device)


def _fallen(labels: np.ndarray, right: Sequence[np.ndarray], names: Sequence[str]) -> List[ClassChange]:
    old, new = right
    classes = np.unique(labels)
    found = []
    for k in classes:
        inside = labels == k
        lost, gained = int((inside & old & ~new).sum()), int((inside & new & ~old).sum())
        found.append(ClassChange(
            names[k], int(inside.sum()), int((inside & old).sum()), int((inside & new).sum()), lost, gained,
            mcnemar(lost, gained).worse))
    found = [change._replace(p=p) for change, p in zip(found, holm([change.p for change in found]))]
    return sorted((c for c in found if c.new < c.old), key=lambda c: (c.p, c.new - c.old))


# the verdict

def judge(
        comparison: Comparison,
        tolerance: Optional[float] = None,
        per_class: bool = True,
        max_latency_ratio: Optional[float] = None,
) -> List[str]:
    """Why the new model is worse than the old one, in words; empty if it may replace it.

    It is worse if one of these holds:

    * the one-sided exact McNemar test tells a loss of accuracy at 5%; with a tolerance, instead, the accuracy on these
      images is lower by more than that;
    * of a class, the same test tells a loss at 5%, corrected by Holm over all classes;
    * it takes more time than the old one, by more than a factor.

    Args:
        comparison: From `compare`.
        tolerance: Loss of accuracy that is accepted, in percentage points; None for what chance may bring.
        per_class: Whether classes count.
        max_latency_ratio: Most time of an image, as a multiple of the old model's.
    """
    reasons = []
    if tolerance is None and comparison.test.worse <= LEVEL:
        reasons.append(
            f'its accuracy is lower by {-comparison.difference:.2f} points, which is not chance '
            f'(p = {comparison.test.worse:.2g})')
    # differences of shares of so many images, without what floats add to them
    if tolerance is not None and round(100 * (comparison.lost - comparison.gained) / comparison.images, 9) > tolerance:
        reasons.append(
            f'its accuracy is lower by {-comparison.difference:.2f} points, more than the {tolerance:g} that are '
            f'accepted')
    worse = [c for c in comparison.fallen if c.p <= LEVEL] if per_class else []
    if worse:
        told = ', '.join(f'{plain(c.name)} ({c.old} to {c.new} of {c.images})' for c in worse[:3])
        more = f' and {len(worse) - 3} more' if len(worse) > 3 else ''
        reasons.append(f'it has lost in {len(worse)} class{"es" if len(worse) > 1 else ""}: {told}{more}')
    ratio = comparison.latency_ratio
    if max_latency_ratio is not None and ratio is not None and ratio > max_latency_ratio:
        reasons.append(f'an image takes {ratio:.2f} times as long, more than the {max_latency_ratio:g} accepted')
    return reasons


def verdict(comparison: Comparison, reasons: Sequence[str]) -> str:
    """What the comparison says in a sentence or two.

    Args:
        comparison: From `compare`.
        reasons: From `judge`.
    """
    if reasons:
        return f'The new model is worse: {"; ".join(reasons)}.'
    if comparison.test.better <= LEVEL:
        return f'The new model is better (p = {comparison.test.better:.2g}).'
    if not comparison.flips:
        return 'The new model gives the same answers.'
    return (
        f'The new model is not worse, as far as {comparison.images:,} images can tell: they would show a loss of '
        f'{comparison.detectable:.1f} points in four of five cases, a smaller one more seldom.')


def report(comparison: Comparison, reasons: Sequence[str]) -> Dict[str, Any]:
    """All of a comparison as plain values for JSON.

    Args:
        comparison: From `compare`.
        reasons: From `judge`.
    """
    values = comparison._asdict()
    values.update(
        old=comparison.old._asdict(), new=comparison.new._asdict(), interval=list(comparison.interval),
        p_values=comparison.test._asdict(), negative_flip_rate=comparison.negative_flip_rate,
        flips=[flip._asdict() for flip in comparison.flips], fallen=[c._asdict() for c in comparison.fallen])
    del values['test']
    return {'worse': bool(reasons), 'reasons': list(reasons), 'verdict': verdict(comparison, reasons), **values}
