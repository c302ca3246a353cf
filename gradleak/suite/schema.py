"""Every key of a suite, its type and its bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from annotated_types import Ge, MinLen
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StrictBool,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ..errors import GradleakError
from ..options import count
from ..paths import RelativeFile
from . import single
from .fields import Label, Plugin, Plugins, Positive, Rate, Seeds, Strict, Whole
from .settings import build_setting

if TYPE_CHECKING:
    from ..threat import Setting

UTILITY = "utility"
"""What stands for the attack in a cell that trains a model under a defense, and attacks nobody."""

HELD_OUT = 10
"""One in so many images of the train split is given to no client: on these the server's rate is chosen."""

KNOWLEDGE = ("oblivious", "parameters", "public", "oracle")
"""Levels of knowledge of the defense, weakest first (`gradleak.threat.Level`)."""

AXES = ("datasets", "models", "settings", "defenses")
"""What `only` restricts an entry to."""
ENTRIES = ("datasets", "models", "attacks", "defenses")
"""Axes of plugins."""


class Engine(Strict):
    """How attacks compute; part of the key, because it can change the last digits."""

    under: ClassVar[str] = "engine"

    backend: str = "layerwise"
    """`auto` times the backends once on each machine: the last digits may differ between machines."""
    width: Annotated[int | Literal["auto"], BeforeValidator(single.width)] = 32
    """Trials optimised together, at most; `auto`: as many as memory is measured to hold, so the last digits may differ
    between machines."""
    timeout: Rate | None = None
    """Seconds an attack may take on one cell's victims; those not done are marked."""


class Prior(Strict):
    """The generator that settings with `grants: {generator: true}` give to attacks: trained here, or a user's."""

    under: ClassVar[str] = "prior"

    dataset: Plugin | None = None
    """Whose train split it learns; by default the cell's own, another is out of distribution."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Fields of `gradleak.training.priors.Recipe`."""
    source: str | None = None
    """`module:function` of a user's generator instead (`gradleak.search.generators.load_generator`)."""
    weights: RelativeFile | None = None
    """Its safetensors file, relative to the data root."""


