"""Every command of the documents runs as it stands, on stand-ins, its budget cut by options behind it."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torch.distributed.run import get_args_parser

sys.path.insert(0, str(Path(__file__).parent))
import documents
from documents import BLOCK, ROOT, SMALL_UNET, run
from sfumato.checkpoints.controls.adapters_layouts import ip_pairs, vision_pairs
from sfumato.checkpoints.controls.layouts import control_pairs
from sfumato.checkpoints.files import write_tensors
from sfumato.checkpoints.layouts.tables import to_foreign
from sfumato.checkpoints.load import load_file
from sfumato.checkpoints.save import save_file
from sfumato.data.pictures import Row, Split
from sfumato.data.shards import encode, write_rows, write_shards
from sfumato.model import EMBEDDED, StableDiffusion
from sfumato.nn.attention import CrossAttention
from sfumato.nn.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.nn.clip_vision import CLIPVisionConfig, CLIPVisionEncoder
from sfumato.nn.controlnet import ControlNet, ControlNetConfig
from sfumato.nn.esrgan import CompactConfig, CompactNet, RRDBConfig, RRDBNet
from sfumato.nn.ip_adapter import IPAdapter, IPAdapterConfig, image_layers
from sfumato.presets import PARTS, ModelConfig
from sfumato.training.settings_data import DataConfig

REPRODUCTION = "examples/reproduction/README"
PAGES = [
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
    *(f"{REPRODUCTION}{suffix}" for suffix in (".md", ".zh.md")),
]
GROUPS = {  # by the name that a test below has for them: a page, and how those of its commands begin
    "autoencoders": ("docs/autoencoders.md", "sfumato train"),
    "benchmarks": ("docs/benchmarks.md", "python benchmarks/"),
    "controls": ("docs/control.md", "sfumato generate .* --control"),
    "preprocessing": ("docs/control.md", "sfumato preprocess"),
    "sets to fine-tune on": ("docs/fine-tuning.md", r"sfumato data|python benchmarks/finetune_pictures\.py"),
    "fine-tuning": ("docs/fine-tuning.md", "sfumato train"),
    "what was fine-tuned": ("docs/fine-tuning.md", "sfumato generate"),
    "from pictures": ("docs/image-to-image.md", "sfumato generate (?!.*--model)"),
    "enlarging models": ("docs/image-to-image.md", "sfumato generate .*--model"),
    "large pictures": ("docs/large-pictures.md", "sfumato (generate|morph)"),
    "recipes": ("docs/recipes.md", "sfumato replay"),
    "grid": ("docs/recipes.md", "sfumato grid"),
    "remedy": ("docs/reproduction.md", r"python examples/reproduction/main\.py"),
    "notes": ("docs/reproduction.md", r"sfumato (train \w+\.ini|generate)"),
    "CLIP": ("docs/reproduction.md", r"sfumato train .*-clip\.toml"),
    "one process": ("docs/scale.md", "sfumato train"),
    "several processes": ("docs/scale.md", "torchrun"),
    "a model of one's own": ("docs/training.md", "sfumato (train|generate)"),
    "upscaling": ("docs/upscaling.md", "sfumato upscale"),
    "example": (f"{REPRODUCTION}.md", r"python main\.py|sfumato generate"),
    "example, Chinese": (f"{REPRODUCTION}.zh.md", r"python main\.py|sfumato generate"),
}
TRAINING = ["--device=cpu", "--data.workers=0", "--loop.precision=float32"]  # whatever machine it is
FEW = ["--loop.images=8", "--loop.batch=4"]
NOTES = [
    "--epochs=1", "--batch_size=2", "--input_height=8", "--input_width=8", "--model_channels=4",
    "--channel_mult=[1,2]", "--num_heads=2", "--timesteps=4", "--samples=1", "--device=cpu",
]  # fmt: skip
PROGRAM = re.compile(r"\s*(\$ |>>> ?)?(sfumato|python3?|torchrun|pip|pytest|npm|git|bash|curl|export) ")
TinyFile = Callable[..., Path]
Capture = pytest.CaptureFixture[str]


def group(name: str) -> list[str]:
    """The commands of a group."""
    where, pattern = GROUPS[name]
    found = [line for line in documents.commands(documents.page(where)) if re.match(pattern, line)]
    assert found, f"{where} has no such command any more"
    return found


def photo(path: str, side: int = 64, mode: str = "RGB") -> None:
    """A picture with something on it, or a mask of its middle."""
    picture = Image.new(mode, (side, side), 0 if mode == "L" else (90, 120, 200))
    picture.paste(255 if mode == "L" else (230, 80, 60), (side // 4, side // 4, side // 2, side // 2))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def hasty(path: str) -> None:
    """The embedded model, but for drawing in two steps, as the previews of training do."""
    model = load_file(EMBEDDED, torch.float16)
    config = replace(model.config, defaults={**model.config.defaults, "steps": 2})
    parts = [part for part in PARTS if getattr(config, part) is not None]
    save_file(Path(path), config, {part: model.module(part).state_dict() for part in parts}, torch.float16)


def captioned(folder: str) -> None:
    """Eight pictures with captions."""
    for index in range(8):
        photo(f"{folder}/{index}.png")
        Path(folder, f"{index}.txt").write_text(f"a fox, number {index}", encoding="utf-8")


def first_stage(path: str) -> None:
    """An autoencoder to 16 x 16 x 4 latents of 64 x 64 pixels, as stage one of the recipes leaves it."""
    config = AutoencoderConfig(
        ch=4, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=4, embed_dim=4, resolution=64, attn_type="none",
        num_groups=1,
    )  # fmt: skip
    torch.manual_seed(0)
    state = {"autoencoder": AutoencoderKL(config).state_dict()}
    Path(path).parent.mkdir(parents=True)
    save_file(Path(path), ModelConfig("first", autoencoder=config, image_size=(64, 64)), state, torch.float32)


def illustrations(root: Path) -> None:
    """A small illustration set: forty discs as drawings, and the figure that a word is taught for."""
    names = [f"thing {index}" for index in range(40)]
    picture = Image.new("RGBA", (64, 64))
    picture.paste((200, 60, 90, 255), (16, 16, 48, 48))

    def row(key: str, split: Split, kind: str, caption: str, **attributes: str) -> Row:
        return {
            "id": key, "captions": [caption], "split": split, "kind": kind, "background": [255, 255, 255],
            "layers": [{"picture": "disc", "box": [0.0, 0.0, 1.0, 1.0]}], "attributes": attributes,
        }  # fmt: skip

    rows = [
        row(f"drawing-{index}", "train", "drawing", f"a noto drawing of a {name}", object=name, style="noto",
            background="white")
        for index, name in enumerate(names)
    ]  # fmt: skip
    rows.append(row("avatar-critters-test-00140", "test", "avatar", "a red critter"))
    rows.append(row("drawing-fox", "test", "drawing", "a fluent drawing of a fox"))
    root.mkdir(parents=True)
    write_shards(root, [("disc", encode(picture))])
    write_rows(root, rows)


# Training


@pytest.mark.slow
def test_autoencoders(clone: Path, capsys: Capture) -> None:
    illustrations(Path("data/illustrations"))
    captioned("my-pictures")
    first = Path("runs/illustrations/autoencoder")
    for command in group("autoencoders"):
        if "-decoder.toml" in command:  # goes on from what another page trains
            shutil.copytree("runs/illustrations/autoencoder-gan", first)
        groups = "4" if "-vq" in command else "1"
        more = ["--first_stage.ch=8", f"--first_stage.num_groups={groups}", "--autoencoder.disc_width=8"]
        run(command, capsys, *TRAINING, *FEW, "--autoencoder.preview_images=4", *more)
    assert len(list(clone.glob("runs/*/*/model.safetensors"))) == 5


@pytest.mark.slow
def test_fine_tuning(
    clone: Path, build: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    illustrations(Path("data/illustrations"))
    for command in group("sets to fine-tune on"):
        if command.startswith("python"):
            _, script, *arguments = shlex.split(command, comments=True)
            monkeypatch.setattr(sys, "argv", [script, *arguments])
            runpy.run_path(str(ROOT / script), run_name="__main__")
        else:
            run(command, capsys)
    assert build == [Path("data/illustrations")]
    hasty("hasty.safetensors")
    for command in group("fine-tuning"):
        more = ["--finetune.prior.images=2"] if "dreambooth" in command else []
        more += ["--finetune.model=hasty.safetensors", "--finetune.prompts=['pim']"]
        run(command, capsys, *TRAINING, *FEW, *more)
    for command in group("what was fine-tuned"):
        run(command, capsys, "--steps=2")
    assert len(list(clone.glob("*.png"))) == 3


def test_the_notes(clone: Path, capsys: Capture) -> None:
    for index in range(3):
        photo(f"my_pictures/{index}.png", 8 + index)
    shutil.copy(ROOT / "examples/reproduction/config/config_SD.ini", "config_SD.ini")
    for command in group("notes"):
        run(command, capsys, *(NOTES if command.startswith("sfumato train") else []))
    assert (clone / "runs/notes/epoch-0001.png").exists() and len(list(clone.glob("*.png"))) == 1


def test_the_remedy(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "examples", "examples")
    (command,) = group("remedy")
    monkeypatch.setattr(sys, "argv", [*shlex.split(command)[1:], *NOTES])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path("examples/reproduction/main.py", run_name="__main__")
    assert ended.value.code == 0
    assert (clone / "examples/reproduction/pictures/test_pic/model.safetensors").exists()


@pytest.mark.parametrize("name", ["example", "example, Chinese"])
def test_the_example(name: str, clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    where = clone / "example"
    shutil.copytree(ROOT / "examples/reproduction", where)
    monkeypatch.chdir(where)
    for command in group(name):
        program, *arguments = shlex.split(command, comments=True)
        if program == "sfumato":
            run(command, capsys)
            continue
        for folder in (each.partition("=")[2] for each in arguments if each.startswith("--dataset_path=")):
            for index in range(3):
                photo(f"{folder}/{index}.png", 8 + index)
        monkeypatch.setattr(sys, "argv", [*arguments, *NOTES])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(arguments[0], run_name="__main__")
        assert ended.value.code == 0, capsys.readouterr().err
    assert len(list(where.glob("*.png"))) == 4


def test_clip(clone: Path, capsys: Capture) -> None:
    illustrations(Path("data/illustrations"))
    for command in group("CLIP"):
        run(command, capsys, *TRAINING, *FEW)


@pytest.fixture
def folder_of_ones_own(clone: Path) -> Path:
    """A clone with pictures and captions, an autoencoder, and a recipe under a name of one's own."""
    captioned("pictures")
    first_stage("runs/folder/autoencoder/model.safetensors")
    shutil.copy("configs/folder-diffusion.toml", "recipe.toml")
    return clone


