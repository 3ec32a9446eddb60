"""Training a codebook: the straight-through gradient, moving averages, revival and the figures of its use."""

from __future__ import annotations

import math

import pytest
import torch

from sfumato.nn.codebook import CodebookState, chosen, draw, usage
from sfumato.nn.vq import VectorQuantizer


def test_the_gradient_goes_straight_through_and_each_loss_to_its_own_side() -> None:
    torch.manual_seed(0)
    quantiser = VectorQuantizer(8, 3)
    torch.nn.init.normal_(quantiser.embedding.weight)
    latents = torch.randn(2, 3, 4, 4, requires_grad=True)
    found = quantiser.train_step(latents)
    assert torch.allclose(found.straight, quantiser(latents), atol=1e-6)
    weights = torch.randn_like(latents)
    (gradient,) = torch.autograd.grad((found.straight * weights).sum(), latents, retain_graph=True)
    assert torch.equal(gradient, weights)
    difference = latents - quantiser(latents)
    assert found.commitment.item() == pytest.approx(difference.square().mean().item())
    assert found.codebook.item() == pytest.approx(found.commitment.item())
    entries = quantiser.embedding.weight
    assert torch.autograd.grad(found.codebook, latents, retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(found.commitment, entries, retain_graph=True, allow_unused=True) == (None,)
    (pulled,) = torch.autograd.grad(found.commitment, latents)
    assert torch.allclose(pulled, 2 * difference / latents.numel(), atol=1e-7)


def test_counts_and_sums_of_the_latents_at_each_entry() -> None:
    latents = torch.arange(12.0).view(1, 2, 2, 3)  # (b, d, h, w)
    counts, sums = chosen(latents, torch.tensor([[[0, 2, 2], [0, 0, 3]]]), 5)
    assert counts.tolist() == [3, 0, 2, 1, 0]
    assert sums.tolist() == [[0 + 3 + 4, 6 + 9 + 10], [0, 0], [1 + 2, 7 + 8], [5, 11], [0, 0]]


def test_moving_averages_find_the_means_of_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[-3.0, 0.0], [3.0, 0.0], [0.0, 5.0]])
    state, codebook = CodebookState(3, 2), centres + 1.0
    state.put(codebook.clone(), torch.arange(3), codebook)
    quantiser = VectorQuantizer(3, 2)
    for _ in range(60):
        latents = (
            (centres + 0.1 * torch.randn(50, 3, 2, generator=generator)).view(1, 10, 15, 2).movedim(-1, 1)
        )
        quantiser.embedding.weight.data.copy_(codebook)
        state.observe(*chosen(latents, quantiser.indices(latents), 3), 0.8)
        codebook = state.averages()
    assert torch.allclose(codebook, centres, atol=0.05)


def test_what_is_not_chosen_fades_and_is_put_back_into_use() -> None:
    state, codebook = CodebookState(4, 2), torch.zeros(4, 2)
    counts, sums = torch.tensor([10.0, 10.0, 20.0, 0.0]), torch.ones(4, 2)
    for _ in range(5):
        state.observe(counts, sums, 0.5)
    assert state.uses.tolist() == pytest.approx([1, 1, 2 - 0.5**5, 0.5**5])
    state.put(torch.tensor([[7.0, 8.0]]), torch.tensor([3]), codebook)
    assert state.uses[3] == 1 and codebook[3].tolist() == [7, 8]
    assert torch.allclose(state.averages()[3], codebook[3], rtol=1e-3)


def test_entries_are_drawn_of_the_latents_without_repetition() -> None:
    latents = torch.arange(32.0).view(2, 1, 4, 4)
    first = draw(latents, 20, torch.Generator().manual_seed(1))
    assert torch.equal(first, draw(latents, 20, torch.Generator().manual_seed(1)))
    assert len(first.unique()) == 20 and not torch.equal(first, first.sort(dim=0).values)
    assert draw(latents, 70, torch.Generator().manual_seed(1)).unique().numel() == 32


def test_usage() -> None:
    assert usage(torch.tensor([5.0, 5.0, 0.0, 0.0])) == (0.5, pytest.approx(2))
    share, perplexity = usage(torch.tensor([3.0, 1.0]))
    assert share == 1 and perplexity == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )
