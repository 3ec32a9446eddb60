"""Networks built without memory and given their tensors, every key accounted for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from sfumato.errors import CheckpointError
from sfumato.nn.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.nn.bert import BERTEmbedder
from sfumato.nn.classes import ClassEmbedder
from sfumato.nn.clip import CLIPTextEncoder
from sfumato.nn.preview import PreviewDecoder
from sfumato.nn.unet import UNet
from sfumato.nn.vq import VQModel
from sfumato.runtime import shapes_only

Network = TypeVar("Network")


def _first_stage(config: AutoencoderConfig) -> nn.Module:
    return AutoencoderKL(config) if config.n_embed is None else VQModel(config)


NETWORKS: Mapping[str, Callable[[Any], nn.Module]] = {
    "unet": UNet,
    "autoencoder": _first_stage,
    "text": CLIPTextEncoder,
    "text2": CLIPTextEncoder,
    "bert": BERTEmbedder,
    "classes": ClassEmbedder,
    "preview": PreviewDecoder,
}


def build(part: str, config: Any, limit: int) -> nn.Module:
    """A network of shapes without values; `CheckpointError` where the options build none.

    limit: the most parameters it may have. A hostile file could describe enough of them to fill any memory.
    """
    return built(part, lambda: NETWORKS[part](config), limit)


def built(what: str, make: Callable[[], Network], limit: int) -> Network:
    """What `make` builds of shapes without values; limit and errors as `build`, which calls it `what`."""
    count = 0

    def register(*_: object) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise CheckpointError(
                f"the file describes more layers than it holds for its {what}", "Get it again."
            )

    hook = register_module_parameter_registration_hook(register)
    try:
        with shapes_only():
            return make()
    except CheckpointError:
        raise
    except Exception as error:  # whatever torch makes of a negative width, a zero division, ...
        raise CheckpointError(f"the file's {what} cannot be built: {error}", "Get it again.") from error
    finally:
        hook.remove()


def assign(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Give a module built on the meta device its tensors; names and shapes must match one to one."""
    check_fit(module.state_dict(), tensors, f"{source} does not fit {type(module).__name__}")
    module.load_state_dict(tensors, strict=True, assign=True)
    left = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    assert not left, f"buffers computed on the meta device: {left}"
    module.requires_grad_(False).eval()


def copy_into(module: nn.Module, tensors: Mapping[str, Tensor], failure: str) -> None:
    """Copy tensors into a module that has values; names and shapes must match one to one, as `check_fit`."""
    check_fit(module.state_dict(), tensors, failure)
    module.load_state_dict(tensors, strict=True)


def check_fit(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], failure: str) -> None:
    """`CheckpointError` naming the first ten tensors that are missing, unexpected or of another shape."""
    reasons = {name: _misfit(wanted.get(name), given.get(name)) for name in wanted.keys() | given.keys()}
    wrong = sorted(f"{name}: {reason}" for name, reason in reasons.items() if reason)
    if wrong:
        raise CheckpointError(
            f"{failure}, {len(wrong)} tensors differ: {'; '.join(wrong[:10])}",
            "The file belongs to another architecture, or is damaged.",
        )


def _misfit(wanted: Tensor | None, given: Tensor | None) -> str:
    if given is None:
        return "missing"
    if wanted is None:
        return "unexpected"
    if wanted.shape != given.shape:
        return f"shape {tuple(given.shape)} for {tuple(wanted.shape)}"
    return "" if given.is_floating_point() else f"{given.dtype} is not floating-point"
