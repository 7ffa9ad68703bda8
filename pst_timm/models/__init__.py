"""The architectures, registered with timm on import. They know the layers."""
from .inspection import Inspection, inspect_tokens
from .reparameterize import reparameterize
from .resnet_pst import ResNetPST

__all__ = ['Inspection', 'ResNetPST', 'inspect_tokens', 'reparameterize']
