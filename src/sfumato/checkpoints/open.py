"""Opening anything that holds a model: told apart by what it is, then described without reading a tensor."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sfumato.checkpoints.detect.plan import detect
from sfumato.checkpoints.files import open_file
from sfumato.checkpoints.folder import open_component, open_pipeline, towers_file
from sfumato.checkpoints.hub import HubName, download, hub_name
from sfumato.checkpoints.metadata import METADATA_KEY
from sfumato.checkpoints.opened import Opened, Part
from sfumato.checkpoints.schema import read_text
from sfumato.checkpoints.sidecar import Params, read_sidecar
from sfumato.checkpoints.source import Source
from sfumato.diffusion.prediction import PREDICTIONS
from sfumato.errors import CheckpointError, InputError, nearest
from sfumato.presets import ModelConfig
from sfumato.text.tokenizer import clip_json
from sfumato.text.wordpiece import WordPiece

MAX_SCALE = 1e6  # of latents; the released ones are about 0.2 to 1
VOCABULARY = "vocab.txt"
OWN = "model.safetensors"  # what `sfumato train` leaves in the folder of a run


def open_anything(
    source: str | Path,
    *,
    vae: str | Path | None = None,
    prediction: str | None = None,
    ema: bool = False,
    offline: bool = False,
    revision: str | None = None,
    variant: str | None = None,
    vocab: str | Path | None = None,
    mmap: bool = True,
) -> Opened:
    """What a file, a folder or a name on the hub holds; no tensor is read. Options as `load.open_model`."""
    if prediction is not None and prediction not in PREDICTIONS:
        raise InputError(f"there is no prediction {prediction!r}", nearest(prediction, PREDICTIONS))
    path = locate(source, offline=offline, revision=revision, variant=variant)
    opened = open_path(
        path, prediction=prediction, ema=ema, variant=variant, mmap=mmap, name=name_of(source, path)
    )
    if vae is not None:
        other = locate(vae, offline=offline, revision=None, variant=variant)
        opened = opened.with_autoencoder(
            open_path(other, prediction=None, ema=False, variant=variant, mmap=mmap, name=name_of(vae, other))
        )
    if vocab is not None:
        opened = with_vocabulary(opened, vocabulary_file(vocab, offline=offline))
    return opened


def locate(
    source: str | Path, *, offline: bool = False, revision: str | None = None, variant: str | None = None
) -> Path:
    """The path that `source` is here, or that a name on the hub has in the hub's cache."""
    path = Path(source)
    try:
        there = path.exists()
    except (OSError, ValueError) as error:  # a name too long, with a NUL
        raise CheckpointError(f"cannot open {str(source)[:200]!r}: {error}", "Check the path.") from error
    name = hub_name(str(source)) if isinstance(source, str) and not there else None
    # A first part that is a folder here makes it a path with a slip in it, not a repository.
    if name is None or Path(path.parts[0]).is_dir():
        return path
    return download(name, revision=revision, offline=offline, variant=variant)


def name_of(source: str | Path, path: Path) -> str:
    """What a model is called that does not say it itself."""
    if Path(source) != path:
        return str(source)
    return path.name if path.is_dir() else path.stem


def open_path(
    path: Path, *, prediction: str | None, ema: bool, variant: str | None, mmap: bool, name: str
) -> Opened:
    """`open_anything` for what lies here."""
    if path.is_dir():
        if (path / "model_index.json").exists():
            return given(open_pipeline(path, variant=variant, mmap=mmap, name=name), prediction)
        if (towers := towers_file(path, variant)) is not None:
            path = towers
        elif (path / "config.json").exists():
            return open_component(path, variant=variant, mmap=mmap, name=name)
        else:
            path = path / OWN
    source = open_file(path, mmap=mmap)
    return open_source(source, prediction=prediction, ema=ema, name=name)


def given(opened: Opened, prediction: str | None) -> Opened:
    """The same model with the prediction that was asked for."""
    if prediction is None:
        return opened
    config = dataclasses.replace(opened.config, prediction=prediction)
    return dataclasses.replace(opened, config=config, evidence="it was asked for", uncertain=False)


def open_source(source: Source, *, prediction: str | None, ema: bool, name: str) -> Opened:
    """The model in one file."""
    beside = None if METADATA_KEY in source.metadata else read_sidecar(source.path)
    said = None if beside is None else beside[1].parameterization
    if said is not None and said not in PREDICTIONS:
        raise CheckpointError(
            f"{source.path.with_suffix('.yaml')}: there is no parameterization {said[:80]!r}", ""
        )
    place = str(source.path)
    plan = detect(source.infos, source.metadata, prediction=prediction or said, ema=ema, place=place)
    config, notes = plan.config, [*source.notes, *plan.notes]
    if METADATA_KEY not in source.metadata:
        config = dataclasses.replace(config, name=name, tokenizer=_clip(config))
        if plan.scale_key is not None:
            config = dataclasses.replace(config, latent_scale=_scale(source, plan.scale_key))
    evidence = plan.prediction_evidence
    if beside is not None:
        path, params = beside
        config = _with_params(config, params)
        notes.append(f"settings are read from {path.name} beside it")
        if prediction is None and said is not None:
            evidence = f"parameterization in {path.name}"
    return Opened(
        place=place,
        family=plan.family,
        layout=plan.layout,
        format=source.format,
        config=config,
        parts={part: Part(each.config, each.mapping, source) for part, each in plan.parts.items()},
        evidence=evidence,
        uncertain=plan.needs_probe,
        files=(source.path,),
        ignored=plan.ignored,
        unknown=plan.unknown,
        metadata=source.metadata,
        notes=tuple(notes),
    )


def _clip(config: ModelConfig) -> str | None:
    """The tokenizer of every CLIP that was released, which files in LDM layout do not hold."""
    towers = [tower for tower in (config.text, config.text2) if tower is not None]
    return clip_json(*["!"] * (towers[0].pad_token_id == 0)) if towers else None


def _scale(source: Source, key: str) -> float:
    """The latent scale that a file holds as a tensor of one number; it is of LDM's `scale_by_std`."""
    value = float(source.tensor(key))
    if not 0 < value <= MAX_SCALE:
        raise CheckpointError(f"{source.path}: {key} is {value}; it must be positive", "The file is damaged.")
    return value


def _with_params(config: ModelConfig, params: Params) -> ModelConfig:
    schedule = {
        "beta_start": params.linear_start,
        "beta_end": params.linear_end,
        "num_timesteps": params.timesteps,
    }
    changed = {key: value for key, value in schedule.items() if value is not None}
    scale = config.latent_scale if params.scale_factor is None else params.scale_factor
    return dataclasses.replace(
        config, latent_scale=scale, schedule=dataclasses.replace(config.schedule, **changed)
    )


def vocabulary_file(vocab: str | Path, *, offline: bool = False) -> Path:
    """The `vocab.txt` at a path, in a folder, or in a repository on the hub."""
    path = Path(vocab)
    name = hub_name(str(vocab)) if isinstance(vocab, str) and not path.exists() else None
    if name is None:
        return path / VOCABULARY if path.is_dir() else path
    return download(HubName(name.repo, name.path or VOCABULARY), offline=offline)


def with_vocabulary(opened: Opened, path: Path) -> Opened:
    """The same model with the WordPiece vocabulary in a `vocab.txt`, a token a line."""
    if opened.config.bert is None:
        raise InputError(f"{opened.place} reads no WordPiece vocabulary", "Leave out --vocab.")
    config = dataclasses.replace(opened.config, tokenizer=WordPiece.from_text(read_text(path)).to_json())
    return dataclasses.replace(opened, config=config)
