"""What a server promises."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import nn

from .. import registry, structure
from ..dataset import Data
from ..defense import Defense
from ..model import initialise
from ..server import Server
from ..threat import Power, Setting
from ..update import Network, copied
from .findings import Unchecked, require, same
from .victims import Ask, tuning_victims

MODELS: tuple[tuple[str, dict[str, Any]], ...] = (("mlp", {"widths": (24,)}), ("lenet", {}), ("linear", {}))
"""What servers are tried on, the first that suits."""


class ServerCase:
    """A server, and the model that it changes."""

    def __init__(self, server: Server, ask: Ask | None = None):
        """Keep the server."""
        self.server, self._ask = server, ask or Ask()

    @cached_property
    def data(self) -> Data:
        """What the clients have, and the public images."""
        return self._ask.data("digits")

    @cached_property
    def setting(self) -> Setting:
        """How the clients train."""
        return Setting(batch_size=4, precision="float64")

    @cached_property
    def module(self) -> nn.Module:
        """The agreed model.

        Raises:
            Unchecked: the server can do nothing with any that was tried.
        """
        reasons = []
        for name, module in self._models():
            reason = self.server.unsuited(module, self.setting, registry.build("defenses", "none"))
            if reason is None:
                return module
            reasons.append(f"{name}: {reason}")
        raise Unchecked(f"no model suits it ({'; '.join(reasons)})")

    def _models(self) -> Iterator[tuple[str, nn.Module]]:
        for name, options in ((self._ask.model, {}),) if self._ask.model else MODELS:
            module = initialise(registry.build("models", name, options), self.data.shape, self.data.classes, 0)
            yield name, module.double().eval()

    def sent(self, seed: int = 0, client: int = 0) -> nn.Module:
        """The model that a client is sent."""
        public = self.data.split.train if self.server.needs.auxiliary else None
        return self.server.tamper(self.module, public, torch.Generator().manual_seed(seed), client)


def server_declares_itself(case: ServerCase) -> None:
    """Declares what it changes, and its reference."""
    require(getattr(case.server, "reference", ""), "reference is missing")
    surface = getattr(case.server, "surface", None)
    require(isinstance(surface, Power), f"surface is none of {', '.join(map(str, Power))}")


def server_sends_a_model(case: ServerCase) -> None:
    """Sends a model of the same images and classes, which can be trained."""
    network = Network.of(case.sent())
    images, _ = tuning_victims(case.data, case.setting.batch_size)
    logits = network.logits(images[0])
    wanted = (case.setting.batch_size, case.data.classes)
    require(tuple(logits.shape) == wanted, f"logits {tuple(logits.shape)}, not {wanted}")
    require(logits.isfinite().all(), "logits are not finite")


def server_changes_what_it_says(case: ServerCase) -> None:
    """Changes what its surface says, and no more."""
    before, after = case.module.state_dict(), case.sent().state_dict()
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in (before, after)]
    if case.server.surface is not Power.ARCHITECTURE:
        require(
            shapes[0] == shapes[1], "other parameters or buffers than the agreed model; the surface is architecture"
        )
        changed = not same(before, after)
        require(
            changed == (case.server.surface is Power.PARAMETERS), f"parameters are{'' if changed else ' not'} changed"
        )
    else:
        require(shapes[0] != shapes[1], "the agreed parameters and buffers; the surface is parameters")


def server_leaves_the_model_alone(case: ServerCase) -> None:
    """Changes a copy, and leaves the agreed model and the global generator as they were."""
    before = {name: tensor.clone() for name, tensor in case.module.state_dict().items()}
    noise = torch.get_rng_state()
    case.sent()
    require(same(before, case.module.state_dict()), "the agreed model was changed in place; change a copy")
    require(torch.equal(torch.get_rng_state(), noise), "the global generator was used; draw from the one given")


def server_repeats_itself(case: ServerCase) -> None:
    """Sends the same model for the same seed, and one architecture to all clients of a sum."""
    require(same(case.sent().state_dict(), case.sent().state_dict()), "two models of one seed differ")
    if case.server.per_client:
        first, second = (case.sent(client=client).state_dict() for client in (0, 1))
        same_shapes = {n: t.shape for n, t in first.items()} == {n: t.shape for n, t in second.items()}
        require(same_shapes, "two clients of a sum are sent models whose messages do not add up")


def server_says_what_it_cannot(case: ServerCase) -> None:
    """Says why it does not suit a client, or nothing."""
    defense: Defense = registry.build("defenses", "none")
    for _, module in case._models():
        structure.mark(module, case.data.shape)
        reason = case.server.unsuited(copied(module), case.setting, defense)
        require(reason is None or (isinstance(reason, str) and reason), f"unsuited returned {reason!r}")
