"""Training and evaluation of any timm model. The engine knows timm's factories by name and no model of ours."""
from importlib import import_module
from typing import Any

from pst_timm.utils.errors import Interrupted, PSTError

EngineError = PSTError  # its name before there was one root of errors

# the module that each name comes from; loaded when it is asked for, so that the flags do not wait for torch
_MODULES = {
    'TrainResult': 'training', 'parse_train_args': 'args', 'parse_validate_args': 'args', 'train': 'training',
    'train_args': 'args', 'validate': 'validation', 'validate_args': 'args', 'write_results': 'validation',
}

__all__ = ['EngineError', 'Interrupted', 'PSTError', *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f'.{_MODULES[name]}', __name__), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
