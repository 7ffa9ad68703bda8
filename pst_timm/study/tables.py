"""The tables of a study as Markdown: setting, models, and an answer to each question."""
import re
from functools import partial
from typing import Callable, Dict, Iterable, List, Mapping, Optional, Sequence

from pst_timm.metrics.intervals import Difference, Interval, mean_and_sd, paired_difference
from pst_timm.utils.errors import PSTError
from pst_timm.utils.markdown import prose
from pst_timm.utils.tables import markdown_table

from .draws import ALL
from .results import Attention, Row, StudyData

__all__ = ['BLOCKS', 'study_block']

Rows = Mapping[int, Row]
NONE = '-'
VERSIONS = ('python', 'torch', 'torchvision', 'timm', 'pst_timm')


def study_block(study: StudyData, name: str) -> Optional[str]:
    """The Markdown of a block of a study, or None where its data is not there yet.

    Args:
        study: The study.
        name: One of `BLOCKS`.
    """
    if name == 'setting':
        return setting_block(study)
    if not study.runs:
        return None
    if name == 'models':
        return models_block(study)
    return question_block(study, name.removeprefix('question'))


def setting_block(study: StudyData) -> str:
    """What was run, with what, on what, when, and what is still missing."""
    def several(column: str) -> str:
        return ' and '.join(dict.fromkeys(prose(row.get(column) or 'unknown') for row in study.runs))

    lines = [study.setting.rstrip('.') + '.']
    if study.runs:
        days = sorted({row.get('date', '')[:10] for row in study.runs})
        facts = [
            ' to '.join(dict.fromkeys((days[0], days[-1]))),
            f'{several("hardware")}',
            f'cells side by side: {several("jobs")}',
            f'threads of each: {several("threads")}',
            *(f'{name} {several(name)}' for name in VERSIONS)]
        # the sentence may have said some of it
        lines.append(f'Trained {", ".join(f for f in facts if f not in study.setting)}.')
    if study.missing:
        lines.append(f'Not run yet: {", ".join(study.missing)}.')
    return '\n'.join(lines)


def models_block(study: StudyData) -> str:
    """A row for each cell: size, accuracy, cost; means and standard deviations over the seeds.

    Of cells that differ in the number of training images alone, that with the last number.
    """
    last = {f'-{question["shots"][-1]}' for question in study.questions.values() if question.get('shots')}
    cells = [cell for cell in study.cells if cell.endswith(tuple(last or {''}))]
    first = next((cell for cell in cells if cell in study.latency), cells[0])
    rows = [_model_row(study, cell, first) for cell in cells]
    # of interest where the cells differ in it
    if len({row['classes'] for row in study.runs}) == 1:
        for row in rows:
            del row['classes']
    return markdown_table(rows)


def _model_row(study: StudyData, cell: str, first: str) -> Row:
    runs = study.runs_of(cell)
    latency = study.latency.get(cell)

    def column(key: str, decimals: int, unit: float = 1.) -> str:
        values = [row[key] for row in runs]
        return spread([v / unit for v in values], decimals) if values and None not in values else NONE

    return {
        'model': f'`{cell}`',
        'classes': str(runs[0]['classes']) if runs else NONE,
        'seeds': str(len(runs)),
        'parameters (M)': f'{runs[0]["params"] / 1e6:.2f}' if runs else NONE,
        'GMACs': f'{runs[0]["gmacs"]:.3f}' if runs else NONE,
        'top-1 (%)': column('top1', 2),
        'loss': column('loss', 3),
        'ECE': column('ece', 3),
        'training (min)': column('train_seconds', 1, 60.),
        f'training step, times `{first}`': f'{latency["train_ratio"]:.3f}' if latency else NONE,
        f'latency, times `{first}`': f'{latency["ratio"]:.3f}' if latency else NONE,
    }


def question_block(study: StudyData, number: str) -> Optional[str]:
    """Tables and sentences that answer a question; None where its data is not there yet.

    Raises:
        PSTError: If study.json asks in a way that this report does not know.
    """
    if number not in study.questions:
        return 'Not part of this study.'
    question = study.questions[number]
    where = f'Question {number} in study.json of {study.name}'
    try:
        answer = QUESTIONS[question['kind']]
        cells = [question['of'], *question['against']] if 'of' in question else question['cells']
    except (KeyError, TypeError) as e:
        raise PSTError(
            f"{where} needs 'kind' ({', '.join(QUESTIONS)}), and 'of' with 'against', or 'cells'; "
            f'{e} is not right.') from None
    parts = []
    for shots in question.get('shots') or [None]:
        run = cells if shots is None else [f'{cell}-{shots}' for cell in cells]
        unknown = [cell for cell in run if cell not in study.cells]
        if unknown:
            raise PSTError(f'{where} is about {unknown[0]!r}; the cells are {", ".join(study.cells)}.')
        found = answer(study, run)
        if found and shots is not None:
            each = 'All images' if shots == ALL else f'{shots} images'
            found = [f'**{each} of each class**', *found]
        parts += found
    return '\n\n'.join([f'**`{study.name}` protocol**', *parts]) if parts else None


