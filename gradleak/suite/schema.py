"""Every key of a suite, its type and its bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from annotated_types import Ge, MinLen
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StrictBool,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ..errors import GradleakError
from ..options import count
from ..paths import RelativeFile
from .fields import Label, Plugin, Plugins, Positive, Rate, Seeds, Strict, Whole, no_path
from .settings import build_setting

if TYPE_CHECKING:
    from ..threat import Setting

UTILITY = "utility"
"""What stands for the attack in a cell that trains a model under a defense, and attacks nobody."""

HELD_OUT = 10
"""One in so many images of the train split is given to no client: on these the server's rate is chosen."""

KNOWLEDGE = ("oblivious", "parameters", "public", "oracle")
"""Levels of knowledge of the defense, weakest first (`gradleak.threat.Level`)."""

AXES = ("datasets", "models", "settings", "defenses")
"""What `only` restricts an entry to."""
ENTRIES = ("datasets", "models", "attacks", "defenses")
"""Axes of plugins."""


def _width(value: Any) -> Any:
    if value != "auto" and not (type(value) is int and 1 <= value < 2**63):
        raise ValueError("a number of trials (1 or more), or auto")
    return value


def _batch(value: Any) -> Any:
    if value != "setting" and not (type(value) is int and 1 <= value < 2**63):
        raise PydanticCustomError("batch", "Input should be a number of images (1 or more), or setting")
    return value


class Engine(Strict):
    """How attacks compute; part of the key, because it can change the last digits."""

    under: ClassVar[str] = "engine"

    backend: str = "layerwise"
    """`auto` times the backends once on each machine: the last digits may differ between machines."""
    width: Annotated[int | Literal["auto"], BeforeValidator(_width)] = 32
    """Trials optimised together, at most; `auto`: as many as memory is measured to hold, so the last digits may differ
    between machines."""
    timeout: Rate | None = None
    """Seconds an attack may take on one cell's victims; those not done are marked."""


