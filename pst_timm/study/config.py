"""The YAML file of a study: which cells there are, and what each of them is to do."""
import hashlib
import json
import re
from argparse import Namespace
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from reprlib import repr
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import timm
from timm.models import is_model_pretrained

from pst_timm.checkpoints import create_model
from pst_timm.engine import train_args
from pst_timm.engine.factories import import_modules
from pst_timm.engine.flags import keys_with_role
from pst_timm.engine.protocols import Adjustable
from pst_timm.utils.configs import read_config
from pst_timm.utils.errors import PSTError, did_you_mean

from .draws import ALL, Draw
from .tables import QUESTIONS

__all__ = ['Cell', 'Study', 'choose_classes', 'read_study']

# what decides the result of a cell; where it runs and what it writes may differ between two runs of it
DECISIVE = frozenset(keys_with_role('model', 'preprocessing', 'recipe', 'data'))
STUDY_KEYS = {
    'name': str, 'title': str, 'seeds': list, 'classes': (list, dict), 'train': dict, 'cells': dict, 'sweep': dict,
    'probe': dict, 'questions': dict, 'shots': dict}
REQUIRED = ('name', 'title', 'seeds', 'train', 'cells')
LONGEST = 100  # letters of a name
MOST_CELLS = 10_000
LARGEST = 100_000  # k or image size of a sweep


@dataclass(frozen=True)
class Cell:
    """What one cell of the grid is to do."""
    name: str
    seed: int
    train: Dict[str, Any]
    """Flags of the training engine, as the file has them."""
    classes: List[str]
    sweep: Dict[str, List[int]] = field(default_factory=dict)
    """`topk` and `img_size` of the fine-attention sweep, empty for none."""
    probe: List[str] = field(default_factory=list)
    """Held-out classes of the linear probe, empty for none."""
    draw: Optional[Draw] = None
    """Which images it trains on, None for the training split as it is."""
    start: str = ''
    """Checksum of the weights it begins with, empty for random ones."""

    @property
    def id(self) -> str:
        return f'{self.name}-seed{self.seed}'

    @property
    def epochs(self) -> int:
        return train_args(**self.train).epochs

    @property
    def settings(self) -> Dict[str, Any]:
        """Everything that decides the result, to tell a finished cell from one of an earlier configuration."""
        return dict(
            train=_decisive(self.train), seed=self.seed, classes=self.classes, sweep=self.sweep, probe=self.probe,
            **(dict(draw=asdict(self.draw)) if self.draw else {}), **(dict(start=self.start) if self.start else {}))

    def was_run_with(self, settings: Mapping[str, Any]) -> bool:
        """Whether settings on record are those of this cell."""
        return {**settings, 'train': _decisive(settings.get('train', {}))} == self.settings

    def was_trained_with(self, row: Mapping[str, str]) -> bool:
        """Whether flags and start of a training, in a row of the results, are those of this cell; yes if not known."""
        flags = row.get('settings')
        same = not flags or _decisive(json.loads(flags)) == _decisive(self.train)
        return same and row.get('start', self.start) == self.start

    def given(self, data_dir: str = '', output: Path = Path(), device: str = '') -> Dict[str, Any]:
        """The flags that the study gives to a cell itself.

        Args:
            data_dir: Image folder with the splits.
            output: Folder of the study.
            device: Device, the best present if empty.
        """
        return dict(
            seed=self.seed,
            data_dir=data_dir,
            class_map=str(output / self.id / 'classes.txt'),
            num_classes=len(self.classes),
            output=str(output),
            experiment=self.id,
            resume='auto',
            device=device or None,
        )


def _decisive(flags: Mapping[str, Any]) -> Dict[str, Any]:
    return {k: v for k, v in flags.items() if k in DECISIVE}


@dataclass(frozen=True)
class Study:
    """A grid, as its YAML file describes it."""
    name: str
    title: str
    """What is run, in one sentence without numbers of the result."""
    cells: List[Cell]
    """All seeds of the first model, of the second, and so on."""
    questions: Dict[str, Dict[str, Any]]
    """What the report asks of the results."""

    @property
    def names(self) -> List[str]:
        return list(dict.fromkeys(c.name for c in self.cells))

    @property
    def seeds(self) -> List[int]:
        return sorted({c.seed for c in self.cells})


