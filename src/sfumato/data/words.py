"""The grammar of captions: articles, plurals, and the colours that have a name."""

from __future__ import annotations

from collections.abc import Sequence

# Backgrounds of drawings and scenes: light enough that an object of the same name still stands out.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "red": (240, 106, 102),
    "orange": (250, 170, 90),
    "yellow": (255, 224, 102),
    "green": (134, 206, 134),
    "blue": (116, 176, 240),
    "purple": (172, 144, 224),
    "pink": (250, 184, 208),
    "gray": (176, 180, 188),
}
COLOURS = tuple(name for name in BACKGROUNDS if name != "white")
NUMBERS = {2: "two", 3: "three", 4: "four"}

SOUNDS_LIKE_CONSONANT = ("uni", "use", "eu", "ewe", "one")
SOUNDS_LIKE_VOWEL = ("hour", "honest", "x-ray")


def parse_list(text: str) -> list[str]:
    """ "a; b" -> ["a", "b"]; a line's end is a semicolon too."""
    return [entry.strip() for entry in text.strip().replace("\n", ";").split(";")]


def parse_table(text: str) -> dict[str, str]:
    """ "a = b; c = d" -> {"a": "b", "c": "d"}."""
    entries = (entry.partition("=") for entry in parse_list(text))
    return {key.strip(): value.strip() for key, _, value in entries}


IRREGULAR = parse_table("""
mouse = mice; wolf = wolves; leaf = leaves; loaf = loaves; knife = knives; goose = geese; tooth = teeth
foot = feet; ox = oxen; child = children; man = men; woman = women; person = people; sheaf = sheaves
die = dice; elf = elves; scarf = scarves; shelf = shelves; fish = fish; sheep = sheep; deer = deer
bison = bison; moose = moose; shrimp = shrimp; squid = squid; blowfish = blowfish; jellyfish = jellyfish
potato = potatoes; tomato = tomatoes; volcano = volcanoes; mosquito = mosquitoes; mango = mangoes
""")
HEADS = (" of ", " with ", " on ", " in ", " behind ", " showing ")


def with_article(phrase: str) -> str:
    """ "fox" -> "a fox", "owl" -> "an owl", "unicorn" -> "a unicorn", "hourglass" -> "an hourglass"."""
    lower = phrase.lower()
    vowel = lower.startswith(tuple("aeiou")) and not lower.startswith(SOUNDS_LIKE_CONSONANT)
    return f"{'an' if vowel or lower.startswith(SOUNDS_LIKE_VOWEL) else 'a'} {phrase}"


def plural(phrase: str) -> str:
    """The plural of a noun phrase: its head noun stands before the first preposition, or last."""
    place = min((phrase.find(word) for word in HEADS if word in phrase), default=len(phrase))
    before, _, noun = phrase[:place].rpartition(" ")
    return f"{before} {plural_noun(noun)}".strip() + phrase[place:]


def plural_noun(noun: str) -> str:
    """The plural of one English noun by rule, with a table of the irregular ones."""
    if noun.lower() in IRREGULAR:
        return IRREGULAR[noun.lower()]
    if noun.endswith("man"):
        return noun[:-3] + "men"
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2:-1] not in tuple("aeiou"):
        return noun[:-1] + "ies"
    return noun + "s"


def listed(parts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"; empty parts are left out."""
    parts = [part for part in parts if part]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def sentence(*parts: str) -> str:
    """The parts that are not empty, joined by single spaces, with no space before a comma."""
    return " ".join(part for part in parts if part).replace(" ,", ",")
