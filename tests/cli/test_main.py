"""The command itself: subcommands imported when used, exit codes, messages instead of tracebacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import sfumato
from sfumato import cli, errors
from sfumato.cli import main


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(words: list[str]) -> None:
        raise error

    monkeypatch.setattr(cli, "_run", run)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (errors.InputError("bad", "do better"), 2, "error: bad\ndo better\n"),
        (errors.CheckpointError("bad"), 3, "error: bad\n"),
        (errors.DataError("bad"), 4, "error: bad\n"),
        (errors.ResourceError("bad"), 5, "error: bad\n"),
        (errors.NumericalError("bad"), 6, "error: bad\n"),
        (MemoryError(), 5, "error: out of memory\n"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 5, "error: out of memory\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 5, "error: out of memory\n"),
        (
            OSError(28, "No space left on device", "a/b.png"),
            5,
            "error: a/b.png: No space left on device\nCheck",
        ),
        (ZeroDivisionError("oops"), 1, "error: unexpected ZeroDivisionError: oops\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
    ],
)
def test_errors_are_lines_and_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    words: str,
) -> None:
    fail_with(monkeypatch, error)
    assert main(["generate"]) == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(words) and "Traceback" not in err
    with pytest.raises(type(error)):
        main(["generate", "--debug"])


def test_debug_after_two_dashes_is_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(cli, "_run", lambda words: (seen.append(words), 0)[1])
    assert main(["--debug", "generate", "--", "--debug"]) == 0
    assert seen == [["generate", "--", "--debug"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["genrate", "fox"], 'Did you mean "generate"?'),
        (["generate", "a", "red", "fox"], "A prompt of several words stands in quotes."),
        (["generate", "fox", "--stepz", "3"], "Did you mean --steps?"),
        (["generate", "fox", "--steps"], "--steps requires an argument"),
        (["generate", "fox", "--sampler", "eulr"], "there is no sampler 'eulr'\nDid you mean 'euler'?"),
        (["generate", "fox", "--steps", "3.5"], "steps is 3.5; it should be a valid integer"),
        (["generate", "fox", "--guidance", "inf"], "guidance is inf; it should be a finite number"),
        (["train"], "CONFIG requires an argument"),
        (["data", "build", "illustrations"], "--out requires an argument"),
    ],
)
def test_wrong_words(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert message in err and out == "" and "Traceback" not in err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"sfumato {sfumato.__version__}"


LOADED = """
import json, sys
from sfumato.cli import main
status = main({words!r})
watched = "torch numpy PIL sfumato.cli.generate sfumato.cli.train sfumato.training sfumato.data"
sys.stderr.write(json.dumps([status, [name for name in watched.split() if name in sys.modules]]))
"""


@pytest.mark.parametrize(
    ("words", "loaded"),
    [
        (["--help"], []),
        (["--version"], []),
        (["data", "build", "--help"], []),
        (["train", "--help"], ["sfumato.cli.train"]),
        (["generate", "--help"], ["sfumato.cli.generate"]),
    ],
)
def test_help_imports_only_the_command_and_never_torch(words: list[str], loaded: list[str]) -> None:
    code = LOADED.format(words=words)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(done.stderr) == [0, loaded]
    assert "Usage: sfumato" in done.stdout or words == ["--version"]


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "sfumato", "--nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ")


@pytest.mark.parametrize("words", [["--version"], ["generate", "--help"]])
def test_a_reader_that_went_away(words: list[str]) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, "-m", "sfumato", *words]
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (1, b"")
