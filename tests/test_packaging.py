"""The layout that installs, links and lists must agree on."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from gradleak import __version__, registry

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", ["attacks", "defenses", "servers"])
def test_plugin_folders_are_flat_and_linked(folder: str) -> None:
    link = ROOT / "gradleak" / folder
    assert link.is_symlink() and link.readlink() == Path("..") / folder
    inner = [path.name for path in (ROOT / folder).iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert inner == [], "sub-folders would be missing from the wheel"


def test_every_package_is_installed() -> None:
    packages = {path.parent.relative_to(ROOT / "gradleak") for path in (ROOT / "gradleak").rglob("__init__.py")}
    names = {".".join(("gradleak", *package.parts)) for package in packages}
    names |= {"gradleak.attacks", "gradleak.defenses", "gradleak.servers"}
    assert names == set(PROJECT["tool"]["setuptools"]["packages"])


@pytest.mark.parametrize("group", sorted(registry.GROUPS))
def test_every_plugin_can_be_described(group: str) -> None:
    for name in registry.names(group):
        facts = registry.describe(group, name)
        assert not facts["error"]
        assert facts["summary"].endswith(".") and facts["reference"]


def test_constraints_cover_every_dependency_and_name_no_place() -> None:
    lines = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].lower() for line in lines if not line.startswith("#")}
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in lines if not line.startswith("#"))
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["test"], *extras["dev"], *extras["docs"], *extras["tune"]]
    names = {re.split(r"[\[<>=~! ]", line)[0].lower() for line in wanted} - {"gradleak"}
    assert names <= pinned


def test_version_is_one() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "gradleak.__version__"}
