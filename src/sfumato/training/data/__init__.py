"""Captioned pictures for training, in an order that is a function of (seed, epoch) alone."""

from sfumato.training.data.batches import ahead, batches, groups, load, load_parts
from sfumato.training.data.captions import CaptionRules, caption, every_caption, fixed_caption, varied
from sfumato.training.data.dataset import Dataset, Part, Placed, Size, View, to_tensor
from sfumato.training.data.illustrations import Illustrations
from sfumato.training.data.open import Folder, bucket_rules, caption_rules, open_data, open_dataset
from sfumato.training.data.pictures import PictureSet
from sfumato.training.data.positions import WHOLE, Position, Share, held_out, positions
from sfumato.training.data.quarantine import Quarantine
from sfumato.training.data.reading import FAULTS as DAMAGE
from sfumato.training.data.records import FORMATS

__all__ = [
    "DAMAGE",
    "FORMATS",
    "WHOLE",
    "CaptionRules",
    "Dataset",
    "Folder",
    "Illustrations",
    "Part",
    "PictureSet",
    "Placed",
    "Position",
    "Quarantine",
    "Share",
    "Size",
    "View",
    "ahead",
    "batches",
    "bucket_rules",
    "caption",
    "caption_rules",
    "every_caption",
    "fixed_caption",
    "groups",
    "held_out",
    "load",
    "load_parts",
    "open_data",
    "open_dataset",
    "positions",
    "to_tensor",
    "varied",
]
