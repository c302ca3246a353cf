"""Suites: a YAML file that spans a grid, validated, and expanded into cells with stable keys."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import yaml
from annotated_types import Ge, Gt, MinLen
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_serializer

from . import registry
from .errors import GradleakError, unknown
from .paths import RelativeFile
from .scales import METRICS

if TYPE_CHECKING:
    from .attack import Attack
    from .defense import Defense
    from .threat import Setting

KNOWLEDGE = ("oblivious", "parameters", "public", "oracle")
"""Levels of knowledge of the defense, weakest first (`gradleak.threat.Level`)."""

UTILITY = "utility"
"""What stands for the attack in a cell that trains a model under a defense, and attacks nobody."""

CORE = "1"
"""Raised whenever the engine, the client or the label rules change results."""

_AXES = ("datasets", "models", "settings", "defenses")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Entry(_Strict):
    """One plugin of a grid: `name`, `{name: {options}}`, or the long form with `label` and `only`."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    label: str = ""
    """What tables call it; by default the name with the options that were given."""
    only: dict[str, list[str]] = Field(default_factory=dict)
    """Restricts an attack or defense to labels of other axes, e.g. `{models: [mlp]}`."""
    optional: bool = False
    """An attack that is left out, instead of refused, where it cannot run or lacks knowledge."""

    @property
    def title(self) -> str:
        """The label, or one made of name and given options."""
        if self.label or not self.options:
            return self.label or self.name
        return f"{self.name}({', '.join(f'{key}={_short(value)}' for key, value in self.options.items())})"


def _width(value: Any) -> Any:
    if value != "auto" and not (type(value) is int and value >= 1):
        raise ValueError("a number of trials (1 or more), or auto")
    return value


class Engine(_Strict):
    """How attacks compute; part of the key, because it can change the last digits."""

    backend: str = "layerwise"
    """`auto` times what there is, once a machine: the last digits may differ between machines."""
    width: Annotated[int | Literal["auto"], BeforeValidator(_width)] = 32
    """Trials optimised together, at most; `auto`: as many as memory is measured to hold, which other machines need not
    repeat to the last digit."""
    compile: bool = False
    """Compile the backend `vmap` with torch, which takes a minute for every cell: for long attacks."""
    timeout: Annotated[float, Gt(0)] | None = None
    """Seconds an attack may take on one cell's victims; those not done are marked."""

    @model_serializer(mode="wrap")
    def _as_ever(self, plain: Callable[[Engine], dict[str, Any]]) -> dict[str, Any]:
        """Leave out what came later while it is not used: cells keep their keys."""
        return {key: value for key, value in plain(self).items() if key != "compile" or value}


def _entry(value: Any) -> Any:
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, dict) and len(value) == 1 and "name" not in value:
        name, options = next(iter(value.items()))
        return {"name": name, "options": options or {}}
    return value


