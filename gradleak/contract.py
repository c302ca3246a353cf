"""The contracts of plugins as checks on a small case: what `gradleak check` and the tests of built-ins run.

A check is a function that returns if a promise is kept and raises `Broken` if not; its docstring's first line says
the promise. The victims are tuning victims of the digits, or of the dataset that a case names.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap

from . import registry
from .attack import Attack, Reconstruction
from .dataset import Data, Dataset, Images
from .defense import Defense, View
from .engine.backends import Sequential, Vmap
from .engine.objectives import relative_squared
from .engine.optimisers import Variables
from .engine.problem import Facts, Guess, Problem
from .errors import GradleakError
from .federation import client
from .mechanisms import batch_statistics
from .model import Model, initialise
from .seeds import Generators
from .threat import Labels, Level, Observation, Setting, rank
from .update import LocalTraining, Network, Update, one_hot

VICTIMS = 3
CHEAP = {"restarts": 1, "trials": 512, "rounds": 20, "iterations": 30}
"""Options that make a run short, where an attack has them and its case says nothing else."""
ATTACKS = ("optimisation", "analytic", "generative", "learned", "control")
"""Families of attacks."""
DEFENSES = ("noise", "compression", "sketch", "representation", "data", "model", "aggregation", "none")
"""Families of defenses."""
TRUTH = frozenset({"board", "cli", "contract", "datasets", "evaluation", "federation", "suite"})
"""Rooms that an attack or a defense must not reach: they hold victims' images, or what became of them."""


_TYPES = {"dataset.Images", "dataset.Dataset", "dataset.Split"}
"""What of the module that reads datasets says only what images look like."""


class Broken(Exception):
    """A promise that a plugin does not keep, in one line."""


