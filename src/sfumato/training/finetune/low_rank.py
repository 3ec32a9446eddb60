"""Low-rank changes beside the frozen layers of a network (Hu et al. 2021, section 4.1), to be trained."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.nn.attention import AttentionBlock
from sfumato.nn.layers import Convolution

Layer = nn.Linear | Convolution
CONVOLVE: Mapping[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
# What is changed, by the ends of our layers' names. Blocks are all but what stands before and after them.
ATTENTION = re.compile(r".*(?:\.attn[12]\.to_(?:q|k|v|out\.0)|\.self_attn\.(?:q|k|v|out)_proj)")
TRANSFORMER = re.compile(r".*(?:\.ff\.net\.(?:0\.proj|2)|\.proj_in|\.proj_out|\.mlp\.fc[12])")
BLOCKS = re.compile(r"(?:input_blocks\.[1-9]|middle_block|output_blocks).*")


class Factors(nn.Module):
    """scale * up @ down, the change of one layer's weight; zero at first, because `up` is.

    down: (rank, inputs, *kernel), up: (outputs, rank, 1, ...), in float32 whatever the layer is kept in.
    `down` starts as in PEFT and kohya's trainer, uniform in +-1/sqrt(its inputs), from `generator`.
    """

    def __init__(
        self, layer: Layer, rank: int, alpha: float, dropout: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        outputs, *rest = layer.weight.shape
        self.alpha, self.dropout = alpha, dropout
        down = torch.empty(rank, *rest)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        device = layer.weight.device
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(outputs, rank, *[1] * (len(rest) - 1), device=device))

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / len(self.down)

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """What the change adds to the layer's output for x; dropout leaves out single inputs."""
        x = F.dropout(x.to(self.down.dtype), self.dropout, self.training)
        if isinstance(layer, nn.Linear):
            return F.linear(F.linear(x, self.down), self.up) * self.scale
        convolve = CONVOLVE[self.down.ndim]
        return convolve(convolve(x, self.down, None, layer.stride, layer.padding), self.up) * self.scale

    def change(self) -> Tensor:
        """The change of the weight itself, (outputs, inputs, *kernel); dropout leaves out input channels."""
        down = self.down
        if self.training and self.dropout:
            down = down * F.dropout(torch.ones_like(down[:1]), self.dropout)
        return torch.einsum("or,r...->o...", self.up.flatten(1), down) * self.scale


class Adapted(nn.Module):
    """A frozen layer and its change, to be called as the layer is; as a matrix by `weight` and `bias` too."""

    def __init__(self, layer: Layer, factors: Factors) -> None:
        super().__init__()
        self.layer = layer
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with the change in it."""
        out = self.layer(x)
        return out + self.factors(x, self.layer).to(out.dtype)

    @property
    def weight(self) -> Tensor:
        """For layers that are computed as matrix products (`sfumato.nn.layers.pointwise`)."""
        own = self.layer.weight
        return (own + self.factors.change()).to(own.dtype)

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias


def targets(network: nn.Module, kind: str) -> Iterator[tuple[str, Layer]]:
    """(name, layer) of what a LoRA of a U-Net or text encoder changes: `LoraConfig.targets`."""
    plain = {name for name, module in network.named_modules() if isinstance(module, AttentionBlock)}
    for name, layer in network.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        parent = name.rpartition(".")[0]
        if (
            parent in plain
            or ATTENTION.fullmatch(name)
            or (kind != "attention" and TRANSFORMER.fullmatch(name))
            or (kind == "convolutions" and BLOCKS.fullmatch(name))
        ):
            yield name, layer


def adapt(
    network: nn.Module, kind: str, rank: int, alpha: float, dropout: float, seed: str
) -> dict[str, Factors]:
    """Put changes beside the layers of a frozen network, in place; layer's name -> its change.

    seed: with a layer's name it determines what its change starts as, whatever else is changed.
    """
    made: dict[str, Factors] = {}
    for name, layer in list(targets(network, kind)):
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        factors = Factors(layer, rank, alpha, dropout, generator)
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, Adapted(layer, factors))
        made[name] = factors
    return made
