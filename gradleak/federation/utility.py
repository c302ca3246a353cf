"""Utility: the test accuracy of a federated model that is trained under a defense, and what that training costs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import vmap

from .. import seeds
from ..dataset import Data, Images
from ..defense import Defense, Guarantee, Memory
from ..errors import GradleakError
from ..process import default_cache
from ..suite import CORE, HELD_OUT, Utility
from ..threat import Setting
from ..training import networks
from ..update import Network, Update, copied, one_hot
from . import client

Progress = Callable[[float, float], None]
"""Share of the training done in [0, 1], and the loss on the images held out."""


@dataclass(frozen=True)
class Trained:
    """A federated model, trained."""

    accuracy: float
    """On the test split, in [0, 1]."""
    validation: dict[float, float]
    """By server rate, the accuracy on the images held out, in [0, 1]."""
    lr: float
    """The rate of the best of them, which `accuracy` is of."""
    bytes: float
    """Mean encoded length of a message over all rounds."""
    dense_bytes: int
    """Length of a dense float32 update."""
    participations: int
    """Messages that an example takes part in, at most."""
    guarantee: Guarantee | None
    """What holds for all of them together."""
    parameters: Update
    """The model's own."""


def train(
    module: nn.Module,
    data: Data,
    defense: Defense,
    recipe: Utility,
    seed: int,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    together: bool = True,
) -> Trained:
    """Train a model by federated averaging (McMahan et al. 2017, arXiv:1602.05629), every message under a defense.

    A round: the server draws the public randomness, every client sends its message (`client.send`, as under
    attack), and the server applies the mean of the decoded updates at its rate. Clients hold equal random parts
    of the train split and pass through theirs in batches; a tenth is held out, and the server rate of the best
    accuracy on it is taken, so that each defense has the same budget to tune. Partition, batches and private
    randomness depend on `seed` alone, so that defenses are compared on equal ones. Batch normalisation keeps the
    statistics of the initial model. Test images are given to the model as `Defense.encode_test` says.

    Batches are fixed, so the guarantee is that of as many messages (or sums, where the server sees no more) as one
    example takes part in, without amplification by sampling; that the rate is chosen on images of the train split is
    not accounted for.

    Args:
        module: the initial model, already changed by the defense.
        data: the dataset.
        defense: the defense of all clients.
        recipe: clients, rounds, rates and batches.
        seed: decides everything that is random.
        device: where to train.
        progress: told a few times how far it is.
        together: compute the clients of a round in one stack.

    Raises:
        GradleakError: see `check`.
    """
    check(data, defense, recipe)
    setting = recipe.setting()
    held_out, batches = _divide(data, recipe, seed)
    held_out, test = (_shown(part, defense, seed) for part in (held_out, data.split.test))
    start = client.freeze(module, defense, setting).to(device, setting.dtype)
    runs = []
    for index, lr in enumerate(recipe.lr):
        share = None if progress is None else _part(progress, index, len(recipe.lr))
        runs.append(_Run(start, data, defense, recipe, setting, seed, lr, together).train(batches, held_out, share))
    scores = [networks.accuracy(_module(run.network), held_out) for run in runs]
    best = runs[max(range(len(runs)), key=lambda index: scores[index])]
    participations = recipe.participations(len(data.split.train))
    return Trained(
        accuracy=networks.accuracy(_module(best.network), test),
        validation=dict(zip(recipe.lr, scores, strict=True)),
        lr=best.lr,
        bytes=best.bytes / (recipe.rounds * recipe.clients),
        dense_bytes=4 * sum(tensor.numel() for tensor in start.parameters.values()),
        participations=participations,
        guarantee=defense.run_guarantee(setting, 1.0, participations),
        parameters=best.network.parameters,
    )


def prepare(
    module: nn.Module,
    data: Data,
    defense: Defense,
    recipe: Utility,
    seed: int,
    mark: str,
    cache: Path | None = None,
    device: torch.device | str = "cpu",
) -> tuple[nn.Module, float]:
    """Return a model as it is after rounds of training under a defense, on the CPU in eval mode, and its accuracy.

    It is kept in `cache` and read from there the next time.

    Args:
        module: the initial model, already changed by the defense; left as it is.
        data: the dataset.
        defense: the defense of all clients, as in the first round.
        recipe: clients, rounds, rates and batches.
        seed: decides everything that is random.
        mark: what the defense is, with its options and code.
        cache: folder of the checkpoints; by default that of trained networks.
        device: where to train.

    Raises:
        GradleakError: see `check`; the checkpoint cannot be written, or is damaged.
    """
    changed = copied(module)

    def trained() -> float:
        found = train(changed, data, defense, recipe, seed, device)
        changed.load_state_dict(found.parameters, strict=False)
        return found.accuracy

    facts = (mark, recipe.model_dump_json(exclude={"seeds"}), data.name, data.digest, seed, Utility.VERSION, CORE)
    named = (*facts, repr(module), networks.digest_of(module), torch.device(device).type, torch.__version__)
    key = hashlib.sha256(json.dumps(named).encode()).hexdigest()
    accuracy = networks.kept(changed, (cache or default_cache()) / f"under-defense-{key}.safetensors", trained)
    return changed, accuracy


