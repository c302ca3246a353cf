"""What the read-outs of bins share: from rows' gradients to images, the strongest bins first.

A malicious server's first layer keeps images apart in bins; a bin's gradients are sums over its images of s x and s,
with each image's own s. Bins without any image drop out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gradleak import structure
from gradleak.attack import Reconstruction
from gradleak.mechanisms.imprint import inputs_at
from gradleak.threat import Observation

_SILENT = 1e3  # roundings of the strongest bin's weight below which a bin is empty
_OUTSIDE = 1e-3  # how far outside [0, 1] rounding may bring a pixel
_STEPS = 400  # of the search for the image behind the inputs of a later layer


def blocks(module: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the blocks of a kind in a model, by name, whose rows are sent."""
    sent = structure.sent_of(module)
    for name, each in module.named_modules():
        if isinstance(each, kind) and f"{name}.rows.weight" in sent:
            yield name, each


def answer(sums: Tensor, weights: Tensor, layer: str, observation: Observation) -> Reconstruction:
    """Answer the images of the strongest bins.

    Args:
        sums: of s x over each bin's images, [N, K, P].
        weights: of s, [N, K].
        layer: that was given x, by its name in the model.
        observation: what is answered.
    """
    size = weights.abs()
    largest = size.amax(1, keepdim=True).clamp(min=1e-300)
    alive = size > _SILENT * torch.finfo(observation.dtype).eps * largest
    inputs = torch.where(alive[..., None], sums / torch.where(alive, weights, 1.0)[..., None], 0.0)
    worth = size / largest - 10.0 * ~alive
    pixels = read_directly(inputs, layer, observation)
    if pixels is not None:
        # An image alone in its bin lies in [0, 1]; among those, the strongest is hurt least by noise.
        worth = worth - 2.0 * ((pixels - pixels.clamp(0, 1)).abs().flatten(2).amax(2) > _OUTSIDE)
    victims, count = torch.arange(len(inputs), device=inputs.device)[:, None], observation.batch_size
    order = worth.argsort(1, True)[:, :count]
    picked = searched(inputs[victims, order], layer, observation) if pixels is None else pixels[victims, order]
    lit = alive[victims, order]
    blank = _blank(observation)
    kept = torch.where(lit[..., None, None, None], picked.clamp(0, 1), blank)
    missing = count - kept.shape[1]
    if missing > 0:
        kept = torch.cat([kept, blank.expand(len(kept), missing, *observation.shape)], dim=1)
    found = alive.sum(1).to(observation.dtype)
    return Reconstruction(images=kept.nan_to_num(0.5).to(observation.dtype), details={"bins": found})


def _blank(observation: Observation) -> Tensor:
    """Return what is answered where no bin holds an image: the mean of public images, else grey."""
    if observation.auxiliary is None:
        return torch.full(observation.shape, 0.5, dtype=torch.float64, device=observation.device)
    return observation.auxiliary.images.double().mean(0).to(observation.device)


def read_directly(inputs: Tensor, layer: str, observation: Observation) -> Tensor | None:
    """Images [N, K, C, H, W] that give a layer inputs [N, K, P]; None where it reads no scaled and shifted pixels."""
    for found in structure.of(observation.network.module).on_pixels:
        if found.whole and found.name == layer and found.index.numel() == inputs.shape[-1]:
            return found.to_images(inputs, observation.shape)
    return None


def searched(inputs: Tensor, layer: str, observation: Observation) -> Tensor:
    """Images [N, K, C, H, W] whose inputs of a layer are nearest to [N, K, P], by least squares."""
    network = observation.network.to(observation.device, torch.float64)
    flat = inputs.flatten(0, 1)
    images = torch.full((len(flat), *observation.shape), 0.5, dtype=torch.float64, device=inputs.device)
    images.requires_grad_()
    search = torch.optim.LBFGS([images], max_iter=_STEPS, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        away: Tensor = (inputs_at(network.module, layer, images) - flat).square().sum()
        away.backward()
        return away

    with torch.enable_grad():
        search.step(loss)
    found: Tensor = images.detach().unflatten(0, inputs.shape[:2])
    return found
