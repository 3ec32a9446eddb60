"""The tokenizer against transformers' CLIPTokenizer and against byte-pair encoding written out in Python."""

import doctest
import gzip
import json
import random
import re
import unicodedata
from collections import Counter
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
import torch
from transformers import CLIPTokenizer

from sfumato.errors import CheckpointError, InputError
from sfumato.text.tokenizer import END, START, Tokenizer, byte_alphabet, clip_merges, learn_merges

SPECIAL = regex.compile(r"(<\|startoftext\|>|<\|endoftext\|>)")
WORD = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
MARK_PARTS = regex.compile(r"\p{L}+|\P{L}+")
SPACE = regex.compile(r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return Tokenizer.clip()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' tokenizer, from the two files that it reads, made from the merges."""
    folder: Path = tmp_path_factory.mktemp("clip")
    lines = [" ".join(pair) for pair in clip_merges()]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n", encoding="utf-8")
    vocab = [char + end for end in ("", "</w>") for char in byte_alphabet()]
    vocab += [line.replace(" ", "") for line in lines] + [START, END]
    ids = {token: index for index, token in enumerate(vocab)}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


class PlainBPE:
    """Byte-pair encoding by its definition: always join the pair of the lowest rank."""

    def __init__(self, merges: list[tuple[str, str]]) -> None:
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        order = printable + [byte for byte in range(256) if byte not in printable]
        chars = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(68)]
        self.char_of = dict(zip(order, chars, strict=True))
        vocab = [*chars, *(char + "</w>" for char in chars), *dict.fromkeys(a + b for a, b in merges)]
        self.ids = {token: index for index, token in enumerate([*vocab, START, END])}
        self.word = cache(self._word)

    def _word(self, word: str) -> list[int]:
        symbols = [self.char_of[byte] for byte in word.encode()]
        symbols[-1] += "</w>"
        while len(symbols) > 1:
            ranks = [self.ranks.get(pair, 10**9) for pair in pairwise(symbols)]
            if (best := min(ranks)) == 10**9:
                break
            at = ranks.index(best)
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        return [self.ids[symbol] for symbol in symbols]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in SPECIAL.split(text):
            if part in (START, END):
                ids.append(self.ids[part])
                continue
            folded = SPACE.sub(" ", unicodedata.normalize("NFC", part))
            # Letter by letter: str.lower() would write a sigma at a word's end in another way.
            for word in WORD.findall("".join(char.lower() for char in folded)):
                # A mark in other letters is none, and the byte-level step splits what it has become.
                for piece in MARK_PARTS.findall(word) if word in (START, END) else [word]:
                    ids += self.word(piece)
        return ids


def strings(count: int) -> list[str]:
    """Texts of every kind of character, always the same ones."""
    rng = random.Random(7)
    # Only characters assigned long ago: what a later Unicode adds, the libraries may know or not know yet.
    old = [
        chr(c) for c in range(0x110000) if unicodedata.ucd_3_2_0.category(chr(c)) not in ("Cn", "Cs", "Co")
    ]
    pools = {
        "words": ["a", "red", "Apple", "photorealistic", "of", "Dr.", "THEY'RE", "we'll", "I'd", "it's"],
        "more words": ["Who's", "'tis", "don't", "I've", "CAT", "naïve", "snow-white", "x-ray", "4k"],
        "tokens": [token.removesuffix("</w>") for token in map("".join, clip_merges()) if token.isascii()],
        "letters": list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"),
        "digits": [*"0123456789²½Ⅷ٣๓", "1024", "3.14", "50%"],
        "apostrophes": ["'", "''", "'s", "'S", "'re", "'LL", "\u2019s", "'ſ", "`", "'d've"],
        "punctuation": [*"!\"#$%&()*+,-./:;<=>?@[\\]^_{|}~", "...", "((", "):", "</w>", "&amp;", "&lt;"],
        "space": [*" \t\n\v\f\x85\xa0\u1680\u2003\u2028\u202f\u3000\u200b", "  ", "\r\n"],
        "control": [*map(chr, (*range(32), *range(127, 160))), "\ufeff", "\u200d", "\u202e", "\u180e"],
        "accents": [*"éÀüñçßÅøœŁžİıẞΣςσΆѐЙйﬁ\u212b", "e\u0301", "A\u030a", "u\u0308\u0304", "\u1e9b\u0323"],
        "combining": [*map(chr, range(0x300, 0x370)), "\u20e3", "\u3099", "\u0e31", "\u093f"],
        "cjk": list("狐雪森林赤い猫サンプル한국어漢字，。「」"),
        "scripts": list("Приветمرحباनमस्तेสวัสดีשלוםΓειάამა"),
        "emoji": ["🦊", "❤️", "👩‍👩‍👧", "🇯🇵", "1️⃣", "👍🏽", "🍎", "☃", "🫠", "\U0001f9ff"],
        "special": [START, END, "<|ENDOFTEXT|>", "<|startoftext", "endoftext|>", "<|endoftext|>x"],
        "any": old,
    }  # fmt: skip
    names = list(pools)
    texts = ["", " ", "\n", "a"]
    while len(texts) < count:
        chosen = rng.sample(names, rng.randint(1, 4))
        glue = rng.choice(("", "", " ", "  "))
        texts.append(glue.join(rng.choice(pools[rng.choice(chosen)]) for _ in range(rng.randint(1, 24))))
    return texts


