"""Training and evaluation of any timm model. The engine knows timm's factories by name and no model of ours."""
from .args import parse_train_args, parse_validate_args, train_args, validate_args
from .errors import EngineError, Interrupted
from .training import TrainResult, train
from .validation import validate, write_results

__all__ = [
    'EngineError',
    'Interrupted',
    'TrainResult',
    'parse_train_args',
    'parse_validate_args',
    'train',
    'train_args',
    'validate',
    'validate_args',
    'write_results',
]
