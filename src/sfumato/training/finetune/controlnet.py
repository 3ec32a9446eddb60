"""Training of a ControlNet beside a frozen U-Net (Zhang et al. 2023), from the U-Net or from another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sfumato.checkpoints.controls.load import load_control
from sfumato.checkpoints.controls.write import write_controlnet
from sfumato.conditioning import Conditioning
from sfumato.errors import InputError
from sfumato.generation import draw
from sfumato.model import StableDiffusion
from sfumato.nn.attention import attend
from sfumato.nn.controlnet import ControlNet, ControlNetConfig, controlnet_from_unet
from sfumato.nn.unet import Patch
from sfumato.training.finetune.captions import Captions
from sfumato.training.finetune.method import Base, owned, trained_parameters
from sfumato.training.settings_finetune import ControlConfig

WIDTHS = (16, 32, 96, 256)  # cldm.py of lllyasviel/ControlNet, whose latents are an eighth of the picture


class Control:
    """A ControlNet and the model that it steers, of which nothing is trained."""

    def __init__(self, base: Base) -> None:
        options = base.options.control
        if options is None:
            raise InputError(
                "a ControlNet needs a [finetune.control] table",
                "Give it a preprocessor, or a folder of hints.",
            )
        self.base = base
        self.captions = Captions(base.model, base.size, learned=False)
        self.control = _network(base, options)
        self.modules: Mapping[str, nn.Module] = {"control": owned(self.control)}
        self.saving = base.config.loop.gradient_checkpointing

    def parameters(self) -> list[nn.Parameter]:
        return trained_parameters(self.modules)

    def condition(self, captions: Sequence[str | None]) -> Conditioning:
        return self.captions(captions)

    def network(self, x: Tensor, t: Tensor, cond: Conditioning, hints: Tensor | None) -> Tensor:
        assert hints is not None
        weight = next(self.control.parameters())
        own = cond.to(weight.device, weight.dtype)
        given = (x.to(weight.dtype), t.to(weight.device).float(), hints.to(weight.device, weight.dtype))
        saving = self.saving and torch.is_grad_enabled()
        steer = partial(_by_blocks, self.control) if saving else self.control
        return self.base.network(x, t, cond, steer(*given, own.context, own.vector))

    def draw(self, prompts: Sequence[str], hints: Tensor | None) -> Tensor:
        assert hints is not None
        return draw(_Shown(self, hints), prompts, range(len(prompts)), self.base.request)

    def write(self, out: Path, tail: str = "") -> Path:
        base = self.base
        path = out / f"{base.config.name}{tail}.safetensors"
        more = {"notices": base.config.notices} if base.config.notices else {}
        write_controlnet(path, self.control, base.save_dtype(base.own_dtype), more)
        return path


class _Shown(StableDiffusion):
    """The model under the control of hints, one for each sample of a drawing."""

    def __init__(self, method: Control, hints: Tensor) -> None:
        vars(self).update(vars(method.base.model))
        self.method, self.hints = method, hints

    def network(
        self,
        x: Tensor,
        t: Tensor,
        cond: Conditioning,
        patch: Patch | None = None,
        residuals: Sequence[Tensor] = (),
    ) -> Tensor:
        """Branches of guidance stand one after the other in x."""
        rows = self.hints.repeat(len(x) // len(self.hints), 1, 1, 1)
        return self.method.network(x, t, cond, rows)


def _network(base: Base, options: ControlConfig) -> ControlNet:
    unet, factor = base.model.unet, base.model.downsampling
    if options.start_from is None:
        halvings = factor.bit_length() - 1
        padded = (*WIDTHS, *[WIDTHS[-1]] * halvings)[: halvings + 1]
        config = ControlNetConfig(unet.config, hint_widths=options.widths or padded)
        network = controlnet_from_unet(unet, config)
    else:
        found = load_control(options.start_from, dtype=torch.float32, device=base.model.device)
        if not isinstance(found, ControlNet):
            raise InputError(f"{options.start_from} is a {type(found).__name__}", "Give a ControlNet.")
        network = found
        own, given = controlnet_from_unet(unet).config.encoder, network.config.encoder
        if (own.context_dim, own.model_channels) != (given.context_dim, given.model_channels):
            raise InputError(
                f"{options.start_from} belongs to another family than {base.model.name!r}", "Give another."
            )
    if network.config.hint_scale != factor:
        raise InputError(
            f"finetune.control.widths has {len(network.config.hint_widths)} numbers, which make a hint "
            f"{network.config.hint_scale} times smaller; latents are {factor} times smaller than pictures",
            "Each width after the first halves it. Leave it out for the right number.",
        )
    return network


def _by_blocks(
    network: ControlNet, x: Tensor, t: Tensor, hint: Tensor, context: Tensor | None, vector: Tensor | None
) -> list[Tensor]:
    """`network(...)`, each block computed again in the backward pass instead of being stored."""

    def run(stage: nn.Module, h: Tensor) -> Tensor:
        return checkpoint(stage, h, emb, context, attend, use_reentrant=False)

    emb = network.embed(t, vector, x)
    outputs: list[Tensor] = []
    h = x
    for i, (stage, zero_convolution) in enumerate(zip(network.input_blocks, network.zero_convs, strict=True)):
        h = run(stage, h)
        if i == 0:
            h = h + checkpoint(network.input_hint_block, hint, use_reentrant=False)
        outputs.append(zero_convolution(h))
    outputs.append(network.middle_block_out(run(network.middle_block, h)))
    return [network.pool(residual) for residual in outputs]