def diffused(words: list[str], capsys: Capture) -> None:
    """Run `train` and a denoiser's recipe from the beginning, with its networks and batches made small."""
    shutil.rmtree("runs/folder/diffusion", ignore_errors=True)
    more = [*TRAINING, *SMALL_UNET, "--loop.images=16", "--loop.batch=8"]
    run(shlex.join(["sfumato", *words]), capsys, *more)


@pytest.mark.slow
def test_one_process(folder_of_ones_own: Path, capsys: Capture) -> None:
    for command in group("one process"):
        diffused(shlex.split(command, comments=True)[1:], capsys)


@pytest.mark.slow
def test_several_processes(folder_of_ones_own: Path, capsys: Capture) -> None:
    """What torchrun is told is understood by torch's own parser, and what each process runs by one alone."""
    for command in group("several processes"):
        asked = get_args_parser().parse_args(shlex.split(command, comments=True)[1:])
        assert asked.module and asked.training_script == "sfumato.cli"
        diffused(asked.training_script_args, capsys)


@pytest.mark.slow
def test_a_model_of_ones_own(clone: Path, capsys: Capture) -> None:
    captioned("pictures")
    for command in group("a model of one's own"):
        more = documents.shortened(command)
        run(command, capsys, *more, *(TRAINING if more else []))
    assert list(clone.glob("a-fox*.png"))


