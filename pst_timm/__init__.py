"""Image-classification backbones with Pyramid Sparse Transformer fusion, registered with timm on import."""
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from .version import __version__

# the room that each public name comes from; loaded when it is asked for
_ROOMS = {
    'Inspection': 'models', 'ResNetPST': 'models', 'TrunkLoad': 'models', 'inspect_tokens': 'models',
    'reparameterize': 'models', 'load_model': 'checkpoints', 'load_trunk': 'checkpoints', 'publish': 'hub',
    'register_weights': 'hub',
}
_SUBPACKAGES = ('checkpoints', 'engine', 'hub', 'layers', 'models')

__all__ = [*_ROOMS, *_SUBPACKAGES, '__version__']


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return import_module(f'.{name}', __name__)
    if name in _ROOMS:
        return getattr(import_module(f'.{_ROOMS[name]}', __name__), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


# the command line loads what its command needs, so that its help does not wait for torch
if not Path(sys.argv[0] if sys.argv else '').stem.startswith('pst-timm') and sys.argv[:1] != ['-m']:
    from . import models  # noqa: F401
