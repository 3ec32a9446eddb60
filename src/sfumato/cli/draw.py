"""Drawing for commands, with a progress line."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from sfumato.cli.progress import progress_line
from sfumato.request import Request

if TYPE_CHECKING:
    from sfumato.generation import Result
    from sfumato.model import StableDiffusion


def drawn(model: StableDiffusion, request: Request, label: str = "drawing") -> Result:
    """The pictures of a request from `complete`, with its warnings and a progress line on stderr."""
    from sfumato.generation import (  # imports torch, which help texts do without
        Notes,
        finish,
        in_turn,
        stream,
    )

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
        show(count, count)
        assert last is not None
        return finish(model, stage, last, notes, 0.0)

    return in_turn(model, request, run)
