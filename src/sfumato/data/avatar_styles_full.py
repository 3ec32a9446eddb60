"""The word tables of the four further DiceBear styles that the full domain adds to the small one's four."""

from __future__ import annotations

from sfumato.data.avatar_styles import DARK, EYES, LIGHT, MOUTHS, SMALL_STYLES, ground
from sfumato.data.avatars import AvatarStyle, Values, colours, variants
from sfumato.data.words import listed, sentence, with_article

PASTEL = {
    "white": "#f4f4f0",
    "orange": "#ffd9b0",
    "yellow": "#fff0b8",
    "green": "#cdeecf",
    "blue": "#c4e4fb",
    "purple": "#d6c9f5",
    "pink": "#ffd0dc",
}
HAIR = {
    "": "",
    "a {} fringe": "fringe",
    "a {} bun": "crest",
    "{} curls": "curls",
    "swept {} hair": "swoosh",
    "long {} hair": "long",
}
HEADS = {
    "short hair": "short1",
    "long hair": "long",
    "long curly hair": "longCurly",
    "straight hair": "mediumStraight",
    "an afro": "afro",
    "three buns": "buns",
    "a mohawk": "mohawk",
    "a bald head": "noHair1",
    "a hat": "hatHip",
    "a beanie": "hatBeanie",
    "a turban": "turban",
    "a hijab": "hijab",
}


def mood_captions(values: Values) -> list[str]:
    """ "a square blue face with happy eyes and a smile, on a red background"."""
    face = f"{with_article(values['shape'])} {values['face']} face"
    whole = listed([values["eyes"], values["mouth"]])
    return [
        f"{face} with {whole}, {ground(values['background'])}",
        f"{face} with {whole}",
        f"{with_article(values['face'])} face {ground(values['background'])}",
    ]


def cutout_captions(values: Values) -> list[str]:
    """ "a blue paper face with long brown hair and a smile"."""
    face = f"{with_article(values['face'])} paper face"
    hair = values["hair"].format(values.get("colour", ""))
    return [f"{face} with {listed([hair, values['mouth']])}", sentence(face, f"with {hair}" if hair else "")]


def robot_captions(values: Values) -> list[str]:
    """ "a green voxel robot with an antenna, square eyes and a heart on its chest, on a pink background"."""
    robot = f"{with_article(values['body'])} voxel robot"
    chest = f"{values['chest']} on its chest" if values["chest"] else ""
    return [
        f"{robot} with {listed([values['top'], values['eyes'], chest])}, {ground(values['background'])}",
        f"{robot} with {listed([values['top'], values['eyes']])}",
        f"{robot} {ground(values['background'])}",
    ]


def peep_captions(values: Values) -> list[str]:
    """ "a smiling person with an afro, glasses and a beard, in a blue shirt"."""
    whole = listed([values["hair"], values["glasses"], values.get("beard", "")])
    shirt = f"in {with_article(values['shirt'])} shirt"
    return [
        f"{with_article(values['mood'])} person with {whole}, {shirt}",
        f"a person with {whole}, {ground(values['background'])}",
        f"{with_article(values['mood'])} person {shirt}",
    ]


MOODS = AvatarStyle(
    name="moods",
    features={
        "shape": variants(
            "face", {"round": "circle", "square": "softSquare", "wide": "wide", "tall": "tall"}
        ),
        "face": colours("face", LIGHT),
        "eyes": variants(
            "eyes", EYES | {"round eyes": "pupils", "a winking eye": "wink", "squinting eyes": "squint"}
        ),
        "mouth": variants(
            "mouth", MOUTHS | {"a grin": "bigSmile", "a straight mouth": "line", "its tongue out": "tongue"}
        ),
        "background": colours("background", DARK),
    },
    held_out=("face", "eyes"),
    captions=mood_captions,
    fixed={"cheeksProbability": 0},
)
CUTOUTS = AvatarStyle(
    name="cutouts",
    features={
        "face": colours(
            "paperFace",
            {
                "yellow": "#e8b84a",
                "orange": "#e07856",
                "green": "#93b98a",
                "blue": "#7fb3d5",
                "purple": "#ab96d1",
                "pink": "#e8b4c0",
            },
        ),
        "hair": variants("hair", HAIR),
        "colour": colours(
            "paperHair",
            {"black": "#33312e", "brown": "#8a4a2c", "green": "#4a7a63", "purple": "#7b4b73"},
            needs=("hair", frozenset(HAIR) - {""}),
        ),
        "mouth": variants(
            "mouth", {"a smile": "smile", "a grin": "grin", "an open mouth": "gasp", "a wavy mouth": "wavy"}
        ),
    },
    held_out=("face", "hair"),
    captions=cutout_captions,
    fixed={"browsProbability": 0, "backgroundColor": ["#f6f1e7"]},
)
ROBOTS = AvatarStyle(
    name="voxel-bot",
    features={
        "body": colours(
            "body",
            {
                "white": "#e9ecef",
                "red": "#f26d6d",
                "yellow": "#ffd43b",
                "green": "#69db7c",
                "blue": "#74b4fc",
                "purple": "#a592f2",
            },
        ),
        "top": variants(
            "top",
            {
                "": "",
                "an antenna": "antenna",
                "two antennas": "twin",
                "a dish": "dish",
                "a fin": "fin",
                "a light bar": "lightbar",
                "a siren": "siren",
            },
        ),
        "eyes": variants(
            "eyes",
            {
                "round eyes": "round",
                "square eyes": "square",
                "happy eyes": "happy",
                "one eye": "cyclops",
                "a visor": "visor",
            },
        ),
        "chest": variants("chest", {"": "", "a heart": "heart", "vents": "vents", "a screen": "screen"}),
        "background": colours("background", PASTEL),
    },
    held_out=("body", "top"),
    captions=robot_captions,
    fixed={"glowColor": ["#ff6b6b"], "mouthVariant": ["smile"], "accentColor": ["#343a40"]},
)
PEEPS = AvatarStyle(
    name="open-peeps",
    features={
        "hair": variants("head", HEADS),
        "mood": variants(
            "expression",
            {
                "smiling": "smile",
                "grinning": "smileBig",
                "serious": "serious",
                "angry": "veryAngry",
                "amazed": "awe",
            },
        ),
        "glasses": variants("accessories", {"": "", "glasses": "glasses3", "sunglasses": "sunglasses"}),
        "beard": variants(
            "facialHair",
            {"": "", "a beard": "full3", "a moustache": "moustache5"},
            needs=(
                "hair",
                frozenset({"short hair", "an afro", "a mohawk", "a bald head", "a hat", "a turban"}),
            ),
        ),
        "shirt": colours(
            "clothing",
            {"red": "#e0605a", "yellow": "#fdd75b", "green": "#78d185", "blue": "#7f9fe8", "pink": "#f08fd0"},
        ),
        "background": colours("background", PASTEL),
    },
    held_out=("hair", "shirt"),
    captions=peep_captions,
    fixed={
        "maskProbability": 0,
        "facialHairProbability": 0,
        "headContrastColor": ["#2c1b18", "#724133", "#d6b370"],
    },
)
FULL_STYLES = (*SMALL_STYLES, MOODS, CUTOUTS, ROBOTS, PEEPS)
