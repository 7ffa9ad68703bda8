"""Every step of deployment on a trained model: the part `weights` of `scripts/measure_deploy.py`."""
import argparse
import hashlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import timm
import torch
from timm.data import create_transform

from pst_timm.checkpoints import load_model, preprocessing
from pst_timm.checkpoints.folder import save_folder
from pst_timm.data.datasets import create_eval_dataset
from pst_timm.deploy.cascade import CascadeClassifier
from pst_timm.deploy.cascade_fit import fit
from pst_timm.deploy.finetune import finetune, finetune_flags
from pst_timm.deploy.held_out import HELD, REST, set_aside
from pst_timm.deploy.runtime import open_source
from pst_timm.deploy.slim import PRUNED as SLIM_PRUNED
from pst_timm.deploy.slim import REPORT as SLIM_REPORT
from pst_timm.deploy.slim import Settings, slim
from pst_timm.engine import validate, validate_args
from pst_timm.metrics.answers import unpack_answers
from pst_timm.metrics.binomial import binomial_interval
from pst_timm.metrics.intervals import paired_interval
from pst_timm.utils.errors import PSTError

from .deploy_artefacts import EAGER, INT8, ONNX, RUNTIMES, Candidate, make, pruned
from .deploy_table import Row, Table, cost_of, counts_of, shown_cost, where

__all__ = ['Workshop', 'add_flags', 'measure_weights', 'steps']

RATIOS = (0.3, 0.5, 0.7)
SEED = 0
ONNX_INT8 = next(iter(INT8))
CASCADES = ((0.5, ONNX_INT8), (0.7, ONNX_INT8), (0.7, ONNX))
TIMED = 128  # images that cascades are timed on


class Step(NamedTuple):
    """A row of the table."""
    kind: str
    """'float', 'int8', 'pruned', 'pruned int8', 'cascade' or 'slim': the mark in the plot."""
    make: Callable[['Workshop'], Candidate]
    """Makes what is measured, or finds it made."""
    parts: Callable[['Workshop'], List[str]]
    """Sources of the models that torch runs, one for each stage, whose parameters and multiply-adds count."""


