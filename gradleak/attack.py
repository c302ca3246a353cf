"""What an attack is written with: the contract, and the template that optimisation attacks fill in.

Called, `gradleak.attack(observation, …)` attacks: see `gradleak.captured.attack`.
"""

import sys
from types import ModuleType
from typing import Any

from .captured import attack as _attack
from .reconstruction import Attack, Reconstruction
from .search.gradient_matching import GradientMatching, single_step

__all__ = ["Attack", "GradientMatching", "Reconstruction", "single_step"]


class _Callable(ModuleType):
    """This module under the name of what it is called for: `from gradleak import attack` is both."""

    __call__ = staticmethod(_attack)
    __wrapped__: Any = staticmethod(_attack)


sys.modules[__name__].__class__ = _Callable
