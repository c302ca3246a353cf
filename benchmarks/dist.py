"""Build sdist and wheel, install each in an empty environment, and try there what a stranger tries first.

`python benchmarks/dist.py`, or `make dist-test`. Needs the package `build`, and what building and installing fetch;
`--lend` installs no dependency but lends those of this environment, which takes a minute instead of many.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

SUITE = """
name: first
victims: 2
candidates: 10
datasets: [digits]
models: [linear]
settings: [{grants: {labels: known}}]
attacks: [mean-image, linear-leakage]
defenses: [none, sign]
"""

NEEDED = (
    "gradleak/attacks/dlg.py",
    "gradleak/defenses/top_k.py",
    "gradleak/servers/honest.py",
    "gradleak/report/page.html.j2",
    "gradleak/cli/templates/attack.py.j2",
    "gradleak/py.typed",
)
"""Files that a wrong list of packages or of data loses first."""


def main() -> None:
    """Build, look into both files, and try them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lend", action="store_true", help="lend the packages of this environment")
    parser.add_argument("--only", choices=("wheel", "sdist"), help="try one of them")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        run([sys.executable, "-m", "build", "--outdir", str(place / "dist"), str(ROOT)])
        (wheel,), (sdist,) = (place / "dist").glob("*.whl"), (place / "dist").glob("*.tar.gz")
        look(zipfile.ZipFile(wheel).namelist(), "")
        look(tarfile.open(sdist).getnames(), sdist.name.removesuffix(".tar.gz") + "/")
        for kind, archive in (("wheel", wheel), ("sdist", sdist)):
            if given.only in (None, kind):
                attempt(archive, place / kind, given.lend)
                print(f"{archive.name}: works in an empty environment")


def look(names: list[str], front: str) -> None:
    """Assert that an archive holds what is needed and nothing that is of one machine."""
    plain = {name.removeprefix(front) for name in names}
    # The sdist has the three folders of plugins where the repository has them.
    moved = {
        name.replace("gradleak/attacks/", "attacks/").replace("gradleak/defenses/", "defenses/") for name in NEEDED
    }
    moved = {name.replace("gradleak/servers/", "servers/") for name in moved} if front else set(NEEDED)
    assert moved <= plain, f"missing: {moved - plain}"
    odd = [name for name in plain if name.endswith((".sqlite", ".pyc")) or "/.venv/" in name]
    assert not odd, f"not to be published: {odd[:3]}"


def attempt(archive: Path, place: Path, lent: bool) -> None:
    """Install an archive in an empty environment; list, check, run, report and begin a plugin there."""
    venv.create(place / "env", with_pip=True, clear=True)
    python = str(place / "env" / "bin" / "python")
    options = ["--no-deps"] if lent else []
    if lent:
        (lib,) = (place / "env" / "lib").glob("python3*/site-packages")
        (lib / "lent.pth").write_text("\n".join(each for each in sys.path if each.endswith("packages")) + "\n")
    run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *options, str(archive)])
    (place / "first.yaml").write_text(SUITE)
    command = [python, "-m", "gradleak"]
    for arguments in (
        ["--version"],
        ["list", "attacks"],
        ["doctor"],
        ["run", "first.yaml"],
        ["leaderboard", "first.sqlite"],
        ["report", "first.sqlite", "--out", "report"],
        ["new", "defense", "mine"],
        ["check", "mine.py"],
    ):
        run([*command, *arguments], place)
    where = subprocess.run(
        [python, "-c", "import gradleak; print(gradleak.__file__)"],
        cwd=place,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(place) in where.stdout, "the installed package was tried, and no checkout"


def run(command: list[str], place: Path | None = None) -> None:
    """Run a command quietly, in a folder without a checkout; show what it said if it fails."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()
