"""The architectures, registered with timm on import. They know the layers."""
from . import pruned  # noqa: F401, registered with timm
from .backbone_pst import BackbonePST, create_pst
from .fusion import PSTModel
from .inspection import Inspection, inspect_tokens
from .reparameterize import reparameterize
from .resnet_pst import ResNetPST
from .trunk import PRETRAINED_TRUNK, TrunkLoad, adopt_preprocessing, copy_trunk, pretrained_name

__all__ = [
    'PRETRAINED_TRUNK', 'BackbonePST', 'Inspection', 'PSTModel', 'ResNetPST', 'TrunkLoad', 'adopt_preprocessing',
    'copy_trunk', 'create_pst', 'inspect_tokens', 'pretrained_name', 'reparameterize',
]
