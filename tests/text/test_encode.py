"""Prompts to conditioning: which layer, which norm, and what is told of a cut."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from diffusers.models.embeddings import Timesteps
from transformers import CLIPTextConfig as ReferenceConfig
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sfumato.errors import InputError
from sfumato.nn.clip import CLIPTextConfig, CLIPTextEncoder
from sfumato.text.encode import Sizes, encode_prompts, encode_two_towers
from sfumato.text.tokenizer import END, START, Tokenizer, byte_alphabet

LENGTH = 10


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a red fox", "a blue fox", "a red house"], 530, LENGTH)


@pytest.fixture(scope="module")
def encoder(tokenizer: Tokenizer) -> CLIPTextEncoder:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        eos_token_id=tokenizer.end_id,
    )
    encoder = CLIPTextEncoder(config).eval().requires_grad_(False)
    torch.nn.init.normal_(encoder.text_model.final_layer_norm.bias)
    return encoder


def test_context_is_the_last_layer_normed(tokenizer: Tokenizer, encoder: CLIPTextEncoder) -> None:
    prompts = ["a red fox", "", "🦊"]
    encoded = encode_prompts(prompts, tokenizer, encoder)
    context = encoded.conditioning.context
    assert context is not None and context.shape == (3, LENGTH, 16)
    assert torch.equal(context, encoder(tokenizer.batch(prompts)[0]).last_hidden_state)
    assert encoded.conditioning.vector is None and encoded.cut == ("", "", "")


@pytest.mark.parametrize("clip_skip", [1, 2, 3])
@pytest.mark.parametrize("normed", [True, False])
def test_clip_skip_counts_from_one(
    tokenizer: Tokenizer, encoder: CLIPTextEncoder, clip_skip: int, normed: bool
) -> None:
    context = encode_prompts(["a blue fox"], tokenizer, encoder, clip_skip, normed).conditioning.context
    expected = encoder(tokenizer.batch(["a blue fox"])[0]).hidden_states[4 - clip_skip]
    if normed:
        norm = encoder.text_model.final_layer_norm
        expected = (expected - expected.mean(-1, keepdim=True)) / (
            expected.var(-1, keepdim=True, unbiased=False) + 1e-5
        ).sqrt()
        expected = expected * norm.weight + norm.bias
    torch.testing.assert_close(context, expected)


@pytest.mark.parametrize("clip_skip", [0, -1, 4])
def test_a_layer_that_is_not_there_says_which_are(
    tokenizer: Tokenizer, encoder: CLIPTextEncoder, clip_skip: int
) -> None:
    with pytest.raises(InputError, match=r"allows 1 \(the last layer\) to 3"):
        encode_prompts(["a"], tokenizer, encoder, clip_skip)


def test_cuts_are_told_and_a_batch_changes_nothing(tokenizer: Tokenizer, encoder: CLIPTextEncoder) -> None:
    long = "a red fox a blue fox a Red House"
    encoded = encode_prompts([long, "a red fox"], tokenizer, encoder)
    assert encoded.cut[1] == "" and encoded.cut[0] != "" and long.endswith(encoded.cut[0])
    for row, prompt in enumerate([long, "a red fox"]):
        alone = encode_prompts([prompt], tokenizer, encoder).conditioning.context
        together = encoded.conditioning.rows(row, row + 1).context
        assert alone is not None and together is not None
        torch.testing.assert_close(alone, together, rtol=0, atol=1e-6)


PROMPTS = ["a red fox", "", "a blue house, a red fox and a blue fox", "Fox?"]


def encoder_of(seed: int, **options: Any) -> CLIPTextEncoder:
    """A tiny encoder with random weights, norms included."""
    base: dict[str, Any] = {
        "vocab_size": 530, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 2, "max_position_embeddings": LENGTH, "eos_token_id": 0,
    }  # fmt: skip
    encoder = CLIPTextEncoder(CLIPTextConfig(**{**base, **options})).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in encoder.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.3 * noise if parameter.ndim == 1 else noise / parameter.shape[-1] ** 0.5
    return encoder


def reference_of(encoder: CLIPTextEncoder) -> Any:
    """transformers' model with the same weights."""
    config = encoder.config
    settings: dict[str, Any] = {
        name: getattr(config, name)
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings", "hidden_act", "eos_token_id",
        )
    }  # fmt: skip
    projected = config.projection_dim is not None
    settings |= {"bos_token_id": 1, "pad_token_id": config.pad_id}
    settings |= {"projection_dim": config.projection_dim} if projected else {}
    reference = ReferenceConfig(**settings)
    model: Any = (CLIPTextModelWithProjection if projected else CLIPTextModel)(reference)
    state = encoder.state_dict()
    if "text_model.final_layer_norm.weight" not in model.state_dict():  # by transformers' version
        state = {name.removeprefix("text_model."): value for name, value in state.items()}
    model.load_state_dict(state)
    return model.eval()


