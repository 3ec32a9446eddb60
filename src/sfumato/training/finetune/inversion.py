"""Fine-tuning of a word: the vectors that stand for it, and nothing else (Gal et al. 2022, section 4)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from sfumato.checkpoints.addons.write import write_embedding
from sfumato.conditioning import Conditioning
from sfumato.errors import InputError
from sfumato.generation import generate
from sfumato.nn.clip import CLIPTextEncoder
from sfumato.request import Request
from sfumato.text import encode
from sfumato.text.chunks import Chunk, chunked, empty_chunk
from sfumato.text.emphasis import Segments, segments
from sfumato.text.tokenizer import Tokenizer
from sfumato.training.data import CaptionRules, Dataset, Position, every_caption
from sfumato.training.finetune.captions import blanked
from sfumato.training.finetune.method import Base, trained_parameters
from sfumato.training.settings_finetune import InversionConfig

FOLDER = "embeddings"  # of a run, as --embedding-dir takes it
BRACKETS = re.compile(r"([\\()\[\]])")  # that captions mean as such, and prompts as weights
TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "object": (
        "a picture of {}", "{}", "a picture of a {}", "a close view of {}", "one {}", "a good picture of {}",
        "{} in the middle", "a small {}", "a large {}", "a clear picture of the {}", "the {}", "my {}",
    ),
    "style": (
        "a picture in the style of {}", "{} style", "drawn in the style of {}", "in the style of {}",
        "a scene in {} style", "art by {}", "a small picture in {} style", "something in the style of {}",
    ),
}  # fmt: skip


class Inversion:
    """One word's vectors for each text encoder; the table of all others is only read."""

    def __init__(self, base: Base) -> None:
        options, tokenizer = base.options.inversion, base.model.tokenizer
        towers = {part: each for part, each in base.text_parts.items() if isinstance(each, CLIPTextEncoder)}
        if options is None:
            raise InputError("a textual inversion needs a [finetune.inversion] table", "Give it a word.")
        if not towers or not isinstance(tokenizer, Tokenizer):
            raise InputError(f"{base.model.name!r} has no CLIP whose words could grow", "Take another model.")
        self.base, self.options, self.towers, self.tokenizer = base, options, towers, tokenizer
        if not tokenizer.encode(options.word):
            raise InputError(f"the word {options.word!r} has no letters that the model reads", "Change it.")
        vectors = {part: nn.Parameter(self._start(part)) for part in towers}
        self.modules: Mapping[str, nn.Module] = {"embedding": nn.ParameterDict(vectors)}
        self.vectors = vectors

    def parameters(self) -> list[nn.Parameter]:
        return trained_parameters(self.modules)

    def condition(self, captions: Sequence[str | None]) -> Conditioning:
        """As prompts of `generate` are encoded, with the word's vectors as they are now."""
        found = spoken(self.base, self.towers, self.tokenizer, self.options.word, self.vectors, captions)
        return blanked(self.base.model, found, [caption is None for caption in captions], self.base.size)

    def network(self, x: Tensor, t: Tensor, cond: Conditioning, hints: Tensor | None) -> Tensor:
        return self.base.network(x, t, cond)

    def draw(self, prompts: Sequence[str], hints: Tensor | None) -> Tensor:
        """By the file that anybody would use, which it writes."""
        folder = str(self.write(self.base.config.out).parent)
        height, width = self.base.size
        requests = [
            Request(prompt=prompt, seed=seed, embedding_dir=folder, width=width, height=height)
            for seed, prompt in enumerate(prompts)
        ]
        return torch.cat([generate(self.base.model, request).samples for request in requests])

    def write(self, out: Path, tail: str = "") -> Path:
        """A1111's form, in a folder by itself, and diffusers' beside that folder."""
        vectors = {part: vector.detach() for part, vector in self.vectors.items()}
        word, dtype = self.options.word, self.base.save_dtype(torch.float32)
        path = out / FOLDER / f"{word}{tail}.safetensors"
        write_embedding(path, word, vectors, "a1111", dtype)
        write_embedding(out / f"learned_embeds{tail}.safetensors", word, vectors, "diffusers", dtype)
        return path

    def _start(self, part: str) -> Tensor:
        """(vectors, width): those of the start words in turn, or as large as any."""
        table = self.towers[part].text_model.embeddings.token_embedding.weight.detach().float()
        count, ids = self.options.vectors, self.tokenizer.encode(self.options.start)
        if ids:
            return table[[ids[place % len(ids)] for place in range(count)]].clone()
        generator = Position(self.base.config.seed, -1, 0).generator(f"inversion {part}")
        noise = torch.randn(count, table.shape[1], generator=generator)
        return noise.to(table.device) * table.std()


