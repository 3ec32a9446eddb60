"""Every command and example of the README runs as it stands; only the length of training is cut."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from sfumato import cli
from sfumato.checkpoints.convert import convert
from sfumato.checkpoints.load import open_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
INSTALL = re.compile(r"python3 -m venv \.venv && .*")
SMALL_UNET = [
    "--loop.images=64",
    "--unet.model_channels=16",
    "--unet.num_head_channels=16",
    "--diffusion.steps=2",
]
SHORT = {  # what training runs are cut to, by the last word of their recipe
    "autoencoder": ["--loop.images=16", "--first_stage.ch=8"],
    "diffusion": SMALL_UNET,
    "finish": SMALL_UNET,
}


DRAWS = re.compile(r"sfumato (generate|info|replay|grid|upscale|morph) ")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line]


def test_install_commands_are_those_that_ci_runs():
    installs = [line for line in commands() if INSTALL.fullmatch(line)]
    assert len(installs) == 2
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in ci, "CI takes the commands out of the README"


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the commands read, as in a clone."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where illustration sets would have been built, which takes minutes and the network."""
    built: list[Path] = []

    def instead(out: Path, **options: object) -> SimpleNamespace:
        built.append(out)
        return SimpleNamespace(root=str(out), pictures=0, rows={})

    monkeypatch.setattr("sfumato.data.illustrations.build", instead)
    return built


def run(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = shlex.split(command)
    assert program == "sfumato", command
    if arguments[0] == "train":
        recipe = Path(arguments[1]).stem
        if recipe.startswith("illustrations"):
            arguments += ["--data.path=pictures", "--data.repeats={}"]
        arguments += SHORT[recipe.split("-")[1]]
    assert cli.main(arguments) == 0, f"{command}\n{capsys.readouterr().err}"


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
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), scope)  # the README is ours
    assert (clone / "apple.png").exists()


def test_linked_files_exist():
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", prose):
        assert (ROOT / target).exists(), target
