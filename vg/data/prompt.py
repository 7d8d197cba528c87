"""From the phrases of samples to tokens: an expression as it stands, or prompts of many phrases with known tokens.

A prompt reads `[CLS] phrase . phrase . [SEP]`. Every phrase is tokenised on its own and the pieces are joined, so that
nothing has to be searched in a string, where "dog" would be found in "hot dog". For word pieces, which never reach
across a full stop, this gives the tokens of the joined text.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from vg.errors import BadSampleError, ConfigError, DataError
from vg.types import PromptTargets, Sample, Target, Text, TextSpec

logger = logging.getLogger(__name__)

_CACHE_SIZE = 100_000  # phrases: more than any list of classes, and some ten megabytes of captions


class Expressions:
    """Makes one prompt of the one expression that every sample has."""

    def __init__(self, spec: TextSpec):
        self.spec = spec

    def __call__(self, samples: Sequence[Sample]) -> Text:
        """Raises DataError: not one phrase; BadSampleError: one of more than max_tokens tokens."""
        for sample in samples:
            if len(sample.phrases) != 1:
                raise DataError(f"{sample.id} has {len(sample.phrases)} phrases, this model takes one expression")
        return self.text([sample.phrases[0] for sample in samples], [sample.id for sample in samples])

    def text(self, expressions: Sequence[str], names: Sequence[str]) -> Text:
        """One prompt for each expression; raises BadSampleError that calls one by its name: too many tokens."""
        tokens = self.spec.tokenizer(list(expressions), padding=True, return_tensors="pt")
        token_ids, mask = tokens["input_ids"], tokens["attention_mask"].bool()  # [R, T]
        for name, expression, length in zip(names, expressions, mask.sum(dim=1).tolist(), strict=True):
            if length > self.spec.max_tokens:
                raise BadSampleError(
                    f"{name}: the expression has {length} tokens, the model takes {self.spec.max_tokens} "
                    f"(raise model.max_tokens): {expression[:80]!r}"
                )
        return Text(token_ids, mask, mask.unsqueeze(1), torch.arange(len(expressions)))


class Prompt(NamedTuple):
    """One row of a batch of text."""

    token_ids: list[int]
    phrase_tokens: dict[int, list[int]]  # a phrase of the sample -> where its tokens are


class Prompts:
    """Makes prompts of many phrases.

    The tokens of a phrase are its words: neither the "." that closes it nor another delimiter, which stays in the
    prompt. Phrases are laid out in the order of their token ids, so that predictions do not depend on the order in
    which one asks.

    Args:
        spec: its first delimiter closes a phrase.
        one_prompt: one prompt for each sample, as training wants it: phrases that have boxes come first, then the
            others as they fit. Otherwise what one prompt cannot hold goes into further ones.

    Raises:
        ConfigError: the tokenizer has no token for that delimiter, or for begin, end or padding.
    """

    def __init__(self, spec: TextSpec, one_prompt: bool):
        self.tokenizer = spec.tokenizer
        self.one_prompt = one_prompt
        self.max_tokens = spec.max_tokens
        self.begin = self._token_id(spec.tokenizer.cls_token)
        self.end = self._token_id(spec.tokenizer.sep_token)
        self.padding = self._token_id(spec.tokenizer.pad_token)
        self.phrase_end = self._token_id(spec.delimiters[0])
        self.delimiters = set(spec.delimiter_ids)  # models take prompts apart there, within a phrase too
        self._known: dict[str, list[int]] = {}  # the same names come with every image

    def _token_id(self, token: str | None) -> int:
        token_id = None if token is None else self.tokenizer.convert_tokens_to_ids(token)
        if token_id is None or token_id == self.tokenizer.unk_token_id:
            raise ConfigError(
                f"the tokenizer {type(self.tokenizer).__name__} ({len(self.tokenizer)} tokens) lacks {token!r}; "
                'prompts of many phrases need [CLS], [SEP], [PAD] and ".": set model.text.tokenizer to another'
            )
        return int(token_id)

    def __call__(self, samples: Sequence[Sample]) -> Text:
        """The prompts of all samples, in their order.

        Raises:
            BadSampleError: no phrases, or a phrase without any letter or digit, or too long for a prompt.
        """
        prompts = [(i, prompt) for i, sample in enumerate(samples) for prompt in self.of_sample(sample)]
        num_tokens = max(len(prompt.token_ids) for _, prompt in prompts)
        token_ids = np.full((len(prompts), num_tokens), self.padding)  # [R, T]
        mask = np.zeros(token_ids.shape, bool)
        phrase_tokens = np.zeros((len(prompts), max(len(sample.phrases) for sample in samples), num_tokens), bool)
        for row, (_, prompt) in enumerate(prompts):
            token_ids[row, : len(prompt.token_ids)] = prompt.token_ids
            mask[row, : len(prompt.token_ids)] = True
            for phrase, places in prompt.phrase_tokens.items():
                phrase_tokens[row, phrase, places] = True
        image_ids = np.array([i for i, _ in prompts])
        return Text(*map(torch.from_numpy, (token_ids, mask, phrase_tokens, image_ids)))

    def of_sample(self, sample: Sample) -> list[Prompt]:
        """The prompts of one sample, at least one; raises BadSampleError as above."""
        if not sample.phrases:
            raise BadSampleError(f"{sample.id} has no phrases: say what to look for")
        tokens = self._tokenize(sample)
        phrases = self._fitting(tokens, sample.phrase_ids.tolist()) if self.one_prompt else range(len(tokens))
        prompts: list[Prompt] = []
        for phrase in sorted(phrases, key=tokens.__getitem__):
            if not prompts or len(prompts[-1].token_ids) + len(tokens[phrase]) + 2 > self.max_tokens:
                prompts.append(Prompt([self.begin], {}))
            token_ids, phrase_tokens = prompts[-1]
            places = enumerate(tokens[phrase], start=len(token_ids))
            phrase_tokens[phrase] = [place for place, token in places if token not in self.delimiters]
            token_ids += [*tokens[phrase], self.phrase_end]
        for prompt in prompts:
            prompt.token_ids.append(self.end)
        return prompts

    def _fitting(self, tokens: list[list[int]], with_boxes: list[int]) -> list[int]:
        """The phrases that one prompt has room for, those with boxes first."""
        room, fitting = self.max_tokens - 2, []
        for phrase in dict.fromkeys([*sorted(with_boxes), *range(len(tokens))]):
            if len(tokens[phrase]) + 1 <= room:
                room -= len(tokens[phrase]) + 1
                fitting.append(phrase)
        return fitting

    def _tokenize(self, sample: Sample) -> list[list[int]]:
        """The tokens of each phrase without a full stop at its end."""
        if len(self._known) > _CACHE_SIZE:
            self._known.clear()
        new = [phrase for phrase in dict.fromkeys(sample.phrases) if phrase not in self._known]
        for phrase in new:
            if not any(character.isalnum() for character in phrase):
                raise BadSampleError(f"{sample.id}: the phrase {phrase!r} has no letter or digit; give it words")
        if new:  # split_special_tokens: "[SEP]" in a text is a text
            encoded = self.tokenizer(new, add_special_tokens=False, split_special_tokens=True, verbose=False)
            for phrase, token_ids in zip(new, encoded["input_ids"], strict=True):
                while token_ids[-1] == self.phrase_end:
                    token_ids.pop()
                if set(token_ids) == {self.tokenizer.unk_token_id}:
                    logger.warning(
                        "%s: the tokenizer knows nothing of the phrase %r, which reads like any other that it "
                        "does not know; set model.text.tokenizer, or data.*.vocabulary.phrases to words that it knows",
                        sample.id,
                        phrase,
                    )
                if len(token_ids) + 3 > self.max_tokens:
                    raise BadSampleError(
                        f"{sample.id}: a phrase has {len(token_ids)} tokens, a prompt of {self.max_tokens} holds "
                        f"{self.max_tokens - 3} of one (raise model.max_tokens): {phrase[:80]!r}"
                    )
                self._known[phrase] = token_ids
        return [self._known[phrase] for phrase in sample.phrases]


def prompt_targets(text: Text, targets: Sequence[Target]) -> PromptTargets:
    """Select the boxes of every prompt: those of its image whose phrase it contains, in their order, without crowds.

    Called once per batch, on the CPU: on a GPU the counts would cost a synchronization.
    """
    rows = text.image_ids
    boxes = pad_sequence([target.boxes for target in targets], batch_first=True)[rows]  # [R, N, 4]
    phrase_ids = pad_sequence([target.phrase_ids for target in targets], batch_first=True)[rows]  # [R, N]
    single = [torch.ones_like(t.phrase_ids, dtype=torch.bool) if t.crowd is None else ~t.crowd for t in targets]
    phrase_of_box = phrase_ids.unsqueeze(-1).expand(-1, -1, text.mask.shape[1])
    tokens = text.phrase_tokens.gather(1, phrase_of_box)  # [R, N, T]
    tokens = tokens & pad_sequence(single, batch_first=True)[rows].unsqueeze(-1)
    selected = tokens.any(dim=-1)  # [R, N]
    counts = selected.sum(dim=1)  # [R]
    mask = torch.arange(int(counts.max()), device=rows.device) < counts.unsqueeze(1)  # [R, most boxes of a prompt]
    order = (~selected).int().argsort(dim=1, stable=True)[:, : mask.shape[1]]
    row = torch.arange(len(rows), device=rows.device).unsqueeze(1)
    return PromptTargets(boxes[row, order], tokens[row, order], phrase_ids[row, order], mask, tuple(counts.tolist()))
