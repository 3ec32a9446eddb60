"""What a file of weights is, out of its tensors' names and shapes alone: family, parts, what is left out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sfumato.checkpoints import rules
from sfumato.checkpoints.detect.autoencoder import read_autoencoder
from sfumato.checkpoints.detect.explain import explain_unknown, refuse_strangers
from sfumato.checkpoints.detect.families import base_of, family_of, with_heads
from sfumato.checkpoints.detect.fit import NAMED, PartPlan, fit_part
from sfumato.checkpoints.detect.locate import Found, locate
from sfumato.checkpoints.detect.model import check_together, describe_model, describe_own
from sfumato.checkpoints.detect.nearest import nearest_known
from sfumato.checkpoints.detect.text import read_bert, read_classes, read_hugging_face, read_open_clip
from sfumato.checkpoints.detect.unet import read_unet
from sfumato.checkpoints.layouts.tables import PARTS
from sfumato.checkpoints.source import TensorInfo
from sfumato.errors import CheckpointError, InputError
from sfumato.presets import ModelConfig

__all__ = ["PartPlan", "Plan", "detect", "explain_unknown", "fit_part", "locate"]

METADATA_KEY = "sfumato"
SCALE = "scale_factor"  # where LDM keeps a latent scale that it measured


@dataclass(frozen=True)
class Plan:
    """What a file is and how it becomes networks.

    ignored: tensors that no part takes, by the name of the rule that says so; unknown: those that no rule
    knows, for which `explain_unknown` makes an error. needs_probe: the prediction is a guess that running the
    network once would better. scale_key: the tensor, one number, that holds the latent scale. notes: what was
    assumed.
    """

    family: str
    config: ModelConfig
    layout: str
    parts: Mapping[str, PartPlan]
    ignored: Mapping[str, tuple[str, ...]]
    unknown: tuple[str, ...]
    prediction_evidence: str
    needs_probe: bool = False
    scale_key: str | None = None
    notes: tuple[str, ...] = ()


def detect(
    infos: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    *,
    prediction: str | None = None,
    ema: bool = False,
    place: str = "the file",
) -> Plan:
    """Find out what the tensors are and account for each: used, left out by a named rule, or unknown.

    prediction: "eps", "v" or "x0" where the caller knows. ema: take the U-Net's averaged weights. place: the
    file, for messages. A file that describes itself (metadata key "sfumato") is taken at its word. A whole
    diffusers folder may be given with its names as "unet/conv_in.weight"; a part alone in either layout too.

    Raises `CheckpointError` where nothing is recognised, and for a part that is recognised and not whole,
    naming the first ten tensors; `InputError` for an unknown prediction, and for ema without averages.
    """
    own = ModelConfig.from_json(metadata[METADATA_KEY], place) if METADATA_KEY in metadata else None
    refuse_strangers(infos, place)
    found = locate(infos)
    if not found and own is None:
        raise explain_unknown(tuple(infos), place)
    if own is None:
        configs, notes = _read_all(found, infos, metadata, place)
    else:
        configs, notes = {part: getattr(own, part) for part in PARTS if getattr(own, part) is not None}, ()
    parts = {
        part: _fit(part, config, found.get(part), infos, place, own is not None)
        for part, config in configs.items()
    }
    if own is None:
        family, config, evidence = describe_model(configs, metadata, infos, prediction)
    else:
        family, config, evidence = describe_own(own, prediction)
    left: dict[str, tuple[str, ...]] = {}
    if ema:
        plain = parts
        parts = _averaged(parts, found, infos, place)
        swapped = [part for part in parts if parts[part] is not plain[part]]
        left[rules.NOT_AVERAGED] = tuple(name for part in swapped for name in plain[part].names)
    used = {name for part in parts.values() for name in part.names}
    left |= _unused(found, parts, infos.keys() - used)
    rest = infos.keys() - used - {name for names in left.values() for name in names}
    by_rule, unknown = rules.sort_out(sorted(rest))
    return Plan(
        family=family,
        config=config,
        layout=_layout(found),
        parts=parts,
        ignored={rule: names for rule, names in {**left, **by_rule}.items() if names},
        unknown=unknown,
        prediction_evidence=evidence.text,
        needs_probe=evidence.needs_probe,
        scale_key=SCALE if own is None and SCALE in infos and infos[SCALE].shape in ((), (1,)) else None,
        notes=notes,
    )


def _read_all(
    found: Mapping[str, Found], infos: Mapping[str, TensorInfo], metadata: Mapping[str, str], place: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(each part's configuration, what was assumed), read from the shapes."""
    configs = {part: _read(found[part], infos, place) for part in PARTS if part in found}
    try:
        check_together(configs)
        if "unet" not in configs:
            return configs, ()
        unet = configs["unet"]
        family, base = family_of(unet), base_of(configs, unet)
        configs["unet"], why = with_heads(unet, family, base, metadata)
    except CheckpointError as error:
        raise CheckpointError(f"{place}: {error.message}", error.hint) from error
    count, width = configs["unet"].num_heads, configs["unet"].num_head_channels
    heads = f"{count} attention heads" if width == -1 else f"attention heads of {width} channels"
    notes = (f"{heads}: {why}",)
    return configs, notes if family else (f"the U-Net has the shape of no released one, like {base}", *notes)