def _compare(study: StudyData, cells: Sequence[str], evaluation: str) -> List[str]:
    """The first cell against the others, on the evaluation they all have."""
    of, *against = cells
    own = study.evaluated(of, evaluation)
    table = [dict(_metrics(own, of), pairs=NONE, **_difference_columns(None, None))]
    sentences = []
    for cell in against:
        rows = study.evaluated(cell, evaluation)
        top1 = difference(own, rows)
        table.append(dict(
            _metrics(rows, cell), pairs=str(top1.pairs if top1 else 0),
            **_difference_columns(top1, difference(own, rows, 'loss'))))
        if top1:
            sentences.append(f'`{of}` minus `{cell}`: {in_words(top1, own)}.')
    if not sentences:
        return []
    return [f'Differences are those of `{of}` to the model of the row.', markdown_table(table), '\n'.join(sentences)]


def _sweep(study: StudyData, cells: Sequence[str]) -> List[str]:
    """Fine attention of every amount against coarse attention, on the same weights."""
    parts = []
    for cell in cells:
        sweep = study.sweep(cell)
        table, found = [], {}
        for attention, rows in sweep.items():
            coarse = sweep.get(Attention(attention.img_size, 'coarse', 0), {})
            to_coarse = None if attention.fusion == 'coarse' else difference(rows, coarse)
            if to_coarse:
                found[attention] = to_coarse
            table.append({
                **_attention_columns(attention),
                **_metrics(rows),
                **_difference_columns(to_coarse, to_coarse and difference(rows, coarse, 'loss')),
                'difference in ECE': with_interval(to_coarse and difference(rows, coarse, 'ece'), 3),
            })
        if found:
            parts += [f'`{cell}`, differences to coarse attention:', markdown_table(table),
                      _sweep_sentence(study, cell, found)]
    return parts


def _sweep_sentence(study: StudyData, cell: str, found: Mapping[Attention, Difference]) -> str:
    size = main_size(study, cell, found)
    here = {a: d for a, d in found.items() if a.img_size == size}
    clear = [d for d in here.values() if d.is_clear]
    best = max(here, key=lambda a: here[a].mean)
    return (
        f'Of {len(here)} settings of fine attention at {size} px, {sum(d.mean > 0 for d in clear)} are better than '
        f'coarse attention and {sum(d.mean < 0 for d in clear)} worse, with both intervals away from zero. '
        f'The best of them, chosen after the fact, is {best}: {in_words(here[best], study.sweep(cell)[best])}.')


def _train_fine(study: StudyData, cells: Sequence[str]) -> List[str]:
    """The sweeps of several cells beside that of the first one."""
    first, *others = cells
    base = study.sweep(first)
    parts = []
    for cell in others:
        sweep, table = study.sweep(cell), []
        for attention in (a for a in sweep if difference(sweep[a], base.get(a, {}))):
            rows, beside = sweep[attention], base[attention]
            coarse = base.get(Attention(attention.img_size, 'coarse', 0), {})
            table.append({
                **_attention_columns(attention),
                'pairs': str(len(rows.keys() & beside.keys())),
                f'top-1 (%), `{first}`': metric(beside, 'top1', 2),
                f'top-1 (%), `{cell}`': metric(rows, 'top1', 2),
                **_difference_columns(difference(rows, beside), difference(rows, beside, 'loss')),
                f'difference in top-1 to `{first}`, coarse': with_interval(difference(rows, coarse), 2),
            })
        if table:
            parts += [
                f'`{cell}` minus `{first}`, both evaluated with the attention of the row:', markdown_table(table),
                *_train_fine_sentence(study, first, cell)]
    return parts


def _train_fine_sentence(study: StudyData, first: str, cell: str) -> List[str]:
    """Trained through the fine branch, evaluated coarse and as trained, against coarse from end to end."""
    base, sweep = study.sweep(first), study.sweep(cell)
    coarse = Attention(main_size(study, cell, sweep), 'coarse', 0)
    parts = []
    for attention in (coarse, trained_attention(study, cell, sweep)):
        found = difference(sweep.get(attention, {}), base.get(coarse, {}))
        if found:
            parts.append(
                f'`{cell}` evaluated with {attention} attention minus `{first}` evaluated with coarse attention: '
                f'{in_words(found, sweep[attention])}')
    return [f'At {coarse.img_size} px, {"; ".join(parts)}.'] if parts else []


