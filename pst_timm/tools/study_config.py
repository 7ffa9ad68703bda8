"""The YAML file of a study: which cells there are, and what each of them is to do."""
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterable, List, Sequence

import timm
import yaml

from pst_timm.engine import EngineError, train_args
from pst_timm.engine.setup import import_modules
from pst_timm.hub import did_you_mean

__all__ = ['Cell', 'Study', 'choose_classes', 'read_study']

# what may differ between two runs of the same cell
PLACE = ('class_map', 'data_dir', 'device', 'experiment', 'output', 'resume', 'workers')
STUDY_KEYS = {
    'name': str, 'title': str, 'seeds': list, 'classes': (list, dict), 'train': dict, 'cells': dict, 'sweep': dict,
    'probe': dict, 'questions': dict}
REQUIRED = ('name', 'title', 'seeds', 'train', 'cells')


@dataclass(frozen=True)
class Cell:
    """What one cell of the grid is to do."""
    name: str
    seed: int
    train: Dict[str, Any]
    """Flags of the training engine, without those of the place."""
    classes: List[str]
    sweep: Dict[str, List[int]] = field(default_factory=dict)
    """`topk` and `img_size` of the fine-attention sweep, empty for none."""
    probe: List[str] = field(default_factory=list)
    """Held-out classes of the linear probe, empty for none."""

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
            train={k: v for k, v in self.train.items() if k not in PLACE}, seed=self.seed, classes=self.classes,
            sweep=self.sweep, probe=self.probe)


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
            questions: what the report asks, by number: {title, kind, ...}.
        data_dir: Image folder, for the names of the classes.

    Raises:
        EngineError: If the file cannot be read, or names an unknown key, cell, class, flag or model.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as e:
        raise EngineError(f'Cannot read the study {path}: {e.strerror}.') from None
    except yaml.YAMLError as e:
        raise EngineError(f'{path} is not valid YAML: {e}') from None
    _check_keys(path, values)
    split = Path(data_dir) / values['train'].get('train_split', 'train')
    if not split.is_dir():
        raise EngineError(f'There is no {split}: --data-dir must name the folder with the images of the study.')
    folders = sorted(p.name for p in split.iterdir() if p.is_dir())
    classes = choose_classes(values.get('classes'), folders)
    sweep, probe = values.get('sweep', {}), values.get('probe', {})
    probe_classes = choose_classes(probe.get('classes'), folders) if probe else []
    for part, names in (('sweep', sweep.get('cells', [])), ('probe', probe.get('cells', []))):
        for name in names:
            if name not in values['cells']:
                raise EngineError(f'{path}: {part} names an unknown cell {name!r}{did_you_mean(name, values["cells"])}')
    cells = []
    for name, own in values['cells'].items():
        own = dict(own)
        own_classes = choose_classes(own.pop('classes'), folders) if 'classes' in own else classes
        if name in probe.get('cells', []) and (seen := set(own_classes) & set(probe_classes)):
            raise EngineError(f'{path}: the probe of {name} needs classes it was not trained on; it saw {min(seen)}.')
        flags = {**values['train'], **own}
        try:
            train_args(**flags)
        except EngineError as e:
            raise EngineError(f'{path}, cell {name}: {e}') from None
        cells += [
            Cell(
                name=name,
                seed=seed,
                train=flags,
                classes=own_classes,
                sweep={k: sweep[k] for k in ('topk', 'img_size')} if name in sweep.get('cells', []) else {},
                probe=probe_classes if name in probe.get('cells', []) else [],
            )
            for seed in values['seeds']]
    _check_models(path, cells)
    return Study(values['name'], values['title'], cells, values.get('questions', {}))


def _check_keys(path: str, values: Any) -> None:
    if not isinstance(values, dict):
        raise EngineError(f'{path} must hold one mapping with {", ".join(REQUIRED)}.')
    problems = [f'unknown key {k!r}{did_you_mean(str(k), STUDY_KEYS)}' for k in values if k not in STUDY_KEYS]
    problems += [f'{k} is missing' for k in REQUIRED if not values.get(k)]
    problems += [
        f'{k} must be a {getattr(t, "__name__", "list or dict")}, got {values[k]!r}'
        for k, t in STUDY_KEYS.items() if k in values and not isinstance(values[k], t)]
    for part, keys in (('sweep', {'cells', 'topk', 'img_size'}), ('probe', {'cells', 'classes'})):
        if values.get(part) and isinstance(values[part], dict) and set(values[part]) != keys:
            problems.append(f'{part} needs {", ".join(sorted(keys))}, got {", ".join(map(str, values[part]))}')
    if isinstance(values.get('cells'), dict):
        problems += [
            f'cell {name!r} needs a mapping with its model' for name, own in values['cells'].items()
            if not isinstance(own, dict) or not {**(values.get('train') or {}), **own}.get('model')]
    if problems:
        raise EngineError('\n'.join(f'{path}: {p}' for p in problems))


def _check_models(path: str, cells: Iterable[Cell]) -> None:
    for cell in cells:
        import_modules(cell.train.get('device_modules'))
        model = cell.train['model']
        if not timm.is_model(model):
            raise EngineError(f'{path}, cell {cell.name}: unknown model {model!r}'
                              f'{did_you_mean(model, timm.list_models())}')


def choose_classes(choice: Any, folders: Sequence[str]) -> List[str]:
    """Names of class folders.

    Args:
        choice: None for all, a list of names, {first: i, step: n}, or {except: one of these}.
        folders: All names, sorted.
    """
    if choice is None:
        return list(folders)
    if isinstance(choice, dict) and set(choice) == {'except'}:
        out = set(choose_classes(choice['except'], folders))
        return [f for f in folders if f not in out]
    if isinstance(choice, dict) and set(choice) == {'first', 'step'}:
        return list(folders[choice['first']::choice['step']])
    if not isinstance(choice, list):
        raise EngineError(f'classes must be names, {{first, step}} or {{except}}, got {choice!r}.')
    missing = [c for c in choice if c not in folders]
    if missing:
        raise EngineError(f'The data has no class {missing[0]!r}{did_you_mean(str(missing[0]), folders)}')
    return sorted(choice)
