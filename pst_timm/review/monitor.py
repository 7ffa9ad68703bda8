"""What a model's images looked like when all was well, kept in a file, and whether later ones are still like it."""
import json
import logging
import math
import re
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from pst_timm.checkpoints import attention_settings, rules
from pst_timm.checkpoints.schema import check_facts, parse_json
from pst_timm.checkpoints.trust import check_ordinary
from pst_timm.data.datasets import find_split
from pst_timm.data.drift import (
    DIMENSIONS,
    MOST_EMBEDDINGS,
    MOST_ROWS,
    Batch,
    Result,
    Summary,
    drift_tests,
    estimated_accuracy,
    ks_resolution,
    summarize,
)
from pst_timm.data.samples import LOOKS, NO_LABEL, Samples
from pst_timm.metrics.binomial import binomial_interval
from pst_timm.metrics.calibration import confidence_error, fit_temperature
from pst_timm.models.digest import digest_note
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import read_csv, write_whole

from .answers import Outputs, Subject, open_labelled, open_loose

__all__ = [
    'FEW', 'Reference', 'Report', 'batch_of', 'check', 'check_subject', 'fit', 'open_images', 'read_answers',
    'read_reference', 'write_reference']

_logger = logging.getLogger(__name__)

HEADER_KEY = 'pst_timm_monitor'  # entry of the header that holds the facts, as JSON
VERSION = 1
FEW = 50  # images: with fewer, only what leaps to the eye is found
MOST_BYTES = 256 * 2 ** 20  # of a file that is read
DECIMALS = 4  # of confidences in a file of answers: some systems write no more, and none writes 1 alike
COLUMNS = {'probability1': 'confidence', 'class1': 'predicted'}  # as `pst-timm predict` calls them
MOST_IMAGES = 100_000_000
MOST_FEATURES = 65_536
SCHEMA = {
    'version': rules.whole(1, 1000),
    'digest': rules.text(200, r'weights sha256 [0-9a-f]{64}'),
    'architecture': rules.text(200),
    'class_names': rules.names,
    'named': rules.flag,
    'input_size': rules.size,
    'topk': rules.whole(0, 10 ** 9),
    'fine_fusion': rules.text(20, r'\w*'),
    'images': rules.whole(2, MOST_IMAGES),
    'right': rules.whole(0, MOST_IMAGES),
    'threshold': rules.real(0, 2),
    'ece': rules.real(0, 1),
    'temperature': rules.real(1e-9, 1e9),
}
LABELLED = ('right', 'threshold', 'ece', 'temperature')  # what labels alone can tell


class Reference(NamedTuple):
    """What production is compared with: no image, no name of one."""
    summary: Summary
    digest: str
    """Of the weights, see `digest_note`."""
    architecture: str
    class_names: List[str]
    named: bool
    """Whether the names are the model's own, or those of the folders."""
    settings: Dict[str, Any]
    """How the model was used: `input_size`, `topk`, `fine_fusion`."""
    ece: Optional[float] = None
    """Calibration error; None without labels."""
    temperature: Optional[float] = None
    """By which to divide the logits; None without labels."""

    @property
    def accuracy(self) -> Optional[float]:
        """From 0 to 1; None without labels."""
        return None if self.summary.right is None else self.summary.right / self.summary.images


@dataclass
class Report:
    """What came of a comparison, fit for JSON by `as_json`."""
    alert: bool
    alpha: float
    images: int
    reference_images: int
    architecture: str
    tests: List[Result]
    notes: List[str]
    """What was left out, and what to keep in mind."""
    accuracy: Dict[str, Any] = field(default_factory=dict)
    """`reference`, `estimated` and `measured` from 0 to 1, the `interval` of the last; None where not known."""
    calibration: Dict[str, Any] = field(default_factory=dict)
    """`ece` and `temperature` of the new images, and of the reference; likewise."""
    resolution: float = 0.
    """How far two distributions must lie apart to be told by these numbers of images, see `ks_resolution`."""

    def as_json(self) -> Dict[str, Any]:
        """Plain values."""
        return {**asdict(self), 'tests': [result._asdict() for result in self.tests]}


def batch_of(outputs: Outputs) -> Batch:
    """What is compared of a model's answers.

    Raises:
        PSTError: If the model gives NaN or infinite embeddings.
    """
    if not np.isfinite(outputs.embeddings).all():
        raise PSTError('The model gives NaN or infinite embeddings: use other weights.')
    labelled = len(outputs.labels) and (outputs.labels >= 0).all()
    return Batch(
        outputs.probabilities.max(axis=1),
        outputs.logits.argmax(axis=1),
        outputs.labels if labelled else None,
        outputs.looks,
        outputs.embeddings,
    )


