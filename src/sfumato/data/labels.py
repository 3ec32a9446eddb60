"""What captions call the objects of Unicode CLDR: labels as noun phrases with an article, and plurals."""

from __future__ import annotations

import re

from sfumato.data.words import parse_list, parse_table, plural, with_article

# Labels that are adjectives, verbs or unusual names, and what people would call the drawing.
RENAMED = parse_table("""
locked = padlock; unlocked = open padlock; locked with pen = padlock with a pen
locked with key = padlock with a key; dizzy = dizzy star; dashing away = puff of smoke
collision = explosion; high voltage = lightning bolt; construction = construction barrier
hourglass done = hourglass; hourglass not done = hourglass with falling sand; foggy = foggy city
camping = campsite; wood = wooden log; cooking = fried egg; mate = mate drink; thumbs up = thumb up
thumbs down = thumb down; horse racing = jockey on a horse; tennis = tennis racket and ball
bowling = bowling ball and pins; field hockey = field hockey stick; ice hockey = ice hockey stick
lacrosse = lacrosse stick; ping pong = table tennis bat; badminton = badminton racket
leaf fluttering in wind = leaf in the wind; page facing up = sheet of paper; memo = note with a pencil
chart increasing = rising chart; chart decreasing = falling chart; breast-feeding = nursing mother
chart increasing with yen = rising chart with a yen sign; headphone = pair of headphones
scissors = pair of scissors; label = luggage tag; metro = metro train
skull and crossbones = skull with crossbones; magnifying glass tilted left = magnifying glass
airplane departure = departing airplane; airplane arrival = landing airplane; baguette bread = baguette
bread = loaf of bread; speaker low volume = quiet speaker; speaker medium volume = speaker
speaker high volume = loud speaker; fire engine = fire truck; automobile = car; honeybee = bee
lady beetle = ladybug; doughnut = donut; gem stone = gem; wrapped gift = gift; deciduous tree = tree
evergreen tree = pine tree; jack-o-lantern = carved pumpkin; dna = DNA strand
""")

# Taken as they are, never counted: masses, plurals the rule misses, games, proper names.
BARE = parse_list("""
bacon; broccoli; garlic; popcorn; butter; salt; canned food; cooked rice; curry rice; spaghetti; oden
sushi; dango; sake; ice; shaved ice; meat on bone; coral; fog; fire; luggage; money with wings; thread
yarn; soap; custard; ginger root; bubble tea; candy; fondue; falafel; nail polish; ballet shoes
mount fuji; Tokyo tower; hot springs; people hugging; pouring liquid; Santa Claus; Mrs. Claus; Mx Claus
performing arts; building construction; palms up together; green salad
""")
THE = {
    "sun": "the sun",
    "milky way": "the milky way",
    "Statue of Liberty": "the Statue of Liberty",
    "kaaba": "the Kaaba",
}
SINGULAR_IN_S = re.compile(r"(ss|us|is|os|biceps|compass|lens)$")
PREPOSITIONS = re.compile(r" (?:of|with|on|in|at|behind|showing|without|over|up|holding|lifting|wrestling) ")


def noun_phrase(label: str) -> tuple[str, str, str | None]:
    """(name, phrase, plural) of a label: ("fox", "a fox", "foxes"), ("grapes", "grapes", None)."""
    name = RENAMED.get(label, described(label))
    if name in THE:
        return name, THE[name], None
    if name in BARE or is_plural(name):
        return name, name, None
    single = not re.search(r" (and|in|at|over|without|up|wearing|holding|lifting|behind) |\d", name)
    return name, with_article(name), plural(name) if single else None


def described(label: str) -> str:
    """ "man: red hair" -> "man with red hair", "woman: bald" -> "bald woman"; other labels as they are."""
    person, colon, trait = label.partition(": ")
    if not colon:
        return label
    if trait == "bald":
        return f"{trait} {person}"
    return f"{person} with {'a beard' if trait == 'beard' else trait}"


def is_plural(name: str) -> bool:
    """Whether the head noun of a phrase is already plural ("french fries", "people with bunny ears")."""
    head = PREPOSITIONS.split(name, maxsplit=1)[0].split(" ")[-1]
    first = name.split(" ")[0]
    if first in ("people", "men", "women") or head in ("people", "men", "women"):
        return True
    return head.endswith("s") and not SINGULAR_IN_S.search(head)
