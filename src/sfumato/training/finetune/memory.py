"""What fine-tuning takes of memory, from shapes alone: nothing is loaded, nothing computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from sfumato.errors import InputError
from sfumato.nn.autoencoder import AutoencoderConfig
from sfumato.nn.clip import CLIPTextEncoder
from sfumato.nn.controlnet import ControlNetConfig, controlnet_from_unet
from sfumato.nn.unet import Patch, Stage, UNet
from sfumato.presets import ModelConfig, context_width
from sfumato.runtime import shapes_only
from sfumato.training.finetune.low_rank import adapt
from sfumato.training.settings_finetune import FinetuneConfig

TRAINED = 20  # bytes of a trained number: itself, its gradient, AdamW's two averages, the averaged weights


@dataclass(frozen=True)
class Memory:
    """Bytes that training takes at its peak, but for the workspace of single operations.

    frozen: the networks that are not trained; casts: their copies in half precision for a step. trained:
    weights with their gradients, AdamW's numbers and the averages. activations: what the backward pass needs.
    """

    frozen: int
    casts: int
    trained: int
    activations: int
    parameters: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.frozen + self.casts + self.trained + self.activations


class _Efficient(torch.autograd.Function):
    """Attention as fused kernels do it: the backward pass needs inputs and output, no matrix of scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class Saved:
    """Bytes of the tensors that autograd keeps, each storage once; those of `weights` are not counted."""

    def __init__(self, weights: set[int]) -> None:
        self.seen, self.bytes = set(weights), 0
        self.alive: list[Tensor] = []  # so that no storage's number is given twice

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.alive.append(tensor)
            self.bytes += storage.nbytes()
        return tensor


def memory(
    config: ModelConfig,
    options: FinetuneConfig,
    *,
    size: tuple[int, int],
    batch: int = 1,
    half: bool = True,
    checkpointing: bool = False,
) -> Memory:
    """The memory of fine-tuning a model at pictures of `size` (height, width), `batch` in one network call.

    half: computed in bfloat16 (`loop.precision`). Raises `InputError` for a model without U-Net and CLIP.
    """
    unet_config, text_config = config.unet, config.text
    if unet_config is None or text_config is None or config.autoencoder is None:
        raise InputError(f"{config.name!r} has no U-Net, CLIP and autoencoder", "Give a whole model.")
    dtype = torch.bfloat16 if half else torch.float32
    method = options.method
    with shapes_only():
        unet = UNet(unet_config)
        texts = [CLIPTextEncoder(each) for each in (text_config, config.text2) if each is not None]
        autoencoder = _autoencoder(config.autoencoder)
    networks: list[nn.Module] = [unet, *texts]
    for network in networks:
        network.requires_grad_(False)
    text_learns = (method == "full" and options.text) or (method == "lora" and options.lora.text)
    frozen = list(networks)
    trained: list[nn.Parameter] = []
    control = None
    if method == "full":
        frozen = [] if options.text else list(texts)
        own = [unet, *(texts if options.text else [])]
        trained = [p.requires_grad_(True) for network in own for p in network.parameters()]
    elif method == "lora":
        given = options.lora
        for network in [unet, *(texts if given.text else [])]:
            made = adapt(network, given.targets, given.rank, given.alpha or given.rank, given.dropout, "")
            trained += [p for factors in made.values() for p in factors.parameters()]
    elif method == "controlnet":
        halvings = config.autoencoder.downsampling.bit_length() - 1
        with shapes_only():
            widths = (16, 32, 96, *[256] * halvings)[: halvings + 1]
            control = controlnet_from_unet(unet, ControlNetConfig(unet_config, hint_widths=widths))
        trained = list(control.requires_grad_(True).parameters())
    count = sum(p.numel() for p in trained)
    words = (
        options.inversion.vectors if options.inversion is not None and method == "textual_inversion" else 0
    )
    count += words * (context_width(config) or 0)

    known = {id(p) for p in trained}
    each = 4 if options.frozen_precision == "float32" else 2
    still = sum(p.numel() for network in frozen for p in network.parameters() if id(p) not in known)
    still += sum(p.numel() for p in autoencoder.parameters())
    # Autocast makes a half-precision copy of what is kept in float32, and the backward pass needs it.
    in_step = unet if control is None else nn.ModuleList([unet, control])
    wide = sum(p.numel() for p in in_step.parameters() if each == 4 or id(p) in known)
    casts = 2 * wide if half else 0

    ready = [unet, *texts, *([] if control is None else [control])]
    for network in ready:
        network.to(dtype)
    saved = Saved({p.untyped_storage()._cdata for network in ready for p in network.parameters()})
    stages: list[tuple[int, int]] = []  # (kept inside, output) of each block
    hooks = _watched([unet, *([] if control is None else [control])], saved, stages)
    height, width = (side // config.autoencoder.downsampling for side in size)
    with torch.device("meta"), saved_tensors_hooks(saved.keep, lambda tensor: tensor):
        tokens = torch.zeros(batch, text_config.max_position_embeddings, dtype=torch.long)
        if text_learns or words:
            _run_texts(texts, tokens, learned=bool(words))
        context = torch.zeros(batch, tokens.shape[1], context_width(config) or 0, dtype=dtype)
        context.requires_grad_(bool(text_learns or words))
        x = torch.zeros(batch, unet_config.in_channels, height, width, dtype=dtype)
        vector = (
            None if unet_config.adm_in_channels is None else x.new_zeros(batch, unet_config.adm_in_channels)
        )
        t = torch.zeros(batch)
        residuals: list[Tensor] = []
        if control is not None:
            hint = x.new_zeros(batch, 3, *size)
            residuals = control(x, t, hint, context, vector)
        unet(x, t, context=context, vector=vector, residuals=residuals, patch=Patch(attention=_attend))
    for hook in hooks:
        hook.remove()
    activations = saved.bytes
    if checkpointing and stages:  # what lies between blocks, and one block at a time
        inside = sum(kept for kept, _ in stages)
        activations += sum(out for _, out in stages) + max(kept for kept, _ in stages) - inside
    return Memory(still * each, casts, count * TRAINED, activations, count)


def _attend(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _Efficient.apply(q, k, v)  # type: ignore[return-value]


def _autoencoder(config: AutoencoderConfig) -> nn.Module:
    from sfumato.checkpoints.build import NETWORKS

    return NETWORKS["autoencoder"](config)


def _run_texts(texts: list[CLIPTextEncoder], tokens: Tensor, *, learned: bool) -> None:
    """The text encoders' own share of the backward pass; learned: by vectors in their first layer."""
    for text in texts:
        embedded = text.text_model.embeddings(tokens)
        text.text_model.encoder(embedded.detach().requires_grad_(True) if learned else embedded)


def _watched(networks: list[nn.Module], saved: Saved, stages: list[tuple[int, int]]) -> list[Any]:
    """Hooks that note, for each block of networks, what is kept of its inside and how large its output is."""
    entered: list[int] = []

    def enter(module: nn.Module, inputs: object) -> None:
        entered.append(saved.bytes)

    def leave(module: nn.Module, inputs: object, output: Tensor) -> None:
        kept = saved.bytes - entered.pop()
        if output.requires_grad:
            stages.append((kept, output.untyped_storage().nbytes()))

    found: list[Callable[[], None] | Any] = []
    for network in networks:
        for module in network.modules():
            if isinstance(module, Stage):
                found += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    return found
