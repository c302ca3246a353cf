"""What a board measures and why, in words: stated once, shown by the page."""

from __future__ import annotations

from ..board.evidence import CLEAR, DOUBTS, LOST
from ..scales import CAP

METHOD: tuple[str, ...] = (
    "Shares come first because people understand them: images recovered exactly (PSNR of "
    f"{CAP:g} dB or more: rounding to 8 bits restores the image) and recognisably (20 dB or more).",
    f"Rows are sorted by mean PSNR, each image capped at {CAP:g} dB: mean PSNR and mean SSIM tell 92 to 96 % of pairs "
    "of defenses apart where shares tell 43 to 56 %, and beyond the cap there is only precision of arithmetic.",
    "The floor is the best control: the mean image, the class mean, a random public image, a generator's sample, "
    "another victim's message. An attacker can always guess, so the worst case is taken over attacks and controls.",
    "Defenses that no attack separably leads above the floor are one group with one rank: the order of failed attacks "
    "says nothing. A single image recovered exactly takes a defense out of it.",
    "Every defense has to face every attack of its context that applies; a row that did not says how many it faced and "
    "has no rank, nor has one whose strong attacks (those that set a worst case or lead by "
    f"{CLEAR:g} dB somewhere) failed in more than {100 * LOST:.0f} % of their trials.",
    *(f"Doubt {name}: {text}." for name, text in DOUBTS.items()),
    "A victim's bits are equal at equal width of the optimisation batch, whatever its neighbours. The width is part of "
    "a cell; where memory halved it, which rounds otherwise, its rows say at which width they were computed.",
    "Intervals of a worst case allow for the luck of the best of several attacks, and for the share of victims with "
    "another outcome that so few victims can hide: 17 % of 16. Shares have Wilson's interval over effective trials.",
)
"""The measure, its thresholds and why, in sentences."""
