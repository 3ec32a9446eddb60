"""Which objects the domains hold and what captions call them; the small domain was fixed before training."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sfumato.data.emoji import FAMILIES, Label
from sfumato.data.labels import noun_phrase
from sfumato.data.split import is_held_out, pick
from sfumato.data.words import parse_list, plural, with_article
from sfumato.errors import DataError

HELD_OUT_OBJECTS = 0.25

# 120 everyday things, each unlike the others. CLDR label, or "CLDR label = name in captions";
# "*" marks a name that is no single countable thing ("grapes"), which keeps its form and is never counted.
SMALL = """
fox; cat face = cat; dog face = dog; lion; tiger face = tiger; bear; panda; koala; rabbit face = rabbit
mouse face = mouse; pig face = pig; cow face = cow; monkey face = monkey; frog; unicorn; chicken; penguin
owl; duck; elephant; spouting whale = whale; octopus; crab; turtle; snail; butterfly
lady beetle = ladybug; honeybee = bee; spider; snake; crocodile; camel; tropical fish = fish; shark; bat
rose; sunflower; tulip; cactus; evergreen tree = pine tree; deciduous tree = tree; palm tree
four leaf clover = four-leaf clover; maple leaf; mushroom; red apple; banana; grapes *; watermelon; lemon
pineapple; pear; strawberry; cherries *; tomato; avocado; eggplant; carrot; bread = loaf of bread
croissant; cheese wedge = piece of cheese; hamburger; french fries *; pizza; hot dog; doughnut = donut
cookie; birthday cake; soft ice cream = ice cream cone; lollipop; hot beverage = cup of coffee; house
castle; tent; ferris wheel; volcano; snow-capped mountain = snowy mountain; bus; fire engine = fire truck
automobile = car; tractor; bicycle; motor scooter = scooter; sailboat; airplane; helicopter; rocket
locomotive = steam train; anchor; sun *; crescent moon; star; cloud; rainbow; snowflake; snowman; fire *
umbrella; high voltage = lightning bolt; guitar; trumpet; drum; balloon; wrapped gift = gift; trophy
soccer ball; basketball; crown; red heart = heart; gem stone = diamond; key; light bulb; camera
alarm clock; bell; scissors = pair of scissors; top hat; ghost; robot; jack-o-lantern = pumpkin
"""

SYMBOLS, FLAGS, COMPONENTS = 8, 9, 2  # CLDR groups without things to draw
TEXT_LIKE = re.compile(
    r"o’clock|-thirty$|: facing right|^family|^kiss: |^couple with heart: |^(spade|heart|diamond|club) suit$"
    r"|^(hundred points|ZZZ|joker|e-mail|mahjong red dragon|left speech bubble|right anger bubble)$"
)
# A revolver in blob, a toy in the others: one code point, two things.
OTHER_OBJECT = {"water pistol"}
MIRRORED = {"magnifying glass tilted right"}


@dataclass(frozen=True)
class Thing:
    """An object of a domain: its CLDR entry, and "fox", "a fox", "foxes" (None: never counted)."""

    label: Label
    name: str
    phrase: str
    plural: str | None


def small_domain(labels: Iterable[Label]) -> list[Thing]:
    """The 120 objects of the small domain, in the order of the table."""
    by_name = {label.label: label for label in labels}
    things = []
    for entry in parse_list(SMALL):
        uncounted = entry.endswith("*")
        source, _, name = (part.strip() for part in entry.rstrip(" *").partition("="))
        if source not in by_name:
            raise DataError(f"the label data has no object {source!r}", "Use the pinned emojibase-data.")
        name = name or source
        many = name.endswith("s") and uncounted
        phrase = name if many else f"the {name}" if name == "sun" else with_article(name)
        things.append(Thing(by_name[source], name, phrase, None if uncounted else plural(name)))
    return things


def full_domain(labels: Iterable[Label]) -> list[Thing]:
    """Every object but symbols, flags, clocks, tones, families and doubles, called by its CLDR label."""
    things = [
        Thing(label, *noun_phrase(label.label))
        for label in labels
        if label.group not in (SYMBOLS, FLAGS, COMPONENTS)
        and not TEXT_LIKE.search(label.label)
        and label.label not in OTHER_OBJECT | MIRRORED
    ]
    names = {thing.name for thing in things}  # "houses" is an object of its own, so no count of the house
    return [replace(thing, plural=None) if thing.plural in names else thing for thing in things]


def held_out_family(code: str, styles: Sequence[str]) -> str | None:
    """The family of drawings of an object that training must not show, for a quarter of the objects.

    Only objects drawn in at least three families take part, so two remain to learn it from.
    """
    families = sorted({FAMILIES[style] for style in styles})
    if len(families) < 3 or not is_held_out(HELD_OUT_OBJECTS, "drawing", code):
        return None
    return pick(families, "held out family", code)
