"""What lies beside the networks of a diffusers folder: scheduler and tokenizers, both ways."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from sfumato.checkpoints.schema import (
    WRITTEN_FOR,
    Record,
    built,
    class_name,
    parse,
    read_json,
    read_text,
)
from sfumato.diffusion.schedule import Schedule, ScheduleConfig
from sfumato.errors import CheckpointError
from sfumato.text.tokenizer import (
    CLIP_CONTEXT_LENGTH,
    END,
    START,
    Tokenizer,
    clip_json,
    clip_merges,
    parse_merges,
    vocabulary,
)
from sfumato.text.wordpiece import WordPiece

SCHEDULERS: dict[str, str | None] = {  # class -> our sampler of that kind, None where there is none
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DEISMultistepScheduler": None,
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "DPMSolverSDEScheduler": None,
    "DPMSolverSinglestepScheduler": None,
    "EulerAncestralDiscreteScheduler": "euler_a",
    "EulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun",
    "KDPM2AncestralDiscreteScheduler": None,
    "KDPM2DiscreteScheduler": None,
    "LCMScheduler": None,
    "LMSDiscreteScheduler": None,
    "PNDMScheduler": None,
    "TCDScheduler": None,
    "UniPCMultistepScheduler": None,
}
KINDS = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
    "sigmoid": "sigmoid",
}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SPACINGS = {"leading": "leading", "trailing": "trailing", "linspace": "uniform"}


class SchedulerRecord(Record):
    """`scheduler_config.json`, in the defaults of diffusers."""

    num_train_timesteps: Annotated[int, Field(ge=2, le=100_000)] = 1000
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 0.0001
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.02
    beta_schedule: str = "linear"
    trained_betas: Annotated[tuple[float, ...], Field(max_length=100_000)] | None = None
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    timestep_spacing: str | None = None
    use_karras_sigmas: bool = False


@dataclass(frozen=True)
class Scheduling:
    """What a scheduler's config says: the noise schedule, the prediction, request fields to begin with."""

    schedule: ScheduleConfig
    prediction: str
    defaults: Mapping[str, Any]


def read_scheduler(path: Path) -> Scheduling:
    """`CheckpointError` for a class, a schedule or a prediction that is not known here."""
    values = read_json(path)
    sampler = SCHEDULERS[class_name(values, SCHEDULERS, path)]
    record = parse(SchedulerRecord, values, path)
    kind = _looked_up(record.beta_schedule, KINDS, "beta_schedule", path)
    schedule = built(
        lambda: ScheduleConfig(
            kind="betas" if record.trained_betas else kind,
            num_timesteps=len(record.trained_betas) if record.trained_betas else record.num_train_timesteps,
            beta_start=record.beta_start,
            beta_end=record.beta_end,
            betas=record.trained_betas or None,
            zero_terminal_snr=record.rescale_betas_zero_snr,
        ),
        path,
    )
    defaults: dict[str, Any] = {}
    if sampler is not None:
        defaults["sampler"] = sampler
        if record.use_karras_sigmas:
            defaults["spacing"] = "karras"
        elif record.timestep_spacing is not None:
            spacing = _looked_up(record.timestep_spacing, SPACINGS, "timestep_spacing", path)
            defaults["spacing"] = spacing
    prediction = _looked_up(record.prediction_type, PREDICTIONS, "prediction_type", path)
    return Scheduling(schedule, prediction, defaults)


def scheduler_values(schedule: ScheduleConfig, prediction: str) -> dict[str, Any]:
    """A DDIMScheduler's config; `set_alpha_to_one` and `steps_offset` are Stable Diffusion's."""
    backwards = {ours: theirs for theirs, ours in KINDS.items()}
    betas = schedule.betas
    if schedule.kind == "sigmoid":  # which DDIMScheduler does not know by name
        betas = Schedule(replace(schedule, zero_terminal_snr=False)).betas.tolist()
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": WRITTEN_FOR,
        "beta_end": schedule.beta_end,
        "beta_schedule": "linear" if betas else backwards[schedule.kind],
        "beta_start": schedule.beta_start,
        "clip_sample": False,
        "num_train_timesteps": schedule.num_timesteps,
        "prediction_type": {ours: theirs for theirs, ours in PREDICTIONS.items()}[prediction],
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "trailing" if schedule.zero_terminal_snr else "leading",
        "trained_betas": None if betas is None else list(betas),
    }


def _looked_up(given: str, table: Mapping[str, str], key: str, path: Path) -> str:
    if given not in table:
        raise CheckpointError(
            f"{path}: {key} is {given[:80]!r}, which is not known here", f"Allowed: {', '.join(table)}."
        )
    return table[given]


MAX_LENGTH = 100_000  # tokens in a row; transformers writes 10^30 for no limit