def _read(found: Found, infos: Mapping[str, TensorInfo], place: str) -> Any:
    """A part's configuration, by its shapes."""
    try:
        return _read_shapes(found)
    except CheckpointError as error:
        _name_missing(found, infos, place)
        raise CheckpointError(f"{place}: {error.message}", error.hint) from error


def _read_shapes(found: Found) -> Any:
    match found.part, found.layout:
        case "unet", layout:
            return read_unet(found.shapes, layout)
        case "autoencoder", layout:
            return read_autoencoder(found.shapes, layout)
        case "bert", layout:
            return read_bert(found.shapes, layout)
        case "classes", _:
            return read_classes(found.shapes)
        case part, "ldm":
            return read_open_clip(found.shapes, second=part == "text2")
    bare = not any(name.startswith("text_model.") for name in found.shapes)
    embedded = found.part == "text" and found.prefix != ""
    return read_hugging_face(found.shapes, "" if bare else "text_model.", embedded=embedded)


def _fit(
    part: str, config: Any, found: Found | None, infos: Mapping[str, TensorInfo], place: str, own: bool
) -> PartPlan:
    if found is None:
        raise CheckpointError(f"{place} describes its {part} and holds no tensor of it", "Get it again.")
    try:
        return fit_part(part, config, found.layout, infos, prefix=found.prefix, place=place)
    except CheckpointError:
        if not own:
            _name_missing(found, infos, place)
        raise


def _name_missing(found: Found, infos: Mapping[str, TensorInfo], place: str) -> None:
    """Raise the `CheckpointError` that compares a damaged part with the released one it is nearest to.

    Returns where it is like none: whole blocks that are gone make a network look like another one.
    """
    known = nearest_known(found)
    if known is not None:
        fit_part(found.part, known, found.layout, infos, prefix=found.prefix, place=place)


def _layout(found: Mapping[str, Found]) -> str:
    """The layout of the file as a whole; Hugging Face's names inside an LDM file do not make it another."""
    first = next((found[part] for part in PARTS if part in found), None)
    if first is None or first.prefix.startswith(("cond_stage_model.", "conditioner.")):
        return "ldm"
    return first.layout


def _averaged(
    parts: Mapping[str, PartPlan], found: Mapping[str, Found], infos: Mapping[str, TensorInfo], place: str
) -> dict[str, PartPlan]:
    """The same parts with the averaged weights of the U-Net, or of an autoencoder that was saved alone.

    LDM's LitEma keeps them in one flat list: the name inside the trained model, less its dots.
    """
    part = "unet" if "unet" in parts else "autoencoder"
    if part not in parts or not any(name.startswith("model_ema.") for name in infos):
        raise InputError(
            f"{place} holds no averaged weights (model_ema.*)",
            "Leave --ema out: most files have one set of weights, often the averaged ones.",
        )
    inner = "diffusion_model." if part == "unet" else ""
    start = len(found[part].prefix)
    mapping, wrong = [], []
    for pair in parts[part].mapping:
        names = tuple("model_ema." + (inner + name[start:]).replace(".", "") for name in pair.foreign)
        for own, name in zip(pair.foreign, names, strict=True):
            if name not in infos:
                wrong.append(f"{name}: missing")
            elif infos[name].shape != infos[own].shape or not infos[name].dtype.is_floating_point:
                wrong.append(f"{name}: {infos[name].dtype} of shape {infos[name].shape}, not as {own}")
        mapping.append(replace(pair, foreign=names))
    if wrong:
        raise CheckpointError(
            f"{place} holds no whole set of averaged weights, {len(wrong)} tensors do not fit: "
            f"{'; '.join(wrong[:NAMED])}",
            "Leave --ema out.",
        )
    return {**parts, part: PartPlan(parts[part].config, tuple(mapping))}


def _unused(
    found: Mapping[str, Found], parts: Mapping[str, PartPlan], extra: Iterable[str]
) -> dict[str, tuple[str, ...]]:
    """What text encoders hold and the models do not use, by rule."""
    left: dict[str, list[str]] = {rules.UNUSED_LAYER: [], rules.UNUSED_PROJECTION: []}
    for part in found.keys() & parts.keys() & {"text", "text2"}:
        prefix, config = found[part].prefix, parts[part].config
        layer = rf"(?:transformer\.resblocks|(?:text_model\.)?encoder\.layers)\.{config.num_hidden_layers}\."
        pattern = re.compile(re.escape(prefix) + layer)
        for name in extra:
            if pattern.match(name):
                left[rules.UNUSED_LAYER].append(name)
            elif config.projection_dim is None and name.startswith(f"{prefix}text_projection"):
                left[rules.UNUSED_PROJECTION].append(name)
    return {rule: tuple(sorted(names)) for rule, names in left.items()}
