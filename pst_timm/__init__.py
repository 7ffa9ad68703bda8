"""Image-classification backbones with Pyramid Sparse Transformer fusion, registered with timm on import."""
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, List

from .version import __version__

# the room that each public name comes from; loaded when it is asked for
_ROOMS = {
    'BackbonePST': 'models', 'Cascade': 'deploy', 'Inspection': 'models', 'PSTModel': 'models', 'ResNetPST': 'models',
    'TrunkLoad': 'models', 'create_pst': 'models', 'inspect_tokens': 'models', 'reparameterize': 'models',
    'load_model': 'checkpoints', 'load_trunk': 'checkpoints', 'publish': 'hub', 'register_weights': 'hub',
}
_SUBPACKAGES = (
    'benchmark', 'checkpoints', 'data', 'deploy', 'detection', 'engine', 'hub', 'layers', 'metrics', 'models', 'review',
    'study', 'utils', 'visualize')

__all__ = [*_ROOMS, *_SUBPACKAGES, '__version__']


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return import_module(f'.{name}', __name__)
    if name in _ROOMS:
        return getattr(import_module(f'.{_ROOMS[name]}', __name__), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> List[str]:
    return sorted({*globals(), *__all__})


def _is_the_command() -> bool:
    """Whether this process is `pst-timm`, `python -m pst_timm` or a script of the checkout; False where in doubt."""
    # train.py and validate.py say so; a worker that they spawn knows them as '__mp_main__'
    main = vars(sys.modules.get('__main__', sys))
    if main['__name__'] == '__main__' and '__pst_timm_command__' in main:
        return True
    words = getattr(sys, 'argv', [])
    # what the interpreter was told to run: the last of its words before those of the program
    told = sys.orig_argv[:max(len(sys.orig_argv) - len(words) + 1, 0)]
    if not words or not told:
        return False
    if words[0] == '-m':  # so it reads while Python looks for the module
        return told[-1] in (__name__, f'-m{__name__}')
    return told[-1] == words[0] and _is_entry_point(Path(words[0]))


def _is_entry_point(script: Path) -> bool:
    """Whether a script is the one that was installed for the command, and not a user's of that name."""
    from sysconfig import get_path, get_preferred_scheme

    folders = get_path('scripts'), get_path('scripts', get_preferred_scheme('user'))
    installed = [Path(folder, name) for folder in folders for name in ('pst-timm', 'pst-timm.exe')]
    try:
        return any(path.exists() and path.samefile(script) for path in installed)
    except OSError:  # no longer where it was started
        return False


# the command loads what it needs itself, so that its help does not wait for torch
if not _is_the_command():
    from . import models  # noqa: F401
