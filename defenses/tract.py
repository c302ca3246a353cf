"""TrAct: the first layer is updated by what its pre-activations want, not by the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor, nn

from gradleak.defense import Defense, Message, Public
from gradleak.mechanisms import whitening


@dataclass(frozen=True, kw_only=True)
class TrAct(Defense):
    """Replaces the first layer's weight gradient D^T X by D^T (X X^T / b + damping I)^-1 X.

    References: Petersen, Borgelt, Ermon, NeurIPS 2024, arXiv:2410.23970. D holds the gradients by the layer's
    pre-activations, X its inputs, one of b rows a position (for a convolution the patches of all images). Biases
    are left alone. It is an optimiser that has been proposed as a defense: the server prescribes it with the model,
    so that every attack that runs the model simulates it. What stops them is scale, a weight gradient that shrinks
    in inverse proportion to the image's squared norm; who knows the defense gives every tensor the same weight. In
    front of a linear layer `tract-inversion` finds the inputs in closed form.
    """

    family = "representation"
    reference = "arXiv:2410.23970"
    version = "2"
    counter_attacks = ("tract-inversion",)
    has_likelihood = True

    damping: Annotated[float, Gt(0)] = 0.1
    """Weight of the identity."""

    def prepare_model(self, module: nn.Module) -> nn.Module:
        """Return a copy whose first layer has this weight gradient.

        Raises:
            GradleakError: the first layer with weights is neither linear nor a plain convolution.
        """
        return whitening.insert(module, self.damping, "defense 'tract'")

    def nll(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Return the squared distance of every tensor relative to its norm, their mean."""
        norms = {name: tensor.square().sum() for name, tensor in message.items()}
        least = 1e-12 * torch.stack([*norms.values()]).sum() + 1e-30
        gaps = [(simulated[name] - message[name]).square().sum() / (norm + least) for name, norm in norms.items()]
        return torch.stack(gaps).mean()
