"""One door from a source (model name, hf-hub: name, folder, file) to a model. Knows the models."""
from pst_timm.utils.fitting import load_weights

from .building import (
    build_model,
    create_model,
    load_model,
    open_checkpoint,
    preprocessing,
    temperature_of,
)
from .conversion import Conversion, convert
from .facts import attention_settings, inference_settings, set_attention
from .labels import label_names, readable_names
from .reading import Checkpoint, check_finite, read_checkpoint
from .trunk import load_trunk

__all__ = [
    'Checkpoint', 'Conversion', 'attention_settings', 'build_model', 'check_finite', 'convert',
    'create_model', 'inference_settings', 'label_names', 'load_model', 'load_trunk', 'load_weights', 'open_checkpoint',
    'preprocessing', 'read_checkpoint', 'readable_names', 'set_attention', 'temperature_of',
]
