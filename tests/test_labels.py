from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from gradleak.errors import GradleakError
from gradleak.search import labels
from gradleak.structure import Head

CLASSES = 10
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
}


def network(activation: str, bias: bool = True, classes: int = CLASSES) -> nn.Sequential:
    # The hidden layer has as many outputs as there are classes: the last one must be found, not the first.
    layers = (nn.Flatten(), nn.Linear(48, classes), ACTIVATIONS[activation](), nn.Linear(classes, 32))
    return nn.Sequential(*layers, ACTIVATIONS[activation](), nn.Linear(32, classes, bias=bias))


def leak(
    activation: str, victims: int, batch: int, seed: int, bias: bool = True, classes: int = CLASSES
) -> tuple[dict[str, Tensor], Tensor]:
    """Stacked gradients of `victims` random networks, each on its own random batch, and the sorted labels."""
    stream = torch.Generator().manual_seed(seed)
    model = network(activation, bias, classes).requires_grad_(False)
    weights = {
        name: torch.randn(victims, *p.shape, generator=stream) / (p.shape[-1] if p.ndim > 1 else 1) ** 0.5
        for name, p in model.named_parameters()
    }
    images = torch.rand(victims, batch, 3, 4, 4, generator=stream)
    truth = torch.randint(classes, (victims, batch), generator=stream)

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, parameters, (x,)), y)

    return vmap(grad(loss))(weights, images, truth), truth.sort(-1).values


def head_of(update: dict[str, Tensor]) -> Head:
    weight = [name for name in update if name.endswith("weight")][-1]
    bias = weight.replace("weight", "bias")
    return Head(weight=weight, bias=bias if bias in update else None)


def infer(update: dict[str, Tensor], classes: int, batch_size: int, rule: str = "auto") -> Tensor:
    head = head_of(update)
    assert update[head.weight or ""].shape[1] == classes
    return labels.infer(update, head, batch_size, rule)


def accuracy(inferred: Tensor, truth: Tensor) -> float:
    common = [sum((Counter(a) & Counter(b)).values()) for a, b in zip(inferred.tolist(), truth.tolist(), strict=True)]
    return sum(common) / truth.numel()


@given(seed=st.integers(0, 2**32), activation=st.sampled_from(sorted(ACTIVATIONS)))
@settings(max_examples=25, deadline=None)
def test_bias_rules_are_exact_for_one_image_and_any_activation(seed: int, activation: str) -> None:
    update, truth = leak(activation, 4, 1, seed)
    for rule in ("auto", "bias-sign", "bias-corrected", "row-sign"):
        assert torch.equal(infer(update, CLASSES, 1, rule), truth), rule


@given(seed=st.integers(0, 2**32), activation=st.sampled_from(["relu", "sigmoid"]))
@settings(max_examples=25, deadline=None)
def test_row_rules_are_exact_for_one_image_and_features_that_are_not_negative(seed: int, activation: str) -> None:
    update, truth = leak(activation, 4, 1, seed, bias=False)
    for rule in ("auto", "row-sum", "wainakh", "row-sign"):
        assert torch.equal(infer(update, CLASSES, 1, rule), truth), rule


def test_row_sum_fails_on_signed_features() -> None:
    # Each network's features have a sum of either sign, so that about half the labels are right.
    update, truth = leak("tanh", 300, 1, 0)
    assert 0.35 < accuracy(infer(update, CLASSES, 1, "row-sum"), truth) < 0.7
    assert accuracy(infer(update, CLASSES, 1, "row-sign"), truth) == 1


def test_bias_rule_is_exact_for_two_classes() -> None:
    update, truth = leak("tanh", 50, 1, 0, classes=2)
    assert torch.equal(infer(update, 2, 1), truth)