class Unchecked(Exception):
    """Why a promise cannot be checked here, in one line."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    """The promise."""
    ok: bool | None
    """None where it could not be checked."""
    detail: str = ""


def check_file(path: Path, root: Path | None = None) -> list[Finding]:
    """Add the plugin of a file and check its contract.

    Args:
        path: the plugin file.
        root: the data root, for a dataset.

    Raises:
        GradleakError: the file is no plugin.
    """
    ((group, name),) = registry.add_file(path)
    found = [_found(partial(keeps_away_from_the_truth, path), "does not reach the truth")]
    return [*(found if group in ("attacks", "defenses") else []), *check(group, name, root)]


def check(group: str, name: str, root: Path | None = None) -> list[Finding]:
    """Check a plugin of the registry with its default options."""
    prepare: dict[str, Callable[[], Any]] = {
        "attacks": lambda: AttackCase(name),
        "defenses": lambda: DefenseCase(registry.build("defenses", name)),
        "models": lambda: registry.build("models", name),
        "datasets": lambda: (registry.build("datasets", name), name, root),
    }
    try:
        registry.build(group, name)
    except GradleakError as error:
        cls = registry.load(group, name)
        fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
        required = [each.name for each in fields if each.default is each.default_factory is dataclasses.MISSING]
        detail = f"no default for {', '.join(required)}" if required else str(error)
        return [Finding("can be built with its defaults", None if required else False, detail)]
    case = prepare[group]()
    return [_found(partial(each, case), (each.__doc__ or "").partition("\n")[0].rstrip(".")) for each in CHECKS[group]]


def _found(run: Callable[[], None], promise: str) -> Finding:
    promise = promise[:1].lower() + promise[1:]
    try:
        run()
    except Unchecked as reason:
        return Finding(promise, None, str(reason))
    except (Broken, GradleakError) as error:
        return Finding(promise, False, str(error))
    except Exception as error:
        return Finding(promise, False, " ".join(f"{type(error).__name__}: {error}".split()))
    return Finding(promise, True)


def _require(kept: object, otherwise: str) -> None:
    if not kept:
        raise Broken(otherwise)


def _close(left: Any, right: Any, otherwise: str, rtol: float | None = None, atol: float | None = None) -> None:
    try:
        torch.testing.assert_close(left, right, rtol=rtol, atol=atol)
    except AssertionError as error:
        raise Broken(f"{otherwise}: {' '.join(str(error).split())}") from error


def _equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# What a plugin file may import


def imports(path: Path, package: tuple[str, ...] = ()) -> set[str]:
    """Dotted modules below gradleak that a file imports, also inside functions, but not for type checkers only.

    `package` is the file's own package below gradleak, () for the core itself.
    """
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            if any(alias.name == "gradleak" for alias in node.names):
                found.add("registry")  # with the package at hand, everything is
            found.update(alias.name.removeprefix("gradleak.") for alias in node.names if "gradleak." in alias.name)
        if isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                base = [*package[: len(package) - node.level + 1], *base]
            elif base[:1] == ["gradleak"]:
                base = base[1:]
            else:
                base = ["", *base]  # another library
            if base[:1] != [""]:
                stem = ".".join(base)
                found.update(f"{stem}.{alias.name}".lstrip(".") for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def core() -> dict[str, Path]:
    """Files of the core by their names below gradleak ("store", "models.mlp"); a package is its own name."""
    home = Path(__file__).parent
    found = {}
    for path in home.rglob("*.py"):
        parts = path.relative_to(home).with_suffix("").parts
        if not {"attacks", "defenses"} & set(parts):
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def graph() -> dict[str, set[str]]:
    """Core modules, and the core modules that each imports."""
    known = core()
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        package = tuple(name.split(".")) if path.stem == "__init__" else tuple(name.split("."))[:-1]
        package = tuple(part for part in package if part)
        found[name] = {owner for target in imports(path, package) if (owner := owner_of(target, known))}
    return found


def owner_of(target: str, known: Mapping[str, object]) -> str:
    """Return the module that a dotted name is, or is in; empty for none."""
    while target and target not in known:
        target = target.rpartition(".")[0]
    return target


def reachable(start: set[str], graph: Mapping[str, set[str]]) -> set[str]:
    """Return the modules and all that they import, through whatever other modules."""
    seen: set[str] = set()
    waiting = list(start)
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += graph.get(name, set())
    return seen


def keeps_away_from_the_truth(path: Path, package: tuple[str, ...] = ()) -> None:
    """Imports nothing that holds a victim's images, not even through another module."""
    known = graph()
    targets = imports(path, package)
    plain = {owner for target in targets if (owner := owner_of(target, known))}
    reached = {name for name in reachable(plain, known) if name.partition(".")[0] in TRUTH - {"datasets"}}
    # The core reads datasets to train models and priors; a plugin has no business with them, nor with what builds them.
    reached |= {name for name in plain if name.partition(".")[0] in ("datasets", "registry")}
    reached |= {target for target in targets if target.partition(".")[0] == "dataset"} - _TYPES
    _require(not reached, f"{path.name} reaches {', '.join(sorted(reached))}")


# Attacks


@dataclass(frozen=True)
class Case:
    """What an attack is checked on."""

    model: str
    model_options: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    defense: str = "none"
    defense_options: dict[str, Any] = field(default_factory=dict)
    dataset: str = "digits"
    batch_size: int = 1
    local_lr: float | None = None
    """Rate of one local step of FedAvg."""


USUAL = (
    Case("mlp", {"widths": (32,)}),
    Case("lenet"),
    Case("convnet", {"width": 4}),
    Case("vit", {"dim": 16, "depth": 1, "heads": 2}),
)
"""Tried in turn until one suits the attack."""


