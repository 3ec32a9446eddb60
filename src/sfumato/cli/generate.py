"""`sfumato generate`: pictures from a prompt into PNG files."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sfumato.cli.options import (
    Ema,
    Offline,
    Prediction,
    Revision,
    Vae,
    Variant,
    Vocab,
    takes_request,
)
from sfumato.cli.progress import progress_line
from sfumato.request import Request


@takes_request
def generate(
    request: Request,
    *,
    output: Annotated[Path | None, Parameter(alias="-o", help="File (.png) or folder to write.")] = None,
    grid: Annotated[
        bool, Parameter(negative=(), show_default=False, help="Also write one sheet of all pictures.")
    ] = False,
    model: Annotated[
        str | None,
        Parameter(
            metavar="MODEL",
            help="Model file, diffusers folder or name on the hub; the embedded one if not given.",
        ),
    ] = None,
    vae: Vae = None,
    prediction: Prediction = None,
    ema: Ema = False,
    vocab: Vocab = None,
    variant: Variant = None,
    offline: Offline = False,
    revision: Revision = None,
    device: Annotated[str, Parameter(metavar="NAME", help="cpu, cuda, cuda:1, mps, or auto.")] = "auto",
    dtype: Annotated[str, Parameter(metavar="NAME", help="float32, float16, bfloat16, or auto.")] = "auto",
) -> None:
    """Draw pictures from a prompt."""
    started = time.perf_counter()
    # These import torch, which a help text can do without.
    from sfumato.cli.outputs import place, save
    from sfumato.generation import Notes, complete, finish, stream
    from sfumato.model import load

    folder, stem = place(output)

    loaded = load(
        model, device=device, dtype=dtype, vae=vae, prediction=prediction, ema=ema, offline=offline,
        revision=revision, variant=variant, vocab=vocab,
    )  # fmt: skip
    request, notes = complete(loaded, request), Notes()
    steps = stream(loaded, request, notes)
    for warning in notes.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    assert request.steps is not None
    show, last = progress_line("drawing"), None
    for last in steps:
        show(last.index + 1, request.steps)
    assert last is not None
    result = finish(loaded, request, last, notes, 0.0)
    for path in save(result, folder, stem, grid):
        print(path)
    count = f"{len(result.images)} pictures" if len(result.images) > 1 else "1 picture"
    seconds = time.perf_counter() - started
    print(f"{count} in {seconds:.1f} s, seed {request.seed}, {loaded.name}", file=sys.stderr)
