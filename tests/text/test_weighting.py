"""Weights on the text encoder's states, in both dialects, and prompts of any length through the encoders."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sfumato.errors import InputError
from sfumato.nn.clip import CLIPTextConfig, CLIPTextEncoder
from sfumato.text.chunks import chunked
from sfumato.text.emphasis import Dialect, segments
from sfumato.text.encode import Sizes, encode_prompts, encode_two_towers, encode_weighted
from sfumato.text.tokenizer import Tokenizer
from sfumato.text.weighting import restore_mean, weighted

LENGTH = 10
DIALECTS: tuple[Dialect, ...] = ("a1111", "comfyui")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a red fox", "a blue fox", "a red house"], 530, LENGTH)


def encoder_of(tokenizer: Tokenizer, seed: int, **changes: Any) -> CLIPTextEncoder:
    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 3, "num_attention_heads": 2,
        "max_position_embeddings": LENGTH, "eos_token_id": tokenizer.end_id,
    }  # fmt: skip
    encoder = CLIPTextEncoder(CLIPTextConfig(**{**values, **changes})).eval().requires_grad_(False)
    torch.nn.init.normal_(encoder.text_model.final_layer_norm.bias)
    return encoder


@pytest.fixture(scope="module")
def encoder(tokenizer: Tokenizer) -> CLIPTextEncoder:
    return encoder_of(tokenizer, 0)


@pytest.fixture(scope="module")
def towers(tokenizer: Tokenizer) -> tuple[CLIPTextEncoder, CLIPTextEncoder]:
    return encoder_of(tokenizer, 1), encoder_of(
        tokenizer, 2, hidden_size=24, projection_dim=8, pad_token_id=0
    )


def by_hand(states: Tensor, weights: list[float], empty: Tensor, dialect: Dialect) -> np.ndarray:
    """One row's weighted states in float64, token by token."""
    rows, blank = states.double().numpy(), empty.double().numpy()
    if dialect == "comfyui":
        return np.stack([blank[i] + (rows[i] - blank[i]) * weight for i, weight in enumerate(weights)])
    scaled = np.stack([row * weight for row, weight in zip(rows, weights, strict=True)])
    return scaled * (rows.sum() / scaled.sum())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_states_follow_the_formula(dialect: Dialect) -> None:
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(4, 77, 64, generator=generator) + 0.3
    empty = torch.randn(77, 64, generator=generator)
    weights = torch.rand(4, 77, generator=generator) * 2
    weights[2] = 1
    result = weighted(states, weights, empty, dialect)
    for row in range(4):
        expected = by_hand(states[row], weights[row].double().tolist(), empty, dialect)
        assert np.abs(result[row].numpy() - expected).max() < 1e-6 * max(1, np.abs(expected).max())
    assert torch.equal(result[2], states[2])


def test_weight_one_is_untouched_and_zero_is_the_empty_prompt_in_comfyui() -> None:
    states, empty = torch.randn(1, 3, 256), 10 * torch.randn(3, 256)
    result = weighted(states, torch.tensor([[1.0, 0.0, 2.0]]), empty, "comfyui")
    assert torch.equal(result[0, 0], states[0, 0])
    torch.testing.assert_close(result[0, 1], empty[1])
    torch.testing.assert_close(result[0, 2], 2 * states[0, 2] - empty[2])


def test_the_mean_is_restored_and_a_mean_of_zero_is_no_error() -> None:
    states = torch.rand(2, 5, 8)
    result = weighted(states, torch.rand(2, 5) + 0.5, None, "a1111")
    torch.testing.assert_close(result.mean(dim=(1, 2)), states.mean(dim=(1, 2)))
    assert torch.equal(restore_mean(torch.zeros(1, 2, 2), states[:1, :2, :2]), torch.zeros(1, 2, 2))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_half_precision_stays(dialect: Dialect) -> None:
    states = torch.rand(1, 4, 4).to(torch.bfloat16)
    result = weighted(
        states, torch.tensor([[1, 1.5, 0.5, 1]]), torch.zeros(4, 4, dtype=torch.bfloat16), dialect
    )
    assert result.dtype == torch.bfloat16 and not torch.equal(result, states)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("clip_skip", [1, 2])
