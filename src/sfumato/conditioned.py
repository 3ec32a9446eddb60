"""How a model is conditioned: prompts, classes, nothing asked for, as what its network reads."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Protocol, cast

import torch
from torch import Tensor

from sfumato.conditioning import Conditioning
from sfumato.errors import InputError
from sfumato.nn.bert import BERTEmbedder
from sfumato.nn.classes import ClassEmbedder
from sfumato.nn.clip import CLIPTextEncoder
from sfumato.presets import ModelConfig, context_width, no_class, num_classes
from sfumato.text import encode
from sfumato.text.tokenizer import Tokenizer
from sfumato.text.wordpiece import WordPiece


class Conditioned(Protocol):
    """The part of a model that makes conditions; what it needs of the rest stands first."""

    config: ModelConfig
    name: str

    @property
    def text_encoder(self) -> CLIPTextEncoder | None: ...

    @property
    def text_encoder2(self) -> CLIPTextEncoder | None: ...

    @property
    def bert(self) -> BERTEmbedder | None: ...

    @property
    def classes(self) -> ClassEmbedder | None: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def image_size(self) -> tuple[int, ...]: ...

    @cached_property
    def tokenizer(self) -> Tokenizer | WordPiece | None:
        """The text encoder's tokenizer."""
        return None if self.config.tokenizer is None else encode.read_tokenizer(self.config.tokenizer)

    @torch.no_grad()
    def encode_prompt(
        self,
        prompts: list[str],
        clip_skip: int | None = None,
        *,
        size: tuple[int, int] | None = None,
        original: tuple[int, int] | None = None,
        crop: tuple[int, int] = (0, 0),
        dialect: encode.Dialect | None = None,
        vectors: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> Conditioning:
        """Token-wise text features: `.context` is (b, tokens, width). Text beyond the context is cut.

        dialect: reads weights in the prompts, "a1111" or "comfyui", and takes texts of any length, in rows of
        the context's; None takes the words as they stand. vectors: the textual inversions that prompts of a
        dialect may name, for each of "text" and "text2" (n, width).
        clip_skip: the layer of CLIP from the end, 1 the last (AUTOMATIC1111's numbering); None is the model's
        own, 1 but for SDXL's 2. size, original, crop: for SDXL's `.vector`, (height, width) in pixels of the
        picture and of what it was made from, (top, left) of what was cut off; None is `image_size`, and
        `size`. Raises `InputError` without a text encoder, its tokenizer, or such a layer.
        """
        config, tokenizer = self.config, self.tokenizer
        if config.bert is not None:
            return self._encode_wordpieces(prompts, clip_skip)
        if self.text_encoder is None or not isinstance(tokenizer, Tokenizer):
            raise InputError(f"{self.name!r} has no text encoder", "Leave the prompt out.")
        skip = config.clip_skip if clip_skip is None else clip_skip
        if dialect is not None:
            second = self.text_encoder2
            encoders = [self.text_encoder] if second is None else [self.text_encoder, second]
            parts = ("text", "text2")[: len(encoders)]
            own = {name: [given[part] for part in parts] for name, given in (vectors or {}).items()}
            sizes = None if second is None else self._sizes(size, original, crop)
            normed = config.text_normed
            return encode.encode_weighted(prompts, tokenizer, encoders, skip, normed, sizes, dialect, own)
        if self.text_encoder2 is None:
            return encode.encode_prompts(
                prompts, tokenizer, self.text_encoder, skip, config.text_normed
            ).conditioning
        towers, sizes = (self.text_encoder, self.text_encoder2), self._sizes(size, original, crop)
        return encode.encode_two_towers(
            prompts, tokenizer, towers, sizes, skip, config.text_normed
        ).conditioning

    def prompt_cuts(self, prompts: list[str]) -> list[str]:
        """For each prompt the words that do not fit into the context, "" where all do."""
        if self.tokenizer is None or (tokens := self._tokens()) is None:
            return ["" for _ in prompts]
        return self.tokenizer.batch(prompts, tokens)[1]

    @torch.no_grad()
    def encode_label(self, labels: list[int]) -> Conditioning:
        """Numbered classes, as `.context` (b, 1, width) or as `.vector` (b,), as the model takes them.

        Raises `InputError` for a class that it does not have.
        """
        count = num_classes(self.config)
        for label in labels:
            if count is None or not 0 <= label < count:
                most = "none" if count is None else f"0 to {count - 1}"
                raise InputError(
                    f"the label is {label}; {self.name!r} has labels: {most}", "Change the label."
                )
        numbers = torch.tensor(labels, device=self.device)
        table = self.classes
        return Conditioning(vector=numbers) if table is None else Conditioning(context=table(numbers))

    def uncondition(
        self,
        count: int,
        clip_skip: int | None = None,
        zeros: bool | None = None,
        *,
        size: tuple[int, int] | None = None,
        original: tuple[int, int] | None = None,
        crop: tuple[int, int] = (0, 0),
    ) -> Conditioning:
        """The condition of "nothing asked for": the empty prompt, "no class", or none where there is neither.

        zeros: all zeros for the empty prompt, as SDXL was trained; None is the model's own choice. The rest
        is that of `encode_prompt`.
        """
        config = self.config
        if config.text is None and config.bert is None:
            label = no_class(config)
            return Conditioning() if label is None else self.encode_label([label] * count)
        if not (config.zeros_for_empty if zeros is None else zeros):
            return self.encode_prompt([""] * count, clip_skip, size=size, original=original, crop=crop)
        tokens, width = cast(int, self._tokens()), cast(int, context_width(config))
        context, vector = torch.zeros(count, tokens, width, device=self.device, dtype=self.dtype), None
        if config.text2 is not None:
            numbers = self._sizes(size, original, crop).vector().expand(count, -1)
            vector = torch.cat([torch.zeros(count, config.text2.pooled_size), numbers], dim=1)
            vector = vector.to(self.device)
        return Conditioning(context, vector)

    def _encode_wordpieces(self, prompts: list[str], clip_skip: int | None) -> Conditioning:
        if not isinstance(self.tokenizer, WordPiece) or self.bert is None:
            raise InputError(
                f"{self.name!r} reads prompts with BERT's vocabulary, which its file does not hold",
                "Give the vocab.txt of bert-base-uncased: load(..., vocab=) or --vocab.",
            )
        if clip_skip not in (None, 1):
            raise InputError(
                f"clip_skip is {clip_skip}; the text encoder of {self.name!r} is not CLIP", "Leave it out."
            )
        return encode.encode_wordpieces(prompts, self.tokenizer, self.bert).conditioning

    def _sizes(
        self, size: tuple[int, int] | None, original: tuple[int, int] | None, crop: tuple[int, int]
    ) -> encode.Sizes:
        height, width = self.image_size[-2:] if size is None else size
        return encode.Sizes((height, width), original, crop)

    def _tokens(self) -> int | None:
        """Tokens in a row of the text encoder, None without one."""
        text, bert = self.config.text, self.config.bert
        return text.max_position_embeddings if text else bert.max_seq_len if bert else None
