"""Image-classification backbones with Pyramid Sparse Transformer fusion, registered with timm on import."""
from importlib import import_module
from typing import Any

from . import layers, models
from .models import ResNetPST, TrunkLoad, load_trunk, reparameterize
from .version import __version__

__all__ = ['ResNetPST', 'TrunkLoad', '__version__', 'hub', 'layers', 'load_trunk', 'models', 'reparameterize']


def __getattr__(name: str) -> Any:
    # loaded when asked for, so that the import stays light
    if name == 'hub':
        return import_module('.hub', __name__)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
