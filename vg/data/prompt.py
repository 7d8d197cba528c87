"""Tokenize phrases: one expression per sample, or prompts of many phrases with known token positions.

A prompt is `[CLS] phrase . phrase . [SEP]`. Each phrase is tokenized separately and the tokens are concatenated, so the
position of each phrase is known; searching the prompt for it would find "dog" in "hot dog". Word pieces never cross a
full stop, so the result equals the tokens of the joined text. The prompt of a sample with a caption is `[CLS] caption .
[SEP]`, of which the tokens of a phrase are selected by their characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vg.data.unknown_words import UnknownWords
from vg.errors import BadSampleError, ConfigError, DataError
from vg.types import Caption, Sample, Text, TextArrays, TextSpec

_CACHE_SIZE = 100_000  # phrases: more than any list of classes; some ten megabytes
_STREAM = 2  # separates these random numbers from others of the same seed, epoch and index


class Expressions:
    """Makes one prompt per sample from its only phrase, a referring expression."""

    def __init__(self, spec: TextSpec):
        self.spec = spec
        self.extra: Expressions | None = Expressions(spec.extra) if spec.extra else None
        self._special = set(spec.tokenizer.all_special_ids)
        self._unknown = UnknownWords()

    def __call__(self, samples: Sequence[Sample]) -> Text:
        """Raise DataError if a sample has not exactly one phrase, BadSampleError if that exceeds max_tokens."""
        names = [sample.id for sample in samples]
        for sample in samples:
            if sample.caption is not None:
                raise DataError(
                    f"{sample.id}: its phrases are spans of a caption, and this model takes one expression; set "
                    "captions: phrases for this dataset"
                )
        return self.arrays([_only_phrase(sample.id, sample.phrases) for sample in samples], names).tensors()

    def problems(self, samples: Sequence[tuple[str, tuple[str, ...]]]) -> dict[int, str]:
        """Return the index and the reason of each sample (id, phrases) for which the call raises BadSampleError."""
        names = [name for name, _ in samples]
        expressions = [_only_phrase(name, phrases) for name, phrases in samples]
        invalid = {
            index: _not_unicode(name, expression)
            for index, (name, expression) in enumerate(zip(names, expressions, strict=True))
            if not is_unicode(expression)
        }
        valid = ["" if index in invalid else expression for index, expression in enumerate(expressions)]
        rows = self.spec.tokenizer(valid, verbose=False)["input_ids"]
        extra = self.extra.problems(samples) if self.extra else {}
        return extra | self._problems(names, expressions, rows) | invalid

    def arrays(self, expressions: Sequence[str], names: Sequence[str]) -> TextArrays:
        """Return one prompt per expression; raise BadSampleError with the name of one that the model cannot take."""
        for name, expression in zip(names, expressions, strict=True):
            if not is_unicode(expression):
                raise BadSampleError(_not_unicode(name, expression))
        # Padding is a state of tokenizers, and threads share this one.
        rows = self.spec.tokenizer(list(expressions), verbose=False)["input_ids"]
        for problem in self._problems(names, expressions, rows).values():
            raise BadSampleError(problem)
        lengths = np.array([len(row) for row in rows], np.int64)
        mask = np.arange(lengths.max(initial=0)) < lengths[:, None]  # [R, T]
        token_ids = np.full(mask.shape, self.spec.tokenizer.pad_token_id or 0, np.int64)
        token_ids[mask] = np.concatenate(rows) if rows else ()
        extra = self.extra.arrays(expressions, names) if self.extra else None
        return TextArrays(token_ids, mask, mask[:, None], np.arange(len(expressions)), extra)

    def _problems(self, names: Sequence[str], expressions: Sequence[str], rows: Sequence[list[int]]) -> dict[int, str]:
        """Describe each expression that has too many tokens, and report those of unknown words.

        Args:
            rows: the tokens of each expression.
        """
        problems = {}
        for index, (name, expression, row) in enumerate(zip(names, expressions, rows, strict=True)):
            if self._special.issuperset(row):
                self._unknown.report(name, expression)
            if len(row) > self.spec.max_tokens:
                problems[index] = (
                    f"{name}: the expression has {len(row)} tokens, the model takes {self.spec.max_tokens} "
                    f"(raise model.max_tokens): {expression[:80]!r}"
                )
        return problems


def _only_phrase(name: str, phrases: Sequence[str]) -> str:
    if len(phrases) != 1:
        raise DataError(f"{name} has {len(phrases)} phrases, this model takes one expression")
    return phrases[0]


def is_unicode(phrase: str) -> bool:
    """Whether a tokenizer can read a phrase: JSON and file names may contain halves of surrogate pairs."""
    return phrase.encode("utf-8", "ignore").decode() == phrase


def _not_unicode(name: str, phrase: str) -> str:
    return f"{name}: the phrase {phrase[:80]!r} is not valid Unicode; correct it"


class Prompt(NamedTuple):
    """One row of a text batch."""

    token_ids: list[int]
    phrase_tokens: dict[int, list[int]]  # index of a phrase of the sample -> positions of its tokens


class Prompts:
    """Makes prompts of many phrases per sample.

    The tokens of a phrase are those of its words: the "." after it and delimiters inside it stay in the prompt but are
    not among them. Phrases are sorted by token ids, so predictions do not depend on the order of the phrases; phrases
    with equal tokens share them.

    A caption is a prompt by itself, which ends with a full stop. The tokens of a phrase are those that overlap one of
    its spans, except delimiters (which mmdetection includes in the middle of a span).

    Args:
        spec: its first delimiter is appended to every phrase.
        one_prompt: for training: one prompt per sample; phrases without boxes, and then those with boxes, are left out
            if they do not fit. Which ones is drawn for each sample (`Sample.seed`), so that every class is a negative.
            Otherwise, phrases that do not fit go into additional prompts.

    Raises:
        ConfigError: the tokenizer has no token for that delimiter or no begin, end or padding token.
    """

    def __init__(self, spec: TextSpec, one_prompt: bool):
        self.tokenizer = spec.tokenizer
        self.one_prompt = one_prompt
        self.max_tokens, self.positions = spec.max_tokens, spec.positions
        self._unknown = UnknownWords()
        special = (spec.tokenizer.cls_token, spec.tokenizer.sep_token, spec.tokenizer.pad_token, spec.delimiters[0])
        self.begin, self.end, self.padding, self.phrase_end = map(self._token_id, special)
        self.delimiters = set(spec.delimiter_ids)  # models split prompts at these, also inside a phrase
        self._known: dict[str, list[int]] = {}  # a detection dataset repeats its class names for every image

    def _token_id(self, token: str | None) -> int:
        token_id = None if token is None else self.tokenizer.convert_tokens_to_ids(token)
        if token_id is None or token_id == self.tokenizer.unk_token_id:
            raise ConfigError(
                f"the tokenizer {type(self.tokenizer).__name__} ({len(self.tokenizer)} tokens) lacks {token!r}; "
                'prompts of many phrases need [CLS], [SEP], [PAD] and ".": set model.text.tokenizer to another'
            )
        return int(token_id)

    def __call__(self, samples: Sequence[Sample]) -> Text:
        """Make the prompts of all samples, in their order; raises BadSampleError as `of_sample`."""
        return self.arrays(samples).tensors()

    def arrays(self, samples: Sequence[Sample]) -> TextArrays:
        """Like a call, without torch."""
        prompts = [(i, prompt) for i, sample in enumerate(samples) for prompt in self.of_sample(sample)]
        num_tokens = max(len(prompt.token_ids) for _, prompt in prompts)
        token_ids = np.full((len(prompts), num_tokens), self.padding, np.int64)  # [R, T]
        mask = np.zeros(token_ids.shape, bool)
        phrase_tokens = np.zeros((len(prompts), max(len(sample.phrases) for sample in samples), num_tokens), bool)
        for row, (_, prompt) in enumerate(prompts):
            token_ids[row, : len(prompt.token_ids)] = prompt.token_ids
            mask[row, : len(prompt.token_ids)] = True
            for phrase, positions in prompt.phrase_tokens.items():
                phrase_tokens[row, phrase, positions] = True
        return TextArrays(token_ids, mask, phrase_tokens, np.array([i for i, _ in prompts]))

    def problems(self, samples: Sequence[tuple[str, tuple[str, ...]]]) -> dict[int, str]:
        """Return the index and the reason of each sample (id, phrases) for which the call raises BadSampleError."""
        found = {}
        for index, (name, phrases) in enumerate(samples):
            try:
                self._tokenize(name, phrases)
            except BadSampleError as error:
                found[index] = str(error)
        return found

    def of_sample(self, sample: Sample) -> list[Prompt]:
        """Make the prompts of one sample, at least one.

        Raises:
            BadSampleError: no phrases, or a phrase without letters and digits or too long for a prompt; a caption that
                is too long or has a sentence that is, or spans without a token.
            ConfigError: a caption, and a tokenizer that does not give the characters of its tokens.
        """
        if sample.caption is not None:
            return [self._of_caption(sample.caption.location or sample.id, sample.phrases, sample.caption)]
        tokens = self._tokenize(sample.id, sample.phrases)
        phrases = self._fitting(tokens, sample) if self.one_prompt else range(len(tokens))
        prompts: list[Prompt] = []
        previous = None
        for phrase in sorted(phrases, key=tokens.__getitem__):
            if previous is not None and tokens[phrase] == tokens[previous]:
                prompts[-1].phrase_tokens[phrase] = prompts[-1].phrase_tokens[previous]
                continue
            previous = phrase
            if not prompts or len(prompts[-1].token_ids) + len(tokens[phrase]) + 2 > self.max_tokens:
                prompts.append(Prompt([self.begin], {}))
            token_ids, phrase_tokens = prompts[-1]
            positions = enumerate(tokens[phrase], start=len(token_ids))
            phrase_tokens[phrase] = [position for position, token in positions if token not in self.delimiters]
            token_ids += [*tokens[phrase], self.phrase_end]
        for prompt in prompts:
            prompt.token_ids.append(self.end)
        return prompts

    def _of_caption(self, name: str, phrases: Sequence[str], caption: Caption) -> Prompt:
        """Make the prompt of a whole caption; raises as of_sample."""
        if not self.tokenizer.is_fast:
            raise ConfigError(
                f"the tokenizer {type(self.tokenizer).__name__} does not give the characters of its tokens, which "
                "captions: whole needs; set model.text.tokenizer to one with a tokenizer.json"
            )
        if not is_unicode(caption.text):
            raise BadSampleError(_not_unicode(name, caption.text))
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        encoded = self.tokenizer(caption.text, return_offsets_mapping=True, **options)
        tokens, offsets = encoded["input_ids"], encoded["offset_mapping"]
        closing = [self.phrase_end] * (tokens[-1:] != [self.phrase_end])
        prompt = Prompt([self.begin, *tokens, *closing, self.end], {})
        if len(prompt.token_ids) > self.max_tokens:
            raise BadSampleError(
                f"{name}: the prompt of the caption has {len(prompt.token_ids)} tokens, the model takes "
                f"{self.max_tokens} (raise model.max_tokens): {caption.text[:80]!r}"
            )
        ends = np.flatnonzero(np.isin(prompt.token_ids, [*self.delimiters]))  # of sentences, where positions restart
        if self.positions is not None and (longest := np.diff(ends).max()) > self.positions:
            raise BadSampleError(
                f"{name}: a sentence of the caption has {longest - 1} tokens, the text encoder takes "
                f"{self.positions - 1}: {caption.text[:80]!r}"
            )
        first, last = np.array(offsets, np.int64).reshape(-1, 2).T  # characters of each token
        is_word = ~np.isin(tokens, [*self.delimiters])
        for phrase, spans in enumerate(caption.spans):
            own = is_word & np.any([(first < end) & (last > begin) for begin, end in spans], axis=0)
            if not own.any():
                raise BadSampleError(
                    f"{name}: no token of the caption is in the spans {[*map(list, spans)]} of the phrase "
                    f"{phrases[phrase]!r}; correct tokens_positive: {caption.text[:80]!r}"
                )
            prompt.phrase_tokens[phrase] = (np.flatnonzero(own) + 1).tolist()  # after [CLS]
            if (np.array(tokens)[own] == self.tokenizer.unk_token_id).all():
                self._unknown.report(name, phrases[phrase])
        return prompt

    def _fitting(self, tokens: list[list[int]], sample: Sample) -> list[int]:
        """Return the indices of the phrases that fit into one prompt, preferring phrases with boxes."""
        order = np.arange(len(tokens))
        if sample.seed is not None:
            order = np.random.default_rng((*sample.seed, _STREAM)).permutation(order)
        with_boxes = np.isin(order, sample.phrase_ids)
        room, fitting, known = self.max_tokens - 2, [], set[tuple[int, ...]]()
        for phrase in [*order[with_boxes].tolist(), *order[~with_boxes].tolist()]:
            needed = 0 if (key := tuple(tokens[phrase])) in known else len(key) + 1
            if needed <= room:
                room -= needed
                fitting.append(phrase)
                known.add(key)
        return fitting

    def _tokenize(self, name: str, phrases: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each phrase, without full stops at its end; raises as of_sample."""
        if not phrases:
            raise BadSampleError(f"{name} has no phrases; give at least one")
        # Another thread may replace it, but does not empty this one.
        known = self._known = {} if len(self._known) > _CACHE_SIZE else self._known
        new = [phrase for phrase in dict.fromkeys(phrases) if phrase not in known]
        for phrase in new:
            if not is_unicode(phrase):
                raise BadSampleError(_not_unicode(name, phrase))
            if not any(character.isalnum() for character in phrase):
                raise BadSampleError(f"{name}: the phrase {phrase!r} has no letter or digit; use words")
        if new:  # split_special_tokens: "[SEP]" in a phrase is ordinary text
            encoded = self.tokenizer(new, add_special_tokens=False, split_special_tokens=True, verbose=False)
            for phrase, token_ids in zip(new, encoded["input_ids"], strict=True):
                while token_ids and token_ids[-1] == self.phrase_end:
                    token_ids.pop()
                if {self.tokenizer.unk_token_id, *self.delimiters}.issuperset(token_ids):
                    self._unknown.report(name, phrase)
                if len(token_ids) + 3 > self.max_tokens:
                    raise BadSampleError(
                        f"{name}: a phrase has {len(token_ids)} tokens, at most {self.max_tokens - 3} fit into a "
                        f"prompt of {self.max_tokens} (raise model.max_tokens): {phrase[:80]!r}"
                    )
                if self.positions is not None and len(token_ids) + 1 > self.positions:
                    raise BadSampleError(
                        f"{name}: a phrase has {len(token_ids)} tokens, the text encoder takes {self.positions - 1}: "
                        f"{phrase[:80]!r}"
                    )
                known[phrase] = token_ids
        return [known[phrase] for phrase in phrases]