def read_study(path: str, data_dir: str) -> Study:
    """Read and check the configuration of a study.

    Args:
        path: YAML file with
            name, title: of the study;
            seeds: list of seeds;
            classes: folder names, or {first: i, step: n} for every n-th of the sorted names, or {except: one of
                these}; all if left out;
            train: flags of the training engine for all cells;
            cells: by name, the flags in which a cell differs, and its own `classes`;
            sweep: {cells, topk, img_size} of the evaluation with fine attention;
            probe: {cells, classes} of the linear probe on held-out classes;
            shots: by number of training images of each class, or all, the flags that differ for it: every cell is run
                with each, as CELL-NUMBER, and is tested on all images that no seed draws (with all, on the validation
                split);
            questions: what the report asks, by number: {title, kind, ...}.
        data_dir: Image folder, for the names of the classes.

    Raises:
        PSTError: If the file cannot be read, or names an unknown key, cell, class, flag or model.
    """
    values = read_config(path)
    _check_keys(path, values)
    _check_train(path, values['train'])
    split = Path(data_dir) / train_args(**values['train']).train_split
    if not split.is_dir():
        raise PSTError(f'There is no {split}: --data-dir must name the folder with the images of the study.')
    folders = sorted(p.name for p in split.iterdir() if p.is_dir())
    classes = choose_classes(values.get('classes'), folders)
    sweep, probe = values.get('sweep', {}), values.get('probe', {})
    probe_classes = choose_classes(probe.get('classes'), folders) if probe else []
    for part, names in (('sweep', sweep.get('cells', [])), ('probe', probe.get('cells', []))):
        for name in names:
            if name not in values['cells']:
                raise PSTError(f'{path}: {part} names an unknown cell {name!r}.{did_you_mean(name, values["cells"])}')
    cells = []
    for name, own in values['cells'].items():
        own = dict(own)
        own_classes = choose_classes(own.pop('classes'), folders) if 'classes' in own else classes
        if name in probe.get('cells', []) and (seen := set(own_classes) & set(probe_classes)):
            raise PSTError(f'{path}: the probe of {name} needs classes it was not trained on; it saw {min(seen)}.')
        for suffix, of_shots, draws in _draws(values):
            flags = {**values['train'], **own, **of_shots}
            try:
                args = train_args(**flags)
            except PSTError as e:
                raise PSTError(f'{path}, cell {name}{suffix}: {e}') from None
            if not args.val_split:
                raise PSTError(f'{path}, cell {name}: a study needs images to evaluate on, and val_split is empty.')
            cells += [
                Cell(
                    name=name + suffix,
                    seed=seed,
                    train=flags,
                    classes=own_classes,
                    sweep={k: sweep[k] for k in ('topk', 'img_size')} if name in sweep.get('cells', []) else {},
                    probe=probe_classes if name in probe.get('cells', []) else [],
                    draw=draw,
                    start=_start_of(args),
                )
                for seed, draw in zip(values['seeds'], draws)]
    _check_given(path, values, cells)
    _check_models(path, cells)
    _raise(path, [*_wrong_questions(values)])
    questions = values.get('questions', {})
    if values.get('shots'):  # the report has no other way to know
        questions = {number: dict(question, shots=[*values['shots']]) for number, question in questions.items()}
    return Study(values['name'], values['title'], cells, questions)


def _draws(values: Dict[str, Any]) -> List[Tuple[str, Dict[str, Any], List[Optional[Draw]]]]:
    """What each of `shots` adds to the name of a cell and to its flags, and the draw of each seed."""
    shots, turns = values.get('shots'), len(values['seeds'])
    if not shots:
        return [('', {}, [None] * turns)]
    most = max((n for n in shots if n != ALL), default=0)
    return [
        (f'-{n}', flags, [Draw(None if n == ALL else n, turn, most, turns) for turn in range(turns)])
        for n, flags in shots.items()]


