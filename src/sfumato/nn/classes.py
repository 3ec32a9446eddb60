"""Numbered classes as a context of one token (Rombach et al. 2022, section 4.3.2)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from sfumato.errors import InputError


@dataclass(frozen=True)
class ClassEmbedderConfig:
    """A table of `n_classes` rows, each a context of width `embed_dim`; the defaults are cin256-v2's.

    unconditional: the last row is "no class", for guidance, as its 1001st; the older cin256 has 1000 rows
    and none for that. Raises InputError for a number below 1.
    """

    n_classes: int = 1001
    embed_dim: int = 512
    unconditional: bool = True

    def __post_init__(self) -> None:
        for name in ("n_classes", "embed_dim"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1.")


class ClassEmbedder(nn.Module):
    """A learned vector for every class, under LDM's state-dict name `embedding.weight`."""

    def __init__(self, config: ClassEmbedderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.n_classes, config.embed_dim)

    def forward(self, labels: Tensor) -> Tensor:
        """(b,) long, each below n_classes -> a context (b, 1, embed_dim)."""
        return self.embedding(labels[:, None])
