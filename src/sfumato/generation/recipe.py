"""What it takes to draw a picture again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sfumato import __version__
from sfumato.checkpoints.addons.apply import Weighted
from sfumato.checkpoints.files import sha256
from sfumato.generation.notes import Notes
from sfumato.generation.start import read_noise
from sfumato.intake import open_picture
from sfumato.model import StableDiffusion
from sfumato.request import Request

ADDON_FOLDERS = {"loras": "lora_dir", "embeddings": "embedding_dir"}
PICTURES = ("init", "mask", "region_masks")
BESIDE = (
    "weak_model",
    "classifier",
    "image_encoder",
    "hires_network",
)  # fields that are models, by path or loaded


def parameters(
    model: StableDiffusion,
    request: Request,
    notes: Notes,
    addons: Mapping[str, Mapping[str, str]] | None = None,
) -> list[dict[str, Any]]:
    """For each picture what it takes to draw it again, as JSON has it; the same run gives the same text.

    request: from `complete`. addons: {"loras": {name: sha256}, "embeddings": {name: sha256}}, those used.
    """
    assert request.seed is not None
    common: dict[str, Any] = {}
    for name, field in Request.model_fields.items():
        value = getattr(request, name)
        asked = field.json_schema_extra is None or value != field.default
        if asked and name not in ("num_images", "seed", "start_noise", *PICTURES, *BESIDE, "control"):
            common[name] = value
    for name in BESIDE:
        if (given := getattr(request, name)) is not None:
            common |= _beside(name, given)
    if request.start_noise is not None:
        common["start_noise_sha256"] = noise_digest(request.start_noise)
    for name in PICTURES:
        if (given := getattr(request, name)) is not None:
            common[f"{name}_sha256"] = picture_digest(given)
    if notes.controls is not None and notes.controls.told:
        common |= {"control_sha256": notes.controls.digest, "controls": list(notes.controls.told)}
    if request.init is not None:
        common["steps_run"] = notes.steps
    for name, used in (addons or {}).items():
        if used or getattr(request, ADDON_FOLDERS[name]) is not None:
            common[name] = dict(sorted(used.items()))
    common |= {
        "model": model.name,
        "model_digest": model.digest,
        "version": __version__,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "hardware": hardware(model.device),
        "float32_retries": notes.float32_retries,
        "batch_size": request.num_images,
    }
    common = json.loads(json.dumps(common))
    return [
        {**common, **_drawn(request, notes, i), "seed": request.seed + i, "batch_index": i}
        for i in range(request.num_images)
    ]


def _drawn(request: Request, notes: Notes, index: int) -> dict[str, Any]:
    """A picture's own prompts where styles and choices made them other than the request's."""
    if index >= len(notes.prompts):
        return {}
    prompt, negative = notes.prompts[index]
    found = {"prompt": (prompt, request.prompt), "negative_prompt": (negative, request.negative_prompt)}
    return {f"drawn_{name}": own for name, (own, asked) in found.items() if own != asked}


def addon_digests(loras: Sequence[Weighted], embeddings: Iterable[Path]) -> dict[str, dict[str, str]]:
    """What `parameters` takes for `addons`: by name the sha256 of every file; reads all of them."""
    files = {"loras": [weighted.lora.path for weighted in loras], "embeddings": embeddings}
    return {kind: {path.stem: sha256(path) for path in paths} for kind, paths in files.items()}


def noise_digest(given: Any) -> str:
    """sha256 of a start noise's values in float32, for a path or a tensor; `InputError` for no such file."""
    noise = read_noise(given) if isinstance(given, Path) else torch.as_tensor(given)
    return hashlib.sha256(noise.detach().cpu().float().contiguous().numpy().tobytes()).hexdigest()


def picture_digest(given: Any) -> str:
    """sha256 of pixels as they are taken from one given picture or several, or of latents.

    Errors as `open_picture`.
    """
    if isinstance(given, torch.Tensor):  # latents
        return noise_digest(given)
    total = hashlib.sha256()
    for one in given if isinstance(given, tuple) else (given,):
        picture = open_picture(one)
        total.update(f"{picture.mode} {picture.width}x{picture.height} ".encode())
        total.update(picture.tobytes())
    return total.hexdigest()


def hardware(device: torch.device) -> str:
    """What decides how sums are rounded: the kind of kernels of a CPU, the name of a GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else device.type


def _beside(name: str, given: Any) -> dict[str, Any]:
    """Name and digest of a model beside the model."""
    if isinstance(given, str):
        path = Path(given)
        return {name: given} | ({f"{name}_digest": sha256(path)} if path.is_file() else {})
    digest = getattr(given, "digest", None)
    told = str(getattr(getattr(given, "description", given), "name", type(given).__name__))
    return {name: told} | ({f"{name}_digest": digest} if isinstance(digest, str) else {})
