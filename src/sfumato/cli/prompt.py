"""`sfumato prompt`: what a prompt means, step by step and token by token, without drawing anything."""

from __future__ import annotations

import dataclasses
import json as text
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from sfumato.cli.options import Offline, Revision, Variant
from sfumato.errors import InputError

if TYPE_CHECKING:
    from sfumato.text.prompt_tree import Node, Prompt


def prompt(
    words: Annotated[str, Parameter(name="PROMPT", help="The prompt; one of several words in quotes.")],
    *,
    steps: Annotated[int, Parameter(help="Number of sampling steps.")] = 20,
    dialect: Annotated[
        Literal["a1111", "comfyui"], Parameter(help="Whose way of weighting: see docs/prompts.md.")
    ] = "a1111",
    negative: Annotated[
        bool, Parameter(negative=(), show_default=False, help="Read it as a negative prompt: AND is a word.")
    ] = False,
    seed: Annotated[int, Parameter(help="Seed of the choices in {a|b} and __name__.")] = 0,
    wildcards: Annotated[
        Path | None, Parameter(metavar="FOLDER", help="Folder of .txt files that __name__ chooses from.")
    ] = None,
    model: Annotated[
        str | None,
        Parameter(metavar="MODEL", help="Show this model's tokens; CLIP's in rows of 77 if not given."),
    ] = None,
    json: Annotated[bool, Parameter(negative=(), show_default=False, help="Print JSON.")] = False,
    variant: Variant = None,
    offline: Offline = False,
    revision: Revision = None,
) -> None:
    """Show a prompt's parse tree, when it changes, its rows of tokens with weights, and what is ignored."""
    # These import torch, which a help text can do without.
    from sfumato.text.prompt_dynamic import expand, unknown_wildcards
    from sfumato.text.prompt_schedule import plan
    from sfumato.text.prompts import parse
    from sfumato.text.tokenizer import replace_surrogates
    from sfumato.text.wildcards import read_wildcards

    if steps < 1:
        raise InputError(f"steps is {steps}", "Give 1 or more.")
    given = replace_surrogates(words)
    index = {} if wildcards is None else read_wildcards(wildcards)
    expanded = expand(given, seed, index)
    tree = parse(expanded, compose=not negative)
    branches = plan(tree, steps)
    rows = _rows_of(model, dialect, variant, offline, revision)
    values: dict[str, Any] = {
        "prompt": given,
        "expanded": expanded,
        "tree": [{"part": _records(part.items), "weight": part.weight} for part in tree.parts],
        **_named(tree),
        "unknown_wildcards": list(unknown_wildcards(given, index)),
        "branches": [
            {"weight": branch.weight, "stages": [dataclasses.asdict(stage) for stage in branch.stages]}
            for branch in branches
        ],
        "texts": {stage.text: rows(stage.text) for branch in branches for stage in branch.stages},
    }
    print(text.dumps(values, indent=2, ensure_ascii=False) if json else "\n".join(_page(values)), flush=True)


def _rows_of(
    model: str | None,
    dialect: Literal["a1111", "comfyui"],
    variant: str | None,
    offline: bool,
    revision: str | None,
) -> Callable[[str], list[list[dict[str, Any]]]]:
    """From a text to the rows of its tokens, by a model's tokenizer or CLIP's."""
    from sfumato.checkpoints.open import open_anything
    from sfumato.text.chunks import chunked
    from sfumato.text.emphasis import segments
    from sfumato.text.encode import read_tokenizer
    from sfumato.text.tokenizer import Tokenizer, clip_json

    length, stored = None, clip_json()
    if model is not None:
        config = open_anything(model, offline=offline, revision=revision, variant=variant).config
        if config.text is None or config.tokenizer is None:
            raise InputError(
                f"{config.name!r} has no CLIP text encoder", "Leave --model out, to see CLIP's tokens."
            )
        length, stored = config.text.max_position_embeddings, config.tokenizer
    tokenizer = read_tokenizer(stored)
    assert isinstance(tokenizer, Tokenizer)

    def rows(words: str) -> list[list[dict[str, Any]]]:
        chunks = chunked(segments(words, dialect), tokenizer, length)
        return [
            [
                {"id": token, "text": tokenizer.decode([token]), "weight": weight}
                for token, weight in zip(chunk.tokens[1:], chunk.weights[1:], strict=True)
            ][: chunk.count]
            for chunk in chunks
        ]

    return rows


