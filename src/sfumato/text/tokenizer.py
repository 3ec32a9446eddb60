"""CLIP's byte-pair tokenizer (Radford et al. 2021, section 2.4), and the same kind for own captions."""

from __future__ import annotations

import gzip
import heapq
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib import resources
from itertools import pairwise

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from sfumato.errors import CheckpointError, InputError

START = "<|startoftext|>"
END = "<|endoftext|>"
WORD_END = "</w>"
# OpenAI's word pattern: endings of English contractions, runs of letters, single digits, runs of the rest.
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
CLIP_CONTEXT_LENGTH = 77
CLIP_VOCABULARY = 49408  # tokens of `Tokenizer.clip`
MAX_TOKEN_BYTES = (
    128  # merges can double a token's length each: 40 lines of a hostile file would fill any memory
)
SURROGATES = re.compile("[\ud800-\udfff]")
MARKS = re.compile("|".join(map(re.escape, (START, END))))

Pair = tuple[str, str]


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes, in CLIP's order: first the printable ones, for themselves."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]


@cache
def clip_merges() -> tuple[Pair, ...]:
    """CLIP's 48,894 merges in order of rank, read from the package."""
    packed = resources.files("sfumato").joinpath("assets", "clip_merges.txt.gz").read_bytes()
    return tuple(parse_merges(gzip.decompress(packed).decode()))


def parse_merges(text: str) -> Iterator[Pair]:
    """Pairs from lines of two tokens with one space between; CheckpointError at the first other line."""
    for number, line in enumerate(text.splitlines(), start=1):
        left, space, right = line.partition(" ")
        if not (left and space and right) or " " in right:
            raise CheckpointError(f"Merge {number} of the tokenizer is {line[:80]!r}, not two tokens.")
        yield left, right


def vocabulary(merges: Iterable[Pair]) -> dict[str, int]:
    """Ids in CLIP's order: 256 bytes, the same at a word's end, each merge's product, start and end of text.

    Raises CheckpointError for a merge of unknown tokens, one listed twice, and a token over 128 bytes.
    """
    alphabet = byte_alphabet()
    ids = {token: index for index, token in enumerate(alphabet + [char + WORD_END for char in alphabet])}
    seen: set[Pair] = set()
    for pair in merges:
        token = pair[0] + pair[1]
        if pair in seen or pair[0] not in ids or pair[1] not in ids or pair[0].endswith(WORD_END):
            raise CheckpointError(
                f"The tokenizer's merge {pair} is listed twice, or joins tokens that do not exist."
            )
        if len(token) > MAX_TOKEN_BYTES:
            raise CheckpointError(
                f"The tokenizer has a token of {len(token)} bytes; at most {MAX_TOKEN_BYTES}."
            )
        seen.add(pair)
        ids.setdefault(token, len(ids))  # two ways to one token share its id
    for token in (START, END):
        ids[token] = len(ids)
    return ids


def word_splitter() -> tuple[normalizers.Normalizer, pre_tokenizers.PreTokenizer]:
    """First, text to lower-case form C with white space folded; then that to words in the byte alphabet."""
    normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return normalizer, splitter


