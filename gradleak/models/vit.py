"""A small vision transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor, nn

from ..errors import GradleakError
from ..model import Model, Normalise


@dataclass(frozen=True, kw_only=True)
class ViT(Model):
    """A transformer on image patches with a class token and learned positions (Dosovitskiy et al. 2021)."""

    reference = "Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021, arXiv:2010.11929"

    patch: Annotated[int, Ge(1)] = 4
    """Side of a patch in pixels; the image is padded at the right and below to a multiple of it."""
    dim: Annotated[int, Ge(1)] = 192
    """Width of a token; a multiple of `heads`."""
    depth: Annotated[int, Ge(1)] = 6
    heads: Annotated[int, Ge(1)] = 3
    mlp_ratio: Annotated[float, Gt(0)] = 4.0
    """Hidden units of a block's MLP over `dim`."""
    position_std: Annotated[float, Ge(0)] = 0.02
    """Standard deviation of the initial positions; 1 makes images far easier to recover."""

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise GradleakError(f"model 'vit': dim = {self.dim} is not a multiple of heads = {self.heads}")

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Return the network; see `Model.build`."""
        channels, height, width = shape
        patches = -(-height // self.patch) * -(-width // self.patch)
        hidden = max(1, round(self.dim * self.mlp_ratio))
        return nn.Sequential(
            Normalise(channels),
            _Patches(channels, self.patch, self.dim),
            _Embedding(patches, self.dim, self.position_std),
            *(_Block(self.dim, self.heads, hidden) for _ in range(self.depth)),
            _ClassToken(),
            nn.LayerNorm(self.dim),
            nn.Linear(self.dim, classes),
        )


class _Patches(nn.Module):
    """Images [B, C, H, W] to one token a patch, [B, T, dim]."""

    def __init__(self, channels: int, patch: int, dim: int):
        super().__init__()
        self.patch = patch
        self.projection = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % self.patch, 0, -height % self.patch))
        tokens: Tensor = self.projection(padded)
        return tokens.flatten(2).transpose(1, 2)


class _Embedding(nn.Module):
    """Puts the class token first and adds the positions: [B, T, dim] to [B, T + 1, dim]."""

    dropout_after = ("",)

    def __init__(self, patches: int, dim: int, std: float):
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(std * torch.randn(1, patches + 1, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        first = self.class_token.expand(len(tokens), -1, -1)
        return torch.cat((first, tokens), dim=1) + self.positions


class _Attention(nn.Module):
    """Multi-head self-attention written out, since fused kernels have no second derivative."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.queries_keys_values = nn.Linear(dim, 3 * dim)
        self.softmax = nn.Softmax(dim=-1)
        self.output = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        images, length, dim = tokens.shape
        split: Tensor = self.queries_keys_values(tokens)
        # [B, T, 3 * dim] to three of [B, heads, T, dim / heads]
        split = split.reshape(images, length, 3, self.heads, dim // self.heads)
        queries, keys, values = split.permute(2, 0, 3, 1, 4).unbind(0)
        weights = self.softmax(self.scale * queries @ keys.transpose(-2, -1))
        return self.output((weights @ values).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class _Block(nn.Module):
    """Attention and MLP, each behind a layer normalisation and beside a shortcut."""

    # With the activations and the embedding the sites of Scheliga et al. 2023, arXiv:2208.06163.
    dropout_after = ("attention", "mlp")

    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(dim), _Attention(dim, heads))
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(tokens)
        return tokens + self.mlp(tokens)  # type: ignore[no-any-return]


class _ClassToken(nn.Module):
    """The first token alone: [B, T + 1, dim] to [B, dim]."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]
