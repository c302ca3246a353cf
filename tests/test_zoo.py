"""Networks as people have them: the default engine equals plain autograd, or says why it cannot."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gradleak import registry
from gradleak.engine.derivatives import twice_differentiable
from gradleak.errors import GradleakError
from gradleak.model import initialise
from gradleak.update import Network, copied, one_hot

# torch tells of slow batching rules, and of older forms of what is tested here because people still use it.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:.*is deprecated in favor of")


def _load() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "zoo.py"
    spec = importlib.util.spec_from_file_location("zoo", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["zoo"] = module
    spec.loader.exec_module(module)
    return module


ZOO = _load()

VMAP = {
    "vit", "tied", "called-twice", "weight-read", "named-argument", "multi-head-attention", "transformer-encoder",
    "sequence-first", "batch-statistics", "centred-batch", "hooked", "weight-norm", "old-weight-norm",
    "spectral-norm", "old-spectral-norm", "pruned",
}  # fmt: skip
SEQUENTIAL = {"lstm", "gru", "branch"}
REFUSED = {"mobilenet_v3_small", "hard-sigmoid"}
MOVING = {"spectral-norm", "old-spectral-norm"}
"""In train mode every call moves their buffers."""
SLOW = {"googlenet", "resnext", "mnasnet"}
"""Seen in one mode only."""


def test_the_zoo_is_large() -> None:
    assert len(ZOO.SMALL) >= 25 and set(ZOO.SMALL) >= VMAP | SEQUENTIAL | REFUSED


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", ZOO.SMALL)
def test_the_default_engine_equals_plain_autograd(name: str, mode: str) -> None:
    if (name in MOVING and mode == "train") or (name in SLOW and mode == "eval"):
        pytest.skip("its buffers move" if name in MOVING else "seen in train mode")
    found = ZOO.measure(ZOO.SMALL[name], mode)
    expected = {**dict.fromkeys(VMAP, "vmap"), **dict.fromkeys(SEQUENTIAL, "sequential")}
    expected |= dict.fromkeys(REFUSED, "refused")
    assert found.backend == expected.get(name, "layerwise"), found.reason
    assert (found.reason == "") is (found.backend == "layerwise") and "\n" not in found.reason
    if found.backend == "refused":
        assert "(Hardsigmoid) is not" in found.reason and "relu6" in found.reason
    else:
        assert found.error < 1e-8


@pytest.mark.parametrize("name", ["weight-norm", "old-weight-norm", "spectral-norm", "old-spectral-norm", "pruned"])
def test_reparametrised_networks_are_copied_again_and_again(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Network.of(copied(ZOO.SMALL[name]()))
    images = torch.linspace(0, 1, 3072).view(1, 3, 32, 32)
    assert twice_differentiable(network, images, one_hot(torch.tensor([3]), 10, torch.float32)) is None
    again = network.to("cpu", torch.float64).to("cpu", torch.float32)
    torch.testing.assert_close(again.logits(images), network.logits(images))


def test_what_cannot_be_computed_is_named_before_anything_runs() -> None:
    network = Network.of(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3), torch.nn.GroupNorm(3, 3)))
    reason = twice_differentiable(network, torch.rand(1, 1, 2, 2), torch.full((1, 3), 1 / 3))
    assert reason is not None and "cannot compute a batch of 1 (ValueError: Expected more than 1 value" in reason


# torchvision's networks as models of a suite


def foreign(**options: Any) -> Any:
    return registry.build("models", "torchvision", options)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28)])
@pytest.mark.parametrize("name", ["squeezenet1_1", "shufflenet_v2_x0_5"])
def test_torchvision_networks_take_the_images_of_a_dataset(name: str, shape: tuple[int, int, int]) -> None:
    network = initialise(foreign(name=name), shape, 7, 0)
    assert network.eval()(torch.rand(2, *shape)).shape == (2, 7)
    assert Network.of(network, "train").logits(torch.rand(2, *shape)).shape == (2, 7), "nothing samples"


def test_weights_come_from_a_file_and_the_head_fits_the_classes(tmp_path: Path) -> None:
    first = initialise(foreign(name="squeezenet1_1"), (3, 32, 32), 1000, 1)
    state = {name: tensor.contiguous() for name, tensor in first[2].state_dict().items()}  # type: ignore[index]
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pt")
    for file in ("a.safetensors", "a.pt"):
        model = foreign(name="squeezenet1_1", weights=str(tmp_path / file))
        loaded = initialise(model, (3, 32, 32), 10, 0)[2].state_dict()  # type: ignore[index]
        same = [name for name in state if loaded[name].shape == state[name].shape]
        assert len(same) == len(state) - 2 and all(torch.equal(loaded[name], state[name]) for name in same)
        assert len(registry.options_of(model)["digest"]) == 64
    with pytest.raises(GradleakError, match=r"'features.0.weight' is missing or differs|'conv1"):
        initialise(foreign(name="shufflenet_v2_x0_5", weights=str(tmp_path / "a.pt")), (3, 32, 32), 10, 0)


def test_wrong_torchvision_models_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(GradleakError, match=r"did you mean 'resnet18'"):
        foreign(name="resnet81")
    with pytest.raises(GradleakError, match="no file"):
        foreign(name="resnet18", weights=str(tmp_path / "absent.pt"))
    (tmp_path / "bad.pt").write_text("no weights")
    with pytest.raises(GradleakError, match="not a state dict") as caught:
        initialise(foreign(name="squeezenet1_1", weights=str(tmp_path / "bad.pt")), (3, 32, 32), 10, 0)
    assert "\n" not in str(caught.value)
    with pytest.raises(GradleakError, match="expected 1234"):
        foreign(name="resnet18", weights=str(tmp_path / "bad.pt"), digest="1234")
    with pytest.raises(GradleakError, match="cannot take images"):
        initialise(foreign(name="alexnet"), (3, 32, 32), 10, 0)