class AttackCase:
    """An attack on a small case, and what it answers."""

    def __init__(self, name: str, cases: Sequence[Case] = USUAL):
        """Take the attack of a name, and cases of which the first that suits it counts."""
        self.name, self._cases = name, cases
        self.attack = self._build(cases[0])
        self.changed: list[str] = []
        """What its runs changed that is not theirs."""

    def _build(self, case: Case) -> Attack:
        fields = {item.name for item in dataclasses.fields(registry.load("attacks", self.name))}
        options = {key: value for key, value in {**CHEAP, **case.options}.items() if key in fields}
        attack: Attack = registry.build("attacks", self.name, options)
        return attack

    @cached_property
    def scene(self) -> tuple[Observation, Tensor]:
        """What the attack sees, and the images [N, B, C, H, W] that it should find."""
        if self.attack.needs.generator:
            raise Unchecked("needs a trained generator")
        for case in self._cases:
            self.attack = attack = self._build(case)
            data = Data(registry.build("datasets", case.dataset), case.dataset)
            defense: Defense = registry.build("defenses", case.defense, case.defense_options)
            setting = Setting(batch_size=case.batch_size, precision="float64", local_lr=case.local_lr)
            module = initialise(registry.build("models", case.model, case.model_options), data.shape, data.classes, 0)
            network = client.client_network(module, defense, setting)
            reason = attack.unsuited(network.module, setting, defense)
            if reason is None:
                return _observed(attack, data, network, defense, setting)
        raise Unchecked(f"no usual case suits it: {reason}")

    def run(self, rows: Sequence[int] = tuple(range(VICTIMS))) -> Reconstruction:
        """Attack all victims, or some of them on their own."""
        seen, chosen = self.scene[0], list(rows)
        observation = replace(
            seen,
            message={name: tensor[chosen] for name, tensor in seen.message.items()},
            update={name: tensor[chosen] for name, tensor in seen.update.items()},
            labels=None if seen.labels is None else seen.labels[chosen],
            private=None if seen.private is None else {name: t[chosen] for name, t in seen.private.items()},
        )
        names = [("victim", index) for index in chosen]
        before, noise = _tensors_of(observation), torch.get_rng_state()
        answer = self.attack.reconstruct(observation, Generators(names, dtype=torch.float64))
        after = _tensors_of(observation)
        self.changed += [name for name in before if not torch.equal(before[name], after[name])]
        self.changed += [] if torch.equal(torch.get_rng_state(), noise) else ["the global generator"]
        return answer

    @cached_property
    def answer(self) -> Reconstruction:
        """The answer for all victims."""
        return self.run()

    @cached_property
    def alone(self) -> Reconstruction:
        """The answer for the second victim on its own."""
        return self.run([1])


def _observed(
    attack: Attack, data: Data, network: Network, defense: Defense, setting: Setting
) -> tuple[Observation, Tensor]:
    images, labels = _tuning_victims(data, setting.batch_size)
    sent = client.send(network, images, labels, data.classes, defense, setting, 1, list(range(VICTIMS)))
    known = rank(attack.needs.labels) >= rank(Labels.COUNTS)
    observation = Observation(
        network=network,
        message=sent.message,
        update=vmap(partial(defense.decode, public=sent.public))(sent.message),
        view=View(defense, sent.public),
        shape=data.shape,
        classes=data.classes,
        batch_size=setting.batch_size,
        training=LocalTraining(),
        weight_difference=setting.local_lr is not None,
        running_statistics=batch_statistics.running(network.module) or None,
        labels=labels if known else None,
        auxiliary=data.split.train if attack.needs.auxiliary or attack.family == "control" else None,
        private=sent.buffers if attack.needs.defense is Level.ORACLE else None,
    )
    return observation, images


def _tuning_victims(data: Data, batch_size: int) -> tuple[Tensor, Tensor]:
    chosen = data.split.test[data.victim_indices(VICTIMS, batch_size, tuning=True)]
    return chosen.images.double(), chosen.labels


def _tensors_of(observation: Observation) -> dict[str, Tensor]:
    """Copies of every tensor that an attack is handed."""
    network = observation.network
    groups = {
        "message": observation.message,
        "update": observation.update,
        "parameters": network.parameters,
        "buffers": network.buffers,
        "private": observation.private or {},
        "state": dict(network.module.state_dict()),
    }
    return {f"{group}.{name}": t.detach().clone() for group, items in groups.items() for name, t in items.items()}


