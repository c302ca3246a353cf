"""Label inference: which labels a batch has, read from the gradient of the layer whose output is the logits.

With cross-entropy, row c of that layer's gradient is the batch mean of (p_c - [c = y]) h, its bias gradient
the mean of p_c - [c = y] (p: softmax output, h: the layer's input): only the rows of classes in the batch can
be negative for h >= 0.

A rule takes gradients `weight` [..., K, F] and `bias` [..., K] or None for K classes, and the batch size B;
it returns labels [..., B] in no order. Leading dimensions are victims. A FedAvg weight delta points the other
way: negate it first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..errors import GradleakError, unknown
from ..structure import NO_HEAD, Head
from ..update import Network

Rule = Callable[[Tensor, Tensor | None, int], Tensor]

GRANT_LABELS = "labels must be granted (a suite's `grants: {labels: known}`, or `labels` of Observation.of)"
"""What to do where they cannot be inferred."""


def infer(update: Mapping[str, Tensor], head: Head, batch_size: int, rule: str = "auto") -> Tensor:
    """Return the inferred labels of every victim, [N, B] int64, sorted.

    Args:
        update: stacked gradients [N, ...] by parameter name; not a weight delta.
        head: the layer whose output is the logits (`gradleak.structure`).
        batch_size: number of labels B.
        rule: a key of `RULES`, or "auto": `bias-corrected` where that layer has a bias, else `wainakh`.

    Raises:
        GradleakError: the rule is unknown or cannot serve this batch size, or the update lacks what it reads.
    """
    reason = lacking(head, rule)
    if reason is not None:
        raise GradleakError(reason)
    if rule == "auto":
        rule = "wainakh" if head.bias is None else "bias-corrected"
    weight, bias = gradients(update, head)
    if weight is None:
        assert bias is not None
        # Rules of the bias read nothing else.
        weight = bias[..., None]
    return RULES[rule](weight, bias, batch_size).sort(-1).values


def soft(update: Mapping[str, Tensor], head: Head, network: Network, features: Tensor | None = None) -> Tensor:
    """Return the class probabilities that clients trained on, [N, B, K], mixed or smoothed ones included.

    dL/dW is the mean of (p - y) h^T and dL/db that of p - y, so that known features h give p - y, and p with them. A
    batch of one shows its features itself: h = dL/dW_c / dL/db_c for every class c.

    Args:
        update: stacked gradients [N, ...] by parameter name; not a weight delta.
        head: the layer whose output is the logits, with a weight and a bias.
        network: which the client trained.
        features: input of the head, [N, B, F]; by default that of a batch of one, from the gradient.

    Raises:
        GradleakError: the head's weight or bias is not in the update.
    """
    weight, bias = gradients(update, head)
    if weight is None or bias is None or head.weight is None or head.bias is None:
        raise GradleakError("soft labels need the gradients of the last layer's weight and bias")
    if features is None:
        strength = bias.square().sum(1, keepdim=True).clamp(min=1e-300)
        # Least squares over the classes c of h dL/db_c = dL/dW_c.
        features = ((bias[:, None] @ weight)[:, 0] / strength)[:, None]
    own = network.parameters[head.weight].to(features)
    own = own if head.transposed else own.flatten(1).mT
    chances = (features @ own + network.parameters[head.bias].to(features)).softmax(-1)
    # A bias is the weight of a feature that is always 1.
    rows = torch.cat([features, torch.ones_like(features[..., :1])], dim=2).mT
    seen = torch.cat([weight, bias[..., None]], dim=2).mT.to(features)
    targets: Tensor = chances - rows.shape[2] * torch.linalg.pinv(rows) @ seen
    return targets


def lacking(head: Head, rule: str = "auto") -> str | None:
    """Say why a rule cannot be used on a model with this head, or None.

    Raises:
        GradleakError: the rule is unknown.
    """
    if rule != "auto" and rule not in RULES:
        raise unknown("label rule", rule, ["auto", *RULES])
    if head.weight is None and head.bias is None:
        return f"label inference: {NO_HEAD} and whose gradient is sent; {GRANT_LABELS}"
    if rule in _ON_BIAS and head.bias is None:
        return f"label rule {rule!r} needs a bias in the last layer; use 'row-sum' or 'wainakh'"
    if rule not in ("auto", *_ON_BIAS) and head.weight is None:
        return (
            f"label rule {rule!r} needs the gradient of the last layer's weight, which is not in the update "
            "(frozen, shared or reparametrised); use 'bias-corrected' or 'bias-sign'"
        )
    return None


def gradients(update: Mapping[str, Tensor], head: Head) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the head's weight [N, K, F] and bias [N, K]; None for what is not sent."""
    weight = None if head.weight is None else update[head.weight]
    if weight is not None:
        weight = weight.mT if head.transposed else weight.flatten(2)
    return weight, None if head.bias is None else update[head.bias]


