"""Trained weights: read, convert, publish, and serve by name. It knows the models, not how they were trained."""
from .checkpoint import Checkpoint, attention_settings, build_model, load_model, read_checkpoint
from .conversion import Conversion, convert
from .errors import HubError, HubUnavailable
from .weights import register_weights

__all__ = [
    'Checkpoint', 'Conversion', 'HubError', 'HubUnavailable', 'attention_settings', 'build_model', 'convert',
    'load_model', 'read_checkpoint', 'register_weights',
]
