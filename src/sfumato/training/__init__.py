"""Training: one loop, its tasks, its data and its state (extra `[train]` for the progress line)."""

from sfumato.training.run import run as run

__all__ = ["run"]
