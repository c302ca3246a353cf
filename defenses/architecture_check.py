"""Architecture check: the client refuses a model that is not the agreed one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ._detection import Detection


@dataclass(frozen=True, kw_only=True)
class ArchitectureCheck(Detection):
    """Refuses a model whose parameters or buffers have other names, shapes or kinds of layer than agreed.

    What loading weights into one's own model does anyway. It sees added layers (Fowl et al., ICLR 2022,
    arXiv:2110.13057; Zhao et al., S&P 2024, arXiv:2303.12233) for certain, and nothing else; no honest model fails.
    """

    reference = "arXiv:2110.13057"

    def inspect(self, module: nn.Module, template: nn.Module, images: Tensor, targets: Tensor) -> float:
        """Return 1 for another architecture, 0 for the agreed one."""
        return float(_plan(module) != _plan(template))


def _plan(module: nn.Module) -> list[tuple[str, str]]:
    layers = [(name, type(each).__qualname__) for name, each in module.named_modules()]
    tensors = [(name, str(tuple(tensor.shape))) for name, tensor in module.state_dict().items()]
    return [*layers, *tensors]
