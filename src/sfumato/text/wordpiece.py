"""BERT's uncased WordPiece tokenizer (Devlin et al. 2019, section 3), for LDM's 1.45 B text model."""

from __future__ import annotations

import json
from collections.abc import Sequence

import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers
from torch import Tensor

from sfumato.errors import CheckpointError, InputError
from sfumato.text.tokenizer import replace_surrogates

KIND = "bert-wordpiece"
PAD, UNKNOWN, START, END = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
SPECIAL = (PAD, UNKNOWN, START, END, "[MASK]")
MAX_WORD = 100  # characters; a longer word is unknown (google-research/bert, tokenization.py)
MAX_TOKENS = 1_000_000
CONTEXT_LENGTH = 77  # LDM, ldm/modules/encoders/modules.py: BERTEmbedder


class WordPiece:
    """Text to token ids; equal to transformers' BertTokenizer for bert-base-uncased with the same vocabulary.

    Text is folded to lower case without accents and split at white space, punctuation and CJK characters;
    each word is then spelled with the longest pieces that the vocabulary has, or is `[UNK]`. Lone surrogates,
    which are no text, are read as U+FFFD.

    tokens: the vocabulary in order of id; pieces inside a word begin with "##". Raises CheckpointError for a
    token listed twice, and where [PAD], [UNK], [CLS] or [SEP] is missing.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        ids = {token: index for index, token in enumerate(tokens)}
        if len(ids) < len(tokens) or len(tokens) > MAX_TOKENS:
            raise CheckpointError(
                f"The vocabulary lists {len(tokens)} tokens, {len(tokens) - len(ids)} of them twice.",
                f"Give BERT's vocab.txt: one token on a line, at most {MAX_TOKENS}.",
            )
        missing = [token for token in (PAD, UNKNOWN, START, END) if token not in ids]
        if missing:
            raise CheckpointError(
                f"The vocabulary of {len(tokens)} tokens has no {', '.join(missing)}.",
                "Give the vocab.txt of bert-base-uncased.",
            )
        self.tokens = tuple(tokens)
        self.vocab_size = len(ids)
        self.pad_id, self.start_id, self.end_id = ids[PAD], ids[START], ids[END]
        self._engine = tokenizers.Tokenizer(
            models.WordPiece(vocab=ids, unk_token=UNKNOWN, max_input_chars_per_word=MAX_WORD)
        )
        self._engine.normalizer = normalizers.BertNormalizer(
            clean_text=True, handle_chinese_chars=True, strip_accents=True, lowercase=True
        )
        self._engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._engine.add_special_tokens([token for token in SPECIAL if token in ids])

    @classmethod
    def from_text(cls, text: str) -> WordPiece:
        """The tokenizer of a `vocab.txt`: one token on a line, its id the line's number from 0."""
        lines = text.removesuffix("\n").split("\n")
        return cls([line.removesuffix("\r") for line in lines])

    def encode(self, text: str) -> list[int]:
        """Token ids without start, end and padding."""
        return self._engine.encode(replace_surrogates(text), add_special_tokens=False).ids

    def batch(
        self, texts: Sequence[str], length: int | None = None, pad_id: int | None = None
    ) -> tuple[Tensor, list[str]]:
        """Rows of [CLS], tokens, [SEP] and padding, (b, length) long, and what was cut of each text.

        length: tokens in a row, 77 where None. pad_id: what to fill rows with, [PAD] where None. Raises
        InputError for a length without room for start and end.
        """
        length = CONTEXT_LENGTH if length is None else length
        if length < 2:
            raise InputError(f"length is {length}.", "A row holds at least the start and the end token.")
        rows = torch.full((len(texts), length), self.pad_id if pad_id is None else pad_id, dtype=torch.long)
        cut: list[str] = []
        for row, text in zip(rows, texts, strict=True):
            encoded = self._engine.encode(replace_surrogates(text), add_special_tokens=False)
            ids = [self.start_id, *encoded.ids[: length - 2], self.end_id]
            row[: len(ids)] = torch.tensor(ids)
            rest = encoded.offsets[length - 2 :]
            cut.append(text[rest[0][0] :].strip() if rest else "")
        return rows, cut

    def to_json(self) -> str:
        """Everything `from_json` needs, for the metadata of a model file."""
        record = {"kind": KIND, "vocabulary": "\n".join(self.tokens)}
        return json.dumps(record, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> WordPiece:
        """The tokenizer that `to_json` wrote; CheckpointError where the text is anything else."""
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError("The tokenizer stored with the model is not JSON.") from error
        match record:
            case {"kind": "bert-wordpiece", "vocabulary": str(vocabulary)}:
                return cls(vocabulary.split("\n"))
        raise CheckpointError(
            "The tokenizer stored with the model is of another kind, or not whole.",
            f"It needs kind = {KIND!r} and a vocabulary.",
        )