def reference_tokenizer(tokenizer: Tokenizer, folder: Path, pad: str) -> Any:
    """transformers' tokenizer of the same merges, from the files that it reads."""
    folder.mkdir()
    lines = [" ".join(pair) for pair in tokenizer.merges]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    tokens = [char + end for end in ("", "</w>") for char in byte_alphabet()]
    tokens += [*dict.fromkeys(line.replace(" ", "") for line in lines), START, END]
    ids = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, pad_token=pad, model_max_length=LENGTH)


def test_openclip_pads_with_zeros(tokenizer: Tokenizer, tmp_path: Path) -> None:
    reference = reference_tokenizer(tokenizer, tmp_path / "tokenizer", pad="!")
    theirs = reference(PROMPTS, padding="max_length", truncation=True)["input_ids"]
    rows, _ = tokenizer.batch(PROMPTS, LENGTH, pad_id=0)
    assert rows.tolist() == theirs and rows[0, -1] == 0
    # A mark in the text is a word for OpenCLIP's own tokenizer; transformers' takes it for padding.
    assert tokenizer.batch(["fox!"], 4, pad_id=0)[0][0, 2] != 0 and reference("fox!")["input_ids"][2] == 0


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_stable_diffusion_2_is_equal_to_transformers(
    tokenizer: Tokenizer, tmp_path: Path, clip_skip: int
) -> None:
    encoder = encoder_of(
        0, vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.end_id, hidden_act="gelu", pad_token_id=0
    )
    context = encode_prompts(PROMPTS, tokenizer, encoder, clip_skip).conditioning.context
    reference = reference_of(encoder)
    tokens = reference_tokenizer(tokenizer, tmp_path / "tokenizer", pad="!")(
        PROMPTS, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        state = reference(tokens, output_hidden_states=True).hidden_states[-clip_skip]
        expected = getattr(reference, "text_model", reference).final_layer_norm(state)
    torch.testing.assert_close(context, expected, rtol=0, atol=1e-5)


def test_two_towers_are_equal_to_diffusers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.end_id}
    first = encoder_of(1, **shared)
    second = encoder_of(2, **shared, hidden_size=24, hidden_act="gelu", projection_dim=20, pad_token_id=0)
    components: Any = {
        "vae": None, "unet": None, "scheduler": DDIMScheduler(),
        "text_encoder": reference_of(first), "text_encoder_2": reference_of(second),
        "tokenizer": reference_tokenizer(tokenizer, tmp_path / "first", END),
        "tokenizer_2": reference_tokenizer(tokenizer, tmp_path / "second", "!"),
    }  # fmt: skip
    pipeline: Any = StableDiffusionXLPipeline(**components, add_watermarker=False)
    sizes = Sizes((64, 32), original=(40, 50), crop=(3, 0))
    for clip_skip in (2, 3):
        with torch.no_grad():
            context, _, pooled, _ = pipeline.encode_prompt(
                PROMPTS, do_classifier_free_guidance=False, clip_skip=clip_skip - 2
            )
        encoded = encode_two_towers(PROMPTS, tokenizer, (first, second), sizes, clip_skip).conditioning
        assert encoded.context is not None and encoded.context.shape == (4, LENGTH, 40)
        torch.testing.assert_close(encoded.context, context, rtol=0, atol=1e-5)
        assert encoded.vector is not None and encoded.vector.shape == (4, 20 + 6 * 256)
        torch.testing.assert_close(encoded.vector[:, :20], pooled, rtol=0, atol=1e-5)
    numbers = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(
        torch.tensor([40, 50, 3, 0, 64, 32])
    )
    torch.testing.assert_close(encoded.vector[:, 20:], numbers.flatten().expand(4, -1), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="clip_skip is 4"):
        encode_two_towers(PROMPTS, tokenizer, (first, second), sizes, 4)


def test_towers_of_half_precision_keep_the_sizes_exact(tokenizer: Tokenizer) -> None:
    shared: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.end_id}
    towers = encoder_of(1, **shared).bfloat16(), encoder_of(2, **shared).bfloat16()
    sizes = Sizes((1023, 1021))
    encoded = encode_two_towers(["a"], tokenizer, towers, sizes).conditioning
    assert encoded.vector is not None and encoded.vector.dtype == torch.float32
    assert torch.equal(encoded.vector[:, 16:], sizes.vector())
    assert torch.equal(sizes.vector(), replace(sizes, original=(1023, 1021)).vector())
