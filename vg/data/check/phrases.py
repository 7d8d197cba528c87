"""Checks of class names and phrases: similar names, uninformative names, and prompts that are too long."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable

import numpy as np

from vg.data.check.dataset import CheckedDataset
from vg.data.detection.issues import Severity
from vg.data.detection.vocabulary import Vocabulary, normalized_name
from vg.data.prompt import is_unicode
from vg.errors import DataError

CountTokens = Callable[[list[str]], list[int]]
"""Number of tokens of each phrase, without special tokens."""

_RARE = 10  # boxes
_OPTION = 'vocabulary.phrases={WBC: white blood cell} (vg finetune: --phrases "WBC=white blood cell")'
_RENAME = f"rename or merge them, or set other phrases, such as {_OPTION}"
_UNINFORMATIVE = r"(class|cls|label|object|category|cat|id)?[\W_]*\d+"


def check_phrases(dataset: CheckedDataset, count_tokens: CountTokens | None, max_tokens: int) -> None:
    """Report issues of class names and phrases.

    Args:
        count_tokens: None counts words, which gives lower bounds.
        max_tokens: tokens of the model's longest prompt, special tokens included.
    """
    annotations, add = dataset.annotations, dataset.issues.add
    classes = annotations.names[: annotations.num_classes]
    broken = [repr(name) for name in annotations.names if not is_unicode(name)]
    add("error", "names or phrases that are not valid Unicode", "correct them", broken)
    counts = dict(zip(classes, np.bincount(annotations.labels, minlength=len(classes)).tolist(), strict=False))
    class_phrases = _check_names(dataset, classes) if classes else []
    rare = [f"{name}: {counts[name]}" for name in dataset.classes if 0 < counts[name] < _RARE]
    empty = [name for name in dataset.classes if not counts[name]]
    add("note", f"classes with fewer than {_RARE} boxes", "add examples of these first", rare)
    fix = "leave them out (vocabulary.only, vg finetune: --phrases) unless they are wanted as negatives"
    add("note", "classes without any box", fix, empty)
    if len(classes) == 1 and dataset.is_training:
        fix = "the model may forget other classes; evaluate on a second dataset too (data.eval)"
        add("note", "only one class", fix, classes)
    _check_shared_phrases(dataset)
    _check_lengths(dataset, class_phrases, count_tokens, max_tokens)


def _check_names(dataset: CheckedDataset, names: list[str]) -> list[str]:
    """Report issues of class names; return the phrases of the classes."""
    add = dataset.issues.add
    try:
        phrases = list(Vocabulary(names, dataset.vocabulary, dataset.title).phrases)
    except DataError as error:
        add("error", "invalid vocabulary", _RENAME, [str(error)])
        return names
    normalized = {phrase: normalized_name(phrase) for phrase in phrases}
    variants: dict[str, list[str]] = defaultdict(list)
    for phrase, name in normalized.items():
        variants[name].append(phrase)
    similar = [" = ".join(map(repr, group)) for group in variants.values() if len(group) > 1]
    add("warning", "class names that differ only in case, punctuation or plural", _RENAME, similar)
    contained = [
        f"{inner!r} in {outer!r}"
        for inner, inner_name in normalized.items()
        for outer, outer_name in normalized.items()
        if inner_name and inner_name != outer_name and f" {inner_name} " in f" {outer_name} "
    ]
    fix = "vg keeps their tokens apart, but expect the two classes to be confused"
    add("note", "class names contained in another one", fix, contained)
    symbols = [phrase for phrase in phrases if not any(map(str.isalnum, phrase))]
    add("error", "class names without letter or digit", _RENAME, symbols)
    fix = f"the text encoder needs words: set phrases, such as {_OPTION}"
    acronyms = {phrase for phrase in phrases if phrase.isalpha() and phrase.isupper() and 2 <= len(phrase) <= 5}
    cryptic = [p for p in phrases if re.fullmatch(_UNINFORMATIVE, p.lower()) or p in acronyms - {"TV"}]
    add("warning", "class names that are a number or an abbreviation", fix, cryptic)
    fix = f"these separate phrases in a prompt; set a phrase without them, such as {_OPTION}"
    separated = [phrase for phrase in phrases if re.search(r"[.?]", phrase.rstrip("."))]
    add("warning", 'class names with "." or "?"', fix, separated)
    return phrases


def _check_shared_phrases(dataset: CheckedDataset) -> None:
    """Report phrases that refer to several different boxes of one image."""
    annotations = dataset.annotations
    keys = dataset.sample_keys or annotations.locations
    boxes: dict[tuple[str, int], set[tuple[float, ...]]] = defaultdict(set)
    for index in np.flatnonzero(annotations.labels >= annotations.num_classes).tolist():
        key = keys[annotations.image_indices[index]], int(annotations.labels[index])
        boxes[key].add(tuple(annotations.boxes[index].tolist()))
    shared = [
        f"{image}: {annotations.names[label]!r} has {len(found)} boxes"
        for (image, label), found in boxes.items()
        if len(found) > 1
    ]
    severity: Severity = "note"
    what, fix = "phrases", "nothing if they are different objects: a model must find all of them"
    if dataset.task == "expressions":
        severity = "warning"
        what, fix = "expressions", "make them more specific, so that each refers to one object"
    dataset.issues.add(severity, f"{what} with several boxes in one image", fix, shared)


def _check_lengths(
    dataset: CheckedDataset, class_phrases: list[str], count_tokens: CountTokens | None, max_tokens: int
) -> None:
    """Report prompts with too many tokens; a prompt is [CLS] phrase . phrase . [SEP], or a whole caption."""
    annotations, num_classes = dataset.annotations, len(class_phrases)
    phrases = [*class_phrases, *annotations.names[num_classes:]]
    phrases = [phrase if is_unicode(phrase) else "" for phrase in phrases]
    count = count_tokens or _count_words
    tokens = np.array(count(phrases), np.int64) + 1  # [names], with separator
    bound = "" if count_tokens else "at least "
    needed = int(tokens[:num_classes].sum()) + 2
    fix = f"the model takes at most {max_tokens} tokens; set a shorter phrase, such as {_OPTION}"
    labels = np.flatnonzero(tokens[:num_classes] + 2 > max_tokens).tolist()
    examples = [f"{phrases[label][:60]!r}: {bound}{tokens[label]} tokens" for label in labels]
    dataset.issues.add("error", "class names that are too long", fix, examples)
    if class_phrases and needed > max_tokens and dataset.vocabulary.negatives is None:
        fix = "nothing: it is split into several prompts, which takes longer"
        if dataset.is_training:
            fix = "nothing: classes without boxes that fit are drawn for each image (or set vocabulary.negatives)"
        what = f"a prompt of all classes has more than {max_tokens} tokens"
        dataset.issues.add("note", what, fix, [f"{num_classes} classes: {bound}{needed} tokens"])
    rows = annotations.labels >= num_classes
    pairs = np.unique(np.column_stack([annotations.image_indices, annotations.labels])[rows], axis=0)
    lengths = np.zeros(len(annotations.ids), np.int64)  # [I]
    (np.maximum if dataset.task == "expressions" else np.add).at(lengths, pairs[:, 0], tokens[pairs[:, 1]])
    lengths += 2
    whole = [index for index, caption in enumerate(annotations.captions) if caption is not None]
    captions = [caption.rstrip() for caption in annotations.captions if caption is not None]
    captions = [caption if is_unicode(caption) else "" for caption in captions]
    full_stops = [not caption.endswith(".") for caption in captions]
    lengths[whole] = np.array(count(captions), int) + np.array(full_stops, int) + 2
    long = set(np.flatnonzero(lengths > max(max_tokens, 2)).tolist())

    def report(severity: Severity, what: str, fix: str, indices: list[int]) -> None:
        examples = [f"{annotations.locations[index]}: {bound}{lengths[index]} tokens" for index in indices]
        fix = f"raise model.max_tokens (now {max_tokens}), or {fix}"
        dataset.issues.add(severity, what, fix, examples, indices)

    report("warning", "images whose phrases do not fit in one prompt", "shorten the phrases", sorted(long - {*whole}))
    report("error", "captions that do not fit in a prompt", "set captions: phrases", sorted(long & {*whole}))


def _count_words(phrases: list[str]) -> list[int]:
    """Return lower bounds of the numbers of tokens."""
    return [len(re.findall(r"\w+|[^\w\s]", phrase)) for phrase in phrases]
