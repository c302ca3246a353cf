"""Options of an attack, searched on tuning victims: the space, the trials, and the record of both."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import platform
import tempfile
import time
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml

from .. import __version__, registry, suite
from ..board import results
from ..board.flags import BUDGET
from ..board.store import Store
from ..errors import GradleakError, unknown
from ..scales import CAP, METRICS
from ..suite.document import load
from . import runner
from .executors import Executor
from .workshop import Resources

Value = float | int | bool | str
"""What an option that is searched may be."""

_WIDE = 10.0
"""A range whose ends differ by this factor is searched by magnitude; a default is varied by it both ways."""
_FEW = 4
"""The same of integers."""


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    whole: bool = False
    """Integers only."""

    @property
    def by_magnitude(self) -> bool:
        """Whether logarithms are drawn evenly, not numbers."""
        return self.low > 0 and self.high / self.low >= (_FEW if self.whole else _WIDE)

    def ends(self) -> tuple[Value, ...]:
        """Return what has to be allowed for all of it to be."""
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}"


@dataclass(frozen=True)
class Choice:
    """One of a few values."""

    values: tuple[Value, ...]

    def ends(self) -> tuple[Value, ...]:
        """Return all of them."""
        return self.values

    def __str__(self) -> str:
        return ",".join(map(str, self.values))


Space = Mapping[str, Range | Choice]
"""What is searched, by option."""


@dataclass(frozen=True)
class Trial:
    """Options, and what they are worth."""

    options: Mapping[str, Value]
    value: float
    seconds: float


@dataclass(frozen=True)
class Record:
    """A search: everything that it takes to repeat it, and to say how an attack's defaults were found."""

    attack: str
    code: str
    """Digest of the attack's code."""
    suite: Mapping[str, Any]
    """Name, version and SHA-256 of the file."""
    victims: int
    contexts: str
    """Datasets, models and defenses, in words."""
    objective: str
    space: Mapping[str, str]
    fixed: Mapping[str, Any]
    seed: int
    trials: Sequence[Trial]
    versions: Mapping[str, str] = field(
        default_factory=lambda: {
            "gradleak": __version__,
            "torch": torch.__version__,
            "optuna": version("optuna"),
            "python": platform.python_version(),
        }
    )

    @property
    def best(self) -> Trial:
        """The trial with the best value, the first of equals."""
        sign = 1 if METRICS[self.objective].higher_is_better else -1
        return max(self.trials, key=lambda trial: -math.inf if math.isnan(trial.value) else sign * trial.value)

    @property
    def tuning(self) -> str:
        """The line that an attack declares as `tuning`."""
        names = ", ".join(self.space)
        return f"{names}: {len(self.trials)} trials on {self.victims} tuning victims of {self.contexts}"

    def stored(self) -> dict[str, Any]:
        """Return it as plain data."""
        plain = dataclasses.asdict(self)
        return {**plain, "best": dataclasses.asdict(self.best), "tuning": self.tuning}


# The space


def space_of(attack: str, given: Mapping[str, Range | Choice], fixed: Mapping[str, Any]) -> Space:
    """Return what is searched: what is given, or else the attack's own options within their declared bounds.

    Args:
        attack: its name.
        given: ranges by option; empty for the attack's own options but those that only buy computation.
        fixed: options that are not searched.

    Raises:
        GradleakError: an option is unknown, a range reaches beyond what is allowed, or there is nothing to search.
    """
    cls = registry.load("attacks", attack)
    names = {item.name for item in dataclasses.fields(cls)}
    for name in given:
        if name not in names:
            raise unknown(f"option of attack {attack!r}", name, names, "--range")
        if name in fixed:
            raise GradleakError(f"--range {name}: is also given by --set")
    space = dict(given) or {name: found for name, found in _declared(cls) if name not in fixed}
    if not space:
        raise GradleakError(f"attack {attack!r} declares no option that can be searched; give --range NAME=LOW..HIGH")
    for name, searched in space.items():
        for value in searched.ends():
            registry.build("attacks", attack, {**fixed, name: value}, "--range")
    return space


def _declared(cls: type[Any]) -> Iterator[tuple[str, Range | Choice]]:
    """Yield what the class itself declares and a search can vary."""
    hints = typing.get_type_hints(cls, include_extras=True)
    own = vars(cls).get("__annotations__", {})
    for item in dataclasses.fields(cls):
        if item.name in own and item.name not in BUDGET and (found := _varied(hints[item.name], item.default)):
            yield item.name, found


def _varied(declared: Any, default: Any) -> Range | Choice | None:
    """Return how an option is varied about its default within its bounds; None for one that is no plain value."""
    marks: list[Any] = []
    if typing.get_origin(declared) is Annotated:
        declared, *marks = typing.get_args(declared)
    if typing.get_origin(declared) is Literal:
        return Choice(typing.get_args(declared))
    if isinstance(declared, types.UnionType) or isinstance(default, str) or default is None:
        return None
    if declared is bool:
        return Choice((False, True))
    if declared not in (int, float) or not isinstance(default, int | float) or default <= 0:
        return None
    factor = _FEW if declared is int else _WIDE
    low, high = _within(marks, default / factor, default * factor, default)
    if declared is int:
        low, high = math.ceil(low), math.floor(high)
    return Range(low, high, declared is int) if low < high else None


