"""Mixed labels from the last layer, and the images behind mixed ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gradleak import registry, structure
from gradleak.attack import Reconstruction
from gradleak.errors import GradleakError
from gradleak.mechanisms.unmixing import Mixture, unmix
from gradleak.search import labels as label_rules
from gradleak.seeds import Generators
from gradleak.threat import Setting
from gradleak.update import local_update, one_hot, stack
from tests.test_attacks_optimisation import DIGITS, Case, psnr

MODELS: list[tuple[str, dict[str, Any]]] = [("mlp", {"widths": [32]}), ("lenet", {}), ("convnet", {"width": 4})]


def smoothed(labels: Tensor) -> Tensor:
    """Targets smoothed by a tenth, [N, 10]."""
    return 0.9 * one_hot(labels, 10, torch.float32) + 0.01


def mixed(labels: Tensor) -> Tensor:
    """Means of two labels."""
    return 0.65 * one_hot(labels, 10, torch.float32) + 0.35 * one_hot((labels + 3) % 10, 10, torch.float32)


@pytest.mark.parametrize(("model", "options"), MODELS)
@pytest.mark.parametrize("soften", [smoothed, mixed])
def test_one_image_shows_its_soft_label(model: str, options: dict[str, Any], soften: Any) -> None:
    case = Case(victims=6, model=model, options=options)
    targets = soften(case.labels)
    rows = [
        {name: t.detach() for name, t in local_update(case.network, x, y, case.setting.local_training).items()}
        for x, y in zip(case.images, targets, strict=True)
    ]
    head = structure.of(case.network.module).head
    found = label_rules.soft(stack(rows), head, case.network)
    assert (found - targets).abs().max() < 1e-4
    with pytest.raises(GradleakError, match="weight and bias"):
        label_rules.soft(stack(rows), structure.Head(head.weight, None), case.network)


def solve(case: Case, name: str = "decoded-spear") -> Reconstruction:
    answer: Reconstruction = registry.build("attacks", name).reconstruct(
        case.observation, Generators(range(case.observation.victims), dtype=case.observation.dtype)
    )
    return answer


@pytest.mark.parametrize("defense", ["mixup", "instahide"])
def test_images_behind_encoded_ones_are_found_exactly_where_labels_differ(defense: str) -> None:
    case = Case(Setting(batch_size=4), 8, "mlp", {"widths": [64]}, defense, view=True)
    answer = solve(case)
    quality = psnr(answer.images, case.images)
    exact = torch.tensor([len(row.unique()) == 4 for row in case.labels]) & (answer.details["self_check"] > 0.99)
    assert exact.sum() >= 2
    assert quality.view(8, -1)[exact].min() > 60
    # Where labels are shared the sum is found, and no less than public images say.
    prior = psnr(registry.build("attacks", "class-mean").reconstruct(case.observation, None).images, case.images)
    assert quality.view(8, -1)[~exact].mean() > prior.view(8, -1)[~exact].mean() + 0.5
    assert torch.equal(answer.labels, case.labels)  # type: ignore[arg-type]


def test_what_cannot_be_decoded_is_refused() -> None:
    attack = registry.build("attacks", "decoded-spear")
    case = Case(model="mlp", options={"widths": [64]})
    setting = Setting(batch_size=4)
    for defense in ("none", "augmentation", "dropout"):
        assert "mixes images" in attack.unsuited(case.module, setting, registry.build("defenses", defense))
    mixup = registry.build("defenses", "mixup")
    assert attack.unsuited(case.module, setting, mixup) is None
    assert "linear layer" in attack.unsuited(Case().module, setting, mixup)
    many = torch.zeros(9, 1, 8, 8)
    assert (
        registry.build("defenses", "instahide").recover(
            many, torch.zeros(9, 10), torch.zeros(9).long(), DIGITS.split.train
        )
        is None
    )


def test_unmixing_needs_no_public_images_where_nothing_is_hidden() -> None:
    images, labels = DIGITS.victims(1, 3, tuning=True)
    labels = torch.tensor([2, 5, 7])
    weights = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.3, 0.6]], dtype=torch.float64)
    soft = weights @ one_hot(labels, 10, torch.float64)
    encoded = torch.einsum("ij,jchw->ichw", weights, images[0].double())
    assert (unmix(encoded[None], Mixture.of(soft, labels, 64, None)) - images[0]).abs().max() < 1e-6


def test_a_sum_of_clients_is_a_batch_to_spear() -> None:
    case = Case(victims=8, model="mlp", options={"widths": [64]})
    sums = {name: tensor.unflatten(0, (-1, 4)).mean(1) for name, tensor in case.observation.update.items()}
    truth = case.images.view(2, 4, *DIGITS.shape)
    case.observation = type(case.observation)(
        **{**vars(case.observation), "message": sums, "update": sums, "batch_size": 4, "labels": None}
    )
    answer = solve(case, "spear")
    apart = (answer.images[:, :, None] - truth[:, None]).square().flatten(3).mean(3).amin(1)
    assert apart.max() < 1e-9