def row_sum(weight: Tensor, bias: Tensor | None, batch_size: int) -> Tensor:
    """Classes with the smallest row sums (Zhao et al. 2020, arXiv:2001.02610).

    Exact at B = 1 for features >= 0 (ReLU, sigmoid), not for signed ones (tanh). Distinct labels only.
    """
    return _smallest(weight.sum(-1), batch_size, "row-sum")


def row_sign(weight: Tensor, bias: Tensor | None, batch_size: int) -> Tensor:
    """The class whose row points against all other rows (Zhao et al. 2020, arXiv:2001.02610).

    B = 1 only; exact there for any features and three classes or more, with no bias needed.
    """
    if batch_size != 1:
        raise GradleakError(f"label rule 'row-sign' serves a batch of 1, not {batch_size}; use 'wainakh'")
    return (weight @ weight.mT < 0).sum(-1).argmax(-1, keepdim=True)


def column_min(weight: Tensor, bias: Tensor | None, batch_size: int) -> Tensor:
    """Classes with the smallest single entries (Yin et al. 2021, arXiv:2104.07586). Distinct labels only."""
    return _smallest(weight.amin(-1), batch_size, "yin")


def bias_sign(weight: Tensor, bias: Tensor | None, batch_size: int) -> Tensor:
    """Classes with the smallest bias gradients. Exact at B = 1 for any features. Distinct labels only."""
    return _smallest(_needed(bias, "bias-sign"), batch_size, "bias-sign")


def bias_corrected(weight: Tensor, bias: Tensor | None, batch_size: int) -> Tensor:
    """Counts from the bias gradient: negative classes once, then the smallest, each taken out when found.

    One label's impact is the sum of the negative entries over B. Repeated labels are found while B < K; above,
    present classes turn positive, the impact comes out too small and the commonest class is overcounted.
    """
    bias = _needed(bias, "bias-corrected")
    return _count(bias, bias.clamp(max=0).sum(-1) / batch_size, batch_size)


def wainakh(weight: Tensor, bias: Tensor | None, batch_size: int) -> Tensor:
    """Counts from the row sums (Wainakh et al. 2021, arXiv:2105.09369).

    One label's impact is (1 + 1/K) times the sum of the negative row sums over B. For features
    >= 0; repeated labels are found as by `bias_corrected`.
    """
    sums = weight.sum(-1)
    impact = (1 + 1 / sums.shape[-1]) * sums.clamp(max=0).sum(-1) / batch_size
    return _count(sums, impact, batch_size)


RULES: dict[str, Rule] = {
    "row-sum": row_sum,
    "row-sign": row_sign,
    "yin": column_min,
    "bias-sign": bias_sign,
    "bias-corrected": bias_corrected,
    "wainakh": wainakh,
}
"""Every rule by name."""

_ON_BIAS = ("bias-sign", "bias-corrected")


def _smallest(scores: Tensor, batch_size: int, rule: str) -> Tensor:
    classes = scores.shape[-1]
    if batch_size > classes:
        raise GradleakError(
            f"label rule {rule!r} finds distinct labels, at most {classes} for {classes} classes, "
            f"not {batch_size}; use 'bias-corrected' or 'wainakh'"
        )
    return scores.topk(batch_size, dim=-1, largest=False).indices


def _count(scores: Tensor, impact: Tensor, batch_size: int) -> Tensor:
    """Take B labels greedily: each negative class once, then the smallest; each adds its impact back."""
    impact = impact.unsqueeze(-1)
    pending = scores < 0
    labels = []
    for _ in range(batch_size):
        first = scores.masked_fill(~pending, torch.inf)
        label = torch.where(pending.any(-1, keepdim=True), first, scores).argmin(-1, keepdim=True)
        scores = scores.scatter_add(-1, label, -impact)
        pending = pending.scatter(-1, label, False)
        labels.append(label)
    return torch.cat(labels, -1)


def _needed(bias: Tensor | None, rule: str) -> Tensor:
    if bias is None:
        raise GradleakError(f"label rule {rule!r} needs a bias in the last layer; use 'row-sum' or 'wainakh'")
    return bias
