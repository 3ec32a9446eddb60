"""The command `sfumato`: subcommands are imported when used, errors become lines and exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sfumato import __version__
from sfumato.errors import InputError, ResourceError, SfumatoError

if TYPE_CHECKING:
    from cyclopts import App

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "Unable to allocate")  # torch's and numpy's words


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (by default the process's own) and return its exit code.

    0 done; 2 input, 3 checkpoint, 4 data, 5 resource, 6 numerical (see `sfumato.errors`); 1 anything else,
    and a picture that `replay --check` finds different; 130 interrupted. Errors are one
    or two lines on stderr; with `--debug` they keep their traceback.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = given.index("--") if "--" in given else len(given)
    debug = "--debug" in given[:end]
    words = [word for word in given[:end] if word != "--debug"] + given[end:]
    try:
        status = _run(words)
        sys.stdout.flush()
    except KeyboardInterrupt:
        if debug:
            raise
        _say("\ninterrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; the rest of it must go somewhere, or Python complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        told = _for_people(error)
        _say(f"error: {told.message}" + (f"\n{told.hint}" if told.hint else ""))
        return told.exit_status
    return status


def application() -> App:
    """The tree of subcommands; each is named by a string and imported when it is used."""
    from cyclopts import App  # 0.1 s, and `main` has to be able to report an interrupt before it is over

    app = App(
        name="sfumato",
        help="Pictures from words by latent diffusion: draw them, train the model, make the training data.",
        help_epilogue="Every command also takes --debug: errors then keep their traceback.",
        help_format="plaintext",
        version=f"sfumato {__version__}",
        suppress_keyboard_interrupt=False,
    )
    app.command("sfumato.cli.generate:generate", name="generate", help="Draw pictures from a prompt.")
    app.command("sfumato.cli.grid:grid", name="grid", help="Draw a labelled sheet over axes of any option.")
    app.command("sfumato.cli.info:info", name="info", help="Show how a picture was drawn, by any tool.")
    app.command("sfumato.cli.replay:replay", name="replay", help="Draw a picture again by its recipe.")
    app.command("sfumato.cli.upscale:upscale", name="upscale", help="Make pictures larger.")
    app.command(
        "sfumato.cli.morph:morph", name="morph", help="Draw a moving picture from one prompt to the next."
    )
    app.command(
        "sfumato.cli.preprocess:preprocess",
        name="preprocess",
        help="Make the picture that a control network is shown: edges, lines, tones.",
    )
    app.command("sfumato.cli.train:train", name="train", help="Train by a recipe; run it again to resume.")
    app.command(
        "sfumato.cli.inspect:inspect",
        name="inspect",
        help="Show what is in a model file, without loading it.",
    )
    app.command(
        "sfumato.cli.convert:convert",
        name="convert",
        help="Write a model in another layout or number format.",
    )
    app.command("sfumato.cli.doctor:doctor", name="doctor", help="Find what is wrong with a model.")
    app.command("sfumato.cli.prompt:prompt", name="prompt", help="Show what a prompt means, step by step.")
    app.command(
        "sfumato.cli.samplers:samplers",
        name="samplers",
        help="List samplers and spacings with their options and papers.",
    )
    plot = App(name="plot", help="Draw charts.")
    plot.command(
        "sfumato.cli.plot_schedule:plot_schedule",
        name="schedule",
        help="Draw the noise levels of spacings over the steps.",
    )
    plot.command(
        "sfumato.cli.plot_samplers:plot_samplers",
        name="samplers",
        help="Draw how fast samplers converge on a model.",
    )
    plot.command(
        "sfumato.cli.plot_training:plot_training",
        name="training",
        help="Draw losses, scores and speed of training runs.",
    )
    app.command(plot)
    data = App(name="data", help="Make training data.")
    build = App(name="build", help="Build a set of captioned pictures.")
    build.command(
        "sfumato.cli.data:illustrations",
        name="illustrations",
        help="Drawings in several styles, avatars and composed scenes.",
    )
    build.command(
        "sfumato.cli.data:shapes", name="shapes", help="Coloured shapes, made without any download."
    )
    data.command(build)
    data.command("sfumato.cli.data:check", name="check", help="Look through one's own pictures.")
    app.command(data)
    return app


def _run(words: list[str]) -> int:
    """The exit code that a command returns; 0 where it returns none."""
    from cyclopts import CycloptsError

    try:
        status = application()(words, print_error=False, exit_on_error=False, result_action="return_value")
    except CycloptsError as error:
        command = " ".join(["sfumato", *(error.command_chain or ())])
        raise InputError(_in_one_line(error), f"See `{command} --help`.") from error
    return status if isinstance(status, int) else 0


def _in_one_line(error: Exception) -> str:
    from cyclopts import UnusedCliTokensError

    text = " ".join(str(error).split())
    if isinstance(error, UnusedCliTokensError):
        return f"{text} A prompt of several words stands in quotes."
    return text


def _for_people(error: Exception) -> SfumatoError:
    """`error` as one with a message, a hint and an exit status."""
    if isinstance(error, SfumatoError):
        return error
    if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
        return ResourceError("out of memory", "Ask for fewer or smaller pictures, or a smaller batch.")
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return ResourceError(f"{place}{error.strerror}", "Check the path, its permissions and free space.")
    return SfumatoError(
        f"unexpected {type(error).__name__}: {error}", "Run again with --debug, and report what it shows."
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
