"""A renamed option is taken under its old name for a while: plugins' options, keys of suites, the command line."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from gradleak import registry, renamed, suite
from gradleak.cli import main as command_line
from gradleak.cli.main import main
from gradleak.errors import GradleakError
from gradleak.renamed import Renamed
from gradleak.suite import schema

PLUGIN = '''
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt

from gradleak.defense import Defense
from gradleak.renamed import Renamed


@dataclass(frozen=True, kw_only=True)
class Rounded(Defense):
    """Sends multiples of a step."""

    family = "compression"
    reference = "test"
    renamed = {"width": Renamed("step", until="UNTIL")}

    step: Annotated[float, Gt(0)] = 0.5

    def protect(self, update, public, generator):
        return {name: (tensor / self.step).round() * self.step for name, tensor in update.items()}
'''


@pytest.fixture(autouse=True)
def _untold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renamed, "_told", set())


def add(folder: Path, until: str) -> None:
    (folder / "rounded.py").write_text(PLUGIN.replace("UNTIL", until))
    registry.add_file(folder / "rounded.py")


def test_an_option_of_a_plugin_is_taken_under_its_old_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    add(tmp_path, "1000.0")
    for _ in range(3):
        assert registry.build("defenses", "rounded", {"width": 0.25}).step == 0.25
    assert caplog.messages == [
        "defense 'rounded': 'width' is now called 'step'; the old name ends with release 1000.0"
    ], "one line, once"
    assert registry.options_of(registry.build("defenses", "rounded", {"width": 0.25})) == {"step": 0.25}
    with pytest.raises(GradleakError, match=r"defense 'rounded': step = -1.0: Input should be greater than 0"):
        registry.build("defenses", "rounded", {"width": -1.0})
    with pytest.raises(GradleakError, match="'width' and 'step' are the same option"):
        registry.build("defenses", "rounded", {"width": 0.25, "step": 0.25})


def test_after_its_release_the_old_name_is_refused(tmp_path: Path) -> None:
    add(tmp_path, "0.0.1")
    with pytest.raises(GradleakError, match=r"^defenses\[0\]: defense 'rounded': 'width' is now called 'step'$"):
        registry.build("defenses", "rounded", {"width": 0.25}, "defenses[0]")


def test_a_renamed_option_makes_the_same_cell(tmp_path: Path) -> None:
    add(tmp_path, "1000.0")
    keys = []
    for name in ("width", "step"):
        given = {"name": "x", "datasets": ["digits"], "models": ["mlp"], "attacks": ["mean-image"]}
        built = schema.Suite.model_validate({**given, "defenses": [{"rounded": {name: 0.25}}]})
        keys.append([cell.key for cell in suite.expand(built, lambda name, options: ("1", "digest"))])
    assert keys[0] == keys[1]


def test_a_key_of_a_suite_is_taken_under_its_old_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(schema.Engine, "renamed", {"chunk": Renamed("width", until="1000.0")})
    assert schema.Engine.model_validate({"chunk": 8}).width == 8
    assert caplog.messages == ["engine: 'chunk' is now called 'width'; the old name ends with release 1000.0"]
    path = tmp_path / "x.yaml"
    path.write_text(
        "name: x\nengine: {chunk: 8}\ndatasets: [digits]\nmodels: [mlp]\nattacks: [dlg]\ndefenses: [none]\n"
    )
    assert suite.read(path).engine.width == 8


def test_an_option_of_the_command_line_is_taken_under_its_old_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "RENAMED", {"list": {"--as-json": Renamed("--json", until="1000.0")}})
    with caplog.at_level(logging.WARNING):
        assert main(["list", "--as-json"]) == 0
    assert '"attacks": [' in capsys.readouterr().out
    assert caplog.messages == [
        "gradleak list: '--as-json' is now called '--json'; the old name ends with release 1000.0"
    ]
    monkeypatch.setattr(command_line, "RENAMED", {"list": {"--as-json": Renamed("--json", until="0.0.1")}})
    assert main(["list", "--as-json"]) == 2
    assert capsys.readouterr().err == "gradleak: gradleak list: '--as-json' is now called '--json'\n"
