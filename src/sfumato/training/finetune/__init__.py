"""Fine-tuning: models that there are, trained whole, by LoRA, by a word, or with a network beside them."""

from sfumato.training.finetune.task import FinetuneTask

__all__ = ["FinetuneTask"]
