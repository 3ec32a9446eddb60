"""Model configurations: what describes a whole latent diffusion model, as a value and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from sfumato.diffusion.prediction import PREDICTIONS
from sfumato.diffusion.schedule import ScheduleConfig
from sfumato.errors import CheckpointError, InputError, nearest
from sfumato.nn.autoencoder import AutoencoderConfig
from sfumato.nn.bert import BERTConfig
from sfumato.nn.classes import ClassEmbedderConfig
from sfumato.nn.clip import CLIPTextConfig
from sfumato.nn.preview import PreviewConfig
from sfumato.nn.unet import UNetConfig
from sfumato.text.encode import SIZES_WIDTH
from sfumato.text.tokenizer import CLIP_VOCABULARY, Tokenizer, clip_json
from sfumato.text.wordpiece import WordPiece

T = TypeVar("T")
FORMAT_VERSION = 1
PARTS = ("unet", "autoencoder", "text", "text2", "bert", "classes", "preview")
MAX_NUMBER = 1_000_000  # in a file's description; no width, count or size of a real model comes near
CONCATS = ("inpaints", "inpaints_black", "edits", "enlarges")
DEFAULTS = ("steps", "sampler", "spacing", "guidance", "eta", "variance", "width", "height")


def known_keys(kind: type) -> BeforeValidator:
    """Refuse keys that the dataclass `kind` lacks; pydantic ignores them in plain dataclasses."""
    return BeforeValidator(partial(_known, kind))


def _known(kind: Any, value: Any) -> Any:
    names = [field.name for field in dataclasses.fields(kind)]
    for key in value if isinstance(value, Mapping) else ():
        if key not in names:
            raise ValueError(f"unknown key {key!r}. {nearest(str(key), names)}")
    return value


# The configurations as they are read from JSON and TOML.
UNetTable = Annotated[UNetConfig, known_keys(UNetConfig)]
AutoencoderTable = Annotated[AutoencoderConfig, known_keys(AutoencoderConfig)]
TextTable = Annotated[CLIPTextConfig, known_keys(CLIPTextConfig)]
BERTTable = Annotated[BERTConfig, known_keys(BERTConfig)]
PreviewTable = Annotated[PreviewConfig, known_keys(PreviewConfig)]
ClassesTable = Annotated[ClassEmbedderConfig, known_keys(ClassEmbedderConfig)]
ScheduleTable = Annotated[ScheduleConfig, known_keys(ScheduleConfig)]


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a model but its weights; a part that it lacks is None.

    text2 is SDXL's second text encoder, bert that of LDM's 1.45 B model, classes a table of numbered classes;
    at most one of text, bert and classes makes the U-Net's context. clip_skip: the layer of text and text2 to
    read, from the end, 1 the last; text_normed: through their final norm; zeros_for_empty: an absent negative
    prompt is all zeros. `tokenizer` is the tokenizer's own JSON; `image_size` the (height, width) in pixels
    it was trained at; `defaults` are request fields it draws best with, `notices` credits and licences of
    what it learned from. preview: a tiny decoder of scaled latents; latent_rgb: (z + 1, c) numbers, the
    colour in -1..1 that each channel of a scaled latent adds to its pixels, and last the one they add it to;
    latent_spread: mean and deviation of every channel of the unscaled latents.
    concat: what the U-Net's further channels show: "inpaints" the mask and the latents of the picture, grey
    where it is masked; "inpaints_black" those latents, black where it is masked, and the mask in -1..1 (LDM's
    own inpainting); "edits" the picture's latents; "enlarges" the picture itself, as small as the latents,
    whose noise is then the U-Net's label. None: what their number says, see `concat_kind`.
    no_class: the last of the U-Net's own labels is "no class", for guidance.
    Raises InputError for an unknown prediction, a scale or size that is not positive, other request fields,
    rows of numbers that are not as long as each other.
    """

    name: str
    unet: UNetTable | None = None
    autoencoder: AutoencoderTable | None = None
    text: TextTable | None = None
    tokenizer: str | None = None
    schedule: ScheduleTable = field(default_factory=ScheduleConfig)
    prediction: str = "eps"
    latent_scale: float = 1.0
    image_size: tuple[int, ...] = (64, 64)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    notices: str = ""
    text2: TextTable | None = None
    bert: BERTTable | None = None
    classes: ClassesTable | None = None
    clip_skip: int = 1
    text_normed: bool = True
    zeros_for_empty: bool = False
    preview: PreviewTable | None = None
    latent_rgb: tuple[tuple[float, ...], ...] | None = None
    latent_spread: tuple[tuple[float, ...], ...] | None = None
    concat: str | None = None
    no_class: bool = False

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise InputError(
                f"there is no prediction {self.prediction!r}", nearest(self.prediction, PREDICTIONS)
            )
        if self.concat is not None and self.concat not in CONCATS:
            raise InputError(f"concat is {self.concat!r}", nearest(self.concat, CONCATS))
        if not 0 < self.latent_scale < math.inf:
            raise InputError(f"latent_scale is {self.latent_scale}; it must be positive")
        if self.clip_skip < 1:
            raise InputError(f"clip_skip is {self.clip_skip}; 1 is the last layer")
        if not 1 <= len(self.image_size) <= 3 or min(self.image_size) < 1:
            raise InputError(f"image_size is {self.image_size}; it needs one to three positive sides")
        for key in self.defaults:
            if key not in DEFAULTS:
                raise InputError(f"a model has no default {key!r}", nearest(key, DEFAULTS))
        for key in ("latent_rgb", "latent_spread"):
            rows = getattr(self, key)
            if rows is not None and (len(rows) < 2 or len({len(row) for row in rows}) != 1):
                raise InputError(f"{key} has rows of {[len(row) for row in rows]} numbers", "")

    def to_json(self) -> str:
        """JSON text for a model file's metadata."""
        return describe(self)

    @classmethod
    def from_json(cls, text: str, source: str = "the model file") -> ModelConfig:
        """Inverse of `to_json`; `CheckpointError` for another version and for what describes no model."""
        return described(text, cls, source)


