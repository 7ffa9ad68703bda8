"""Every step of deployment on a trained model: the part `weights` of `scripts/measure_deploy.py`."""
import argparse
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import numpy as np
import timm
import torch
from timm.data import create_transform

from pst_timm.checkpoints import load_model, preprocessing
from pst_timm.checkpoints.folder import save_folder
from pst_timm.data.datasets import create_eval_dataset
from pst_timm.data.drift import accuracy_interval
from pst_timm.deploy.finetune import finetune, finetune_flags
from pst_timm.deploy.runtime import open_source
from pst_timm.engine import validate, validate_args
from pst_timm.metrics.answers import unpack_answers
from pst_timm.metrics.intervals import paired_interval
from pst_timm.utils.errors import PSTError

from .deploy_artefacts import EAGER, INT8, RUNTIMES, Candidate, make, pruned
from .deploy_table import Row, Table, cost_of, counts_of, shown_cost, where

__all__ = ['Workshop', 'add_flags', 'measure_weights', 'steps']

RATIOS = (0.3, 0.5, 0.7)
ONNX_INT8 = next(iter(INT8))


class Step(NamedTuple):
    """A row of the table."""
    kind: str
    """'float', 'int8', 'pruned', 'pruned int8' or 'cascade': the colour of its mark in the plot."""
    make: Callable[['Workshop'], Candidate]
    """Makes what is measured, or finds it made."""
    counted: Callable[['Workshop'], str]
    """The source of the model as torch runs it, in which parameters and multiply-adds are counted."""