def fit(subject: Subject, outputs: Outputs, class_names: Optional[Sequence[str]] = None) -> Reference:
    """What later images of a model are compared with.

    Args:
        subject: The model.
        outputs: Its answers to images that are as they should be, and that it was not trained on.
        class_names: Names of the folders, for a model that knows none.

    Raises:
        PSTError: If there are fewer than two images.
    """
    batch = batch_of(outputs)
    if len(batch.confidence) < 2:
        raise PSTError('Two images are the least to compare others with; some hundreds are a reference.')
    names = list(subject.class_names)
    if not subject.knows_names and class_names is not None:
        names[:len(class_names)] = class_names
    summary = summarize(batch, len(names))
    return Reference(
        summary,
        digest_note(subject.model.state_dict()),
        subject.name,
        names,
        subject.knows_names,
        settings_of(subject),
        **calibration_of(batch, outputs.logits),
    )


def settings_of(subject: Subject) -> Dict[str, Any]:
    """How a model is used: what changes its answers beside its weights."""
    return {'input_size': list(subject.input_size), **attention_settings(subject.model)}


def calibration_of(batch: Batch, logits: Optional[np.ndarray] = None) -> Dict[str, Optional[float]]:
    """`ece` and, from logits (N, classes), `temperature`; None where it is not known."""
    if not len(batch.right):
        return {'ece': None, 'temperature': None}
    ece = confidence_error(torch.from_numpy(batch.confidence[batch.known]), torch.from_numpy(batch.right))
    temperature = None
    if logits is not None:
        fitted = fit_temperature(
            torch.from_numpy(logits[batch.known]).double(), torch.from_numpy(batch.labels[batch.known]))
        temperature = float(np.clip(fitted, 1e-6, 1e6))  # of answers that are all right, it has no end
    return {'ece': ece, 'temperature': temperature}


# ------------------------------------------------------------------------------------------------------- the file

def write_reference(path: Path, reference: Reference) -> None:
    """Write a reference as .safetensors; errors as in `write_whole`."""
    summary = reference.summary
    tensors = {key: value for key, value in summary._asdict().items() if isinstance(value, np.ndarray)}
    facts = {
        'version': VERSION, 'digest': reference.digest, 'architecture': reference.architecture,
        'class_names': reference.class_names, 'named': reference.named, **reference.settings, 'images': summary.images,
        'right': summary.right, 'threshold': summary.threshold, 'ece': reference.ece,
        'temperature': reference.temperature}
    known = {key: value for key, value in facts.items() if value is not None}
    tensors = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    write_whole(path, partial(save_file, tensors, metadata={HEADER_KEY: json.dumps(known)}))


def read_reference(path: Path) -> Reference:
    """Read a reference; nothing in it is believed before it was looked at.

    Raises:
        PSTError: If it is missing, damaged or too large, or no reference.
    """
    path = Path(path)
    _check_size(path)
    try:
        with safe_open(path, 'np') as file:
            header = (file.metadata() or {}).get(HEADER_KEY)
            shapes = {key: (file.get_slice(key).get_dtype(), *file.get_slice(key).get_shape()) for key in file.keys()}
            facts = _check_header(path, header)
            _check_shapes(path, shapes, len(facts['class_names']))
            arrays = {key: file.get_tensor(key) for key in shapes}
    except PSTError:
        raise
    except Exception as e:  # whatever a damaged or malicious file may raise
        raise PSTError(
            f'{path} cannot be read: it is truncated or not a safetensors file '
            f'({rules.short(str(e) or type(e).__name__)}). Write it again with `pst-timm monitor fit`.') from None
    _check_values(path, arrays, facts)
    summary = Summary(
        facts['images'], *(arrays.get(key) for key in Summary._fields[1:7]), facts.get('right'), facts.get('threshold'))
    return Reference(
        summary, facts['digest'], facts['architecture'], facts['class_names'], facts['named'],
        {key: facts.get(key) for key in ('input_size', 'topk', 'fine_fusion')}, facts.get('ece'),
        facts.get('temperature'))


def _check_size(path: Path) -> None:
    check_ordinary(path)
    if path.stat().st_size > MOST_BYTES:
        raise PSTError(f'{path} has more than {MOST_BYTES >> 20} MiB, which is not what it should be.')


