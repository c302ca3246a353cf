"""What the keys of a suite are made of: names, numbers, plugins, and what is said where they are wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from annotated_types import Ge, Gt, MaxLen, MinLen
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    model_validator,
)

from ..errors import GradleakError, unknown
from ..options import finite, whole
from ..renamed import Renamed, current
from . import single


class Strict(BaseModel):
    """What refuses keys that it does not know, and never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    under: ClassVar[str] = ""
    """The key of a suite whose values it holds."""
    renamed: ClassVar[Mapping[str, Renamed]] = {}
    """Old names of keys that are still taken."""

    @model_validator(mode="before")
    @classmethod
    def _under_new_names(cls, given: Any) -> Any:
        return current(given, cls.renamed, cls.__name__.lower()) if isinstance(given, Mapping) else given

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Self:
        """Return what a cell has stored of it.

        Raises:
            GradleakError: a key or value is not allowed.
        """
        try:
            return cls.model_validate(stored)
        except ValidationError as error:
            raise GradleakError(f"cell: {first_mistake(error)}") from error


LONGEST = 120
"""Characters of a name."""
Label = Annotated[str, MaxLen(LONGEST), AfterValidator(single.printable)]
"""What tables, pages and progress lines print."""
Whole = Annotated[int, BeforeValidator(whole)]
Positive = Annotated[int, Ge(1), BeforeValidator(whole)]
Rate = Annotated[float, Gt(0), BeforeValidator(finite)]
Seeds = Annotated[list[Annotated[int, Ge(0), BeforeValidator(whole)]], MinLen(1)]


class Entry(Strict):
    """One plugin of a grid: `name`, `{name: {options}}`, or the long form with `label` and `only`."""

    name: str
    """As `gradleak list` has it; of defenses also several, joined by ` + `."""
    options: dict[str, Any] = Field(default_factory=dict)
    """What differs from the plugin's defaults; of joined defenses by the name of each."""
    label: Label = ""
    """What tables call it; by default the name with the options that were given."""
    only: dict[str, list[str]] = Field(default_factory=dict)
    """Restricts an attack or defense to labels of other axes, e.g. `{models: [mlp]}`."""
    optional: StrictBool = False
    """An attack that is left out, instead of refused, where it cannot run or lacks knowledge."""

    @property
    def title(self) -> str:
        """The label, or one made of name and given options."""
        if self.label or not self.options:
            return self.label or self.name
        return f"{self.name}({', '.join(f'{key}={short(value)}' for key, value in self.options.items())})"


class Counter(Entry):
    """A member of an ensemble that some defenses name as their counter-attack; it is run against these."""

    against: tuple[str, ...]
    """Labels of these defenses."""


Plugin = Annotated[Entry, BeforeValidator(single.entry)]
Plugins = Annotated[list[Plugin], MinLen(1)]


def first_mistake(error: ValidationError) -> str:
    """Say the first mistake of a validation: where, what was found, what is allowed."""
    first = error.errors()[0]
    path = ""
    for part in first["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    if first["type"] == "extra_forbidden":
        holder = next((part for part in reversed(first["loc"][:-1]) if isinstance(part, str)), "")
        allowed = next((part for part in Strict.__subclasses__() if holder and part.under == holder), Entry)
        return str(unknown("key", str(first["loc"][-1]), allowed.model_fields, path.rpartition(".")[0]))
    if not path:
        return first["msg"]
    found = "" if first["type"] == "missing" else f", found {short(first['input'])}"
    return f"{path}: {first['msg'][0].lower()}{first['msg'][1:]}{found}"


def short(value: Any) -> str:
    """Return a value as an error shows it."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 60 else f"{text[:57]}..."
