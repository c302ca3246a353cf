"""What clients are sent by the server of a setting, what they answer, and whether they answer at all.

Like `client`, this module may hold a victim's images; what an attacker sees of a round goes through `observation`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .. import seeds, structure
from ..dataset import Images
from ..defense import Defense
from ..server import Query, Server
from ..threat import Setting
from ..update import Network, copied, one_hot
from . import client
from .client import Sent
from .observation import decoded

Suspicious = Callable[[nn.Module, Tensor, Tensor], bool]
"""Whether a client with images [B, C, H, W] and targets [B, classes] refuses a model."""


@dataclass(frozen=True)
class Round:
    """Victims who faced one model (or one model for each client of their sums), with what they sent."""

    victims: tuple[int, ...]
    network: Network
    """As the victims run it: the last model that was answered."""
    sent: Sent
    """Aggregated, one row a victim."""
    queries: tuple[Query, ...] = ()
    """All models and answers, where one victim was asked several times."""
    refused: tuple[bool, ...] = ()
    """Victims that sent nothing."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """The server's side of a round, and the clients'."""

    server: Server
    defense: Defense
    setting: Setting
    module: nn.Module
    """As the defense has prepared it, and training left it."""
    auxiliary: Images | None
    classes: int
    identity: tuple[object, ...]
    """What the round's public random numbers depend on."""
    private: tuple[object, ...]
    """What each client's private ones depend on; the server does not know it."""
    seed: tuple[object, ...]
    """What the tampered model's depend on."""
    device: str = "cpu"
    suspicious: Suspicious | None = field(default=None)

    def rounds(self, images: Tensor, labels: Tensor) -> list[Round]:
        """Let all clients answer: images [N * clients, B, C, H, W] and labels [N * clients, B], sum by sum."""
        count = len(images) // self.defense.cohort
        if not self.server.adapts:
            models = self.models()
            sent, refused = self._exchange(models, images, labels, range(count), 0)
            return [Round(tuple(range(count)), self.network(models[0]), sent, refused=refused)]
        return [self._questioned(victim, *self._of(victim, images, labels)) for victim in range(count)]

    def models(self) -> list[nn.Module]:
        """Return the models that the clients of a sum are sent first: one for all, or one for each."""
        clients = range(self.defense.cohort if self.server.per_client else 1)
        return [self._tampered(number) for number in clients]

    def network(self, model: nn.Module) -> Network:
        """Return a model as clients run it."""
        return client.freeze(model, self.defense, self.setting).to(self.device, self.setting.dtype)

    def _tampered(self, number: int) -> nn.Module:
        plain = copied(self.module).to(self.device, self.setting.dtype)
        made = self.server.tamper(plain, self.auxiliary, seeds.generator(*self.seed), number)
        shape = structure.shape_of(self.module)
        if shape is not None:
            structure.mark(made, shape)
        return made

    def _of(self, victim: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        part = slice(victim * self.defense.cohort, (victim + 1) * self.defense.cohort)
        return images[part], labels[part]

    def _questioned(self, victim: int, images: Tensor, labels: Tensor) -> Round:
        """Ask one victim (and its sum) until the server knows enough or the victim refuses."""
        queries: list[Query] = []
        model: nn.Module | None = self.models()[0]
        kept: Round | None = None
        size = images.shape[1] * self.defense.cohort
        while model is not None:
            sent, refused = self._exchange([model], images, labels, [victim], len(queries))
            if refused and refused[0] and kept is not None:
                break  # What was answered before stays answered.
            network = self.network(model)
            update = {name: tensor[0] for name, tensor in decoded(sent, network, self.defense).items()}
            queries.append(Query(model, update, size))
            kept = Round((victim,), network, sent, tuple(queries), refused)
            if refused and refused[0]:
                break
            model = self.server.next_query(queries, self.auxiliary)
        assert kept is not None
        return kept

    def _exchange(
        self, models: Sequence[nn.Module], images: Tensor, labels: Tensor, victims: Sequence[int], query: int
    ) -> tuple[Sent, tuple[bool, ...]]:
        """Return what the clients send, aggregated, and which victims refuse."""
        again = () if query == 0 else ("query", query)
        clients = self.defense.cohort
        own = client.seeds_for(list(victims), *self.private, *again, clients=clients)
        round_seed = seeds.derive("round", *self.identity, *again)
        parts = [
            client.send(
                self.network(model),
                images[number :: len(models)],
                labels[number :: len(models)],
                self.classes,
                self.defense,
                self.setting,
                round_seed,
                own[number :: len(models)],
            )
            for number, model in enumerate(models)
        ]
        sent = parts[0] if len(parts) == 1 else _interleaved(parts)
        refusing = self._refusing(models, images, labels)
        if any(refusing):
            sent = _silenced(sent, refusing, clients)
        return client.aggregated(sent, clients), tuple(refusing[::clients])

    def _refusing(self, models: Sequence[nn.Module], images: Tensor, labels: Tensor) -> list[bool]:
        """Return which clients refuse the model that they were sent."""
        if self.suspicious is None:
            return []
        targets = one_hot(labels, self.classes, images.dtype)
        return [
            self.suspicious(models[number % len(models)], batch, own)
            for number, (batch, own) in enumerate(zip(images, targets, strict=True))
        ]


def _interleaved(parts: Sequence[Sent]) -> Sent:
    """Join parts in which each client of a sum stands by itself: part k has the k-th client of every sum."""

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(tensors), dim=1).flatten(0, 1)

    def each(name: str) -> dict[str, Tensor]:
        first = getattr(parts[0], name)
        return {key: joined([getattr(part, name)[key] for part in parts]) for key in first}

    def listed(name: str) -> list[int]:
        return [value for values in zip(*(getattr(part, name) for part in parts), strict=True) for value in values]

    return replace(
        parts[0],
        message=each("message"),
        update=each("update"),
        buffers=each("buffers"),
        statistics=each("statistics"),
        images=joined([part.images for part in parts]),
        targets=joined([part.targets for part in parts]),
        bytes=listed("bytes"),
        memories=listed("memories"),
        drew=any(part.drew for part in parts),
    )


def _silenced(sent: Sent, refusing: Sequence[bool], clients: int) -> Sent:
    """Take the messages of clients who refuse out of their sums; a victim that refuses has no score anyway."""
    if clients == 1:
        return sent
    kept = torch.tensor([not refuses for refuses in refusing])

    def less(tensor: Tensor) -> Tensor:
        return tensor * kept.to(tensor).view(-1, *[1] * (tensor.ndim - 1))

    return replace(
        sent,
        message={name: less(tensor) for name, tensor in sent.message.items()},
        update={name: less(tensor) for name, tensor in sent.update.items()},
    )
