"""Trained weights on the Hub: cards, publishing, and weights served by name. Knows the checkpoints."""
from pst_timm.checkpoints import (
    Checkpoint,
    Conversion,
    attention_settings,
    build_model,
    convert,
    load_model,
    read_checkpoint,
)
from pst_timm.checkpoints.folder import save_folder
from pst_timm.utils.cost import count_gmacs
from pst_timm.utils.errors import PSTError, Unavailable, did_you_mean

from .card import Accuracy, model_card
from .publishing import Publication, publish
from .registry import register_weights

HubError, HubUnavailable = PSTError, Unavailable  # their names before there was one root of errors

__all__ = [
    'Accuracy', 'Checkpoint', 'Conversion', 'HubError', 'HubUnavailable', 'Publication', 'attention_settings',
    'build_model', 'convert', 'count_gmacs', 'did_you_mean', 'load_model', 'model_card', 'publish', 'read_checkpoint',
    'register_weights', 'save_folder',
]
