"""The word tables of the DiceBear styles: only what can be told apart at 64 pixels has a name."""

from __future__ import annotations

from sfumato.data.avatars import AvatarStyle, Feature, Values, colours, variants
from sfumato.data.words import listed, sentence, with_article

# One name, one colour, in all styles; the words are those of the backgrounds of drawings and scenes.
LIGHT = {
    "white": "#eef2f7",
    "red": "#f26d6d",
    "orange": "#fdba74",
    "yellow": "#fcdb4d",
    "green": "#86d98f",
    "blue": "#7dc4fc",
    "purple": "#b79cf5",
    "pink": "#f9a8d4",
}
DARK = {
    "red": "#b3202c",
    "orange": "#c2560c",
    "green": "#047857",
    "blue": "#1d4ed8",
    "purple": "#6428c8",
    "black": "#1e2430",
}
EYES = {
    "round eyes": "round",
    "happy eyes": "happy",
    "sleepy eyes": "sleepy",
    "angry eyes": "angry",
}
MOUTHS = {"a smile": "smile", "a grin": "grin", "a frown": "frown", "an open mouth": "open"}
SHAPES = {"round": "dome", "square": "block", "tall": "tower"}
TOPS = {
    "": "",
    "horns": "horns",
    "an antenna": "antenna",
    "round ears": "earsRound",
    "pointy ears": "earsPointy",
    "spikes": "spikes",
    "a sprout": "sprout",
}
NO_MARKS = {"patternProbability": 0, "cheeksProbability": 0}
FLOWERS = frozenset({"flower", "tulip"})


def ground(colour: str) -> str:
    return f"on {with_article(colour)} background"


def critter_captions(values: Values) -> list[str]:
    """ "a tall blue critter with horns, one eye and a smile, on a red background"."""
    creature = f"{with_article(values['shape'])} {values['body']} critter"
    whole = listed([values["top"], values["eyes"], values["mouth"]])
    return [
        f"{creature} with {whole}, {ground(values['background'])}",
        sentence(creature, f"with {values['top']}" if values["top"] else "", ground(values["background"])),
        f"{with_article(values['body'])} critter with {listed([values['eyes'], values['mouth']])}",
    ]


def sprout_captions(values: Values) -> list[str]:
    """ "a red tulip in a blue pot with happy eyes and a smile, on a green background"."""
    plant = with_article(sentence(values.get("bloom", ""), values["plant"]))
    potted = f"{plant} in {with_article(values['pot'])} pot"
    face = listed([values["eyes"], values["mouth"]])
    return [
        f"{potted} with {face}, {ground(values['background'])}",
        f"{potted} {ground(values['background'])}",
        f"{potted} with {face}",
    ]


def planet_captions(values: Values) -> list[str]:
    """ "a striped blue planet with a wide ring and two moons, in a purple sky"."""
    planet = f"{with_article(values['surface'])} {values['planet']} planet"
    around = listed([values["ring"], values["moons"]])
    sky = f"in {with_article(values['sky'])} sky"
    return [
        sentence(planet, f"with {around}," if around else "", sky),
        sentence(planet, f"with {around}" if around else ""),
        f"{with_article(values['planet'])} planet {sky}",
    ]


def landscape_captions(values: Values) -> list[str]:
    """ "green mountains under a pink sky with a yellow sun"."""
    land = f"{values['hills']} {values['terrain']}"
    sky = f"{with_article(values['sky'])} sky"
    sun = f"with {with_article(values['sun'])} sun" if values["sun"] else ""
    return [
        sentence(land, "under", sky, sun),
        sentence("a landscape of", land, sun),
        f"{land} and {sky}",
    ]


