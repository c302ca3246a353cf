"""Hyper-parameters: fields of a dataclass whose types and bounds hold however an instance is made.

A field that a subclass declares anew keeps the bounds of all its earlier declarations: a value must satisfy each.
Numbers are finite unless a declaration says `AllowInfNan()`; text and true are no numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

from annotated_types import BaseMetadata
from pydantic import BeforeValidator, ConfigDict, InstanceOf, StrictBool, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import PydanticCustomError

from .errors import GradleakError
from .renamed import Renamed

_LIMIT = 2**63
"""Integers are below it in size: stores and generators of random numbers hold no others."""


class Options:
    """What plugins inherit from: every new instance is checked, before its own `__post_init__`.

    Raises:
        GradleakError: a value has a wrong type or is out of range.
    """

    renamed: typing.ClassVar[Mapping[str, Renamed]] = {}
    """Old names of options that are still taken."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        own = vars(cls).get("__post_init__")
        if own is not None:
            cls.__post_init__ = _after_the_check(own)  # type: ignore[method-assign, assignment]

    def __post_init__(self) -> None:
        """Check every field, and turn it into its declared type (a list into a tuple)."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        given = {field.name: getattr(self, field.name) for field in fields if hasattr(self, field.name)}
        for name, value in check(type(self), given, type(self).__name__).items():
            if value is not given[name]:
                object.__setattr__(self, name, value)


def _after_the_check(own: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(own)
    def checked(self: Any) -> None:
        Options.__post_init__(self)
        own(self)

    return checked


def check(cls: type[Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return values of some fields of a dataclass as their declared types.

    Raises:
        GradleakError: a value has a wrong type or is out of range; `where` opens the line.
    """
    checks: dict[str, tuple[TypeAdapter[Any], ...]] = _checks(cls)  # type: ignore[arg-type]
    return {name: _one(checks[name], name, value, where) for name, value in given.items()}


def _one(adapters: tuple[TypeAdapter[Any], ...], name: str, value: Any, where: str) -> Any:
    try:
        for adapter in adapters[1:]:
            adapter.validate_python(value)
        return adapters[0].validate_python(value)
    except ValidationError as error:
        first, *_ = found = error.errors()
        path = ".".join([name, *(str(part) for part in first["loc"] if isinstance(part, int))])
        raise GradleakError(f"{where}: {path} = {_short(first['input'])}: {_allowed(found)}") from None


def _allowed(found: list[Any]) -> str:
    """What the branches of a declaration allow, in one sentence."""
    first, *others = dict.fromkeys(str(each["msg"]) for each in found)
    return ", or ".join([first, *(other.removeprefix("Input should be ") for other in others)])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@functools.cache
def _checks(cls: type[Any]) -> dict[str, tuple[TypeAdapter[Any], ...]]:
    """Of every field, what checks it: its last declaration first."""
    return {
        field.name: tuple(_adapter(strict(declared)) for declared in _declarations(cls, field.name))
        for field in dataclasses.fields(cls)
    }


def _declarations(cls: type[Any], name: str) -> Iterator[Any]:
    seen: list[Any] = []
    for base in cls.__mro__:
        raw = inspect.get_annotations(base).get(name)
        if raw is None or not dataclasses.is_dataclass(base):
            continue
        declared = _resolved(base, name, raw)
        if declared not in seen:
            seen.append(declared)
            yield declared


def _resolved(base: type[Any], name: str, raw: Any) -> Any:
    holder = types.SimpleNamespace(__annotations__={name: raw})
    module = vars(sys.modules[base.__module__]) if base.__module__ in sys.modules else {}
    try:
        return typing.get_type_hints(holder, globalns=dict(module), include_extras=True)[name]
    except Exception as error:
        raise GradleakError(f"{base.__name__}: type of option {name!r}: {type(error).__name__}: {error}") from error


def _adapter(declared: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(declared, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # A type that brings a configuration of its own.
        return TypeAdapter(declared)


def _not_a_number(value: Any, kind: str) -> PydanticCustomError | None:
    if isinstance(value, bool | str):
        what = "true or false" if isinstance(value, bool) else "text"
        return PydanticCustomError("number", f"Input should be a valid {kind}, not {what}")
    return None


def count(value: Any) -> Any:
    """Refuse what only looks like an integer: true, and text."""
    if (wrong := _not_a_number(value, "integer")) is not None:
        raise wrong
    return value


def whole(value: Any) -> Any:
    """As `count`, and refuse integers that need more than 64 bits."""
    if isinstance(count(value), int) and not -_LIMIT <= value < _LIMIT:
        raise PydanticCustomError("integer", "Input should be an integer of at most 64 bits")
    return value


def finite(value: Any) -> Any:
    """Refuse what only looks like a number, and NaN and infinities."""
    value = number(value)
    try:
        wrong = isinstance(value, int | float) and not math.isfinite(value)
    except OverflowError:
        wrong = True
    if wrong:
        raise PydanticCustomError("finite", "Input should be a finite number")
    return value


def number(value: Any) -> Any:
    """Refuse what only looks like a number: true, and text."""
    if (wrong := _not_a_number(value, "number")) is not None:
        raise wrong
    return value


def strict(declared: Any) -> Any:
    """Return a declared type that takes no text or true for a number, and none that is not finite."""
    origin, parts = typing.get_origin(declared), typing.get_args(declared)
    if origin is Annotated:
        inner, *marks = parts
        last = [BeforeValidator(number)] if any(map(_allows_infinity, marks)) else _guards(inner)
        return Annotated[(inner if last else strict(inner), *marks, *last)]
    if guards := _guards(declared):
        return Annotated[(declared, *guards)]
    if declared is bool:
        return StrictBool
    if isinstance(declared, type) and origin is None and issubclass(declared, Options):
        instance: Any = InstanceOf
        return instance[declared]
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(strict(part) for part in parts)]  # noqa: UP007
    if origin in (tuple, list, dict, set, frozenset):
        container: Any = origin
        return container[tuple(part if part is Ellipsis else strict(part) for part in parts)]
    return declared


def _guards(declared: Any) -> list[BeforeValidator]:
    if declared is int:
        return [BeforeValidator(whole)]
    return [BeforeValidator(finite)] if declared is float else []


def _allows_infinity(mark: BaseMetadata | Any) -> bool:
    marks = getattr(mark, "metadata", [mark])
    return any(getattr(each, "allow_inf_nan", None) for each in marks)