def _start_of(args: Namespace) -> str:
    """Checksum of the weights that a cell begins with; one that goes on with others is another cell."""
    for path in filter(None, (args.initial_checkpoint, args.trunk_checkpoint, args.pretrained_path)):
        return _file_digest(path, Path(path).stat().st_mtime_ns) if Path(path).is_file() else path
    import_modules(args.device_modules)
    cfg = timm.get_pretrained_cfg(args.model) if args.pretrained and is_model_pretrained(args.model) else None
    return ' '.join(filter(None, (cfg.tag, *(cfg.notes or ())))) if cfg else ''


@lru_cache(maxsize=None)
def _file_digest(path: str, changed: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _check_train(path: str, flags: Dict[str, Any]) -> None:
    try:
        train_args(**flags)
    except PSTError as e:
        raise PSTError(f'{path}, train: {e}') from None


def _check_keys(path: str, values: Dict[str, Any]) -> None:
    problems = [f'unknown key {k!r}.{did_you_mean(str(k), STUDY_KEYS)}' for k in values if k not in STUDY_KEYS]
    problems += [f'{k} is missing' for k in REQUIRED if not values.get(k)]
    problems += [
        f'{k} must be a {getattr(t, "__name__", "list or dict")}, got {repr(values[k])}'
        for k, t in STUDY_KEYS.items() if k in values and not isinstance(values[k], t)]
    # the parts can be looked into once they are what they should be
    problems = problems or [*_wrong_cells(values), *_wrong_lists(values)]
    _raise(path, problems)


def _raise(path: str, problems: Sequence[str]) -> None:
    if problems:
        raise PSTError('\n'.join(f'{path}: {p}' for p in problems))


def _wrong_cells(values: Dict[str, Any]) -> Iterable[str]:
    if '\n' in values['title'].strip():
        yield f'title must be one line of text, got {repr(values["title"])}'
    names: Dict[str, str] = {}
    for name in (values['name'], *values['cells']):
        if not isinstance(name, str) or not re.fullmatch(r'\w[\w.-]*', name):
            yield f'{name!r} is no name for a folder: use letters, digits, "_", "." and "-"'
        elif len(name) > LONGEST:
            yield f'{name[:20]}... has {len(name)} letters, and a folder gets at most {LONGEST}'
    for name in map(str, values['cells']):
        if name.lower() in names:
            yield f'cells {names[name.lower()]} and {name} are one folder where upper and lower case do not count'
        names[name.lower()] = name
    for name, own in values['cells'].items():
        if not isinstance(own, dict) or not {**values['train'], **own}.get('model'):
            yield f'cell {name!r} needs a mapping with its model'
    for where, flags in (('train', values['train']), *((f'cell {k!r}', v) for k, v in values['cells'].items())):
        for key in flags if isinstance(flags, dict) else ():
            if not isinstance(key, str):
                yield f'{where}: {key!r} is no flag'
    count = len(values['cells']) * len(values['seeds']) * max(1, len(values.get('shots', {})))
    if count > MOST_CELLS:
        yield (
            f'{len(values["cells"])} cells with {len(values["seeds"])} seeds are {count:,} runs, more than '
            f'{MOST_CELLS:,}')


def _wrong_lists(values: Dict[str, Any]) -> Iterable[str]:
    if not _whole_numbers(values['seeds'], 0) or len(set(values['seeds'])) < len(values['seeds']):
        yield f'seeds must be different whole numbers, got {repr(values["seeds"])}'
    shots = values.get('shots', {})
    if not _whole_numbers([n for n in shots if n != ALL], 1):
        yield f"shots must be whole numbers above 0, or 'all', got {repr([*shots])}"
    for number, flags in shots.items():
        if not isinstance(flags, dict):
            yield f'shots {number}: expected a mapping of the flags that differ, {{}} for none, got {repr(flags)}'
    if shots and values.get('probe'):
        yield 'a study with shots has no probe: the images it leaves out are tested on'
    for part, keys in (('sweep', {'cells', 'topk', 'img_size'}), ('probe', {'cells', 'classes'})):
        found = values.get(part)
        if found and set(found) != keys:
            yield f'{part} needs {", ".join(sorted(keys))}, got {", ".join(map(str, found))}'
        elif found and not (isinstance(found['cells'], list) and all(isinstance(c, str) for c in found['cells'])):
            yield f'{part}: cells must be a list of names, got {repr(found["cells"])}'
        elif found and not found['cells']:
            yield f'{part}: cells are none: name some, or leave {part} out'
        elif found and part == 'sweep':
            for key, least in (('topk', 0), ('img_size', 1)):
                if not found[key] or not _whole_numbers(found[key], least):
                    yield f'sweep: {key} must be a list of whole numbers from {least} on, got {repr(found[key])}'
                elif len(set(found[key])) < len(found[key]) or max(found[key]) > LARGEST:
                    yield f'sweep: {key} must be different numbers up to {LARGEST:,}, got {repr(found[key])}'


def _wrong_questions(values: Dict[str, Any]) -> Iterable[str]:
    for number, question in values.get('questions', {}).items():
        if not isinstance(question, dict) or not isinstance(question.get('title'), str):
            yield f'question {number} needs a mapping with its title'
            continue
        if question.get('kind') not in QUESTIONS:
            yield f'question {number}: kind must be one of {", ".join(QUESTIONS)}, got {question.get("kind")!r}'
            continue
        of, against = question.get('of'), question.get('against')
        cells = question.get('cells') if of is None else [of, *against] if isinstance(against, list) else None
        if not cells or not isinstance(cells, list):
            yield f"question {number} needs 'of' with a list 'against', or a list 'cells'"
            continue
        yield from (
            f'question {number} is about an unknown cell {c!r}.{did_you_mean(str(c), values["cells"])}'
            for c in cells if c not in list(values['cells']))


def _whole_numbers(values: Any, least: int) -> bool:
    return isinstance(values, list) and all(type(v) is int and least <= v <= 4_000_000_000 for v in values)


def _check_given(path: str, values: Dict[str, Any], cells: Iterable[Cell]) -> None:
    for cell in cells:
        for key in sorted(cell.given().keys() & cell.train.keys()):
            where = 'train' if key in values['train'] else f'cell {cell.name}'
            raise PSTError(f'{path}, {where}: leave out {key}, which the study gives to each cell.')


def _check_models(path: str, cells: Iterable[Cell]) -> None:
    for cell in {c.name: c for c in cells}.values():
        import_modules(cell.train.get('device_modules'))
        model = cell.train['model']
        if not timm.is_model(model):
            raise PSTError(f'{path}, cell {cell.name}: unknown model {model!r}'
                              f'.{did_you_mean(model, timm.list_models())}')
        args = train_args(**cell.train)
        if cell.sweep and not isinstance(create_model(args.model, **args.model_kwargs), Adjustable):
            raise PSTError(f'{path}: sweep needs models with fine attention, and {model} of {cell.name} has none.')


def choose_classes(choice: Any, folders: Sequence[str]) -> List[str]:
    """Names of class folders.

    Args:
        choice: None for all, a list of names, {first: i, step: n}, or {except: one of these}.
        folders: All names, sorted.

    Raises:
        PSTError: If it is none of these, or names a class that is not there, or none at all.
    """
    if choice is None:
        return list(folders)
    if isinstance(choice, dict) and set(choice) == {'except'}:
        out = set(choose_classes(choice['except'], folders))
        return _some([f for f in folders if f not in out], choice, folders)
    if isinstance(choice, dict) and set(choice) == {'first', 'step'}:
        first, step = choice['first'], choice['step']
        if _whole_numbers([first], 0) and _whole_numbers([step], 1):
            return _some(list(folders[first::step]), choice, folders)
    if not isinstance(choice, list):
        raise PSTError(f'classes must be names, {{first, step}} or {{except}}, got {choice!r}.')
    missing = [c for c in choice if c not in folders]
    if missing:
        raise PSTError(f'The data has no class {missing[0]!r}.{did_you_mean(str(missing[0]), folders)}')
    return _some(sorted(set(choice)), choice, folders)


def _some(chosen: List[str], choice: Any, folders: Sequence[str]) -> List[str]:
    if not chosen:
        raise PSTError(f'The classes {choice!r} are none of the {len(folders)} in the data.')
    return chosen