# Drawing


def control_files(model: StableDiffusion) -> None:
    """The control networks of the page, in the layouts of the released ones, for the small model."""
    config = ControlNetConfig(model.unet.config, hint_widths=(4, 8))
    state = to_foreign(control_pairs(config), ControlNet(config).state_dict())
    Path("models/controlnet").mkdir(parents=True)
    for name in ("control_v11p_sd15_canny", "control_v11f1p_sd15_depth", "tile"):
        torch.save(state, f"{name}.pth")
    for name in ("control_v11p_sd15_canny", "control_v11p_sd15_softedge"):
        torch.save(state, f"models/controlnet/{name}.pth")
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=14,
        patch_size=7, projection_dim=12,
    )  # fmt: skip
    state = to_foreign(vision_pairs(vision), CLIPVisionEncoder(vision).state_dict())
    write_tensors(Path("clip-vision.safetensors"), state, {})
    attentions = [model.unet.get_submodule(name) for name in image_layers(model.unet)]
    widths = tuple(each.to_q.out_features for each in attentions if isinstance(each, CrossAttention))
    prompter = IPAdapterConfig(widths, context_dim=16, image_dim=12)
    state = to_foreign(ip_pairs(prompter), IPAdapter(prompter).state_dict())
    write_tensors(Path("ip-adapter_sd15.safetensors"), state, {})


