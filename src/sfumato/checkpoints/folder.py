"""Reading a diffusers folder: a pipeline with its index, or one component with its config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato.checkpoints.detect.families import autoencoder_family, base_of, concat_of, family_of
from sfumato.checkpoints.detect.fit import fit_part
from sfumato.checkpoints.files import open_file
from sfumato.checkpoints.layouts.diffusers_rest import Words, read_scheduler, read_tokenizer_folder
from sfumato.checkpoints.layouts.diffusers_stages import autoencoder_config, bert_config, text_config
from sfumato.checkpoints.layouts.diffusers_unet import UNetRecord, unet_config
from sfumato.checkpoints.layouts.naming import INDEX, variant_of, weight_file
from sfumato.checkpoints.opened import Opened, Part
from sfumato.checkpoints.rules import UNUSED_PROJECTION, sort_out
from sfumato.checkpoints.schema import architectures, class_name, parse, read_json
from sfumato.checkpoints.source import Source
from sfumato.errors import CheckpointError
from sfumato.families import SD_SCALE, X4_SCALE
from sfumato.nn.clip import CLIPTextConfig
from sfumato.presets import PARTS, ModelConfig
from sfumato.text.tokenizer import clip_json

PIPELINES = {
    "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
    "StableDiffusionInpaintPipelineLegacy", "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLInstructPix2PixPipeline", "LatentConsistencyModelPipeline",
    "StableDiffusionUpscalePipeline", "LDMSuperResolutionPipeline",
    "LDMPipeline", "LDMTextToImagePipeline", "LatentDiffusionPipeline", "LatentDiffusionUncondPipeline",
}  # fmt: skip
CLASSES = {  # class -> part; a second text encoder is told by its folder
    "UNet2DConditionModel": "unet",
    "UNet2DModel": "unet",
    "AutoencoderKL": "autoencoder",
    "VQModel": "autoencoder",
    "CLIPTextModel": "text",
    "CLIPTextModelWithProjection": "text",
    "LDMBertModel": "bert",
}
COMPONENTS = {  # folder -> part, in the order they are read
    "unet": "unet",
    "vae": "autoencoder",
    "vqvae": "autoencoder",
    "text_encoder": "text",
    "text_encoder_2": "text2",
    "bert": "bert",
}
BESIDE = {"scheduler", "tokenizer", "tokenizer_2", "low_res_scheduler"}


@dataclass
class _Found:
    """What reading a folder has found so far."""

    parts: dict[str, Part] = field(default_factory=dict)
    ignored: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, str | None] = field(default_factory=dict)


class Folder:
    """A stranger's folder. Every file is asked of it: what a name leads to must lie inside."""

    def __init__(self, path: Path) -> None:
        self.path = path
        root = path.resolve()
        # The hub's cache links its snapshots to files beside them.
        for place in (root, *root.parents[:3]):
            if place.parent.name == "snapshots" and (place.parent.parent / "blobs").is_dir():
                root = place.parent.parent
        self.root = root

    def file(self, *names: str) -> Path | None:
        """The file of that name, None where there is none; `CheckpointError` where it lies outside."""
        for name in names:
            if not name or name in (".", "..") or "/" in name or "\\" in name or ":" in name or "\0" in name:
                raise CheckpointError(
                    f"{self.path} speaks of the file {name[:80]!r}, which is no plain name",
                    "Nothing outside of a model's folder is read. Get it from a source you trust.",
                )
        place = self.path.joinpath(*names)
        try:
            if not place.exists():
                return None
            inside = place.resolve().is_relative_to(self.root)
        except (OSError, RuntimeError) as error:  # a name too long, a loop of links
            raise CheckpointError(f"cannot open {place}: {error}", "Check the folder.") from error
        if not inside:
            raise CheckpointError(
                f"{place} is a link that leads out of {self.path}", "Put a copy of the file in its place."
            )
        return place

    def names(self, *folders: str) -> list[str]:
        """The names in one of its folders."""
        place = self.file(*folders) if folders else self.path
        return [] if place is None or not place.is_dir() else sorted(entry.name for entry in place.iterdir())


