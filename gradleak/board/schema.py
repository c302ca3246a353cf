"""What a store keeps: its tables, one cell's result, one image's row. Plain data; the file itself is `store`'s."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

import numpy.typing as npt

from ..status import Status
from ..suite import dataset_label

SCHEMA = 2
"""Raised whenever the tables of results change; a store of another schema is refused, never converted in place."""

REFUSED = "refused"
"""The client looked at the model and sent nothing: no attack ended so, and none may say that it did."""
STATUSES = (*(state.value for state in Status), REFUSED)
"""What a row says of its victim; everything but `ok` is scored at the floor."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class ImageRow:
    """One true image of one victim: how it fared. What was not measured is None."""

    victim: int
    image: int
    status: str = "ok"
    """One of `STATUSES`."""
    matched: int | None = None
    """Index of the reconstruction that was assigned to this image."""
    finite: bool | None = None
    """Whether that reconstruction held only finite pixels."""
    mse: float | None = None
    psnr: float | None = None
    """dB."""
    ssim: float | None = None
    ms_ssim: float | None = None
    lpips: float | None = None
    lpips_64: float | None = None
    reidentified: bool | None = None
    label_correct: bool | None = None
    label_found: bool | None = None
    oracle_psnr: float | None = None
    """dB of the restart that the truth would have picked; a ceiling, never a headline."""
    loss: float | None = None
    """The attacker's loss at its answer, of the whole victim."""
    loss_at_truth: float | None = None
    """The attacker's loss at the true images, of the whole victim."""
    loss_at_mean: float | None = None
    """The attacker's loss at the mean public image, of the whole victim."""
    contrast: float | None = None
    """Cosine distance, in [0, 2], between the victim's undefended update and that of the mean public image."""
    message_norm: float | None = None
    """Euclidean norm of the victim's message."""
    late_progress: float | None = None
    """Share of the loss's fall that came in the last tenth of the iterations; from the trace if left out."""
    iterations: int | None = None
    gradient_evaluations: int | None = None
    seconds: float | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    """Anything else, as JSON."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Return a row of the known keys, all others as extras."""
        known = {item.name for item in fields(cls)} - {"extras"}
        row = {name: value for name, value in values.items() if name in known}
        return cls(**row, extras={name: value for name, value in values.items() if name not in known})


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """All that is kept of one cell; plain Python and NumPy."""

    key: str
    """Hash of the resolved configuration."""
    config: Mapping[str, Any]
    """The resolved choices: attack, defense, model, dataset, setting, knowledge, victims, seed and suite."""
    status: Literal["ok", "failed"] = "ok"
    error: str = ""
    """What went wrong, if the cell failed."""
    started: str = ""
    """ISO 8601, UTC."""
    seconds: float = 0.0
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What is known beside the configuration, as `Provenance.stored` says it."""
    rows: Sequence[ImageRow] = ()
    reconstructions: Mapping[int, Array] = field(default_factory=dict)
    """By victim, [B, C, H, W] in the order of the attack's answer (see `ImageRow.matched`)."""
    traces: Mapping[int, Array] = field(default_factory=dict)
    """By victim, the attacker's loss over its iterations, [T]."""


ROW_COLUMNS = tuple(item.name for item in fields(ImageRow))
TEXTS = ("status", "extras")
INTEGERS = ("victim", "image")
NUMBERS = tuple(name for name in ROW_COLUMNS if name not in TEXTS + INTEGERS)
"""Columns of measurements: numbers, or nothing where nothing was measured."""
_TABLES = f"""
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE cells (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, config TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('ok', 'failed')), error TEXT NOT NULL,
    started TEXT NOT NULL, seconds REAL NOT NULL, device TEXT NOT NULL,
    versions TEXT NOT NULL, provenance TEXT NOT NULL
);
CREATE TABLE rows (
    cell INTEGER NOT NULL REFERENCES cells (id) ON DELETE CASCADE,
    {", ".join(name + (" NOT NULL" if name in INTEGERS + TEXTS else "") for name in ROW_COLUMNS)},
    PRIMARY KEY (cell, victim, image)
) WITHOUT ROWID;
CREATE TABLE blobs (
    cell INTEGER NOT NULL REFERENCES cells (id) ON DELETE CASCADE,
    victim INTEGER NOT NULL, kind TEXT NOT NULL, shape TEXT NOT NULL, dtype TEXT NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (cell, victim, kind)
);
CREATE TABLE victims (
    list TEXT NOT NULL, victim INTEGER NOT NULL, labels TEXT NOT NULL,
    shape TEXT NOT NULL, dtype TEXT NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (list, victim)
);
"""