CRITTERS = AvatarStyle(
    name="critters",
    features={
        "shape": variants("body", SHAPES),
        "body": Feature(
            {  # the parts on top follow the body's colour, so that they need no words
                word: {
                    "bodyColor": [code],
                    "accentColor": [LIGHT["pink" if word in ("yellow", "green") else "yellow"]],
                }
                for word, code in LIGHT.items()
            }
        ),
        "top": variants("top", TOPS),
        "eyes": variants("eyes", EYES | {"one eye": "mono", "three eyes": "trio"}),
        "mouth": variants("mouth", MOUTHS | {"big teeth": "teeth"}),
        "background": colours("background", DARK),
    },
    held_out=("body", "top"),
    captions=critter_captions,
    fixed=NO_MARKS,
)
SPROUTS = AvatarStyle(
    name="sprouts",
    features={
        "plant": variants(
            "plant",
            {name: name for name in ("sprout", "cactus", "succulent", "bush", "flower", "tulip")}
            | {"palm tree": "palm"},
        ),
        "bloom": colours(
            "bloom",
            {name: LIGHT[name] for name in ("white", "red", "yellow", "purple", "pink")},
            needs=("plant", FLOWERS),
        ),
        "pot": colours("pot", LIGHT),
        "eyes": variants("eyes", EYES),
        "mouth": variants("mouth", MOUTHS),
        "background": colours("background", DARK),
    },
    held_out=("plant", "pot"),
    captions=sprout_captions,
    fixed=NO_MARKS | {"potVariant": ["taper"], "plantColor": ["#4ade80"], "bloomColor": [LIGHT["pink"]]},
)
PLANETS = AvatarStyle(
    name="planets",
    features={
        "planet": colours(
            "planet",
            {
                "white": "#d5dae4",
                "red": "#e2574f",
                "orange": "#ee943c",
                "yellow": "#e8cb3f",
                "green": "#6dbb5c",
                "blue": "#479fe7",
                "purple": "#a07de8",
                "pink": "#ea86b8",
            },
        ),
        "surface": variants(
            "surface",
            {
                "smooth": "",
                "striped": "banded",
                "cratered": "cratered",
                "marbled": "marbled",
                "cracked": "cracked",
                "cloudy": "terra",
            },
        ),
        "ring": variants("ring", {"": "", "a thin ring": "thin", "a wide ring": "bold"}),
        "moons": variants("moons", {"": "", "a moon": "one", "two moons": "two"}),
        "sky": colours(
            "background", {"black": "#14161d", "blue": "#182c6b", "purple": "#3f1a63", "green": "#0b4437"}
        ),
    },
    held_out=("planet", "surface"),
    captions=planet_captions,
    fixed={"shadeVariant": ["soft"], "moonColor": ["#e0ded8"]},
)
HILLS = {
    "green": ("#b0d2b0", "#84ae85", "#508659", "#2c5837"),
    "brown": ("#e2bc9e", "#c38f65", "#a26144", "#6a3c2c"),
    "blue": ("#a8cde8", "#76a5c6", "#507ca1", "#30506f"),
    "purple": ("#d3bfe6", "#a98cc8", "#7d5aa4", "#4d3374"),
    "golden": ("#f2dd9a", "#dcb858", "#b8892f", "#7d5a1c"),
}
LANDSCAPE = AvatarStyle(
    name="landscape",
    features={
        "hills": Feature(
            {
                word: {f"hill{number}Color": [code] for number, code in enumerate(codes, start=1)}
                for word, codes in HILLS.items()
            }
        ),
        "terrain": Feature(
            {
                word: {f"hill{number}Variant": [variant] for number in range(1, 5)}
                for word, variant in {"mountains": "ridge", "hills": "rolling", "plains": "gentle"}.items()
            }
        ),
        "sky": colours(
            "background",
            {
                "blue": "#bfe3ff",
                "pink": "#ffd0dc",
                "yellow": "#fff0b8",
                "orange": "#ffcf9e",
                "purple": "#dccbff",
                "white": "#f7f7f4",
                "black": "#1c2338",
            },
        ),
        "sun": Feature(
            {"": {"orbProbability": 0}}
            | {
                word: {"orbVariant": ["sun"], "orbColor": [code], "orbProbability": 100}
                for word, code in {"yellow": "#f5c518", "orange": "#fb8b24", "red": "#e5484d"}.items()
            }
        ),
    },
    held_out=("hills", "sky"),
    captions=landscape_captions,
)
SMALL_STYLES = (CRITTERS, SPROUTS, PLANETS, LANDSCAPE)