class Tokenizer:
    """Text to token ids and back; equal to transformers' CLIPTokenizer for the same merges.

    Every text has tokens: what the merges do not know is spelled in bytes. `<|startoftext|>` and
    `<|endoftext|>` written in a text become those tokens. Lone surrogates, which are no text, are read as
    U+FFFD.

    merges: pairs of tokens in order of rank. context_length: tokens in a row of `batch`, start and end
    included. pad: the token after the end: `<|endoftext|>` for Stable Diffusion 1, `!` for 2.
    """

    def __init__(self, merges: Sequence[Pair], context_length: int, pad: str = END) -> None:
        ids = vocabulary(merges)
        if pad not in ids:
            raise InputError(f"The pad token {pad!r} is not in the vocabulary.", f"Take {END!r}, or '!'.")
        self.merges = tuple(merges)
        self.context_length = context_length
        self.pad = pad
        self.start_id, self.end_id, self.pad_id = ids[START], ids[END], ids[pad]
        self.vocab_size = len(ids)
        self._engine = tokenizers.Tokenizer(
            models.BPE(vocab=ids, merges=list(merges), unk_token=END, end_of_word_suffix=WORD_END)
        )
        self._engine.normalizer, self._engine.pre_tokenizer = word_splitter()
        self._engine.decoder = decoders.ByteLevel()
        self._engine.add_special_tokens([START, END])

    @classmethod
    def clip(cls, pad: str = END) -> Tokenizer:
        """CLIP's own: 49,408 tokens, rows of 77."""
        return cls(clip_merges(), CLIP_CONTEXT_LENGTH, pad)

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, context_length: int) -> Tokenizer:
        """The same kind of tokenizer for these captions: the same captions in any order give the same one.

        vocab_size is an upper limit, at least 514; merges stop where no pair occurs twice. Raises InputError
        below.
        """
        if vocab_size < 514:
            raise InputError(
                f"vocab_size is {vocab_size}.", "Bytes, word ends, start and end alone take 514."
            )
        normalizer, splitter = word_splitter()
        words: Counter[str] = Counter()
        for caption in captions:
            text = MARKS.sub(" ", replace_surrogates(caption))
            words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
        return cls(learn_merges(words, vocab_size - 514), context_length)

    def encode(self, text: str) -> list[int]:
        """Token ids without start, end and padding."""
        return self._engine.encode(replace_surrogates(text), add_special_tokens=False).ids

    def batch(
        self, texts: Sequence[str], length: int | None = None, pad_id: int | None = None
    ) -> tuple[Tensor, list[str]]:
        """Rows of start, tokens, end and padding, (b, length) long, and what was cut of each text (maybe "").

        length: tokens in a row, the context length where None. pad_id: what to fill rows with, `pad` where
        None; the text encoder says, for the two of SDXL read one text with one tokenizer. What was cut begins
        at the first token that did not fit, maybe inside a word. Raises InputError for a length without room
        for start and end.
        """
        length = self.context_length if length is None else length
        if length < 2:
            raise InputError(f"length is {length}.", "A row holds at least the start and the end token.")
        filling = self.pad_id if pad_id is None else pad_id
        rows = torch.full((len(texts), length), filling, dtype=torch.long)
        cut: list[str] = []
        for row, text in zip(rows, texts, strict=True):
            encoded = self._engine.encode(replace_surrogates(text), add_special_tokens=False)
            ids = [self.start_id, *encoded.ids[: length - 2], self.end_id]
            row[: len(ids)] = torch.tensor(ids)
            rest = encoded.offsets[length - 2 :]
            cut.append(text[rest[0][0] :].strip() if rest else "")
        return rows, cut

    def decode(self, ids: Iterable[int]) -> str:
        """Text of a row or a part of one, without start, end and padding; single spaces between words."""
        ids = list(ids)
        while self.end_id in ids and ids[-1] == self.pad_id:
            ids.pop()
        text = self._engine.decode(ids, skip_special_tokens=True)
        return text.replace(WORD_END, " ").strip()

    def to_json(self) -> str:
        """Everything `from_json` needs, for the metadata of a model file; CLIP's merges by name alone."""
        merges = (
            "clip"
            if self.merges == clip_merges()
            else "\n".join(f"{left} {right}" for left, right in self.merges)
        )
        record = {
            "kind": "clip-bpe",
            "context_length": self.context_length,
            "pad": self.pad,
            "merges": merges,
        }
        return json.dumps(record, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """The tokenizer that `to_json` wrote; CheckpointError where the text is anything else."""
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError("The tokenizer stored with the model is not JSON.") from error
        match record:
            case {"kind": "clip-bpe", "context_length": int(length), "pad": str(pad), "merges": str(merges)}:
                pairs = clip_merges() if merges == "clip" else tuple(parse_merges(merges))
                if length >= 2:
                    try:
                        return cls(pairs, length, pad)
                    except InputError as error:
                        raise CheckpointError(
                            "The tokenizer stored with the model pads with a token that it lacks.",
                            "Get the file again.",
                        ) from error
        raise CheckpointError(
            "The tokenizer stored with the model is of another kind, or not whole.",
            "It needs kind = 'clip-bpe', context_length, pad and merges; a newer Sfumato may.",
        )


def clip_json(pad: str = END) -> str:
    """`Tokenizer.clip(pad).to_json()`, without the time it takes to build the tokenizer."""
    record = {"kind": "clip-bpe", "context_length": CLIP_CONTEXT_LENGTH, "pad": pad, "merges": "clip"}
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"))


def replace_surrogates(text: str) -> str:
    """The text with U+FFFD for every lone surrogate, which no encoding of text holds."""
    return SURROGATES.sub("\ufffd", text)


def learn_merges(words: Counter[str], limit: int) -> list[Pair]:
    """Merge the most frequent pair of neighbours up to `limit` tokens (Sennrich et al. 2016, algorithm 1).

    Equal counts go in the order of the pairs' text, so that the result depends on the counts of the words
    alone.
    """
    spelled = list(words.items())
    symbols = [[*word[:-1], word[-1] + WORD_END] for word, _ in spelled]
    counts: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)
    for index, (_, count) in enumerate(spelled):
        for pair in pairwise(symbols[index]):
            counts[pair] += count
            places[pair].add(index)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    products: set[str] = set()
    while heap and len(products) < limit:
        negative, best = heapq.heappop(heap)
        if counts[best] != -negative or len(best[0]) + len(best[1]) > MAX_TOKEN_BYTES:
            continue
        if counts[best] < 2:
            break
        merges.append(best)
        products.add(best[0] + best[1])
        changed: set[Pair] = set()
        for index in places.pop(best):
            before, after = symbols[index], merged(symbols[index], best)
            symbols[index] = after
            for pair in pairwise(before):
                counts[pair] -= spelled[index][1]
                changed.add(pair)
            for pair in pairwise(after):
                counts[pair] += spelled[index][1]
                places[pair].add(index)
                changed.add(pair)
        for pair in changed - {best}:
            heapq.heappush(heap, (-counts[pair], pair))
    return merges


def merged(symbols: Sequence[str], pair: Pair) -> list[str]:
    """The symbols with every occurrence of the pair joined, from the left."""
    result: list[str] = []
    index = 0
    while index < len(symbols):
        joined = tuple(symbols[index : index + 2]) == pair
        result.append(pair[0] + pair[1] if joined else symbols[index])
        index += 2 if joined else 1
    return result
