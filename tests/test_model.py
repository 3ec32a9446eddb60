"""The model as one object: prompts, pictures and latents in and out, sizes, devices and number formats."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sfumato
from sfumato.conditioning import Conditioning
from sfumato.errors import CheckpointError, InputError
from sfumato.model import EMBEDDED, StableDiffusion
from sfumato.nn.classes import ClassEmbedderConfig
from sfumato.nn.layers import timestep_embedding
from sfumato.nn.unet import UNet
from sfumato.nn.vq import VQModel
from sfumato.presets import PARTS, ModelConfig
from sfumato.text.tokenizer import CLIP_VOCABULARY, Tokenizer, clip_json


def test_pictures_become_scaled_latents_and_come_back(tiny_model: StableDiffusion) -> None:
    pictures = torch.rand(2, 3, 16, 8) * 2 - 1
    latents = tiny_model.encode_image(pictures)
    assert latents.shape == (2, 2, 8, 4) and tiny_model.autoencoder is not None
    tiny_model.latent_scale = 4.0
    assert torch.allclose(tiny_model.encode_image(pictures), 4 * latents)
    back = tiny_model.decode_latents(4 * latents)
    assert back.shape == pictures.shape and back.dtype == torch.float32
    assert torch.allclose(back, tiny_model.autoencoder.decode(latents), atol=1e-6)


def test_pixels_are_their_own_latents(pixel_model: StableDiffusion) -> None:
    pictures = torch.rand(1, 1, 8, 8)
    assert torch.equal(pixel_model.encode_image(pictures), pictures)
    assert torch.equal(pixel_model.decode_latents(pictures), pictures)
    assert pixel_model.downsampling == 1


def test_prompts_become_contexts(tiny_model: StableDiffusion) -> None:
    cond = tiny_model.encode_prompt(["a red apple", ""])
    assert cond.context is not None and cond.context.shape == (2, 8, 16) and not cond.context.requires_grad
    empty = tiny_model.uncondition(3).context
    assert empty is not None and torch.allclose(empty, cond.context[1:].expand(3, -1, -1), atol=1e-6)
    assert tiny_model.prompt_cuts(["a red apple", "a red apple and a green pear"])[0] == ""
    assert tiny_model.prompt_cuts(["a red apple and a green pear, all on a table"])[0] != ""


def test_a_model_without_text(pixel_model: StableDiffusion) -> None:
    assert pixel_model.uncondition(2) == Conditioning() and pixel_model.prompt_cuts(["a"]) == [""]
    with pytest.raises(InputError, match="'pixels' has no text encoder"):
        pixel_model.encode_prompt(["a"])


def test_sizes_that_the_networks_can_take(tiny_model: StableDiffusion, pixel_model: StableDiffusion) -> None:
    assert tiny_model.latent_shape(16, 32) == (2, 8, 16)
    assert pixel_model.latent_shape(6, 8) == (1, 6, 8)
    with pytest.raises(InputError, match=r"cannot draw 30x17 pixels; .* multiples of 4") as caught:
        tiny_model.latent_shape(17, 30)
    assert "32x16 (width x height)" in caught.value.hint


@pytest.mark.parametrize(("dims", "sides", "shape"), [(1, (32,), (1, 32)), (3, (4, 8, 16), (1, 4, 8, 16))])
def test_sizes_of_sequences_and_volumes(
    pixel_model: StableDiffusion, dims: int, sides: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    unet = dataclasses.replace(pixel_model.unet.config, dims=dims)
    config = dataclasses.replace(pixel_model.config, unet=unet, image_size=sides)
    model = StableDiffusion(config, {"unet": UNet(unet)})
    assert model.latent_shape(1 if dims == 1 else sides[-2], sides[-1]) == shape


def test_concatenated_conditions_are_more_channels(pixel_model: StableDiffusion) -> None:
    unet = UNet(dataclasses.replace(pixel_model.unet.config, in_channels=3))
    model = StableDiffusion(pixel_model.config, {"unet": unet})
    x, t, concat = torch.randn(2, 1, 8, 8), torch.zeros(2), torch.randn(2, 2, 8, 8)
    assert model.network(x, t, Conditioning(concat=concat)).shape == x.shape
    with pytest.raises(InputError):
        model.network(x, t, Conditioning())


def test_a_copy_in_float32_leaves_the_model_alone(tiny_model: StableDiffusion) -> None:
    narrow = tiny_model.to(torch.device("cpu"), torch.bfloat16)
    wide = narrow.float32()
    assert narrow.dtype == torch.bfloat16 and wide.dtype == torch.float32 and wide.text_encoder is not None
    assert next(wide.text_encoder.parameters()).dtype == torch.float32
    assert wide.unet is not narrow.unet and wide.name == narrow.name
    assert wide.device == torch.device("cpu")


class Unloaded(Mapping[str, nn.Module]):
    """The parts of a configuration, each built when it is asked for; `asked` lists which were."""

    def __init__(self, model: StableDiffusion) -> None:
        found = {part: getattr(model, ATTRIBUTES[part]) for part in PARTS}
        self.parts = {part: module for part, module in found.items() if module is not None}
        self.asked: list[str] = []

    def __getitem__(self, part: str) -> nn.Module:
        self.asked.append(part)
        return self.parts[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


ATTRIBUTES = {
    "unet": "unet", "autoencoder": "autoencoder", "text": "text_encoder", "text2": "text_encoder2",
    "bert": "bert", "classes": "classes", "preview": "preview_decoder",
}  # fmt: skip


def test_parts_are_built_when_first_used(tiny_xl_model: StableDiffusion) -> None:
    parts = Unloaded(tiny_xl_model)
    model = StableDiffusion(tiny_xl_model.config, parts, lambda: "0" * 64)
    model.to(torch.device("cpu"), torch.bfloat16)
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.bfloat16)
    assert model.latent_shape(16, 16) == (2, 8, 8) and model.downsampling == 2
    assert model.prompt_cuts(["a red apple"]) == [""] and model.predictor() is not None
    zeros = model.uncondition(2).context
    assert zeros is not None and zeros.shape == (2, 8, 40) and zeros.dtype == torch.bfloat16
    assert parts.asked == []
    context = model.encode_prompt(["a red apple"]).context
    assert (
        context is not None and context.dtype == torch.bfloat16 and sorted(parts.asked) == ["text", "text2"]
    )
    wide = model.float32()
    assert wide.dtype == torch.float32 and len(parts.asked) == 2
    again = wide.encode_prompt(["a red apple"]).context
    assert again is not None and again.dtype == torch.float32 and len(parts.asked) == 2
    model.decode_latents(torch.zeros(1, 2, 4, 4))
    assert parts.asked[2:] == ["autoencoder"] and model.unet is model.unet and parts.asked[3:] == ["unet"]
    assert next(model.unet.parameters()).dtype == torch.bfloat16
    assert next(wide.unet.parameters()).dtype == torch.float32 and model.dtype == torch.bfloat16
    assert model.digest == "0" * 64


def test_parts_that_are_built_are_moved(tiny_model: StableDiffusion) -> None:
    unet = tiny_model.unet
    tiny_model.to(torch.device("cpu"), torch.float16)
    assert tiny_model.unet is unet and next(unet.parameters()).dtype == torch.float16
    assert tiny_model.text_encoder is not None
    assert next(tiny_model.text_encoder.parameters()).dtype == torch.float16


MISFITS: list[tuple[str, dict[str, Any], str]] = [
    ("unet", {"out_channels": 1}, "the U-Net has 1 channels, latents 2"),
    ("unet", {"in_channels": 1}, r"unet\.in_channels is 1, unet\.out_channels 2"),
    ("unet", {"context_dim": 16}, r"unet\.context_dim is 16, text\.hidden_size 16 \+ text2\.hidden_size 24"),
    ("unet", {"adm_in_channels": 12}, r"unet\.adm_in_channels is 12; text2's pooled vector has 12 numbers"),
    ("text2", {"projection_dim": None}, "text2's pooled vector has 24 numbers, the sizes 1536"),
    (
        "text",
        {"vocab_size": 500, "eos_token_id": 1},
        "the tokenizer has 5[0-9]+ tokens, the text encoder 500",
    ),
    ("text2", {"vocab_size": 500, "eos_token_id": 1}, "the text encoder 500"),
]


@pytest.mark.parametrize(("part", "changes", "words"), MISFITS)
def test_parts_that_do_not_fit(
    tiny_xl_model: StableDiffusion, part: str, changes: dict[str, Any], words: str
) -> None:
    parts, old = Unloaded(tiny_xl_model), tiny_xl_model.config
    config = dataclasses.replace(old, **{part: dataclasses.replace(getattr(old, part), **changes)})
    with pytest.raises(InputError, match=words):
        StableDiffusion(config, parts)
    assert parts.asked == []


def test_parts_that_the_config_does_not_have(
    tiny_model: StableDiffusion, tiny_bert_model: StableDiffusion, tiny_class_model: StableDiffusion
) -> None:
    config, parts = tiny_model.config, dict(Unloaded(tiny_model))
    with pytest.raises(CheckpointError, match="has no U-Net"):
        StableDiffusion(config, {"autoencoder": parts["autoencoder"]})
    with pytest.raises(InputError, match="describes autoencoder, text, unet; given are autoencoder, unet"):
        StableDiffusion(config, {"unet": parts["unet"], "autoencoder": parts["autoencoder"]})
    both = dataclasses.replace(config, bert=tiny_bert_model.config.bert)
    with pytest.raises(InputError, match="'tiny' has text and bert"):
        StableDiffusion(both, parts | {"bert": nn.Identity()})
    alone = dataclasses.replace(config, text=None, text2=config.text)
    with pytest.raises(InputError, match="'tiny' has text2"):
        StableDiffusion(alone, {"unet": nn.Identity(), "autoencoder": nn.Identity(), "text2": nn.Identity()})
    with pytest.raises(InputError, match="the tokenizer has no tokens"):
        StableDiffusion(dataclasses.replace(config, tokenizer=None), parts)
    other = dataclasses.replace(config, tokenizer=tiny_bert_model.config.tokenizer)
    with pytest.raises(InputError, match=r"the tokenizer has 1[0-9] tokens"):
        StableDiffusion(other, parts)
    classes = tiny_class_model.config
    assert classes.unet is not None
    narrow = dataclasses.replace(classes, unet=dataclasses.replace(classes.unet, context_dim=8))
    with pytest.raises(InputError, match=r"unet\.context_dim is 8, classes\.embed_dim 16"):
        StableDiffusion(narrow, dict(Unloaded(tiny_class_model)))


def test_clips_tokenizer_waits_for_a_prompt(tiny_model: StableDiffusion) -> None:
    text = tiny_model.config.text
    assert text is not None
    for vocab_size, fits in ((49408, True), (49407, False)):
        config = dataclasses.replace(
            tiny_model.config,
            tokenizer=clip_json(),
            text=dataclasses.replace(text, vocab_size=vocab_size, eos_token_id=1),
        )
        if fits:
            model = StableDiffusion(config, dict(Unloaded(tiny_model)))
            assert "tokenizer" not in vars(model)
            assert isinstance(model.tokenizer, Tokenizer) and model.tokenizer.vocab_size == CLIP_VOCABULARY
        else:
            with pytest.raises(InputError, match="the tokenizer has 49408 tokens"):
                StableDiffusion(config, dict(Unloaded(tiny_model)))


def test_two_text_encoders_give_a_context_and_a_vector(tiny_xl_model: StableDiffusion) -> None:
    cond = tiny_xl_model.encode_prompt(["a red apple", "a fox"])
    assert cond.context is not None and cond.context.shape == (2, 8, 40)
    assert cond.vector is not None and cond.vector.shape == (2, 12 + 6 * 256)
    own = tiny_xl_model.encode_prompt(["a red apple"], 2, size=(16, 16), original=(16, 16), crop=(0, 0))
    assert own.vector is not None and torch.allclose(own.vector, cond.vector[:1], atol=1e-6)
    other = tiny_xl_model.encode_prompt(["a red apple"], 1, size=(16, 8), original=(32, 8), crop=(1, 2))
    assert other.vector is not None and other.context is not None
    assert not torch.allclose(other.context, cond.context[:1], atol=1e-3)
    numbers = torch.stack(other.vector[0, 12:].chunk(6))
    expected = timestep_embedding(torch.tensor([32, 8, 1, 2, 16, 8]), 256)
    assert torch.equal(numbers, expected)
    empty = tiny_xl_model.uncondition(1)
    assert empty.vector is not None and empty.context is not None and not empty.context.any()
    assert not empty.vector[:, :12].any() and torch.equal(empty.vector[:, 12:], cond.vector[:1, 12:])
    encoded, wanted = tiny_xl_model.uncondition(1, zeros=False), tiny_xl_model.encode_prompt([""])
    assert encoded.context is not None and wanted.context is not None
    assert torch.equal(encoded.context, wanted.context)


def test_wordpieces_give_a_context(tiny_bert_model: StableDiffusion) -> None:
    cond = tiny_bert_model.encode_prompt(["a red apple", ""])
    assert cond.context is not None and cond.context.shape == (2, 8, 16) and cond.vector is None
    empty = tiny_bert_model.uncondition(1).context
    assert empty is not None and torch.allclose(empty, cond.context[1:], atol=1e-6)
    assert tiny_bert_model.prompt_cuts(["a red apple", "a fox in a snowy forest a fox"]) == ["", "a fox"]
    with pytest.raises(InputError, match="clip_skip is 2"):
        tiny_bert_model.encode_prompt(["a"], 2)


def test_a_vocabulary_that_nobody_gave(tiny_bert_model: StableDiffusion) -> None:
    config = dataclasses.replace(tiny_bert_model.config, tokenizer=None)
    model = StableDiffusion(config, dict(Unloaded(tiny_bert_model)))
    assert model.prompt_cuts(["a"]) == [""]
    with pytest.raises(InputError, match="reads prompts with BERT's vocabulary") as caught:
        model.encode_prompt(["a"])
    assert "vocab.txt" in caught.value.hint


def test_classes_give_a_context(tiny_class_model: StableDiffusion) -> None:
    table = tiny_class_model.classes
    assert table is not None
    cond = tiny_class_model.encode_label([2, 0])
    assert cond.context is not None and torch.equal(cond.context[:, 0], table.embedding.weight[[2, 0]])
    empty = tiny_class_model.uncondition(2).context
    assert empty is not None and torch.equal(empty[:, 0], table.embedding.weight[[3, 3]])
    with pytest.raises(InputError, match="the label is 4; 'tiny-classes' has labels: 0 to 3"):
        tiny_class_model.encode_label([4])
    with pytest.raises(InputError, match="no text encoder"):
        tiny_class_model.encode_prompt(["a"])
    table_config = ClassEmbedderConfig(4, 16, unconditional=False)
    config = dataclasses.replace(tiny_class_model.config, classes=table_config)
    model = StableDiffusion(config, dict(Unloaded(tiny_class_model)))
    assert model.uncondition(1) == Conditioning()


def test_a_codebook_is_applied_on_decoding(tiny_class_model: StableDiffusion) -> None:
    first_stage = tiny_class_model.autoencoder
    assert isinstance(first_stage, VQModel)
    pictures = torch.rand(1, 3, 8, 8) * 2 - 1
    latents = tiny_class_model.encode_image(pictures)
    assert torch.equal(latents, first_stage.encode(pictures).mode())
    codes = first_stage.quantize(latents)
    assert not torch.allclose(latents, codes, atol=1e-3)
    drawn = tiny_class_model.decode_latents(latents)
    assert torch.allclose(drawn, tiny_class_model.decode_latents(codes), atol=1e-6)


def test_configs_written_before_are_read(tiny_model: StableDiffusion, tiny_xl_model: StableDiffusion) -> None:
    written = json.loads(tiny_model.config.to_json())
    for name in ("text2", "bert", "classes", "clip_skip", "text_normed", "zeros_for_empty"):
        del written[name]
    del written["autoencoder"]["n_embed"], written["text"]["pad_token_id"]
    assert ModelConfig.from_json(json.dumps(written)) == tiny_model.config
    assert ModelConfig.from_json(tiny_xl_model.config.to_json()) == tiny_xl_model.config
    written["clip_skip"] = 0
    with pytest.raises(CheckpointError, match="clip_skip is 0"):
        ModelConfig.from_json(json.dumps(written))


def test_load_knows_where_its_file_came_from(tiny_model_file: Path, tmp_path: Path) -> None:
    model = sfumato.load(tiny_model_file, device="cpu")
    assert model.digest is not None and len(model.digest) == 64 and model.name == "tiny"
    assert sfumato.load(str(tiny_model_file), device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match=r"cannot open .*nothing\.safetensors: No such file"):
        sfumato.load(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: No such file"):
        sfumato.load(tmp_path)


def test_the_embedded_model_is_in_the_package() -> None:
    assert EMBEDDED.is_file() and EMBEDDED.stat().st_size <= 32 * 2**20
    model = sfumato.load(device="cpu")
    assert model.text_encoder is not None and model.autoencoder is not None and model.config.notices
    height, width = model.image_size
    assert min(height, width) >= 64 and model.latent_shape(height, width)
