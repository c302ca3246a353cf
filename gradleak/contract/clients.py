"""What a client promises."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import vmap

from ..client import Client
from ..update import LocalTraining, Network, Update, by_autograd, by_transform, local_update, one_hot
from .findings import require, same

_LR = 0.1
_STEPS = 3


def client_declares_itself(client: Client) -> None:
    """Declares its reference."""
    require(getattr(client, "reference", ""), "reference is missing")


def client_gives_an_update(client: Client) -> None:
    """Gives finite updates in the shapes of the parameters, the same every time, and changes nothing in place."""
    network, images, targets = _victim(client)
    before = {name: tensor.clone() for name, tensor in network.parameters.items()}
    for training in (LocalTraining(), LocalTraining(steps=_STEPS, lr=_LR, client=client)):
        first, again = (local_update(network, images, targets, training) for _ in range(2))
        shapes = {name: tensor.shape for name, tensor in first.items()}
        require(
            shapes == {name: tensor.shape for name, tensor in before.items()}, f"{training.steps} steps give {shapes}"
        )
        require(all(tensor.isfinite().all() for tensor in first.values()), "an update is not finite")
        require(same(first, again), "two updates of one batch differ")
        require(any(bool(tensor.any()) for tensor in first.values()), "the update is zero")
    require(same(before, network.parameters), "the model's parameters were changed in place")


def client_can_be_imitated(client: Client) -> None:
    """Can be differentiated by its images, and stacked: attackers imitate it."""
    network, images, targets = _victim(client)
    training = LocalTraining(steps=_STEPS, lr=_LR, client=client)
    leaf = images.clone().requires_grad_()
    update = local_update(network, leaf, targets, training, differentiate=by_autograd)
    (slope,) = torch.autograd.grad(_length(update), leaf, allow_unused=True, materialize_grads=True)
    require(slope.isfinite().all(), "the derivative of local steps by the images is not finite")

    def one(batch: Tensor) -> Update:
        return local_update(network, batch, targets, training, differentiate=by_transform)

    stacked = vmap(one)(torch.stack([images, images.flip(0)]))
    for name, tensor in update.items():
        require(torch.allclose(stacked[name][0], tensor, rtol=1e-6, atol=1e-9), f"stacked updates differ in {name!r}")


def _length(update: Update) -> Tensor:
    return torch.stack([tensor.square().sum() for tensor in update.values()]).sum()


def _victim(client: Client) -> tuple[Network, Tensor, Tensor]:
    stream = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Sigmoid(), nn.Linear(12, 10)).double()
    size = 2 * client.accumulation
    images = torch.rand(size, 1, 8, 8, dtype=torch.float64, generator=stream)
    labels = torch.arange(size) % 10
    return Network.of(module, client=client), images, one_hot(labels, 10, torch.float64)
