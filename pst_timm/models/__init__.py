"""The architectures, registered with timm on import. They know the layers."""
from .inspection import Inspection, inspect_tokens
from .reparameterize import reparameterize
from .resnet_pst import ResNetPST
from .trunk import TrunkLoad, copy_trunk

__all__ = ['Inspection', 'ResNetPST', 'TrunkLoad', 'copy_trunk', 'inspect_tokens', 'reparameterize']
