"""Reads generated prompts by the ten thousand: has every text a tree, its text back, and finite weights?

Half of them are soups of the language's own marks, half of any characters at all; then the inputs that nested
and backtracking parsers are slow for, 100,000 characters each.

Run: python benchmarks/soak/prompts.py --count 100000 --out benchmarks/soak/results/prompts.json
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

from sfumato.text.chunks import chunked
from sfumato.text.emphasis import segments
from sfumato.text.prompt_choices import read
from sfumato.text.prompt_dynamic import expand
from sfumato.text.prompt_schedule import plan
from sfumato.text.prompt_tree import render
from sfumato.text.prompts import parse
from sfumato.text.tokenizer import Tokenizer

MARKS = (
    "(", ")", "[", "]", ":", "|", "\\", " ", "\n", "a", "fox", ",", "1", ".5", ":1.2)", ":3]", ":.5]",
    "BREAK", "AND", " AND ", ":0.7", "<lora:x:1>", "<lora:", "<hypernet:y:2>", "<", ">", "/*", "*/", "//",
    "#", "embedding:q", "embedding:", "{", "}", "2$$", "$$", "0.5::", "__c__", "__", "1e309", "nan", "inf",
    "-", "\0", "\t", "🦊", "👩‍🚀", "مرحبا", "\u202e", "\u0301", "\ud800", "日本", "(:1e309)", "(:nan)",
    "(a:-1)",
)  # fmt: skip
WILDCARDS = {"c": ("red", "2::green", "{a|b}"), "q": ("(x:1.2)", "[a:b:3]")}
LENGTH = 100_000
UNITS = (
    "(", ")", "[", "]", ":", "|", ",", "\\", " ", "{", "}", "_", "#\n", "#\na\n", "[a:b:", "[|", "[a|b]",
    "([)]", "(a:1.1)", "(]", "[)", "([:|", "/* ", "/*/", "//", "<lora:", "<lora:a:1>", ":1 ", ":1", ": ", "1",
    "a", " AND", " BREAK", "embedding:", "__a", "{a|", "{2$$", "0.5::", "{1-2$$,$$", "([{", "🦊", "\ud800",
)  # fmt: skip
NESTS = {
    "deep, well nested": ("(" * 64 + ")" * 64) * (LENGTH // 128),
    "scheduled, nested": ("[:" * 32 + ":1]" * 32) * (LENGTH // 160),
    "closed all at the end": "[a:" * (LENGTH // 6) + ":1]" * (LENGTH // 6),
    "many closed late": "(" * (LENGTH // 2) + ")" * (LENGTH // 2),
}
STAGES: dict[str, Callable[[str], object]] = {
    "parse": parse, "segments": segments, "choices": read, "plan": lambda text: plan(parse(text), 1),
}  # fmt: skip


def soup(number: int) -> str:
    """The text of that number: always the same."""
    chance = random.Random(number)  # noqa: S311 - no secrets
    if number % 2:
        return "".join(chance.choice(MARKS) for _ in range(chance.randint(0, 40)))
    return "".join(
        chr(chance.randrange(chance.choice((0x80, 0x3000, 0x110000)))) for _ in range(chance.randint(0, 60))
    )


def check(text: str, tokenizer: Tokenizer) -> None:
    """AssertionError where a promise of the language is broken."""
    for compose in (True, False):
        tree = parse(text, compose)
        assert render(tree) == text
        assert parse(render(tree), compose) == tree
    for branch in plan(parse(text), steps=5):
        assert math.isfinite(branch.weight)
        assert branch.stages[-1].until == 5
        for stage in branch.stages[:3]:
            for dialect in ("a1111", "comfyui"):
                spans = segments(stage.text, dialect)
                assert all(math.isfinite(span.weight) for each in spans for span in each)
            for chunk in chunked(segments(stage.text), tokenizer):
                assert len(chunk.tokens) == len(chunk.weights) == tokenizer.context_length
    drawn = expand(text, seed=len(text), wildcards=WILDCARDS)
    assert drawn == expand(text, seed=len(text), wildcards=WILDCARDS)
    parse(drawn)


def timed(function: Callable[[str], object], text: str) -> float:
    """Processor seconds of one call."""
    started = time.process_time()
    function(text)
    return time.process_time() - started


def slow_inputs() -> dict[str, str]:
    """The inputs that quadratic or recursive readers stumble over."""
    return {unit.encode("unicode_escape").decode(): (unit * LENGTH)[:LENGTH] for unit in UNITS} | NESTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    tokenizer, failures = Tokenizer.clip(), list[str]()
    for number in range(options.count):
        try:
            check(soup(number), tokenizer)
        except Exception as error:  # what must not happen is counted
            failures.append(f"{number}: {type(error).__name__}: {error}")
    gc.freeze()  # what the libraries hold is no part of the time
    seconds: dict[str, dict[str, float]] = {stage: {} for stage in STAGES}
    for name, text in slow_inputs().items():
        for stage, function in STAGES.items():
            seconds[stage][name] = round(min(timed(function, text) for _ in range(3)), 4)
    result = {
        "texts": options.count,
        "exceptions": len(failures),
        "failures": failures[:20],
        "characters": LENGTH,
        "slow_inputs": len(seconds["parse"]),
        "worst_seconds": {
            stage: max((value, name) for name, value in each.items()) for stage, each in seconds.items()
        },
    }
    print(json.dumps(result, indent=1))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