def describe(value: Any) -> str:
    """JSON text of a dataclass that describes a file of ours, for its metadata."""
    values = {"version": FORMAT_VERSION, **dataclasses.asdict(value)}
    return json.dumps(values, ensure_ascii=False, allow_nan=False)


def described(text: str, kind: type[T], source: str) -> T:
    """Inverse of `describe`; `CheckpointError` for another version and for what describes none."""
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("it is no table")
        version = values.pop("version", None)
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{source} has format {version!r}, this program reads {FORMAT_VERSION}", "Update sfumato."
            )
        for number in _numbers(values):
            if not abs(number) <= MAX_NUMBER:
                raise ValueError(f"it holds the number {number:g}")
        return _adapter(kind).validate_python(_known(kind, values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise _damaged(source, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (ValueError, TypeError, ArithmeticError, LookupError, RecursionError) as error:
        raise _damaged(source, str(error)) from error


def num_classes(config: ModelConfig) -> int | None:
    """The classes that a model draws by number, None where it takes no number."""
    if config.classes is not None:
        return config.classes.n_classes
    return None if concat_kind(config) == "enlarges" else _labels(config)


def no_class(config: ModelConfig) -> int | None:
    """The number that says "no class", None where there is none: such a model cannot be guided by classes."""
    count = num_classes(config)
    free = config.no_class if config.classes is None else config.classes.unconditional
    return count - 1 if count is not None and free else None


def noise_levels(config: ModelConfig) -> int | None:
    """How many noise levels a model that enlarges pictures knows; None for one that is not told any."""
    return _labels(config) if concat_kind(config) == "enlarges" else None


def concat_kind(config: ModelConfig) -> str | None:
    """What the U-Net's further channels show, one of CONCATS; None where there are none, or any other number.

    Where the config does not say, 1 more than latents have is "inpaints", as many is "edits", and as many as
    pictures have is "enlarges".
    """
    unet, autoencoder = config.unet, config.autoencoder
    if unet is None or unet.in_channels == unet.out_channels:
        return None
    if config.concat is not None:
        return config.concat
    count = unet.in_channels - unet.out_channels
    pictures = {autoencoder.in_channels: "enlarges"} if autoencoder else {}
    return (pictures | {unet.out_channels: "edits", 1 + unet.out_channels: "inpaints"}).get(count)


def _labels(config: ModelConfig) -> int | None:
    labels = config.unet and config.unet.num_classes
    return labels if isinstance(labels, int) else None


def context_width(config: ModelConfig) -> int | None:
    """Width of the context that the model's text encoders or classes make; None where it has neither."""
    if config.text is not None:
        return config.text.hidden_size + (config.text2.hidden_size if config.text2 else 0)
    if config.bert is not None:
        return config.bert.n_embed
    return None if config.classes is None else config.classes.embed_dim


def check_parts(config: ModelConfig) -> None:
    """`InputError` where the parts of a model that draws do not fit together."""
    unet, autoencoder, text2 = config.unet, config.autoencoder, config.text2
    assert unet is not None
    if autoencoder and autoencoder.embed_dim != unet.out_channels:
        raise InputError(
            f"the U-Net has {unet.out_channels} channels, latents {autoencoder.embed_dim}",
            "Set unet.out_channels to the autoencoder's embed_dim.",
        )
    if unet.in_channels < unet.out_channels:
        raise InputError(
            f"unet.in_channels is {unet.in_channels}, unet.out_channels {unet.out_channels}",
            "The input holds the sample, and maybe more.",
        )
    sources = [name for name in ("text", "bert", "classes") if getattr(config, name) is not None]
    if len(sources) > 1 or (text2 and sources != ["text"]):
        raise InputError(
            f"{config.name!r} has {' and '.join([*sources, *(['text2'] if text2 else [])])}",
            "One of text, bert and classes makes the context; text2 stands beside text.",
        )
    if sources and unet.context_dim != context_width(config):
        widths = " + ".join(_context_parts(config))
        raise InputError(f"unet.context_dim is {unet.context_dim}, {widths}", "Make them equal.")
    if text2 and unet.adm_in_channels != text2.pooled_size + SIZES_WIDTH:
        raise InputError(
            f"unet.adm_in_channels is {unet.adm_in_channels}; text2's pooled vector has {text2.pooled_size} "
            f"numbers, the sizes {SIZES_WIDTH}",
            "Make it their sum.",
        )


def _context_parts(config: ModelConfig) -> Iterator[str]:
    """The context's widths with the fields that set them."""
    widths = {"text": "hidden_size", "text2": "hidden_size", "bert": "n_embed", "classes": "embed_dim"}
    for part, field_name in widths.items():
        if (found := getattr(config, part)) is not None:
            yield f"{part}.{field_name} {getattr(found, field_name)}"


@cache
def _adapter(kind: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(kind)


def _numbers(value: Any) -> Iterator[float]:
    """Every number in a JSON value."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield value


def _damaged(source: str, reason: str) -> CheckpointError:
    return CheckpointError(f"the description in {source} is damaged: {reason}", "Get the file again.")


def check_tokenizer(config: ModelConfig, tokenizer: Callable[[], Tokenizer | WordPiece | None]) -> None:
    """`InputError` where the text encoders do not know all tokens that the tokenizer gives."""
    if config.tokenizer in (clip_json(), clip_json("!")):
        kind, size = Tokenizer, CLIP_VOCABULARY  # known without the time it takes to build it
    else:
        own = tokenizer()
        kind, size = type(own), own.vocab_size if own else 0
    encoders = ((config.text, Tokenizer), (config.text2, Tokenizer), (config.bert, WordPiece))
    for encoder, wanted in encoders:
        if encoder is None or (wanted is WordPiece and not size):
            continue  # BERT's vocabulary comes from its user, when there are prompts
        if kind is not wanted or size > encoder.vocab_size:
            raise InputError(
                f"the tokenizer has {size or 'no'} tokens, the text encoder {encoder.vocab_size}",
                "Give the tokenizer that the text encoder was trained with.",
            )
