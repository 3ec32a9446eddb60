"""The notes' configuration file: read as it stands, told what is wrong with it, trained and drawn from."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato.errors import DataError, InputError
from sfumato.training.notes.ini import literal, read_ini
from sfumato.training.notes.keys import NotesConfig, parse
from sfumato.training.notes.run import read_notes, run
from sfumato.training.notes.samples import Layout, open_samples, read
from sfumato.training.notes.translate import advice, schedule_config, training_config, unet_config
from sfumato.training.tasks.reproduction import ReproductionTask, samples_of

EXAMPLE = Path(__file__).parents[2] / "examples" / "reproduction" / "config" / "config_SD.ini"
PATHS = {"save_path": "out", "dataset_path": "pictures"}
TINY = [
    "--epochs=2", "--batch_size=2", "--input_height=8", "--input_width=8", "--model_channels=4",
    "--channel_mult=(1, 2)", "--num_heads=2", "--timesteps=8", "--samples=2", "--preview_steps=2",
]  # fmt: skip


def notes(**values: str) -> NotesConfig:
    return parse({**PATHS, **values}, "config.ini")


def refused(**values: str) -> str:
    with pytest.raises(InputError) as caught:
        notes(**values)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures in two sub-folders."""
    random = np.random.default_rng(0)
    for index in range(4):
        place = tmp_path / "图片" / ("cats" if index % 2 else "dogs")
        place.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 255, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{index}.png")
    return tmp_path / "图片"


# Reading


def test_the_example_says_what_the_defaults_are() -> None:
    config, warnings = read_notes(EXAMPLE)
    assert warnings == []
    assert config.model_dump(exclude={"save_path", "dataset_path"}) == NotesConfig(
        save_path=Path(), dataset_path=Path()
    ).model_dump(exclude={"save_path", "dataset_path"})
    assert config.save_path == Path("/mnt/Unet/pic/test_pic") and config.dataset_path == Path("/mnt/Unet/pic")
    assert (
        config.num_classes == 0 and config.beta_range == (1e-4, 0.02) and config.channel_mult == (1, 2, 4, 8)
    )


def test_comments_that_were_wrapped_are_no_part_of_a_value(tmp_path: Path) -> None:
    text = """num_head_channels = -1 # transformer的头维度，是一个int值，如果不
                         设置这个参数，那么赋值-1。不能同时为
                         -1
channel_mult = (1, 2, 3, 8) # 是一个tuple结构，元素个数
                           决定上下采样的层数，即resblock_updown=False时
beta_range = [0.0001,
   0.02]
save_path = /mnt/图 片/out # 测试时
dataset_path = "C:\\new\\test"
"""
    path = tmp_path / "c.ini"
    path.write_text(text, encoding="utf-8")
    config, _ = read_notes(path)
    assert config.num_head_channels == -1 and config.channel_mult == (1, 2, 3, 8)
    assert config.beta_range == (1e-4, 0.02)
    assert config.save_path == Path("/mnt/图 片/out") and str(config.dataset_path) == "C:\\new\\test"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "c.ini"
    path.write_bytes("[训练]\r\ndataset_path = 图片\r\nsave_path = 结果\r\n".encode(encoding))
    config, warnings = read_notes(path)
    assert config.dataset_path == Path("图片")
    assert ["was read as GBK" in text for text in warnings] == [True] * (encoding == "gb18030")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("dataset_path = a".encode("utf-16"), "UTF-16"),
        (b"\xff\xfe\xfd = \x80", "neither UTF-8 (line 1) nor GBK"),
        (b"epochs = 3\nepochs = 4", "'epochs' is given twice"),
        (b"[a]\nepochs = 3\n[b]\nepochs = 4", "in two sections"),
        (b"[a]\nepochs = 3\n[a]\n", "two sections [a]"),
        (b"epochs = 3\nand so on", "no INI file"),
        (b"#" * (1 << 20) + b"##", "more than"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "c.ini"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_ini(path)
    assert said in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        read_ini(tmp_path / "c.ini")


def test_values_are_literals_and_nothing_is_run() -> None:
    assert (
        literal("a", "[1, 2]") == [1, 2] and literal("a", "{4}") == {4} and literal("a", "scaled") == "scaled"
    )
    assert literal("a", "None") is None and literal("a", "0.") == 0.0
    for text in ("__import__('os').getcwd()", "2**9", "1 + 1", "[" * 500, "(1).real", ""):
        with pytest.raises(InputError, match="no Python literal"):
            literal("epochs", text)
    with pytest.raises(InputError, match="1001 characters"):
        literal("epochs", "9" * 1001)


def test_lists_tuples_and_sets_are_one() -> None:
    for text in ("[4, 1, 2]", "(4, 1, 2)"):
        assert notes(attention_resolutions=text).attention_resolutions == (4, 1, 2)
    assert notes(attention_resolutions="{4, 1, 2}").attention_resolutions == (1, 2, 4)
    assert notes(attention_resolutions="2").attention_resolutions == (2,)
    assert notes(attention_resolutions="[]").attention_resolutions == ()
    assert "a set has no order" in refused(channel_mult="{1, 2}")


# What is refused, with the key and what to do


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"epoch": "3"}, "Did you mean 'epochs'?"),
        ({"epochs": "0"}, "epochs is 0"),
        ({"epochs": "many"}, "epochs is many"),
        ({"conv_resample": "1"}, "conv_resample is 1"),
        ({"dims": "4"}, "dims is 4"),
        ({"save_path": ""}, "'save_path' is missing or empty"),
        ({"num_heads": "-1"}, "both unset"),
        ({"n_embed": "3"}, "Set n_embed = 1."),
        ({"context_dim": "10"}, "Set context_dim = None"),
        ({"noise_info": "[0.5, 1]"}, "Set noise_info = [0, 1]."),
        ({"input_height": "30"}, "input_height = 24 or 32. Or with fewer levels: channel_mult = [1, 2]"),
        ({"input_width": "5"}, "input_width = 8"),
    ],
)
def test_refusals(values: dict[str, str], said: str) -> None:
    assert said in refused(**values)


