"""`sfumato train`: a training run by its recipe, with a line that says how far it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

DRY_RUN = "--dry-run"
INI = ".ini"


def train(
    config: Annotated[
        Path, Parameter(help="Recipe, a .toml file (see configs/), or the study notes' config_SD.ini.")
    ],
    /,
    *overrides: Annotated[
        str, Parameter(allow_leading_hyphen=True, help="Values of the recipe to change: --loop.images=50000")
    ],
) -> None:
    """Train by a recipe; run it again to resume. With --dry-run, say what it would take, and stop."""
    from sfumato.training import run  # imports torch
    from sfumato.training.notes.run import run as run_notes

    words = [word for word in overrides if word != DRY_RUN]
    if len(words) < len(overrides):
        _plan(config, joined(tuple(words)))
        return
    start = run_notes if config.suffix.lower() == INI else run
    with reporter() as report:
        path = start(config, joined(overrides), report)
    print(path)


def _plan(config: Path, overrides: list[str]) -> None:
    from sfumato.training.config import read_config
    from sfumato.training.notes.run import recipe
    from sfumato.training.plan import plan

    with reporter() as report:
        notes = config.suffix.lower() == INI
        found = plan(recipe(config, overrides, report) if notes else read_config(config, overrides), report)
    for words in found.lines():
        print(words)


def joined(words: tuple[str, ...]) -> list[str]:
    """Overrides as `key=value`: "--a.b", "3" is taken as "--a.b=3"."""
    found: list[str] = []
    for word in words:
        if found and "=" not in found[-1] and not word.startswith("--"):
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


@contextmanager
def reporter() -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Shows metrics on stderr: a line each; on a terminal the speed in one that is redrawn."""
    if not sys.stderr.isatty():
        yield lambda values: print(line(values), file=sys.stderr, flush=True)
        return
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    with console.status("starting") as status:

        def show(values: Mapping[str, Any]) -> None:
            if "images_per_second" in values:
                status.update(line(values))
            else:
                console.print(line(values), markup=False)  # scores and warnings stay on the screen

        yield show


def line(values: Mapping[str, Any]) -> str:
    """The metrics in one line: images seen, scores, speed, time left."""
    words = [f"{values['seen']:,} images"] if "seen" in values else []
    for name, value in values.items():
        if name == "images_per_second":
            words.append(f"{value:.1f} images/s")
        elif name == "seconds_left":
            minutes, seconds = divmod(round(value), 60)
            words.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")
        elif name != "seen":
            words.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    return "  ".join(words)
