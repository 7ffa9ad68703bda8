"""Training and evaluation of any timm model. The engine knows timm's factories by name and no model of ours."""
from pst_timm.utils.errors import Interrupted, PSTError

from .args import parse_train_args, parse_validate_args, train_args, validate_args
from .training import TrainResult, train
from .validation import validate, write_results

EngineError = PSTError  # its name before there was one root of errors

__all__ = [
    'EngineError',
    'Interrupted',
    'PSTError',
    'TrainResult',
    'parse_train_args',
    'parse_validate_args',
    'train',
    'train_args',
    'validate',
    'validate_args',
    'write_results',
]
