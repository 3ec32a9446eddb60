"""Recipes: what is wrong with one is said with its key and the nearest right one."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfumato.errors import InputError
from sfumato.training.config import TrainingConfig, read_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
LEAST = 'task = "autoencoder"\nout = "runs/x"\n[data]\npath = "pictures"\n'
UNET = (
    "[unet]\nin_channels = 4\nout_channels = 4\nmodel_channels = 32\nnum_res_blocks = 1\n"
    "attention_resolutions = [2]\nnum_heads = 2\n"
)


def read(tmp_path: Path, text: str, *overrides: str) -> TrainingConfig:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return read_config(path, overrides)


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_the_recipes_of_the_repository_are_right(path: Path) -> None:
    config = read_config(path)
    if config.task in ("autoencoder", "diffusion"):
        assert (config.first_stage if config.task == "autoencoder" else config.unet) is not None
    if config.text is not None and config.task == "diffusion":
        assert config.unet is not None and config.unet.context_dim == config.text.hidden_size


def test_there_are_recipes() -> None:
    assert {"illustrations-autoencoder", "illustrations-diffusion", "illustrations-finish"} <= {
        path.stem for path in CONFIGS
    }


UNKNOWN = {
    "top": ("tsk = 1\n" + LEAST, "unknown key 'tsk'. Did you mean 'task'?"),
    "data": (LEAST + "sizes = 64\n", "unknown key 'data.sizes'. Did you mean 'size'?"),
    "optimizer": (LEAST + "[optimizer]\nlearning-rate = 1\n", "'optimizer.learning-rate'.*'learning_rate'"),
    "loop": (LEAST + "[loop]\nimage = 1\n", "'loop.image'. Did you mean 'images'?"),
    "autoencoder": (LEAST + "[autoencoder]\nkl = 1\n", "'autoencoder.kl'. .*'kl_weight'|Allowed"),
    "diffusion": (LEAST + "[diffusion]\npredict = 'v'\n", "'diffusion.predict'. Did you mean 'prediction'?"),
    "classifier": (LEAST + "[classifier]\nclass = ['a']\n", "'classifier.class'. Did you mean 'classes'?"),
    "first_stage": (LEAST + "[first_stage]\nch_mul = [1]\n", "first_stage: unknown key 'ch_mul'.*'ch_mult'"),
    "unet": (LEAST + UNET + "num_head = 2\n", "unet: unknown key 'num_head'.*'num_heads'"),
    "text": (LEAST + "[text]\nhiden_size = 8\n", "text: unknown key 'hiden_size'.*'hidden_size'"),
    "schedule": (LEAST + "[schedule]\nbeta_stop = 1\n", "schedule: unknown key 'beta_stop'.*'beta_start'"),
    "nothing near": (LEAST + "[loop]\nxyz = 1\n", "'loop.xyz'. Allowed: accumulate, .*batch, .*"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), UNKNOWN.values(), ids=list(UNKNOWN))
def test_an_unknown_key_is_named_with_the_nearest(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, text)
    assert "recipe.toml" in caught.value.message and "\n" not in caught.value.message


WRONG = {
    "not TOML": ("task = autoencoder", "recipe.toml is not valid TOML"),
    "a missing key": ('task = "diffusion"\nout = "x"\n', "key 'data' is missing"),
    "a missing network key": (LEAST + "[unet]\nin_channels = 4\n", "key 'unet.out_channels' is missing"),
    "another task": (LEAST.replace("autoencoder", "upscale"), "task: Input should be 'autoencoder', "),
    "text for a number": (LEAST + "[loop]\nbatch = 'many'\n", "loop.batch: .*given: 'many'"),
    "no number": (LEAST + "[optimizer]\nlearning_rate = nan\n", "optimizer.learning_rate: .*finite"),
    "a batch of nothing": (LEAST + "[loop]\nbatch = 0\n", "loop.batch: .*greater than 0"),
    "a picture of nothing": (LEAST + "size = 0\n", "data.size"),
    "a picture of one side": (LEAST + "size = [8, 0]\n", "data.size"),
    "never less than never": (LEAST + "repeats = { a = -1 }\n", "data.repeats.a"),
    "a momentum of one": (LEAST + "[optimizer]\nbetas = [0.9, 1.0]\n", "optimizer.betas.1: .*less than 1"),
    "five colours": (LEAST + "channels = 5\n", "data.channels"),
    "networks that contradict": (LEAST + UNET + "context_dim = 8\n", "unet: context_dim=8 needs use_spatial"),
    "division by zero": (LEAST + UNET + "num_groups = 0\n", "recipe.toml: .*zero|num_groups"),
    "another schedule": (LEAST + "[schedule]\nkind = 'linea'\n", "schedule: .*'linea' Did you mean 'linear'"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=list(WRONG))
def test_what_else_can_be_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, text)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_bytes(b"task = '\xff'")
    with pytest.raises(InputError, match="not valid TOML"):
        read_config(tmp_path / "recipe.toml")


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_a_recipe_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot read the recipe"):
        read_config(tmp_path / name)


def test_overrides_are_toml_or_bare_words(tmp_path: Path) -> None:
    config = read(
        tmp_path, LEAST,
        "--loop.images=50", "loop.compile=true", "--data.path=my pictures", "--data.size=[8, 16]",
        "name=red fox", "optimizer.learning_rate=1e-5", "--autoencoder.start_from=a=b.safetensors",
        'notices="1"', "seed=7",
    )  # fmt: skip
    assert config.loop.images == 50 and config.loop.compile
    assert config.data.path == Path("my pictures") and config.data.shape == (8, 16)
    assert (config.name, config.notices, config.seed) == ("red fox", "1", 7)
    assert config.optimizer.learning_rate == 1e-5
    assert config.autoencoder.start_from == Path("a=b.safetensors")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--loop.images", "has no value"),
        ("--loop.image=3", "unknown key 'loop.image'. Did you mean 'images'"),
        ("--lop.images=3", "unknown key 'lop'. Did you mean 'loop'"),
        ("--task.images=3", "'task' is not a table"),
        ("--loop.images=few", "loop.images: .*'few'"),
        ("=3", "unknown key ''"),
    ],
)
def test_a_wrong_override(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, LEAST, override)


def test_a_recipe_cannot_be_changed() -> None:
    config = read_config(CONFIGS[0])
    with pytest.raises(ValueError, match="frozen"):
        config.loop.images = 3  # pyright: ignore[reportAttributeAccessIssue]