def spoken(
    base: Base,
    towers: Mapping[str, CLIPTextEncoder],
    tokenizer: Tokenizer,
    word: str,
    vectors: Mapping[str, Tensor],
    captions: Sequence[str | None],
) -> Conditioning:
    """What `encode.encode_weighted` makes of captions with a word in them, but for gradients of its vectors.

    Brackets are no weights in captions. vectors: of the word, for each tower (n, width).
    """
    config = base.model.config
    texts = [_literal(caption or "") for caption in captions]
    contexts, pooled = [], None
    for part, tower in towers.items():
        own, length, pad = vectors[part], tower.config.max_position_embeddings, tower.config.pad_id
        rows = [chunked(text, tokenizer, length, pad, {word: len(own)}) for text in texts]
        most = max(map(len, rows))
        empty = empty_chunk(tokenizer, length, pad)
        chunks = [chunk for each in rows for chunk in (*each, *[empty] * (most - len(each)))]
        tokens = torch.tensor([chunk.tokens for chunk in chunks])
        with placed(tower, chunks, own):
            output = tower(tokens.to(base.model.device))
        states = tower.hidden_state(output, -config.clip_skip, config.text_normed)
        contexts.append(states.unflatten(0, (len(texts), most)).flatten(1, 2))
        pooled = output.pooled[::most]
    if len(towers) == 1 or pooled is None:
        return Conditioning(context=contexts[0])
    sizes = encode.Sizes(base.size).vector().to(pooled.device).expand(len(texts), -1)
    return Conditioning(torch.cat(contexts, dim=2), torch.cat([pooled.float(), sizes], dim=1))


@contextmanager
def placed(tower: CLIPTextEncoder, chunks: Sequence[Chunk], vectors: Tensor) -> Iterator[None]:
    """While it lasts, the tower looks up the vectors where the chunks place them, in a copy of its own."""

    def replace(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        found = output.clone()
        for row, chunk in enumerate(chunks):
            for each in chunk.placed:
                found[row, each.start : each.start + each.length] = vectors.to(found)
        return found

    handle = tower.text_model.embeddings.token_embedding.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def with_word(
    rules: CaptionRules,
    options: InversionConfig,
    prompt: str | None,
    dataset: Dataset,
    tokenizer: Tokenizer,
) -> CaptionRules:
    """How captions say the word: in templates instead of what they are, or by themselves.

    prompt: the caption of every picture, if there is one. Raises `InputError` for captions that do not hold
    the word: nothing would be trained where a batch has no other.
    """
    templates, word = options.templates, options.word
    remedy = "Write it into them, or leave out finetune.inversion.templates."
    if templates != "captions":
        chosen = TEMPLATES[templates] if isinstance(templates, str) else templates
        rules = dataclasses.replace(rules, templates=chosen, word=word)
        remedy = "Let {} stand by itself in finetune.inversion.templates."
    if prompt is not None:
        said, remedy = [prompt], "Write it into finetune.prompt, or leave that out."
    else:
        # Without chance: what tags lose in training is put back by `with_word_kept`.
        said = every_caption(dataset, dataclasses.replace(rules, shuffle=False, tag_dropout=0.0))
    silent = [text for text in said if not says(tokenizer, word, text)]
    if silent:
        raise InputError(f"{len(silent)} captions do not hold the word {word!r}, first {silent[0]!r}", remedy)
    return rules


def with_word_kept(caption: str | None, word: str, separator: str, tokenizer: Tokenizer) -> str:
    """A caption of which chance may have left out the word, or all: the word is always said."""
    if not caption:
        return word
    return caption if says(tokenizer, word, caption) else f"{word}{separator.strip()} {caption}"


def says(tokenizer: Tokenizer, word: str, text: str) -> bool:
    """Whether a text holds the word as it is encoded: whole, in capitals or not."""
    return any(chunk.placed for chunk in chunked(_literal(text), tokenizer, vectors={word: 1}))


def _literal(caption: str) -> Segments:
    """A caption's text, whose brackets are no weights."""
    return segments(BRACKETS.sub(r"\\\1", caption))
