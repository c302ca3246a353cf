"""Dropout inversion: searches for the client's dropout masks together with its images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from gradleak.attack import GradientMatching
from gradleak.engine.optimisers import Variables
from gradleak.engine.problem import Facts, Guess
from gradleak.mechanisms import dropout
from gradleak.seeds import Generators
from gradleak.threat import Knowledge, Labels, Level, Observation


@dataclass(frozen=True, kw_only=True)
class DropoutInversion(GradientMatching):
    """Minimises one minus the cosine over images and masks relaxed to [0, 1], with Adam, signed for images only.

    References: Scheliga, Mäder, Seeland, AAAI 2023, arXiv:2208.06163. Rate and sites are known. Masks start as
    draws of the client's own distribution and are not rounded; a weak prior keeps their mean at 1 - rate. Other
    `masks` are the arms that the paper compares with. Without dropout all of them are plain cosine matching.

    Deviations: the rate falls on a fixed schedule instead of on plateaus of the loss; the image returned is
    the one whose loss was taken, not the next; total variation is that of images in [0, 1], of which the
    reference's, on images divided by their standard deviation, is about 4 times as much.
    """

    reference = "arXiv:2208.06163"
    tuning = "schedule, mask prior and round_at in 9 trials on 4 tuning victims of mnist (mlp-3x128)"

    masks: Literal["joint", "ignored", "sampled", "informed"] = "joint"
    """joint: searched for. ignored: the model without dropout. sampled: drawn anew at every iteration, so the loss
    returned is that of a lucky draw. informed: the client's own, a ceiling that only an oracle reaches."""
    mask_prior: Annotated[float, Ge(0)] = 1e-4
    """Weight of the distance between a mask's share of zeros and the rate, summed over sites (joint)."""
    round_at: Annotated[float, Ge(0), Le(1)] | None = None
    """Share of the iterations after which masks are rounded and stay so, and images alone are refined (joint); unset,
    as in the paper, never. An answer whose loss was lower before is kept."""
    objective: str = "cosine"
    schedule: Literal["constant", "step", "cosine"] = "cosine"
    signed: bool | Literal["soft"] = True
    lr: float = 0.1
    iterations: int = 4000
    tv: float = 4e-5

    @property
    def needs(self) -> Knowledge:  # type: ignore[override]
        """What the arm knows of the defense: its rate and sites, the masks too, or nothing."""
        level = {"ignored": Level.OBLIVIOUS, "informed": Level.ORACLE}.get(self.masks, Level.PARAMETERS)
        return Knowledge(labels=Labels.INFERRED, defense=level)

    def initial(self, observation: Observation, generator: Generators) -> Variables:
        """Initial pixels and, where masks are searched for or sampled, masks [N, B, ...] by buffer name."""
        variables = super().initial(observation, generator)
        if self.masks in ("joint", "sampled"):
            rates = dropout.rates(observation.network.module)
            for name, shape in self._shapes(observation).items():
                variables[name] = dropout.bernoulli(generator.uniform(*shape), rates[name])
        return variables

    def facts(self, observation: Observation) -> Facts:
        """What is known of each victim: for this attack also the rates of its masks, or the masks."""
        facts = super().facts(observation)
        if self.masks == "joint":
            rates = dropout.rates(observation.network.module)
            like = facts.own["std"]
            each = {name: like.new_full((observation.victims,), rate) for name, rate in rates.items()}
            facts = facts.plus(named={"rates": each})
        if self.masks == "informed" and observation.private is not None:
            own = {name: observation.private[name] for name in self._shapes(observation)}
            facts = facts.plus(named={"masks": own})
        return facts

    def decode(self, variables: Variables, facts: Facts) -> Guess:
        """Turn one trial's variables into images and masks."""
        masks = facts.named.get("masks") or {n: mask for n, mask in variables.items() if n.endswith(".mask")}
        return replace(super().decode(variables, facts), buffers=masks)

    def terms(self, guess: Guess, variables: Variables, facts: Facts) -> Iterator[Tensor]:
        """How far each mask's share of zeros is from the rate."""
        gaps = [(1 - guess.buffers[name].mean() - rate).abs() for name, rate in facts.named.get("rates", {}).items()]
        if gaps:
            yield self.mask_prior * sum(gaps[1:], gaps[0])

    def project(self, variables: Variables, mean: Tensor, std: Tensor) -> None:
        """Clamp images and masks to [0, 1], in place."""
        super().project(variables, mean, std)
        for name, mask in variables.items():
            if name.endswith(".mask"):
                mask.clamp_(0, 1)

    def perturbation(
        self, observation: Observation, generator: Generators
    ) -> Callable[[Variables, Tensor, Tensor], None] | None:
        """Round masks from a certain iteration on (`round_at`), or draw them anew before every one (`sampled`)."""
        rates = dropout.rates(observation.network.module)
        if self.masks == "joint" and self.round_at is not None:
            first = self.round_at * self.iterations

            def settle(variables: Variables, trials: Tensor, steps: Tensor) -> None:
                rows = steps >= first
                for name in rates:
                    # A step of the optimiser is too short to take a rounded unit over 1/2.
                    variables[name][rows] = variables[name][rows].round()

            return settle
        if self.masks != "sampled":
            return None

        def resample(variables: Variables, trials: Tensor, steps: Tensor) -> None:
            rows = zip(trials.tolist(), steps.tolist(), strict=True)
            names = [(generator.names[trial], step) for trial, step in rows]
            fresh = Generators(names, generator.device, generator.dtype)
            for name, rate in rates.items():
                variables[name].copy_(dropout.bernoulli(fresh.uniform(*variables[name].shape[1:]), rate))

        return resample

    def _shapes(self, observation: Observation) -> dropout.MaskShapes:
        blank = torch.zeros(
            observation.batch_size, *observation.shape, dtype=observation.dtype, device=observation.device
        )
        return dropout.mask_shapes(observation.network.module, blank)
