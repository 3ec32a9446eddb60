"""The commands in the project's documents: how tests find them, and run them with more options behind."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from sfumato import cli

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
SMALL_UNET = [
    "--loop.images=64",
    "--unet.model_channels=16",
    "--unet.num_head_channels=16",
    "--diffusion.steps=2",
]
SHORT = {  # what training runs are cut to, by the words of their recipes after the first
    "autoencoder": ["--loop.images=16", "--first_stage.ch=8"],
    "diffusion": SMALL_UNET,
    "finish": SMALL_UNET,
}


def page(name: str) -> str:
    """The text of a document, by its path from the root of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """What stands in the fenced blocks of a language."""
    return [content for named, content in BLOCK.findall(text) if named == language]


def commands(text: str) -> list[str]:
    """The lines of all blocks of commands."""
    return [line for block in blocks(text, "bash") for line in block.splitlines() if line]


def run(command: str, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """Run a `sfumato` command in this process, with more options behind its own; returns what it prints."""
    program, *arguments = shlex.split(command, comments=True)
    assert program == "sfumato", command
    status = cli.main([*arguments, *more])
    out, err = capsys.readouterr()
    assert status == 0, f"{command}\n{err}"
    return out


def shortened(command: str) -> list[str]:
    """What cuts a command of `SHORT` recipes; nothing for one that trains nothing."""
    if not command.startswith("sfumato train "):
        return []
    return SHORT[Path(command.split()[2]).stem.split("-")[1]]