def test_plain_prompts_are_encoded_as_ever(
    tokenizer: Tokenizer, encoder: CLIPTextEncoder, towers: tuple[CLIPTextEncoder, CLIPTextEncoder],
    dialect: Dialect, clip_skip: int,
) -> None:  # fmt: skip
    prompts = ["a red fox", "", "a, b"]
    plain = encode_prompts(prompts, tokenizer, encoder, clip_skip).conditioning.context
    context = encode_weighted(prompts, tokenizer, [encoder], clip_skip, True, dialect=dialect).context
    assert plain is not None and context is not None and torch.equal(context, plain)
    sizes = Sizes((64, 96))
    both = encode_two_towers(prompts, tokenizer, towers, sizes, clip_skip).conditioning
    mine = encode_weighted(prompts, tokenizer, towers, clip_skip, False, sizes, dialect)
    assert mine.context is not None and mine.vector is not None
    assert both.context is not None and both.vector is not None
    assert torch.equal(mine.context, both.context) and torch.equal(mine.vector, both.vector)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_weights_and_rows_through_the_encoder(
    tokenizer: Tokenizer, encoder: CLIPTextEncoder, dialect: Dialect
) -> None:
    text = "a (red:1.4) fox, [blue] house BREAK a (fox:0.3) a a a a a a a a"
    context = encode_weighted([text], tokenizer, [encoder], 2, True, dialect=dialect).context
    chunks = chunked(segments(text, dialect), tokenizer, LENGTH)
    assert context is not None and context.shape == (1, len(chunks) * LENGTH, 16) and len(chunks) >= 3
    norm = encoder.text_model.final_layer_norm
    empty = norm(encoder(tokenizer.batch([""], LENGTH)[0]).hidden_states[-2])[0]
    for index, chunk in enumerate(chunks):
        states = norm(encoder(torch.tensor([chunk.tokens])).hidden_states[-2])[0]
        expected = by_hand(states, list(chunk.weights), empty, dialect)
        found = context[0, index * LENGTH : (index + 1) * LENGTH]
        torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


def test_two_towers_pool_the_first_row(
    tokenizer: Tokenizer, towers: tuple[CLIPTextEncoder, CLIPTextEncoder]
) -> None:
    sizes = Sizes((64, 64))
    long = encode_weighted(["(a red:2) fox BREAK blue", "a"], tokenizer, towers, 2, False, sizes)
    short = encode_weighted(["a red fox", "a"], tokenizer, towers, 2, False, sizes)
    assert long.context is not None and long.context.shape == (2, 2 * LENGTH, 40)
    assert long.vector is not None and short.vector is not None
    torch.testing.assert_close(long.vector, short.vector)  # not weighted either
    assert short.context is not None
    torch.testing.assert_close(long.context[1, :LENGTH], short.context[1])
    empty = encode_weighted([""], tokenizer, towers, 2, False, sizes).context
    assert empty is not None
    torch.testing.assert_close(long.context[1, LENGTH:], empty[0])


def test_learned_vectors_stand_for_their_names(tokenizer: Tokenizer, encoder: CLIPTextEncoder) -> None:
    table = encoder.text_model.embeddings.token_embedding
    red, fox = (table.weight[tokenizer.encode(word)[0]] for word in ("red", "fox"))
    assert len(tokenizer.encode("red")) == len(tokenizer.encode("fox")) == 1
    vectors = {"q": [torch.stack([red, fox])]}
    for text in ("a q a", "a embedding:q a"):
        named = encode_weighted([text, "a"], tokenizer, [encoder], 1, True, vectors=vectors).context
        words = encode_weighted(["a red fox a", "a"], tokenizer, [encoder], 1, True).context
        assert named is not None and words is not None
        torch.testing.assert_close(named, words)
    assert not table._forward_hooks
    plain = encode_weighted(["a q a"], tokenizer, [encoder], 1, True).context
    assert plain is not None and not torch.allclose(plain, words[:1])


def test_the_encoder_is_left_alone_after_an_error(tokenizer: Tokenizer, encoder: CLIPTextEncoder) -> None:
    with pytest.raises(RuntimeError):
        encode_weighted(["q"], tokenizer, [encoder], 1, True, vectors={"q": [torch.zeros(1, 5)]})
    assert not encoder.text_model.embeddings.token_embedding._forward_hooks
    with pytest.raises(InputError, match=r"allows 1 \(the last layer\) to 3"):
        encode_weighted(["a"], tokenizer, [encoder], 4, True)


def test_more_weight_goes_further(tokenizer: Tokenizer, encoder: CLIPTextEncoder) -> None:
    plain = encode_weighted(["a red fox"], tokenizer, [encoder], 1, True).context
    for dialect in DIALECTS:
        distances = []
        for weight in ("1", "1.2", "1.5", "2"):
            text = f"a (red:{weight}) fox"
            context = encode_weighted([text], tokenizer, [encoder], 1, True, dialect=dialect).context
            assert context is not None and plain is not None
            distances.append(float((context - plain).norm()))
        assert distances[0] == 0 and all(one < two for one, two in pairwise(distances))
