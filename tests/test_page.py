"""The report's folder and page, in Python and in a browser."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from gradleak.board.leaderboard import Board
from gradleak.board.results import read
from gradleak.board.store import CellResult, ImageRow, Store, victim_list
from gradleak.cli.main import main
from gradleak.errors import GradleakError
from gradleak.pictures import picture
from gradleak.report import figures, folder, page, verdict
from gradleak.report.columns import interval, number
from gradleak.report.gallery import QUANTILES, Pictures, picks
from gradleak.report.reproduction import Reported, read_reported, reproduction_board

VICTIMS = 10
TRUTH = np.random.default_rng(0).random((VICTIMS, 1, 3, 8, 8)).astype("float32")
PSNR = {
    ("mean-image", "none", "oblivious"): 10.0,
    ("mean-image", "noise", "oblivious"): 10.0,
    ("mean-image", "</script><b>", "oblivious"): 10.0,
    ("dlg", "none", "oblivious"): 30.0,
    ("dlg", "noise", "oblivious"): 12.0,
    ("dlg", "noise", "public"): 16.5,
    ("dlg", "</script><b>", "oblivious"): 9.0,
}
HIDDEN = "</script><b>"


def cell(attack: str, defense: str, knowledge: str, dataset: str = "digits", seed: int = 0) -> CellResult:
    """A cell whose images get better with the victim's number; victim 3 diverged, and victim v is v/255 bright."""
    config = {
        "attack": {"name": attack, "label": attack, "options": {"iterations": 100}},
        "defense": {"name": defense, "label": defense, "options": {}},
        "model": {"name": "mlp", "label": "mlp", "options": {}},
        "dataset": {"name": dataset, "label": dataset, "options": {}, "digest": "0123"},
        "setting": {"name": "default", "batch_size": 1},
        "knowledge": knowledge,
        "victims": VICTIMS,
        "seed": seed,
        "suite": {"name": "synthetic", "version": 2},
    }
    best = PSNR[attack, defense, knowledge]
    rows = [
        ImageRow(
            victim=victim,
            image=0,
            status="diverged" if victim == 3 and attack == "dlg" else "ok",
            matched=0,
            psnr=best + victim / 10,
            gradient_evaluations=100,
        )
        for victim in range(VICTIMS)
    ]
    family = "control" if attack == "mean-image" else "optimisation"
    guard = "none" if defense == "none" else "noise"
    facts = {"attack_family": family, "defense_family": guard, "bytes": 1000.0 * len(defense), "adaptive": True}
    return CellResult(
        key=f"{attack}-{defense}-{knowledge}-{dataset}-{seed}",
        config=config,
        rows=rows,
        started="2026-01-01T00:00:00+00:00",
        device="a processor",
        versions={"gradleak": "0"},
        provenance={**facts, "test_accuracy": 0.9 - len(defense) / 100},
        reconstructions={victim: np.full((1, 3, 8, 8), victim / 255, "float32") for victim in range(VICTIMS)},
        traces={} if family == "control" else {victim: np.linspace(2, 1, 100) for victim in range(VICTIMS)},
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store(tmp_path_factory.mktemp("store") / "s.sqlite", create=True) as opened:
        for dataset in ("digits", "photos"):
            for labels in PSNR:
                made = cell(*labels, dataset=dataset)
                opened.write(made)
                opened.write_victims(victim_list(made.config), TRUTH, np.zeros((VICTIMS, 1), int))
        yield opened


@pytest.fixture(scope="module")
def made(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report that tests only read."""
    out = tmp_path_factory.mktemp("report") / "out"
    folder.write(read(store), [store], out)
    return out


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures out, which take most of the time."""
    monkeypatch.setattr(figures, "write", lambda *_: [])


class Tables(HTMLParser):
    """The boards of a page: heading to texts, line by line."""

    def __init__(self, text: str):
        super().__init__()
        self.boards: list[list[list[str]]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.inside = "board" in (dict(attrs).get("class") or "")
            if self.inside:
                self.boards.append([])
        elif tag == "tr" and self.inside:
            self.boards[-1].append([])
        elif tag in ("td", "th") and self.inside:
            self.boards[-1][-1].append("")

    def handle_data(self, data: str) -> None:
        if self.inside and self.boards[-1] and self.boards[-1][-1] and data.strip():
            self.boards[-1][-1][-1] += data.strip()

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "table"

    def lines(self, board: int) -> list[dict[str, str]]:
        head, *body = self.boards[board]
        return [dict(zip(head, line, strict=True)) for line in body]


def payload(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found
    return dict(json.loads(found[1]))


def chunk(text: str, name: str) -> list[str]:
    found = re.search(rf'<script type="text/plain" id="{name}">(.*?)</script>', text, re.S)
    assert found
    return found[1].split("\n")


# Pictures


def test_picks_are_by_rank_and_stable(store: Store) -> None:
    found = picks(read(store).rows)
    one = found[found["key"] == "dlg-noise-public-digits-0"]
    # Ten images; victim 3 failed and scores the floor's 10.3 dB, below all others.
    assert list(one["victim"]) == [0, 4, 8] and list(one["share"]) == list(QUANTILES)
    shuffled = picks(read(store).rows.sample(frac=1, random_state=0))
    pd.testing.assert_frame_equal(found, shuffled)


def test_pictures_are_of_the_store_or_none(store: Store) -> None:
    pictures = Pictures(read(store), [store])
    key = "dlg-noise-public-digits-0"
    truth, answer = pictures.truth(key, 4, 0), pictures.reconstruction(key, 4, 0.0)
    assert truth is not None and answer is not None
    assert np.abs(truth / 255 - TRUTH[4, 0].transpose(1, 2, 0)).max() <= 0.5 / 255 + 1e-6
    assert (answer == 4).all()
    assert pictures.truth(key, 99, 0) is None
    assert pictures.reconstruction(key, 4, float("nan")) is None
    assert pictures.reconstruction(key, 99, 0.0) is None
    assert pictures.curve(key, range(VICTIMS)) == pytest.approx(np.linspace(2, 1, 100))
    assert len(pictures.curve("mean-image-none-oblivious-digits-0", range(VICTIMS))) == 0


def test_strange_images_become_pictures() -> None:
    grey = picture(np.array([[[np.nan, np.inf], [-1.0, 2.0]]]))
    assert grey.shape == (2, 2, 3) and grey[..., 0].tolist() == [[128, 128], [0, 255]]
    assert picture(np.stack([np.zeros((2, 2)), np.ones((2, 2))])).shape == (2, 2, 3)


# The folder


def test_the_page_says_what_the_tables_say(store: Store, made: Path) -> None:
    names = {path.relative_to(made).as_posix() for path in made.rglob("*") if path.stat().st_size > 0}
    assert {
        "index.html",
        "defenses.csv",
        "contexts.csv",
        "schema.json",
        "leaderboard.md",
        "leaderboard.tex",
        "rows.parquet",
    } <= names
    assert {f"figures/{name}.{form}" for name in ("gallery", "heat_map", "pareto") for form in ("png", "pdf")} <= names
    text = (made / "index.html").read_text()
    parts = [pd.read_csv(made / f"{name}.csv", keep_default_na=False) for name in ("defenses", "contexts")]
    csv = pd.concat(parts)
    titles = list(dict.fromkeys(csv["title"]))
    assert len(titles) == 3  # all contexts, and each
    shown = Tables(text)
    for place, title in enumerate(titles):
        lines = csv[csv["title"] == title].to_dict("records")
        assert [line["defense"] for line in lines] == [line["defense"] for line in shown.lines(place)]
        for mine, line in zip(shown.lines(place), lines, strict=True):
            values = {name: float(line[name]) for name in ("psnr", "psnr_low", "psnr_high")}
            assert mine["PSNR, dB"] == interval(values, "psnr")
            assert mine["floor, dB"] == number(float(line["psnr_floor"]))
            assert mine["bytes"] == number(float(line["bytes"]), 0)
    rows = pd.read_parquet(made / "rows.parquet")
    assert len(rows) == 2 * len(PSNR) * VICTIMS


def test_the_page_holds_every_cell_with_its_pictures(store: Store, made: Path) -> None:
    text = (made / "index.html").read_text()
    data = payload(text)
    assert len(data["cells"]) == 2 * len(PSNR)
    rows = read(store).rows
    names = list(data["levels"])
    for each in data["cells"]:
        labels = {name: data["levels"][name][place] for name, place in zip(names, each, strict=False)}
        mean, failed, images, chosen, line = each[len(names) :]
        key = "-".join(labels[name] for name in ("attack", "defense", "knowledge", "dataset", "seed"))
        mine = rows[rows["key"] == key]
        assert mean == pytest.approx(mine["psnr"].mean()) and (failed, images) == (mine["failed"].sum(), VICTIMS)
        assert [value for _, value, _ in chosen] == sorted(value for _, value, _ in chosen)
        for content, row in zip(chunk(text, "pictures-0")[line].split(" "), picks(mine).itertuples(), strict=True):
            found = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
            assert found.shape == (8, 8, 3) and (found == row.victim).all()
        truth = Image.open(io.BytesIO(base64.b64decode(chunk(text, "truths-0")[chosen[0][0]])))
        assert truth.size == (8, 8)
        assert len(chunk(text, "curves-0")[line].split()) == (page.POINTS if labels["attack"] == "dlg" else 0)


def test_the_page_needs_no_network_and_no_label_breaks_it(made: Path) -> None:
    text = (made / "index.html").read_text()
    unlinked = text.replace("http://www.w3.org/2000/svg", "").replace(
        '<a class="paper" href="https://arxiv.org/abs/', ""
    )
    for mark in ("http://", "https://", "//cdn", "@import", "url("):
        assert mark not in unlinked, mark
    assert "<b>" not in text and text.count("</script>") == text.count("<script")
    assert HIDDEN in payload(text)["levels"]["defense"]
    linked = [name for name in re.findall(r'href="([^#"]+)"', text) if name != "data:," and "arxiv.org" not in name]
    assert linked and all((made / name).is_file() for name in linked)
    ids = set(re.findall(r' id="([^"]+)"', text))
    assert all(name in ids for name in re.findall(r'href="#([^"]+)"', text))


@pytest.mark.usefixtures("quick")
def test_a_report_is_the_same_twice_and_replaces_only_itself(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    written = folder.write(read(store), [store], out)
    first = {path: path.read_bytes() for path in written}
    (out / "mine.txt").write_text("mine")
    assert [path for path in folder.write(read(store), [store], out)] == written
    assert all(path.read_bytes() == content for path, content in first.items())
    assert (out / "mine.txt").read_text() == "mine"


@pytest.mark.usefixtures("quick")
def test_files_of_an_earlier_report_go(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder.write(read(store), [store], out)
    marker = json.loads((out / folder.MARKER).read_text())
    outside = tmp_path / "outside.txt"
    for path in (out / "old.csv", outside):
        path.write_text("old")
    marker["files"] += ["old.csv", "../outside.txt"]
    (out / folder.MARKER).write_text(json.dumps(marker))
    folder.write(read(store), [store], out)
    assert not (out / "old.csv").exists() and outside.exists()


@pytest.mark.parametrize("there", ["file", "foreign"])
def test_a_foreign_folder_is_left_alone(store: Store, tmp_path: Path, there: str) -> None:
    out = tmp_path / "out"
    if there == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "index.html").write_text("mine")
    with pytest.raises(GradleakError, match="is a file" if there == "file" else "no report wrote"):
        folder.write(read(store), [store], out)
    mine = out if there == "file" else out / "index.html"
    assert mine.read_text() == "mine"


@pytest.mark.usefixtures("quick")
def test_several_stores_make_one_report(store: Store, tmp_path: Path) -> None:
    with Store(tmp_path / "t.sqlite", create=True) as other:
        other.write(cell("dlg", "none", "oblivious"))
        other.write(cell("dlg", "none", "oblivious", dataset="faces"))
        folder.write(read(store, other), [store, other], tmp_path / "out")
    rows = pd.read_parquet(tmp_path / "out" / "rows.parquet")
    assert rows["key"].nunique() == 2 * len(PSNR) + 1
    data = payload((tmp_path / "out" / "index.html").read_text())
    assert data["levels"]["dataset"] == ["digits", "faces", "photos"]


def test_large_pictures_are_made_smaller_and_long_curves_shorter() -> None:
    content = page._webp(np.zeros((200, 100, 3), np.uint8), lossless=True)
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (32, 64)
    curve = page._curve(np.append(np.linspace(5, 1, 999), np.nan)).split()
    assert len(curve) == page.POINTS and (float(curve[0]), float(curve[-1])) == (5, 1)


def test_many_flags_are_cut_kind_by_kind_and_that_is_said() -> None:
    kinds = ["a"] * (page.MOST_FLAGS + 7) + ["b"] * 3
    found = page._fewer(Board("flags", "Doubts", pd.DataFrame({"flag": kinds, "where": kinds, "why": kinds})))
    assert found.table["flag"].value_counts().to_dict() == {"a": page.MOST_FLAGS, "b": 3}
    assert found.notes == ("7 more of 'a': see flags.csv",)
    few = Board("flags", "Doubts", pd.DataFrame({"flag": ["b"], "where": [""], "why": [""]}))
    assert page._fewer(few) is few


# Published numbers


def reported(**changes: Any) -> Reported:
    where = {"attack": "dlg", "defense": "none"}
    return Reported(**{"claim": "c", "source": "s", "value": 30.5, "tolerance": 0.1, "where": where, **changes})


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"statistic": "median", "value": 30.45}, "agrees"),
        ({"statistic": "best", "value": 30.9}, "agrees"),
        ({"statistic": "worst", "value": 30.9, "tolerance": 0.3}, "lower"),
        ({"value": 40.0}, "lower"),
        ({"value": 3.0}, "higher"),
        ({"value": 3.0, "relation": "at least"}, "agrees"),
        ({"value": 40.0, "relation": "at least"}, "lower"),
        ({"value": 40.0, "relation": "at most"}, "agrees"),
        ({"value": 3.0, "relation": "at most"}, "higher"),
        ({"metric": "ssim"}, "not measured"),
        ({"where": {"attack": "absent"}}, "not measured"),
        ({"minus": {"defense": "noise", "knowledge": "public"}, "statistic": "best", "value": 13.5}, "agrees"),
    ],
)
def test_verdicts(store: Store, changes: dict[str, Any], verdict: str) -> None:
    (line,) = reproduction_board(read(store), [reported(**changes)]).table.to_dict("records")
    assert line["verdict"] == verdict, line


def test_intervals_of_published_numbers_are_paired(store: Store) -> None:
    results = read(store)
    alone = reproduction_board(results, [reported()]).table.iloc[0]
    assert alone.ours_low < alone.ours < alone.ours_high
    minus = {"defense": "none"}  # the same cells: every difference is 0, whatever is drawn
    (line,) = reproduction_board(results, [reported(minus=minus)]).table.to_dict("records")
    assert line["ours"] == line["ours_low"] == line["ours_high"] == 0


@pytest.mark.usefixtures("quick")
def test_reported_numbers_come_from_a_suite(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = tmp_path / "paper.yaml"
    suite.write_text("name: x\nreported:\n- {claim: c, source: Zhu 2019, value: 30, where: {attack: dlg}}\n")
    (item,) = read_reported(suite)
    assert (item.source, item.statistic, item.relation) == ("Zhu 2019", "mean", "about")
    assert main(["report", str(store.path), "--out", str(tmp_path / "out"), "--suite", str(suite)]) == 0
    assert "Zhu 2019" in (tmp_path / "out" / "index.html").read_text()
    for text, says in (("where: {attack: dlg}", "value"), ("value: 1, where: {atack: dlg}", "atack")):
        suite.write_text(f"reported:\n- {{claim: c, source: s, {text}}}\n")
        with pytest.raises(GradleakError, match=says):
            read_reported(suite)
    suite.write_text("name: x\n")
    assert read_reported(suite) == []


# In a browser


@pytest.fixture(scope="module")
def priced(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page whose defenses lose accuracy."""
    results = read(store)
    boards = folder.all_boards(results)
    table = boards["defenses"].table
    boards["defenses"] = replace(boards["defenses"], table=table.assign(accuracy_lost=[0.2, 0.1, 0.0]))
    path = tmp_path_factory.mktemp("priced") / "index.html"
    path.write_text(page.write(results, boards, Pictures(results, [store]), [], [], "What this is. " * 20))
    return path


def test_the_page_says_what_it_shows_without_scripts(priced: Path, made: Path) -> None:
    text = " ".join(priced.read_text().split())
    assert "What this is." in text and "A client computes one gradient of 1 image with an untrained network" in text
    assert "<noscript>" in text and "figures/heat_map.png" in (made / "index.html").read_text()
    assert 'href="https://arxiv.org/abs/1906.08935" aria-label="paper of dlg: arXiv:1906.08935"' in text
    assert 'data-tip="Size of one message of one client. Lower is cheaper."' in text


def test_every_published_column_has_a_meaning(made: Path) -> None:
    schema = json.loads((made / "schema.json").read_text())
    assert {"defenses.csv", "contexts.csv", "attacks.csv", "flags.csv", "rows.parquet"} <= set(schema)
    for name, columns in schema.items():
        own = pd.read_parquet(made / name) if name.endswith("parquet") else pd.read_csv(made / name)
        assert [column["name"] for column in columns] == list(own.columns), name
        blank = [column["name"] for column in columns if not column["meaning"]]
        assert not blank, (name, blank)
    units = {column["name"]: column["unit"] for column in schema["defenses.csv"]}
    assert (units["psnr_low"], units["bytes"], units["accuracy_lost"]) == ("dB", "byte", "share, 0 to 1")


def test_a_chain_names_the_papers_of_its_members() -> None:
    from gradleak.report import papers

    text = papers.reference("defenses", "sketch + dp-sgd")
    assert text == f"{papers.reference('defenses', 'sketch')} + {papers.reference('defenses', 'dp-sgd')}"
    assert papers.link(text) == "https://arxiv.org/abs/2210.08371"
    assert papers.reference("defenses", "secure-aggregation + of-mine").startswith("arXiv:")


# Verdicts


def board_of(*lines: tuple[str, str, float, str]) -> Board:
    names = ["defense", "standing", "accuracy_lost", "doubt"]
    table = pd.DataFrame(lines, columns=names).assign(family="noise", success_psnr_20=1.0, success_psnr_54=0.25)
    table["rank_low"] = pd.array([None if " of " in line[1] else 1 for line in lines], dtype="Int64")
    table.loc[table["defense"] == "none", "family"] = "none"
    return Board("defenses", "Defenses", table)


FLOOR_ = "at the floor"


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "No attack has faced any defense yet."),
        ([("a", "", 0.0, "")], "None of 1 defense is shown to stay at the floor."),
        (
            [("a", FLOOR_, 0.01, ""), ("b", FLOOR_, 0.2, "fit"), ("none", "", 0.0, "")],
            "1 of 3 defenses stays at the floor and loses under 5 points of accuracy: a. 1 more stays there at a "
            "higher or unknown price. b carries a doubt: a better attack may still break it. Without a defense 100 % "
            "of images are recovered, 25 % pixel-exact.",
        ),
        (
            [("a", FLOOR_, math.nan, ""), ("b", "3 of 4 attacks", math.nan, "")],
            "1 of 2 defenses stays at the floor: a. What it costs in accuracy was not measured. 1 of 2 was not fully "
            "evaluated and has no rank.",
        ),
        (
            [("a", FLOOR_, 0.06, ""), ("b", FLOOR_, 0.2, "")],
            "2 of 2 defenses stay at the floor, none of them known to lose under 5 points of accuracy.",
        ),
    ],
)
def test_verdicts_say_what_the_numbers_say(lines: list[tuple[str, str, float, str]], says: str) -> None:
    assert " ".join(verdict.of_defenses(board_of(*lines))) == says


def attacks_of(*lines: tuple[str, str, float, float, int | None, str]) -> Board:
    names = ["attack", "knowledge", "above", "above_low", "rank_low", "breaks"]
    table = pd.DataFrame(lines, columns=names).assign(control=False, sets=3)
    table["rank_low"] = table["rank_low"].astype("Int64")
    return Board("attacks", "Attacks", table)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([("a", "oblivious", 3.0, 1.0, None, "")], "No attack ran on enough cells to be ranked."),
        (
            [
                ("a", "public", 3.0, 1.0, 1, ""),
                ("b", "oblivious", 2.0, 1.0, 2, ""),
                ("c", "public", 9.0, 8.0, None, "x"),
            ],
            "a (public) leads, 3.0 dB above the floor on average; it sets 3 worst cases. Specialists that break some "
            "defenses: c.",
        ),
        (
            [("a", "public", 3.0, 1.0, 1, ""), ("b", "oblivious", 2.0, 1.0, 1, "")],
            "a (public) and b share the first rank; the best, a (public), gets 3.0 dB above the floor on average.",
        ),
        ([("a", "oblivious", 1.0, 0.0, 1, "")], "No attack is surely above the floor; a comes closest."),
    ],
)
def test_the_leading_attack_is_named(lines: list[tuple[str, str, float, float, int | None, str]], says: str) -> None:
    assert " ".join(verdict.of_attacks(attacks_of(*lines))) == says


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """A headless Chromium, spoken to through a pipe (Chrome DevTools Protocol)."""

    def __init__(self, profile: Path):
        assert CHROMIUM
        down, self.write = os.pipe()
        self.read, up = os.pipe()
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]

        def wire() -> None:
            # The browser reads from descriptor 3 and writes to 4; high copies first, in case these are taken.
            ends = os.dup2(down, 100), os.dup2(up, 101)
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self.process = subprocess.Popen(
            [CHROMIUM, *options], preexec_fn=wire, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(down)
        os.close(up)
        self.stream = os.fdopen(self.read, "rb")
        self.sent = 0
        self.errors: list[str] = []
        self.session: str | None = None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.next()
            if answer.get("id") == self.sent:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def next(self) -> dict[str, Any]:
        content = bytearray()
        while (byte := self.stream.read(1)) != b"\0":
            assert byte, "the browser is gone"
            content += byte
        message = dict(json.loads(content))
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(message["params"]))
        return message

    def open(self, path: Path, width: int = 1200, height: int = 900) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 640}
        self.ask("Emulation.setDeviceMetricsOverride", **metrics)
        self.ask("Page.navigate", url=path.as_uri())
        while self.next().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str) -> Any:
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(10)
        self.stream.close()
        os.close(self.write)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs a headless Chromium")
    found = Browser(tmp_path / "profile")
    yield found
    found.close()
    assert not found.errors


ROWS = "[...document.querySelectorAll('#defenses .context:not([hidden]) tbody tr:not([hidden])')]"
COLUMN = ROWS + ".map(r => r.cells[{}].textContent)"


@pytest.mark.browser
def test_boards_sort_filter_and_pick_columns(made: Path, browser: Browser) -> None:
    browser.open(made / "index.html")
    assert browser.run(COLUMN.format(1)) == [HIDDEN, "noise", "none"]
    heading = "document.querySelectorAll('#defenses th')[3]"
    browser.run(f"{heading}.firstChild.click()")
    assert browser.run(f"{heading}.getAttribute('aria-sort')") == "ascending"
    values = [float(text.split()[0]) for text in browser.run(COLUMN.format(3))]
    assert values == sorted(values)
    browser.run(f"{heading}.firstChild.click()")
    assert [float(text.split()[0]) for text in browser.run(COLUMN.format(3))] == values[::-1]
    search = "document.querySelector('#defenses .find')"
    browser.run(f"{search}.value = 'NOI'; {search}.dispatchEvent(new Event('input'))")
    assert browser.run(COLUMN.format(1)) == ["noise"]
    assert browser.run(f"{heading}.hidden") is False
    browser.run("document.querySelectorAll('#defenses fieldset input')[3].click()")
    assert browser.run(f"{heading}.hidden") is True
    browser.run("const c = document.getElementById('context'); c.value = '1'; c.dispatchEvent(new Event('change'))")
    assert browser.run("document.querySelectorAll('#defenses .context:not([hidden])').length") == 1
    assert len(browser.run(COLUMN.format(1))) == 3


@pytest.mark.browser
def test_a_gallery_opens_from_the_heat_map_and_from_a_board(store: Store, made: Path, browser: Browser) -> None:
    browser.open(made / "index.html")
    count = "document.getElementById('count').textContent"
    assert browser.run(count) == "14 of 14 cells"
    assert browser.run("document.querySelectorAll('#cards article').length") == 12
    browser.run("document.getElementById('more').click()")
    assert browser.run("document.querySelectorAll('#cards article').length") == 14
    rows = "[...document.querySelectorAll('.heat tbody tr')]"
    assert browser.run(f"{rows}.map(r => r.cells[0].textContent)") == ["dlg", "dlg (public)", "mean-image"]
    names = browser.run("[...document.querySelectorAll('.heat thead th')].map(h => h.textContent)")
    place = names.index("noise")
    shown = browser.run(f"{rows}.find(r => r.cells[0].textContent === 'dlg (public)').cells[{place}].textContent")
    mean = read(store).panel.entries.query("defense == 'noise' and knowledge == 'public'")["mean"].mean()
    assert shown == f"{mean:.1f}"
    browser.run(f"{rows}.find(r => r.cells[0].textContent === 'dlg (public)').cells[{place}].firstChild.click()")
    assert browser.run(count) == "2 of 14 cells"
    sizes = "Promise.all([...document.querySelectorAll('#cards img')].map(i => i.decode().then(() => i.naturalWidth)))"
    found = browser.ask("Runtime.evaluate", expression=sizes, awaitPromise=True, returnByValue=True)
    assert found["result"]["value"] == [8] * 12
    assert "10 %: 10.3 dB, diverged" not in browser.run("document.getElementById('cards').textContent")
    browser.run("document.querySelector('#defenses a[data-defense=none]').click()")
    assert browser.run(count) == "4 of 14 cells"
    assert browser.run("document.querySelectorAll('#curves path.curve').length") == 2
    assert browser.run("document.querySelectorAll('#pareto circle').length") == 3
    browser.run("document.querySelector('#pareto circle').focus()")
    assert "dB above the floor" in browser.run("document.getElementById('tip').textContent")


@pytest.mark.browser
def test_the_price_filters_and_the_address_remembers(priced: Path, browser: Browser) -> None:
    browser.open(priced)
    price = "document.querySelector('#defenses .lost')"
    browser.run(f"{price}.value = '3'; {price}.dispatchEvent(new Event('input'))")
    assert browser.run(COLUMN.format(1)) == ["none"]
    browser.run("document.querySelectorAll('#defenses th')[1].firstChild.click()")
    saved = browser.run("location.href")
    assert "defenses0.lost=3" in saved and "defenses0.sort=defense+ascending" in saved
    csv = browser.run("shownCsv(document.querySelector('#defenses table')).split('\\n')")
    assert len(csv) == 2 and csv[0].startswith("rank,defense,standing,") and ",none," in csv[1]
    browser.ask("Page.navigate", url=saved.replace("lost=3", "lost=90"))
    while browser.next().get("method") != "Page.loadEventFired":
        pass
    assert browser.run(COLUMN.format(1)) == [HIDDEN, "noise", "none"]
    assert browser.run("document.querySelectorAll('#defenses th')[1].getAttribute('aria-sort')") == "ascending"


@pytest.mark.browser
def test_the_first_screen_answers(priced: Path, browser: Browser) -> None:
    wanted = {"defense", "standing", "images ≥ 20 dB, %", "accuracy lost, points", "bytes", "epsilon", "doubt"}
    for width in (1440, 390):
        browser.open(priced, width=width, height=844)
        headings = "[...document.querySelectorAll('#defenses .context:not([hidden]) th:not([hidden])')]"
        assert wanted - {"epsilon"} <= set(browser.run(f"{headings}.map(h => h.textContent)"))
        ends = browser.run(f"{ROWS}.map(r => r.getBoundingClientRect().bottom)")
        assert ends[0] < 600, width
        edge = browser.run(f"Math.max(...{headings}.map(h => h.getBoundingClientRect().right))")
        assert edge <= width


@pytest.mark.browser
def test_the_heat_map_is_one_tab_stop(made: Path, browser: Browser) -> None:
    browser.open(made / "index.html")
    stops = "document.querySelectorAll('.heat button[tabindex=\"0\"]')"
    assert browser.run(f"{stops}.length") == 1
    press = "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {{key: '{}', bubbles: true}}))"
    browser.run(f"{stops}[0].focus()")
    place = "(c => [c.parentElement.rowIndex, c.cellIndex])(document.activeElement.closest('td'))"
    assert browser.run(place) == [1, 1]
    for key, there in (
        ("ArrowRight", [1, 2]),
        ("ArrowDown", [2, 2]),
        ("Home", [2, 2]),
        ("ArrowUp", [1, 2]),
        ("End", [1, 3]),
    ):
        browser.run(press.format(key))
        assert browser.run(place) == there, key
    assert browser.run(f"{stops}.length") == 1


@pytest.mark.browser
def test_print_keeps_headings_and_heat_map(made: Path, browser: Browser) -> None:
    browser.open(made / "index.html")
    browser.ask("Emulation.setEmulatedMedia", media="print")
    seen = "[...document.querySelectorAll('#defenses .context:not([hidden]) th:not([hidden]) button, .heat button')]"
    assert browser.run(f"{seen}.every(b => getComputedStyle(b).display !== 'none')")
    assert browser.run("getComputedStyle(document.querySelector('.tools')).display") == "none"


@pytest.mark.browser
def test_a_phone_needs_no_sideways_scrolling(made: Path, browser: Browser) -> None:
    browser.open(made / "index.html", width=360, height=800)
    assert browser.run("document.documentElement.scrollWidth") <= 360
    for scheme in ("light", "dark"):
        browser.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        colours = browser.run("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
        assert contrast(*colours) > 7


def contrast(first: str, second: str) -> float:
    """WCAG contrast ratio of two `rgb(r, g, b)`."""
    found = []
    for colour in (first, second):
        parts = np.array([int(part) / 255 for part in re.findall(r"\d+", colour)[:3]])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        found.append(float(linear @ [0.2126, 0.7152, 0.0722]) + 0.05)
    return max(found) / min(found)
