"""`pst-timm benchmark`: models in turn with their plain twins, the attention alone, time by part."""
import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple

from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import check_output

from .common import DTYPES, ArgumentParser, add_attention_flags, add_output, add_source, at_least, run

if TYPE_CHECKING:
    from pst_timm.benchmark import Row, Setting

KINDS = ('layers', 'parts', 'models', 'figures')
ALONE = ('models',)
TAKEN = ('models', 'parts')
MOST_TOKENS = 1024  # of a side: the plain formula holds a quarter of its fourth power
CHOSEN = ('models', 'parts', 'layers')


class _Parser(ArgumentParser):
    """A parser whose flags know which kinds of measurement read them."""

    def add_argument(self, *args: Any, kinds: Sequence[str] = KINDS, **kwargs: Any) -> argparse.Action:
        action = super().add_argument(*args, **kwargs)
        action.kinds = kinds
        return action

    def unread(self, args: argparse.Namespace, kind: str) -> List[str]:
        """What was given and would not be read; a user who gives it expects what does not happen."""
        return [
            action.dest for action in self._actions
            if kind not in action.kinds and getattr(args, action.dest) != action.default]


def _parser() -> _Parser:
    parser = _Parser(
        prog='pst-timm benchmark',
        description='Measure models in turn with their plain ResNet twins. Without models: the headline figures.')
    add_source(parser, 'models', nargs='*', default=[], metavar='source', kinds=TAKEN)
    add_source(parser, '--checkpoint', names=False, kinds=TAKEN)
    parser.add_argument(
        '--baselines', nargs='+', help='one for each model (default: its plain ResNet)', kinds=ALONE)
    parser.add_argument('--layers', action='store_true', help='measure the attention alone against the plain formula')
    parser.add_argument('--parts', action='store_true', help='show where the time of the models goes')
    parser.add_argument(
        '--quick', action='store_true', help='5 rounds, and less of the headline figures and of --layers')
    parser.add_argument(
        '--sizes', type=int, nargs='+', help='fine maps of --layers (default: 14 40 80 160, with --quick 14 40 80)',
        kinds=('layers',))
    parser.add_argument('--device', default='', help='cpu, cuda, ... (default: the best present)')
    parser.add_argument(
        '-b', '--batch-size', type=at_least(1), help='images (default: 8; 2 with --layers)', kinds=CHOSEN)
    parser.add_argument(
        '--img-size', type=at_least(1), help='height and width (default: that of the checkpoint, 224 for a name)',
        kinds=TAKEN)
    parser.add_argument('--dtype', choices=DTYPES, default='float32')
    add_attention_flags(parser, default="the model's; 0 and 8 with --layers", kinds=CHOSEN)
    parser.add_argument('--reparam', action='store_true', help='fold with pst_timm.reparameterize', kinds=CHOSEN)
    parser.add_argument('--compile', action='store_true', help='torch.compile both sides', kinds=ALONE)
    parser.add_argument(
        '--channels-last', action='store_true', help='lay out weights and maps channels last', kinds=CHOSEN)
    parser.add_argument('--train', action='store_true', help='time a training step', kinds=ALONE)
    parser.add_argument('--repeats', type=at_least(1), help='timed rounds (default: 20, with --quick 5)')
    parser.add_argument(
        '--results-file', help='CSV with columns model and top1, as validate.py writes it', kinds=ALONE)
    add_output(parser, 'folder for the table (CSV), how it was measured (JSON) and a picture')
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """`pst-timm benchmark`; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    args.sources = [*args.models, *([args.checkpoint] if args.checkpoint else [])]
    if args.layers and args.parts:
        parser.error('--layers and --parts exclude each other: choose one')
    if args.parts and not args.sources:
        parser.error('--parts needs the models to take apart')
    args.kind = 'layers' if args.layers else 'parts' if args.parts else 'models' if args.sources else 'figures'
    unread = parser.unread(args, args.kind)
    if unread:
        parser.error(f'{unread[0].replace("_", "-")} has no say in the benchmark of {args.kind}')
    if args.baselines and len(args.baselines) != len(args.sources):
        parser.error(f'{len(args.sources)} models but {len(args.baselines)} --baselines: give one for each')
    if any(not 2 <= s <= MOST_TOKENS or s % 2 for s in args.sizes or ()):
        parser.error(f'--sizes must be even and from 2 to {MOST_TOKENS}, got {" ".join(map(str, args.sizes))}')
    if args.reparam and args.train:
        parser.error('--reparam folds batch norms away, which --train needs')
    if args.fine_fusion and not args.topk and not args.layers:
        parser.error('--fine-fusion has no say without --topk')
    return run(parser.prog, _benchmark, args)


def _benchmark(args: argparse.Namespace) -> None:
    from pst_timm.benchmark import open_source
    from pst_timm.utils.tables import format_table

    accuracy = _read_accuracy(args.results_file) if args.results_file else None
    if args.output:
        try:
            args.output.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise PSTError(f'Cannot write to {args.output}: {e.strerror}.') from None
        read = [args.results_file] if args.results_file else []
        for ending in ('csv', 'json', 'png'):
            check_output(args.output / f'{_name(args)}.{ending}', overwrite=True, inputs=read)
    args.sources = [open_source(source) for source in args.sources]
    rows, setting = _measure(args, _setting(args), accuracy)
    print(setting.describe())
    print(format_table(rows, decimals=3))
    if args.output:
        _write(rows, setting, args.output, _name(args))


def _name(args: argparse.Namespace) -> str:
    return 'benchmark' if args.kind == 'models' else args.kind


def _read_accuracy(path: str) -> Dict[str, float]:
    from pst_timm.utils.files import read_csv

    try:
        return {row['model']: float(row['top1']) for row in read_csv(path)}
    except (KeyError, ValueError) as e:
        raise PSTError(f'{path} must have the columns model and top1, a number ({e!r}).') from None


def _setting(args: argparse.Namespace) -> 'Setting':
    import torch

    from pst_timm.benchmark import Setting
    from pst_timm.utils.cost import check_image_memory
    from pst_timm.utils.devices import check_device

    device = check_device(args.device)
    sizes = {source.name: args.img_size or source.img_size for source in args.sources}
    if len(set(sizes.values())) > 1:
        found = ', '.join(f'{source} {size}' for source, size in sizes.items())
        raise PSTError(f'The models are for images of different sizes ({found} px): choose one with --img-size.')
    batch_size, img_size = args.batch_size or (2 if args.layers else 8), next(iter(sizes.values()), 0)
    check_image_memory(img_size, batch_size)
    return Setting(
        device=device,
        batch_size=batch_size,
        img_size=img_size,
        dtype=getattr(torch, args.dtype),
        reparam=args.reparam,
        compile=args.compile,
        channels_last=args.channels_last,
        train=args.train,
        topk=args.topk,
        fine_fusion=args.fine_fusion,
        repeats=args.repeats or (5 if args.quick else 20),
    )


def _measure(
        args: argparse.Namespace,
        setting: 'Setting',
        accuracy: Optional[Dict[str, float]],
) -> Tuple[List['Row'], 'Setting']:
    """The rows that were asked for, and how they were measured."""
    from dataclasses import replace

    from pst_timm import benchmark

    if args.kind == 'layers':
        fusions = [args.fine_fusion] if args.fine_fusion else ['gate', 'joint']
        cases = [(k, f) for k in ([0, 8] if args.topk is None else [args.topk]) for f in (fusions if k else ['gate'])]
        sizes = args.sizes or ([14, 40, 80] if args.quick else [14, 40, 80, 160])
        # the rows tell them
        setting = replace(setting, topk=None, fine_fusion=None)
        return benchmark.benchmark_layers(sizes, cases, setting=setting), setting
    if args.kind == 'parts':
        return benchmark.benchmark_parts(args.sources, setting), setting
    if args.kind == 'models':
        pairs = list(zip(args.sources, args.baselines or map(benchmark.plain_twin, args.sources)))
        return benchmark.benchmark_models(pairs, setting, accuracy), setting
    return benchmark.benchmark_figures(setting, quick=args.quick), benchmark.figures_setting(setting)


def _write(rows: Sequence['Row'], setting: 'Setting', folder: Path, name: str) -> None:
    from pst_timm.benchmark import plot
    from pst_timm.utils.files import write_csv, write_json

    write_csv(folder / f'{name}.csv', rows)
    write_json(folder / f'{name}.json', {'setting': setting.describe()})
    if name == 'benchmark':
        try:
            plot(rows, folder / f'{name}.png')
        except ImportError as e:
            print(f"No picture, {e}: pip install 'pst_timm[train]' brings what draws it.", file=sys.stderr)
    print(f'Written to {folder}/')