def _check_header(path: Path, header: Optional[str]) -> Dict[str, Any]:
    if header is None:
        raise PSTError(f'{path} is no reference: write one with `pst-timm monitor fit`.')
    facts = check_facts(path, parse_json(header, f'{path}: the entry {HEADER_KEY}'), SCHEMA, 'the reference')
    if facts.get('version', VERSION) > VERSION:
        raise PSTError(f'{path} is of a later version of this package: update it.')
    missing = [key for key in SCHEMA if key not in facts and key not in (*LABELLED, 'fine_fusion')]
    if missing:
        raise PSTError(f'{path} is garbled: it does not tell {missing[0]}. Write it again.')
    if 0 < sum(key in facts for key in LABELLED) < len(LABELLED):
        raise PSTError(f'{path} is garbled: of {", ".join(LABELLED)} it tells some, not all. Write it again.')
    return facts


def _check_shapes(path: Path, shapes: Dict[str, tuple], classes: int) -> None:
    """Make sure that arrays are those of a reference before they are read."""
    def fits(key: str, dtype: str, *most: int) -> bool:
        kind, *shape = shapes.get(key, ('',))
        return kind == dtype and len(shape) == len(most) and all(1 <= a <= b for a, b in zip(shape, most))

    good = (
        set(shapes) - {'true', 'projection'} == {'confidence', 'looks', 'embeddings', 'predicted'}
        and fits('confidence', 'F32', MOST_ROWS) and shapes['looks'] == ('F32', shapes['confidence'][1], len(LOOKS))
        and fits('embeddings', 'F32', MOST_EMBEDDINGS, DIMENSIONS) and min(shapes['embeddings'][1:2]) > 1
        and all(shapes.get(key, ('I64', classes)) == ('I64', classes) for key in ('predicted', 'true')))
    if good and 'projection' in shapes:
        good = fits('projection', 'F32', MOST_FEATURES, DIMENSIONS) and (
            shapes['projection'][2] == shapes['embeddings'][2])
    if not good:
        raise PSTError(f'{path} is garbled: its arrays are not those of a reference. Write it again.')


def _check_values(path: Path, arrays: Dict[str, np.ndarray], facts: Dict[str, Any]) -> None:
    counts = [arrays[key] for key in ('predicted', 'true') if key in arrays]
    good = (
        all(np.isfinite(array).all() for array in arrays.values())
        and all(0 <= array.min() and array.max() <= MOST_IMAGES and array.sum() == facts['images'] for array in counts)
        and 0 <= arrays['confidence'].min() and arrays['confidence'].max() <= 1.0001
        and facts.get('right', 0) <= facts['images'] and ('true' in arrays) == ('right' in facts))
    if not good:
        raise PSTError(f'{path} is garbled: its values are not those of a reference. Write it again.')


# ------------------------------------------------------------------------------------------------------- new images

def check_subject(reference: Reference, subject: Subject) -> Subject:
    """Make sure that a model is that of a reference, and is used as it was.

    Returns:
        The model, with the class names of the reference.

    Raises:
        PSTError: If it is another one, or used otherwise: all would be drift.
    """
    settings = settings_of(subject)
    for key, flag in (('input_size', '--img-size'), ('topk', '--topk'), ('fine_fusion', '--fine-fusion')):
        if settings[key] != reference.settings[key]:
            raise PSTError(
                f'The reference was made with {key} {reference.settings[key]}, and the model is used with '
                f'{settings[key]}: give {flag} as in `monitor fit`, or fit anew.')
    if digest_note(subject.model.state_dict()) != reference.digest:
        raise PSTError(
            f'{subject.source} has other weights than the model of the reference ({reference.architecture}): name that '
            f'one (--use-ema and --no-use-ema choose weights too), or write a new reference with `monitor fit`.')
    return subject._replace(
        class_names=reference.class_names, knows_names=reference.named or reference.summary.right is not None)


def open_images(subject: Subject, data_dir: Path, split: str = 'validation', labels: Optional[bool] = None) -> Samples:
    """Images with labels from their folders, or without.

    Args:
        subject: The model.
        data_dir: The images.
        split: See `open_labelled`.
        labels: Whether to take them from the folders; None takes them where all folders are classes by name.

    Raises:
        PSTError: If there are no images, or no labels where they are asked for.
    """
    if not data_dir.exists():
        raise PSTError(f'There is no {data_dir}: --data-dir must name images.')
    if labels or (labels is None and subject.knows_names):
        try:
            return open_labelled(subject, str(data_dir), split)
        except PSTError as e:
            if labels or not data_dir.is_dir():
                raise
            _logger.warning(f'The folders are not taken for labels: {e}')
    return open_loose(subject, [find_split(data_dir, split) or data_dir])