class Workshop:
    """What is made of a trained model, each thing once, in a folder."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.source: str = args.source
        self.folder: Path = args.work
        self.data = {key: value for key, value in vars(args).items() if key in DATA and value is not None}
        self.config = preprocessing(
            open_source(self.source), self.source, {'img_size': args.img_size} if args.img_size else {})
        self.img_size = self.config['input_size'][-1]
        # one part of the validation images fits cascades, the other one is reported on, whatever the row
        place = set_aside(args.data_dir, args.val_split, self.folder, args.held_out, SEED)
        self.report = dict(self.data, data_dir=str(place), split=REST)
        self.held = dict(data_dir=str(place), split=HELD)

    def given(self, row: str) -> Optional[str]:
        """The artefact that was prepared elsewhere for a row."""
        return self.args.artefacts.get(row)

    def drawn(self, count: int, **data: Any) -> Tuple[torch.Tensor, torch.Tensor]:
        """Images of a split, preprocessed, drawn with a seed, and their labels."""
        args = validate_args(**data, in_chans=self.config['input_size'][0])
        dataset = create_eval_dataset(args, args.split, None)
        dataset.transform = create_transform(**self.config)
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(SEED))
        images, labels = zip(*(dataset[i] for i in order[:count].tolist()))
        return torch.stack(images), torch.tensor(labels)

    def calibration(self) -> Tuple[torch.Tensor, torch.Tensor]:
        """Training images, and their labels."""
        return self.drawn(self.args.images, **self.data, split=self.args.train_split)

    def in_runtime(self, runtime: str, source: str = '') -> Candidate:
        """A model in a form or runtime."""
        source = source or self.source
        # several may be called last.pth.tar
        name = f'{Path(source).name}-{hashlib.sha256(source.encode()).hexdigest()[:8]}-{self.img_size}px'
        return make(source, runtime, self.folder / name, lambda: self.calibration()[0], self.args.img_size)

    def trained(self, name: str, source: str, **flags: Any) -> str:
        """A model trained further, as a folder."""
        folder = self.folder / name
        if not folder.is_dir():
            data = dict(self.data, train_split=self.args.train_split, val_split='')
            if self.args.img_size:
                data['img_size'] = self.args.img_size
            flags = {**finetune_flags(self.args.train_words, self.source), **flags}
            last = finetune(Path(source), data, work=self.folder / f'{name}.run', **flags)
            save_folder(load_model(last), folder)
        return str(folder)

    def whole(self) -> str:
        """The model as it is, as a folder."""
        folder = self.folder / 'whole'
        if not folder.is_dir():
            save_folder(load_model(self.source), folder)
        return str(folder)

    def before(self, sparse: bool) -> str:
        """The model that is pruned: trained for some epochs more, with the penalty or, to compare with, without."""
        if not self.args.sparsity_epochs:
            return self.whole()
        flags = dict(sparsity_weight=self.args.sparsity_weight) if sparse else {}
        return self.trained('sparse' if sparse else 'longer', self.whole(), epochs=self.args.sparsity_epochs, **flags)

    def pruned(self, ratio: float, sparse: bool, distilled: bool) -> str:
        """A pruned and fine-tuned model."""
        row = pruned_row(ratio, sparse, distilled)
        if self.given(row):
            return self.given(row)
        name = f'pruned-{100 * ratio:.0f}{"-sparse" * sparse}'
        chosen = dict(importance='bn', scope='global') if sparse else dict(importance='l2', scope='uniform')
        cut = pruned(self.before(sparse), ratio, self.folder / name, dict(chosen, images=[self.calibration()]))
        teacher = self.whole() if distilled else None
        return self.trained(f'{name}{"-distilled" * distilled}-tuned', cut, epochs=self.args.epochs, teacher=teacher)

    def cascade(self, ratio: float, runtime: str) -> Candidate:
        """The pruned model, then the whole one for the images that it is not sure of, both in a runtime."""
        path = self.folder / f'cascade-{100 * ratio:.0f}-{"int8" if runtime in INT8 else "float"}.json'
        if not path.is_file():
            stages = [self.in_runtime(runtime, source).source for source in self.cascade_parts(ratio)]
            fit(stages, path, **self.held, max_cost=self.args.cascade_cost, relative=True, device='cpu', overwrite=True,
                img_sizes=[self.args.img_size] if self.args.img_size else None, rounds=self.args.rounds)
        return Candidate(str(path))

    def cascade_parts(self, ratio: float) -> List[str]:
        return [self.pruned(ratio, sparse=False, distilled=True), self.source]

    def slim(self) -> Candidate:
        """What `pst-timm slim` makes of the model: the last thing that it kept."""
        folder = self.folder / 'slim'
        if not (folder / SLIM_REPORT).is_file():
            slim(self.source, folder, self.args.data_dir,
                 Settings(
                     max_drop=self.args.max_drop, train_split=self.args.train_split, val_split='',
                     rounds=self.args.rounds),
                 dict(finetune_flags(self.args.train_words, self.source), epochs=self.args.epochs))
        kept = [step for step in json.loads((folder / SLIM_REPORT).read_text())['steps'] if step['kept']]
        return Candidate(str(folder / kept[-1]['path']) if kept[-1]['path'] else self.source)

    def slim_parts(self) -> List[str]:
        first = self.folder / 'slim' / SLIM_PRUNED
        first = str(first) if first.is_dir() else self.source
        return [first, self.source] if self.slim().source.endswith('.json') else [first]


def pruned_row(ratio: float, sparse: bool, distilled: bool, int8: bool = False) -> str:
    return f'pruned {ratio:.0%}{", sparsity training" * sparse}{", distilled" * distilled}{" + int8" * int8}'


def steps(sparsity: bool = True) -> Dict[str, Step]:
    """The rows of the table, those with sparsity training or without."""
    found = {
        runtime: Step(
            'int8' if runtime in INT8 else 'float', partial(Workshop.in_runtime, runtime=runtime),
            lambda shop: [shop.source])
        for runtime in RUNTIMES}
    for ratio in RATIOS:
        for sparse in (False, True)[:1 + sparsity]:
            for distilled in (False, True):
                which = dict(ratio=ratio, sparse=sparse, distilled=distilled)
                model = partial(Workshop.pruned, **which)
                found[pruned_row(**which)] = Step(
                    'pruned', lambda shop, model=model: Candidate(model(shop)), lambda shop, model=model: [model(shop)])
            # of the two that were distilled
            found[pruned_row(**which, int8=True)] = Step(
                'pruned int8', lambda shop, model=model: shop.in_runtime(ONNX_INT8, model(shop)),
                lambda shop, model=model: [model(shop)])
    for ratio, runtime in CASCADES:
        found[f'cascade: pruned {ratio:.0%}, then whole, {runtime}'] = Step(
            'cascade', partial(Workshop.cascade, ratio=ratio, runtime=runtime),
            partial(Workshop.cascade_parts, ratio=ratio))
    found['slim'] = Step('slim', Workshop.slim, Workshop.slim_parts)
    return found


# measuring

def accuracy_of(candidate: Candidate, shop: Workshop) -> Row:
    """Accuracy, calibration error and which answers are right, as `pst-timm validate` tells them."""
    form = candidate.form
    args = validate_args(
        **shop.report, device='cpu', device_modules=['pst_timm'], img_size=shop.args.img_size,
        answers=True, calibrate=True, reparam=form.reparam, channels_last=form.channels_last,
        model_dtype=form.dtype, torchcompile='inductor' if form.compile else None,
        **{'model' if timm.is_model(candidate.source) else 'checkpoint': candidate.source})
    [found] = validate(args, open_source)
    images = len(create_eval_dataset(args, args.split, None))
    interval = binomial_interval(round(found['top1'] * images / 100), images)
    return dict(
        top1=found['top1'], interval=[100 * end for end in interval], ece=found['ece'], images=images,
        answers=found['answers'], shares=[found[key] / 100 for key in sorted(found) if key.endswith('_share')] or [1.])


def mean_counts(parts: Sequence[Row], shares: Sequence[float]) -> Row:
    """Parameters of all stages, and the mean multiply-adds of an image.

    Args:
        parts: Those of each stage.
        shares: Share of the images that each stage answers.
    """
    reached = [sum(shares[i:]) for i in range(len(parts))]
    return dict(
        params=sum(part['params'] for part in parts),
        gmacs=sum(part['gmacs'] * share for part, share in zip(parts, reached)))


@torch.inference_mode()
def timed_images(candidate: Candidate, shop: Workshop, shares: Sequence[float]) -> Optional[torch.Tensor]:
    """Images of which a cascade answers the same share in each stage as of all, in random order; None for others."""
    model = candidate.open()
    if not isinstance(model, CascadeClassifier):
        return None
    images, _ = shop.drawn(4 * TIMED, **shop.report)
    stage = torch.cat([model.cascade.route(part)[0].stage for part in images.split(64)])
    chosen = torch.cat([(stage == i).nonzero().flatten()[:round(TIMED * share)] for i, share in enumerate(shares)])
    return images[chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(SEED))]]


def measure_weights(args: argparse.Namespace) -> None:
    """Every step on a trained model, one row after the other: the table `steps`, and what its plot is drawn from."""
    args.artefacts = dict(args.artefacts)
    found = steps(bool(args.sparsity_epochs))
    unknown = [row for row in [*(args.rows or ()), *args.artefacts] if row not in found]
    if unknown:
        raise PSTError(f'There is no row {unknown[0]!r}: the rows are {"; ".join(found)}.')
    shop = Workshop(args)
    table = Table(args.output, args.table, setting_of(shop), shown_step, list(found))
    baseline, left_out = shop.in_runtime(EAGER), []
    for name in dict.fromkeys([EAGER, *(args.rows or found)]):  # the first is what the others are compared with
        if name in table.rows and not args.again:
            continue
        try:
            row = step_row(name, found[name], shop, baseline)
        except PSTError as e:  # the others can be measured all the same
            left_out.append(name)
            print(f'{name}: left out: {e}', file=sys.stderr, flush=True)
            continue
        table.add(dict(row, change=change(row, table.rows.get(EAGER, row))))
    if left_out:
        raise PSTError(f'Rows left out, see above: {"; ".join(left_out)}.')


def step_row(name: str, step: Step, shop: Workshop, baseline: Candidate) -> Row:
    """A row of the table: makes what it is about, and measures it."""
    candidate = Candidate(shop.given(name)) if shop.given(name) else step.make(shop)
    row = dict(row=name, kind=step.kind, **accuracy_of(candidate, shop))
    size = (shop.config['input_size'][0], shop.img_size, shop.img_size)
    counts = [counts_of(open_source(part), size) for part in step.parts(shop)]
    images = timed_images(candidate, shop, row['shares'])
    return dict(
        row, **mean_counts(counts, row['shares']),
        **cost_of(candidate, baseline, shop.img_size, shop.args.rounds, images))


def change(row: Row, first: Row) -> List[float]:
    """The difference in top-1 to the first row, and its 95% interval over the images, in points."""
    right, before = (unpack_answers(r['answers'], r['images']) for r in (row, first))
    interval = paired_interval(int(np.sum(before & ~right)), int(np.sum(right & ~before)), row['images'])
    return [row['top1'] - first['top1'], *interval]


def setting_of(shop: Workshop) -> str:
    args = shop.args
    before = f' and {args.sparsity_epochs} before pruning' if args.sparsity_epochs else ''
    return (
        f'{Path(shop.source).name}, {shop.img_size} px, accuracy on {1 - args.held_out:.0%} of the split '
        f'{args.val_split}, cascades fitted on the others for {args.cascade_cost:g} of the cost of their last stage; '
        f'slim with at most {args.max_drop:g} points lost on the training images it sets aside; '
        f'int8 calibrated on {args.images} training images; {args.epochs} epochs of fine-tuning after{before}, one '
        f'seed; times faster than eager float32; {where(args.rounds)}')


def shown_step(row: Row) -> Row:
    low, high = row['interval']
    by, least, most = row['change']
    return {
        'model': row['row'],
        'top-1 (%)': f'{row["top1"]:.2f}', '95%': f'{low:.1f} to {high:.1f}',
        'over the first': f'{by:+.2f} ({least:+.2f} to {most:+.2f})' if row['row'] != EAGER else '-',
        'ECE': f'{row["ece"]:.3f}',
        **shown_cost(row)}


DATA = ('data_dir', 'class_map', 'workers')


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the part `weights`."""
    parser.add_argument('source', help='name, folder or file of the trained model')
    parser.add_argument('--data-dir', required=True)
    parser.add_argument('--train-split', default='train')
    parser.add_argument('--val-split', default='validation')
    parser.add_argument(
        '--held-out', type=float, default=0.2, help='share of the validation images that fits cascades; the others are '
        'reported on (default: %(default)s)')
    parser.add_argument('--class-map', help='as for train')
    parser.add_argument('--workers', type=int, default=0)
    parser.add_argument('--img-size', type=int, help="the model's own if not given")
    parser.add_argument('--table', default='steps', help='name of the table (default: %(default)s)')
    known = '; '.join(steps()).replace('%', '%%')
    parser.add_argument('--rows', nargs='+', metavar='ROW', help=f'of {known} (default: all)')
    parser.add_argument('--again', action='store_true', help='measure rows that are there once more')
    parser.add_argument('--images', type=int, default=128, help='for calibration (default: %(default)s)')
    parser.add_argument(
        '--artefact', action='append', default=[], metavar='ROW=PATH', type=_artefact, dest='artefacts',
        help='a model that was made elsewhere, for a row')
    parser.add_argument('--epochs', type=int, default=3, help='of fine-tuning after pruning (default: %(default)s)')
    parser.add_argument(
        '--cascade-cost', type=float, default=0.7, help='of a cascade, as a share of its last stage (default: '
        '%(default)s)')
    parser.add_argument('--max-drop', type=float, default=1., help='of slim, in points (default: %(default)g)')
    parser.add_argument('--sparsity-weight', type=float, default=1e-4, help='default: %(default)s')
    parser.add_argument(
        '--sparsity-epochs', type=int, default=3, help='of sparsity training, and as many of plain training for those '
        'to compare with; 0: prune the model as it is, and leave these rows out (default: %(default)s)')


def _artefact(text: str) -> Any:
    row, _, path = text.partition('=')
    if not path:
        raise argparse.ArgumentTypeError(f'expected ROW=PATH, got {text!r}')
    return row, path
