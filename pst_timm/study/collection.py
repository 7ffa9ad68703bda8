"""The records of finished cells, brought into the tables of the results."""
from pathlib import Path
from typing import Iterable, List, Sequence, Tuple

from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import write_csv, write_json

from .cell import RECORD, read_record
from .config import Study
from .results import KEYS, Row, read_table

__all__ = ['TABLES', 'check_tables', 'collect', 'merge']

TABLES = tuple(KEYS)


def collect(study: Study, output: Path, results: Path) -> None:
    """Bring the records of the finished cells into the tables of the results; rows of other cells there stay.

    Args:
        study: The study.
        output: Its folder, with a folder for each cell.
        results: Folder of the tables.

    Raises:
        PSTError: If a record is damaged, a table is garbled or cannot be written.
    """
    found = [(c, read_record(output / c.id / RECORD)) for c in study.cells]
    records = [(c, record) for c, record in found if record is not None]
    if not records:
        return
    who = [dict(cell=c.name, model=c.train['model'], seed=c.seed) for c, _ in records]
    rows = merge(results, study, 'cells', [r['cell'] for _, r in records])
    merge(results, study, 'evaluations', [dict(w, **e) for w, (_, r) in zip(who, records) for e in r['evaluations']])
    curves = [dict(cell=w['cell'], seed=w['seed'], **e) for w, (_, r) in zip(who, records) for e in r['curves']]
    merge(results, study, 'curves', curves)
    there = {_cell_of(row) for row in rows}
    write_json(results / 'study.json', dict(
        name=study.name,
        setting=describe(study, rows),
        cells=study.names,
        seeds=study.seeds,
        missing=[c.id for c in study.cells if (c.name, c.seed) not in there],
        questions=study.questions,
    ))


def check_tables(results: Path, study: Study) -> None:
    """Make sure, before the first cell, that the tables of the results can be added to.

    Raises:
        PSTError: If one is garbled, or holds what another study, or this one in an earlier form, has found.
    """
    for table in TABLES:
        _read(results, table)
    trained = {cell.name: cell for cell in study.cells}
    for row in _read(results, 'cells'):
        cell = trained.get(row['cell'])
        if cell is None or not cell.was_trained_with(row):
            how = 'is no cell of this study' if cell is None else 'was trained with other settings or weights'
            raise PSTError(
                f'{results / "cells.csv"} holds results of {row["cell"]!r}, which {how}, and they would be lost: '
                f'choose another --results, give the study another name, or remove that folder.')


def merge(results: Path, study: Study, table: str, rows: Iterable[Row]) -> List[Row]:
    """Write rows into a table of the results, in place of those of the same cells, in the order of the study.

    Returns:
        All rows of the table.
    """
    results.mkdir(parents=True, exist_ok=True)
    rows = list(rows)
    new = {_cell_of(row) for row in rows}
    old = [row for row in _read(results, table) if _cell_of(row) not in new]
    order = study.names
    merged = [row for row in old if row['cell'] in order] + rows
    merged.sort(key=lambda row: (order.index(row['cell']), _cell_of(row)))
    write_csv(results / f'{table}.csv', merged)
    return merged


def _read(results: Path, table: str) -> List[Row]:
    """Rows of a table as text, but for the columns that tell whose they are; none if it is not there."""
    path = results / f'{table}.csv'
    if not path.is_file():
        return []
    try:
        return read_table(path, KEYS[table])
    except PSTError as e:
        raise PSTError(
            f'{path} is garbled: restore it, or remove it to make it anew from the cells in --output. {e}') from None


def _cell_of(row: Row) -> Tuple[str, int]:
    # the table of latencies has no seeds
    return row['cell'], int(row.get('seed', 0))


def describe(study: Study, rows: Sequence[Row]) -> str:
    """One sentence on what was run and on what.

    Args:
        study: The study.
        rows: Rows of its table of cells.
    """
    def some(key: str, joint: str = '; ') -> str:
        return joint.join(dict.fromkeys(str(row[key]) for row in rows))

    def images(key: str) -> str:
        numbers = dict.fromkeys(int(row[key]) for row in rows if int(row['classes']) == classes)
        return ' or '.join(f'{number:,}' for number in numbers)

    classes = int(rows[0]['classes'])  # as text where it comes from the table
    seeds = sorted({int(row['seed']) for row in rows})
    return (
        f'{study.title}: {images("train_images")} training and {images("val_images")} validation images of '
        f'{classes} classes, {some("img_size", " or ")} px, {some("epochs", " or ")} epochs, '
        f'seeds {", ".join(map(str, seeds))}; '
        f'{some("precision")}, {some("hardware")}, torch {some("torch")}, timm {some("timm")}')
