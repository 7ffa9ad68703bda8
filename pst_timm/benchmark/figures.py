"""The project's headline figures, each with its target."""
from dataclasses import replace
from typing import Callable, List, NamedTuple, Tuple

from pst_timm.utils.progress import Steps, duration
from pst_timm.utils.timing import median_ratio, time_in_turn

from .attention import attention_memory, compare_attention
from .models import build, compare_models, make_call, plain_twin
from .setting import WARMUP, Row, Setting, Tick

__all__ = ['FIGURES', 'Figure', 'benchmark_figures', 'figures_setting']

Measure = Callable[[Setting, Tick], Tuple[float, str]]


class Figure(NamedTuple):
    """A figure and what it should be."""
    name: str
    """With `{}` for what is only known with the value."""
    target: float
    at_least: bool
    seconds: float
    """Of a round on two idle cores, to tell how long all takes."""
    quick: bool
    """Whether it belongs to the small set."""
    measure: Measure
    """From the setting, and what to call after each round, to the value and what fills the name."""


def figures_setting(setting: Setting) -> Setting:
    """A setting with the batch size, folding and layout that the targets are stated for."""
    return replace(
        setting, batch_size=8, img_size=224, reparam=True, channels_last=True, train=False, compile=False, topk=None,
        fine_fusion=None)


def _attention_speed(size: int, topk: int, fusion: str, batch_size: int) -> Measure:
    def measure(setting: Setting, tick: Tick) -> Tuple[float, str]:
        row = compare_attention(size, topk, fusion, replace(setting, batch_size=batch_size), tick=tick)
        return row['speedup'], ''
    return measure


def _memory_growth(setting: Setting, tick: Tick) -> Tuple[float, str]:
    small, large = (attention_memory(size, 8, 'gate', replace(setting, batch_size=2)) for size in (40, 160))
    return large / small, ''


def _latency(name: str) -> Measure:
    def measure(setting: Setting, tick: Tick) -> Tuple[float, str]:
        row = compare_models(name, plain_twin(name), setting, tick)[1]
        return row['latency_ratio'], f' (MACs: {row["macs_ratio"]:.3f})'
    return measure


def _fine_over_coarse(setting: Setting, tick: Tick) -> Tuple[float, str]:
    settings = {'coarse': setting, 'fine': replace(setting, topk=8, fine_fusion='joint')}
    calls = {key: make_call(build('resnet50_pst', chosen), chosen) for key, chosen in settings.items()}
    times = time_in_turn(calls, setting.repeats, WARMUP, tick, setting.device)
    return median_ratio(times['fine'], times['coarse']), ''


def _training_step(setting: Setting, tick: Tick) -> Tuple[float, str]:
    row = compare_models('resnet50_pst', 'resnet50', replace(setting, reparam=False, train=True), tick)[1]
    return row['latency_ratio'], ''


FIGURES = (
    Figure('attention 80x80 over 40x40, coarse: times faster than the plain formula', 4, True, 0.43, True,
           _attention_speed(80, 0, 'gate', 2)),
    Figure('attention 80x80 over 40x40, k = 8: times faster than the plain formula', 4, True, 0.46, True,
           _attention_speed(80, 8, 'gate', 2)),
    Figure('attention 14x14 over 7x7, k = 8 gate: times faster than the plain formula', 2, True, 0.01, True,
           _attention_speed(14, 8, 'gate', 8)),
    Figure('attention 14x14 over 7x7, k = 8 joint: times faster than the plain formula', 2, True, 0.01, True,
           _attention_speed(14, 8, 'joint', 8)),
    Figure('attention, peak memory from 40x40 to 160x160: times', 18, False, 0.15, True, _memory_growth),
    Figure('resnet50_pst over resnet50: latency{}', 1.07, False, 0.4, True, _latency('resnet50_pst')),
    Figure('resnet18_pst over resnet18: latency{}', 1.09, False, 0.15, True, _latency('resnet18_pst')),
    Figure('resnet101_pst over resnet101: latency{}', 1.09, False, 0.75, False, _latency('resnet101_pst')),
    Figure('resnet50_pst, k = 8 joint over coarse: latency', 1.02, False, 0.4, True, _fine_over_coarse),
    Figure('resnet50_pst over resnet50: training step', 1.08, False, 1.4, False, _training_step),
)


def benchmark_figures(setting: Setting, progress: bool = True, quick: bool = False) -> List[Row]:
    """The project's headline figures on this machine, each a ratio of medians measured in turn.

    Args:
        setting: Device, dtype and repeats; the rest is what the targets are stated for, see `figures_setting`.
        progress: Say how far it is and what comes out, on standard error.
        quick: Measure the small set alone.

    Returns:
        A row for each figure: its name, the target, the measured value and whether it is met.
    """
    setting = figures_setting(setting)
    chosen = [figure for figure in FIGURES if figure.quick or not quick]
    rows = []
    # building, counting and the memory take as long as some rounds do
    costs = [figure.seconds * (setting.rounds + 6) for figure in chosen]
    with Steps('benchmark', costs, progress) as steps:
        steps.say(
            f'{len(chosen)} figures of {setting.repeats} rounds: about {duration(sum(costs))} on two idle cores, more '
            f'on a busy machine.')
        for figure in chosen:
            value, known = figure.measure(setting, steps.ticks(setting.rounds))
            met = value >= figure.target if figure.at_least else value <= figure.target
            rows.append({
                'figure': figure.name.format(known),
                'target': f'{">=" if figure.at_least else "<="} {figure.target:g}',
                'measured': value,
                'met': 'yes' if met else 'no',
            })
            steps.done(f'{rows[-1]["figure"]}: {value:.3f} (target {rows[-1]["target"]})')
    return rows
