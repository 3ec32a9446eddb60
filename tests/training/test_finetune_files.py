"""What fine-tuning writes is what this package and others read, and draws the same pictures."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from finetune_models import BOTH, METHODS, SD1, SDXL, UNET, networks, tables, written

from sfumato.checkpoints.addons.apply import Weighted, apply_addons, fit, read_embedding, read_lora
from sfumato.checkpoints.addons.write import LowRank, write_embedding, write_lora
from sfumato.checkpoints.controls.load import load_control
from sfumato.checkpoints.files import read_tensors
from sfumato.checkpoints.layouts.tables import pairs, to_foreign
from sfumato.errors import CheckpointError, InputError, NumericalError
from sfumato.generation import draw, generate
from sfumato.model import StableDiffusion
from sfumato.nn.controlnet import ControlNet
from sfumato.request import Request
from sfumato.training.config import TrainingConfig
from sfumato.training.finetune import FinetuneTask
from sfumato.training.run import make_task

CPU = torch.device("cpu")


@pytest.fixture
def task(pictures: Path, tmp_path: Path) -> Callable[..., FinetuneTask]:
    """A function of (method, family, finetune keys) that gives a task whose weights were moved."""

    def make(method: str, family: str, **more: Any) -> FinetuneTask:
        model = written(tmp_path, BOTH[family])
        values = tables(model, tmp_path / "run", pictures, **{**METHODS[method], **more})
        made = make_task(TrainingConfig.model_validate(values), CPU)
        assert isinstance(made, FinetuneTask)
        generator = torch.Generator().manual_seed(7)
        for parameter in made.method.parameters():
            parameter.data += (
                0.3 * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
            )
        return made

    return make


def plain(family: str) -> tuple[StableDiffusion, dict[str, nn.Module]]:
    """The model before anything was trained, and its networks."""
    parts = networks(BOTH[family])
    for part in parts.values():
        part.eval().requires_grad_(False)
    return StableDiffusion(BOTH[family], parts), parts


@torch.no_grad()
@pytest.mark.parametrize("family", BOTH)
@pytest.mark.parametrize("kind", ["attention", "transformer", "convolutions"])
def test_a_written_lora_draws_what_the_trained_one_draws(
    task: Callable[..., FinetuneTask], family: str, kind: str
) -> None:
    made = task("lora", family, lora={"rank": 2, "alpha": 3.0, "targets": kind, "text": True})
    for module in made.modules.values():
        module.eval()
    main = made.method.write(made.config.out)
    prompts = ["a blue square"]
    wanted = made.method.draw(prompts, None)
    model, parts = plain(family)
    without = draw(model, prompts, seeds=[0])
    for path in (main, main.with_name("tuned-peft.safetensors")):
        lora = read_lora(path)
        assert not fit(lora, model.config).unknown
        with apply_addons(model.config, parts, [Weighted(lora)]):
            found = draw(model, prompts, seeds=[0])
        assert (found - wanted).abs().max() <= 1e-5 * max(1.0, float(wanted.abs().max()))
        assert (found - without).abs().max() > 1e-2


def test_kohyas_names_and_metadata(task: Callable[..., FinetuneTask]) -> None:
    for family, start in (("sd1", "lora_unet_down_blocks_1_"), ("sdxl", "lora_unet_input_blocks_3_")):
        tensors, metadata = read_tensors(task("lora", family).method.write(task("lora", family).config.out))
        assert any(name.startswith(start) for name in tensors)
        texts = {name.split("_text_model")[0] for name in tensors if "_te" in name}
        assert texts == ({"lora_te"} if family == "sd1" else {"lora_te1", "lora_te2"})
        assert metadata["ss_network_module"] == "networks.lora"
        assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "1")
        assert metadata["title"] == "tuned"


@torch.no_grad()
def test_diffusers_loads_the_peft_dialect(task: Callable[..., FinetuneTask]) -> None:
    made = task("lora", "sd1", lora={"rank": 2, "alpha": 3.0, "targets": "convolutions"})
    for module in made.modules.values():
        module.eval()
    made.method.write(made.config.out)
    tensors, metadata = read_tensors(made.config.out / "tuned-peft.safetensors")
    unet = diffusers.UNet2DConditionModel(
        sample_size=4, in_channels=2, out_channels=2, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip
    unet.load_state_dict(to_foreign(pairs("unet", UNET, "diffusers"), networks(SD1)["unet"].state_dict()))
    settings = json.loads(metadata["lora_adapter_metadata"])
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 2, 4, 4, generator=generator), torch.randn(2, 5, 16, generator=generator)
    t = torch.tensor([3, 700])
    wanted = made.model.unet(x, t, context)
    before = unet(x, t, context).sample
    for given in (settings, None):  # readers that know the settings, and those that do not
        unet.load_lora_adapter(tensors, prefix="unet", metadata=given)
        found = unet(x, t, context).sample
        assert (found - wanted).abs().max() <= 1e-5 * float(wanted.abs().max()) < (found - before).abs().max()
        unet.unload_lora()


def test_layers_of_joined_attention_are_written_apart(tmp_path: Path) -> None:
    from dataclasses import replace

    config = replace(SD1, unet=replace(UNET, use_spatial_transformer=False, context_dim=None), text=None)
    unet = networks(replace(config, tokenizer=None))["unet"].eval()
    place = next(name for name, _ in unet.named_parameters() if name.endswith("qkv.weight"))
    layer = place.removesuffix(".weight")
    rows, columns, _ = unet.get_parameter(place).shape
    low = LowRank("unet", layer, torch.randn(2, columns, 1), torch.randn(rows, 2, 1), 1.0)
    change = 0.5 * torch.einsum("or,ri->oi", low.up[..., 0], low.down[..., 0])
    for dialect in ("kohya", "peft"):
        path = tmp_path / f"{dialect}.safetensors"
        write_lora(path, config, [low], dialect)
        before = unet.get_parameter(place).detach().clone()
        with apply_addons(config, {"unet": unet}, [Weighted(read_lora(path))]):
            assert torch.allclose(unet.get_parameter(place) - before, change[..., None], atol=1e-6)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    name = "middle_block.1.transformer_blocks.0.attn1.to_q"
    good = LowRank("unet", name, torch.ones(2, 16), torch.ones(16, 2), 2.0)
    with pytest.raises(InputError, match="nowhere"):
        write_lora(path, SD1, [LowRank("unet", "nowhere", good.down, good.up, 1.0)], "kohya")
    with pytest.raises(InputError, match="no layer text2"):
        write_lora(path, SD1, [LowRank("text2", name, good.down, good.up, 1.0)], "kohya")
    with pytest.raises(CheckpointError, match="its weight"):
        write_lora(path, SD1, [LowRank("unet", name, torch.ones(2, 4), good.up, 1.0)], "peft")
    with pytest.raises(InputError, match="dialect"):
        write_lora(path, SD1, [good], "koya")  # type: ignore[arg-type]
    with pytest.raises(NumericalError, match="not finite"):
        write_lora(path, SD1, [LowRank("unet", name, good.down * 1e9, good.up, 1.0)], "peft", torch.float16)
    with pytest.raises(NumericalError, match="not finite"):
        write_embedding(path, "pim", {"text": torch.full((1, 4), torch.inf)}, "a1111")
    assert not path.exists()


@pytest.mark.parametrize("family", BOTH)
def test_a_written_word_is_what_prompts_say(task: Callable[..., FinetuneTask], family: str) -> None:
    made = task("textual_inversion", family)
    path = made.method.write(made.config.out)
    assert path == made.config.out / "embeddings" / "pim.safetensors"
    model, _ = plain(family)
    vectors = {part: value.detach() for part, value in made.method.modules["embedding"].named_parameters()}
    for file in (path, made.config.out / "learned_embeds.safetensors"):
        found = read_embedding(file, model.config).vectors
        assert found.keys() == vectors.keys() and all(torch.equal(found[k], vectors[k]) for k in found)
    if family == "sd1":
        assert read_tensors(path)[0].keys() == {"emb_params"}
        assert read_tensors(made.config.out / "learned_embeds.safetensors")[0].keys() == {"pim"}
    # What it is trained as is what prompts with the file are encoded as.
    trained = made.method.condition(["the (picture) of a pim", "a square"])
    said = model.encode_prompt(
        [r"the \(picture\) of a pim", "a square"], dialect="a1111", vectors={"pim": vectors}
    )
    assert trained.context is not None and said.context is not None
    assert torch.allclose(trained.context, said.context, atol=1e-6)
    if family == "sdxl":
        assert trained.vector is not None and said.vector is not None
        assert torch.allclose(trained.vector, said.vector, atol=1e-6)
    with_word, without = (
        generate(model, Request(prompt="pim", seed=1, embedding_dir=folder)).samples
        for folder in (str(path.parent), None)
    )
    assert (with_word - without).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("family", ["sd1"])
def test_a_written_controlnet_is_read_back(task: Callable[..., FinetuneTask], family: str) -> None:
    made = task("controlnet", family, save_precision="float32")
    network = load_control(made.method.write(made.config.out))
    assert isinstance(network, ControlNet)
    own = made.modules["control"]
    for name, value in network.state_dict().items():
        assert torch.equal(value, own.state_dict()[name])
    assert isinstance(own, ControlNet)
    batch = next(made.batches(0, 4)).pictures
    cond = made.method.condition(["a"] * 4)
    t = torch.tensor([1, 10, 100, 900])
    given = (batch.clean, t, batch.hints, cond.context, cond.vector)
    for a, b in zip(network(*given), own.eval()(*given), strict=True):
        assert (a - b).abs().max() <= 1e-5


def test_sdxl_is_told_how_pictures_were_cut(task: Callable[..., FinetuneTask]) -> None:
    from sfumato.text.encode import Sizes
    from sfumato.training.data import PictureSet
    from sfumato.training.finetune.captions import sized

    made = task("lora", "sdxl")
    batch = next(made.batches(0, 4)).pictures
    assert isinstance(batch.dataset, PictureSet) and SDXL.text2 is not None
    cond = made.method.condition(["a", None, "b", "c"])
    assert cond.context is not None and not cond.context[1].any() and cond.context[0].any()
    vector = sized(made.model, cond, batch.dataset, batch.order).vector
    assert vector is not None
    view = batch.dataset.view(batch.order[2])
    assert view.original == (12, 10)
    assert torch.allclose(vector[2, -6 * 256 :], Sizes(view.size, view.original, view.crop).vector()[0])
