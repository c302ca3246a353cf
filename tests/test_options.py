"""Options hold their types and bounds however a plugin is made, and however often a field is declared anew."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Le
from pydantic import AllowInfNan

from gradleak import options, registry
from gradleak.attacks.inverting_gradients import InvertingGradients
from gradleak.defense import Defense
from gradleak.defenses.top_k import TopK
from gradleak.errors import GradleakError

PROBES: tuple[Any, ...] = (
    *(-(2**70), -5, -1, 0, 1, 2, 3, 10**6, 2**70, -0.5, 0.0, 0.3, 0.999, 1.0, 1.5, 1e300),
    *(math.nan, math.inf, -math.inf, True, False, None, "x", "1", "equal", [], [1], ["x"], [-1.0], {}, {"a": 1}),
)
"""Values tried on every option."""


@dataclass(frozen=True, kw_only=True)
class _Base(options.Options):
    share: Annotated[float, Gt(0), Le(1)] = 0.5
    steps: Annotated[int, Ge(1)] | None = None
    mode: Literal["a", "b"] = "a"
    parts: tuple[Annotated[float, Gt(0)], ...] = ()
    reach: Annotated[float, Gt(0), AllowInfNan()] = math.inf
    flag: bool = False


@dataclass(frozen=True, kw_only=True)
class _Derived(_Base):
    share: float = 0.25
    steps: int | None = 3
    mode: str = "b"  # type: ignore[assignment]
    parts: tuple[float, ...] = (1.0,)
    shifted: float = 0.0

    def __post_init__(self) -> None:
        if self.shifted > self.share:
            raise GradleakError("shifted is above share")


def _plugins() -> list[tuple[str, type[Any]]]:
    return [(f"{g}/{name}", registry.load(g, name)) for g in registry.GROUPS for name in registry.names(g)]


def _accepts(cls: type[Any], name: str, value: Any) -> bool:
    try:
        options.check(cls, {name: value}, "")
    except GradleakError:
        return False
    return True


@pytest.mark.parametrize(
    "wrong",
    [
        *({"share": value} for value in (0, -0.1, 1.5, math.nan, math.inf, True, "0.5", None)),
        *({"steps": value} for value in (0, -3, 2.5, True, "3", 2**63)),
        *({"parts": value} for value in ((0.0,), (1.0, -1.0), (math.nan,), 1.0)),
        *({"flag": value} for value in ("yes", 1, None)),
        {"mode": "c"},
        {"reach": -1.0},
        {"shifted": math.nan},
        {"shifted": 0.3},
    ],
)
def test_a_wrong_value_is_refused_in_one_line(wrong: dict[str, Any]) -> None:
    with pytest.raises(GradleakError) as made:
        _Derived(**wrong)
    with pytest.raises(GradleakError) as replaced:
        dataclasses.replace(_Derived(), **wrong)
    assert str(made.value) == str(replaced.value)
    assert "\n" not in str(made.value) and next(iter(wrong)) in str(made.value)


def test_right_values_become_their_declared_types() -> None:
    made = _Derived(share=1, steps=5, parts=[1, 2], reach=math.inf)  # type: ignore[arg-type]
    assert made == _Derived(share=1.0, steps=5, parts=(1.0, 2.0))
    assert type(made.share) is float and type(made.parts) is tuple
    assert _Derived(steps=None).steps is None


@pytest.mark.parametrize("wrong", [{"lr": -0.1}, {"iterations": 0}, {"tv": math.nan}, {"lr": True}, {"restarts": "2"}])
def test_construction_and_suites_refuse_alike(wrong: dict[str, Any]) -> None:
    with pytest.raises(GradleakError) as made:
        InvertingGradients(**wrong)
    with pytest.raises(GradleakError) as replaced:
        dataclasses.replace(InvertingGradients(), **wrong)
    with pytest.raises(GradleakError) as built:
        registry.build("attacks", "inverting-gradients", wrong)
    reason = str(made.value).removeprefix("InvertingGradients")
    assert str(replaced.value).endswith(reason) and str(built.value) == f"attack 'inverting-gradients'{reason}"


def test_a_plugin_of_ones_own_keeps_the_bounds() -> None:
    @dataclass(frozen=True, kw_only=True)
    class _Denser(TopK):
        ratio: float = 0.9

    assert _Denser().ratio == 0.9
    with pytest.raises(GradleakError, match="ratio = 2"):
        _Denser(ratio=2)
    assert isinstance(_Denser(), Defense)


def test_no_option_is_looser_than_that_of_its_base() -> None:
    compared = 0
    for name, cls in _plugins():
        for base in cls.__mro__[1:]:
            if not dataclasses.is_dataclass(base):
                continue
            for field in dataclasses.fields(base):
                for value in PROBES:
                    looser = _accepts(cls, field.name, value) and not _accepts(base, field.name, value)
                    assert not looser, f"{name}: {field.name} = {value!r}"
                    compared += 1
    assert compared > 1000


def test_every_number_is_bounded_or_finite() -> None:
    numbers = 0
    for name, cls in _plugins():
        hints = typing.get_type_hints(cls, include_extras=True)
        for field in dataclasses.fields(cls):
            if "int" not in str(hints[field.name]) and "float" not in str(hints[field.name]):
                continue
            numbers += 1
            takes_flags = "bool" in str(hints[field.name])
            for value in (math.nan, math.inf, -math.inf, 2**70, *(() if takes_flags else (True, False))):
                if value == 2**70 and "float" in str(hints[field.name]):
                    continue
                assert not _accepts(cls, field.name, value), f"{name}: {field.name} = {value!r}"
    assert numbers > 100


def test_the_defaults_of_every_plugin_keep_its_bounds() -> None:
    for name, cls in _plugins():
        for field in dataclasses.fields(cls):
            if field.default is not dataclasses.MISSING:
                assert _accepts(cls, field.name, field.default), f"{name}: {field.name}"


def test_a_type_that_cannot_be_read_is_named() -> None:
    @dataclass(frozen=True, kw_only=True)
    class _Odd(options.Options):
        size: Missing = 1  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(GradleakError, match="_Odd: type of option 'size': NameError"):
        _Odd()