def attack_declares_itself(case: AttackCase) -> None:
    """Declares family, reference and what it needs."""
    attack = case.attack
    _require(getattr(attack, "family", None) in ATTACKS, f"family is none of {', '.join(ATTACKS)}")
    _require(getattr(attack, "reference", ""), "reference is missing")
    _require(registry.build("attacks", case.name, registry.options_of(attack)) == attack, "options do not rebuild it")


def attack_answers_every_victim(case: AttackCase) -> None:
    """Answers every victim with finite images in [0, 1], detached, in the precision it was given."""
    images, answer = case.scene[1], case.answer
    _require(answer.images.shape == images.shape, f"images {tuple(answer.images.shape)}, not {tuple(images.shape)}")
    _require(answer.images.dtype == images.dtype, f"images are {answer.images.dtype}, not {images.dtype}")
    _require(not answer.images.requires_grad, "images still require a gradient")
    _require(((answer.images >= 0) & (answer.images <= 1)).all(), "images are not in [0, 1]")
    if answer.labels is not None:
        fits = answer.labels.shape == images.shape[:2] and answer.labels.dtype == torch.int64
        found = f"{answer.labels.dtype} {tuple(answer.labels.shape)}"
        _require(fits, f"labels are {found}, not int64 {tuple(images.shape[:2])}")
    if answer.loss is not None:
        fits = answer.loss.shape == (VICTIMS,) and bool(answer.loss.isfinite().all())
        _require(fits, f"loss {tuple(answer.loss.shape)}, not {VICTIMS} finite numbers")
    _require(answer.status in ([], ["ok"] * VICTIMS), f"status {answer.status}")
    wrong = [name for name, column in answer.details.items() if column.shape != (VICTIMS,)]
    _require(not wrong, f"details have another shape than [{VICTIMS}]: {', '.join(wrong)}")


def attack_leaves_things_alone(case: AttackCase) -> None:
    """Changes nothing it is handed, and leaves the global generator alone."""
    _require(case.answer and not case.changed, f"changed {', '.join(case.changed[:3])}")


def attack_repeats_itself(case: AttackCase) -> None:
    """Gives the same answer to the same observation and streams."""
    _require(torch.equal(case.run([1]).images, case.alone.images), "two runs differ")


def attack_treats_victims_apart(case: AttackCase) -> None:
    """Answers no victim differently for its neighbours."""
    _close(case.alone.images[0], case.answer.images[1], "a victim alone and among others", atol=1e-6, rtol=0)


# Defenses


