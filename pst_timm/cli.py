"""The command line: a table of commands, each loaded when it is called."""
import sys
from importlib import import_module
from typing import Dict, List, NamedTuple, Optional, Sequence

from .utils.errors import did_you_mean
from .utils.streams import flush_output
from .version import __version__

__all__ = ['COMMANDS', 'Command', 'main']


class Command(NamedTuple):
    """A command: `main(argv) -> exit code` of a module in `pst_timm.commands`."""
    module: str
    help: str


COMMANDS: Dict[str, Command] = {
    'list': Command('list', 'the models of this package and the weights that come with it'),
    'train': Command('train', 'train a model'),
    'validate': Command('validate', 'evaluate models'),
    'predict': Command('predict', 'the classes of images, with probabilities'),
    'detect': Command('detect', 'train and use object detectors over a PST pyramid'),
    'audit': Command('audit', 'what is wrong with a folder of images: labels, copies, leakage'),
    'monitor': Command('monitor', 'notice when the images of a model in production have moved'),
    'compare': Command('compare', 'whether a new model may replace an old one'),
    'visualize': Command('visualize', 'draw what PST looks at in an image'),
    'export': Command('export', 'write a model for deployment'),
    'prune': Command('prune', 'cut channels out of a model, and train what is left'),
    'quantize': Command('quantize', 'write a model in int8 or bfloat16, and measure it'),
    'cascade': Command('cascade', 'a cheap model for most images, a dearer one for those it is not sure of'),
    'slim': Command('slim', 'make a model small and fast: prune, fine-tune, quantise, cascade'),
    'convert': Command('convert', 'training checkpoint to safetensors and back'),
    'publish': Command('publish', 'put a checkpoint on the Hub'),
    'benchmark': Command('benchmark', 'measure models and the attention on this machine'),
    'study': Command('study', 'train and evaluate a grid of models and seeds'),
    'report': Command('report', 'make the tables and plots of README and docs from results'),
}


def usage() -> str:
    """What `pst-timm --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f'  {name:{width}}  {command.help}' for name, command in COMMANDS.items()]
    return '\n'.join([
        'usage: pst-timm COMMAND [flags]', '', 'commands:', *lines, '',
        'pst-timm COMMAND --help tells the flags of a command, pst-timm --version the version.'])


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command; returns the exit code."""
    try:
        return _main(argv)
    finally:
        flush_output()


def _main(argv: Optional[Sequence[str]]) -> int:
    words: List[str] = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else ''
    if name in ('', '-h', '--help'):
        print(usage())
        return 0 if name else 2
    if name == '--version':
        print(f'pst-timm {__version__}')
        return 0
    if name not in COMMANDS:
        kind = 'flag' if name.startswith('-') else 'command'
        hint = did_you_mean(name, [*COMMANDS, '--help', '--version'])
        print(f'pst-timm: error: unknown {kind} {name!r}.{hint} See pst-timm --help.', file=sys.stderr)
        return 2
    return import_module(f'.commands.{COMMANDS[name].module}', __package__).main(words[1:])
