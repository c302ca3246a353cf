"""The backend for trials that share a model."""

from .backend import Layerwise

__all__ = ["Layerwise"]
