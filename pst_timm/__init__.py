"""Image-classification backbones with Pyramid Sparse Transformer fusion, registered with timm on import."""
from importlib import import_module
from typing import Any

from . import layers, models
from .models import Inspection, ResNetPST, TrunkLoad, inspect_tokens, load_trunk, reparameterize
from .version import __version__

__all__ = [
    'Inspection', 'ResNetPST', 'TrunkLoad', '__version__', 'hub', 'inspect_tokens', 'layers', 'load_trunk', 'models',
    'publish', 'register_weights', 'reparameterize',
]
# loaded when asked for, so that the import stays light
_FROM_HUB = ('publish', 'register_weights')


def __getattr__(name: str) -> Any:
    if name == 'hub':
        return import_module('.hub', __name__)
    if name in _FROM_HUB:
        return getattr(import_module('.hub', __name__), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