def test_controls(clone: Path, tiny_model: StableDiffusion, tiny_model_file: Path, capsys: Capture) -> None:
    shutil.copy(tiny_model_file, "sd15.safetensors")
    control_files(tiny_model)
    for name in ("photo.png", "depth.png", "style.png"):
        photo(name)
    for command in group("controls"):
        run(command, capsys)
    assert len(list(clone.glob("a-*house*.png"))) == 4
    told = [run(command, capsys) for command in group("preprocessing")]
    assert any("canny" in each for each in told) and (clone / "edges.png").exists()


@pytest.mark.slow
def test_from_pictures(clone: Path, capsys: Capture) -> None:
    for name in ("fox.png", "hills.png", "photos/one.png", "photos/two.png"):
        photo(name)
    photo("hat.png", mode="L")
    for command in group("from pictures"):
        run(command, capsys, "--steps=2")
    assert len(list(clone.glob("drawn/*.png"))) == 2


def test_enlarging_models(
    clone: Path, tiny_file: TinyFile, tiny_model: StableDiffusion, capsys: Capture
) -> None:
    config = tiny_model.config
    assert config.unet is not None and config.autoencoder is not None
    unet = replace(config.unet, in_channels=5)
    tiny_file(Path("x4-upscaler-ema.safetensors"), concat="enlarges", unet=replace(unet, num_classes=400))
    tiny_file(
        Path("ldm-super-resolution.safetensors"),
        concat="enlarges",
        text=None,
        tokenizer=None,
        unet=replace(unet, use_spatial_transformer=False, context_dim=None),
        autoencoder=replace(config.autoencoder, double_z=False, n_embed=30),
    )
    photo("cat.png", 16)
    for command in group("enlarging models"):
        run(command, capsys)
    sizes = [Image.open(path, formats=["PNG"]).size for path in clone.glob("*.png") if path.name != "cat.png"]
    assert sizes == [(32, 32)] * 2


@pytest.mark.slow
def test_large_pictures(
    clone: Path, tiny_file: TinyFile, tiny_model: StableDiffusion, capsys: Capture
) -> None:
    autoencoder = tiny_model.config.autoencoder
    assert autoencoder is not None
    coarse = replace(autoencoder, ch_mult=(1,) * 6)  # a latent is 32 pixels wide
    tiny_file(Path("sd15.safetensors"), autoencoder=coarse, image_size=(512, 512))
    photo("apple.png", 32)
    for command in group("large pictures"):
        more = ["--frames=3"] if command.startswith("sfumato morph") else []
        run(command, capsys, "--steps=2", *more)
    assert (clone / "morph.webp").exists()


