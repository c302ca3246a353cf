"""One step of Opacus' DPOptimizer, with little noise and with much; what leaves the client is attacked.

python examples/opacus_client.py
"""

from __future__ import annotations

import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gradleak
from gradleak import Observation
from gradleak.defenses.dp_sgd import DPSGD

CLIP = 1.0


def network() -> nn.Module:
    """Return the model that the server sends."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, 10))


def sent(noise: float) -> tuple[dict[str, Tensor], Tensor]:
    """Return the noisy gradient that a client sends, and its private image."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images[:1, None] / 16, dtype=torch.float32), torch.tensor(digits.target[:1])
    module = GradSampleModule(network())
    optimiser = DPOptimizer(
        torch.optim.SGD(module.parameters(), lr=0.1),
        noise_multiplier=noise,
        max_grad_norm=CLIP,
        expected_batch_size=1,
        generator=torch.Generator().manual_seed(1),
    )
    nn.functional.cross_entropy(module(images), labels).backward()
    optimiser.pre_step()  # Clips every example's gradient, and adds the noise.
    names = [name for name, _ in network().named_parameters()]
    return dict(zip(names, (tensor.grad.clone() for tensor in module.parameters()), strict=True)), images


def main() -> dict[float, float]:
    """Attack both; return the PSNR in dB by noise multiplier."""
    found = {}
    for noise in (1e-4, 1.0):
        update, images = sent(noise)
        defense = DPSGD(sigma=noise, clip=CLIP)
        observation = Observation.of(network(), update, (1, 8, 8), labels=0, defense=defense)
        answer = gradleak.attack(observation, "gauss-newton", restarts=2, initialisation="normal", class_prior=())
        found[noise] = float(-10 * (answer.images[0] - images).square().mean().log10())
        print(f"noise multiplier {noise:g}: the image came back with {found[noise]:.1f} dB")
    return found


if __name__ == "__main__":
    main()
