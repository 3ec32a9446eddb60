"""How a codebook is kept in use while it is trained: statistics, moving averages, revival of dead entries."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SMOOTHING = 1e-5  # of counts, in entries: van den Oord et al. 2017, appendix A.1, as Sonnet has it


class CodebookState(nn.Module):
    """What training remembers of a codebook of n entries in d dimensions; all of it is in the state dict.

    uses: (n,) moving average of how often each entry is chosen, 1 its fair share. counts (n,) and sums
    (n, d): moving averages of the latents at each entry. ready: () 1 once there are entries and
    averages of theirs.
    """

    uses: Tensor
    counts: Tensor
    sums: Tensor
    ready: Tensor

    def __init__(self, n_embed: int, embed_dim: int) -> None:
        super().__init__()
        self.register_buffer("uses", torch.ones(n_embed))
        self.register_buffer("counts", torch.ones(n_embed))
        self.register_buffer("sums", torch.zeros(n_embed, embed_dim))
        self.register_buffer("ready", torch.zeros(()))

    @torch.no_grad()
    def begin(self, codebook: Tensor, fair: Tensor) -> None:
        """Take over the entries of `codebook` (n, d), each as if it were the mean of `fair` () latents."""
        self.uses.fill_(1.0)
        self.counts.fill_(fair)
        self.sums.copy_(codebook * fair)
        self.ready.fill_(1)

    @torch.no_grad()
    def observe(self, counts: Tensor, sums: Tensor, kept: float) -> None:
        """Take in a batch: how often each entry was chosen (n,), the sum of the latents there (n, d).

        kept: share of the averages that is left of what they were.
        """
        self.uses.lerp_(counts * (len(counts) / counts.sum()), 1 - kept)
        self.counts.lerp_(counts, 1 - kept)
        self.sums.lerp_(sums, 1 - kept)

    @torch.no_grad()
    def averages(self) -> Tensor:
        """(n, d): the mean latent at each entry, its counts smoothed so that none divides by zero."""
        total = self.counts.sum()
        smooth = (self.counts + SMOOTHING) / (total + len(self.counts) * SMOOTHING) * total
        return self.sums / smooth[:, None]

    @torch.no_grad()
    def put(self, entries: Tensor, places: Tensor, codebook: Tensor) -> None:
        """Put `entries` (k, d) at `places` (k,) of `codebook` (n, d), as if they were in fair use."""
        fair = self.counts.sum() / len(self.counts)
        codebook[places] = entries
        self.uses[places] = 1.0
        self.counts[places] = fair
        self.sums[places] = entries * fair


def chosen(latents: Tensor, indices: Tensor, n_embed: int) -> tuple[Tensor, Tensor]:
    """(counts (n,), sums (n, d)) of latents (b, d, h, w) at their entries (b, h, w)."""
    vectors = latents.detach().float().movedim(1, -1).flatten(0, -2)
    places = indices.flatten()
    counts = torch.bincount(places, minlength=n_embed).float()
    return counts, vectors.new_zeros(n_embed, vectors.shape[1]).index_add_(0, places, vectors)


def draw(latents: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count, d): some of the vectors in latents (b, d, h, w), no place twice while there are enough."""
    vectors = latents.detach().float().movedim(1, -1).flatten(0, -2)
    rounds = -(-count // len(vectors))
    order = torch.cat([torch.randperm(len(vectors), generator=generator) for _ in range(rounds)])
    return vectors[order[:count].to(vectors.device)]


def usage(counts: Tensor) -> tuple[float, float]:
    """(share of the entries chosen at all, perplexity: how many of equal use would spread as much)."""
    shares = counts.double() / counts.sum()
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum()
    return float((counts > 0).double().mean()), float(entropy.exp())
