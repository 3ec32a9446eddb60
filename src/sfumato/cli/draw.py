"""Drawing for commands, with a progress line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.cli.progress import progress_line
from sfumato.request import Request

if TYPE_CHECKING:
    from sfumato.generation import Result
    from sfumato.model import StableDiffusion


def drawn(
    model: StableDiffusion, request: Request, label: str = "drawing", watch: Path | None = None
) -> Result:
    """The pictures of a request from `complete`, with its warnings and a progress line on stderr.

    watch: a PNG file that shows what each step makes of them, by the model's preview decoder if it has one.
    """
    from sfumato.checkpoints.files import write_atomically
    from sfumato.generation import (  # imports torch, which help texts do without
        Notes,
        finish,
        in_turn,
        stream,
    )
    from sfumato.images import grid, preview

    told = 0

    def run(stage: Request, notes: Notes) -> Result:
        nonlocal told
        steps = stream(model, stage, notes)
        for warning in notes.warnings[told:]:
            print(f"warning: {warning}", file=sys.stderr)
        told = len(notes.warnings)
        count = max(1, notes.steps or 0)
        show, last = progress_line(label), None
        for last in steps:
            show(min(last.index + 1, count - 1), count)  # some samplers take more, others fewer
            if watch is not None:
                shown = [preview(one) for one in model.preview_latents(last.denoised)]
                write_atomically(watch, lambda temporary: grid(shown).save(temporary, "PNG"))  # noqa: B023
        show(count, count)
        assert last is not None
        return finish(model, stage, last, notes, 0.0)

    return in_turn(model, request, run)