class TokenizerRecord(Record):
    """`tokenizer_config.json`: the length of a row, and what fills it up."""

    model_max_length: Annotated[int, Field(ge=1)] = CLIP_CONTEXT_LENGTH
    pad_token: str | dict[str, Any] | None = None


@dataclass(frozen=True)
class Words:
    """A tokenizer as `ModelConfig.tokenizer` takes it, and the id it pads with (None for WordPiece's own)."""

    json: str
    pad_id: int | None = None


def read_tokenizer_folder(files: Callable[[str], Path | None], place: Path) -> Words:
    """CLIP's tokenizer in `merges.txt` and `vocab.json` or in `tokenizer.json`, BERT's in `vocab.txt`.

    files: the path of a file in the folder, None where it has none. `CheckpointError` where there is none of
    these, or the vocabulary numbers the tokens in another order than its merges do.
    """
    merges, ids = files("merges.txt"), files("vocab.json")
    if merges is not None and ids is not None:
        lines = read_text(merges).splitlines()
        text = "\n".join(line for line in lines[bool(lines and lines[0].startswith("#version")) :] if line)
        given = read_json(ids)
    elif (wordpieces := files("vocab.txt")) is not None:
        return Words(WordPiece.from_text(read_text(wordpieces)).to_json())
    elif (whole := files("tokenizer.json")) is not None:
        text, given = _from_one_file(read_json(whole), whole)
    else:
        raise CheckpointError(
            f"{place} holds no tokenizer: no vocab.json with merges.txt, no tokenizer.json, no vocab.txt",
            "Get the folder again.",
        )
    pairs, own = _read_merges(text)
    if own != given:
        wrong = sorted(token for token in own.keys() | given.keys() if own.get(token) != given.get(token))
        raise CheckpointError(
            f"the tokenizer in {place} is not CLIP's kind: {len(wrong)} tokens have other numbers than their "
            f"merges give, among them {', '.join(repr(token[:40]) for token in wrong[:5])}",
            "Only byte-pair tokenizers numbered as CLIP's load here.",
        )
    config = files("tokenizer_config.json")
    record = parse(TokenizerRecord, {} if config is None else read_json(config), place)
    special = files("special_tokens_map.json")
    pad = record.pad_token or (None if special is None else read_json(special).get("pad_token"))
    if isinstance(pad, dict):
        pad = pad.get("content")
    pad = pad if isinstance(pad, str) and pad in own else END
    length = max(2, min(record.model_max_length, MAX_LENGTH))
    if pairs == clip_merges() and length == CLIP_CONTEXT_LENGTH:
        return Words(clip_json(pad), own[pad])
    return Words(built(lambda: Tokenizer(pairs, length, pad), place).to_json(), own[pad])


@lru_cache(maxsize=2)
def _read_merges(text: str) -> tuple[tuple[tuple[str, str], ...], dict[str, int]]:
    """Pairs and ids; SDXL has the same twice."""
    pairs = tuple(parse_merges(text))
    return pairs, vocabulary(pairs)


def _from_one_file(values: Mapping[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """Merges, one a line, and vocabulary of a `tokenizer.json` of the tokenizers library."""
    match values.get("model"):
        case {"type": "BPE", "vocab": dict(ids), "merges": list(merges)}:
            pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
            if all(isinstance(pair, list) and all(isinstance(part, str) for part in pair) for pair in pairs):
                return "\n".join(" ".join(pair) for pair in pairs), ids
    raise CheckpointError(f"{path} holds no byte-pair tokenizer", "Only CLIP's kind loads here.")


def tokenizer_files(tokenizer: Tokenizer, pad_id: int) -> dict[str, str]:
    """The inverse: file name -> text, as transformers' CLIPTokenizer reads them, old and new."""
    ids = vocabulary(tokenizer.merges)
    pad = next(name for name, index in ids.items() if index == pad_id)
    token = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {
        "bos_token": {"content": START, **token},
        "eos_token": {"content": END, **token},
        "pad_token": pad,
        "unk_token": {"content": END, **token},
    }
    config = {
        "add_prefix_space": False,
        "bos_token": START,
        "do_lower_case": True,
        "eos_token": END,
        "errors": "replace",
        "model_max_length": tokenizer.context_length,
        "pad_token": pad,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": END,
    }
    merges = "\n".join(f"{left} {right}" for left, right in tokenizer.merges)
    return {
        "merges.txt": f"#version: 0.2\n{merges}\n",
        "vocab.json": json.dumps(ids, ensure_ascii=False),
        "special_tokens_map.json": json.dumps(special, indent=2),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }


def wordpiece_files(tokenizer: WordPiece) -> dict[str, str]:
    """The files of transformers' BertTokenizer."""
    config = {"do_lower_case": True, "model_max_length": 77, "tokenizer_class": "BertTokenizer"}
    return {
        "vocab.txt": "\n".join(tokenizer.tokens) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2),
    }
