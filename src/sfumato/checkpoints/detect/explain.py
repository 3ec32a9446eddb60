"""What to say of tensors that nothing here uses, and of files of another kind altogether."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from sfumato.errors import CheckpointError

NAMED = 10  # tensors that an error names
# What a file is that has such names, for people who took one for another.
STRANGERS: Mapping[str, re.Pattern[str]] = {
    "a LoRA": re.compile(r"lora_|.*[._]lora[._](?:up|down|A|B|a|b)\b|.*\.(?:hada|lokr)_w1|.*\.dora_scale"),
    "a ControlNet": re.compile(r"control_model\.|controlnet_|input_hint_block\.|.*controlnet_cond_embedding"),
    "a textual inversion": re.compile(r"emb_params$|string_to_(?:param|token)|clip_[lg]$|<.*>$"),
    "an IP-Adapter": re.compile(r"ip_adapter\.|image_proj\."),
    "a motion module": re.compile(r".*motion_modules\."),
    "Stable Diffusion 2's depth-to-image model": re.compile(r"depth_model\."),
    "Stable Diffusion 2's unCLIP model": re.compile(r"embedder\.|noise_augmentor\."),
    "LDM's semantic synthesis": re.compile(r"cond_stage_model\.channel_mapper\."),
    "a Stable Diffusion 3": re.compile(r"(?:model\.diffusion_model\.)?joint_blocks\."),
    "a Flux": re.compile(r"(?:model\.diffusion_model\.)?(?:double|single)_(?:stream_)?blocks\."),
    "a small autoencoder for previews (TAESD)": re.compile(r"taesd_|(?:en|de)coder\.layers\.\d+\.conv"),
    "an upscaler": re.compile(r"(?:body|conv_body|conv_hr|HRconv|RRDB_trunk)\."),
}  # fmt: skip
PLACES = {  # where it goes instead
    "a LoRA": "goes beside a model: --lora FILE, or <lora:name:1> in the prompt with --lora-dir",
    "a textual inversion": "goes beside a model: its name in the prompt, with --embedding-dir",
    "an upscaler": "is for `sfumato upscale --model`",
}
# Of these, parts would be recognised, and what they lack or have in excess would say nothing.
REFUSED: Mapping[str, re.Pattern[str]] = {
    "a ControlNet": re.compile(r"controlnet_(?:down|mid|cond)|input_hint_block\."),
    "SDXL's refiner": re.compile(r"conditioner\.embedders\.0\.model\."),
    "a model of the EDM kind, whose prediction is not known here": re.compile(r"edm_(?:mean|std|vpred)"),
    "a video model": re.compile(r".*\.(?:temporal_transformer_block|time_stack|motion_modules)"),
}


def refuse_strangers(names: Iterable[str], place: str) -> None:
    """`CheckpointError` for a file of a kind that shares parts with those loaded here, and is not one."""
    every = re.compile("|".join(f"(?:{pattern.pattern})" for pattern in REFUSED.values()))
    for name in names:
        if every.match(name):
            kind = next(kind for kind, pattern in REFUSED.items() if pattern.match(name))
            raise CheckpointError(
                f"{place} is {kind}; it holds {name}", "It does not load here. See docs/formats.md."
            )


def explain_unknown(
    names: Collection[str], place: str = "the file", parts: Collection[str] = ()
) -> CheckpointError:
    """The error for tensors that no part and no rule knows: the first ten, and what they look like.

    parts: those that were recognised; without any, the file as a whole is.
    """
    first = ", ".join(name[:100] for name in sorted(names)[:NAMED]) or "none at all"
    looks = _looks_like(names)
    if parts:
        beside = ", ".join(parts)
        message = f"{place} holds {len(names)} tensors beside its {beside} that no rule accounts for: {first}"
        return CheckpointError(message, looks or "It belongs to another architecture, or is damaged.")
    message = f"{place} holds no network that is known here; its {len(names)} tensors are {first}"
    return CheckpointError(
        message, looks or "Give a Stable Diffusion checkpoint, a U-Net, an autoencoder or a text encoder."
    )


def _looks_like(names: Collection[str]) -> str:
    for kind, pattern in STRANGERS.items():
        if any(pattern.match(name) for name in names):
            return f"It looks like {kind}, which {PLACES.get(kind, 'does not load here')}."
    counts = {
        layout: sum(word in name for name in names for word in words) for layout, words in SIGNS.items()
    }
    nearest = max(counts, key=lambda layout: counts[layout])
    return f"Its names are nearest to {nearest}." if counts[nearest] else ""


SIGNS: Mapping[str, tuple[str, ...]] = {
    "a U-Net in LDM layout (input_blocks.0.0.weight ...)": (
        "input_blocks.",
        "output_blocks.",
        "middle_block.",
    ),
    "a U-Net in diffusers layout (down_blocks.0.resnets.0 ...)": ("down_blocks.", "up_blocks.", "mid_block."),
    "an autoencoder in LDM layout (encoder.down.0.block.0 ...)": ("encoder.down.", "decoder.up."),
    "a CLIP text encoder (text_model.encoder.layers.0 ...)": ("text_model.", "self_attn."),
    "an OpenCLIP text encoder (transformer.resblocks.0 ...)": ("resblocks.",),
}
