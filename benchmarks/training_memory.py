"""Counts what a training step of the Stable Diffusion 1.5 U-Net keeps in memory, without computing it.

The network is built on the meta device; what autograd keeps for the backward pass is counted by storage.
Attention is counted as a fused kernel keeps it: queries, keys, values, result and one number a row.

Run: python benchmarks/training_memory.py
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.families import FAMILIES
from sfumato.nn.unet import UNet
from sfumato.runtime import shapes_only

CONTEXT = (77, 768)  # tokens and channels of CLIP ViT-L/14


class Fused(torch.autograd.Function):
    """Attention that keeps what FlashAttention keeps (Dao 2023), and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # pyright: ignore
        result = query.new_empty((*query.shape[:-1], value.shape[-1]))
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, rows)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def kept_bytes(network: UNet, side: int, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes that autograd keeps of one sample (1, 4, side, side), those of the block that keeps most).

    Without the weights. Where blocks are computed again going back, the second is on top of the first.
    """
    weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (key := tensor.untyped_storage()._cdata) not in weights:
            found[key] = tensor  # held, so that no other storage takes its place
        return tensor

    blocks: list[int] = []
    begun: list[int] = []

    def total() -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in found.values())

    hooks = []
    for stage in (*network.input_blocks, network.middle_block, *network.output_blocks):
        hooks.append(stage.register_forward_pre_hook(lambda *_: begun.append(total())))
        hooks.append(stage.register_forward_hook(lambda *_: blocks.append(total() - begun.pop())))
    x = torch.empty(1, 4, side, side, device="meta", dtype=dtype)
    context = torch.empty(1, *CONTEXT, device="meta", dtype=dtype)
    attention = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, *_, **__: Fused.apply(q, k, v)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            network(x, torch.empty(1, device="meta"), context=context)
    finally:
        F.scaled_dot_product_attention = attention
        for hook in hooks:
            hook.remove()
    return total(), max(blocks)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    config = FAMILIES["sd1"].unet
    assert config is not None
    with shapes_only():
        network = UNet(config)
    count = sum(parameter.numel() for parameter in network.parameters())
    print(json.dumps({"weights": count}))
    for dtype in (torch.float32, torch.bfloat16):
        network.to(dtype)
        for side in (32, 64):
            network.gradient_checkpointing = False
            size, block = kept_bytes(network, side, dtype)
            network.gradient_checkpointing = True
            kept, _ = kept_bytes(network, side, dtype)
            row = {"dtype": str(dtype), "pixels": 8 * side, "GB an image": size / 1e9}
            print(json.dumps({**row, "recomputed": kept / 1e9, "and its largest block": block / 1e9}))


if __name__ == "__main__":
    main()
