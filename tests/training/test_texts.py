"""Encoded captions: computed once, the right row for each, nothing encoded again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sfumato.conditioning import Conditioning
from sfumato.errors import InputError
from sfumato.training import rows
from sfumato.training.data import Share
from sfumato.training.texts import TextCache

WORDS = [f"caption number {number}" for number in range(70)]


class Counted:
    """An encoder whose values say which text they are of."""

    def __init__(self, pooled: bool = True, most: int = 10**9) -> None:
        self.texts: list[str] = []
        self.pooled, self.most = pooled, most

    def __call__(self, captions: list[str]) -> Conditioning:
        self.texts += captions
        if len(self.texts) > self.most:
            raise KeyboardInterrupt
        numbers = torch.tensor([float(sum(map(ord, text)) % 997) for text in captions])
        context = numbers[:, None, None] + torch.arange(6.0).reshape(2, 3)
        return Conditioning(context, numbers[:, None].repeat(1, 4) if self.pooled else None)


def test_every_caption_has_its_row(tmp_path: Path) -> None:
    for pooled in (True, False):
        encode = Counted(pooled)
        cache = TextCache(WORDS, encode, tmp_path / f"{pooled}.safetensors", "digest", dtype=torch.float32)
        asked = [WORDS[5], "", WORDS[5], WORDS[61]]
        got, wanted = cache(asked), Counted(pooled)(asked)
        assert got.context is not None and wanted.context is not None
        assert torch.equal(got.context, wanted.context)
        assert (got.vector is None) == (not pooled)
        if got.vector is not None and wanted.vector is not None:
            assert torch.equal(got.vector, wanted.vector)
        assert set(encode.texts) == {"", *WORDS}
    with pytest.raises(InputError, match="'another' was not encoded"):
        cache(["another"])


def test_it_is_kept_for_the_same_captions_and_encoders(tmp_path: Path) -> None:
    path = tmp_path / "texts.safetensors"
    first = TextCache(WORDS, Counted(), path, "digest")
    again = Counted()
    second = TextCache(reversed(WORDS), again, path, "digest")
    assert again.texts == []
    a, b = first([WORDS[3]]), second([WORDS[3]])
    assert a.context is not None and b.context is not None
    assert a.context.dtype == torch.float16 and torch.equal(a.context, b.context)
    for captions, digest in ((WORDS[:-1], "digest"), (WORDS, "other")):
        changed = Counted()
        TextCache(captions, changed, path, digest)
        assert len(changed.texts) >= len(captions)
    path.write_bytes(b"damaged")
    repaired = Counted()
    TextCache(WORDS, repaired, path, "other")
    assert len(repaired.texts) > len(WORDS)


def test_a_killed_encoding_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PART_BYTES", 10 * (6 + 4) * 2)
    path, killed = tmp_path / "texts.safetensors", Counted(most=45)
    with pytest.raises(KeyboardInterrupt):
        TextCache(WORDS, killed, path, "digest")
    resumed = Counted()
    cache = TextCache(WORDS, resumed, path, "digest")
    assert len(resumed.texts) == len(WORDS) + 1 - 40, "files of ten"
    got, wanted = cache(WORDS).context, Counted()(WORDS).context
    assert got is not None and wanted is not None and torch.equal(got.float(), wanted)
    other = Counted()
    TextCache(WORDS, other, path, "digest", share=Share(1, 2))
    assert other.texts == []


def test_only_contexts_and_vectors_are_kept(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="contexts and vectors"):
        TextCache(
            WORDS, lambda texts: Conditioning(concat=torch.zeros(len(texts), 1)), tmp_path / "a.st", "d"
        )