STATEMENTS = tuple(part.strip() for part in _TABLES.split(";\n") if part.strip())
"""What makes the tables of a new store."""
CLAIMS = "CREATE TABLE claims (key TEXT PRIMARY KEY, owner TEXT NOT NULL, beat REAL NOT NULL)"
"""Which run computes which cell now (`claims`); made by the first run, absent from bundles and older stores."""
LEFT_OUT = (
    "CREATE TABLE left_out (attack TEXT NOT NULL, defense TEXT NOT NULL, model TEXT NOT NULL, dataset TEXT NOT NULL,"
    " setting TEXT NOT NULL, knowledge TEXT NOT NULL, reason TEXT NOT NULL, chosen INTEGER NOT NULL,"
    " PRIMARY KEY (attack, defense, model, dataset, setting, knowledge)) WITHOUT ROWID"
)
"""What the grids of its suites leave out, by labels (`left_out`); made by the first run, absent from older stores."""
LEFT_OUT_COLUMNS = ("attack", "defense", "model", "dataset", "setting", "knowledge", "reason", "chosen")


def tables() -> dict[str, str]:
    """Return the statement that made each table of results, by name, as SQLite repeats it."""
    return {_name(statement): statement for statement in STATEMENTS}


def _name(statement: str) -> str:
    found = re.match(r"CREATE TABLE (\w+)", statement)
    assert found is not None
    return found[1]


def victim_list(config: Mapping[str, Any]) -> str:
    """Return the name of the list of victims that a cell attacks: dataset, its version and digest, images a victim.

    Cells with equal names attack the same images, victim by victim; tuning victims are a list of their own.
    """
    dataset = config["dataset"]
    purpose = "tuning" if config.get("tuning") else "evaluation"
    size = config["setting"].get("batch_size", 1)
    # The version is part of the seed that picks victims, whatever the images.
    return f"{dataset['name']}/{dataset.get('version', '')}/{dataset.get('digest', '')}/{purpose}/{size}"


DESCRIBED: dict[str, type] = {
    "attack": str,
    "attack_name": str,
    "attack_family": str,
    "defense": str,
    "defense_name": str,
    "defense_family": str,
    "model": str,
    "dataset": str,
    "setting": str,
    "knowledge": str,
    "batch_size": int,
    "victims": int,
    "seed": int,
    "suite": str,
    "suite_version": str,
    "server": str,
    "threat_class": str,
}


HONEST = "honest"
"""The server that sends the model as training left it."""


NAMED = ("attack", "defense", "model", "dataset", "setting")
"""Parts of a configuration that have a label, or as a setting a name of the user's."""


def names_of(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a part is only a label: plugins have a name of their own beside it."""
    return {"label": part["label"]} if "label" in part else {"name": part["name"]}


def server_of(config: Mapping[str, Any]) -> str:
    """Return the name of the server that sends a cell's model."""
    return str((config["setting"].get("server") or {}).get("name") or HONEST)


def threat_class(config: Mapping[str, Any]) -> str:
    """Return the class, A to H, of what the attacker of a cell may know and do.

    B knows model and message, C also the local training, D public images or a generator too, E statistics of the
    client's data; F chooses the model, G with public images. A, who does not know the model, and H, who also picks the
    clients, are nobody here. Reference: Carletti, Foggia, Mazzocca, Parrella, Vento, USENIX Security 2025.
    """
    grants = config["setting"].get("grants") or {}
    data = bool(grants.get("auxiliary") or grants.get("generator"))
    if server_of(config) != HONEST:
        return "G" if data else "F"
    if grants.get("batch_norm", "none") != "none" or grants.get("labels") == "counts":
        return "E"
    return "D" if data else "C" if grants.get("local_training") else "B"


def describe(config: Mapping[str, Any], provenance: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what `DESCRIBED` names."""
    part: dict[str, Mapping[str, Any]] = {group: config[group] for group in NAMED}
    label = {group: str(values.get("label") or values["name"]) for group, values in part.items()}
    suite = config.get("suite") or {}
    return (
        label["attack"],
        part["attack"]["name"],
        provenance.get("attack_family") or "",
        label["defense"],
        part["defense"]["name"],
        provenance.get("defense_family") or "",
        label["model"],
        dataset_label(label["dataset"], bool(config.get("tuning"))),
        label["setting"],
        config.get("knowledge") or "oblivious",
        part["setting"].get("batch_size", 1),
        config.get("victims", 0),
        config.get("seed", 0),
        suite.get("name", ""),
        str(suite.get("version", "")),
        server_of(config),
        threat_class(config),
    )
