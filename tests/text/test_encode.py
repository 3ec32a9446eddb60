"""Prompts to conditioning: which layer, which norm, and what is told of a cut."""

import pytest
import torch

from sfumato.errors import InputError
from sfumato.nn.clip import CLIPTextConfig, CLIPTextEncoder
from sfumato.text.encode import encode_prompts
from sfumato.text.tokenizer import Tokenizer

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
