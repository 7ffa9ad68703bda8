"""Image-classification backbones with Pyramid Sparse Transformer fusion, registered with timm on import."""
from . import layers, models
from .models import ResNetPST, TrunkLoad, load_trunk, reparameterize
from .version import __version__

__all__ = ['ResNetPST', 'TrunkLoad', '__version__', 'layers', 'load_trunk', 'models', 'reparameterize']
