"""Errors a user can fix: the command line prints their message and exits with status 1, without a traceback."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

LONGEST_WORD, LONGEST_LINE = 300, 2000  # characters that are printed, see `printable`


class UserError(Exception):
    """Base of all errors whose cause is in the user's files, settings or machine; the message explains the fix."""


class ConfigError(UserError, ValueError):
    """A configuration cannot be used; the message gives the path of every key in question."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be read or written; the message names the file and what to do."""


class DamagedCheckpointError(CheckpointError):
    """A file of a checkpoint is missing, empty or torn; an older checkpoint can be used instead."""


class DataError(UserError, ValueError):
    """Something is wrong with the data; the message names the file, row or key and how to fix it."""


class NoSuchSplitError(DataError):
    """The data exists, but not the requested split or dataset."""


class BadSampleError(DataError):
    """One sample cannot be used (`data.bad_samples: skip` continues without it)."""


class CacheError(DataError):
    """A feature cache is missing, stale, incomplete or damaged; the message explains what to do."""


class BuildError(UserError, RuntimeError):
    """The compiled kernels cannot be built or loaded; the message contains the compiler output."""


class TrainingError(UserError, RuntimeError):
    """Training cannot continue; the message names the first affected step and the reason."""


class PredictionError(UserError, RuntimeError):
    """A model predicts NaN or Inf; the message names the first sample and the reason."""


def out_of_memory(error: BaseException) -> str:
    """Return the message for the user if there was too little memory, of a GPU or the machine, else ""."""
    found = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # of torch, not imported here
    lines = str(error).strip().splitlines() or ["out of memory"]
    # The errors of torch and NumPy; that of a data worker is at the end of a traceback.
    reasons = [line.strip() for line in lines if "DefaultCPUAllocator" in line or "ArrayMemoryError: " in line]
    if not found and not reasons:
        return ""
    reason = reasons[-1] if reasons else lines[0]
    return (
        f"{reason}: use a smaller data.batch_size (train.accumulate keeps the samples per step), smaller images, "
        "model.gradient_checkpointing=true where the model has it, or data.cache.resident=false with a cache"
    )


def unpickling_problem(error: Exception) -> str:
    """Return why torch.load failed in one line, without its advice to load the file in a way that runs its code."""
    lines = str(error).split("WeightsUnpickler error:")[-1].splitlines()
    return next((line.strip() for line in lines if line.strip() and "weights_only" not in line), type(error).__name__)


def printable(text: str) -> str:
    """Escape control characters, such as those that move the cursor of a terminal or hide text; a line stays a line.

    The middle of very long words and lines is left out: names in data and files can have any length.
    """
    text = re.sub(rf"\S{{{LONGEST_WORD + 1},}}", lambda word: _shortened(word[0], LONGEST_WORD), text)
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in _shortened(text, LONGEST_LINE))


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]} [...] {text[-limit // 3 :]}"


def closest(name: object, known: Iterable[str], limit: int = 1, cutoff: float = 0.5) -> list[str]:
    """The known names most similar to a misspelled one, best first; empty if none is similar.

    A name and its initials are similar, such as learning_rate and lr.
    """
    name, names = str(name), list(known)
    short = [own for own in names if name and own and (own == _initials(name) or name == _initials(own))]
    return list(dict.fromkeys([*short, *difflib.get_close_matches(name, names, n=limit, cutoff=cutoff)]))[:limit]


def _initials(name: str) -> str:
    """First letters of the words of a name; empty for a single word."""
    words = name.split("_")
    return "".join(word[:1] for word in words) if len(words) > 1 else ""
