"""DP-SGD: clipped and noised gradients, with the guarantee of the whole training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from gradleak.defense import Exposure, Message, Public
from gradleak.engine.closed_forms import ClosedForm, Compared
from gradleak.engine.objectives import absolute, relative_squared
from gradleak.engine.residuals import difference, entries
from gradleak.mechanisms.noise import ClippedNoise
from gradleak.privacy import Accountant
from gradleak.update import Update, flatten, squared_norm


@dataclass(frozen=True, kw_only=True)
class DPSGD(ClippedNoise):
    """Clips each example's gradient to norm `clip`, averages, and adds noise of scale sigma * clip / B.

    References: Abadi et al., CCS 2016, arXiv:1607.00133; accountants: Mironov, arXiv:1702.07476 (rdp), Gopi, Lee,
    Wutschitz, arXiv:2106.02848 (prv), both of Opacus. The Laplace mechanism clips the sum of absolute values
    instead, and has no guarantee here, as these accountants know Gaussian noise only. The adaptive answer clips
    its guess too and matches by the noise's likelihood: squares for Gaussian, absolute values for Laplace.

    An attack sees one message, and knows that its victim took part: `guarantee` is that of what it sees, without
    amplification by sampling. `run_guarantee` is that of the model after `steps` rounds. Asked for by `epsilon`, the
    noise is found by Opacus.
    """

    reference = "arXiv:1607.00133"
    linear = False
    has_likelihood = True

    clip: Annotated[float, Gt(0)] = 1.0
    """Largest norm of one example's gradient: Euclidean for Gaussian noise, absolute sum for Laplace."""
    sampling_rate: Annotated[float, Gt(0), Le(1)] = 0.01
    """Probability q that an example takes part in a round (Poisson sampling)."""
    steps: Annotated[int, Ge(1)] = 1000
    """Rounds T of the whole run."""
    mechanism: Literal["gaussian", "laplace"] = "gaussian"
    accountant: Literal["rdp", "prv"] = "rdp"
    """prv is tighter and slower."""

    @property
    def per_example_gradients(self) -> bool:
        """Clipping needs each example's own gradient."""
        return True

    @property
    def additive(self) -> bool:
        """Clipped gradients and their noise add up."""
        return True

    def per_example(self, gradient: Update, public: Public) -> Update:
        """Scale one example's gradient down to norm `clip`."""
        if self.mechanism == "gaussian":
            norm = (squared_norm(gradient) + 1e-30).sqrt()
        else:
            norm = flatten(gradient).abs().sum() + 1e-30
        factor = (self.clip / norm).clamp(max=1)
        return {name: factor * tensor for name, tensor in gradient.items()}

    def public(self, template: Update, batch_size: int, generator: torch.Generator) -> Public:
        """Return the noise's scale, which every party can compute."""
        return {"scale": flatten(template).new_tensor(self.multiplier * self.clip / batch_size)}

    def protect(self, update: Update, public: Public, generator: torch.Generator) -> Message:
        """Add the noise."""
        if self.multiplier == 0:
            return update
        return {
            name: tensor + public["scale"] * self._noise(tensor.shape, generator).to(tensor)
            for name, tensor in update.items()
        }

    def nll(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Squared or absolute distance relative to a guess of zero."""
        return (relative_squared if self.mechanism == "gaussian" else absolute)(simulated, message)

    def closed_form(self, public: Public) -> ClosedForm | None:
        """Of Gaussian noise: clipped gradients, compared by their squared distance."""
        if self.mechanism != "gaussian":
            return None
        return Compared(clip=self.clip, objective="relative-squared", noise=float(public["scale"]) / self.clip)

    def residual(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Differences over the noise's standard deviation: the scale, times the root of two for Laplace noise."""
        if self.multiplier == 0:
            return super().residual(message, simulated, public)
        widen = 1.0 if self.mechanism == "gaussian" else 2**0.5
        return difference(simulated, message) / (widen * public["scale"])

    def noise_floor(self, message: Message, public: Public) -> Tensor:
        """One an entry."""
        return entries(message) if self.multiplier else super().noise_floor(message, public)

    @property
    def own_run(self) -> Exposure:
        """`steps` Poisson-sampled rounds."""
        return Exposure(self.steps, self.sampling_rate)

    @property
    def accounting(self) -> Accountant:
        """The `accountant`."""
        return self.accountant

    @property
    def gaussian(self) -> bool:
        """Whether the noise is, which the accountants know."""
        return self.mechanism == "gaussian"

    def _noise(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        # Drawn in float64 so that float32 and float64 runs have the same noise.
        if self.mechanism == "gaussian":
            return torch.randn(shape, generator=generator, dtype=torch.float64)
        centred = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
        return -centred.sign() * (1 - 2 * centred.abs()).clamp(min=1e-300).log()
