"""What it takes to draw a picture again."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from sfumato import __version__
from sfumato.generation.notes import Notes
from sfumato.generation.start import read_noise
from sfumato.model import StableDiffusion
from sfumato.request import Request


def parameters(model: StableDiffusion, request: Request, notes: Notes) -> list[dict[str, Any]]:
    """For each picture what it takes to draw it again; the same run always gives the same text."""
    assert request.seed is not None
    skipped = {"num_images", "seed", "start_noise"}
    common = {name: getattr(request, name) for name in Request.model_fields if name not in skipped}
    if request.start_noise is not None:
        given = request.start_noise
        noise = read_noise(given) if isinstance(given, Path) else torch.as_tensor(given)
        raw = noise.detach().cpu().float().contiguous().numpy().tobytes()
        common["start_noise_sha256"] = hashlib.sha256(raw).hexdigest()
    common |= {
        "model": model.name,
        "model_digest": model.digest,
        "version": __version__,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "float32_retries": notes.float32_retries,
        "batch_size": request.num_images,
    }
    return [{**common, "seed": request.seed + i, "batch_index": i} for i in range(request.num_images)]
