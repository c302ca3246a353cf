"""The Client contract: the loss that a client minimises, its arithmetic, and its optimiser.

Everything here is written for ONE client, in torch operations that vmap and double backward understand: attackers
imitate clients, and differentiate through what they do.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

from annotated_types import Ge, Lt
from torch import Tensor
from torch.nn import functional as F

from .errors import GradleakError, unknown
from .options import Options
from .plugins import said
from .sources import imported

Parameters = dict[str, Tensor]
"""One tensor a parameter: weights, or a gradient of them."""

State = Any
"""What an optimiser keeps from one local step to the next: tensors in dictionaries and tuples."""


def cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of class scores [B, classes] against class probabilities [B, classes]."""
    return -(targets * scores.log_softmax(dim=-1)).sum(dim=-1).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": cross_entropy,
    "bce": F.binary_cross_entropy_with_logits,
    "mse": F.mse_loss,
}
"""Losses by name, as torch's `nn.functional` has them: scores and class probabilities [B, classes] each to a scalar."""


@dataclass(frozen=True, kw_only=True)
class Client(Options):
    """How a client trains on its batch; as it is, plain gradient descent: a plugin overrides `begin` and `step`."""

    reference: ClassVar[str] = "gradleak"
    version: ClassVar[str] = "1"
    """Raised whenever updates change, so that old cells are not taken for new ones."""
    loss: str = "cross-entropy"
    """cross-entropy, bce (one sigmoid a class), mse (of the scores), or `module:function`, which takes scores and class
    probabilities [B, classes] and returns a scalar."""
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the class probabilities that all classes get in equal parts (Szegedy et al., arXiv:1512.00567)."""
    forward: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward pass; with bfloat16 as torch's autocast does it, the loss in float32."""
    accumulation: Annotated[int, Ge(1)] = 1
    """Parts of equal size that a step's batch is computed in; the step's gradient is their mean."""
    digest: str = ""
    """SHA-256 of the file of a `module:function`; filled in where it is not given, so that results name it."""

    def __post_init__(self) -> None:
        """Refuse a loss that is not there, or is another than the one named.

        Raises:
            GradleakError: see above.
        """
        if ":" not in self.loss:
            if self.loss not in LOSSES:
                raise unknown("loss", self.loss, [*LOSSES, "module:function"])
            return
        found = _digest(self.loss)
        if self.digest and self.digest != found:
            raise GradleakError(f"loss {self.loss}: its file has SHA-256 {found[:12]}…; expected {self.digest[:12]}…")
        object.__setattr__(self, "digest", found)

    def objective(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return the loss, a scalar, of scores [B, classes] against class probabilities [B, classes]."""
        if self.label_smoothing:
            targets = (1 - self.label_smoothing) * targets + self.label_smoothing / targets.shape[-1]
        if self.loss in LOSSES:
            return LOSSES[self.loss](scores, targets)
        return cast(Tensor, _imported(self.loss)(scores, targets))

    def begin(self, parameters: Parameters) -> State:
        """Return what the optimiser keeps before the first local step from these parameters."""
        return None

    def step(self, parameters: Parameters, gradient: Parameters, state: State, lr: float) -> tuple[Parameters, State]:
        """Return the parameters after one local step at rate `lr`, and what the optimiser keeps."""
        return {name: tensor - lr * gradient[name] for name, tensor in parameters.items()}, state

    @property
    def optimises(self) -> bool:
        """Whether local steps are others than plain ones, so that a client which takes none has no use for it."""
        return type(self).step is not Client.step

    @property
    def plain(self) -> bool:
        """Whether its gradient is that of the mean cross-entropy as closed forms have it."""
        usual = self.loss == "cross-entropy" and not self.label_smoothing and self.forward == "float32"
        return usual and type(self).objective is Client.objective

    @property
    def shows_labels(self) -> bool:
        """Whether only the classes of the batch have negative gradients in the last layer's bias."""
        return self.loss in ("cross-entropy", "bce") and type(self).objective is Client.objective


PLAIN = Client()
"""A client that minimises the cross-entropy by gradient descent."""


@functools.cache
def _imported(loss: str) -> Callable[..., Any]:
    return imported(loss, "loss")


@functools.cache
def _digest(loss: str) -> str:
    try:
        file = inspect.getsourcefile(inspect.unwrap(_imported(loss)))
        return hashlib.sha256(Path(file or "").read_bytes()).hexdigest()
    except (OSError, TypeError) as error:
        raise GradleakError(
            f"loss {loss}: its source cannot be read ({said(error)}); name a function of a file"
        ) from error