def _named(tree: Prompt) -> dict[str, Any]:
    """The networks and embeddings that a prompt names, and what has no effect."""
    from sfumato.text.prompt_tree import Embedding, ignored, networks, walk

    names = (node.name for node in walk(tree) if isinstance(node, Embedding))
    return {
        "networks": _records(networks(tree)),
        "embeddings": list(dict.fromkeys(names)),
        "ignored": [node.source for node in ignored(tree)],
    }


def _records(items: Iterable[Node]) -> list[dict[str, Any]]:
    """Nodes as JSON: what kind each is, and its fields."""
    from sfumato.text.prompt_tree import Alternation, Emphasis, Scheduled

    records: list[dict[str, Any]] = []
    for item in items:
        record: dict[str, Any] = {"node": type(item).__name__.lower()}
        match item:
            case Emphasis(inner, factor, _, closing):
                record |= {"factor": factor, "closed": bool(closing), "items": _records(inner)}
            case Scheduled(before, after, when):
                record |= {"when": when.strip(), "before": _records(before or ()), "after": _records(after)}
            case Alternation(options):
                record["options"] = [_records(option) for option in options]
            case _:
                record |= dataclasses.asdict(item)
        records.append(record)
    return records


def _page(values: dict[str, Any]) -> Iterator[str]:
    """The same for people."""
    if values["expanded"] != values["prompt"]:
        yield f"expanded   {values['expanded']!r}"
    for part in values["tree"]:
        yield "tree" + (f", weight {part['weight']:g}" if len(values["tree"]) > 1 else "")
        yield from _branch(part["part"], "  ")
    for tag in values["networks"]:
        yield f"network    {tag['name']!r}: unet {tag['unet']:g}, text encoder {tag['te']:g}"
    yield from (f"embedding  {name!r}" for name in values["embeddings"])
    yield from (f"ignored    {source!r}" for source in values["ignored"])
    yield from (f"unknown    wildcard {name!r}" for name in values["unknown_wildcards"])
    numbers = {words: number for number, words in enumerate(values["texts"], start=1)}
    for number, branch in enumerate(values["branches"], start=1):
        part, first = f"part {number}, " if len(values["branches"]) > 1 else "", 1
        for stage in branch["stages"]:
            until = stage["until"]
            span = f"step {until}" if first == until else f"steps {first}-{until}"
            yield f"{part}{span}: text {numbers[stage['text']]}"
            first = until + 1
    for words, rows in values["texts"].items():
        yield f"text {numbers[words]}: {words!r}"
        for number, row in enumerate(rows, start=1):
            yield f"  chunk {number}: {len(row)} tokens"
            shown = (
                f"{token['text']}" + ("" if token["weight"] == 1 else f":{token['weight']:.4g}")
                for token in row
            )
            yield "    " + " ".join(shown)


def _branch(records: Iterable[dict[str, Any]], indent: str) -> Iterator[str]:
    for record in records:
        node, inner = record["node"], indent + "  "
        if node == "emphasis":
            yield f"{indent}times {record['factor']:.4g}" + ("" if record["closed"] else " (never closed)")
            yield from _branch(record["items"], inner)
        elif node == "scheduled":
            yield f"{indent}until {record['when']}"
            yield from _branch(record["before"], inner)
            yield f"{indent}then"
            yield from _branch(record["after"], inner)
        elif node == "alternation":
            for number, option in enumerate(record["options"]):
                yield f"{indent}{'or' if number else 'in turn'}"
                yield from _branch(option, inner)
        else:
            yield f"{indent}{node} {record['source']!r}"
