"""What an attack is written with: the contract, and the template that optimisation attacks fill in."""

from .reconstruction import Attack, Reconstruction
from .search.gradient_matching import GradientMatching, single_step

__all__ = ["Attack", "GradientMatching", "Reconstruction", "single_step"]