def read_answers(path: Path, class_names: Sequence[str]) -> Batch:
    """Answers of a model in production: a CSV file with the columns `confidence`, `predicted` and maybe `label`.

    A label may be empty: it is not known. Confidence is the largest probability, from 0 to 1; classes are names, or
    places in the order of the names, counted from 0. Further columns are left alone. What `pst-timm predict` writes
    will do, without the lines of errors.

    Raises:
        PSTError: If it cannot be read, or a line is not as it should be; names the line.
    """
    path = Path(path)
    _check_size(path)
    rows = [{COLUMNS.get(key, key): text for key, text in row.items()} for row in read_csv(path)]
    lines = [i for i, row in enumerate(rows, 2) if not row.get('error')]
    rows = [rows[i - 2] for i in lines]
    missing = [key for key in ('confidence', 'predicted') if rows and key not in rows[0]]
    if missing:
        raise PSTError(f'{path} has no column {missing[0]!r}: its first line must name confidence and predicted.')
    if not rows:
        raise PSTError(f'{path} has no answers: expected a line for each image.')
    places: Dict[str, Optional[int]] = {}
    for i, name in enumerate(class_names):
        places[name] = None if name in places else i  # of two classes

    def place(line: int, key: str, text: str) -> int:
        found = places.get(text)
        if found is None and text not in places and re.fullmatch(r'\d{1,7}', text) and int(text) < len(class_names):
            found = int(text)
        if found is None:
            raise PSTError(
                f'{path}, line {line}: {key} {rules.short(text)!r} is none of the {len(class_names)} classes of the '
                f'reference, or two of them: give a name such as {rules.short(class_names[0])!r}, or a number from 0.')
        return found

    def share(line: int, text: str) -> float:
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not 0 <= found <= 1:
            raise PSTError(f'{path}, line {line}: confidence {rules.short(text)!r} is no number from 0 to 1.')
        return found

    confidence = np.array([share(line, row['confidence']) for line, row in zip(lines, rows)])
    predicted = np.array([place(line, 'predicted', row['predicted']) for line, row in zip(lines, rows)])
    labels = np.array([
        place(line, 'label', row['label']) if row.get('label') else NO_LABEL for line, row in zip(lines, rows)])
    return Batch(confidence.round(DECIMALS), predicted, labels if (labels != NO_LABEL).any() else None)


def check(
        reference: Reference,
        batch: Batch,
        alpha: float = 0.01,
        logits: Optional[np.ndarray] = None,
        seed: int = 0,
) -> Report:
    """Compare new images with those of a reference.

    Args:
        reference: The reference.
        batch: A model's answers to the new ones; see `batch_of` and `read_answers`.
        alpha: Chance of an alert where nothing has moved.
        logits: Of the new images (N, classes), for a fresh temperature.
        seed: Of the permutations.

    Raises:
        PSTError: See `drift_tests`.
    """
    summary, images = reference.summary, len(batch.confidence)
    if batch.looks is None:  # from a file, whose confidences have few digits
        summary = summary._replace(
            confidence=summary.confidence.astype(np.float64).round(DECIMALS),
            threshold=None if summary.threshold is None else round(summary.threshold, DECIMALS))
    tests = drift_tests(summary, batch, LOOKS, alpha, seed)
    resolution = ks_resolution(len(summary.confidence), images, alpha / len(tests))
    estimated = None if summary.threshold is None else estimated_accuracy(batch.confidence, summary.threshold)
    measured = interval = None
    if len(batch.right):
        right = int(batch.right.sum())
        measured, interval = right / len(batch.right), binomial_interval(right, len(batch.right))
    return Report(
        any(result.alert for result in tests),
        alpha,
        images,
        summary.images,
        reference.architecture,
        tests,
        _notes(reference, batch, resolution),
        {'reference': reference.accuracy, 'estimated': estimated, 'measured': measured, 'interval': interval},
        {**calibration_of(batch, logits), 'reference_ece': reference.ece,
         'reference_temperature': reference.temperature},
        resolution,
    )


def _notes(reference: Reference, batch: Batch, resolution: float) -> List[str]:
    images, notes = len(batch.confidence), []
    for what, count in (('', images), ('reference ', len(reference.summary.confidence))):
        if count < FEW:
            notes.append(
                f'{count} {what}images are few: only what changes distributions by {resolution:.2f} of 1 or more '
                f'somewhere is seen. Some hundreds see about {ks_resolution(1000, 500, 0.01 / 8):.2f}.')
    if batch.embeddings is None:
        notes.append('Embeddings and looks of the images were not compared: answers alone do not tell them.')
    if reference.summary.right is None:
        notes.append('The reference has no labels: accuracy is neither estimated nor compared.')
    elif not len(batch.right):
        notes.append('Accuracy is estimated from confidence (ATC): too high where a model errs with confidence.')
    return notes
