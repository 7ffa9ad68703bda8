"""Speed, memory and cost of models and of the attention, measured in turn. Knows checkpoints.

Times on a shared machine are noise: every figure is a median of rounds in which both sides run in turn, and is shown as
the ratio of the two.
"""
from .attention import benchmark_layers, plain_attention
from .figures import benchmark_figures, figures_setting
from .models import Source, benchmark_models, build, make_call, open_source, plain_twin
from .necks import benchmark_necks
from .parts import benchmark_parts
from .plot import plot
from .setting import Row, Setting

__all__ = [
    'Row',
    'Setting',
    'Source',
    'benchmark_figures',
    'benchmark_layers',
    'benchmark_models',
    'benchmark_necks',
    'benchmark_parts',
    'build',
    'figures_setting',
    'make_call',
    'open_source',
    'plain_attention',
    'plain_twin',
    'plot',
]