def untrained(bias: bool, victims: int = 60, batch: int = 8) -> tuple[dict[str, Tensor], Tensor]:
    """As `leak`, on one convolutional ReLU network with torch's own initialisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 12, 3, 2), nn.ReLU(), nn.Conv2d(12, 12, 3, 2), nn.ReLU(), nn.Flatten(),
            nn.Linear(588, CLASSES, bias=bias),
        )  # fmt: skip
    stream = torch.Generator().manual_seed(1)
    images = torch.rand(victims, batch, 3, 32, 32, generator=stream)
    truth = torch.randint(CLASSES, (victims, batch), generator=stream)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, weights, (x,)), y)

    return vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images, truth), truth.sort(-1).values


def test_counting_rules_find_batches_with_repeated_labels() -> None:
    update, truth = untrained(bias=True)
    found = {rule: accuracy(infer(update, CLASSES, 8, rule), truth) for rule in labels.RULES if rule != "row-sign"}
    assert found["bias-corrected"] >= 0.95, found
    assert found["wainakh"] >= 0.9, found
    # Rules for distinct labels miss the repeats.
    assert max(found["yin"], found["row-sum"], found["bias-sign"]) < 0.8, found
    assert torch.equal(infer(update, CLASSES, 8), infer(update, CLASSES, 8, "bias-corrected"))
    update, truth = untrained(bias=False)
    assert accuracy(infer(update, CLASSES, 8), truth) >= 0.9


@pytest.mark.parametrize("rule", [rule for rule in labels.RULES if rule != "row-sign"])
def test_distinct_labels_are_found(rule: str) -> None:
    update, truth = untrained(bias=True, victims=150, batch=4)
    distinct = torch.tensor([len(set(row)) == 4 for row in truth.tolist()])
    assert 40 < distinct.sum() < 150
    some = {name: tensor[distinct] for name, tensor in update.items()}
    assert accuracy(infer(some, CLASSES, 4, rule), truth[distinct]) >= 0.95


@pytest.mark.parametrize("rule", [rule for rule in labels.RULES if rule != "row-sign"])
def test_stacked_victims_and_single_ones_agree(rule: str) -> None:
    update, _ = leak("relu", 6, 5, 3)
    stacked = infer(update, CLASSES, 5, rule)
    assert stacked.shape == (6, 5) and stacked.dtype == torch.int64
    for victim in range(6):
        one = {name: tensor[victim : victim + 1] for name, tensor in update.items()}
        assert torch.equal(infer(one, CLASSES, 5, rule)[0], stacked[victim])
        weight, bias = labels.gradients(one, head_of(one))
        assert weight is not None and bias is not None
        bare = labels.RULES[rule](weight[0], bias[0], 5)
        assert torch.equal(bare.sort().values, stacked[victim]), "a rule takes one victim as well"


@given(
    seed=st.integers(0, 2**32),
    power=st.integers(-10, 10),
    rule=st.sampled_from(["bias-corrected", "wainakh", "yin"]),
)
@settings(max_examples=20, deadline=None)
def test_scale_does_not_matter_and_the_sign_does(seed: int, power: int, rule: str) -> None:
    # Powers of two scale floats exactly. A FedAvg delta of one step is the gradient times minus the rate.
    update, _ = leak("relu", 3, 4, seed)
    inferred = infer(update, CLASSES, 4, rule)
    delta = {name: -(2.0**power) * tensor for name, tensor in update.items()}
    negated = {name: -tensor for name, tensor in delta.items()}
    assert torch.equal(infer(negated, CLASSES, 4, rule), inferred)
    assert not torch.equal(infer(delta, CLASSES, 4, rule), inferred)


def test_counting_by_hand() -> None:
    # Two zeros and one 3 of 4 classes at p = 1/4: db = p - n/3. Impact: -(5/12 + 1/12)/3 = -1/6.
    bias = torch.tensor([[1 / 4 - 2 / 3, 1 / 4, 1 / 4, 1 / 4 - 1 / 3]])
    update = {"fc.weight": bias[..., None].expand(1, 4, 5), "fc.bias": bias}
    assert infer(update, 4, 3).tolist() == [[0, 0, 3]]
    assert infer({"fc.weight": update["fc.weight"]}, 4, 3).tolist() == [[0, 0, 3]]


def test_wainakh_impact_by_hand() -> None:
    # Impact 5/4 * -12.01/12 = -1.25: ten labels take class 0 to 0.5, so that class 2 at 0 has the twelfth.
    weight = torch.tensor([[-12.0], [-0.01], [0.0], [12.01]])
    assert labels.wainakh(weight, None, 12).sort().values.tolist() == [0] * 10 + [1, 2]


def test_yin_takes_the_rows_with_the_smallest_entries() -> None:
    weight = torch.tensor([[-1.0, 9.0], [-3.0, 5.0], [-2.0, -2.0], [0.0, 0.0]])
    assert labels.column_min(weight, None, 2).tolist() == [1, 2]
    assert labels.row_sum(weight, None, 2).tolist() == [2, 3]


def test_bad_requests_are_refused() -> None:
    update, _ = leak("relu", 2, 1, 0, bias=False)
    with pytest.raises(GradleakError, match=r"did you mean 'wainakh'.*row-sum"):
        infer(update, CLASSES, 1, "wainak")
    with pytest.raises(GradleakError, match=r"no linear layer whose output is the logits .* labels must be granted"):
        labels.infer(update, Head(weight=None, bias=None), 1)
    with pytest.raises(GradleakError, match="weight, which is not in the update"):
        labels.infer(update, Head(weight=None, bias="5.weight"), 1, "wainakh")
    with pytest.raises(GradleakError, match="needs a bias"):
        infer(update, CLASSES, 1, "bias-corrected")
    with pytest.raises(GradleakError, match="at most 10 for 10 classes, not 11"):
        infer(update, CLASSES, 11, "row-sum")
    with pytest.raises(GradleakError, match="batch of 1, not 2"):
        infer(update, CLASSES, 2, "row-sign")
    assert infer(update, CLASSES, 11, "wainakh").shape == (2, 11)