class Workshop:
    """What is made of a trained model, each thing once, in a folder."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.source: str = args.source
        self.folder: Path = args.work
        self.data = {key: value for key, value in vars(args).items() if key in DATA and value is not None}
        self.model = open_source(self.source)
        self.config = preprocessing(self.model, self.source, {'img_size': args.img_size} if args.img_size else {})
        self.img_size = self.config['input_size'][-1]

    def given(self, row: str) -> Optional[str]:
        """The artefact that was prepared elsewhere for a row."""
        return self.args.artefacts.get(row)

    def images(self) -> torch.Tensor:
        """Training images to calibrate on, preprocessed, drawn with a seed."""
        args = validate_args(**self.data, split=self.args.train_split, in_chans=self.config['input_size'][0])
        dataset = create_eval_dataset(args, args.split, None)
        dataset.transform = create_transform(**self.config)
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
        return torch.stack([dataset[i][0] for i in order[:self.args.images].tolist()])

    def in_runtime(self, runtime: str, source: str = '') -> Candidate:
        """A model in a form or runtime."""
        source = source or self.source
        return make(source, runtime, self.folder / f'{Path(source).name}-files', self.images)

    def trained(self, name: str, source: str, **flags: Any) -> str:
        """A model trained further, as a folder."""
        folder = self.folder / name
        if not folder.is_dir():
            last = finetune(
                Path(source), dict(self.data, train_split=self.args.train_split), work=self.folder / f'{name}.run',
                **{**finetune_flags(self.args.train_words, self.source), **flags})
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
        cut = pruned(self.before(sparse), ratio, self.folder / name)
        teacher = self.whole() if distilled else None
        return self.trained(f'{name}{"-distilled" * distilled}-tuned', cut, epochs=self.args.epochs, teacher=teacher)


def pruned_row(ratio: float, sparse: bool, distilled: bool, int8: bool = False) -> str:
    return f'pruned {ratio:.0%}{", sparsity training" * sparse}{", distilled" * distilled}{" + int8" * int8}'


def steps(sparsity: bool = True) -> Dict[str, Step]:
    """The rows of the table, those with sparsity training or without."""
    found = {
        runtime: Step('int8' if runtime in INT8 else 'float', partial(Workshop.in_runtime, runtime=runtime), whole)
        for runtime in RUNTIMES}
    for ratio in RATIOS:
        for sparse in (False, True)[:1 + sparsity]:
            for distilled in (False, True):
                which = dict(ratio=ratio, sparse=sparse, distilled=distilled)
                model = partial(Workshop.pruned, **which)
                found[pruned_row(**which)] = Step('pruned', lambda shop, model=model: Candidate(model(shop)), model)
            # of the two that were distilled
            found[pruned_row(**which, int8=True)] = Step(
                'pruned int8', lambda shop, model=model: shop.in_runtime(ONNX_INT8, model(shop)), model)
    return found


def whole(shop: Workshop) -> str:
    return shop.source


# measuring

def accuracy_of(candidate: Candidate, shop: Workshop) -> Row:
    """Accuracy, calibration error and which answers are right, as `pst-timm validate` tells them."""
    form, named = candidate.form, timm.is_model(candidate.source)
    args = validate_args(
        **shop.data, split=shop.args.val_split, device='cpu', device_modules=['pst_timm'], img_size=shop.args.img_size,
        answers=True, calibrate=True, reparam=form.reparam, channels_last=form.channels_last,
        model_dtype=form.dtype, torchcompile='inductor' if form.compile else None,
        **{'model' if named else 'checkpoint': candidate.source})
    [found] = validate(args, open_source)
    images = len(create_eval_dataset(args, args.split, None))
    interval = accuracy_interval(round(found['top1'] * images / 100), images)
    return dict(
        top1=found['top1'], interval=[100 * end for end in interval], ece=found['ece'], images=images,
        answers=found['answers'])


def measure_weights(args: argparse.Namespace) -> None:
    """Every step on a trained model, one row after the other: the table `steps`, and what its plot is drawn from."""
    args.artefacts = dict(args.artefacts)
    shop, found = Workshop(args), steps(bool(args.sparsity_epochs))
    unknown = [row for row in [*(args.rows or ()), *args.artefacts] if row not in found]
    if unknown:
        raise PSTError(f'There is no row {unknown[0]!r}: the rows are {"; ".join(found)}.')
    table = Table(args.output, args.table, setting_of(shop), shown_step, list(found))
    baseline = shop.in_runtime(EAGER)
    size = (shop.config['input_size'][0], shop.img_size, shop.img_size)
    for name in dict.fromkeys([EAGER, *(args.rows or found)]):  # the first is what the others are compared with
        if name in table.rows and not args.again:
            continue
        step = found[name]
        candidate = Candidate(shop.given(name)) if shop.given(name) else step.make(shop)
        row = dict(
            row=name, kind=step.kind, **accuracy_of(candidate, shop),
            **counts_of(open_source(step.counted(shop)), size),
            **cost_of(candidate, baseline, shop.img_size, args.rounds))
        table.add(dict(row, change=change(row, table.rows.get(EAGER, row))))


def change(row: Row, first: Row) -> List[float]:
    """The difference in top-1 to the first row, and its 95% interval over the images, in points."""
    right, before = (unpack_answers(r['answers'], r['images']) for r in (row, first))
    interval = paired_interval(int(np.sum(before & ~right)), int(np.sum(right & ~before)), row['images'])
    return [row['top1'] - first['top1'], *interval]


def setting_of(shop: Workshop) -> str:
    args = shop.args
    with_teacher = f'fine-tuned for {args.epochs} epochs after pruning'
    before = f', {args.sparsity_epochs} epochs of further training before it' if args.sparsity_epochs else ''
    return (
        f'{Path(shop.source).name}, {shop.img_size} px, accuracy on the split {args.val_split}; int8 calibrated on '
        f'{args.images} training images; pruned models {with_teacher}{before}, one seed; times faster than eager '
        f'float32; {where(args.rounds)}')


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
    parser.add_argument('--class-map', help='as for train')
    parser.add_argument('--workers', type=int, default=0)
    parser.add_argument('--img-size', type=int, help="the model's own if not given")
    parser.add_argument('--table', default='steps', help='name of the table (default: %(default)s)')
    parser.add_argument('--rows', nargs='+', metavar='ROW', help=f'of {"; ".join(steps())} (default: all)')
    parser.add_argument('--again', action='store_true', help='measure rows that are there once more')
    parser.add_argument('--images', type=int, default=128, help='for calibration (default: %(default)s)')
    parser.add_argument(
        '--artefact', action='append', default=[], metavar='ROW=PATH', type=_artefact, dest='artefacts',
        help='a model that was made elsewhere, for a row')
    parser.add_argument('--epochs', type=int, default=3, help='of fine-tuning after pruning (default: %(default)s)')
    parser.add_argument('--sparsity-weight', type=float, default=1e-4, help='default: %(default)s')
    parser.add_argument(
        '--sparsity-epochs', type=int, default=3, help='of sparsity training, and as many of plain training for those '
        'to compare with; 0: prune the model as it is, and leave these rows out (default: %(default)s)')


def _artefact(text: str) -> Any:
    row, _, path = text.partition('=')
    if not path:
        raise argparse.ArgumentTypeError(f'expected ROW=PATH, got {text!r}')
    return row, path
