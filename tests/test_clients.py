"""Clients as people train them, against plain training loops with torch's own losses and optimisers, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradleak import GradleakError, registry
from gradleak.client import Client
from gradleak.engine.backends import Vmap
from gradleak.engine.comparison import disagreement
from gradleak.engine.layerwise import Layerwise
from gradleak.suite import build_setting
from gradleak.suite.cells import question_of
from gradleak.suite.settings import stored_setting
from gradleak.testing import Scene, check, check_file, model, reconstruct
from gradleak.update import LocalTraining, Network, by_transform, local_update, one_hot
from tests import trials

CLASSES, SIZE = 10, 4


def batch() -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(3)
    return torch.rand(SIZE, 1, 8, 8, generator=stream, dtype=torch.float64), torch.tensor([3, 1, 3, 7])


def net() -> nn.Module:
    return model("lenet").double()


def client(name: str = "sgd", **options: Any) -> Client:
    built: Client = registry.build("clients", name, options)
    return built


def by_loop(
    make: Callable[..., torch.optim.Optimizer],
    loss: Callable[[Tensor, Tensor], Tensor],
    order: list[list[int]],
    parts: int = 1,
) -> dict[str, Tensor]:
    """Train as people do; return the weight difference."""
    module, (images, labels) = net(), batch()
    before = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
    optimiser = make(module.parameters())
    for step in order:
        optimiser.zero_grad()
        for part in torch.tensor(step).chunk(parts):
            (loss(module(images[part]), labels[part]) / parts).backward()
        optimiser.step()
    return {name: tensor.detach() - before[name] for name, tensor in module.named_parameters()}


def ours(who: Client, training: LocalTraining, order: Tensor | None = None) -> dict[str, Tensor]:
    images, labels = batch()
    network = Network.of(net(), client=who)
    return local_update(network, images, one_hot(labels, CLASSES, torch.float64), training, order=order)


STEPS = [[0, 1], [2, 3], [0, 1], [2, 3], [0, 1]]
SGD, ADAM = torch.optim.SGD, torch.optim.Adam
OPTIMISERS: dict[str, tuple[Client, Callable[..., torch.optim.Optimizer]]] = {
    "plain": (client(), partial(SGD, lr=0.1)),
    "momentum": (client(momentum=0.9), partial(SGD, lr=0.1, momentum=0.9)),
    "dampened": (client(momentum=0.9, dampening=0.3), partial(SGD, lr=0.1, momentum=0.9, dampening=0.3)),
    "nesterov": (client(momentum=0.8, nesterov=True), partial(SGD, lr=0.1, momentum=0.8, nesterov=True)),
    "decay": (client(weight_decay=0.01), partial(SGD, lr=0.1, weight_decay=0.01)),
    "both": (
        client(momentum=0.9, weight_decay=0.01),
        partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    ),
    "adam": (client("adam"), partial(ADAM, lr=0.1)),
    "adam, decay": (
        client("adam", weight_decay=0.01, first=0.8),
        partial(ADAM, lr=0.1, weight_decay=0.01, betas=(0.8, 0.999)),
    ),
    "adamw": (client("adam", weight_decay=0.1, decoupled=True), partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1)),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_local_steps_are_those_of_torch(name: str) -> None:
    who, make = OPTIMISERS[name]
    expected = by_loop(make, F.cross_entropy, STEPS)
    found = ours(who, LocalTraining(steps=len(STEPS), batch_size=2, lr=0.1, client=who))
    # Adam divides by roots of what cancels exactly in one of the two.
    for key, tensor in expected.items():
        assert torch.allclose(found[key], tensor, rtol=1e-7, atol=1e-9), key


def as_one_hot(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda scores, labels: loss(scores, F.one_hot(labels, CLASSES).double())


def focal(scores: Tensor, targets: Tensor) -> Tensor:
    chances = scores.softmax(-1)
    return -(targets * (1 - chances) ** 2 * chances.log()).sum(-1).mean()


LOSSES: dict[str, tuple[Client, Callable[[Tensor, Tensor], Tensor]]] = {
    "bce": (client(loss="bce"), as_one_hot(F.binary_cross_entropy_with_logits)),
    "mse": (client(loss="mse"), as_one_hot(F.mse_loss)),
    "smoothed": (client(label_smoothing=0.2), partial(F.cross_entropy, label_smoothing=0.2)),
    "own": (client(loss=f"{__file__}:focal"), as_one_hot(focal)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_torchs_losses(name: str) -> None:
    who, loss = LOSSES[name]
    images, labels = batch()
    module = net()
    expected = torch.autograd.grad(loss(module(images), labels), list(module.parameters()))
    found = ours(who, LocalTraining())
    for tensor, gradient in zip(expected, found.values(), strict=True):
        assert torch.allclose(gradient, tensor, rtol=1e-9, atol=1e-12)


def test_accumulation_is_a_loop_of_smaller_backwards() -> None:
    who = client(accumulation=2, momentum=0.9)
    expected = by_loop(partial(SGD, lr=0.1, momentum=0.9), F.cross_entropy, [[0, 1, 2, 3]] * 2, parts=2)
    found = ours(who, LocalTraining(steps=2, lr=0.1, client=who))
    assert all(torch.allclose(found[key], tensor, rtol=1e-9, atol=1e-12) for key, tensor in expected.items())
    with pytest.raises(GradleakError, match="does not divide a step of 4"):
        ours(client(accumulation=3), LocalTraining())


def test_accumulation_matters_where_a_batch_is_normalised() -> None:
    images, labels = batch()
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, CLASSES)).double()
    targets = one_hot(labels, CLASSES, torch.float64)
    found = local_update(Network.of(module, "train", client(accumulation=2)), images, targets, LocalTraining())
    module.train()
    for part in (slice(0, 2), slice(2, 4)):
        (F.cross_entropy(module(images[part]), labels[part]) / 2).backward()
    for name, tensor in module.named_parameters():
        assert tensor.grad is not None and torch.allclose(found[name], tensor.grad, atol=1e-12), name


def test_bfloat16_is_torchs_autocast() -> None:
    images, labels = batch()
    images, module = images.float(), model("lenet")
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(module(images), labels)
    expected = torch.autograd.grad(loss, list(module.parameters()))
    found = local_update(
        Network.of(module, client=client(forward="bfloat16")),
        images,
        one_hot(labels, CLASSES, torch.float32),
        LocalTraining(),
    )
    exact = local_update(Network.of(module), images, one_hot(labels, CLASSES, torch.float32), LocalTraining())
    flat = [torch.cat([tensor.flatten() for tensor in each]) for each in (expected, found.values(), exact.values())]
    theirs, mine, full = flat
    assert (mine - theirs).norm() < 0.01 * theirs.norm(), "the products of a backward pass may be ordered otherwise"
    assert (full - theirs).norm() > 3 * (mine - theirs).norm(), "and it is no float32"


def test_a_drawn_order_is_kept_to_and_is_private() -> None:
    images, labels = batch()
    training = LocalTraining(steps=6, batch_size=2, lr=0.1, order="shuffled", client=client(momentum=0.9))
    order = training.drawn(SIZE, torch.Generator().manual_seed(5))
    assert order is not None and order.shape == (6, 2)
    assert all(sorted(row.tolist()) == [0, 1, 2, 3] for row in order.view(3, 4)), "each pass sees every image once"
    expected = by_loop(partial(SGD, lr=0.1, momentum=0.9), F.cross_entropy, order.tolist())
    found = ours(training.client, training, order)
    assert all(torch.allclose(found[key], tensor, rtol=1e-9, atol=1e-12) for key, tensor in expected.items())
    values = {"batch_size": SIZE, "local_epochs": 3, "local_batch_size": 2, "local_lr": 0.1, "local_order": "shuffled"}
    setting = build_setting({**values, "precision": "float64", "client": {"sgd": {"momentum": 0.9}}})
    assert setting.local_steps == 6
    scene = Scene.of(net(), images[None].repeat(2, 1, 1, 1, 1), labels[None].repeat(2, 1), setting=setting)
    first, second = (torch.cat([t[n].flatten() for t in scene.sent.update.values()]) for n in range(2))
    assert scene.sent.drew and not torch.equal(first, second), "every client draws its own"
    seen = scene.observe(local_training=True)
    assert not hasattr(seen, "order") and seen.training.client == setting.trains


@pytest.mark.parametrize("name", ["momentum", "adam", "nesterov"])
def test_attackers_differentiate_through_optimisers(name: str) -> None:
    """The derivative by the images, against finite differences: what a matching attack descends by."""
    # With its usual eps Adam's first step is a sign, which finite differences cannot follow.
    who = client("adam", eps=0.01) if name == "adam" else OPTIMISERS[name][0]
    images, labels = batch()
    network = Network.of(model("mlp", activation="sigmoid").double(), client=who)
    training = LocalTraining(steps=2, batch_size=2, lr=0.05, client=who)
    weight = {key: torch.randn_like(tensor) for key, tensor in network.parameters.items()}

    def value(pixels: Tensor) -> Tensor:
        update = local_update(network, pixels, one_hot(labels, CLASSES, torch.float64), training)
        return torch.stack([(update[key] * weight[key]).sum() for key in update]).sum()

    pixels = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(value(pixels), pixels)
    direction = torch.randn_like(images)
    ahead, behind = value(images + 1e-5 * direction), value(images - 1e-5 * direction)
    assert torch.allclose((slope * direction).sum(), (ahead - behind) / 2e-5, rtol=1e-3)


def test_adam_has_finite_derivatives_where_gradients_vanish() -> None:
    who = client("adam")
    images, labels = batch()
    network = Network.of(model("mlp").double(), client=who)  # ReLU: some units see nothing
    images = images.requires_grad_()
    update = local_update(
        network, images, one_hot(labels, CLASSES, torch.float64), LocalTraining(steps=2, lr=0.01, client=who)
    )
    (slope,) = torch.autograd.grad(torch.stack([tensor.square().sum() for tensor in update.values()]).sum(), images)
    assert slope.isfinite().all()


CONDUCTS: list[dict[str, Any]] = [
    {"client": {"sgd": {"loss": "bce"}}},
    {"client": {"sgd": {"loss": "mse"}}},
    {"client": {"sgd": {"label_smoothing": 0.1}}},
    {"client": {"sgd": {"momentum": 0.9, "weight_decay": 0.01}}, "local_lr": 0.1, "local_steps": 3},
    {"client": {"adam": {"eps": 0.1}}, "local_lr": 0.01, "local_steps": 2},
    {"client": {"adam": {"loss": "bce", "eps": 0.1}}, "local_lr": 0.01, "local_steps": 2, "trainable": ["1", "3"]},
]


@pytest.mark.parametrize("values", CONDUCTS, ids=str)
def test_matching_attacks_come_to_the_truth_of_such_clients(values: dict[str, Any]) -> None:
    """The loss at the truth is zero, and a search that knows the client finds it.

    Of Adam with a small eps little more than signs is sent, which no search by derivatives can follow.
    """
    images, labels = batch()
    setting = build_setting({"precision": "float64", **values})
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Sigmoid(), nn.Linear(24, CLASSES)).double()
    scene = Scene.of(module, images[None, :1], labels[None, :1], setting=setting)
    seen = scene.observe(local_training=True)
    attack = registry.build(
        "attacks", "inverting-gradients", {"iterations": 200, "tv": 0.0, "objective": "relative-squared", "lr": 0.05}
    )
    truth = attack.loss(seen, scene.sent.images, scene.sent.targets, {})
    assert float(truth) < 1e-12
    answer = reconstruct(attack, seen)
    assert answer.loss is not None and float(answer.loss) < 0.05
    assert float((answer.images - images[:1]).square().mean()) < 0.02, "17 dB"


def test_fast_backends_are_right_or_refuse() -> None:
    images, labels = batch()
    attack = registry.build("attacks", "inverting-gradients", {"iterations": 5})
    for values in CONDUCTS[:4]:
        scene = Scene.of(
            net(), images[:, None], labels[:, None], setting=build_setting({"precision": "float64", **values})
        )
        seen = scene.observe(local_training=True)
        problem, facts = attack.problem(seen), attack.facts(seen)
        variables = {"pixels": torch.rand(SIZE, 1, 1, 8, 8, dtype=torch.float64)}
        assert Layerwise().refusal(problem, variables, facts) is not None
        vmap = Vmap()
        assert disagreement(vmap, problem, variables, facts, vmap.prepare(problem, facts)) is None


def test_updates_of_several_clients_in_one_stack_are_the_same() -> None:
    images, labels = batch()
    setting = build_setting(
        {"precision": "float64", "batch_size": 2, "local_lr": 0.1, "local_steps": 4, "local_batch_size": 1}
        | {"client": {"adam": {"loss": "bce"}}, "local_order": "shuffled"}
    )
    from gradleak.federation import client as federation

    network = federation.client_network(net(), registry.build("defenses", "none"), setting)
    send = partial(
        federation.send,
        network,
        images.view(2, 2, 1, 8, 8),
        labels.view(2, 2),
        CLASSES,
        registry.build("defenses", "none"),
        setting,
    )
    alone, together = send(0, [1, 2]), send(0, [1, 2], together=True)
    for name, tensor in alone.update.items():
        assert torch.allclose(together.update[name], tensor, rtol=1e-6, atol=1e-9), name
    assert by_transform is not None


def test_settings_name_clients_and_keep_their_old_keys() -> None:
    plain = build_setting({"local_lr": 0.1})
    assert "client" not in stored_setting(plain) and "local_order" not in stored_setting(plain)
    given = build_setting({"local_lr": 0.1, "client": {"sgd": {"momentum": 0.5}}})
    again = build_setting(stored_setting(given))
    assert again == given and again.trains == client(momentum=0.5)
    assert stored_setting(given)["client"]["options"]["momentum"] == 0.5
    own = build_setting({"client": {"sgd": {"loss": f"{Path(__file__)}:focal"}}})
    assert len(own.trains.digest) == 64, "the code of a loss is part of a cell"


def test_the_code_of_a_client_is_another_cell_and_the_same_question() -> None:
    given = build_setting({"local_lr": 0.1, "client": {"sgd": {"momentum": 0.5}}})
    edited = replace(given, client=replace(given.client, code="other", version="99"))
    steeper = build_setting({"local_lr": 0.1, "client": {"sgd": {"momentum": 0.6}}})
    cell, other, third = (replace(trials.cell("x"), setting=setting) for setting in (given, edited, steeper))
    assert len({cell.key, other.key, third.key}) == 3
    assert question_of(cell.stored()) == question_of(other.stored()) != question_of(third.stored())


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"client": "nonsense"}, "unknown client"),
    ({"client": {"sgd": {"momentun": 0.9}}}, "did you mean 'momentum'"),
    ({"client": {"sgd": {"momentum": 0.9}}}, "give local_lr"),
    ({"client": "adam"}, "give local_lr"),
    ({"client": {"sgd": {"loss": "huber"}}}, "unknown loss"),
    ({"client": {"sgd": {"loss": "no.such.module:f"}}}, "cannot be imported"),
    ({"client": {"sgd": {"nesterov": True}}}, "nesterov"),
    ({"client": {"sgd": {"forward": "bfloat16"}}, "precision": "float64"}, "no use for precision"),
    ({"client": {"sgd": {"accumulation": 3}}, "batch_size": 4}, "does not divide"),
    ({"local_order": "shuffled"}, "needs local_lr"),
    ({"local_epochs": 2, "local_steps": 2, "local_lr": 0.1}, "say the same"),
    ({"local_epochs": 0, "local_lr": 0.1}, "whole numbers"),
    ({"weight_decay": 0.1}, "unknown key 'weight_decay'"),
]


@pytest.mark.parametrize(("values", "said"), WRONG)
def test_what_makes_no_sense_is_refused_in_a_line(values: dict[str, Any], said: str) -> None:
    with pytest.raises(GradleakError, match=said) as caught:
        build_setting(values)
    assert "\n" not in str(caught.value)


def test_labels_are_not_inferred_from_losses_that_do_not_show_them() -> None:
    module, defense = net(), registry.build("defenses", "none")
    attack = registry.build("attacks", "inverting-gradients")
    for loss, refused in (("mse", True), ("bce", False)):
        reason = attack.unsuited(module, build_setting({"client": {"sgd": {"loss": loss}}}), defense)
        assert (reason is not None) == refused, reason


@pytest.mark.parametrize("name", registry.names("clients"))
def test_built_in_clients_keep_their_promises(name: str) -> None:
    assert [found for found in check("clients", name) if found.ok is False] == []


def test_a_plugin_brings_a_client(tmp_path: Path) -> None:
    file = tmp_path / "sign_sgd.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom gradleak.client import Client\n\n"
        "@dataclass(frozen=True, kw_only=True)\nclass SignSGD(Client):\n"
        '    """Steps of equal size (Bernstein et al., arXiv:1802.04434)."""\n'
        '    reference = "arXiv:1802.04434"\n\n'
        "    def step(self, parameters, gradient, state, lr):\n"
        "        return {name: tensor - lr * gradient[name].sign() for name, tensor in parameters.items()}, state\n"
    )
    assert registry.add_file(file) == [("clients", "sign-sgd")]
    setting = build_setting({"local_lr": 0.1, "client": "sign-sgd", "precision": "float64"})
    images, labels = batch()
    scene = Scene.of(net(), images[None, :1], labels[None, :1], setting=setting)
    moved = torch.cat([tensor.flatten() for tensor in scene.sent.update.values()])
    assert set(moved.abs().unique().tolist()) <= {0.0, 0.1} or torch.allclose(moved.abs().max(), moved.new_tensor(0.1))
    assert stored_setting(setting)["client"]["code"], "its code is part of a cell"
    broken = tmp_path / "broken.py"
    broken.write_text(file.read_text().replace("SignSGD", "Broken").replace(".sign()", ".sign()[None]"))
    assert any(found.ok is False and "broken.py" in found.detail for found in check_file(broken))
