"""Gaussian noise on clipped gradients, of a given size or as much as a wanted epsilon takes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Self

from annotated_types import Ge, Gt, Lt

from ..defense import Defense
from ..errors import GradleakError
from ..knowledge import Setting
from ..privacy import Accountant, Exposure, GaussianMechanism, noise_for


@dataclass(frozen=True, kw_only=True)
class ClippedNoise(Defense):
    """A defense that clips each example's gradient and adds noise; its guarantee, or the noise for a wanted one.

    Give `sigma` or `epsilon`, not both: a suite's `epsilon` is that of the training run of its utility, or without one
    of the defense's own run (`own_run`). Cells keep the sigma that was found, beside the epsilon that was asked for.
    """

    family = "noise"
    usual: ClassVar[float] = 1.0
    """The noise multiplier where none is asked for."""

    sigma: Annotated[float, Ge(0)] | None = None
    """Noise multiplier: scale of the noise on a sum of gradients over `clip`; without `clip` the scale itself. Unset:
    the usual one, or what `epsilon` takes."""
    clip: Annotated[float, Gt(0)] | None = 1.0
    """Largest norm of one example's gradient."""
    delta: Annotated[float, Gt(0), Lt(1)] = 1e-5
    epsilon: Annotated[float, Gt(0)] | None = field(default=None, metadata={"later": True})
    """Wanted epsilon of a whole training run at `delta`, one example added or removed."""

    def __post_init__(self) -> None:
        """Take the usual noise where none is asked for."""
        if self.sigma is None and self.epsilon is None:
            object.__setattr__(self, "sigma", self.usual)

    @property
    def own_run(self) -> Exposure:
        """How often a training run exposes an example, if nobody says otherwise."""
        return Exposure()

    @property
    def multiplier(self) -> float:
        """The noise multiplier that is used."""
        found = self.calibrated(Setting()).sigma
        assert found is not None
        return found

    @property
    def gaussian(self) -> bool:
        """Whether the noise is."""
        return True

    @property
    def accounting(self) -> Accountant:
        """Which accountant computes epsilon."""
        return "rdp"

    def bounded_noise(self, setting: Setting) -> GaussianMechanism | None:
        """Return the Gaussian mechanism; None without noise or clipping, for other noise, and with local steps."""
        if not self._bounded(setting) or self.multiplier == 0:
            return None
        return GaussianMechanism(self.multiplier, self.delta, self.accounting)

    def calibrated(self, setting: Setting, run: Exposure | None = None) -> Self:
        """Return the defense with the noise that the wanted epsilon takes.

        Raises:
            GradleakError: there is no guarantee to ask for, or no noise is enough.
        """
        if self.epsilon is None or self.sigma is not None:
            return self
        where = f"defense {type(self).__name__}: "
        if not self._bounded(setting):
            raise GradleakError(f"{where}epsilon needs clip, Gaussian noise, and clients without local steps")
        try:
            return replace(self, sigma=noise_for(self.epsilon, self.delta, run or self.own_run, self.accounting))
        except GradleakError as error:
            raise GradleakError(f"{where}{error}") from error

    def _bounded(self, setting: Setting) -> bool:
        """Whether one example changes the message by a bounded amount, to which Gaussian noise is added."""
        return self.clip is not None and self.gaussian and setting.local_lr is None
