"""Trained weights: read, convert, publish, and serve by name. It knows the models, not how they were trained."""
from .card import Accuracy, count_gmacs, model_card
from .checkpoint import Checkpoint, attention_settings, build_model, load_model, read_checkpoint
from .conversion import Conversion, convert
from .errors import HubError, HubUnavailable, did_you_mean
from .publishing import Publication, publish, save_folder
from .weights import register_weights

__all__ = [
    'Accuracy', 'Checkpoint', 'Conversion', 'HubError', 'HubUnavailable', 'Publication', 'attention_settings',
    'build_model', 'convert', 'count_gmacs', 'did_you_mean', 'load_model', 'model_card', 'publish',
    'read_checkpoint', 'register_weights', 'save_folder',
]