def test_ten_thousand_strings_are_as_in_transformers_and_in_python(clip: Tokenizer, reference: Any) -> None:
    texts = strings(10_000)
    theirs = reference(texts, add_special_tokens=False)["input_ids"]
    plain = PlainBPE(list(clip_merges()))
    for text, expected in zip(texts, theirs, strict=True):
        ids = clip.encode(text)
        assert ids == expected, ascii(text)
        assert ids == plain.encode(text), ascii(text)
    assert len({token for ids in theirs for token in ids}) > 7000


def test_rows_are_as_in_transformers(clip: Tokenizer, reference: Any) -> None:
    texts = strings(600)
    for length in (77, 12, 3, 2):
        rows, _ = clip.batch(texts, length)
        theirs = reference(texts, padding="max_length", max_length=length, truncation=True)
        assert rows.dtype == torch.long and rows.tolist() == theirs["input_ids"]


def test_text_comes_back_as_in_transformers(clip: Tokenizer, reference: Any) -> None:
    for text in strings(600):
        row = clip.batch([text])[0][0].tolist()
        assert clip.decode(row) == reference.decode(row, skip_special_tokens=True)
    assert clip.decode(clip.encode("A red  fox, 2 birds")) == "a red fox , 2 birds"


def test_known_ids(clip: Tokenizer) -> None:
    assert (clip.vocab_size, clip.start_id, clip.end_id, clip.pad_id) == (49408, 49406, 49407, 49407)
    assert clip.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]
    rows, cut = clip.batch(["a photo of a cat"], 9)
    assert rows.tolist() == [[49406, 320, 1125, 539, 320, 2368, 49407, 49407, 49407]] and cut == [""]
    assert clip.batch(["a"])[0].shape == (1, 77) and clip.batch([])[0].shape == (0, 77)