def main_size(study: StudyData, cell: str, sweep: Iterable[Attention]) -> int:
    """The image size that a cell was trained at, or the smallest it was evaluated at."""
    trained = {row['img_size'] for row in study.runs_of(cell)}
    return min({a.img_size for a in sweep}, key=lambda size: (size not in trained, size))


def trained_attention(study: StudyData, cell: str, sweep: Iterable[Attention]) -> Optional[Attention]:
    """The fine attention that a cell was trained with, as its model_kwargs say; of those evaluated, the nearest k."""
    size = main_size(study, cell, sweep)
    kwargs = dict(re.findall(r'(\w+)=(\S+)', ''.join(run['model_kwargs'] for run in study.runs_of(cell)[:1])))
    k, fusion = int(kwargs.get('train_topk', 0)), kwargs.get('fine_fusion', 'gate')
    fine = [a for a in sweep if (a.img_size, a.fusion) == (size, fusion)]
    return min(fine, key=lambda a: abs(a.k - k), default=None) if k else None


def difference(rows: Rows, others: Rows, key: str = 'top1') -> Optional[Difference]:
    """Difference of a metric between rows by seed; with an interval over images for top-1."""
    for seed in rows.keys() & others.keys():
        if rows[seed]['images'] != others[seed]['images']:
            a, b = (f'{r[seed]["cell"]} {r[seed]["images"]} images' for r in (rows, others))
            raise PSTError(f'Results on different images cannot be compared: {a}, {b}, seed {seed}.')
    values = ({seed: row[key] for seed, row in r.items()} for r in (rows, others))
    right = ({seed: row['right'] for seed, row in r.items()} for r in (rows, others)) if key == 'top1' else ()
    return paired_difference(*values, *right)


def _attention_columns(attention: Attention) -> Row:
    return {'px': str(attention.img_size), 'attention': str(attention)}


def _metrics(rows: Rows, cell: str = '') -> Row:
    return {
        **({'model': f'`{cell}`'} if cell else {}),
        'seeds': str(len(rows)),
        'top-1 (%)': metric(rows, 'top1', 2),
        'loss': metric(rows, 'loss', 3),
        'ECE': metric(rows, 'ece', 3),
    }


def _difference_columns(top1: Optional[Difference], loss: Optional[Difference]) -> Row:
    cells = (NONE,) * 3
    if top1:
        mean = signed(top1.mean, 2)
        cells = (
            f'**{mean}**' if top1.is_clear else mean,
            bounds(top1.seeds, 2) if top1.seeds else 'one seed',
            bounds(top1.images, 2) if top1.images else NONE,
        )
    names = ('difference in top-1', '95% over seeds', '95% over images')
    return {**dict(zip(names, cells)), 'difference in loss': with_interval(loss, 3)}


def metric(rows: Rows, key: str, decimals: int) -> str:
    """Mean and standard deviation of a metric over the seeds."""
    return spread([row[key] for row in rows.values()], decimals) if rows else NONE


def spread(values: Sequence[float], decimals: int) -> str:
    """'61.20 ± 0.31': mean and standard deviation, or the one value there is."""
    mean, sd = mean_and_sd(values)
    return f'{mean:.{decimals}f}' + (f' ± {sd:.{decimals}f}' if sd is not None else '')


def signed(value: float, decimals: int) -> str:
    """A number with its sign; never a negative zero."""
    return f'{round(value, decimals) + 0.:+.{decimals}f}'


def bounds(interval: Interval, decimals: int) -> str:
    """'[-0.10, +1.20]'."""
    return f'[{signed(interval.low, decimals)}, {signed(interval.high, decimals)}]'


def with_interval(found: Optional[Difference], decimals: int) -> str:
    """A difference and its interval over seeds."""
    if not found:
        return NONE
    return signed(found.mean, decimals) + (f' {bounds(found.seeds, decimals)}' if found.seeds else '')


def in_words(found: Difference, rows: Rows) -> str:
    """A difference in top-1 in words, with what it rests on."""
    over_seeds = f'{found.pairs} seeds {bounds(found.seeds, 2)}' if found.seeds else 'seeds unknown, as there is one'
    parts = [f'95% over {over_seeds}']
    if found.images:
        images = next(iter(rows.values()))['images']
        parts.append(f'over {images:,} images {bounds(found.images, 2)}')
    return f'{signed(found.mean, 2)} points of top-1 ({"; ".join(parts)})'


QUESTIONS: Dict[str, Callable[[StudyData, Sequence[str]], List[str]]] = dict(
    compare=partial(_compare, evaluation='final'),
    probe=partial(_compare, evaluation='probe'),
    sweep=_sweep,
    train_fine=_train_fine,
)
BLOCKS = ('setting', 'models', *(f'question{i}' for i in range(1, 9)))
