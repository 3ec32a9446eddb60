"""`sfumato morph`: a moving picture on the way from one prompt to the next."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sfumato.cli.options import Ema, Offline, Prediction, Vae, takes_request
from sfumato.errors import InputError
from sfumato.request import Request


@takes_request
def morph(
    request: Request,
    *,
    to: Annotated[
        list[str] | None,
        Parameter(metavar="TEXT", negative=(), help="The next prompt; may be given several times."),
    ] = None,
    output: Annotated[
        Path | None,
        Parameter(alias="-o", help="File to write: .gif, .webp, .png, or .mp4. [default: morph.webp]"),
    ] = None,
    frames: Annotated[int, Parameter(help="Frames from each prompt to the next.")] = 16,
    seeds: Annotated[
        str | None,
        Parameter(metavar="INT,INT", help="Seeds at the prompts, with commas; the same at all if not given."),
    ] = None,
    milliseconds: Annotated[int, Parameter(help="That a frame is shown.")] = 80,
    loop: Annotated[
        bool, Parameter(negative=(), show_default=False, help="Go on from the last prompt to the first.")
    ] = False,
    back_and_forth: Annotated[
        bool, Parameter(negative=(), show_default=False, help="Play the frames backwards after the last.")
    ] = False,
    model: Annotated[str | None, Parameter(metavar="MODEL", help="As in `sfumato generate`.")] = None,
    vae: Vae = None,
    prediction: Prediction = None,
    ema: Ema = False,
    offline: Offline = False,
    device: Annotated[str, Parameter(metavar="NAME", help="cpu, cuda, cuda:1, mps, or auto.")] = "auto",
    dtype: Annotated[str, Parameter(metavar="NAME", help="float32, float16, bfloat16, or auto.")] = "auto",
) -> None:
    """Draw the way from a prompt to others, through noises too where they have seeds of their own."""
    # These import torch, which a help text can do without.
    from sfumato.cli.progress import progress_line
    from sfumato.generation import Notes
    from sfumato.generation.morphing import morph as drawn
    from sfumato.model import load
    from sfumato.morph import animation_format, write_animation

    path = Path("morph.webp") if output is None else output
    animation_format(path)
    if not request.prompt or not to:
        raise InputError("there is no way without two prompts", 'Write: sfumato morph "a fox" --to "a wolf"')
    try:
        numbers = [] if seeds is None else [int(each) for each in seeds.split(",")]
    except ValueError as error:
        raise InputError(f"seeds are {seeds!r}", "Write whole numbers with commas, as 1,2,3.") from error
    loaded = load(model, device=device, dtype=dtype, vae=vae, prediction=prediction, ema=ema, offline=offline)
    notes, show = Notes(), progress_line("drawing")
    way = drawn(
        loaded, request, [request.prompt, *to], frames, seeds=numbers, loop=loop, notes=notes, show=show
    )
    pictures = list(way)
    for warning in notes.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    write_animation(pictures, path, milliseconds=milliseconds, back_and_forth=back_and_forth)
    print(path)
    print(f"{len(pictures)} frames, {loaded.name}", file=sys.stderr)
