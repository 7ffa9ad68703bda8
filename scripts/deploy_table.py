"""What `scripts/measure_deploy.py` writes: rows that are kept as they come, and what each model costs."""
import json
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional, Sequence

import timm
import torch
import torch.nn as nn

from pst_timm.deploy.cascade import CascadeClassifier
from pst_timm.deploy.latency import NOT_MEASURABLE, energy, make_call, peak_memory_of, time_models
from pst_timm.deploy.runtime import Deployed
from pst_timm.utils.cost import count_gmacs, weight_bytes
from pst_timm.utils.devices import hardware_name
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import write_csv, write_json
from pst_timm.utils.timing import median_ratio, percentile, time_in_turn

from .deploy_artefacts import Candidate

__all__ = ['BATCHES', 'Row', 'Table', 'cost_of', 'counts_of', 'file_bytes', 'shown_cost', 'where']

Row = Dict[str, Any]
BATCHES = (1, 8)


class Table:
    """Rows by name in a JSON file, and a CSV file of them that people can read, both written after each row."""

    def __init__(
            self,
            folder: Path,
            name: str,
            setting: str,
            show: Callable[[Row], Mapping[str, Any]],
            order: Sequence[str] = (),
    ):
        """
        Args:
            folder: Where NAME.csv and NAME.json are, made if there is none.
            name: Name of the table.
            setting: How it is measured, for the line above the table.
            show: From a row to that of the CSV file.
            order: Names of the rows in their order; others come after them.

        Raises:
            PSTError: If there are rows that were measured in another setting.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / name
        self.setting, self.show, self.order = setting, show, list(order)
        known = folder / f'{name}.json'
        self.rows: Dict[str, Row] = {}
        if known.is_file():
            found = json.loads(known.read_text())
            if found['setting'] != setting:
                raise PSTError(
                    f'{known} was measured otherwise ({found["setting"]}), not as now ({setting}): remove it, or write '
                    f'to another place.')
            self.rows = {row['row']: row for row in found['rows']}

    def add(self, row: Row) -> None:
        """Keep a row, known by its `row`, in place of the one of that name."""
        self.rows[row['row']] = row
        place = {name: i for i, name in enumerate(self.order)}
        rows = sorted(self.rows.values(), key=lambda row: place.get(row['row'], len(place)))
        write_json(self.path.with_name(f'{self.path.name}.json'), dict(setting=self.setting, rows=rows))
        write_csv(self.path.with_name(f'{self.path.name}.csv'), [self.show(row) for row in rows])
        print(*self.show(row).values(), sep=' | ', flush=True)


def where(rounds: Optional[int] = None) -> str:
    """The machine, the versions and the rounds, for the setting of a table."""
    threads = torch.get_num_threads()
    found = [hardware_name(torch.device('cpu')), f'{threads} thread{"s" * (threads > 1)}',
             f'torch {torch.__version__}', f'timm {timm.__version__}']
    for package in ('onnxruntime', 'openvino', 'nncf', 'torch-pruning'):
        try:
            found.append(f'{package} {version(package)}')
        except PackageNotFoundError:
            pass
    return ', '.join(found + ([f'medians of {rounds} rounds in turn'] if rounds else []))


def file_bytes(source: str, model: nn.Module) -> int:
    """Bytes of the weights of a model that torch runs, or of the files of another one; of all stages of a cascade."""
    if isinstance(model, CascadeClassifier):
        stages = model.cascade.stages
        return Path(source).stat().st_size + sum(file_bytes(stage.source, stage.model) for stage in stages)
    path = Path(source)
    if isinstance(model, Deployed):
        return path.stat().st_size + (path.with_suffix('.bin').stat().st_size if path.suffix == '.xml' else 0)
    return weight_bytes(model)


def counts_of(model: nn.Module, input_size: Sequence[int]) -> Row:
    """Parameters and multiply-adds of a model that torch runs."""
    model = getattr(model, '_orig_mod', model)  # of a compiled one
    return dict(params=sum(p.numel() for p in model.parameters()), gmacs=count_gmacs(model, input_size))


def cost_of(
        candidate: Candidate,
        baseline: Candidate,
        img_size: int,
        rounds: int,
        images: Optional[torch.Tensor] = None,
) -> Row:
    """Size, time, memory and energy of a model, timed in turn with another one.

    Args:
        candidate: The model.
        baseline: What it is compared with.
        img_size: Height and width of the images.
        rounds: Timed calls of each, for each batch size.
        images: What a model is timed on whose time depends on the images (N, C, H, W): all of them in a fifth of the
            rounds. Noise, the same batch in each round, if None.
    """
    models = {'this': candidate.open()}
    if candidate != baseline:
        models = {'baseline': baseline.open(), **models}
    size = (models['this'].pretrained_cfg['input_size'][0], img_size, img_size)
    this = models['this']
    call = make_call(this, size) if images is None else partial(run_over, this, images.split(1))
    row = dict(
        bytes=file_bytes(candidate.source, this), memory=memory_of(candidate, img_size),
        joules=energy(call, 1 if images is None else len(images)))
    for batch in BATCHES:
        if images is None:
            times = time_models(models, size, batch, rounds)
        else:
            batches = images.split(batch)
            calls = {name: partial(run_over, model, batches) for name, model in models.items()}
            times = {
                name: [seconds / len(batches) for seconds in mine]
                for name, mine in time_in_turn(calls, max(1, rounds // 5), warmup=1).items()}
        first = next(iter(times.values()))
        row[f'seconds_{batch}'] = percentile(times['this'], 50)
        row[f'ratio_{batch}'] = median_ratio(first, times['this'])
    return row


@torch.inference_mode()
def run_over(model: nn.Module, batches: Sequence[torch.Tensor]) -> None:
    """Run a model on one batch after the other."""
    for batch in batches:
        model(batch)


def memory_of(candidate: Candidate, img_size: int) -> Optional[int]:
    """Bytes that a fresh process needs for an image, beyond its libraries."""
    return peak_memory_of(candidate.source, 1, img_size, candidate.form, **candidate.kwargs)


def shown_cost(row: Row) -> Row:
    """The columns of a cost for people."""
    def told(value: Optional[float], unit: float, decimals: int, otherwise: str = NOT_MEASURABLE) -> str:
        return otherwise if value is None else f'{value / unit:.{decimals}f}'

    return {
        **{f'times faster, batch {batch}': f'{row[f"ratio_{batch}"]:.2f}' for batch in BATCHES},
        'ms an image': f'{1e3 * row["seconds_1"]:.2f}',
        'M parameters': f'{row["params"] / 1e6:.2f}',
        'GMACs': f'{row["gmacs"]:.3f}',
        'file (MB)': f'{row["bytes"] / 1e6:.1f}',
        'memory (MiB)': told(row['memory'], 2 ** 20, 0),
        'energy (J)': told(row['joules'], 1, 3),
    }
