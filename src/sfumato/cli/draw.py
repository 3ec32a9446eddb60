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
    from sfumato.generation import Notes, finish, stream  # imports torch, which help texts do without

    notes = Notes()
    steps = stream(model, request, notes)
    for warning in notes.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    assert request.steps is not None
    show, last = progress_line(label), None
    for last in steps:
        show(min(last.index + 1, request.steps - 1), request.steps)  # some samplers take more, others fewer
    show(request.steps, request.steps)
    assert last is not None
    return finish(model, request, last, notes, 0.0)
