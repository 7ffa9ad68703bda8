"""The classes of images: the most probable ones of each, batch by batch, and how people and programs read them."""
import csv
import io
import json
import os
import shlex
from typing import BinaryIO, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np
import torch

from pst_timm.checkpoints import temperature_of
from pst_timm.data.samples import Samples
from pst_timm.utils.errors import PSTError
from pst_timm.utils.markdown import plain

from .answers import Outputs, Subject, answers

__all__ = [
    'EIGHTHS', 'Prediction', 'calibration_note', 'heading', 'listed_paths', 'most_probable', 'predict',
    'render']

LONGEST_PATH = 1 << 16  # bytes of a line; no system has longer ones
MOST_NAME = 300  # characters of a path for people
BAR = 20  # characters
WIDEST = 30  # characters of a class in the line of its image
EIGHTHS = '▏▎▍▌▋▊▉█'


class Prediction(NamedTuple):
    """What a model says of an image, the most probable class first."""
    name: str
    classes: Sequence[int] = ()
    probabilities: Sequence[float] = ()
    reason: str = ''
    """Why the image could not be read, empty if it could."""


def predict(
        subject: Subject,
        samples: Samples,
        top: int = 5,
        temperature: float = 1.,
        batch_size: int = 64,
        workers: int = 0,
        show: bool = True,
) -> Iterator[List[Prediction]]:
    """What a model says of images, batch by batch and in their order; no batch is kept.

    Args:
        subject: The model.
        samples: The images.
        top: Most classes of an image.
        temperature: What the logits are divided by.
        batch_size: Images at a time.
        workers: Processes that read images, 0 for this one.
        show: Whether there is a bar, where standard error is a terminal.

    Raises:
        PSTError: At the end, if not one image could be read; or as `answers`.
    """
    done, read, unread = 0, 0, None
    for outputs in answers(subject, samples, batch_size, workers, 'Predict', show, embeddings=False):
        batch = _in_order(outputs, samples.names, done, top, temperature)
        done += len(batch)
        read += len(outputs.names)
        unread = unread or next((prediction for prediction in batch if prediction.reason), None)
        yield batch
    if not read:
        raise PSTError(
            f'Not one of {done} images could be read, such as {plain(unread.name, MOST_NAME)}: '
            f'{plain(unread.reason, MOST_NAME)}.')


def _in_order(outputs: Outputs, names: Sequence[str], start: int, top: int, temperature: float) -> List[Prediction]:
    """Those that were read and those that were not, as they come among all names."""
    read = (Prediction(name, *found) for name, found in zip(
        outputs.names, most_probable(outputs.logits, top, temperature)))
    unread = [Prediction(name, reason=reason or 'cannot be read') for name, reason in zip(
        outputs.broken, outputs.reasons)]
    batch = []
    for name in names[start:start + len(outputs.names) + len(unread)]:
        batch.append(unread.pop(0) if unread and unread[0].name == name else next(read))
    return batch


def most_probable(logits: np.ndarray, top: int, temperature: float = 1.) -> Iterator[Tuple[List[int], List[float]]]:
    """The most probable classes of each image, and their probabilities; of equal ones, the first comes first.

    Args:
        logits: Logits (N, classes).
        top: Most classes of an image.
        temperature: What the logits are divided by.
    """
    probabilities = (torch.from_numpy(logits).double() / temperature).softmax(dim=1).numpy()
    order = np.argsort(-probabilities, axis=1, kind='stable')[:, :top]
    for row, classes in zip(probabilities, order):
        yield classes.tolist(), row[classes].tolist()


def calibration_note(subject: Subject, temperature: float = 1.) -> str:
    """What the probabilities of a model are, in words.

    Args:
        subject: The model.
        temperature: What its logits are divided by beside what it knows itself.
    """
    own = temperature_of(subject.model)
    if temperature != 1:
        also = f' of a calibrated model (T = {own:.4g})' if own else ''
        return f'probabilities{also} at temperature {temperature:.4g}, as asked for'
    if own:
        return f'calibrated probabilities (T = {own:.4g})'
    source = shlex.quote(plain(subject.source, MOST_NAME))
    return f'probabilities not calibrated (to mend that: pst-timm monitor recalibrate {source} --data-dir ...)'


