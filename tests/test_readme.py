"""Every command and example of the README runs as it stands; only the length of training is cut."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import documents
from documents import ROOT
from sfumato.checkpoints.convert import convert
from sfumato.checkpoints.load import open_model

README = documents.page("README.md")
INSTALL = re.compile(r"python3 -m venv \.venv && .*")
DRAWS = re.compile(r"sfumato (generate|info|replay|grid|upscale|morph) ")


def commands() -> list[str]:
    return documents.commands(README)


def test_install_commands_are_those_that_ci_runs():
    installs = [line for line in commands() if INSTALL.fullmatch(line)]
    assert len(installs) == 2
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in ci, "CI takes the commands out of the README"


def run(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = documents.shortened(command)
    if re.match(r"sfumato train \S*/illustrations-", command):
        more = ["--data.path=pictures", "--data.repeats={}", *more]
    documents.run(command, capsys, *more)


@pytest.mark.slow
def test_drawing_commands(clone: Path, capsys: pytest.CaptureFixture[str]):
    for command in commands():
        if DRAWS.match(command) and "--model" not in command:
            run(command, capsys)
    assert (clone / "planet.png").exists() and (clone / "wide.png").exists()
    assert list(clone.glob("a-noto-drawing*.png"))


@pytest.mark.slow
def test_training_commands(clone: Path, build: list[Path], capsys: pytest.CaptureFixture[str]):
    mentioned = re.search(r"`(sfumato data build shapes [^`]*)`", README)
    assert mentioned is not None
    run(mentioned[1], capsys)
    for command in commands():
        if re.match("sfumato (train|data|plot|doctor)|sfumato generate .* --model runs/", command):
            run(command, capsys)
    assert build == [Path("data/illustrations")]
    assert (clone / "runs/folder/diffusion/model.safetensors").exists()
    assert (clone / "runs/illustrations/diffusion/model.safetensors").exists()


def test_commands_on_released_checkpoints(
    clone: Path, tiny_model_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shutil.copy(tiny_model_file, "v1-5-pruned-emaonly.safetensors")
    convert(open_model(tiny_model_file).opened, clone / "hub")
    monkeypatch.setattr("sfumato.checkpoints.open.download", lambda name, **options: clone / "hub")
    ran = []
    for command in commands():
        if re.match(r"sfumato (inspect|convert)|sfumato generate .* --model (?!runs/)", command):
            run(command, capsys)
            ran.append(command.split()[1])
    assert ran == ["generate", "generate", "inspect", "convert"]
    assert len(list(clone.glob("a-lighthouse*.png"))) == 2 and (clone / "sd15" / "unet").is_dir()


def test_no_command_is_forgotten():
    others = r"sfumato (inspect|convert|train|data|plot|doctor) |python benchmarks/quality\.py --help"
    known = re.compile(rf"{DRAWS.pattern}|{others}")
    assert [line for line in commands() if not INSTALL.fullmatch(line) and not known.match(line)] == []


def test_python_examples(clone: Path):
    scope: dict[str, object] = {}
    for block in documents.blocks(README, "python"):
        exec(compile(block, "README.md", "exec"), scope)  # the README is ours
    assert (clone / "apple.png").exists()


def test_linked_files_exist():
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", prose):
        assert (ROOT / target).exists(), target


def test_the_chinese_page_has_the_same_commands_and_examples():
    chinese = documents.page("README.zh.md")
    for language in ("bash", "python"):
        assert documents.blocks(chinese, language) == documents.blocks(README, language)
    assert re.findall(r"\]\((docs/[^)]*)\)", chinese) == re.findall(r"\]\((docs/[^)]*)\)", README)
