"""An audit of one's own training: right verdicts, checked against images that the test alone holds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import gradleak
from gradleak import Audit, GradleakError, registry
from gradleak.auditing import Request, inputs, plan
from gradleak.auditing.report import HOLDS, LEAKS, UNSURE, Finding, advice, interval, recovered, verdict_of
from gradleak.auditing.run import _Auditor, _once
from gradleak.board.store import Store, victim_list
from gradleak.cli.main import main
from gradleak.dataset import Data


@pytest.fixture(scope="module")
def own() -> tuple[Tensor, Tensor]:
    split = Data(registry.build("datasets", "digits"), "digits").split.test
    return split.images[:48], split.labels[:48]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Sigmoid(), nn.Linear(24, 10))


@pytest.fixture(scope="module")
def undefended(own: tuple[Tensor, Tensor], tmp_path_factory: pytest.TempPathFactory) -> tuple[Audit, Path]:
    store = tmp_path_factory.mktemp("audit") / "audit.sqlite"
    remedies: list[str | tuple[str, dict[str, Any]]] = [("gaussian-noise", {"sigma": 5.0})]
    return gradleak.audit(net(), own, budget=25, victims=3, remedies=remedies, store=store), store


@pytest.fixture(scope="module")
def defended(own: tuple[Tensor, Tensor], tmp_path_factory: pytest.TempPathFactory) -> tuple[Audit, Path]:
    store = tmp_path_factory.mktemp("audit") / "audit.sqlite"
    noise = ("gaussian-noise", {"sigma": 5.0})
    return gradleak.audit(net(), own, budget=14, victims=3, defense=noise, remedies=(), store=store), store


def best(store: Path, own: tuple[Tensor, Tensor]) -> float:
    """Share of victims of which any answer in a store is within 20 dB of an image that the test holds."""
    hits: dict[int, bool] = {}
    with Store(store) as opened:
        for key, config in zip(opened.cells()["key"], opened.cells()["config"], strict=True):
            if "victims" not in config or not config["victims"]:
                continue
            truth = opened.truth(victim_list(config), 0)
            assert any(np.allclose(truth[0][0], image.numpy()) for image in own[0]), "victims are the user's images"
            if config["attack"]["name"] in ("mean-image", "class-mean", "random-image"):
                continue
            for victim in range(config["victims"]):
                image = opened.truth(victim_list(config), victim)[0][0]
                try:
                    answer = opened.reconstruction(key, victim)[0]
                except GradleakError:
                    continue
                hits[victim] = hits.get(victim, False) or float(np.square(answer - image).mean()) < 0.01
    return sum(hits.values()) / len(hits)


def test_an_undefended_training_leaks_and_a_defended_one_does_not(
    undefended: tuple[Audit, Path], defended: tuple[Audit, Path], own: tuple[Tensor, Tensor]
) -> None:
    found, store = undefended
    assert found.verdict == LEAKS and found.share.estimate == 1 and best(store, own) == 1
    assert found.passes(0.5) is False
    found, store = defended
    assert found.verdict == HOLDS and found.share.estimate == 0 and best(store, own) == 0
    assert found.passes(0.0) is True
    assert undefended[0].malicious is not None and undefended[0].malicious.share == 1
    assert found.malicious is not None and found.malicious.share < 1, "as much noise as this hides from it too"
    ended = [each for each in found.findings if each.fits >= 0.5]
    assert ended, "a search that explains the update better than the truth does is why it is believed"


def test_it_says_who_how_much_and_what_would_help(undefended: tuple[Audit, Path], own: tuple[Tensor, Tensor]) -> None:
    found, store = undefended
    assert {each.attacker for each in found.findings} == {"informed server", "curious server"}
    assert found.worst is not None and found.worst.psnr > 40 and found.floor < 20
    for each in found.exposed:
        near = (own[0] - torch.from_numpy(each.truth)).square().flatten(1).mean(1)
        assert float(near.min()) < 1e-10 and int(own[1][near.argmin()]) == each.label
        error = float(np.square(each.truth - each.reconstruction).mean())
        assert math.isclose(-10 * math.log10(max(error, 1e-10)), each.psnr, abs_tol=0.1)
    known = {each.defense: each for each in found.remedies}
    assert known["gaussian-noise"].verdict == HOLDS and 0 <= known["gaussian-noise"].accuracy <= 1
    assert math.isfinite(known["gaussian-noise"].lost), "accuracy is measured on the user's data"
    assert "came back" in found.lines()[0] and "gaussian-noise would bring it to the floor" in " ".join(found.lines())
    assert found._repr_html_().count("<img") == 6
    assert set(gradleak.read(store).cells["model"]) == {"Sequential"}, "a store like any other"


def test_what_is_written_says_the_same(undefended: tuple[Audit, Path], tmp_path: Path) -> None:
    found, _ = undefended
    found.write(tmp_path / "new" / "out")
    facts = json.loads((tmp_path / "new" / "out" / "report.json").read_text())
    assert facts["verdict"] == LEAKS and facts["share"] == 1 and len(facts["remedies"]) == 1
    assert "http" not in (tmp_path / "new" / "out" / "index.html").read_text(), "it needs no network"


def test_the_budget_is_kept(undefended: tuple[Audit, Path], defended: tuple[Audit, Path]) -> None:
    # Twice and a bit: what a busy machine makes of the last attack's last iterations.
    assert undefended[0].seconds < 60 and defended[0].seconds < 60
    assert any("come back already" in each for each in undefended[0].not_run)
    assert "april: needs a transformer on patches with learned positions (vit), both trained" in undefended[0].not_run
    assert "informed server, lti: no time was left" in _once(["informed server, lti: no time was left"])


def finding(share: float, fits: float) -> Finding:
    return Finding("a", "somebody", share, 10.0, fits, 100, 100)


def test_no_verdict_without_evidence() -> None:
    assert verdict_of([finding(0.0, 0.2), finding(0.0, math.nan)]) == UNSURE, "a search that failed proves nothing"
    assert verdict_of([finding(0.0, 0.2), finding(0.0, 0.6)]) == HOLDS
    assert verdict_of([finding(0.25, 0.0)]) == LEAKS
    assert verdict_of([]) == UNSURE
    assert advice([], 4) == "No search could run: see what was not run, and why."
    halfway = Finding("a", "somebody", 0.0, 10.0, 0.0, 50, 100, needed=90.0)
    assert advice([halfway], 4) == "a made 50 of its 100 iterations; with --budget 6m it would make them all."
    assert "is stuck" in advice([finding(0.0, 0.2)], 4)
    unsure = Audit(verdict=UNSURE, share=interval(0.0, 4), images=4, training="", worst=None, findings=(), floor=10.0)
    assert unsure.passes(0.1) is None and "proves nothing" in unsure.lines()[0]


def test_recovered_is_more_than_a_guess() -> None:
    assert recovered(21, 14) and not recovered(19, 10)
    assert not recovered(21, 19.5), "hardly better than a guess without the update"
    assert recovered(31, 30), "as good as that is recovered whatever a guess has"


def folder(place: Path, images: Tensor) -> list[str]:
    place.mkdir()
    names = []
    for index, image in enumerate(images):
        names.append(f"{index:03}.png")
        Image.fromarray((image[0].numpy() * 255).round().astype(np.uint8)).save(place / names[-1])
    return names


def test_a_folder_is_audited_from_the_command_line(
    tmp_path: Path, own: tuple[Tensor, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    names = folder(tmp_path / "images", own[0])
    lines = [f"{name},{label}" for name, label in zip(names, own[1].tolist(), strict=True)]
    (tmp_path / "labels.csv").write_text("file,label\n" + "\n".join(lines))
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Sigmoid(), nn.Linear(24, 10))\n"
    )
    torch.save(net().state_dict(), tmp_path / "w.pt")
    given = ["audit", "--model", f"{tmp_path}/mine.py:build", "--data", str(tmp_path / "images"), "--out"]
    given += [str(tmp_path / "out"), "--budget", "8s", "--victims", "2", "--no-remedies"]
    files = ["--weights", str(tmp_path / "w.pt"), "--labels", str(tmp_path / "labels.csv")]
    assert main([*given, *files, "--fail-above", "0.5"]) == 1
    assert "Leaks: 100 %" in capsys.readouterr().out
    assert {each.name for each in (tmp_path / "out").iterdir()} >= {"index.html", "report.json", "audit.sqlite"}
    wrong = {
        "no class folders": given,
        "no such folder": [*given[:4], str(tmp_path / "absent"), *given[5:], *files],
        "belong together": [*given, *files, "--mean", "0.5"],
        "unknown loss": [*given, *files, "--loss", "huber"],
        "unknown defense": [*given, *files, "--defense", "nonsense"],
        "need local_lr": [*given, *files, "--local-steps", "2"],
    }
    for said, arguments in wrong.items():
        assert main(arguments) == 2
        assert said in capsys.readouterr().err


def test_labels_come_from_a_csv_a_mapping_a_function_or_folders(tmp_path: Path, own: tuple[Tensor, Tensor]) -> None:
    images = own[0][:10]
    names = folder(tmp_path / "flat", images)
    (tmp_path / "l.csv").write_text(
        "\n".join(f"flat/{name}".removeprefix("flat/") + f",{i % 3}" for i, name in enumerate(names))
    )
    wanted = [index % 3 for index in range(10)]
    words = {name: "abc"[index % 3] for index, name in enumerate(names)}
    for labels in (tmp_path / "l.csv", words, lambda file: int(file[:3]) % 3):
        pixels, found = inputs.read(tmp_path / "flat", labels, None)
        assert found.tolist() == wanted
        assert torch.allclose(pixels, images, atol=1 / 255)
    pixels, _ = inputs.read(tmp_path / "flat", words, (3, 6, 4))
    assert pixels.shape == (10, 3, 6, 4), "any size, not only squares"
    for index in range(4):
        (tmp_path / "tree" / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        Image.open(tmp_path / "flat" / names[index]).save(tmp_path / "tree" / "ab"[index % 2] / names[index])
    assert inputs.read(tmp_path / "tree", None, None)[1].tolist() == [0, 0, 1, 1]
    with pytest.raises(GradleakError, match=r"no label for '000.png'"):
        inputs.read(tmp_path / "flat", {"other.png": 1}, None)
    pairs = [(image, int(label)) for image, label in zip(images, own[1], strict=False)]
    assert torch.equal(inputs.read(pairs, None, None)[0], images)


def test_data_that_does_not_fit_is_refused(own: tuple[Tensor, Tensor]) -> None:
    images, labels = own
    for data, said in (
        ((images * 2 - 1, labels), r"in \[0, 1\]; if the model expects normalised images"),
        ((images * 255, labels), "divide them by 255"),
        ((images, nn.functional.one_hot(labels, 10)), r"argmax\(1\)"),
        ((images, labels + 5), "10 classes"),
        ((images[:4], labels[:4]), "8 or more"),
        ((images[:1].repeat(20, 1, 1, 1), labels[:1].repeat(20)), "1 different"),
        ((images[:, 0], labels), r"\[K, C, H, W\]"),
        ([1, 2, 3], "no pairs"),
    ):
        with pytest.raises(GradleakError, match=said):
            gradleak.audit(net(), data, budget=5)  # type: ignore[arg-type]
    with pytest.raises(GradleakError, match="cannot be run on images"):
        gradleak.audit(nn.Sequential(nn.Flatten(), nn.Linear(9, 10)), own, budget=5)
    with pytest.raises(GradleakError, match="can be attacked"):
        gradleak.audit(net(), own, batch_size=40, budget=5)


def test_time_that_is_left_goes_into_the_search_that_came_farthest(own: tuple[Tensor, Tensor]) -> None:
    bench = Request(net(), own, victims=2).bench()
    searches = [each for each in plan.attacks() if each[0] in ("inverting-gradients", "linear-leakage")]
    closed, short = (bench.run(bench.cell(plan.ATTACKERS[0], each, ("none", {})), 0.01) for each in searches)
    assert short.iterations == plan.SHORTEST and short.reached < 1 and closed.reached == 1

    def left(seconds: float, *ran: plan.Ran) -> list[plan.Ran]:
        return _Auditor(bench, ("none", {}), plan.Clock(seconds), None, lambda what, left: None)._longer(ran)

    (longer,) = left(8.0, closed, short)
    assert longer.attack == "inverting-gradients (longer)" and longer.iterations is not None
    assert longer.iterations > 2 * plan.SHORTEST and longer.usual == short.usual
    assert longer.result.rows[0].loss is not None and short.result.rows[0].loss is not None
    assert longer.result.rows[0].loss < short.result.rows[0].loss
    assert not left(1e-3, short) and not left(8.0, closed), "no time, or nothing to go on with"
