"""Conversion: round trips bit by bit, what does not fit is listed, diffusers opens what is written."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import sfumato
from sfumato.checkpoints import stream
from sfumato.checkpoints.build import NETWORKS
from sfumato.checkpoints.convert import convert
from sfumato.checkpoints.files import open_file, read_tensors, write_tensors
from sfumato.checkpoints.layouts.tables import generate, prefix, to_foreign
from sfumato.checkpoints.load import open_model
from sfumato.checkpoints.save import save_file
from sfumato.checkpoints.source import TensorInfo
from sfumato.checkpoints.stream import write_stream
from sfumato.diffusion.schedule import ScheduleConfig
from sfumato.errors import CheckpointError, InputError, NumericalError, ResourceError
from sfumato.nn.autoencoder import AutoencoderConfig
from sfumato.nn.bert import BERTConfig
from sfumato.nn.classes import ClassEmbedderConfig
from sfumato.nn.clip import CLIPTextConfig
from sfumato.nn.unet import UNetConfig
from sfumato.presets import PARTS, ModelConfig
from sfumato.text.tokenizer import clip_json
from sfumato.text.wordpiece import WordPiece

State = dict[str, Tensor]
Equal = Callable[[nn.Module, State], bool]
UNET = UNetConfig(
    in_channels=4, out_channels=4, model_channels=32, num_res_blocks=1, attention_resolutions=(1, 2),
    channel_mult=(1, 2), num_heads=4, use_spatial_transformer=True, context_dim=32, legacy=False,
)  # fmt: skip
KL = AutoencoderConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1)
VQ = dataclasses.replace(KL, double_z=False, n_embed=20)
CLIP = CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
OPEN = dataclasses.replace(CLIP, hidden_act="gelu", pad_token_id=0)
MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "apple"]
SD1 = ModelConfig(
    "sd1",
    unet=UNET,
    autoencoder=KL,
    text=CLIP,
    tokenizer=clip_json(),
    latent_scale=0.18215,
    image_size=(64, 64),
)
MODELS = {
    "sd1": SD1,
    "inpainting": dataclasses.replace(SD1, unet=dataclasses.replace(UNET, in_channels=9)),
    "sd2": dataclasses.replace(
        SD1,
        unet=dataclasses.replace(UNET, num_heads=-1, num_head_channels=8, use_linear_in_transformer=True),
        text=OPEN,
        tokenizer=clip_json("!"),
        prediction="v",
    ),
    "sdxl": dataclasses.replace(
        SD1,
        unet=dataclasses.replace(
            UNET, attention_resolutions=(2,), transformer_depth=(1, 2), context_dim=64, adm_in_channels=1548,
            use_linear_in_transformer=True, num_heads=-1, num_head_channels=8,
        ),
        text2=dataclasses.replace(OPEN, projection_dim=12),
        clip_skip=2,
        text_normed=False,
        zeros_for_empty=True,
    ),
    "unconditional": dataclasses.replace(
        SD1,
        unet=dataclasses.replace(
            UNET, num_heads=-1, num_head_channels=16, use_spatial_transformer=False, context_dim=None
        ),
        autoencoder=VQ,
        text=None,
        tokenizer=None,
    ),
    "bert": dataclasses.replace(
        SD1,
        text=None,
        bert=BERTConfig(n_embed=32, n_layer=1, vocab_size=7, heads=2, dim_head=8),
        tokenizer=WordPiece(MARKS).to_json(),
    ),
    "classes": dataclasses.replace(
        SD1, text=None, tokenizer=None, classes=ClassEmbedderConfig(n_classes=5, embed_dim=32)
    ),
}  # fmt: skip


def states_of(config: ModelConfig) -> dict[str, State]:
    generator = torch.Generator().manual_seed(1)
    modules = {part: NETWORKS[part](each) for part in PARTS if (each := getattr(config, part)) is not None}
    return {
        part: {
            name: torch.randn(t.shape, generator=generator) * 0.1 for name, t in module.state_dict().items()
        }
        for part, module in modules.items()
    }


def single_file(path: Path, config: ModelConfig, states: dict[str, State]) -> State:
    """Write the model as one file that describes itself; returns its tensors."""
    save_file(path, config, states, torch.float32)
    return load_file(path)


def equal_tensors(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "classes"])
def test_there_and_back_is_bit_equal(tmp_path: Path, name: str, equal: Equal) -> None:
    config = MODELS[name]
    states = states_of(config)
    tensors = single_file(tmp_path / "a.safetensors", config, states)
    done = convert(open_model(tmp_path / "a.safetensors").opened, tmp_path / "folder")
    assert done.layout == "diffusers" and done.left_out == {} and set(done.parts) == set(states)
    file = open_model(tmp_path / "folder")
    assert all(equal(file.modules[part], state) for part, state in states.items())
    kept = {"defaults": {"sampler": "ddim", "spacing": "leading"}, "name": "folder"}
    assert file.config == dataclasses.replace(config, **kept)
    convert(file.opened, tmp_path / "b.safetensors")
    assert equal_tensors(load_file(tmp_path / "b.safetensors"), tensors)
    again = open_model(tmp_path / "b.safetensors")
    assert again.config == file.config and again.opened.layout == "ldm"
    assert all(equal(again.modules[part], state) for part, state in states.items())


def test_what_diffusers_has_no_place_for(tmp_path: Path) -> None:
    config = MODELS["classes"]
    single_file(tmp_path / "a.safetensors", config, states_of(config))
    with pytest.raises(InputError, match="no class embedder"):
        convert(open_model(tmp_path / "a.safetensors").opened, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    done = convert(open_model(tmp_path / "a.safetensors").opened, tmp_path / "b.safetensors")
    assert done.parts.keys() == {"unet", "autoencoder", "classes"}
    uneven = dataclasses.replace(SD1, unet=dataclasses.replace(UNET, channel_mult=(2, 2)))
    single_file(tmp_path / "c.safetensors", uneven, states_of(uneven))
    with pytest.raises(CheckpointError, match="cannot hold a first level wider"):
        convert(open_model(tmp_path / "c.safetensors").opened, tmp_path / "folder")


def test_what_a_layout_cannot_hold_is_listed(tmp_path: Path) -> None:
    config = MODELS["sd2"]
    states = states_of(config)
    assert config.text is not None
    longer = dataclasses.replace(config.text, num_hidden_layers=3, projection_dim=8)
    whole = states_of(dataclasses.replace(config, text=longer))["text"]
    start = prefix("text", "ldm", config)
    tensors = {
        prefix(part, "ldm", config) + key: value
        for part, state in states.items()
        for key, value in to_foreign(generate(part, getattr(config, part), "ldm"), state).items()
    }
    more = {start + key: value for key, value in to_foreign(generate("text", longer, "ldm"), whole).items()}
    extra = {
        **{key: value for key, value in more.items() if key not in tensors},
        start + "logit_scale": torch.tensor(4.6),
        "model_ema.decay": torch.tensor(0.99),
        "betas": torch.rand(1000),
    }
    write_tensors(tmp_path / "a.safetensors", {**tensors, **extra}, {"sfumato": config.to_json()})
    done = convert(open_model(tmp_path / "a.safetensors").opened, tmp_path / "folder")
    assert {rule: len(names) for rule, names in done.left_out.items()} == {
        "unused last layer": 12, "unused projection": 1, "logit scale": 1, "ema": 1, "schedule buffers": 1,
    }  # fmt: skip
    # The same layout holds all but the EMA; bit by bit, and buffers stay as they are.
    done = convert(open_model(tmp_path / "a.safetensors").opened, tmp_path / "b.safetensors")
    assert list(done.left_out) == ["ema"]
    del extra["model_ema.decay"]
    assert equal_tensors(load_file(tmp_path / "b.safetensors"), {**tensors, **extra})
    convert(open_model(tmp_path / "a.safetensors").opened, tmp_path / "c.safetensors", dtype=torch.float16)
    half = load_file(tmp_path / "c.safetensors")
    assert half["betas"].dtype == torch.float32
    assert {value.dtype for key, value in half.items() if "resblocks.2" in key} == {torch.float16}


def test_one_number_format_rounds_once(tmp_path: Path, sd_file: Path, sd_tensors: State) -> None:
    convert(open_model(sd_file).opened, tmp_path / "a.safetensors", dtype=torch.bfloat16)
    narrow = {name: tensor.bfloat16() for name, tensor in sd_tensors.items()}
    assert equal_tensors(load_file(tmp_path / "a.safetensors"), narrow)
    convert(open_model(tmp_path / "a.safetensors").opened, tmp_path / "b")
    assert (
        load_file(tmp_path / "b" / "text_encoder" / "model.safetensors").popitem()[1].dtype == torch.bfloat16
    )


def test_values_that_a_format_cannot_hold(tmp_path: Path, sd_tensors: State) -> None:
    name = "model.diffusion_model.out.2.bias"
    write_tensors(tmp_path / "a.safetensors", {**sd_tensors, name: sd_tensors[name] + 1e6}, {})
    opened = open_model(tmp_path / "a.safetensors").opened
    for out in (tmp_path / "b.safetensors", tmp_path / "folder"):
        with pytest.raises(NumericalError, match=r"too large for torch\.float16; nothing was written"):
            convert(opened, out, dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("only", ["unet", "vae", "text"])
@pytest.mark.parametrize("name", ["part.safetensors", "part"])
def test_one_part_alone(
    tmp_path: Path, sd_file: Path, sd_states: dict[str, State], equal: Equal, only: str, name: str
) -> None:
    done = convert(open_model(sd_file).opened, tmp_path / name, only=only)
    part = {"vae": "autoencoder"}.get(only, only)
    assert list(done.parts) == [part] and len(done.left_out) == 2
    file = open_model(tmp_path / name)
    assert list(file.modules) == [part] and equal(file.modules[part], sd_states[part])
    if only == "vae":
        assert file.config.latent_scale == 0.18215
        names = load_file(tmp_path / name) if name.endswith("s") else {"encoder.conv_in.weight": 0}
        assert "encoder.conv_in.weight" in names  # no prefix, as in the released files of autoencoders


def test_another_autoencoder_baked_in(
    tmp_path: Path, sd_file: Path, sd_states: dict[str, State], equal: Equal
) -> None:
    other = {name: value + 1 for name, value in sd_states["autoencoder"].items()}
    write_tensors(tmp_path / "vae.safetensors", other, {})
    convert(open_model(sd_file, vae=tmp_path / "vae.safetensors").opened, tmp_path / "b.safetensors")
    file = open_model(tmp_path / "b.safetensors")
    assert equal(file.modules["autoencoder"], other) and equal(file.modules["unet"], sd_states["unet"])


def test_the_metadata_that_other_tools_read(tmp_path: Path, sd_file: Path) -> None:
    convert(open_model(sd_file, prediction="v").opened, tmp_path / "a.safetensors")
    convert(open_model(sd_file, prediction="v").opened, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    metadata = dict(open_file(tmp_path / "a.safetensors").metadata)
    assert json.loads(metadata.pop("sfumato"))["prediction"] == "v"
    assert metadata.pop("modelspec.architecture")
    assert metadata == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "sfumato",
        "modelspec.title": "sd",
        "modelspec.prediction_type": "v",
        "modelspec.resolution": "512x512",
    }
    released = {"sd1": "v1", "sd2": "v2-768-v", "sdxl": "xl-v1-base"}
    from sfumato.checkpoints.metadata import describe

    for name, architecture in released.items():
        values = describe(MODELS[name], name, PARTS)
        assert values["modelspec.architecture"] == f"stable-diffusion-{architecture}"


def test_flags_of_an_sdxl_that_predicts_v(tmp_path: Path) -> None:
    config = dataclasses.replace(
        MODELS["sdxl"], prediction="v", schedule=ScheduleConfig(zero_terminal_snr=True)
    )
    single_file(tmp_path / "a.safetensors", config, states_of(config))
    convert(open_model(tmp_path / "a.safetensors").opened, tmp_path / "c.safetensors")
    tensors = load_file(tmp_path / "c.safetensors")
    assert tensors["v_pred"].shape == tensors["ztsnr"].shape == (0,)
    opened = open_model(tmp_path / "c.safetensors").opened
    assert opened.ignored == {"prediction flags": ("v_pred", "ztsnr")}
    convert(opened, tmp_path / "d.safetensors")
    assert equal_tensors(load_file(tmp_path / "d.safetensors"), tensors)


def test_places_that_are_refused(tmp_path: Path, sd_file: Path, sd_folder: Path) -> None:
    source = Path(shutil.copy(sd_file, tmp_path / "a.safetensors"))
    opened = open_model(source).opened
    with pytest.raises(InputError, match="is there already"):
        convert(opened, source)
    with pytest.raises(InputError, match="is what is read"):
        convert(opened, source, force=True)
    (tmp_path / "link.safetensors").symlink_to(source)
    with pytest.raises(InputError, match="is what is read"):
        convert(opened, tmp_path / "link.safetensors", force=True)
    with pytest.raises(InputError, match="is what is read, or holds it"):
        convert(opened, tmp_path, layout="diffusers", force=True)
    with pytest.raises(InputError, match=r"written as \.safetensors, not as 'b\.ckpt'") as caught:
        convert(opened, tmp_path / "b.ckpt")
    assert "b.safetensors" in caught.value.hint
    with pytest.raises(InputError, match="there is no layout 'kohya'"):
        convert(opened, tmp_path / "b", layout="kohya")
    with pytest.raises(InputError, match="there is no part 'lora'"):
        convert(opened, tmp_path / "b", only="lora")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.png").write_bytes(b"dear")
    with pytest.raises(InputError, match="is no model's folder"):
        convert(opened, tmp_path / "photos", force=True)
    assert (tmp_path / "photos" / "me.png").read_bytes() == b"dear"
    assert source.stat().st_size == sd_file.stat().st_size and open_model(sd_folder)


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path, sd_file: Path, sd_folder: Path) -> None:
    out = Path(shutil.copytree(sd_folder, tmp_path / "out"))
    (out / "old.txt").write_text("old")
    convert(open_model(sd_file).opened, out, force=True)
    assert not (out / "old.txt").exists() and open_model(out) and [*tmp_path.iterdir()] == [out]
    convert(open_model(sd_file).opened, tmp_path / "a.safetensors")
    convert(open_model(sd_folder).opened, tmp_path / "a.safetensors", force=True)
    assert open_model(tmp_path / "a.safetensors").config.name == sd_folder.name


@pytest.mark.parametrize("out", ["b.safetensors", "folder"])
def test_a_failure_leaves_what_was_there(
    tmp_path: Path, sd_file: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    place = tmp_path / out
    if out == "folder":
        shutil.copytree(sd_folder, place)
    else:
        shutil.copy(sd_file, place)
    before = {path: path.read_bytes() for path in [place, *place.rglob("*")] if path.is_file()}
    opened = open_model(sd_file).opened
    source = opened.parts["unet"].source

    def read(name: str) -> Tensor:
        if name.endswith("out.2.bias"):
            raise OSError(28, "No space left on device")
        return source.read(name)

    part = dataclasses.replace(opened.parts["unet"], source=dataclasses.replace(source, read=read))
    broken = dataclasses.replace(opened, parts={**opened.parts, "unet": part})
    with pytest.raises(ResourceError, match="No space left on device"):
        convert(broken, place, force=True)
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(ResourceError, match=r"GB and its disk has 0\.00 GB free"):
        convert(opened, place, force=True)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_a_written_file_is_as_the_library_would_write_it(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(7).half(),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "ids": torch.arange(5)[None],
        "brain": torch.randn(2, 2).bfloat16(),
        "turned": torch.randn(4, 6).T,
        "flags": torch.tensor([True, False]),
    }
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    asked: list[str] = []
    path = tmp_path / "a.safetensors"
    write_stream(path, infos, lambda name: (asked.append(name), tensors[name])[1], {"key": "ünicode"})
    assert equal_tensors(load_file(path), tensors) and sorted(asked) == sorted(tensors)
    assert read_tensors(path)[1] == {"key": "ünicode"}
    own = open_file(path)
    assert {name: own.infos[name] for name in infos} == infos
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert header % 8 == 0
    assert path.stat().st_size == 8 + header + sum(t.nbytes for t in tensors.values())


# diffusers itself


@pytest.fixture(scope="module")
def diffusers() -> Any:
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    return diffusers


PIPELINES = {"sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline",
             "sdxl": "StableDiffusionXLPipeline", "inpainting": "StableDiffusionInpaintPipeline"}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["sd1", "sdxl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd2", "inpainting"))]
)
@torch.no_grad()
def test_diffusers_opens_what_is_written(tmp_path: Path, diffusers: Any, name: str) -> None:
    config = MODELS[name]
    single_file(tmp_path / "a.safetensors", config, states_of(config))
    convert(open_model(tmp_path / "a.safetensors").opened, tmp_path / "folder")
    kind = getattr(diffusers, PIPELINES[name])
    pipeline = kind.from_pretrained(tmp_path / "folder", local_files_only=True)
    assert type(pipeline).__name__ == PIPELINES[name]
    model = sfumato.load(tmp_path / "folder", device="cpu")

    assert config.unet is not None
    x, t = torch.randn(1, config.unet.in_channels, 8, 8), torch.tensor([3])
    context = torch.randn(1, 5, config.unet.context_dim or 1)
    added = {"text_embeds": torch.randn(1, 12), "time_ids": torch.randint(0, 64, (1, 6)).float()}
    vector = None
    if config.text2 is not None:
        from sfumato.nn.layers import timestep_embedding

        ids = timestep_embedding(added["time_ids"].flatten(), 256).reshape(1, -1)
        vector = torch.cat([added["text_embeds"], ids], dim=1)
    theirs = pipeline.unet(x, t, context, added_cond_kwargs=added if vector is not None else None).sample
    assert torch.allclose(theirs, model.unet(x, t, context, vector), atol=1e-4, rtol=1e-4)

    latents = torch.randn(1, 4, 4, 4)
    assert model.autoencoder is not None
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    assert torch.allclose(decoded, model.decode_latents(latents), atol=1e-4)
    prompts = ["a red apple", ""]
    if name == "sdxl":
        found = pipeline.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
        assert torch.allclose(found[0], condition(model, prompts), atol=1e-5)
    else:
        found = pipeline.encode_prompt(prompts, "cpu", 1, False)[0]
        assert torch.allclose(found, condition(model, prompts), atol=1e-5)
    assert (
        pipeline.scheduler.config.prediction_type
        == {"eps": "epsilon", "v": "v_prediction"}[config.prediction]
    )


def condition(model: Any, prompts: list[str]) -> Tensor:
    return model.encode_prompt(prompts).context


def test_diffusers_opens_a_single_file(tmp_path: Path, diffusers: Any) -> None:
    states = states_of(SD1)
    single_file(tmp_path / "a.safetensors", SD1, states)
    opened = open_model(tmp_path / "a.safetensors").opened
    convert(opened, tmp_path / "folder")
    convert(opened, tmp_path / "b.safetensors", dtype=torch.float16)
    for path in ("a.safetensors", "b.safetensors"):
        one = diffusers.StableDiffusionPipeline.from_single_file(
            str(tmp_path / path), config=str(tmp_path / "folder"), local_files_only=True
        )
        other = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
        for part in ("unet", "vae", "text_encoder"):
            given, wanted = getattr(one, part).state_dict(), getattr(other, part).state_dict()
            close = 0 if path.startswith("a") else 1e-3
            assert given.keys() == wanted.keys()
            assert all(
                torch.allclose(given[key].float(), wanted[key], atol=close, rtol=close) for key in given
            )


def test_what_diffusers_writes_opens_here(tmp_path: Path, diffusers: Any, equal: Equal) -> None:
    single_file(tmp_path / "a.safetensors", MODELS["sdxl"], states := states_of(MODELS["sdxl"]))
    convert(open_model(tmp_path / "a.safetensors").opened, tmp_path / "folder")
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    for name, options in {
        "plain": {},
        "pickle": {"safe_serialization": False},
        "shards": {"max_shard_size": "200KB"},
        "variant": {"variant": "fp16"},
    }.items():
        pipeline.save_pretrained(tmp_path / name, **options)
        file = open_model(tmp_path / name)
        assert all(equal(file.modules[part], state) for part, state in states.items()), name
        assert not file.opened.unknown and file.config.tokenizer == clip_json()
        assert file.config.image_size == (64, 64)
