"""Phrases of captions: the noun phrases that a pipeline of spaCy finds, and their ODVG lines."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from threading import Lock
from typing import Any

from vg.data.prompt import Expressions, Prompts
from vg.errors import ConfigError
from vg.labeling.phrases import Labels, Prompt
from vg.labeling.plan import PlannedImage

logger = logging.getLogger(__name__)

PIPELINE = "en_core_web_sm"
_UNUSED = ("ner", "lemmatizer", "textcat", "entity_linker")
_SKIPPED = ("DET", "PRON", "PUNCT", "SPACE", "CCONJ")  # parts of speech that do not begin a phrase: "the", "their"


class Captions:
    """The noun phrases of the caption of each image.

    Articles and pronouns at the beginning are left out, and so are repeated phrases and those that the model cannot
    take (too long, without letters). An image without a caption has no phrases, nor has one with a caption that as a
    whole exceeds the model, which training on `captions: whole` could not use.

    Args:
        pipeline: name or folder of a pipeline of spaCy with a parser.
        texts: makes the prompts of the model.

    Raises:
        ConfigError: spaCy or the pipeline is not installed, or the pipeline finds no noun phrases.
    """

    def __init__(self, pipeline: str, texts: Prompts | Expressions):
        self._pipeline = load_pipeline(pipeline)
        self._texts = texts
        self._lock = Lock()  # a pipeline is not made for several threads

    @property
    def version(self) -> str:
        """Name and version of the pipeline, on which the phrases depend."""
        meta = self._pipeline.meta
        return f"{meta['lang']}_{meta['name']} {meta['version']}"

    def prompts(self, images: Sequence[PlannedImage]) -> list[Prompt]:
        texts = [image.caption or "" for image in images]
        with self._lock:
            documents = list(self._pipeline.pipe(texts))
        too_long = self._texts.problems([(image.name, (text,)) for image, text in zip(images, texts, strict=True)])
        for index in too_long:
            if texts[index].strip():
                logger.warning("%s: its caption is too long for the model, so it gets no boxes", images[index].name)
        return [
            Prompt((), (), text) if index in too_long else self._prompt(text, document)
            for index, (text, document) in enumerate(zip(texts, documents, strict=True))
        ]

    def line(self, labels: Labels, prompt: Prompt) -> dict[str, Any]:
        found = zip(labels.boxes.tolist(), labels.phrase_ids.tolist(), labels.scores.tolist(), strict=True)
        regions = [
            {"bbox": box, "phrase": prompt.phrases[i], "tokens_positive": [[*prompt.spans[i]]], "score": score}
            for box, i, score in found
        ]
        return labels.line("grounding", {"caption": prompt.caption, "regions": regions})

    def _prompt(self, text: str, document: Any) -> Prompt:
        spans: dict[str, tuple[int, int]] = {}
        for begin, end in noun_phrases(document):
            spans.setdefault(text[begin:end].casefold(), (begin, end))
        phrases = [text[begin:end] for begin, end in spans.values()]
        unusable = self._texts.problems([("a caption", (phrase,)) for phrase in phrases]) if phrases else {}
        pairs = enumerate(zip(phrases, spans.values(), strict=True))
        usable = [pair for index, pair in pairs if index not in unusable]
        return Prompt(tuple(phrase for phrase, _ in usable), tuple(span for _, span in usable), text)


def noun_phrases(document: Any) -> list[tuple[int, int]]:
    """Return the (begin, end) characters of the noun phrases of a document of spaCy, without articles and pronouns."""
    spans = []
    for chunk in document.noun_chunks:
        words = list(chunk)
        while words and (words[0].pos_ in _SKIPPED or not words[0].text.strip()):
            words.pop(0)
        if words:
            spans.append((words[0].idx, words[-1].idx + len(words[-1])))
    return spans


def load_pipeline(name: str) -> Any:
    """Load a pipeline of spaCy; raises ConfigError, see Captions."""
    try:
        import spacy
    except ImportError as error:
        raise ConfigError("--captions needs the package spacy: pip install spacy") from error
    try:
        pipeline = spacy.load(name, exclude=_UNUSED)
    except OSError as error:
        raise ConfigError(
            f"--pipeline {name}: spaCy has no such pipeline; run `python -m spacy download {name}`, or give the folder "
            "of one"
        ) from error
    try:
        list(pipeline("a red cross").noun_chunks)
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"--pipeline {name}: it finds no noun phrases: it has no parser, or spaCy has no rules for its language; "
            f"use another, such as {PIPELINE}"
        ) from error
    return pipeline