def _within(marks: Sequence[Any], low: float, high: float, default: float) -> tuple[float, float]:
    """Bring both ends inside the bounds; an open bound is kept away from."""
    for mark in marks:
        low = max(low, getattr(mark, "ge", low))
        high = min(high, getattr(mark, "le", high))
        if (bound := getattr(mark, "gt", None)) is not None and low <= bound:
            low = bound + (default - bound) / _WIDE
        if (bound := getattr(mark, "lt", None)) is not None and high >= bound:
            high = bound - (bound - default) / _WIDE
    return low, high


# The search


@dataclass(frozen=True)
class Bench:
    """Where trials are run."""

    suite: Path
    store: Path
    """Of all trials: what it has is not computed again."""
    executor: Executor
    resources: Resources
    plugins: Sequence[Path] = ()


def tune(
    attack: str,
    bench: Bench,
    space: Space,
    fixed: Mapping[str, Any],
    objective: str = "psnr",
    trials: int = 20,
    seed: int = 0,
    tell: Callable[[int, Trial], None] = lambda number, trial: None,
) -> Record:
    """Search options of an attack on the tuning victims of a suite; the first trial has its defaults.

    Args:
        attack: its name.
        bench: the suite, whose own attacks do not count, and where it is run.
        space: from `space_of`.
        fixed: further options.
        objective: a metric (`gradleak.scales`), whose mean over all true images counts; PSNR is capped first.
        trials: how many.
        seed: of the search (Optuna's tree-structured Parzen estimator).
        tell: called after each trial.

    Raises:
        GradleakError: the suite is not for tuning, Optuna is not installed, there is no such metric, or as
            `runner.run`.
    """
    optuna = _optuna()
    if objective not in METRICS:
        raise unknown("objective", objective, METRICS)
    chosen = suite.outline(bench.suite, added=[path.stem.replace("_", "-") for path in bench.plugins])
    if not chosen.tuning:
        raise GradleakError(f"suite {bench.suite}: attacks evaluation victims; tune on `tuning: true` and no other")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=seed),
        direction="maximize" if METRICS[objective].higher_is_better else "minimize",
    )
    defaults = registry.options_of(registry.build("attacks", attack, fixed))
    study.enqueue_trial({name: defaults[name] for name in space})
    found: list[Trial] = []
    for number in range(trials):
        asked = study.ask()
        options = {name: _suggest(asked, name, searched) for name, searched in space.items()}
        started = time.monotonic()
        value = _worth(attack, bench, {**fixed, **options}, objective)
        if math.isnan(value):
            study.tell(asked, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(asked, value)
        found.append(Trial(options, value, time.monotonic() - started))
        tell(number, found[-1])
    if all(math.isnan(trial.value) for trial in found):
        raise GradleakError(f"--objective {objective}: was measured in no trial")
    about = {"name": chosen.name, "version": chosen.version, "sha256": _sha256(bench.suite)}
    plain = {name: str(searched) for name, searched in space.items()}
    code = registry.fingerprint("attacks", attack)
    return Record(
        attack, code, about, chosen.victims, _contexts(chosen), objective, plain, dict(fixed), seed, tuple(found)
    )


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise GradleakError("`gradleak tune` needs Optuna: pip install 'gradleak[tune]'") from error
    return optuna


def _suggest(trial: Any, name: str, searched: Range | Choice) -> Value:
    value: Value
    if isinstance(searched, Choice):
        value = trial.suggest_categorical(name, searched.values)
    elif searched.whole:
        value = trial.suggest_int(name, int(searched.low), int(searched.high), log=searched.by_magnitude)
    else:
        value = trial.suggest_float(name, searched.low, searched.high, log=searched.by_magnitude)
    return value


def _worth(attack: str, bench: Bench, options: Mapping[str, Any], objective: str) -> float:
    """Run the suite with one attack with these options; return the mean over all true images, failures at their score.

    Raises:
        GradleakError: as `runner.run`, or cells could not be computed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / bench.suite.name
        path.write_text(yaml.safe_dump(_with_attack(bench.suite, attack, options)), encoding="utf-8")
        summary = runner.run(path, bench.store, bench.executor, bench.resources, bench.plugins)
        if summary.interrupted:
            raise KeyboardInterrupt
        if summary.failed or summary.pending:
            title, reason = next(iter({**summary.failed, **summary.pending}.items()))
            raise GradleakError(f"{title}: {reason}")
        keys = {cell.key for cell in runner.plan(path, bench.store, bench.resources, bench.plugins).cells}
    with Store(bench.store) as store:
        rows = results.read(store, all_code=True).rows
    values = rows.loc[rows["key"].isin(keys), objective].astype(float)
    return float((values.clip(upper=CAP) if objective == "psnr" else values).mean())


def _with_attack(path: Path, attack: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a suite's content with one attack and no training; what the suite says of that attack stays."""
    content: dict[str, Any] = load(path, f"suite {path}")
    entry: dict[str, Any] = {"name": attack}
    for each in suite.Suite.model_validate(content).attacks:
        if each.name == attack:
            entry = each.model_dump(exclude_defaults=True)
            break
    entry["options"] = {**entry.get("options", {}), **options}
    entry.setdefault("label", attack)
    own = ("attacks", "budgets", "utility")
    contexts = [{key: value for key, value in each.items() if key not in own} for each in content.get("contexts", ())]
    one = {"attacks": [entry], "controls": "listed", "utility": None}
    return {**content, **({"contexts": contexts} if contexts else {}), **one}


def _contexts(chosen: suite.Suite) -> str:
    datasets, models, defenses = (
        ", ".join(dict.fromkeys(entry.name for _, grid in suite.grids(chosen) for entry in getattr(grid, axis)))
        for axis in ("datasets", "models", "defenses")
    )
    return f"{datasets} ({models}) under {defenses}"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
