"""What a verifier found of a bundle, kept beside it; boards say of each row how far it was checked. Imports no torch.

A record is worth as much as whoever wrote it: verify yourself what you want to rely on.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .. import __version__
from ..errors import GradleakError
from ..paths import written_whole
from .trust import Text

SUBMITTED, RECOMPUTED, RERUN = "as submitted", "recomputed", "re-run"
"""How far a cell was checked: not at all; all of it that needs no attack; the whole cell."""
STATES = (SUBMITTED, RECOMPUTED, RERUN)
"""From the least to the most."""
MOST = 2**26
"""Most bytes of a record."""


class _Found(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    check: Text
    ok: bool | None
    detail: str


class Record(BaseModel):
    """What was found of one bundle, by its SHA-256."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[1] = 1
    gradleak: Text = __version__
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    made: Text
    seed: int
    sample: int
    findings: list[_Found]
    cells: dict[Text, Literal["recomputed", "re-run"]]
    """By key; of others nothing was checked."""

    @property
    def ok(self) -> bool:
        """Whether nothing was found wrong."""
        return all(found.ok is not False for found in self.findings)


def path_of(bundle: Path) -> Path:
    """Return where the record of a bundle is: beside it."""
    return bundle.with_name(f"{bundle.name}.verified.json")


def write(
    bundle: Path, seed: int, sample: int, findings: list[tuple[str, bool | None, str]], cells: dict[str, str]
) -> Path:
    """Write what was found beside a bundle, over an earlier record; return where.

    Raises:
        GradleakError: it cannot be written.
    """
    record = Record(
        sha256=_sha256(bundle),
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=seed,
        sample=sample,
        findings=[_Found(check=check, ok=ok, detail=detail) for check, ok, detail in findings],
        cells=cells,  # type: ignore[arg-type]
    )
    path = path_of(bundle)
    try:
        with written_whole(path) as beside:
            beside.write_text(json.dumps(record.model_dump(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise GradleakError(f"record {path}: cannot be written: {error.strerror or error}") from error
    return path


def checked(bundle: Path) -> dict[str, str]:
    """Return how far the cells of a bundle were checked, by key; nothing without a record that found nothing wrong.

    Raises:
        GradleakError: the record is of another bundle, or is none.
    """
    path = path_of(bundle)
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MOST:
            raise ValueError("too large")
        record = Record.model_validate(json.loads(path.read_bytes()))
        digest = _sha256(bundle)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))[:60]
        raise GradleakError(f"record {path}: {place}: {first['msg'].lower()}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise GradleakError(f"record {path}: cannot be read: {' '.join(str(error).split())[:200]}") from error
    if record.sha256 != digest:
        raise GradleakError(f"record {path}: is of another bundle; verify this one, or remove the record")
    return dict(record.cells) if record.ok else {}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
