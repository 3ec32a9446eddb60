"""A progress line on stderr, for people who watch a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

WIDTH = 24  # characters of the bar
REDRAW = 0.1  # seconds between two drawings


def progress_line(label: str) -> Callable[[int, int], None]:
    """A function of (done, of) that redraws one line on stderr; where that is no terminal, it stays silent.

    The line ends when `done` reaches `of`.
    """
    started, drawn = time.perf_counter(), 0.0

    def show(done: int, of: int) -> None:
        nonlocal drawn
        now = time.perf_counter()
        if not sys.stderr.isatty() or (now - drawn < REDRAW and done < of):
            return
        drawn = now
        filled = WIDTH * done // max(of, 1)
        bar = "█" * filled + "░" * (WIDTH - filled)
        end = "\n" if done >= of else ""
        print(
            f"\r{label} {bar} {done}/{of}  {now - started:.1f} s\x1b[K", end=end, file=sys.stderr, flush=True
        )

    return show