@pytest.mark.slow
def test_recipes(clone: Path, tiny_model_file: Path, capsys: Capture) -> None:
    shutil.copy(tiny_model_file, "other.safetensors")
    run("sfumato generate 'a fox' --steps 2 -o fox.png", capsys)
    told = [run(command, capsys) for command in group("recipes")]
    assert "equal\n" in told and Path("fox-replay.png").exists() and Path("other.png").exists()
    for command in group("grid"):
        run(command, capsys, "--steps=2", "--model=other.safetensors")
    (prompts,) = documents.blocks(documents.page("docs/recipes.md"), "text")
    Path("prompts.txt").write_text(prompts, encoding="utf-8")
    run("sfumato generate --from-file prompts.txt --model other.safetensors -o many/", capsys)
    assert len(list(clone.glob("many/*.png"))) == 2


@pytest.mark.slow
def test_upscaling(clone: Path, capsys: Capture) -> None:
    for name in ("fox.png", "photo.png", "folder/one.png"):
        photo(name, 24)
    networks: dict[str, nn.Module] = {
        "RealESRGAN_x4plus.pth": RRDBNet(RRDBConfig(num_features=8, num_blocks=1, num_growth=4)),
        "realesr-general-x4v3.pth": CompactNet(CompactConfig(num_features=8, num_convs=2)),
    }
    for name, network in networks.items():
        torch.save({"params_ema": network.state_dict()}, name)
    for command in group("upscaling"):
        run(command, capsys)
    assert (clone / "larger/one.png").exists()


# Benchmarks, which take the machine for themselves


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], argparse.Namespace]]:
    """A function that runs a script only until it has understood its options, and gives these."""
    found: list[argparse.Namespace] = []
    parse = argparse.ArgumentParser.parse_args

    class Understood(Exception):
        pass

    def instead(parser: argparse.ArgumentParser) -> argparse.Namespace:
        found.append(parse(parser))
        raise Understood

    def until(command: str) -> argparse.Namespace:
        _, script, *arguments = shlex.split(command, comments=True)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        monkeypatch.syspath_prepend(str((ROOT / script).parent))
        with pytest.raises(Understood):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        return found[-1]

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", instead)
    before = set(sys.modules)
    yield until
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]


def test_benchmarks(parsed: Callable[[str], argparse.Namespace]) -> None:
    for command in group("benchmarks"):
        assert parsed(command).work.parent == Path("/tmp")


# Examples in Python, and keys of recipes


@pytest.mark.parametrize("where", ["docs/data.md", "docs/recipes.md"])
def test_python_examples(where: str, clone: Path) -> None:
    illustrations(Path("data/illustrations"))
    scope: dict[str, object] = {}
    for block in documents.blocks(documents.page(where), "python"):
        exec(compile(block, where, "exec"), scope)  # the pages are ours


@pytest.mark.parametrize("where", [page for page in PAGES if "```python\n" in documents.page(page)])
def test_what_python_examples_import(where: str) -> None:
    for block in documents.blocks(documents.page(where), "python"):
        code = re.sub(r"^(>>> |\.\.\. )", "", block, flags=re.MULTILINE) if ">>> " in block else block
        lines = [line for line in code.splitlines() if re.match(r"(from|import) ", line)]
        exec(compile("\n".join(lines), where, "exec"), {})
        if code is block:
            compile(block, where, "exec")


def test_keys_of_recipes() -> None:
    for block in documents.blocks(documents.page("docs/training-data.md"), "toml"):
        tables = tomllib.loads(block)
        assert tables.keys() == {"data"}, "read here by the table of pictures alone"
        DataConfig.model_validate({"path": "pictures", **tables["data"]})


# All of them


def test_no_command_is_forgotten() -> None:
    """Every line of every block of commands belongs to one group, and such lines stand in no other block."""
    for where in PAGES:
        found = BLOCK.findall(documents.page(where))
        assert documents.page(where).count("```") == 2 * len(found), where
        for language, content in found:
            for line in filter(None, content.splitlines()):
                groups = [
                    name
                    for name, (page, pattern) in GROUPS.items()
                    if page == where and re.match(pattern, line)
                ]
                if language == "bash":
                    assert len(groups) == 1, f"{where}: {line}: {groups}"
                else:
                    assert not PROGRAM.match(line), (
                        f"{where}: {line}: in a block of {language or 'no language'}"
                    )
    tests = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in GROUPS if tests.count(f'"{name}"') < 2] == [], "groups that no test runs"