def _several(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


class Prior(Strict):
    """The generator that settings with `grants: {generator: true}` give to attacks: trained here, or a user's."""

    under: ClassVar[str] = "prior"

    dataset: Plugin | None = None
    """Whose train split it learns; by default the cell's own, another is out of distribution."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Fields of `gradleak.training.priors.Recipe`."""
    source: str | None = None
    """`module:function` of a user's generator instead (`gradleak.search.generators.load_generator`)."""
    weights: RelativeFile | None = None
    """Its safetensors file, relative to the data root."""


class Utility(Strict):
    """Federated training that shows what accuracy each defense leaves, on every dataset and model of the suite."""

    under: ClassVar[str] = "utility"

    clients: Positive = 10
    rounds: Positive = 100
    batch_size: Annotated[int | Literal["setting"], BeforeValidator(_batch)] = "setting"
    """Images that a client takes in a round; `setting`: those and the local steps of each setting of the suite, so that
    the client that is attacked is the one whose accuracy is measured."""
    lr: Annotated[list[Rate], MinLen(1), BeforeValidator(_several)] = [0.1, 0.3, 1.0]
    """Rates of the server to choose from, on images held out."""
    local_steps: Positive = 1
    """Local steps of FedAvg; a FedSGD client (`local_lr` unset) takes one and sends its gradient."""
    local_batch_size: Positive | None = None
    local_lr: Rate | None = None
    trainable: Literal["all", "head"] | tuple[str, ...] = "all"
    """What the clients train and send; see `gradleak.threat.Setting`."""
    local_order: Literal["fixed", "shuffled"] = "fixed"
    client: Any = None
    """Loss and optimiser of the clients: a name, or `{name: {options}}`."""
    seeds: Seeds | None = None
    """By default the suite's."""

    @model_serializer(mode="wrap")
    def _as_ever(self, plain: Callable[[Utility], dict[str, Any]]) -> dict[str, Any]:
        """Leave out what came later while it is not used: cells keep their keys."""
        later = {"trainable": "all", "local_order": "fixed", "client": None}
        return {key: value for key, value in plain(self).items() if key not in later or value != later[key]}

    VERSION: ClassVar[str] = "1"
    """Raised whenever training changes, so that old accuracies are not taken for new ones."""

    _CLIENT: ClassVar[tuple[str, ...]] = (
        "batch_size",
        "local_steps",
        "local_batch_size",
        "local_lr",
        "trainable",
        "local_order",
        "client",
    )

    @property
    def batch(self) -> int:
        """The number of `batch_size`.

        Raises:
            GradleakError: it is left to the setting.
        """
        if self.batch_size == "setting":
            raise GradleakError("utility: batch_size is the setting's; say which with `at`")
        return self.batch_size

    def at(self, setting: Setting, where: str = "") -> Utility:
        """Return the recipe for the clients of a setting, if it leaves them to the setting; else itself.

        Raises:
            GradleakError: it leaves the batch to the setting, but not the local steps.
        """
        if self.batch_size != "setting":
            return self
        for key in self._CLIENT[1:]:
            if getattr(self, key) != type(self).model_fields[key].default:
                place = f"{where}: " if where else ""
                raise GradleakError(f"{place}{key}: is the setting's, as batch_size is; give batch_size a number")
        known = {key: getattr(setting, key) for key in self._CLIENT}
        client = setting.client
        known["client"] = {"name": client.name, "options": dict(client.options)} if client.name else None
        return self.model_copy(update=known)

    def part_size(self, images: int) -> int:
        """Return how many of a train split's images each client has."""
        return (images - images // HELD_OUT) // self.clients

    def batches_an_epoch(self, images: int) -> int:
        """Return in how many batches a client passes through its part of a train split."""
        return self.part_size(images) // self.batch

    def participations(self, images: int) -> int:
        """Return how many messages an example of a train split takes part in, at most."""
        return -(-self.rounds // max(1, self.batches_an_epoch(images)))

    def setting(self, where: str = "") -> Setting:
        """Return how the clients train.

        Raises:
            GradleakError: values that do not fit each other, or are left to the setting.
        """
        keys, _ = self._CLIENT, self.batch
        given = {key: getattr(self, key) for key in keys}
        return build_setting({"name": UTILITY, **given, "client": given["client"] or {"name": ""}}, where)


def _grants_no_defense(values: dict[str, Any]) -> dict[str, Any]:
    grants = values.get("grants")
    if isinstance(grants, Mapping) and "defense" in grants:
        allowed = ", ".join(KNOWLEDGE)
        raise PydanticCustomError(
            "grants",
            f"What is known of the defense is no grant of a setting; write `knowledge: [...]` of the suite ({allowed})",
        )
    return values


Victims = Annotated[int, Ge(1), BeforeValidator(count)]
Values = Annotated[dict[str, Any], AfterValidator(_grants_no_defense)]
"""A setting, as it is written (`build_setting`)."""


def _budget(value: Any) -> Any:
    return {"iterations": value} if type(value) is int else value


class Context(Strict):
    """One board of a suite: a dataset, a model and a setting, and what differs there from the rest of the suite."""

    under: ClassVar[str] = "contexts"

    dataset: Plugin
    model: Plugin
    setting: Values = {}
    """As one of `settings`."""
    victims: Victims | None = None
    """By default the suite's, as of all that follows."""
    seeds: Seeds | None = None
    knowledge: Annotated[list[str], MinLen(1)] | None = None
    utility: Utility | None = None
    """`null`: no model is trained here."""
    attacks: Plugins | None = None
    """Labels of entries that the suite's own list has, or entries of this context alone."""
    defenses: Plugins | None = None
    budgets: dict[str, Annotated[dict[str, Any], BeforeValidator(_budget)]] = {}
    """By label of an attack, one that an ensemble brings too: options that differ here. A number is that of
    `iterations`."""

    @property
    def titles(self) -> tuple[str, str, str]:
        """What tables call it: dataset, model and setting."""
        return self.dataset.title, self.model.title, str(self.setting.get("name", "default"))


class Suite(Strict):
    """A grid: every attack against every defense on every model, dataset, setting and seed.

    Of models, datasets and settings it is either all combinations (`models`, `datasets`, `settings`), or those that it
    lists (`contexts`).
    """

    name: Annotated[Label, MinLen(1), AfterValidator(no_path)]
    version: Whole = 1
    description: str = ""
    victims: Victims = 16
    """Victims (client batches) of every cell, the first of the dataset's frozen list."""
    tuning: StrictBool = False
    """Attack the tuning victims instead, which no published table shows."""
    seeds: Seeds = [0]
    """Each draws a model, a round and the attack's randomness anew."""
    candidates: Annotated[int, Ge(2), BeforeValidator(count)] = 100
    """Images among which re-identification must find the true one."""
    knowledge: Annotated[list[str], MinLen(1)] = ["oblivious", "public"]
    engine: Engine = Engine()
    prior: Prior = Prior()
    utility: Utility | None = None
    """Unset, no model is trained under the defenses."""
    controls: Literal["all", "listed"] = "all"
    """`all`: every control runs in every context whose grants allow it, whatever `only` says, and once a context where
    it reads no message; but for those that attack another victim, which have to be listed. `listed`: those that the
    suite lists, where it wants them; for tables of papers, which have rows of their own."""
    contexts: list[Context] = []
    """Each a dataset, a model and a setting of its own, run in this order; instead of the next three."""
    datasets: Plugins = []
    models: Plugins = []
    settings: Annotated[list[Values], MinLen(1)] = [{}]
    attacks: Plugins
    defenses: Plugins
    reported: list[dict[str, Any]] = []
    """Published numbers to stand beside these (see `gradleak.report.reproduction`); no part of any cell."""

<<<<<<< HEAD
    @model_validator(mode="after")
    def _either(self) -> Self:
        """Refuse a grid without datasets or models, and both ways of naming them at once."""
        for axis in ("datasets", "models", "settings"):
            given = axis in self.model_fields_set
            if self.contexts and given:
                raise PydanticCustomError("both", f"{axis}: every context names its own; leave this out")
            if not self.contexts and not given and axis != "settings":
                raise PydanticCustomError("neither", f"{axis}: field required, or contexts instead")
        return self
=======

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
        raise GradleakError(f"{place}trainable: expected all, head or a list of names, found {_short(trainable)}")
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
        raise GradleakError(f"{place}name: one line of 1 to {LONGEST} characters is needed, found {_short(repr(name))}")
    setting = Setting(**checked)
    if setting.local_lr is None and (setting.local_steps > 1 or setting.local_batch_size is not None):
        raise GradleakError(f"{place}local_steps and local_batch_size need local_lr (FedAvg)")
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
        raise GradleakError(f"{place}{EPOCHS}: whole numbers of epochs and images are needed, found {_short(epochs)}")
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
        raise GradleakError(f"{place}client: expected a name, or {{name: {{options}}}}, found {_short(value)}")
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
        raise GradleakError(f"{place}: expected a name, or a name with options, found {_short(given)}")
    try:
        entry = Entry.model_validate(_entry(given))
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


def first_mistake(error: ValidationError) -> str:
    """Say the first mistake of a validation: where, what was found, what is allowed."""
    first = error.errors()[0]
    path = ""
    for part in first["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    if first["type"] == "extra_forbidden":
        parts: dict[str, type[_Strict]] = {"engine": Engine, "prior": Prior, "utility": Utility}
        allowed = parts.get(str(first["loc"][0]), Entry)
        return str(unknown("key", str(first["loc"][-1]), allowed.model_fields, path.rpartition(".")[0]))
    found = "" if first["type"] == "missing" else f", found {_short(first['input'])}"
    return f"{path}: {first['msg'][0].lower()}{first['msg'][1:]}{found}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 60 else f"{text[:57]}..."
>>>>>>> main
