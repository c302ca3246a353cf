"""A client of plain torch: two local steps of SGD with momentum on one image; its weight difference is attacked.

python examples/plain_torch.py [--save FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gradleak
from gradleak import LocalTraining, Observation
from gradleak.clients.sgd import SGD

LR, STEPS, MOMENTUM = 0.1, 2, 0.9


def network() -> nn.Module:
    """Return the model that the server sends."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, 10))


def private() -> tuple[Tensor, Tensor]:
    """Return the client's image [1, 1, 8, 8] and its label [1]."""
    digits = load_digits()
    return torch.tensor(digits.images[:1, None] / 16, dtype=torch.float32), torch.tensor(digits.target[:1])


def train(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Train as people do; return what the client sends: its weights after training minus those before."""
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    optimiser = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    for _ in range(STEPS):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimiser.step()
    return {name: tensor.detach() - before[name] for name, tensor in model.named_parameters()}


def main(save: Path | None = None) -> float:
    """Train, attack, and return the PSNR in dB of what came back."""
    images, labels = private()
    update = train(network(), images, labels)
    if save is not None:
        save.mkdir(parents=True, exist_ok=True)
        save_file(network().state_dict(), save / "weights.safetensors")
        save_file(update, save / "update.safetensors")
    client = SGD(momentum=MOMENTUM)
    local = LocalTraining(steps=STEPS, lr=LR)
    observation = Observation.of(network(), update, (1, 8, 8), local=local, client=client)
    found = gradleak.attack(observation, "gauss-newton", restarts=2)
    print(*found.lines(), sep="\n")
    psnr = float(-10 * (found.images[0] - images).square().mean().log10())
    print(f"the image came back with {psnr:.1f} dB")
    return psnr


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", type=Path, help="write weights.safetensors and update.safetensors there")
    main(parser.parse_args().save)
