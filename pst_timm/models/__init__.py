"""The architectures, registered with timm on import. They know the layers."""
from .reparameterize import reparameterize
from .resnet_pst import ResNetPST
from .trunk import TrunkLoad, load_trunk

__all__ = ['ResNetPST', 'TrunkLoad', 'load_trunk', 'reparameterize']