class Utility(Strict):
    """Federated training that shows what accuracy each defense leaves, on every dataset and model of the suite."""

    under: ClassVar[str] = "utility"

    clients: Positive = 10
    """How many share the train split, in equal parts."""
    rounds: Positive = 100
    """In each of them every client sends one message, and the server applies their mean."""
    batch_size: Annotated[int | Literal["setting"], BeforeValidator(single.batch)] = "setting"
    """Images that a client takes in a round; `setting`: those and the local steps of each setting of the suite, so that
    the client that is attacked is the one whose accuracy is measured."""
    lr: Annotated[list[Rate], MinLen(1), BeforeValidator(single.several)] = [0.1, 0.3, 1.0]
    """Rates of the server to choose from, on images held out."""
    local_steps: Positive = 1
    """Local steps of FedAvg; a FedSGD client (`local_lr` unset) takes one and sends its gradient."""
    local_batch_size: Positive | None = None
    """Images in a local step; unset is the whole batch."""
    local_lr: Rate | None = None
    """Rate of the local steps; set, clients send their weight difference (FedAvg)."""
    trainable: Literal["all", "head"] | tuple[str, ...] = "all"
    """What the clients train and send; see `gradleak.threat.Setting`."""
    local_order: Literal["fixed", "shuffled"] = "fixed"
    """How each pass over the batch goes: in its own order, or in one that the client draws."""
    client: Any = None
    """Loss and optimiser of the clients: a name, or `{name: {options}}`."""
    seeds: Seeds | None = None
    """By default the suite's."""

    @model_serializer(mode="wrap")
    def _as_ever(self, plain: Callable[[Utility], dict[str, Any]]) -> dict[str, Any]:
        """Leave out what came later while it is not used: cells keep their keys."""
        later = {"trainable": "all", "local_order": "fixed", "client": None}
        return {key: value for key, value in plain(self).items() if key not in later or value != later[key]}

    VERSION: ClassVar[str] = "1"
    """Raised whenever training changes, so that old accuracies are not taken for new ones."""

    _CLIENT: ClassVar[tuple[str, ...]] = (
        "batch_size",
        "local_steps",
        "local_batch_size",
        "local_lr",
        "trainable",
        "local_order",
        "client",
    )

    @property
    def batch(self) -> int:
        """The number of `batch_size`.

        Raises:
            GradleakError: it is left to the setting.
        """
        if self.batch_size == "setting":
            raise GradleakError("utility: batch_size is the setting's; say which with `at`")
        return self.batch_size

    def at(self, setting: Setting, where: str = "") -> Utility:
        """Return the recipe for the clients of a setting, if it leaves them to the setting; else itself.

        Raises:
            GradleakError: it leaves the batch to the setting, but not the local steps.
        """
        if self.batch_size != "setting":
            return self
        for key in self._CLIENT[1:]:
            if getattr(self, key) != type(self).model_fields[key].default:
                place = f"{where}: " if where else ""
                raise GradleakError(
                    f"{place}{key}: comes from the setting, as batch_size does; to state it, give batch_size a number"
                )
        known = {key: getattr(setting, key) for key in self._CLIENT}
        client = setting.client
        known["client"] = {"name": client.name, "options": dict(client.options)} if client.name else None
        return self.model_copy(update=known)

    def part_size(self, images: int) -> int:
        """Return how many of a train split's images each client has."""
        return (images - images // HELD_OUT) // self.clients

    def batches_an_epoch(self, images: int) -> int:
        """Return in how many batches a client passes through its part of a train split."""
        return self.part_size(images) // self.batch

    def participations(self, images: int) -> int:
        """Return how many messages an example of a train split takes part in, at most."""
        return -(-self.rounds // max(1, self.batches_an_epoch(images)))

    def setting(self, where: str = "") -> Setting:
        """Return how the clients train.

        Raises:
            GradleakError: values that do not fit each other, or are left to the setting.
        """
        keys, _ = self._CLIENT, self.batch
        given = {key: getattr(self, key) for key in keys}
        return build_setting({"name": UTILITY, **given, "client": given["client"] or {"name": ""}}, where)


def _grants_no_defense(values: dict[str, Any]) -> dict[str, Any]:
    grants = values.get("grants")
    if isinstance(grants, Mapping) and "defense" in grants:
        allowed = ", ".join(KNOWLEDGE)
        raise PydanticCustomError(
            "grants",
            f"What is known of the defense is no grant of a setting; write `knowledge: [...]` of the suite ({allowed})",
        )
    return values


Victims = Annotated[int, Ge(1), BeforeValidator(count)]
Values = Annotated[dict[str, Any], AfterValidator(_grants_no_defense)]
"""A setting, as it is written (`build_setting`)."""


def _budget(value: Any) -> Any:
    return {"iterations": value} if type(value) is int else value


class Context(Strict):
    """One board of a suite: a dataset, a model and a setting, and what differs there from the rest of the suite."""

    under: ClassVar[str] = "contexts"

    dataset: Plugin
    """Whose images are attacked."""
    model: Plugin
    """What clients train."""
    setting: Values = {}
    """As one of `settings`."""
    victims: Victims | None = None
    """By default the suite's, as of all that follows."""
    seeds: Seeds | None = None
    """As those of the suite."""
    knowledge: Annotated[list[str], MinLen(1)] | None = None
    """As that of the suite."""
    utility: Utility | None = None
    """`null`: no model is trained here."""
    attacks: Plugins | None = None
    """Labels of entries that the suite's own list has, or entries of this context alone."""
    defenses: Plugins | None = None
    """Likewise."""
    budgets: dict[str, Annotated[dict[str, Any], BeforeValidator(_budget)]] = {}
    """By label of an attack, one that an ensemble brings too: options that differ here. A number is that of
    `iterations`."""

    @property
    def titles(self) -> tuple[str, str, str]:
        """What tables call it: dataset, model and setting."""
        return self.dataset.title, self.model.title, str(self.setting.get("name", "default"))


class Suite(Strict):
    """A grid: every attack against every defense on every model, dataset, setting and seed.

    Of models, datasets and settings it is either all combinations (`models`, `datasets`, `settings`), or those that it
    lists (`contexts`).
    """

    name: Annotated[Label, MinLen(1), AfterValidator(single.no_path)]
    """What its results are known by; with `version` it names the suite that a bundle is verified against."""
    version: Whole = 1
    """Raise it when the grid changes."""
    description: str = ""
    """A sentence or two that head the report."""
    victims: Victims = 16
    """Victims (client batches) of every cell, the first of the dataset's frozen list."""
    tuning: StrictBool = False
    """Attack the tuning victims instead, which no published table shows."""
    seeds: Seeds = [0]
    """Each draws a model, a round and the attack's randomness anew."""
    candidates: Annotated[int, Ge(2), BeforeValidator(count)] = 100
    """Images among which re-identification must find the true one."""
    knowledge: Annotated[list[str], MinLen(1)] = ["oblivious", "public"]
    """What attacks know of the defense: some of oblivious, parameters, public and oracle; each attack runs at each."""
    engine: Engine = Engine()
    """How attacks compute; see below."""
    prior: Prior = Prior()
    """The generator that settings may grant; see below."""
    utility: Utility | None = None
    """Unset, no model is trained under the defenses."""
    controls: Literal["all", "listed"] = "all"
    """`all`: every control runs in every context whose grants allow it, whatever `only` says, and once a context where
    it reads no message; but for those that attack another victim, which have to be listed. `listed`: those that the
    suite lists, where it wants them; for tables of papers, which have rows of their own."""
    contexts: list[Context] = []
    """Each a dataset, a model and a setting of its own, run in this order; instead of the next three."""
    datasets: Plugins = []
    """Whose images are attacked."""
    models: Plugins = []
    """What clients train."""
    settings: Annotated[list[Values], MinLen(1)] = [{}]
    """How clients train, and what attackers are told; see below."""
    attacks: Plugins
    """Attacks and ensembles, such as `auto-v2`: every attack that applies."""
    defenses: Plugins
    """What clients do about it; `none` is the training as it is."""
    reported: list[dict[str, Any]] = []
    """Published numbers to stand beside these (see `gradleak.report.reproduction`); no part of any cell."""

    @model_validator(mode="after")
    def _either(self) -> Self:
        """Refuse a grid without datasets or models, and both ways of naming them at once."""
        for axis in ("datasets", "models", "settings"):
            given = axis in self.model_fields_set
            if self.contexts and given:
                raise PydanticCustomError("both", f"{axis}: every context names its own; leave this out")
            if not self.contexts and not given and axis != "settings":
                raise PydanticCustomError("neither", f"{axis}: field required, or contexts instead")
        return self
