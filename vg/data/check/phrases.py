"""What can be wrong with words: classes of the same name, names that say nothing, prompts that are too long."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np

from vg.data.check.boxes import Boxes
from vg.data.check.findings import Findings, Reading
from vg.data.detection.vocabulary import Vocabulary, VocabularyConfig
from vg.errors import DataError

CountTokens = Callable[[list[str]], list[int]]  # of each phrase, without special tokens

_RARE = 10  # boxes
_MEND_NAMES = "rename or merge them, or say what to ask for in vocabulary.phrases"


def num_words(phrases: list[str]) -> list[int]:
    """The least number of tokens that phrases can have, where no tokenizer is at hand."""
    return [len(re.findall(r"\w+|[^\w\s]", phrase)) for phrase in phrases]


def check_words(
    reading: Reading, boxes: Boxes, count_tokens: CountTokens, exact: bool, max_tokens: int, findings: Findings
) -> None:
    """Note what is wrong with the names of classes and with phrases.

    Args:
        exact: count_tokens counts what the model sees, and not the least there can be.
        max_tokens: what a prompt of the model holds, special tokens included.
    """
    classes = reading.names[: reading.num_classes]
    asked = _check_names(reading, classes, findings) if classes else []
    counts = np.bincount(boxes.labels, minlength=len(reading.names))
    if reading.num_classes:
        rare = [f"{name}: {count}" for name, count in zip(classes, counts.tolist(), strict=False) if 0 < count < _RARE]
        none = [name for name, count in zip(classes, counts.tolist(), strict=False) if not count]
        what = f"classes with fewer than {_RARE} boxes"
        findings.add("note", reading.set, what, "more examples help these most", rare)
        what = "classes without any box"
        findings.add("note", reading.set, what, "the model only learns to say no to them; is that meant?", none)
        if len(classes) == 1 and reading.trains:
            mend = "the model may forget others; judge it on a second set in data.eval as well"
            findings.add("note", reading.set, "only one class", mend, classes)
    if len(reading.names) > reading.num_classes:
        _check_shared(reading, boxes, findings)
    _check_lengths(reading, boxes, asked, count_tokens, exact, max_tokens, findings)


def plain_name(name: str) -> str:
    """A name without case, punctuation and plural, so that spellings of one name are equal."""
    words = re.sub(r"[\W_]+", " ", name).casefold().split()
    return " ".join(
        word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in words
    )


def _check_names(reading: Reading, names: list[str], findings: Findings) -> list[str]:
    """Note what is wrong with the names; returns what is asked for."""
    try:
        vocabulary = Vocabulary(names, reading.vocabulary or VocabularyConfig(), reading.title)
        asked = list(vocabulary.phrases)
    except DataError as error:
        findings.add("error", reading.set, "classes that cannot be told apart", _MEND_NAMES, [str(error)])
        return names
    plain = [plain_name(phrase) for phrase in asked]
    same: dict[str, list[str]] = defaultdict(list)
    for phrase, each in zip(asked, plain, strict=True):
        same[each].append(phrase)
    alike = [" = ".join(map(repr, group)) for group in same.values() if len(group) > 1]
    findings.add("warning", reading.set, "classes whose names differ in spelling only", _MEND_NAMES, alike)
    within = [
        f"{one!r} in {other!r}"
        for one, inner in zip(asked, plain, strict=True)
        for other, outer in zip(asked, plain, strict=True)
        if inner and inner != outer and f" {inner} " in f" {outer} "
    ]
    mend = "vg keeps their tokens apart; but the words are alike, so expect the two to be confused"
    findings.add("note", reading.set, "classes whose name is part of another's", mend, within)
    silent = [phrase for phrase in asked if not any(letter.isalnum() for letter in phrase)]
    findings.add("error", reading.set, "classes without letter or digit", _MEND_NAMES, silent)
    meaningless = [
        phrase
        for phrase in asked
        if phrase not in silent
        and (re.fullmatch(r"(class|cls|label|object|category|cat|id)?[\W_]*\d+", phrase.lower()) or _is_acronym(phrase))
    ]
    mend = "the text encoder knows words: say what they mean in vocabulary.phrases, {WBC: white blood cell}"
    findings.add("warning", reading.set, "classes whose name is a number or an abbreviation", mend, meaningless)
    cut = [phrase for phrase in asked if re.search(r"[.?]", phrase.rstrip("."))]
    mend = "the model takes prompts apart there; say it without in vocabulary.phrases"
    findings.add("warning", reading.set, 'classes with "." or "?" in their name', mend, cut)
    return asked


def _parts(name: str) -> list[str]:
    """Some words of a name that stand side by side, but not all."""
    words = name.split()
    ends = [(begin, end) for begin in range(len(words)) for end in range(begin + 1, len(words) + 1)]
    return [" ".join(words[begin:end]) for begin, end in ends if end - begin < len(words)]


def _is_acronym(phrase: str) -> bool:
    return phrase.isalpha() and phrase.isupper() and 2 <= len(phrase) <= 5 and phrase != "TV"


def _check_shared(reading: Reading, boxes: Boxes, findings: Findings) -> None:
    """Phrases that stand for several different boxes of one picture."""
    rows = boxes.labels >= reading.num_classes
    keys = [picture.where for picture in reading.pictures] if reading.keys is None else reading.keys
    places: dict[tuple[str, int], set[tuple[float, ...]]] = defaultdict(set)
    for place in np.flatnonzero(rows).tolist():
        box = reading.boxes[place]
        places[keys[box.picture], box.label].add(box.numbers)
    shared = [
        f"{picture}: {reading.names[label]!r} is {len(found)} boxes"
        for (picture, label), found in places.items()
        if len(found) > 1
    ]
    if reading.task == "expressions":
        what, mend = "expressions that name several things in one picture", "say more, so that they name one"
        findings.add("warning", reading.set, what, mend, shared)
    else:
        what = "phrases that several boxes of one picture share"
        findings.add(
            "note", reading.set, what, "fine if it shows several such things; they are all to be found", shared
        )


def _check_lengths(
    reading: Reading,
    boxes: Boxes,
    asked: list[str],
    count_tokens: CountTokens,
    exact: bool,
    max_tokens: int,
    findings: Findings,
) -> None:
    """A prompt is [CLS] phrase . phrase . [SEP]."""
    tokens = np.array(count_tokens([*asked, *reading.names[len(asked) :]]), np.int64)  # [names]
    least = "" if exact else "at least "
    sampled = reading.vocabulary is not None and reading.vocabulary.negatives is not None
    needed = int((tokens[: reading.num_classes] + 1).sum()) + 2
    if asked and needed > max_tokens and not sampled:
        example = [f"{len(asked)} classes: {least}{needed} tokens"]
        what = f"a prompt of all classes has more than {max_tokens} tokens"
        if reading.trains:
            mend = (
                "training leaves out what has no room: set vocabulary.negatives (85, for instance), or raise max_tokens"
            )
            findings.add("warning", reading.set, what, mend, example)
        else:
            findings.add("note", reading.set, what, "nothing: it is split into several, which takes longer", example)
    pairs = {(box.picture, box.label) for box in reading.boxes if box.label >= reading.num_classes}
    lengths: Counter[int] = Counter()
    for picture, label in pairs:
        lengths[picture] += int(tokens[label]) + 1
    long = sorted(picture for picture, length in lengths.items() if length + 2 > max_tokens)
    examples = [f"{reading.pictures[picture].where}: {least}{lengths[picture] + 2} tokens" for picture in long]
    mend = f"raise model.max_tokens (now {max_tokens}), or shorten the phrases"
    findings.add("warning", reading.set, "pictures whose phrases fill more than a prompt", mend, examples, long)
