"""The files of a study under `results/study/NAME/`, read and checked."""
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Tuple

from pst_timm.metrics.answers import unpack_answers
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import read_csv

__all__ = ['KEYS', 'Attention', 'Row', 'StudyData', 'load_study', 'read_table']

Row = Dict[str, Any]
COARSE_STRIDE = 32
"""Image pixels per token of the coarse map, each way."""


class Kind(NamedTuple):
    """What a column holds."""
    what: str
    parse: Callable[[str], Any]


def _percent(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 100:
        raise ValueError
    return value


def _name(text: str) -> str:
    if not text:
        raise ValueError
    return text


def _or_none(kind: Kind) -> Kind:
    return Kind(f'{kind.what} or nothing', lambda text: kind.parse(text) if text else None)


NAME = Kind('a name', _name)
TEXT = Kind('text', str)
WHOLE = Kind('a whole number', int)
NUMBER = Kind('a number', float)
PERCENT = Kind('a percentage from 0 to 100', _percent)
HEX = Kind('hexadecimal digits', lambda text: re.fullmatch('[0-9a-fA-F]+', text)[0])

# by table, the columns that tell whose row it is
KEYS = {
    'cells': dict(cell=NAME, seed=WHOLE), 'evaluations': dict(cell=NAME, seed=WHOLE),
    'curves': dict(cell=NAME, seed=WHOLE), 'latency': dict(cell=NAME)}
CELLS = dict(
    cell=NAME, model=NAME, model_kwargs=TEXT, seed=WHOLE, img_size=WHOLE, classes=WHOLE, top1=PERCENT, loss=NUMBER,
    ece=NUMBER, params=WHOLE, gmacs=NUMBER, train_seconds=_or_none(NUMBER), images_per_second=_or_none(NUMBER))
EVALUATIONS = dict(
    cell=NAME, seed=WHOLE, evaluation=NAME, img_size=_or_none(WHOLE), topk=_or_none(WHOLE), fine_fusion=TEXT,
    images=WHOLE, top1=PERCENT, loss=NUMBER, ece=NUMBER, answers=HEX)
CURVES = dict(cell=NAME, seed=WHOLE, epoch=WHOLE, train_loss=NUMBER, eval_top1=_or_none(PERCENT))
LATENCY = dict(
    cell=NAME, batch_size=WHOLE, img_size=WHOLE, latency_ms=NUMBER, ratio=NUMBER, train_batch_size=WHOLE,
    train_ms=NUMBER, train_ratio=NUMBER)


def read_table(path: Path, columns: Mapping[str, Kind]) -> List[Row]:
    """Rows of a CSV file, with the named columns parsed and the others as text.

    Raises:
        PSTError: If the file is missing, empty or garbled; the message names the column and says what was expected.
    """
    rows = read_csv(path)
    absent = [c for c in columns if rows and c not in rows[0]]
    if absent:
        raise PSTError(f'{path} has no column {absent[0]!r}; it has {", ".join(rows[0])}.')
    return [_parse(row, columns, f'{path}, line {line}') for line, row in enumerate(rows, 2)]


def _parse(row: Row, columns: Mapping[str, Kind], where: str) -> Row:
    parsed = dict(row)
    for column, kind in columns.items():
        try:
            parsed[column] = kind.parse(row[column])
        except (TypeError, ValueError):
            raise PSTError(f'{where}, column {column!r}: expected {kind.what}, got {row[column][:40]!r}.') from None
    return parsed


class Attention(NamedTuple):
    """An image size and the attention used at it; orders as tables do."""
    img_size: int
    fusion: str
    """'coarse' alone, or fine attention with 'gate' or 'joint'."""
    k: int
    """Selected tokens, at most all there are; 0 for coarse."""

    @property
    def k_label(self) -> str:
        return 'all' if self.k >= coarse_tokens(self.img_size) else str(self.k)

    def __str__(self) -> str:
        return 'coarse' if self.fusion == 'coarse' else f'{self.fusion}, k = {self.k_label}'


def coarse_tokens(img_size: int) -> int:
    """Tokens of the coarse map of a square image."""
    return math.ceil(img_size / COARSE_STRIDE) ** 2


@dataclass(frozen=True)
class StudyData:
    """What was measured. `setting` says how, `cells` names the trained models in order."""
    name: str
    setting: str
    questions: Dict[str, Row]
    cells: List[str]
    missing: List[str]
    runs: List[Row]
    evaluations: List[Row]
    curves: List[Row]
    latency: Dict[str, Row]

    def runs_of(self, cell: str) -> List[Row]:
        """Rows of cells.csv, a row per seed."""
        return [row for row in self.runs if row['cell'] == cell]

    def evaluated(self, cell: str, evaluation: str) -> Dict[int, Row]:
        """Rows of evaluations.csv by seed, for an evaluation that has a single setting ('final', 'probe')."""
        return {row['seed']: row for row in self.evaluations if (row['cell'], row['evaluation']) == (cell, evaluation)}

    def sweep(self, cell: str) -> Dict[Attention, Dict[int, Row]]:
        """Rows of the sweep by attention and seed, in order: by image size, coarse first, k upwards.

        Every k that selects all tokens is the same attention, and is there once.
        """
        found: Dict[Attention, Dict[int, Row]] = {}
        for row in self.evaluations:
            if (row['cell'], row['evaluation']) == (cell, 'sweep'):
                k = min(row['topk'] or 0, coarse_tokens(row['img_size']))
                found.setdefault(Attention(row['img_size'], row['fine_fusion'], k), {})[row['seed']] = row
        # 'coarse' < 'gate' < 'joint'
        return dict(sorted(found.items()))


def load_study(folder: Path) -> StudyData:
    """Read a study.

    Args:
        folder: Folder with study.json, cells.csv and evaluations.csv; curves.csv and latency.csv may come later.

    Raises:
        PSTError: If a file is missing or does not hold what it should.
    """
    head = _read_head(folder / 'study.json')
    runs = read_table(folder / 'cells.csv', CELLS)
    _check_unique(runs, ('cell', 'seed'), folder / 'cells.csv')
    evaluations = read_table(folder / 'evaluations.csv', EVALUATIONS)
    _check_evaluations(evaluations, folder / 'evaluations.csv')
    curves, latency = (
        read_table(folder / name, columns) if (folder / name).exists() else []
        for name, columns in (('curves.csv', CURVES), ('latency.csv', LATENCY)))
    _check_unique(curves, ('cell', 'seed', 'epoch'), folder / 'curves.csv')
    _check_unique(latency, ('cell',), folder / 'latency.csv')
    return StudyData(
        name=folder.name,
        setting=head['setting'],
        questions=head['questions'],
        cells=head['cells'],
        missing=head['missing'],
        runs=runs,
        evaluations=evaluations,
        curves=curves,
        latency={row['cell']: row for row in latency},
    )


def _read_head(path: Path) -> Row:
    try:
        head = json.loads(path.read_text(encoding='utf-8'))
    except OSError as e:
        raise PSTError(f'{path} cannot be read ({e.strerror}).') from None
    except ValueError as e:
        raise PSTError(f'{path} is not a JSON file ({e}).') from None
    for key, kind in (('setting', str), ('questions', dict), ('cells', list), ('missing', list)):
        if not isinstance(head, dict) or not isinstance(head.get(key), kind):
            raise PSTError(f'{path} needs {key!r}, a {kind.__name__}.')
    return head


def _check_unique(rows: List[Row], keys: Tuple[str, ...], path: Path) -> None:
    seen = set()
    for row in rows:
        key = tuple(row[k] for k in keys)
        if key in seen:
            raise PSTError(f'{path} has two rows for {", ".join(f"{k} {row[k]}" for k in keys)}; keep one.')
        seen.add(key)


def _unpack_evaluation(row: Row, path: Path) -> None:
    """Unpack the answers, and hold them against the accuracy."""
    where = f'{path}, cell {row["cell"]}, seed {row["seed"]}, evaluation {row["evaluation"]!r}'
    if row['evaluation'] == 'sweep' and not (
            row['img_size'] and row['fine_fusion'] in ('coarse', 'gate', 'joint')
            and bool(row['topk']) == (row['fine_fusion'] != 'coarse')):
        raise PSTError(
            f"{where}: a sweep needs 'img_size', and 'topk' with the 'fine_fusion' gate or joint, or coarse without; "
            f'got {row["img_size"]}, {row["topk"]} and {row["fine_fusion"]!r}.')
    try:
        row['right'] = unpack_answers(row['answers'], row['images'])
    except ValueError as e:
        raise PSTError(f"{where}, column 'answers': {e}.") from None
    # ties between the highest logits, frequent in half precision, may count either way
    top1 = 100 * row['right'].mean()
    if abs(top1 - row['top1']) > 0.5:
        raise PSTError(f"{where}: 'answers' are {top1:.2f}% right, but 'top1' is {row['top1']:.2f}.")


def _check_evaluations(rows: List[Row], path: Path) -> None:
    once = ('cell', 'seed', 'evaluation')
    _check_unique([r for r in rows if r['evaluation'] == 'sweep'], (*once, 'img_size', 'topk', 'fine_fusion'), path)
    _check_unique([r for r in rows if r['evaluation'] != 'sweep'], once, path)
    for row in rows:
        _unpack_evaluation(row, path)