def test_the_package_carries_exactly_clips_merges() -> None:
    packed = resources.files("sfumato").joinpath("assets", "clip_merges.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode().splitlines()
    assert len(packed) < 1_000_000 and len(lines) == 49408 - 512 - 2 == 48894
    assert lines[:2] == ["i n", "t h"] and lines[-1] == "jeky ll</w>"


def test_the_other_padding(clip: Tokenizer) -> None:
    tokenizer = Tokenizer.clip(pad="!")
    row = tokenizer.batch(["wow! cat"], 8)[0][0].tolist()
    assert row[0] == 49406 and row[4:] == [49407, 0, 0, 0] and tokenizer.pad_id == 0
    assert tokenizer.encode("wow!") == clip.encode("wow!")  # a mark in the text is not padding
    assert tokenizer.decode(row) == "wow ! cat"
    assert tokenizer.decode([0]) == "!"
    with pytest.raises(InputError, match="not in the vocabulary"):
        Tokenizer.clip(pad="<|pad|>")


def test_what_is_cut_is_told_in_the_writers_words(clip: Tokenizer) -> None:
    rows, cut = clip.batch(["A red Fox in the SNOW,\n at Night", "A red", "", "ein Früh-Ei 🦊 im Schnée"], 6)
    assert cut == ["the SNOW,\n at Night", "", "", "-Ei 🦊 im Schnée"]
    assert rows[0, -1] == rows[3, -1] == clip.end_id
    kept = clip.decode(rows[0].tolist())
    assert kept == "a red fox in"
    with pytest.raises(InputError, match="length is 1"):
        clip.batch(["a"], 1)


def test_what_is_cut_begins_with_the_whole_character() -> None:
    tokenizer = Tokenizer.train([], 514, 8)  # bytes alone
    assert tokenizer.batch(["abcd🦊e"])[1] == ["🦊e"]
    assert tokenizer.batch(["e\u0301e\u0301e\u0301e\u0301"])[1] == ["e\u0301"]


@pytest.mark.parametrize("text", ["\ud800", "a\udcffb \udfff", "\x00\ud83e"])
def test_lone_surrogates_are_replacement_characters(clip: Tokenizer, text: str) -> None:
    expected = "".join("\ufffd" if "\ud800" <= char <= "\udfff" else char for char in text)
    assert clip.encode(text) == clip.encode(expected)
    assert clip.batch([text])[0].tolist() == clip.batch([expected])[0].tolist()
    assert Tokenizer.train([text, text], 520, 9).merges == Tokenizer.train([expected] * 2, 520, 9).merges


CAPTIONS = [
    f"a {color} {thing} on {ground}, drawn in style {number}"
    for color in ("red", "green", "blue", "golden")
    for thing in ("apple", "fox", "house", "hedgehog", "café")
    for ground in ("white ground", "a green background")
    for number in range(3)
]


def test_training_depends_on_the_captions_alone() -> None:
    tokenizer = Tokenizer.train(CAPTIONS, 560, 24)
    shuffled = random.Random(3).sample(CAPTIONS, len(CAPTIONS))
    assert Tokenizer.train(iter(shuffled), 560, 24).to_json() == tokenizer.to_json()
    assert tokenizer.vocab_size == 560 and tokenizer.context_length == 24
    assert (tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id) == (558, 559, 559)
    fewer = Tokenizer.train(CAPTIONS, 540, 24)
    assert fewer.merges == tokenizer.merges[: len(fewer.merges)]


def test_trained_tokens_are_byte_pairs_of_the_same_kind() -> None:
    tokenizer = Tokenizer.train(CAPTIONS, 700, 24)
    assert tokenizer.encode("<|endoftext|>") == [tokenizer.end_id]
    for word in ("a", "red", "fox", "hedgehog", "café", "background"):
        assert len(tokenizer.encode(word)) == 1
    plain = PlainBPE(list(tokenizer.merges))
    for text in [*strings(1000), *CAPTIONS]:
        assert tokenizer.encode(text) == plain.encode(text), ascii(text)


def test_merges_are_the_greedy_ones() -> None:
    words = Counter({"abab": 3, "ab": 2, "bcab": 4, "x": 50, "aaaa": 2})
    symbols = [([*word[:-1], word[-1] + "</w>"], count) for word, count in words.items()]
    expected = []
    while True:
        counts: Counter[tuple[str, str]] = Counter()
        for word, count in symbols:
            for pair in pairwise(word):
                counts[pair] += count
        frequent = [(-count, pair) for pair, count in counts.items() if count >= 2]
        if not frequent:
            break
        pair = min(frequent)[1]
        expected.append(pair)
        for word, _ in symbols:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == pair:
                    word[at : at + 2] = ["".join(pair)]
                at += 1
    assert learn_merges(words, 100) == expected
    assert learn_merges(words, 3) == expected[:3]


def test_training_stops_where_nothing_repeats_and_tokens_stay_short() -> None:
    assert Tokenizer.train(["one two"], 2000, 8).vocab_size == 514
    long = Tokenizer.train(["a" * 3000] * 3, 2000, 8)
    assert 514 < long.vocab_size < 2000
    assert max(len(left + right) for left, right in long.merges) <= 128
    assert Tokenizer.train([START, END, START], 600, 8).merges == ()
    with pytest.raises(InputError, match="vocab_size is 513"):
        Tokenizer.train(CAPTIONS, 513, 8)


@pytest.mark.parametrize("pad", [END, "!"])
def test_json_round_trip(pad: str) -> None:
    clip = Tokenizer.clip(pad)
    assert len(clip.to_json()) < 100
    trained = Tokenizer(Tokenizer.train(CAPTIONS, 650, 24).merges, 24, pad)
    for tokenizer in (clip, trained, Tokenizer.train([], 514, 9)):
        again = Tokenizer.from_json(tokenizer.to_json())
        assert again.to_json() == tokenizer.to_json()
        assert again.merges == tokenizer.merges and again.vocab_size == tokenizer.vocab_size
        rows = [t.batch([*CAPTIONS[:3], "🦊 ünï"])[0].tolist() for t in (tokenizer, again)]
        assert rows[0] == rows[1]


def stored(**changes: Any) -> str:
    """The JSON of a small tokenizer with some entries changed."""
    record = {"kind": "clip-bpe", "context_length": 8, "pad": END, "merges": "i n\nin g</w>"}
    return json.dumps(record | changes)


def test_stored_example_is_whole() -> None:
    assert Tokenizer.from_json(stored()).vocab_size == 516


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        "[]",
        "{}",
        stored(kind="other"),
        stored(merges=7),
        stored(context_length="8"),
        stored(context_length=1),
        stored(pad="nothing"),
        stored(merges="i n\nxx yy"),
        stored(merges="i n\ni n"),
        stored(merges="i  n"),
        stored(merges="in"),
        stored(merges="n</w> g"),
        stored(merges="i n g"),
        stored(merges="\n".join(f"{'a' * 2**n} {'a' * 2**n}" for n in range(9))),
    ],
    ids=range(17),
)
def test_what_is_no_tokenizer_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"[Tt]okenizer"):
        Tokenizer.from_json(text)


def test_the_examples_of_the_documentation() -> None:
    page = Path(__file__).parents[2] / "docs" / "tokenizer.md"
    result = doctest.testfile(
        str(page), module_relative=False, optionflags=doctest.REPORT_NDIFF, encoding="utf-8"
    )
    assert result.attempted >= 9 and result.failed == 0


def test_the_documented_readings(clip: Tokenizer) -> None:
    page = (Path(__file__).parents[2] / "docs" / "tokenizer.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)`[^|]*(?:\(.*\))? \| .+ \| `([^`]+)` \|$", page, flags=re.M)
    assert len(rows) >= 7
    for text, reading in rows:
        assert clip.decode(clip.encode(text.replace("\\", ""))) == reading.replace("\\", "")