def open_pipeline(path: Path, *, variant: str | None, mmap: bool, name: str) -> Opened:
    """A folder with a `model_index.json`; `CheckpointError` for classes and options not known here."""
    folder, found = Folder(path), _Found()
    index_path = folder.file("model_index.json")
    assert index_path is not None
    index = read_json(index_path)
    class_name(index, dict.fromkeys(PIPELINES), index_path)
    towers = {key: _tokenizer(folder, key) for key in ("tokenizer", "tokenizer_2")}
    for component, entry in index.items():
        if component.startswith("_") or not isinstance(entry, list):
            continue
        if entry[1:] == [None]:
            continue
        if component not in COMPONENTS:
            if component not in BESIDE:
                found.notes.append(f"{component} is not read")
            continue
        part = COMPONENTS[component]
        tokenizer = towers["tokenizer_2" if part == "text2" else "tokenizer"]
        _read_part(folder, (component,), part, tokenizer, found, variant, mmap)
    if "unet" not in found.parts:
        raise CheckpointError(f"{path} has no U-Net", "Get the folder again.")
    config = _model_config(folder, found, index, towers["tokenizer"], name)
    schedule, evidence, uncertain = _scheduling(folder, config)
    _check_variant(path, found, variant)
    return _opened(path, found, dataclasses.replace(config, **schedule), evidence, uncertain)


def open_component(path: Path, *, variant: str | None, mmap: bool, name: str) -> Opened:
    """A folder with one network: its `config.json` and its weights."""
    folder, found = Folder(path), _Found()
    place = folder.file("config.json")
    assert place is not None
    part = CLASSES[class_name(read_json(place), CLASSES, place)]
    _read_part(folder, (), part, None, found, variant, mmap)
    _check_variant(path, found, variant)
    values = dict(found.values)
    scale = values.pop("latent_scale", 1.0)
    config = ModelConfig(
        name=name, latent_scale=scale, **{key: value.config for key, value in found.parts.items()}
    )
    return _opened(path, found, config, "a part alone does not say", False)


def towers_file(path: Path, variant: str | None) -> Path | None:
    """The weights in a folder of both of CLIP's towers, to be read as such a file is; None for others."""
    folder = Folder(path)
    place = folder.file("config.json")
    if place is None or "CLIPModel" not in architectures(read_json(place)):
        return None
    chosen = weight_file(folder.names(), variant)
    return None if chosen is None else folder.file(chosen)


def _check_variant(path: Path, found: _Found, variant: str | None) -> None:
    """`CheckpointError` where no part has the variant that was asked for; a note where some have not."""
    if variant is None:
        return
    if variant not in found.variants.values():
        raise CheckpointError(f"{path} has no weights of the variant {variant!r}", "Leave out --variant.")
    for place, taken in found.variants.items():
        if taken != variant:
            found.notes.append(f"{place} has no weights of the variant {variant!r}; others are taken")


def _read_part(
    folder: Folder,
    inside: tuple[str, ...],
    part: str,
    tokenizer: Words | None,
    found: _Found,
    variant: str | None,
    mmap: bool,
) -> None:
    config_path = folder.file(*inside, "config.json")
    if config_path is None:
        raise CheckpointError(f"{folder.path.joinpath(*inside)} has no config.json", "Get the folder again.")
    values = read_json(config_path)
    kind = CLASSES[class_name(values, CLASSES, config_path)]
    if kind != part and (kind, part) != ("text", "text2"):
        raise CheckpointError(f"{config_path} describes a {kind}, not the {part}", "Get the folder again.")
    config: Any
    if part == "unet":
        config = unet_config(values, config_path)
        found.values["sample_size"] = parse(UNetRecord, values, config_path).sample_size
    elif part == "autoencoder":
        config, found.values["latent_scale"] = autoencoder_config(values, config_path)
    elif part == "bert":
        config = bert_config(values, config_path)
    else:
        config = text_config(values, config_path, None if tokenizer is None else tokenizer.pad_id)
    source = _weights(folder, inside, variant, mmap, found)
    plan = fit_part(part, config, "diffusers", source.infos, place=str(source.path))
    rest = [name for name in source.infos if name not in set(plan.names)]
    if isinstance(config, CLIPTextConfig) and "text_projection.weight" in rest:
        rest.remove("text_projection.weight")
        found.ignored[UNUSED_PROJECTION] = ("text_projection.weight",)
    ignored, unknown = sort_out(rest)
    for rule, names in ignored.items():
        found.ignored[rule] = (*found.ignored.get(rule, ()), *names)
    found.unknown += unknown
    found.notes += source.notes
    found.parts[part] = Part(config, plan.mapping, source)