def check(data: Data, defense: Defense, recipe: Utility) -> None:
    """Refuse what cannot be trained.

    Raises:
        GradleakError: a client has fewer images than a batch, the defense stands for one round only, or sums up more
            clients than there are.
    """
    if defense.single_round:
        raise GradleakError(
            f"utility: {type(defense).__name__} stands for a single round, so nothing can be trained under it"
        )
    if defense.cohort > recipe.clients:
        raise GradleakError(
            f"utility: clients: {recipe.clients} cannot make the sum of {defense.cohort} clients that the server sees"
        )
    if not _batches_an_epoch(data, recipe):
        raise GradleakError(
            f"utility: {recipe.clients} clients of dataset {data.name!r} have {_part_size(data, recipe)} images each, "
            f"fewer than a batch of {recipe.batch}"
        )


class _Run:
    """One training at one rate of the server."""

    def __init__(
        self,
        network: Network,
        data: Data,
        defense: Defense,
        recipe: Utility,
        setting: Setting,
        seed: int,
        lr: float,
        together: bool,
    ) -> None:
        self.network = network
        self.data = data
        self.defense = defense
        self.recipe = recipe
        self.setting = setting
        self.seed = seed
        self.lr = lr
        self.together = together
        self.bytes = 0
        self.memories: list[Memory] = [None] * recipe.clients

    def train(self, batches: Tensor, held_out: Images, progress: Progress | None) -> _Run:
        reports = max(1, len(batches) // 10)
        for index, batch in enumerate(batches):
            self._round(index, batch)
            if progress is not None and (index + 1) % reports == 0:
                progress((index + 1) / len(batches), _loss(self.network, held_out, self.data.classes))
        return self

    def _round(self, index: int, batch: Tensor) -> None:
        defense = self.defense.at_round(index, index // _batches_an_epoch(self.data, self.recipe))
        train, like = self.data.split.train, next(iter(self.network.parameters.values()))
        sent = client.send(
            self.network,
            train.images[batch].to(like),
            train.labels[batch].to(like.device),
            self.data.classes,
            defense,
            self.setting,
            seeds.derive("utility", "round", self.seed, index),
            [seeds.derive("utility", "client", self.seed, index, number) for number in range(len(batch))],
            self.memories,
            self.together,
        )
        self.memories = sent.memories
        self.bytes += sum(sent.bytes)
        update = vmap(lambda message: defense.decode(message, sent.public))(sent.message)
        # A gradient points uphill, a weight difference downhill, along which the clients have gone already.
        step = self.lr if self.setting.local_lr is not None else -self.lr
        moved = {name: tensor + step * update[name].mean(0) for name, tensor in self.network.parameters.items()}
        self.network = replace(self.network, parameters=moved)


def _shown(images: Images, defense: Defense, seed: int) -> Images:
    """Return images as the trained model is given them."""
    return Images(defense.encode_test(images.images, seeds.generator("utility", "test", seed)), images.labels)


def _divide(data: Data, recipe: Utility, seed: int) -> tuple[Images, Tensor]:
    """Return the images held out and the train indices of every round's batches, [rounds, clients, B]."""
    order = torch.randperm(len(data.split.train), generator=seeds.generator("utility", "parts", data.name, seed))
    kept = len(order) // HELD_OUT
    size, count = _part_size(data, recipe), _batches_an_epoch(data, recipe)
    parts = order[kept : kept + recipe.clients * size].reshape(recipe.clients, size)
    epochs = []
    for epoch in range(-(-recipe.rounds // count)):
        streams = [
            seeds.generator("utility", "order", data.name, seed, number, epoch) for number in range(recipe.clients)
        ]
        shuffled = torch.stack(
            [part[torch.randperm(size, generator=stream)] for part, stream in zip(parts, streams, strict=True)]
        )
        used = shuffled[:, : count * recipe.batch]
        epochs.append(used.reshape(recipe.clients, count, recipe.batch).transpose(0, 1))
    return data.split.train[order[:kept]], torch.cat(epochs)[: recipe.rounds]


def _part_size(data: Data, recipe: Utility) -> int:
    return recipe.part_size(len(data.split.train))


def _batches_an_epoch(data: Data, recipe: Utility) -> int:
    return recipe.batches_an_epoch(len(data.split.train))


def _module(network: Network) -> nn.Module:
    """Return the network as a module that holds its parameters."""
    module = copied(network.module)
    module.load_state_dict(network.parameters, strict=False)
    return module


def _loss(network: Network, images: Images, classes: int) -> float:
    like = next(iter(network.parameters.values()))
    with torch.inference_mode():
        targets = one_hot(images.labels, classes, like.dtype).to(like.device)
        return float(network.loss(images.images.to(like), targets))


def _part(progress: Progress, index: int, count: int) -> Progress:
    return lambda share, loss: progress((index + share) / count, loss)