def test_the_height_of_rows_is_not_read() -> None:
    assert notes(dims="1", input_height="1", input_width="64").input_width == 64


def test_an_override_without_a_value() -> None:
    with pytest.raises(InputError, match="has no value"):
        read_notes(EXAMPLE, ["--epochs"])


# What it means


def test_the_network_is_the_notes_own() -> None:
    unet = unet_config(notes(num_classes="None", use_scale_shift_norm="True"))
    assert (unet.in_channels, unet.out_channels, unet.num_classes, unet.context_dim) == (1, 1, None, None)
    assert unet.use_spatial_transformer and unet.resblock_updown and unet.use_scale_shift_norm
    assert unet_config(notes(num_classes="7", model_channels="20")).num_classes == 7
    assert unet_config(notes(model_channels="20")).num_groups == 4


def test_the_schedule_as_written_and_its_remedies() -> None:
    said = advice(notes())
    assert len(said) == 1 and "abar_T = 0.1322" in said[0] and "36%" in said[0] and "0.364" in said[0]
    assert "beta_rule = scaled" in said[0] and "zero_terminal_snr = True" in said[0]
    assert advice(notes(beta_rule="scaled")) == [] == advice(notes(zero_terminal_snr="True"))
    scaled = schedule_config(notes(beta_rule="scaled"))
    assert (scaled.kind, scaled.beta_start, scaled.beta_end) == ("linear", 5e-4, pytest.approx(0.1))
    config = training_config(notes(zero_terminal_snr="True"), 10, "a")
    assert config.reproduction is not None and config.reproduction.prediction == "v"
    assert "beta_rule" not in advice(notes(timesteps="20"))[0].partition("One key")[2]
    with pytest.raises(InputError, match="not under 1"):
        schedule_config(notes(timesteps="20", beta_rule="scaled"))


def test_epochs_are_passes_over_the_samples() -> None:
    config = training_config(notes(), 25, "a")
    assert (config.loop.images, config.loop.batch, config.loop.preview_images) == (75, 10, 25)
    assert config.loop.ema_images == 0 and config.optimizer.decay == "constant"
    changed = training_config(notes(ema_images="900", precision="bfloat16"), 1, "a").loop
    assert changed.half_lives == (900,) and changed.precision == "bfloat16"


# Samples


def test_save_path_is_left_out_and_broken_files_are_named(folder: Path) -> None:
    (folder / "test_pic").mkdir()
    Image.new("L", (8, 8)).save(folder / "test_pic" / "drawn.png")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / ".hidden.png").write_bytes(b"no picture")
    samples = open_samples(folder, 1, 2, (8, 8), left_out=folder / "test_pic")
    assert len(samples) == 4 and samples.sample(0).shape == (1, 8, 8)
    assert len(samples.warnings) == 1 and "broken.png" in samples.warnings[0]
    assert float(samples.sample(0).min()) >= -1 and float(samples.sample(0).max()) <= 1
    assert samples.picture(0).size == (8, 8)
    told = advice(notes(dataset_path=str(folder), save_path=str(folder / "test_pic"), beta_rule="scaled"))
    assert len(told) == 1 and "left out" in told[0]


