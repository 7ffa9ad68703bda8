"""One door from a source (model name, hf-hub: name, folder, file) to a model. Knows the models."""
from .building import attention_settings, build_model, load_model
from .conversion import Conversion, convert
from .reading import Checkpoint, check_finite, read_checkpoint
from .trunk import TrunkLoad, load_trunk

__all__ = [
    'Checkpoint', 'Conversion', 'TrunkLoad', 'attention_settings', 'build_model', 'check_finite', 'convert',
    'load_model', 'load_trunk', 'read_checkpoint',
]
