"""The secret of a store, from which the private randomness of its clients is drawn. Imports no torch.

A suite is public, and so is what its seeds are derived from: whoever knows that must not be able to draw a client's
noise again. So each store draws a secret of its own; it is kept there, published with it, and never given to attacks.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass, field

from .errors import GradleakError

_FORM = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True)
class Secret:
    """A secret, or what is public of one: cells tell by its digest which they were drawn from."""

    digest: str
    _value: str = field(default="", repr=False, compare=False)

    @classmethod
    def of(cls, value: str, where: str = "secret") -> Secret:
        """Return the secret of a value.

        Raises:
            GradleakError: it is not 32 hexadecimal digits.
        """
        if not is_secret(value):
            raise GradleakError(f"{where}: {len(value)} characters; a secret is 32 hexadecimal digits (0-9, a-f)")
        return cls(hashlib.sha256(f"gradleak secret {value}".encode()).hexdigest()[:16], value)

    @property
    def value(self) -> str:
        """What randomness is derived from.

        Raises:
            GradleakError: only the digest is known.
        """
        if not self._value:
            raise GradleakError(f"the secret {self.digest}, which this cell was drawn from, is not here")
        return self._value


def is_secret(text: str) -> bool:
    """Whether a text has the form of a secret."""
    return bool(_FORM.fullmatch(text))


def draw() -> Secret:
    """Return a new secret, which nobody can guess."""
    return Secret.of(secrets.token_hex(16))