def test_an_earlier_run_in_the_folder_is_left_out(folder: Path) -> None:
    before = len(open_samples(folder, 1, 2, (8, 8)))
    (folder / "old" / "previews").mkdir(parents=True)
    (folder / "old" / "metrics.jsonl").write_text("{}")
    for name in ("epoch-0001.png", "previews/1.png"):
        Image.new("L", (8, 8)).save(folder / "old" / name)
    samples = open_samples(folder, 1, 2, (8, 8), left_out=folder / "new")
    assert len(samples) == before
    assert len(samples.warnings) == 1 and "earlier run" in samples.warnings[0]


def test_pictures_are_stretched_and_white_lies_under_transparency(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (16, 8), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 8, 8))
    picture.save(tmp_path / "a.png")
    sample = open_samples(tmp_path, 1, 2, (8, 8)).sample(0)
    assert float(sample[0, :, :3].max()) < -0.9 and float(sample[0, :, 5:].min()) > 0.9


def test_classes_are_sub_folders(folder: Path) -> None:
    samples = open_samples(folder, 3, 2, (8, 8), classes=2)
    assert samples.classes == ("cats", "dogs") and samples.captions(0) == ["cats"]
    assert samples.labels(range(4)).tolist() == [0, 0, 1, 1]
    with pytest.raises(DataError, match="Set num_classes = 2"):
        open_samples(folder, 3, 2, (8, 8), classes=3)
    Image.new("L", (8, 8)).save(folder / "outside.png")
    with pytest.raises(DataError, match=r"no class's folder: outside\.png"):
        open_samples(folder, 3, 2, (8, 8), classes=2)


def test_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder"):
        open_samples(tmp_path / "none", 1, 2, (8, 8))
    with pytest.raises(DataError, match="no pictures"):
        open_samples(tmp_path, 1, 2, (8, 8))
    with pytest.raises(InputError, match="2 channels are no picture"):
        open_samples(tmp_path, 2, 2, (8, 8))


def test_arrays_of_every_rank(tmp_path: Path) -> None:
    def made(array: np.ndarray, layout: Layout) -> list[torch.Tensor]:
        np.save(tmp_path / "a.npy", array)
        return read(tmp_path / "a.npy", layout)

    row = np.linspace(-1, 1, 16, dtype=np.float32)
    assert torch.equal(made(row, Layout(1, 1, (16,)))[0][0], torch.from_numpy(row))
    assert [sample.shape for sample in made(np.zeros((3, 16)), Layout(1, 1, (16,)))] == [(1, 16)] * 3
    assert made(np.zeros((2, 20)), Layout(2, 1, (16,)))[0].shape == (2, 16)
    assert made(np.zeros((5, 2, 20)), Layout(2, 1, (16,)))[4].shape == (2, 16)
    bright = made(np.full((4, 4), 255, np.uint8), Layout(1, 2, (8, 8)))[0]
    assert torch.equal(bright, torch.ones(1, 8, 8))
    assert made(np.zeros((1, 3, 4, 4)), Layout(1, 3, (8, 8)))[0].shape == (1, 3, 8, 8)
    for array, layout in (
        (np.zeros((2, 3, 4, 4)), Layout(1, 1, (16,))),
        (np.zeros(16, np.int64), Layout(1, 1, (16,))),
        (np.full(16, np.nan), Layout(1, 1, (16,))),
        (np.zeros((1, 3, 4, 4)), Layout(1, 3, (8, 8), depth=4)),
    ):
        with pytest.raises(InputError):
            made(array, layout)


