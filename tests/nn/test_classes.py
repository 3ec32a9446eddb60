"""Numbered classes as a context of one token."""

import pytest
import torch

from sfumato.errors import InputError
from sfumato.nn.classes import ClassEmbedder, ClassEmbedderConfig


def test_a_class_is_a_row_of_the_table() -> None:
    embedder = ClassEmbedder(ClassEmbedderConfig(n_classes=5, embed_dim=3))
    assert list(embedder.state_dict()) == ["embedding.weight"]  # LDM's name
    context = embedder(torch.tensor([4, 0, 4]))
    assert context.shape == (3, 1, 3)
    assert torch.equal(context[:, 0], embedder.embedding.weight[[4, 0, 4]])


def test_a_table_has_rows() -> None:
    with pytest.raises(InputError, match="n_classes is 0"):
        ClassEmbedderConfig(n_classes=0)
    with pytest.raises(InputError, match="embed_dim is -1"):
        ClassEmbedderConfig(embed_dim=-1)