class DefenseCase:
    """A defense on a small model, with the messages of a few clients."""

    setting = Setting(batch_size=2, precision="float64")

    def __init__(self, defense: Defense):
        """Keep the defense."""
        self.defense = defense

    @cached_property
    def network(self) -> Network:
        """The model as clients run it."""
        return self._network(self.defense)

    @cached_property
    def batches(self) -> tuple[Tensor, Tensor]:
        """Images [N, B, C, H, W] and labels [N, B]."""
        return _tuning_victims(Data(registry.build("datasets", "digits"), "digits"), self.setting.batch_size)

    @cached_property
    def sent(self) -> client.Sent:
        """What the clients send."""
        return self.send()

    def send(self) -> client.Sent:
        """Send once more, with the same seeds."""
        return self._send(self.defense, self.network)

    @cached_property
    def plain(self) -> client.Sent:
        """What they would send without a defense."""
        nothing: Defense = registry.build("defenses", "none")
        return self._send(nothing, self._network(nothing))

    def rows(self, update: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """One dict a victim."""
        return [{name: tensor[index] for name, tensor in update.items()} for index in range(VICTIMS)]

    def decoded(self) -> dict[str, Tensor]:
        """The messages as the server decodes them, [N, ...]."""
        public = self.sent.public
        return dict(vmap(lambda message: self.defense.decode(message, public))(self.sent.message))

    def _network(self, defense: Defense) -> Network:
        options = {"widths": (12,), "activation": "sigmoid"}
        module = initialise(registry.build("models", "mlp", options), (1, 8, 8), 10, 0)
        return client.client_network(module, defense, self.setting)

    def _send(self, defense: Defense, network: Network) -> client.Sent:
        return client.send(network, *self.batches, 10, defense, self.setting, 5, list(range(VICTIMS)))


def defense_declares_itself(case: DefenseCase) -> None:
    """Declares family, reference and counter-attacks that exist."""
    defense = case.defense
    _require(getattr(defense, "family", None) in DEFENSES, f"family is none of {', '.join(DEFENSES)}")
    _require(getattr(defense, "reference", ""), "reference is missing")
    missing = set(defense.counter_attacks) - set(registry.names("attacks"))
    _require(not missing, f"counter-attacks that do not exist: {', '.join(sorted(missing))}")


def defense_sends_what_decodes(case: DefenseCase) -> None:
    """Sends finite messages that repeat with their seeds and decode to the model's parameters."""
    sent = case.sent
    _require(_equal(sent.message, case.send().message), "two messages with the same seeds differ")
    _require(all(bool(t.isfinite().all()) for t in sent.message.values()), "a message is not finite")
    decoded = case.decoded()
    shapes = {name: tensor.shape for name, tensor in case.network.parameters.items()}
    fits = {name: tensor.shape[1:] for name, tensor in decoded.items()} == shapes
    _require(fits, "decoded updates do not have the names and shapes of the parameters")
    _require(all(bool(t.isfinite().all()) for t in decoded.values()), "a decoded update is not finite")


def defense_packs_its_messages(case: DefenseCase) -> None:
    """Packs messages into bytes, other messages into others."""
    packed = [case.defense.pack(message, case.sent.public) for message in case.rows(case.sent.message)]
    _require(all(type(data) is bytes and data for data in packed), "pack does not return bytes, or none")
    _require([len(data) for data in packed] == case.sent.bytes, "pack does not repeat its length")
    _require(len(set(packed)) == VICTIMS, "different messages are packed to equal bytes")


def defense_leaves_its_input_alone(case: DefenseCase) -> None:
    """Changes neither the update nor the round's public tensors, and leaves the global generator alone."""
    defense, public = case.defense, case.sent.public
    update = case.rows(case.sent.update)[0]
    kept = [{name: tensor.clone() for name, tensor in each.items()} for each in (update, public)]
    noise = torch.get_rng_state()
    message = defense.protect(update, public, torch.Generator().manual_seed(0))
    defense.decode(message, public)
    defense.simulate(update, public)
    _require(_equal(update, kept[0]), "the update was changed in place")
    _require(_equal(public, kept[1]), "the public tensors were changed in place")
    _require(torch.equal(torch.get_rng_state(), noise), "the global generator was used; draw from the one given")


def defense_changes_something(case: DefenseCase) -> None:
    """Changes what is sent, unless its family is `none`."""
    same = _equal(case.decoded(), case.plain.update)
    _require(same == (case.defense.family == "none"), "the server gets the plain update" if same else "it is changed")


def defense_simulates_what_it_sends(case: DefenseCase) -> None:
    """Simulates victims in a stack as alone, and exactly what it sends where that is certain."""
    defense, public = case.defense, case.sent.public
    stacked = vmap(lambda update: defense.simulate(update, public))(case.sent.update)
    for index, update in enumerate(case.rows(case.sent.update)):
        single = defense.simulate(update, public)
        _close({name: tensor[index] for name, tensor in stacked.items()}, single, "simulated in a stack and alone")
        first, second = (defense.protect(update, public, torch.Generator().manual_seed(seed)) for seed in (0, 1))
        # With a likelihood the simulation need not be the message, and an aggregate is not one client's.
        certain = _equal(first, second) and not defense.has_likelihood and defense.family != "aggregation"
        if certain or defense.linear:
            _close(first, single, "sent and simulated (override `simulate`, or give an `nll`)")
        if defense.linear:
            double = defense.simulate({name: 2 * tensor for name, tensor in update.items()}, public)
            _close(double, {name: 2 * tensor for name, tensor in single.items()}, "simulated of twice the update")


def defense_can_be_attacked_adaptively(case: DefenseCase) -> None:
    """Gives an adaptive attacker a finite loss, twice differentiable, in a stack as alone, also of a zero guess."""
    defense, sent = case.defense, case.sent
    view = View(defense, sent.public)

    def match(update: Update, facts: Facts) -> Tensor:
        message, simulated = facts["message"], view.simulate(update)
        assert isinstance(message, dict)
        return view.nll(message, simulated) if defense.has_likelihood else relative_squared(simulated, message)

    def decode(variables: Variables, facts: Facts) -> Guess:
        targets, buffers = facts["targets"], facts["buffers"]
        assert isinstance(targets, Tensor) and isinstance(buffers, dict)
        return Guess(variables["images"], targets, buffers)

    problem = Problem(
        network=case.network,
        training=LocalTraining(),
        decode=decode,
        match=match,
        penalty=lambda guess, variables, facts: guess.images.new_zeros(()),
        per_example=view.per_example if defense.per_example_gradients else None,
    )
    images, labels = case.batches
    facts: Facts = {"message": sent.message, "targets": one_hot(labels, 10, images.dtype), "buffers": sent.buffers}
    start = {"images": 0.5 * images + 0.25}
    single, stacked = Sequential()(problem, start, facts), Vmap()(problem, start, facts)
    slopes = single.gradients["images"]
    _require(slopes.isfinite().all(), "the gradient is not finite")
    _require(slopes.abs().amax() > 0, "the gradient is zero: the loss does not depend on the images")
    _close(stacked.total, single.total, "losses in a stack and alone")
    _close(stacked.gradients, single.gradients, "gradients in a stack and alone", rtol=1e-6, atol=1e-9)
    zeros = {name: torch.zeros_like(tensor[0]) for name, tensor in sent.update.items()}
    _require(match(zeros, {"message": case.rows(sent.message)[0]}).isfinite(), "the loss of a zero guess is not finite")


# Models


def model_declares_itself(model: Model) -> None:
    """Declares its reference."""
    _require(getattr(model, "reference", ""), "reference is missing")


def model_gives_logits(model: Model) -> None:
    """Gives finite logits of grey and of colour images, one or several, in both modes."""
    for shape in ((1, 8, 8), (3, 32, 32)):
        network = initialise(model, shape, 7, 0)
        for count, training in ((1, False), (2, True)):
            logits = network.train(training)(torch.rand(count, *shape, generator=torch.Generator().manual_seed(1)))
            _require(logits.shape == (count, 7), f"logits {tuple(logits.shape)}, not {(count, 7)}, of images {shape}")
            _require(logits.isfinite().all(), f"logits are not finite for images {shape}")


def model_follows_its_seed(model: Model) -> None:
    """Draws its weights from the seed alone."""
    noise = torch.get_rng_state()
    first, again, other = (initialise(model, (1, 8, 8), 10, seed).state_dict() for seed in (1, 1, 2))
    _require(torch.equal(torch.get_rng_state(), noise), "the global generator was moved")
    _require(_equal(first, again), "two networks of one seed differ")
    _require(not _equal(first, other), "networks of two seeds are equal")


def model_can_be_differentiated_twice(model: Model) -> None:
    """Can be differentiated twice, in a stack of victims as alone, and depends on images through its gradients."""
    network = initialise(model, (1, 8, 8), 10, 0).double().eval()
    _require(not any(getattr(each, "inplace", False) for each in network.modules()), "a layer works in place")
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    images = torch.rand(VICTIMS, 2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    labels = torch.tensor([4, 7])

    def energy(batch: Tensor) -> Tensor:
        def loss(at: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(functional_call(network, at, (batch,)), labels)

        return torch.stack([each.square().sum() for each in grad(loss)(parameters).values()]).sum()

    stacked = vmap(grad(energy))(images)
    _require(stacked.isfinite().all(), "the second derivative is not finite")
    _require(stacked.abs().max() > 0, "the second derivative is zero")
    for index, batch in enumerate(images):
        point = batch.clone().requires_grad_()
        slopes = torch.autograd.grad(
            F.cross_entropy(network(point), labels), list(network.parameters()), create_graph=True
        )
        (alone,) = torch.autograd.grad(torch.stack([slope.square().sum() for slope in slopes]).sum(), point)
        _close(stacked[index], alone, "second derivatives in a stack and alone", rtol=1e-8, atol=1e-10)


# Datasets

DatasetCase = tuple[Dataset, str, Path | None]
"""A dataset, its name and the data root."""


def dataset_declares_itself(case: DatasetCase) -> None:
    """Declares its reference."""
    _require(getattr(case[0], "reference", ""), "reference is missing")


def dataset_holds_images(case: DatasetCase) -> None:
    """Holds images of one shape, float32 in [0, 1], with labels of its classes."""
    data = Data(*case)
    for half, images in (("train", data.split.train), ("test", data.split.test)):
        _holds(images, half, data)


def _holds(images: Images, half: str, data: Data) -> None:
    _require(len(images) > 0, f"{half}: no images")
    shape = tuple(images.images.shape)
    _require(shape == (len(images), *data.shape), f"{half}: images {shape}, not {(len(images), *data.shape)}")
    kinds = images.images.dtype, images.labels.dtype
    _require(kinds == (torch.float32, torch.int64), f"{half}: images and labels are {kinds}, not float32 and int64")
    _require(images.images.is_contiguous(), f"{half}: images are not contiguous")
    _require(0 <= images.images.min() and images.images.max() <= 1, f"{half}: images are not in [0, 1]")
    fits = 0 <= images.labels.min() and images.labels.max() < data.classes
    _require(fits, f"{half}: labels are not in 0 to {data.classes - 1}")


def dataset_repeats_itself(case: DatasetCase) -> None:
    """Reads the same images in the same order every time, and leaves the global generator alone."""
    noise = torch.get_rng_state()
    first, second = (case[0].read(case[2], False).digest for _ in range(2))
    _require(first == second, "two readings differ")
    _require(torch.equal(torch.get_rng_state(), noise), "the global generator was used; see gradleak.seeds")


def dataset_keeps_victims_private(case: DatasetCase) -> None:
    """Shows no private image among the public ones, and has a victim."""
    data = Data(*case)
    public = {image.numpy().tobytes() for image in data.split.train.images}
    shared = sum(image.numpy().tobytes() in public for image in data.split.test.images)
    _require(not shared, f"{shared} private images are public too")
    data.victim_indices(1, 1)


CHECKS: dict[str, tuple[Callable[[Any], None], ...]] = {
    "attacks": (
        attack_declares_itself,
        attack_answers_every_victim,
        attack_leaves_things_alone,
        attack_repeats_itself,
        attack_treats_victims_apart,
    ),
    "defenses": (
        defense_declares_itself,
        defense_sends_what_decodes,
        defense_packs_its_messages,
        defense_leaves_its_input_alone,
        defense_changes_something,
        defense_simulates_what_it_sends,
        defense_can_be_attacked_adaptively,
    ),
    "models": (model_declares_itself, model_gives_logits, model_follows_its_seed, model_can_be_differentiated_twice),
    "datasets": (dataset_declares_itself, dataset_holds_images, dataset_repeats_itself, dataset_keeps_victims_private),
}
"""By group, the checks of one plugin."""