def listed_paths(file: BinaryIO, source: str) -> Iterator[str]:
    """The paths in a list, one a line, as the system has them; empty lines are left out.

    Args:
        file: The list.
        source: Its name, for messages.

    Raises:
        PSTError: If a line is longer than any path, as in a file that is no list.
    """
    first = True
    while line := file.readline(LONGEST_PATH):
        if len(line) == LONGEST_PATH or b'\0' in line:
            raise PSTError(f'{source} is not a list of images: one path a line was expected.')
        line = line.removeprefix(b'\xef\xbb\xbf') if first else line
        first = False
        path = line.removesuffix(b'\n').removesuffix(b'\r')
        if path:
            yield os.fsdecode(path)


# for people and programs

def heading(format: str, top: int) -> str:
    """What comes before the first prediction.

    Args:
        format: 'table', 'csv' or 'jsonl'.
        top: Classes of an image.
    """
    if format != 'csv':
        return ''
    columns = [name for k in range(1, top + 1) for name in (f'class{k}', f'probability{k}')]
    return _csv_line(['image', *columns, 'error'])


def render(batch: Sequence[Prediction], format: str, class_names: Sequence[str], top: int, bars: str = EIGHTHS) -> str:
    """Predictions as text, lines with their ends.

    The table is for people: whatever a path or class would do to a terminal is left out of it, and so are images that
    could not be read. CSV and JSON lines have all paths as they are.

    Args:
        batch: The predictions.
        format: 'table', 'csv' or 'jsonl'.
        class_names: Names in the order of the outputs.
        top: Classes of an image.
        bars: Characters for one to eight eighths of a place in a bar.
    """
    if format == 'table':
        width = min(max(len(plain(name)) for name in class_names), WIDEST) if top == 1 else 0
        return ''.join(_shown(p, class_names, width, bars) for p in batch if not p.reason)
    line = _json_line if format == 'jsonl' else _csv_row
    return ''.join(line(p, class_names, top) for p in batch)


def _shown(prediction: Prediction, class_names: Sequence[str], width: int, bars: str) -> str:
    name = plain(prediction.name, MOST_NAME)
    rows = [(_percent(p), p, plain(class_names[i])) for i, p in zip(prediction.classes, prediction.probabilities)]
    if width:  # one class, one line
        (percent, _, label), = rows
        return f'{percent}  {plain(label, width):{width}}  {name}\n'
    return f'{name}\n' + ''.join(f'{percent}  {_bar(p, bars):{BAR}}  {label}\n' for percent, p, label in rows) + '\n'


def _percent(share: float) -> str:
    """A probability that is never shown as certain or impossible."""
    return ' > 99.9%' if share > 0.9995 else '  < 0.1%' if share < 0.0005 else f'{share:8.1%}'


def _bar(share: float, bars: str) -> str:
    eighths = round(share * BAR * len(bars))
    whole, rest = divmod(eighths, len(bars))
    return bars[-1] * whole + (bars[rest - 1] if rest else '')


def _json_line(prediction: Prediction, class_names: Sequence[str], top: int) -> str:
    found = [
        {'class': class_names[i], 'index': i, 'probability': round(p, 6)}
        for i, p in zip(prediction.classes, prediction.probabilities)]
    row = {'error': prediction.reason} if prediction.reason else {'predictions': found}
    # letters as escapes: exact in any encoding, and whatever they would do to a terminal
    return json.dumps({'image': prediction.name, **row}) + '\n'


def _csv_row(prediction: Prediction, class_names: Sequence[str], top: int) -> str:
    found = [
        value for i, p in zip(prediction.classes, prediction.probabilities) for value in (class_names[i], f'{p:.6f}')]
    return _csv_line([prediction.name, *found, *[''] * (2 * top - len(found)), prediction.reason])


def _csv_line(cells: Sequence[str]) -> str:
    text = io.StringIO()
    # a lone carriage return, which is in no quotes else, ends a line for those who read
    quoting = csv.QUOTE_ALL if any('\r' in cell for cell in cells) else csv.QUOTE_MINIMAL
    csv.writer(text, lineterminator='\n', quoting=quoting).writerow(cells)
    return text.getvalue()
