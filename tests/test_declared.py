"""What is read of plugins' options is what they have."""

from __future__ import annotations

import dataclasses

import pytest

from gradleak import declared, registry
from gradleak.errors import GradleakError


@pytest.mark.parametrize("group", sorted(registry.GROUPS))
def test_the_options_of_every_built_in_are_read_as_they_are(group: str) -> None:
    for name in registry.built_in(group):
        cls = registry.load(group, name)
        fields = {field.name for field in dataclasses.fields(cls) if field.init}
        presets = {"preset"} if getattr(cls, "presets", {}) else set()
        assert set(declared.options(group, name) or ()) == fields | presets, name


def test_a_spelling_is_refused_as_it_would_be_later(tmp_path: object) -> None:
    for group, name, options in (("attacks", "dlg", {"itertions": 3}), ("models", "mlp", {"width": [3]})):
        with pytest.raises(GradleakError) as later:
            registry.build(group, name, options, "here")
        allowed = declared.options(group, name)
        assert allowed is not None and not set(options) & allowed
        assert f"unknown option of {registry.GROUPS[group]} {name!r}" in str(later.value)
