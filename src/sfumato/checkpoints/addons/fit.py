"""Whether a LoRA belongs to a model: every key of it used, left out by a rule with a name, or unknown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from sfumato.checkpoints.addons.names import Layer, Target, find_layer
from sfumato.checkpoints.addons.read import Adapter, Lora
from sfumato.checkpoints.report import printable
from sfumato.errors import CheckpointError
from sfumato.families import FAMILIES
from sfumato.presets import ModelConfig

LISTED = 10
SECOND_NAME = "second name of a layer"  # some files hold a layer under two programs' names
BASES = {"sd1": "Stable Diffusion 1", "sd2-base": "Stable Diffusion 2", "sdxl": "SDXL"}
TRANSFORMERS = ("lora_transformer_", "transformer.", "lora_unet_double_blocks_", "lora_unet_single_blocks_",
                "lora_unet_joint_blocks_", "diffusion_model.double_blocks.", "lora_te3_")  # fmt: skip


@dataclass(frozen=True)
class Change:
    """One adapter at one tensor of a layer: `strength` times its change of the weight, or of the bias."""

    adapter: Adapter
    target: Target
    is_bias: bool
    strength: float = 1.0


@dataclass(frozen=True)
class Fit:
    """How the keys of a LoRA lie on a model: every one of them is in one of the three.

    changes: what it does. ignored: keys left out, by the name of the rule. unknown: keys that fit nothing.
    """

    changes: tuple[Change, ...]
    ignored: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()


def fit(lora: Lora, config: ModelConfig) -> Fit:
    """Where every key of a LoRA belongs in a model, by names and shapes alone; nothing is refused here."""
    changes: list[Change] = []
    ignored = {rule: list(names) for rule, names in lora.ignored.items()}
    unknown = list(lora.unknown)
    taken: dict[tuple[str, ...], str] = {}
    for adapter in lora.adapters:
        layer = find_layer(adapter.key, config)
        if isinstance(layer, str):
            ignored.setdefault(layer, []).extend(adapter.names)
            continue
        own = [] if layer is None else _changes(adapter, layer)
        if not own:
            unknown.extend(adapter.names)
        elif all(taken.setdefault(_place(change), adapter.key) == adapter.key for change in own):
            changes.extend(own)
        else:
            ignored.setdefault(SECOND_NAME, []).extend(adapter.names)
    return Fit(tuple(changes), {rule: tuple(names) for rule, names in ignored.items()}, tuple(unknown))


def checked(lora: Lora, config: ModelConfig) -> Fit:
    """As `fit`; `CheckpointError` with the first ten unknown keys, and the base they are nearest to."""
    found = fit(lora, config)
    if found.unknown or not found.changes:
        first = ", ".join(map(printable, found.unknown[:LISTED]))
        base = _nearest_base(lora)
        raise CheckpointError(
            f"{lora.path} does not fit {config.name!r}: {len(found.unknown)} of its {lora.num_keys} keys "
            f"belong to no layer of that shape, first {first}"
            + (f"; it was made for {base}" if base else ""),
            "Nothing was changed. Choose a LoRA that was made for this model's family.",
        )
    return found


def _changes(adapter: Adapter, layer: Layer) -> list[Change]:
    """What an adapter does to a layer; nothing where any of it has no place there, or another shape."""
    found: list[Change] = []
    if adapter.size is not None:
        target = layer.get("weight")
        if target is None or not _fits(adapter, target):
            return []
        found.append(Change(adapter, target, False))
    if adapter.bias is not None:
        target = layer.get("bias")
        if target is None or adapter.bias.numel() != math.prod(target.shape):
            return []
        found.append(Change(adapter, target, True))
    return found


def _fits(adapter: Adapter, target: Target) -> bool:
    assert adapter.size is not None
    rows, *rest = target.shape
    if (adapter.size.rows, adapter.size.columns) != (rows, math.prod(rest)):
        return False
    if adapter.magnitude is None:
        return True
    numbers = adapter.magnitude.numel()
    return len(target.shape) > 1 and numbers in ((rows,) if adapter.of_outputs else (rows, target.shape[1]))


def _place(change: Change) -> tuple[str, ...]:
    """What of the model a change is for, by whatever name: two adapters of a file may not have the same."""
    pieces = [f"{pair.native}/{pair.foreign.index(change.target.name)}" for pair in change.target.pairs]
    return (change.target.part, *pieces)


def _nearest_base(lora: Lora) -> str:
    """The family that most of the keys fit, in words; "" where none does."""
    if any(adapter.key.startswith(TRANSFORMERS) for adapter in lora.adapters):
        return "a diffusion transformer, such as Stable Diffusion 3 or FLUX, which are not known here"
    counts = {name: len(fit(lora, FAMILIES[name]).changes) for name in BASES}
    best = max(counts, key=lambda name: counts[name])
    return BASES[best] if 2 * counts[best] > len(lora.adapters) else ""