def _several(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


Plugin = Annotated[Entry, BeforeValidator(_entry)]


class Prior(_Strict):
    """The generator that settings with `grants: {generator: true}` give to attacks: trained here, or a user's."""

    dataset: Plugin | None = None
    """Whose train split it learns; by default the cell's own, another is out of distribution."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Fields of `gradleak.training.priors.Recipe`."""
    source: str | None = None
    """`module:function` of a user's generator instead (`gradleak.search.generators.load_generator`)."""
    weights: RelativeFile | None = None
    """Its safetensors file, relative to the data root."""


class Utility(_Strict):
    """Federated training that shows what accuracy each defense leaves, on every dataset and model of the suite."""

    clients: Annotated[int, Ge(1)] = 10
    rounds: Annotated[int, Ge(1)] = 100
    batch_size: Annotated[int, Ge(1)] = 16
    """Images that a client takes in a round."""
    lr: Annotated[list[Annotated[float, Gt(0)]], MinLen(1), BeforeValidator(_several)] = [0.1, 0.3, 1.0]
    """Rates of the server to choose from, on images held out."""
    local_steps: Annotated[int, Ge(1)] = 1
    """Local steps of FedAvg; a FedSGD client (`local_lr` unset) takes one and sends its gradient."""
    local_batch_size: Annotated[int, Ge(1)] | None = None
    local_lr: Annotated[float, Gt(0)] | None = None
    seeds: Annotated[list[int], MinLen(1)] | None = None
    """By default the suite's."""

    VERSION: ClassVar[str] = "1"
    """Raised whenever training changes, so that old accuracies are not taken for new ones."""

    def setting(self, where: str = "") -> Setting:
        """Return how the clients train.

        Raises:
            GradleakError: values that do not fit each other.
        """
        keys = ("batch_size", "local_steps", "local_batch_size", "local_lr")
        return build_setting({"name": UTILITY, **{key: getattr(self, key) for key in keys}}, where)


Plugins = Annotated[list[Plugin], MinLen(1)]


class Suite(_Strict):
    """A grid: every attack against every defense on every model, dataset, setting and seed."""

    name: str
    version: int = 1
    description: str = ""
    victims: Annotated[int, Ge(1)] = 16
    """Victims (client batches) of every cell, the first of the dataset's frozen list."""
    tuning: bool = False
    """Attack the tuning victims instead, which no published table shows."""
    seeds: Annotated[list[int], MinLen(1)] = [0]
    """Each draws a model, a round and the attack's randomness anew."""
    candidates: Annotated[int, Ge(2)] = 100
    """Images among which re-identification must find the true one."""
    knowledge: Annotated[list[str], MinLen(1)] = ["oblivious", "public"]
    engine: Engine = Engine()
    prior: Prior = Prior()
    utility: Utility | None = None
    """Unset, no model is trained under the defenses."""
    datasets: Plugins
    models: Plugins
    settings: Annotated[list[dict[str, Any]], MinLen(1)] = [{}]
    attacks: Plugins
    defenses: Plugins
    reported: list[dict[str, Any]] = []
    """Published numbers to stand beside these (see `gradleak.report.reproduction`); no part of any cell."""


@dataclass(frozen=True)
class Cell:
    """One point of a grid over its list of victims: a key, and everything that the key stands for."""

    key: str
    config: dict[str, Any]
    optional: bool = False
    """Whether it is left out where its attack cannot run on its model, instead of refused."""

    @property
    def title(self) -> str:
        """One line for progress and errors."""
        config = self.config
        parts = [config[axis]["label"] for axis in ("attack", "defense", "model", "dataset")]
        if not self.is_utility:
            parts += [config["setting"]["name"], config["knowledge"]]
        return " · ".join([*parts, f"seed {config['seed']}"])

    @property
    def is_utility(self) -> bool:
        """Whether it trains a model under the defense instead of attacking it."""
        return bool(self.config["attack"]["name"] == UTILITY)


Digest = Callable[[str, Mapping[str, Any]], tuple[str, str]]
"""A dataset's name and options to its version and the hash of its images."""


def read(path: Path) -> Suite:
    """Return the suite of a YAML file with every name, option and label checked.

    Raises:
        GradleakError: one line with the file, the path in it, what was found and what is allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise GradleakError(f"suite {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise GradleakError(f"suite {path}: not a text file in UTF-8") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise GradleakError(f"suite {path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise GradleakError(f"suite {path}: expected keys and values, found {type(content).__name__}")
    for key in content:
        if key not in Suite.model_fields:
            raise unknown("key", str(key), Suite.model_fields, f"suite {path}")
    try:
        suite = Suite.model_validate(content)
    except ValidationError as error:
        raise GradleakError(f"suite {path}: {_first(error)}") from error
    suite = suite.model_copy(update={"attacks": _members(suite)})
    _check(suite, f"suite {path}")
    return suite


def build_defense(name: str, options: Mapping[str, Any], where: str = "") -> Defense:
    """Return a defense; `a + b` chains several, whose options are keyed by their names."""
    parts = [part.strip() for part in name.split("+")]
    if len(parts) == 1:
        defense: Defense = registry.build("defenses", name, options, where)
        return defense
    from .chain import Chain

    for key in options:
        if key not in parts:
            raise unknown(f"part of {name!r}", key, parts, where)
    chained: Defense = Chain(tuple(registry.build("defenses", part, options.get(part, {}), where) for part in parts))
    return chained


def build_setting(values: Mapping[str, Any], where: str = "") -> Setting:
    """Return a setting from plain values.

    Raises:
        GradleakError: a key or value is not allowed.
    """
    from .threat import Knowledge, Setting

    place = f"{where}: " if where else ""
    for cls, given in ((Setting, values), (Knowledge, values.get("grants") or {})):
        if not isinstance(given, Mapping):
            raise GradleakError(f"{place}grants: expected keys and values, found {given!r}")
        allowed = [field.name for field in dataclasses.fields(cls)]
        for key in given:
            if key not in allowed:
                raise unknown("key", str(key), allowed, where)
    try:
        setting = TypeAdapter(Setting).validate_python(dict(values))
    except ValidationError as error:
        raise GradleakError(f"{place}{_first(error)}") from error
    if setting.local_lr is None and (setting.local_steps > 1 or setting.local_batch_size is not None):
        raise GradleakError(f"{place}local_steps and local_batch_size need local_lr (FedAvg)")
    setting.local_training.batches(setting.batch_size)
    return setting


def expand(suite: Suite, digest: Digest, root: Path | None = None) -> list[Cell]:
    """Return every cell of the grid once, in a stable order, then the cells that measure utility.

    Levels of knowledge that make no difference (the attack or the defense ignores them) are one cell.

    Args:
        suite: what to expand.
        digest: reads the datasets.
        root: the data root, where a prior's weights are.

    Raises:
        GradleakError: no level of the suite's `knowledge` is enough for an attack, or a prior's weights are missing.
    """
    from .threat import Level

    attacks = [(entry, registry.build("attacks", entry.name, entry.options)) for entry in suite.attacks]
    defenses = [(entry, build_defense(entry.name, entry.options)) for entry in suite.defenses]
    settings = [build_setting(values) for values in suite.settings]
    datasets = [(entry, _dataset(entry, digest)) for entry in suite.datasets]
    models = [(entry, _plugin("models", entry)) for entry in suite.models]
    cells: dict[str, Cell] = {}
    grid = itertools.product(datasets, models, settings, suite.seeds, defenses, attacks)
    for (data_entry, dataset), (model_entry, model), setting, seed, (guard, defense), (entry, attack) in grid:
        here = {
            "datasets": data_entry.title,
            "models": model_entry.title,
            "settings": setting.name,
            "defenses": guard.title,
        }
        if not (_wanted(entry, here) and _wanted(guard, here)):
            continue
        for level in _levels(suite, attack, defense, entry.optional):
            if entry.optional and attack.needs.missing(dataclasses.replace(setting.grants, defense=Level(level))):
                continue
            config = {
                "attack": _plugin("attacks", entry),
                "defense": _guard(guard, defense),
                "model": model,
                "dataset": dataset,
                "setting": _plain(dataclasses.asdict(setting)),
                "knowledge": level,
                "victims": suite.victims,
                "tuning": suite.tuning,
                "candidates": suite.candidates,
                "seed": seed,
                "engine": suite.engine.model_dump(),
                "definitions": _definitions(),
                "suite": {"name": suite.name, "version": suite.version},
            }
            if attack.needs.generator and setting.grants.generator:
                config["prior"] = _prior(suite.prior, dataset, digest, root)
            cell = Cell(key_of(config), config, entry.optional)
            cells.setdefault(cell.key, cell)
    for config in _utilities(suite, datasets, models, defenses):
        cell = Cell(key_of(config), config)
        cells.setdefault(cell.key, cell)
    return list(cells.values())


def _utilities(
    suite: Suite,
    datasets: list[tuple[Entry, dict[str, Any]]],
    models: list[tuple[Entry, dict[str, Any]]],
    defenses: list[tuple[Entry, Defense]],
) -> Iterator[dict[str, Any]]:
    """Yield the configuration of every training under a defense that is wanted in any setting."""
    if suite.utility is None:
        return
    recipe = suite.utility.model_dump(exclude={"seeds"})
    setting = _plain(dataclasses.asdict(suite.utility.setting()))
    grid = itertools.product(datasets, models, suite.utility.seeds or suite.seeds, defenses)
    for (data_entry, dataset), (model_entry, model), seed, (guard, defense) in grid:
        here = {"datasets": data_entry.title, "models": model_entry.title, "defenses": guard.title}
        wanted = all(title in guard.only.get(axis, [title]) for axis, title in here.items())
        if defense.single_round or not wanted:
            continue
        yield {
            "attack": {"name": UTILITY, "label": UTILITY, "options": recipe, "version": Utility.VERSION},
            "defense": _guard(guard, defense),
            "model": model,
            "dataset": dataset,
            "setting": setting,
            "victims": 0,
            "seed": seed,
            "suite": {"name": suite.name, "version": suite.version},
        }


def _guard(entry: Entry, defense: Defense) -> dict[str, Any]:
    config = {"name": entry.name, "label": entry.title, "options": _defense_options(defense)}
    return {**config, "version": defense.version, **_file("defenses", entry.name)}


def _file(group: str, name: str) -> dict[str, str]:
    """Return the hash of the code that a plugin file brought, of all parts of a chain; nothing for other plugins."""
    codes = [registry.fingerprint(group, part.strip()) for part in name.split("+")]
    code = codes[0] if len(codes) == 1 else hashlib.sha256("+".join(codes).encode()).hexdigest()
    return {"file": code} if any(codes) else {}


def check_files(config: Mapping[str, Any]) -> None:
    """Refuse to compute a cell with other plugin files than those that it was made of.

    Raises:
        GradleakError: a file was changed, or another of the same name was given.
    """
    used = [(group, noun, config[noun]) for group, noun in registry.GROUPS.items()]
    if config.get("prior", {}).get("dataset"):
        used.append(("datasets", "dataset", config["prior"]["dataset"]))
    for group, noun, part in used:
        if part.get("file", "") != _file(group, part["name"]).get("file", ""):
            raise GradleakError(f"{noun} {part['name']!r}: its plugin file is not the one of this cell")


def key_of(config: Mapping[str, Any]) -> str:
    """Hash of a resolved configuration, without what only names it (labels, setting name, suite)."""
    return hashlib.sha256(json.dumps(unnamed(config), sort_keys=True).encode()).hexdigest()[:32]


def unnamed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a resolved configuration without labels, setting name and suite: all that a result may depend on."""
    kept = {key: value for key, value in config.items() if key != "suite"}
    for part, title in (*((axis, "label") for axis in ("attack", "defense", "model", "dataset")), ("setting", "name")):
        kept[part] = {key: value for key, value in kept[part].items() if key != title}
    return kept


def _check(suite: Suite, where: str) -> None:
    """Refuse wrong names, options, levels and `only` filters; builds every plugin once."""
    for axis in ("datasets", "models", "attacks", "defenses"):
        titles: set[str] = set()
        for index, entry in enumerate(getattr(suite, axis)):
            place = f"{where}: {axis}[{index}]"
            if axis == "defenses":
                build_defense(entry.name, entry.options, place)
            else:
                registry.build(axis, entry.name, entry.options, place)
            if entry.title in titles:
                raise GradleakError(f"{place}: {entry.title!r} is listed twice; give one a label")
            titles.add(entry.title)
    _check_prior(suite.prior, f"{where}: prior")
    if suite.utility is not None:
        suite.utility.setting(f"{where}: utility")
    names: set[str] = set()
    for index, values in enumerate(suite.settings):
        setting = build_setting(values, f"{where}: settings[{index}]")
        if setting.name in names:
            raise GradleakError(f"{where}: settings[{index}]: name {setting.name!r} is taken; settings need names")
        names.add(setting.name)
    for index, level in enumerate(suite.knowledge):
        if level not in KNOWLEDGE:
            raise unknown("level", level, KNOWLEDGE, f"{where}: knowledge[{index}]")
    titles_of = {axis: {entry.title for entry in getattr(suite, axis)} for axis in _AXES if axis != "settings"}
    titles_of["settings"] = names
    for axis in ("attacks", "defenses"):
        for index, entry in enumerate(getattr(suite, axis)):
            for key, wanted in entry.only.items():
                place = f"{where}: {axis}[{index}].only"
                if key not in _AXES:
                    raise unknown("axis", key, _AXES, place)
                for title in wanted:
                    if title not in titles_of[key]:
                        raise unknown(f"label of {key}", title, titles_of[key], f"{place}.{key}")
    attacks = [registry.build("attacks", entry.name, entry.options) for entry in suite.attacks]
    defenses = [build_defense(entry.name, entry.options) for entry in suite.defenses]
    for (index, attack), defense in itertools.product(enumerate(attacks), defenses):
        try:
            _levels(suite, attack, defense, suite.attacks[index].optional)
        except GradleakError as error:
            raise GradleakError(f"{where}: attacks[{index}]: {error}") from error


def _members(suite: Suite) -> list[Entry]:
    """Attacks of a suite, with the name of an ensemble (`auto-v1`) replaced by its members.

    Members are all attacks that declare it, and against each defense those it calls its counter-attacks. One that the
    suite lists by itself stays as it is listed.
    """
    listed = {entry.title for entry in suite.attacks}
    found: list[Entry] = []
    for entry in suite.attacks:
        names = registry.ensemble(entry.name)
        if not names or entry.name in registry.names("attacks"):
            found.append(entry)
            continue
        members = [Entry(name=name, only=entry.only, optional=True) for name in names]
        counters: dict[str, list[str]] = {}
        for guard in suite.defenses:
            for name in build_defense(guard.name, guard.options).counter_attacks:
                counters.setdefault(name, []).append(guard.title)
        for name, titles in counters.items():
            wanted = [title for title in titles if title in entry.only.get("defenses", titles)]
            if name not in names and name in registry.names("attacks"):
                members.append(Entry(name=name, only={**entry.only, "defenses": wanted}, optional=True))
        found += [member for member in members if member.title not in listed]
        listed |= {member.title for member in members}
    return found


def _levels(suite: Suite, attack: Attack, defense: Defense, optional: bool = False) -> list[str]:
    need = attack.needs.defense.value
    enough = [lvl for lvl in KNOWLEDGE if lvl in suite.knowledge and KNOWLEDGE.index(lvl) >= KNOWLEDGE.index(need)]
    if not enough and optional:
        return []
    if not enough:
        found = ", ".join(suite.knowledge)
        raise GradleakError(
            f"attack {type(attack).__name__} needs defense knowledge {need!r}; the suite's knowledge is [{found}]"
        )
    differs = attack.adaptive and attack.family != "control" and defense.is_adaptive_target
    return enough if differs else enough[:1]


def _wanted(entry: Entry, here: Mapping[str, str]) -> bool:
    return all(here[axis] in titles for axis, titles in entry.only.items())


def _plugin(group: str, entry: Entry) -> dict[str, Any]:
    plugin = registry.build(group, entry.name, entry.options)
    config = {"name": entry.name, "label": entry.title, "options": _plain(_chosen(plugin))}
    return {**config, "version": plugin.version, **_file(group, entry.name)}


def _chosen(plugin: Any) -> dict[str, Any]:
    """Every hyper-parameter but the `later` ones that are not used: cells keep the keys that they had before these."""
    unused = {
        field.name
        for field in dataclasses.fields(plugin)
        if field.metadata.get("later") and getattr(plugin, field.name) == field.default
    }
    return {name: value for name, value in registry.options_of(plugin).items() if name not in unused}


def _definitions() -> dict[str, Any]:
    """Versions of what every result depends on beside its plugins."""
    from .training.networks import RECIPE

    return {"core": CORE, "training": RECIPE, "metrics": sorted(metric.id for metric in METRICS.values())}


def _dataset(entry: Entry, digest: Digest) -> dict[str, Any]:
    config = _plugin("datasets", entry)
    version, value = digest(entry.name, config["options"])
    return {**config, "version": version, "digest": value}


def _prior(prior: Prior, dataset: dict[str, Any], digest: Digest, root: Path | None) -> dict[str, Any]:
    """Everything that decides a generator; of a user's, the hash of its weights."""
    if prior.source is not None:
        content, weights = b"", None
        if prior.weights is not None:
            path = (root or Path()) / prior.weights
            try:
                content, weights = path.read_bytes(), str(prior.weights)
            except OSError as error:
                raise GradleakError(f"prior: weights: no file {path} ({error.strerror}); see --data-root") from error
        return {"source": prior.source, "weights": weights, "digest": hashlib.sha256(content).hexdigest()}
    from .training.priors import Recipe

    recipe = _plain(dataclasses.asdict(Recipe(**prior.options)))
    return {"dataset": dataset if prior.dataset is None else _dataset(prior.dataset, digest), "options": recipe}


def _check_prior(prior: Prior, where: str) -> None:
    if prior.source is not None and (prior.dataset is not None or prior.options):
        raise GradleakError(f"{where}: source: a user's generator takes no dataset and no options")
    if prior.source is None and prior.weights is not None:
        raise GradleakError(f"{where}: weights: needs source, the module:function that builds the generator")
    if prior.dataset is not None:
        registry.build("datasets", prior.dataset.name, prior.dataset.options, f"{where}: dataset")
    if not prior.options:
        return
    from .training.priors import Recipe

    allowed = [field.name for field in dataclasses.fields(Recipe)]
    for key in prior.options:
        if key not in allowed:
            raise unknown("key", key, allowed, f"{where}: options")
    try:
        TypeAdapter(Recipe).validate_python(prior.options)
    except ValidationError as error:
        raise GradleakError(f"{where}: options: {_first(error)}") from error


def _defense_options(defense: Defense) -> Any:
    parts = getattr(defense, "defenses", None)
    if parts is None:
        return _plain(registry.options_of(defense))
    return [_plain(registry.options_of(part)) for part in parts]


def _plain(value: Any) -> Any:
    """Round-trip through JSON, so that a key does not depend on tuples, enums or paths."""
    return json.loads(json.dumps(value, default=str))


def _first(error: ValidationError) -> str:
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
    return text if len(text) <= 60 else f"{text[:57]}..."


def attack_and_defense(config: Mapping[str, Any]) -> tuple[Attack, Defense]:
    """Rebuild a cell's attack and defense from its configuration."""
    attack: Attack = registry.build("attacks", config["attack"]["name"], config["attack"]["options"])
    return attack, build_defense_of(config["defense"])


def build_defense_of(config: Mapping[str, Any]) -> Defense:
    """Rebuild a defense from a cell's `defense`."""
    name, options = config["name"], config["options"]
    if isinstance(options, list):
        parts = [part.strip() for part in name.split("+")]
        return build_defense(name, dict(zip(parts, options, strict=True)))
    return build_defense(name, options)