def test_frames_are_slices(tmp_path: Path) -> None:
    frames = [Image.new("L", (8, 8), shade) for shade in (0, 80, 160, 240)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    Image.new("L", (8, 8)).save(tmp_path / "still.gif")
    samples = open_samples(tmp_path, 1, 3, (8, 8), depth=2)
    assert samples.layout.shape == (1, 2, 8, 8) and len(samples) == 1 and "still.gif" in samples.warnings[0]
    assert [round(float(part.mean()), 1) for part in samples.sample(0)[0]] == [-1.0, 0.3]
    assert open_samples(tmp_path, 1, 3, (8, 8)).layout.depth == 4


def test_loud_arrays_are_warned_of(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full(16, 300.0))
    assert "numbers up to 300" in open_samples(tmp_path, 1, 1, (16,)).warnings[0]


# Training


def test_it_trains_samples_and_is_drawn_from(folder: Path, tmp_path: Path) -> None:
    out = folder / "test_pic"
    lines: list[dict[str, object]] = []
    given = [f"--dataset_path={folder}", f"--save_path={out}", *TINY]
    path = run(EXAMPLE, given, lambda line: lines.append(dict(line)))
    assert path == out / "model.safetensors"
    told = [str(line["warning"]) for line in lines if "warning" in line]
    assert len(told) == 2 and "abar_T" in told[0] and "left out" in told[1]
    assert sum("loss" in line for line in lines) == 4
    for sheet in ("epoch-0001.png", "epoch-0002.png"):
        assert Image.open(out / sheet).size == (8 * 10, 10)
    model = sfumato.load(out)  # the folder of a run is a model
    drawn = sfumato.generate(model, sfumato.Request(seed=0, num_images=2))
    assert drawn.samples.shape == (2, 1, 8, 8) and drawn.parameters[0]["sampler"] == "ddpm"
    assert drawn.parameters[0]["steps"] == 8
    lines.clear()
    run(EXAMPLE, [*given, "--epochs=3"], lambda line: lines.append(dict(line)))  # what was drawn is not seen
    seen = [json.loads(line)["seen"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert max(seen) == 12 and sum("loss" in line for line in lines) == 2


@pytest.mark.parametrize("dims", [1, 3])
def test_rows_and_volumes(tmp_path: Path, dims: int) -> None:
    (tmp_path / "data").mkdir()
    shape = {1: (4, 1, 16), 3: (4, 1, 2, 8, 8)}[dims]
    np.save(tmp_path / "data" / "a.npy", np.random.default_rng(0).uniform(-1, 1, shape))
    given = [
        f"--dataset_path={tmp_path / 'data'}",
        f"--save_path={tmp_path / 'out'}",
        *TINY,
        f"--dims={dims}",
    ]
    run(EXAMPLE, [*given, "--epochs=1", "--beta_rule=plain", f"--input_width={16 if dims == 1 else 8}"])
    drawn = np.load(tmp_path / "out" / "epoch-0001.npy")
    assert drawn.shape == (2, *shape[1:]) and np.isfinite(drawn).all()
    model = sfumato.load(tmp_path / "out" / "model.safetensors")
    assert sfumato.generate(model, sfumato.Request(seed=0)).samples.shape == (1, *shape[1:])


def test_classes_are_learned_and_drawn(folder: Path, tmp_path: Path) -> None:
    given = [f"--dataset_path={folder}", f"--save_path={tmp_path / 'out'}", *TINY, "--num_classes=2"]
    lines: list[dict[str, object]] = []
    run(EXAMPLE, [*given, "--epochs=1", "--zero_terminal_snr=True"], lambda line: lines.append(dict(line)))
    assert {"classes": "0 cats, 1 dogs"} in lines
    assert (tmp_path / "out" / "classes.tsv").read_text(encoding="utf-8") == "0\tcats\n1\tdogs\n"
    model = sfumato.load(tmp_path / "out")
    assert sfumato.generate(model, sfumato.Request(seed=0, label=1, steps=2)).samples.shape == (1, 1, 8, 8)


def test_the_loss_is_the_papers(folder: Path) -> None:
    config = training_config(notes(dataset_path=str(folder), model_channels="4", num_heads="2"), 4, "a")
    config = config.model_copy(update={"data": config.data.model_copy(update={"size": (8, 8)})})
    samples = samples_of(config)
    task = ReproductionTask(config, samples, torch.device("cpu"))
    order, clean = next(task.batches(0, 4))
    (_, loss, _), *_ = task.losses((order, clean), 0)
    # The network's last layer starts at zero, so the loss is the mean square of the noise it is asked for.
    noise = torch.stack([torch.randn(1, 8, 8, generator=place.generator("diffusion")) for place in order])
    assert float(loss.detach()) == pytest.approx(float(noise.square().mean()), rel=1e-5)
    abar = torch.linspace(1e-4, 0.02, 200, dtype=torch.float64).neg().add(1).cumprod(0)
    assert math.sqrt(float(task.schedule.alphas_cumprod[-1])) == pytest.approx(float(abar[-1]) ** 0.5)
    loss.backward()
    assert all(p.grad is not None for p in task.unet.out.parameters())


@pytest.mark.slow
def test_the_unchanged_file(tmp_path: Path) -> None:
    (tmp_path / "pic").mkdir()
    Image.new("L", (40, 40), 90).save(tmp_path / "pic" / "a.png")
    given = [f"--dataset_path={tmp_path / 'pic'}", f"--save_path={tmp_path / 'pic' / 'test_pic'}"]
    run(EXAMPLE, [*given, "--samples=1", "--preview_steps=1", "--epochs=1", "--batch_size=1"])
    assert Image.open(tmp_path / "pic" / "test_pic" / "epoch-0001.png").size == (34 * 8, 34)