def _weights(
    folder: Folder, inside: tuple[str, ...], variant: str | None, mmap: bool, found: _Found
) -> Source:
    """The component's weights; shards, which an index names, as one source."""
    place = folder.path.joinpath(*inside)
    chosen = weight_file(folder.names(*inside), variant)
    path = None if chosen is None else folder.file(*inside, chosen)
    if chosen is None or path is None:
        raise CheckpointError(
            f"{place} holds no weights", "It needs a .safetensors or .bin file. Get the folder again."
        )
    found.variants[str(place)] = variant_of(chosen)
    if not INDEX.fullmatch(chosen):
        found.files.append(path)
        return open_file(path, mmap=mmap)
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise CheckpointError(f"{path} has no weight_map of names", "Get the folder again.")
    shards: dict[str, Source] = {}
    for name in dict.fromkeys(index.values()):
        shard = folder.file(*inside, name)
        if shard is None:
            raise CheckpointError(f"{place} lacks its part {name!r}", "Get the folder again.")
        shards[name] = open_file(shard, mmap=mmap)
        found.files.append(shard)
    absent = [key for key, name in index.items() if key not in shards[name].infos]
    if absent:
        raise CheckpointError(
            f"{path} says where {', '.join(absent[:10])} lie, and they do not", "Get the folder again."
        )
    infos = {key: shards[name].infos[key] for key, name in index.items()}
    form = next(iter(shards.values())).format if shards else "safetensors"
    notes = tuple(dict.fromkeys(note for shard in shards.values() for note in shard.notes))
    return Source(
        path, f"{form}, {len(shards)} shards", infos, lambda key: shards[index[key]].read(key), {}, notes
    )


def _tokenizer(folder: Folder, inside: str) -> Words | None:
    """The tokenizer in one of the folders, None where there is none."""
    if not folder.names(inside):
        return None
    return read_tokenizer_folder(lambda name: folder.file(inside, name), folder.path / inside)


def _model_config(
    folder: Folder, found: _Found, index: Mapping[str, Any], tokenizer: Words | None, name: str
) -> ModelConfig:
    configs = {part: each.config for part, each in found.parts.items()}
    autoencoder = configs.get("autoencoder")
    side = found.values.get("sample_size")
    factor = 1 if autoencoder is None else autoencoder.downsampling
    sides = [64, 64] if side is None else [side, side] if isinstance(side, int) else side
    words = None if tokenizer is None else tokenizer.json
    if words is None and "text" in configs:
        words = clip_json()
        found.notes.append("the folder has no tokenizer; CLIP's is taken")
    two = "text2" in configs
    unet = configs["unet"]
    upscaler = index.get("_class_name") == "StableDiffusionUpscalePipeline"
    scale = found.values.get("latent_scale", 1.0) if autoencoder is not None else 1.0
    if upscaler and scale == SD_SCALE:  # before 0.13 the autoencoder's config had none, and this by default
        scale = X4_SCALE
    return ModelConfig(
        name=name,
        **configs,
        tokenizer=words,
        latent_scale=scale,
        image_size=(sides[0] * factor, sides[1] * factor),
        clip_skip=2 if two else 1,
        text_normed=not two,
        concat="enlarges" if upscaler else concat_of(family_of(unet), unet, autoencoder),
        zeros_for_empty=two and index.get("force_zeros_for_empty_prompt", True) is True,
    )


def _scheduling(folder: Folder, config: ModelConfig) -> tuple[dict[str, Any], str, bool]:
    """(fields of the model's config, evidence of the prediction, whether it stays uncertain)."""
    path = folder.file("scheduler", "scheduler_config.json")
    if path is None:
        parts = {part: getattr(config, part) for part in ("text", "text2", "bert") if getattr(config, part)}
        both = base_of(parts, config.unet) == "sd2"
        return {}, "the folder has no scheduler; eps is what most models predict", both
    found = read_scheduler(path)
    fields = {"schedule": found.schedule, "prediction": found.prediction, "defaults": found.defaults}
    return fields, "prediction_type in scheduler/scheduler_config.json", False


def _opened(path: Path, found: _Found, config: ModelConfig, evidence: str, uncertain: bool) -> Opened:
    formats = dict.fromkeys(part.source.format for part in found.parts.values())
    return Opened(
        place=str(path),
        family=_family(config),
        layout="diffusers",
        format=f"diffusers folder ({', '.join(formats)})",
        config=config,
        parts={part: found.parts[part] for part in PARTS if part in found.parts},
        evidence=evidence,
        uncertain=uncertain,
        files=tuple(found.files),
        ignored=found.ignored,
        unknown=tuple(found.unknown),
        notes=tuple(dict.fromkeys(found.notes)),
    )


def _family(config: ModelConfig) -> str:
    if config.unet is not None:
        parts = {part: getattr(config, part) for part in ("text", "text2", "bert") if getattr(config, part)}
        return family_of(config.unet) or f"like {base_of(parts, config.unet)}"
    if config.autoencoder is not None:
        return autoencoder_family(config.autoencoder)
    return "text encoder"
