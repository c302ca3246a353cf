"""The settings of a suite, of their plain values and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from .. import registry
from ..errors import GradleakError, unknown
from ..options import check
from . import single
from .fields import LONGEST, Entry, first_mistake, short
from .parts import code_of, plain

if TYPE_CHECKING:
    from ..knowledge import Conduct
    from ..threat import Setting, Tampering

EPOCHS = "local_epochs"
"""Key of a setting that gives its local steps as a number of passes over the batch."""


def build_setting(values: Mapping[str, Any], where: str = "") -> Setting:
    """Return a setting from plain values.

    Raises:
        GradleakError: a key or value is not allowed.
    """
    from ..threat import Knowledge, Setting

    place = f"{where}: " if where else ""
    for cls, given in ((Setting, values), (Knowledge, values.get("grants") or {})):
        if isinstance(given, Mapping) and cls is Knowledge and "server" in given:
            raise GradleakError(f"{place}grants: server: is what the setting's `server` may do; name that instead")
        if not isinstance(given, Mapping):
            raise GradleakError(f"{place}grants: expected keys and values, found {given!r}")
        allowed = [field.name for field in dataclasses.fields(cls)]
        allowed += [EPOCHS] if cls is Setting else []
        for key in given:
            if key not in allowed:
                raise unknown("key", str(key), allowed, where)
    trainable = values.get("trainable", "all")
    if trainable not in ("all", "head") and not isinstance(trainable, list | tuple):
        raise GradleakError(f"{place}trainable: expected all, head or a list of names, found {short(trainable)}")
    plain = _with_steps(values, place)
    if "client" in plain:
        plain["client"] = _conduct(plain["client"], place)
    if "grants" in plain:
        plain["grants"] = Knowledge(**check(Knowledge, values.get("grants") or {}, f"{place}grants"))
    if "server" in plain:
        plain["server"] = tampering(plain["server"], where)
    checked = check(Setting, plain, where or "setting")
    name = checked.get("name", "default")
    if not (name and name.isprintable() and len(name) <= LONGEST):
        raise GradleakError(f"{place}name: one line of 1 to {LONGEST} characters is needed, found {short(repr(name))}")
    setting = Setting(**checked)
    if setting.local_lr is None and (setting.local_steps > 1 or setting.local_batch_size is not None):
        raise GradleakError(f"{place}local_steps and local_batch_size need local_lr (FedAvg)")
    if setting.statistics == "calibrated" and (setting.epochs or setting.after_rounds):
        raise GradleakError(f"{place}statistics: calibrated is of an untrained model; one that is trained has its own")
    _check_client(setting, place)
    try:
        setting.local_training.batches(setting.batch_size)
    except GradleakError as error:
        raise GradleakError(f"{place}{error}") from error
    return setting


def _with_steps(values: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return the values of a setting with `local_epochs` as the local steps that they take."""
    found = dict(values)
    if EPOCHS not in found:
        return found
    epochs, size = found.pop(EPOCHS), found.get("batch_size", 1)
    width = found.get("local_batch_size") or size
    if "local_steps" in found:
        raise GradleakError(f"{place}{EPOCHS} and local_steps say the same; write one of them")
    if any(type(number) is not int or number < 1 for number in (epochs, size, width)):
        raise GradleakError(f"{place}{EPOCHS}: whole numbers of epochs and images are needed, found {short(epochs)}")
    # A batch that the width does not divide is refused like any other.
    return {**found, "local_steps": epochs * max(1, size // width)}


def _conduct(value: Any, place: str) -> Conduct:
    """Return a client by `name`, `{name: {options}}`, or its stored form."""
    from ..knowledge import Conduct

    if isinstance(value, Conduct):
        return value
    if isinstance(value, Mapping) and "name" in value:
        name, options = value["name"], value.get("options") or {}
    elif isinstance(value, Mapping) and len(value) == 1:
        ((name, options),) = value.items()
    else:
        name, options = value, {}
    options = options or {}
    if not isinstance(name, str) or not isinstance(options, Mapping):
        raise GradleakError(f"{place}client: expected a name, or {{name: {{options}}}}, found {short(value)}")
    if not name:
        return Conduct()
    if isinstance(value, Mapping) and "version" in value and {"code", "file"} & set(value):
        known = {"code" if key == "file" else key: item for key, item in value.items()}  # `file` in older stores
        return Conduct(**check(Conduct, known, f"{place}client"))
    built = registry.build("clients", name, options, f"{place}client")
    known = plain(registry.options_of(built))
    return Conduct(name=name, options=known, version=built.version, code=code_of("clients", name, known))


def _check_client(setting: Setting, place: str) -> None:
    client = setting.trains
    if client.optimises and setting.local_lr is None:
        raise GradleakError(
            f"{place}client: {setting.client.name!r} takes local steps of its own; give local_lr (FedAvg)"
        )
    if setting.local_order == "shuffled" and setting.local_lr is None:
        raise GradleakError(f"{place}local_order: needs local_lr (FedAvg)")
    if client.forward != "float32" and setting.precision == "float64":
        raise GradleakError(f"{place}client: forward {client.forward!r} has no use for precision float64; leave it out")
    step = setting.local_batch_size or setting.batch_size
    if step % client.accumulation:
        raise GradleakError(
            f"{place}client: accumulation {client.accumulation} does not divide a step of {step} images"
        )


def stored_setting(setting: Setting) -> dict[str, Any]:
    """Return a setting as plain data."""
    unused = unused_of(setting)
    found = {name: value for name, value in plain(dataclasses.asdict(setting)).items() if name not in unused}
    # What the attacker may do follows from `server`; cells keep the keys that they had before.
    found["grants"].pop("server")
    return found


def tampering(given: Any, where: str = "") -> Tampering:
    """Return a setting's server: of a name, `{name: {options}}`, or a stored form.

    Raises:
        GradleakError: there is no such server, or an option has a wrong name, type or range.
    """
    from ..threat import Tampering

    place = f"{where}: server" if where else "server"
    if isinstance(given, Tampering):
        return given
    if isinstance(given, Mapping) and {"name", "version", "surface"} <= set(given):
        return Tampering(**check(Tampering, given, place))
    if not isinstance(given, str | Mapping):
        raise GradleakError(f"{place}: expected a name, or a name with options, found {short(given)}")
    try:
        entry = Entry.model_validate(single.entry(given))
    except ValidationError as error:
        raise GradleakError(f"{place}: {first_mistake(error)}") from error
    server = registry.build("servers", entry.name, entry.options, place)
    unused = unused_of(server)
    options = {name: value for name, value in registry.options_of(server).items() if name not in unused}
    if entry.name == Tampering().name:
        return Tampering()
    return Tampering(
        name=entry.name,
        options=plain(options),
        version=server.version,
        code=code_of("servers", entry.name, options),
        surface=server.surface,
    )


def unused_of(options: Any) -> set[str]:
    """Names of the `later` fields that have their defaults: cells keep the keys that they had before these."""
    return {
        field.name
        for field in dataclasses.fields(options)
        if field.metadata.get("later") and getattr(options, field.name) == field.default
    }
