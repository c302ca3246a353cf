"""What `import gradleak` gives: few names, all lazy, and mistakes told apart in a line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import gradleak
from gradleak import Captured, GradleakError, LocalTraining, Observation
from gradleak.cli.main import main
from gradleak.intake import refuse_other_kind
from gradleak.update import Network

SHAPE = (1, 6, 6)
EXPORTS = [
    "Audit",
    "Captured",
    "Client",
    "GradleakError",
    "LocalTraining",
    "Observation",
    "Reconstruction",
    "__version__",
    "attack",
    "audit",
    "read",
]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), nn.Sigmoid(), nn.Flatten(), nn.Linear(54, 5))


def gradient(module: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    named = dict(module.named_parameters())
    loss = nn.functional.cross_entropy(module(images), labels)
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.fixture(scope="module")
def captured() -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    module, images = net(), torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(1))
    return module, gradient(module, images, torch.tensor([3])), images


def test_the_package_exports_what_is_promised_and_nothing_else() -> None:
    assert sorted(gradleak.__all__) == EXPORTS
    assert dir(gradleak) == EXPORTS
    for name in EXPORTS:
        assert getattr(gradleak, name) is not None
    with pytest.raises(AttributeError, match="it has Audit"):
        gradleak.nonsense  # noqa: B018


def test_importing_it_loads_nothing_and_attack_is_a_function_in_any_order() -> None:
    code = (
        "import sys, gradleak\n"
        "assert not {'torch', 'pandas', 'numpy', 'gradleak.threat'} & set(sys.modules)\n"
        "from gradleak import read\n"
        "assert 'torch' not in sys.modules\n"
        "from gradleak.attack import GradientMatching\n"
        "from gradleak import attack\n"
        "assert callable(attack) and attack.GradientMatching is GradientMatching\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_one_gradient_is_attacked_in_a_line(captured: tuple[nn.Module, dict[str, Tensor], Tensor]) -> None:
    module, update, images = captured
    answer = gradleak.attack(
        Observation.of(module, update, SHAPE), "inverting-gradients", iterations=300, restarts=2, tv=0.0, lr=0.02
    )
    assert isinstance(answer, Captured) and answer.labels is not None and answer.labels.tolist() == [[3]]
    assert answer.mismatch is not None and float(answer.mismatch) < 1e-3
    assert float((answer.images[0] - images).square().mean()) < 1e-3
    assert answer.agreement is not None and float(answer.agreement) > 20, "both restarts come to the truth"
    assert "<img" in answer._repr_html_() and "unexplained" in answer._repr_html_()
    assert answer.report()["method"] == ["inverting-gradients"]


def test_auto_answers_with_what_explains_the_update_best() -> None:
    torch.manual_seed(0)
    module, images = nn.Sequential(nn.Flatten(), nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 5)), torch.rand(1, *SHAPE)
    answer = gradleak.attack(Observation.of(module, gradient(module, images, torch.tensor([2])), SHAPE), budget=20)
    assert torch.allclose(answer.images[0], images, atol=1e-4)
    assert answer.mismatch is not None and float(answer.mismatch) < 1e-6
    known = {each.method: each for each in answer.tried}
    assert "needs" in known["april"].note, "what cannot run says why"
    assert any("gradient of one step" in each for each in answer.assumed)


def test_an_answer_that_explains_nothing_says_so(captured: tuple[nn.Module, dict[str, Tensor], Tensor]) -> None:
    module, update, _ = captured
    noise = {name: torch.randn_like(tensor) for name, tensor in update.items()}
    answer = gradleak.attack(Observation.of(module, noise, SHAPE, labels=3), "inverting-gradients", iterations=30)
    assert answer.mismatch is not None and float(answer.mismatch) > 0.5
    assert "something that was assumed is wrong" in answer.lines()[0]


def test_pixels_of_another_range_are_noticed(captured: tuple[nn.Module, dict[str, Tensor], Tensor]) -> None:
    module, _, images = captured
    bytes_ = gradient(module, 255 * images, torch.tensor([3]))
    answer = gradleak.attack(Observation.of(module, bytes_, SHAPE), "inverting-gradients", iterations=30)
    assert "something that was assumed is wrong" in answer.lines()[0]
    assert "assumed: pixels are in [0, 1]; normalisation, if any, is a part of the model" in answer.lines()


def test_updates_come_as_people_hold_them(captured: tuple[nn.Module, dict[str, Tensor], Tensor]) -> None:
    module, update, _ = captured
    one = Observation.of(module, update, SHAPE)
    for given in (list(update.values()), {name: tensor[None] for name, tensor in update.items()}):
        other = Observation.of(module, given, SHAPE)
        assert all(torch.equal(other.update[name], tensor) for name, tensor in one.update.items())
    assert one.victims == 1 and one.classes == 5
    twice = Observation.of(module, {name: torch.stack([tensor, tensor]) for name, tensor in update.items()}, SHAPE)
    assert twice.victims == 2
    as_double = Observation.of(module, {name: tensor.double() for name, tensor in update.items()}, SHAPE)
    assert as_double.update["0.weight"].dtype is torch.float32


def test_a_state_dict_of_a_difference_may_hold_buffers() -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5)).eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    moved = {name: tensor + 0.01 * torch.randn(tensor.shape).to(tensor) for name, tensor in before.items()}
    difference = {name: moved[name] - before[name] for name in before}
    for mode in ("train", "eval"):
        seen = Observation.of(module, difference, SHAPE, weight_difference=True, mode=mode)
        assert set(seen.update) == {name for name, _ in module.named_parameters()}
        assert seen.running_statistics is not None, "the server's model holds them in either mode"


Broken = Callable[[nn.Module, dict[str, Tensor]], tuple[tuple[Any, ...], dict[str, Any]]]

MISTAKES: dict[str, tuple[Broken, str]] = {
    "weights": (lambda m, g: ((m, m.state_dict(), SHAPE), {}), "their change"),
    "difference": (lambda m, g: ((m, [-0.1 * t for t in g.values()], SHAPE), {}), "weight_difference=True"),
    "gradient as difference": (lambda m, g: ((m, g, SHAPE), {"local": LocalTraining(lr=0.1)}), "leave out `local`"),
    "names": (lambda m, g: ((m, {str(i): t for i, t in enumerate(g.values())}, SHAPE), {}), "no name is one of"),
    "strange name": (lambda m, g: ((m, {**g, "extra": torch.ones(2)}, SHAPE), {}), "'extra' is not a parameter"),
    "missing": (lambda m, g: ((m, dict(list(g.items())[:-1]), SHAPE), {}), "'3.bias' is missing"),
    "too few": (lambda m, g: ((m, list(g.values())[:-1], SHAPE), {}), "3 tensors; the model trains 4"),
    "none": (lambda m, g: ((m, dict.fromkeys(g), SHAPE), {}), "backward"),
    "nan": (lambda m, g: ((m, {n: t * float("nan") for n, t in g.items()}, SHAPE), {}), "NaN"),
    "zero": (lambda m, g: ((m, {n: 0 * t for n, t in g.items()}, SHAPE), {}), "zero_grad"),
    "integers": (lambda m, g: ((m, {n: t.long() for n, t in g.items()}, SHAPE), {}), "floating-point"),
    "rows": (lambda m, g: ((m, {**g, "3.bias": torch.stack([g["3.bias"]] * 2)}, SHAPE), {}), "2 for '3.bias'"),
    "shape of a tensor": (lambda m, g: ((m, {**g, "3.bias": torch.ones(7)}, SHAPE), {}), r"\[N, 5\]"),
    "one tensor": (lambda m, g: ((m, g["3.bias"], SHAPE), {}), "Tensor"),
    "the model itself": (lambda m, g: ((m, m, SHAPE), {}), "parameter.grad"),
    "a class": (lambda m, g: ((nn.Linear, g, SHAPE), {}), "call it"),
    "last axis": (lambda m, g: ((m, g, (6, 6, 1)), {}), "channels come first"),
    "no shape": (lambda m, g: ((m, g, (6, 6)), {}), "channels, height and width"),
    "many labels": (lambda m, g: ((m, g, SHAPE), {"labels": [1, 2]}), "one an image"),
    "no class": (lambda m, g: ((m, g, SHAPE), {"labels": [9]}), "0 to 4"),
    "soft labels": (lambda m, g: ((m, g, SHAPE), {"labels": [0.5]}), "int64"),
    "one-hot labels": (lambda m, g: ((m, g, SHAPE), {"labels": torch.eye(5)[[3]]}), r"argmax\(-1\)"),
    "another order": (lambda m, g: ((m, list(g.values())[::-1], SHAPE), {}), r"the order of model.parameters\(\)"),
    "no numbers": (lambda m, g: ((m, {n: t.to("meta") for n, t in g.items()}, SHAPE), {}), "device meta"),
    "parameters": (lambda m, g: ((m, list(m.parameters()), SHAPE), {}), "their change"),
    "wrong batch": (
        lambda m, g: ((m, gradient(m, torch.rand(3, *SHAPE), torch.arange(3)), SHAPE), {}),
        "give the right batch_size",
    ),
    "no batch": (lambda m, g: ((m, g, SHAPE), {"batch_size": 0}), "1 or more"),
    "steps without a rate": (lambda m, g: ((m, g, SHAPE), {"local": LocalTraining(steps=2)}), "rate"),
    "frozen": (lambda m, g: ((net().requires_grad_(False), g, SHAPE), {}), "no parameter that is trained"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_apart_in_a_line(mistake: str, captured: tuple[nn.Module, dict[str, Tensor], Tensor]) -> None:
    module, update, _ = captured
    make, said = MISTAKES[mistake]
    given, named = make(module, update)
    with pytest.raises(GradleakError, match=said) as caught:
        Observation.of(*given, **named)
    assert "\n" not in str(caught.value)


def test_observations_by_hand_are_looked_at_too(captured: tuple[nn.Module, dict[str, Tensor], Tensor]) -> None:
    module, update, _ = captured
    rows = {name: tensor[None] for name, tensor in update.items()}
    right: dict[str, Any] = {
        "network": Network.of(module),
        "message": rows,
        "update": rows,
        "view": None,
        "shape": SHAPE,
        "classes": 5,
        "batch_size": 1,
        "training": LocalTraining(),
    }
    assert Observation(**right).victims == 1
    wrong: dict[str, tuple[dict[str, Any], str]] = {
        "module": ({"network": module}, "Observation.of"),
        "axis": ({"update": update}, "axis of victims"),
        "names": ({"update": {"a": rows["3.bias"]}}, "no name"),
        "precision": ({"update": {name: tensor.double() for name, tensor in rows.items()}}, "float64"),
        "labels": ({"labels": [3]}, "labels: list"),
        "row": ({"labels": torch.tensor([3])}, r"\[1, 1\]"),
    }
    for change, said in wrong.values():
        with pytest.raises(GradleakError, match=said):
            Observation(**{**right, **change})


def test_the_sign_of_noise_refuses_nothing() -> None:
    network = Observation.of(net(), [torch.randn(p.shape) for p in net().parameters()], SHAPE, weight_difference=False)
    mixed = {**network.update, "3.bias": torch.tensor([[-1.0, -1.0, 1.0, 1.0, 0.5]])}
    refuse_other_kind(mixed, network.network, 1, difference=False)
    refuse_other_kind(mixed, network.network, 1, difference=True)


def test_attacks_that_cannot_run_say_why(captured: tuple[nn.Module, dict[str, Tensor], Tensor]) -> None:
    module, update, _ = captured
    seen = Observation.of(module, update, SHAPE)
    for method, said in (("april", "transformer"), ("posterior", "auxiliary"), ("nonsense", "unknown attack")):
        with pytest.raises(GradleakError, match=said):
            gradleak.attack(seen, method)
    with pytest.raises(GradleakError, match=r"Observation\.of"):
        gradleak.attack(update)  # type: ignore[arg-type]
    with pytest.raises(GradleakError, match="budget"):
        gradleak.attack(seen, budget=0)


def test_stores_are_read_in_a_line(tmp_path: Path) -> None:
    from gradleak.evaluation import executors, runner
    from gradleak.evaluation.workshop import Resources

    suite = tmp_path / "s.yaml"
    suite.write_text(
        "name: s\nvictims: 2\ndatasets: [digits]\nmodels: [linear]\n"
        "attacks: [mean-image, random-image, linear-leakage]\n"
        "settings: [{grants: {labels: known}}]\ndefenses: [none, sign]\n"
    )
    store = tmp_path / "s.sqlite"
    runner.run(suite, store, executors.build("local"), Resources())
    found = gradleak.read(store)
    assert {"psnr", "defense", "victim"} <= set(found.rows.columns)
    board = found.board()
    assert set(board.table["defense"]) == {"none", "sign"} and "<table>" in board._repr_html_()
    assert found.board("attacks").name == "attacks" and "<table>" in found._repr_html_()
    assert set(found.where(defense="sign").board().table["defense"]) == {"sign"}
    assert "no" in found.compare(found)._repr_html_() or len(found.compare(found).table)
    with pytest.raises(GradleakError, match="unknown board"):
        found.board("nonsense")
    with pytest.raises(GradleakError):
        gradleak.read(tmp_path / "absent.sqlite")


def test_a_captured_file_is_attacked_from_the_command_line(
    tmp_path: Path, captured: tuple[nn.Module, dict[str, Tensor], Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    module, update, _ = captured
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def build(width=6):\n"
        "    return nn.Sequential(nn.Conv2d(1, width, 3, 2, 1), nn.Sigmoid(), nn.Flatten(), nn.Linear(9 * width, 5))\n"
    )
    torch.save(module.state_dict(), tmp_path / "w.pt")
    save_file({name: tensor.contiguous() for name, tensor in update.items()}, tmp_path / "g.safetensors")
    torch.save({"_module." + name: tensor for name, tensor in module.state_dict().items()}, tmp_path / "opacus.pt")
    model = f"{tmp_path}/mine.py:build"
    given = ["attack", "--model", model, "--shape", "1,6,6", "--out", str(tmp_path / "out"), "--budget", "5s"]
    chosen = ["--attack", "inverting-gradients", "--options", "iterations=100"]
    files = ["--weights", str(tmp_path / "w.pt"), "--update", str(tmp_path / "g.safetensors")]
    assert main([*given, *files, *chosen]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["labels"] == [[3]] and report["mismatch"][0] < 0.1 and report["method"] == ["inverting-gradients"]
    assert (tmp_path / "out" / "victim0-image0.png").stat().st_size > 50
    assert "unexplained" in (tmp_path / "out" / "index.html").read_text()
    assert "assumed" in capsys.readouterr().out
    wrong = {
        "has no 'bild'": [*given[:2], f"{tmp_path}/mine.py:bild", *given[3:], *files],
        "module:function": [*given[:2], "mine", *given[3:], *files],
        "has shape": [*given, *files, "--model-options", "width=7"],
        "unknown attack": [*given, *files, "--attack", "nonsense"],
        "as 90s": [*given, *files, "--budget", "soon"],
        "as 3,32,32": [*given, *files, "--shape", "6,6"],
        "leave them out": [*given, *files, "--local-steps", "3"],
        "unknown kind": [*given, *files, "--kind", "weights"],
        "not a state dict": [*given, *files, "--weights", str(tmp_path / "mine.py")],
        "no such file": [*given[:2], f"{tmp_path}/none.py:build", *given[3:], *files],
    }
    for said, arguments in wrong.items():
        assert main(arguments) == 2
        assert said in capsys.readouterr().err
    assert main([*given, "--weights", str(tmp_path / "opacus.pt"), *files[2:], *chosen]) == 0, "wrapped names too"
