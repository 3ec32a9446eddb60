"""Exact counts of multiplications in a network's forward pass, those inside attention included.

One multiply-accumulate (MAC) is two FLOP. Counted are convolutions, linear layers and matrix products, where
torch's own FlopCounterMode leaves out attention on a CPU. Nothing is computed: shapes alone pass through.

Run: python benchmarks/flops.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from releases import FAMILIES
from sfumato.nn.autoencoder import AutoencoderKL
from sfumato.nn.clip import CLIPTextConfig, CLIPTextEncoder
from sfumato.nn.unet import UNet
from sfumato.runtime import shapes_only


class Counter(TorchFunctionMode):
    """Adds up, by kind of layer, the MACs of what is called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.macs: dict[str, int] = {}

    @property
    def total(self) -> int:
        return sum(self.macs.values())

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        kind = getattr(func, "__name__", "")
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key, value = args[:3]
            self._add("attention", math.prod(query.shape) * key.shape[-2])
            self._add("attention", math.prod(query.shape[:-1]) * key.shape[-2] * value.shape[-1])
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        result = func(*args, **named)
        if kind in ("conv1d", "conv2d", "conv3d"):
            self._add(kind, result.numel() * math.prod(args[1].shape[1:]))
        elif kind == "linear":
            self._add(kind, result.numel() * args[0].shape[-1])
        elif kind in ("matmul", "bmm", "mm", "__matmul__"):
            self._add("matmul", result.numel() * args[0].shape[-1])
        return result

    def _add(self, kind: str, macs: int) -> None:
        self.macs[kind] = self.macs.get(kind, 0) + macs


def count(call: Callable[[], object]) -> dict[str, int]:
    """MACs by kind of one call, made of tensors and modules on the meta device."""
    with Counter() as counter, torch.no_grad(), torch.device("meta"):
        call()
    return counter.macs


def unet_macs(network: UNet, batch: int, side: int, tokens: int = 77) -> int:
    """Of one call of a U-Net of shapes, for `batch` latents of side by side."""
    config = network.config
    x = _meta(batch, config.in_channels, side, side)
    context = None if config.context_dim is None else _meta(batch, tokens, config.context_dim)
    vector = None if config.adm_in_channels is None else _meta(batch, config.adm_in_channels)
    return sum(count(lambda: network(x, _meta(batch), context, vector)).values())


def decoder_macs(autoencoder: AutoencoderKL, side: int) -> int:
    """Of decoding one latent of side by side."""
    z = _meta(1, autoencoder.config.embed_dim, side, side)
    return sum(count(lambda: autoencoder.decode(z)).values())


def encoder_macs(autoencoder: AutoencoderKL, side: int) -> int:
    """Of encoding one picture of side by side pixels."""
    return sum(count(lambda: autoencoder.encode(_meta(1, 3, side, side))).values())


def text_macs(encoder: CLIPTextEncoder, batch: int, tokens: int = 77) -> int:
    """Of one call of a text transformer."""
    return sum(count(lambda: encoder(torch.zeros(batch, tokens, dtype=torch.long, device="meta"))).values())


def build(kind: Callable[[Any], nn.Module], config: Any) -> Any:
    """A network of shapes alone."""
    with shapes_only():
        return kind(config).eval()


def table() -> dict[str, int]:
    """MACs of the released networks at their usual sizes."""
    sd1, sd2, sdxl = (build(UNet, FAMILIES[name].unet) for name in ("sd1", "sd2-v", "sdxl"))
    autoencoder = build(AutoencoderKL, FAMILIES["sd1"].autoencoder)
    return {
        "SD 1 U-Net, guided step, 64x64 latents": unet_macs(sd1, 2, 64),
        "SD 1 U-Net, guided step, 32x32 latents": unet_macs(sd1, 2, 32),
        "SD 2 U-Net, 64x64": unet_macs(sd2, 1, 64),
        "SD 2 U-Net, 96x96": unet_macs(sd2, 1, 96),
        "SDXL U-Net, 128x128": unet_macs(sdxl, 1, 128),
        "decoder, 512x512 pixels": decoder_macs(autoencoder, 64),
        "decoder, 256x256 pixels": decoder_macs(autoencoder, 32),
        "encoder, 512x512 pixels": encoder_macs(autoencoder, 512),
        "encoder, 256x256 pixels": encoder_macs(autoencoder, 256),
        "CLIP-L text, 77 tokens": text_macs(build(CLIPTextEncoder, CLIPTextConfig()), 1),
    }


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


if __name__ == "__main__":
    for name, macs in table().items():
        print(f"{name:42} {macs / 1e9:10.2f} GMAC {2 * macs / 1e12:8.4f} TFLOP")
