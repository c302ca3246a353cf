"""Sketching: a random linear map of the update to far fewer numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from gradleak.defense import Message, Public
from gradleak.defenses.gaussian_noise import GaussianNoise
from gradleak.engine.closed_forms import ClosedForm, Compared
from gradleak.errors import GradleakError
from gradleak.mechanisms.noise import ClippedNoise
from gradleak.mechanisms.sketching import FAMILIES, Operator, layout, shapes_of
from gradleak.update import Update, flatten, unflatten

_KEY = "sketch"


@dataclass(frozen=True, kw_only=True)
class Sketch(ClippedNoise):
    """Sends R g for a random R [s, d] that all clients of a round share; the server applies R^T.

    References: Song, Wang, Yu, Zhang, ICML 2023, arXiv:2210.08371. R is public, as the server needs it, so the
    adaptive answer matches in sketch space: sketching alone protects only when s nears the number of unknown
    pixels. The remedy is noise: with `clip` and `sigma` each example's sketch is clipped and N(0, (sigma * clip / B)^2)
    added to their mean. (Clipping after sketching, as the other order bounds nothing and multiplies the noise.)
    """

    family = "sketch"
    usual = 0.0
    reference = "arXiv:2210.08371"
    simulates = True

    kind: Literal["count-sketch", "srht", "gaussian", "ams"] = "count-sketch"
    """Family of R; `gaussian` and `ams` take O(s d) time a sketch."""
    ratio: Annotated[float, Gt(0), Le(1)] = 0.1
    """s / d."""
    size: Annotated[int, Ge(1)] | None = None
    """s itself; unset, it follows from `ratio`."""
    clip: Annotated[float, Gt(0)] | None = None
    """Largest norm of one example's sketch."""

    @property
    def linear(self) -> bool:  # type: ignore[override]
        """Without the remedy."""
        return self.multiplier == 0 and self.clip is None

    @property
    def additive(self) -> bool:
        """Sketches and their noise add up."""
        return True

    @property
    def per_example_gradients(self) -> bool:
        """Clipping needs each example's own sketch."""
        return self.clip is not None

    @property
    def has_likelihood(self) -> bool:  # type: ignore[override]
        """The noise's; without noise the attack's own distance serves."""
        return self.multiplier > 0

    def per_example(self, gradient: Update, public: Public) -> Update:
        """Sketch one example's gradient and scale it down to norm `clip`."""
        return self._noise.per_example(self.simulate(gradient, public), public)

    def public(self, template: Update, batch_size: int, generator: torch.Generator) -> Public:
        """Draw R; add the parameters' shapes and the noise's standard deviation.

        Raises:
            GradleakError: `size` exceeds the number of parameters.
        """
        like = flatten(template)
        size = self.size or math.ceil(self.ratio * len(like))
        if size > len(like):
            raise GradleakError(f"defense 'sketch': size = {size} exceeds the {len(like)} entries of an update")
        draws = FAMILIES[self.kind].draw(len(like), size, generator)
        public = {name: tensor.to(like.device) for name, tensor in draws.items()}
        return public | layout(template) | self._noise.public(template, batch_size, generator)

    def protect(self, update: Update, public: Public, generator: torch.Generator) -> Message:
        """Sketch the update, unless `per_example` has, and add the noise."""
        sketched = self.simulate(update, public)
        return self._noise.protect(sketched, public, generator) if self.multiplier else sketched

    def simulate(self, update: Update, public: Public) -> Message:
        """Sketch the update, unless `per_example` has."""
        if update.keys() == {_KEY}:
            return update
        vector = flatten(update)
        return {_KEY: self._operator(len(vector), public).sketch(vector)}

    def decode(self, message: Message, public: Public) -> Update:
        """R^T y, an unbiased estimate of the update."""
        shapes = shapes_of(public)
        dimension = sum(math.prod(shape) for shape in shapes.values())
        return unflatten(self._operator(dimension, public).desketch(message[_KEY]), shapes)

    def nll(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Squared distance in sketch space relative to the message's squared norm."""
        return self._noise.nll(message, simulated, public)

    def closed_form(self, public: Public) -> ClosedForm:
        """Sketches of each example, clipped, compared by their squared distance if there is noise."""
        dimension = sum(math.prod(shape) for shape in shapes_of(public).values())
        objective = "relative-squared" if self.has_likelihood else None
        return Compared(linear=self._operator(dimension, public).described(_KEY), clip=self.clip, objective=objective)

    def residual(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Differences over the noise's standard deviation, or relative ones without noise."""
        return self._noise.residual(message, simulated, public)

    def noise_floor(self, message: Message, public: Public) -> Tensor:
        """One an entry, if there is noise."""
        return self._noise.noise_floor(message, public)

    @property
    def _noise(self) -> GaussianNoise:
        return GaussianNoise(sigma=self.multiplier, clip=self.clip, delta=self.delta)

    def _operator(self, dimension: int, public: Public) -> Operator:
        size = self.size or math.ceil(self.ratio * dimension)
        return FAMILIES[self.kind](dimension, size, public)
