"""gradleak: which defense stops which gradient inversion attack, and at what cost.

`attack` answers one captured update, `audit` tries a training of one's own, `read` opens what was measured. All of it
is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .auditing import Audit, audit
    from .captured import Captured, attack
    from .client import Client
    from .errors import GradleakError
    from .reading import read
    from .reconstruction import Reconstruction
    from .threat import Observation
    from .update import LocalTraining

__version__ = "0.1.0"

__all__ = [
    "Audit",
    "Captured",
    "Client",
    "GradleakError",
    "LocalTraining",
    "Observation",
    "Reconstruction",
    "__version__",
    "attack",
    "audit",
    "read",
]

_HOMES = {
    "Audit": "auditing",
    "audit": "auditing",
    "Client": "client",
    "Captured": "captured",
    "GradleakError": "errors",
    "LocalTraining": "update",
    "Observation": "threat",
    "Reconstruction": "reconstruction",
    "read": "reading",
}
"""Modules of what is imported from here."""


def __getattr__(name: str) -> Any:
    if name == "attack":  # The module of that name, which can be called.
        return import_module(f"{__name__}.attack")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r} (it has {', '.join(__all__)})")
    found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
