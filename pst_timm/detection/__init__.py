"""Object detection: torchvision's FCOS and RetinaNet over PST pyramids, trained by the ordinary engine."""
from importlib import import_module
from typing import Any

# the module that each name comes from; loaded when it is asked for, so that the flags do not wait for torch
_MODULES = {
    'Detector': 'models', 'create_detector': 'models', 'open_detector': 'checkpoint', 'train': 'job',
    'train_args': 'flags', 'validate': 'validation', 'validate_args': 'flags',
}

__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f'.{_MODULES[name]}', __name__), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
