"""The WordPiece tokenizer against transformers' BertTokenizer, in Rust and in Python."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertTokenizer
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from sfumato.errors import CheckpointError, InputError
from sfumato.text.encode import read_tokenizer
from sfumato.text.tokenizer import Tokenizer
from sfumato.text.wordpiece import WordPiece

PIECES = [
    "fox",
    "red",
    "a",
    "un",
    "paint",
    "ing",
    "forest",
    "snow",
    "y",
    "ed",
    "s",
    "the",
    "42",
    "東",
    "é",
    "ß",
]
ALPHABET = "abcdefghijklmnoprstuvwy0123456789.,!?'-()#@"
WORDS = [
    "A", "red", "FOX", "painting", "unpainted", "snowy", "forests", "don't", "well-known", "café", "naïve",
    "東京", "x" * 99, "a" * 101, "Straße", "İstanbul", "ﬁne", "…", "🦊", "[SEP]", "[unk]", "##ing", "\u200b",
    "\x07", "\ufffd", "q", "42nd", "Ω", "한국", "e\u0301", "\u3000",
]  # fmt: skip


def vocabulary() -> list[str]:
    """A vocabulary in the order of BERT's: marks, characters, pieces inside words, words."""
    marks = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    inside = ["##" + piece for piece in dict.fromkeys([*ALPHABET[:36], *PIECES])]
    return list(dict.fromkeys([*marks, *ALPHABET, *inside, *PIECES]))


@pytest.fixture(scope="module")
def vocab_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join(vocabulary()) + "\n", encoding="utf-8", newline="\n")
    return path


@pytest.fixture(scope="module")
def ours(vocab_file: Path) -> WordPiece:
    return WordPiece.from_text(vocab_file.read_text(encoding="utf-8"))


def strings(count: int) -> list[str]:
    """Words and single characters of many scripts in random order, with and without spaces."""
    rng = random.Random(0)
    texts = ["", " ", "\t a\nred\r\nfox ", "a red fox, painting."]
    while len(texts) < count:
        parts = [
            rng.choice(WORDS)
            if rng.random() < 0.6
            else chr(rng.choice((rng.randrange(32, 127), rng.randrange(160, 0x3100))))
            for _ in range(rng.randrange(1, 8))
        ]
        texts.append(rng.choice(("", " ", " ", "  ")).join(parts))
    return texts


def test_generated_strings_are_as_in_transformers(ours: WordPiece, vocab_file: Path) -> None:
    reference: Any = BertTokenizer(vocab=str(vocab_file))
    texts = strings(3000)
    theirs = reference(texts, add_special_tokens=False)["input_ids"]
    for text, expected in zip(texts, theirs, strict=True):
        assert ours.encode(text) == expected, ascii(text)
    assert len({token for ids in theirs for token in ids}) > 70


def test_generated_strings_are_as_in_the_older_one(ours: WordPiece, vocab_file: Path) -> None:
    """But for rare scripts, whose marks the two of transformers know from different versions of Unicode."""
    older: Any = BertTokenizerLegacy(str(vocab_file))
    compared, common = 0, {*map(chr, range(32, 0x370)), *"".join(WORDS)}
    for text in strings(3000):
        if text.isprintable() and common.issuperset(text):
            compared += 1
            assert ours.encode(text) == older.encode(text, add_special_tokens=False), ascii(text)
    assert compared > 300


def test_rows_are_as_in_transformers(ours: WordPiece, vocab_file: Path) -> None:
    reference: Any = BertTokenizer(vocab=str(vocab_file))
    texts = strings(300)
    for length in (77, 9, 2):
        rows, _ = ours.batch(texts, length)
        theirs = reference(texts, padding="max_length", max_length=length, truncation=True)["input_ids"]
        assert rows.dtype == torch.long and rows.tolist() == theirs
    assert ours.batch(["a"])[0].shape == (1, 77)
    assert ours.batch(["a"], 5, pad_id=7)[0].tolist()[0][3:] == [7, 7]


def test_what_is_cut_is_told(ours: WordPiece) -> None:
    assert ours.batch(["A red fox", "the red fox paints"], 5)[1] == ["", "paints"]
    with pytest.raises(InputError, match="length is 1"):
        ours.batch(["a"], 1)


def test_lone_surrogates_are_replaced(ours: WordPiece) -> None:
    assert ours.encode("a \ud800 fox") == ours.encode("a \ufffd fox")


def test_json_round_trip(ours: WordPiece) -> None:
    again = read_tokenizer(ours.to_json())
    assert isinstance(again, WordPiece) and again.tokens == ours.tokens
    assert again.encode("unpainted foxes") == ours.encode("unpainted foxes")
    assert isinstance(read_tokenizer(Tokenizer.clip().to_json()), Tokenizer)


def test_lines_may_end_in_any_way(ours: WordPiece) -> None:
    assert WordPiece.from_text("\r\n".join(vocabulary()) + "\r\n").tokens == ours.tokens
    assert WordPiece.from_text("\n".join(vocabulary())).tokens == ours.tokens


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"no \[PAD\], \[UNK\], \[CLS\], \[SEP\]"),
        ("[PAD]\n[UNK]\n[CLS]\nfox", r"no \[SEP\]"),
        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\nfox\nfox", "1 of them twice"),
    ],
)
def test_what_is_no_vocabulary_is_refused(text: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        WordPiece.from_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[" * 100_000,
        "[]",
        json.dumps({"kind": "bert-wordpiece"}),
        json.dumps({"kind": "bert-wordpiece", "vocabulary": ["a"]}),
        json.dumps({"kind": "other", "vocabulary": "a"}),
        json.dumps({"kind": ["bert-wordpiece"], "vocabulary": "a"}),
    ],
    ids=range(7),
)
def test_what_is_no_tokenizer_is_refused(text: str) -> None:
    for read in (WordPiece.from_json, read_tokenizer):
        with pytest.raises(CheckpointError, match=r"[Tt]okenizer"):
            read(text)
