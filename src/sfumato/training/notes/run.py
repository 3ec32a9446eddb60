"""From the notes' configuration file to a trained model: `python main.py` of the notes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sfumato.errors import InputError
from sfumato.training.config import TrainingConfig
from sfumato.training.distributed import joined
from sfumato.training.loop import Report
from sfumato.training.notes.ini import read_ini
from sfumato.training.notes.keys import NotesConfig, parse
from sfumato.training.notes.samples import Samples
from sfumato.training.notes.translate import advice, training_config
from sfumato.training.run import trained
from sfumato.training.tasks.reproduction import ReproductionTask, samples_of


def run(path: Path, overrides: Sequence[str] = (), report: Report = lambda _: None) -> Path:
    """Train by an INI file, resuming where its save_path stops; returns the model file.

    overrides: `key=value` as in the file. What is wrong with the file although it runs is reported as
    warnings. Errors as `sfumato.training.run`.
    """
    notes, warnings = read_notes(path, overrides)
    with joined(notes.device) as (processes, device):
        told = report if processes.first else lambda _: None
        config, samples = _opened(notes, warnings, path.stem, told)
        return trained(config, lambda: ReproductionTask(config, samples, device), device, told, processes)


def recipe(path: Path, overrides: Sequence[str] = (), report: Report = lambda _: None) -> TrainingConfig:
    """What `run` would train by, for a plan of it."""
    return _opened(*read_notes(path, overrides), path.stem, report)[0]


def _opened(
    notes: NotesConfig, warnings: Sequence[str], name: str, report: Report
) -> tuple[TrainingConfig, Samples]:
    for warning in [*warnings, *advice(notes)]:
        report({"warning": warning})
    samples = samples_of(training_config(notes, 1, name), report)
    return training_config(notes, len(samples), name), samples


def read_notes(path: Path, overrides: Sequence[str] = ()) -> tuple[NotesConfig, list[str]]:
    """(configuration, warnings) of a file; `InputError` for one that cannot be read, or says nonsense."""
    values, warnings = read_ini(path)
    for override in overrides:
        key, equals, text = override.removeprefix("--").partition("=")
        if not equals:
            raise InputError(f"override {override!r} has no value", "Write it as --epochs=5")
        values[key] = text
    return parse(values, str(path)), warnings
