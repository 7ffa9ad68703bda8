"""From a trained model to a light one that ships. Knows the engine."""
from .cascade import Cascade

__all__ = ['Cascade']
