"""Prompts of many phrases: their tokens, the positions of each phrase, and phrases that are rejected."""

from __future__ import annotations

import itertools
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertTokenizer, PreTrainedTokenizerBase

import vg
from vg.data.prompt import Expressions, Prompts
from vg.errors import BadSampleError, ConfigError, DataError
from vg.types import Sample, Text, TextSpec

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
GOLDEN = DATA / "golden_official"
VOCABULARY = Path(vg.__file__).parent / "models" / "small_vocabulary.txt"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return BertTokenizer(vocab=str(VOCABULARY))


def golden(name: str) -> Any:
    if not GOLDEN.exists():
        pytest.skip("values recorded from the official implementation are not available")
    return json.loads((GOLDEN / name).read_text())


def golden_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    if not path.exists():
        pytest.skip(f"{path.name} is not available")
    return BertTokenizer(vocab=str(path))


def sample(*phrases: str, boxes_of: tuple[int, ...] = (), name: str = "a") -> Sample:
    boxes = np.tile(np.array([0, 0, 4, 4], np.float32), (len(boxes_of), 1))
    return Sample(name, np.zeros((8, 8, 3), np.uint8), phrases, boxes, np.array(boxes_of, np.int64))


def prompts(
    tokenizer: PreTrainedTokenizerBase, *samples: Sample, max_tokens: int = 256, one_prompt: bool = False
) -> Text:
    return Prompts(TextSpec(tokenizer, max_tokens, (".", "?")), one_prompt)(samples)


def words(tokenizer: PreTrainedTokenizerBase, text: Text, row: int = 0) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(text.token_ids[row, text.mask[row]].tolist()))


def words_of_phrases(tokenizer: PreTrainedTokenizerBase, text: Text, row: int = 0) -> list[str]:
    return [" ".join(tokenizer.convert_ids_to_tokens(text.token_ids[row, m].tolist())) for m in text.phrase_tokens[row]]


def test_tokens_and_phrase_positions(tokenizer: PreTrainedTokenizerBase) -> None:
    text = prompts(tokenizer, sample("red circle", "dog"), sample("the big blue square", name="b"))
    assert words(tokenizer, text, 0) in ("[CLS] red circle . dog . [SEP]", "[CLS] dog . red circle . [SEP]")
    assert words(tokenizer, text, 1) == "[CLS] the big blue square . [SEP]"
    assert words_of_phrases(tokenizer, text, 0) == ["red circle", "dog"]
    assert words_of_phrases(tokenizer, text, 1) == ["the big blue square", ""], (
        "padded to the number of phrases of the other image"
    )
    assert text.token_ids.shape == text.mask.shape == (2, 7)
    assert text.phrase_tokens.shape == (2, 2, 7)
    assert text.sample_ids.tolist() == [0, 1]
    assert [tensor.dtype for tensor in text[:4]] == [torch.int64, torch.bool, torch.bool, torch.int64]
    assert (text.token_ids[~text.mask] == tokenizer.pad_token_id).all()


@pytest.mark.parametrize(
    "phrases",
    [
        ("dog", "hot dog"),
        ("hot dog", "dog"),
        ("carrot", "car"),
        ("bear", "teddy bear"),
        ("woman", "man", "a man"),
    ],
)
def test_phrases_do_not_share_tokens(tokenizer: PreTrainedTokenizerBase, phrases: tuple[str, ...]) -> None:
    text = prompts(tokenizer, sample(*phrases))
    assert words_of_phrases(tokenizer, text) == [phrase.lower().replace("hot", "h ##o ##t") for phrase in phrases]
    assert text.phrase_tokens.sum(dim=1).max() == 1, "no token belongs to two phrases"


def test_phrases_with_equal_tokens_are_in_the_prompt_once(tokenizer: PreTrainedTokenizerBase) -> None:
    """Otherwise each would be a negative of the boxes of the other."""
    phrases = ("Dog", "red circle", "dog.", "DOG")
    text = prompts(tokenizer, sample(*phrases))
    assert words(tokenizer, text) in ("[CLS] red circle . dog . [SEP]", "[CLS] dog . red circle . [SEP]")
    assert words_of_phrases(tokenizer, text) == ["dog", "red circle", "dog", "dog"]
    several = prompts(tokenizer, sample(*phrases), max_tokens=5)
    assert words_of_phrases(tokenizer, several, 0) == ["", "red circle", "", ""] or len(several.token_ids) == 2
    assert several.phrase_tokens.any(dim=2).sum(dim=0).tolist() == [1] * 4
    crowded = prompts(tokenizer, sample(*phrases, boxes_of=(0, 3, 2)), max_tokens=7, one_prompt=True)
    assert words_of_phrases(tokenizer, crowded) == ["dog", "red circle", "dog", "dog"], "all of them fit"


def test_prompt_does_not_depend_on_the_order_of_phrases(tokenizer: PreTrainedTokenizerBase) -> None:
    phrases = ("dog", "red circle", "car", "blue cup")
    first = prompts(tokenizer, sample(*phrases), max_tokens=8)
    assert len(first.token_ids) == 2, "the phrases fill several prompts"
    for order in itertools.permutations(range(4)):
        text = prompts(tokenizer, sample(*(phrases[i] for i in order)), max_tokens=8)
        assert torch.equal(text.token_ids, first.token_ids)
        assert torch.equal(text.phrase_tokens, first.phrase_tokens[:, list(order)])


@pytest.mark.parametrize(
    ("phrase", "prompt", "tokens"),
    [
        ("  dog  ", "dog .", "dog"),
        ("dog.", "dog .", "dog"),
        ("dog . . \n", "dog .", "dog"),
        ("is it red? yes. dog", "is it red ? y ##e ##s . dog .", "is it red y ##e ##s dog"),
        ("is it red?", "is it red ? .", "is it red"),
        (". dog", ". dog .", "dog"),
        ("red [SEP] [PAD] dog", "red [UNK] s ##e ##p [UNK] [UNK] p ##a ##d [UNK] dog .", None),
        ("日本", "[UNK] [UNK] .", "[UNK] [UNK]"),
    ],
)
def test_full_stops_and_text_that_looks_like_a_special_token(
    tokenizer: PreTrainedTokenizerBase, phrase: str, prompt: str, tokens: str | None
) -> None:
    text = prompts(tokenizer, sample(phrase))
    assert words(tokenizer, text) == f"[CLS] {prompt} [SEP]"
    assert words_of_phrases(tokenizer, text) == [tokens or prompt.removesuffix(" .")]


def test_phrases_that_do_not_fit_go_into_additional_prompts(tokenizer: PreTrainedTokenizerBase) -> None:
    many = sample("dog", "red circle", "car", "blue cup", "cat")  # 1 + 2 + 1 + 2 + 1 tokens, and 5 full stops
    text = prompts(tokenizer, sample("star"), many, sample("man", name="c"), max_tokens=9)
    assert text.sample_ids.tolist() == [0, 1, 1, 2]
    assert text.mask.sum(dim=1).tolist() == [4, 9, 7, 4]
    phrase_tokens = text.phrase_tokens[1:3]  # [R, P, T] of that image
    assert phrase_tokens.any(dim=2).sum(dim=0).tolist() == [1] * 5, "each phrase is in one prompt"
    assert phrase_tokens.sum(dim=(0, 2)).tolist() == [1, 2, 1, 2, 1]
    one = prompts(tokenizer, many, max_tokens=14)
    assert one.mask.sum().item() == 14, "12 tokens, [CLS] and [SEP] fit exactly"
    assert len(prompts(tokenizer, many, max_tokens=13).token_ids) == 2


def test_one_prompt_prefers_phrases_with_boxes(tokenizer: PreTrainedTokenizerBase) -> None:
    phrases = ("dog", "red circle", "car", "big blue cup", "cat")
    text = prompts(tokenizer, sample(*phrases, boxes_of=(4, 1, 4)), max_tokens=9, one_prompt=True)
    assert words_of_phrases(tokenizer, text) == ["dog", "red circle", "", "", "cat"], (
        "then phrases without boxes in their order"
    )
    text = prompts(tokenizer, sample(*phrases, boxes_of=(3, 4)), max_tokens=6, one_prompt=True)
    assert words_of_phrases(tokenizer, text) == ["", "", "", "big blue cup", ""], "nothing else fits"
    assert text.sample_ids.tolist() == [0]


def test_what_one_prompt_leaves_out_is_drawn_for_each_sample(tokenizer: PreTrainedTokenizerBase) -> None:
    many = sample(*(f"red {color}" for color in "abcdefghij"), boxes_of=(7,))

    def asked(seed: tuple[int, int, int] | None, boxes_of: tuple[int, ...] = (7,)) -> frozenset[int]:
        seeded = replace(many, seed=seed, phrase_ids=np.array(boxes_of, np.int64))
        text = prompts(tokenizer, seeded, max_tokens=12, one_prompt=True)  # room for three phrases
        return frozenset(text.phrase_tokens[0].any(dim=1).nonzero().flatten().tolist())

    drawn = [asked((0, 0, index)) for index in range(60)]
    assert all(7 in phrases and len(phrases) == 3 for phrases in drawn)
    assert frozenset.union(*drawn) == set(range(10)), "every class is a negative sometimes"
    assert drawn == [asked((0, 0, index)) for index in range(60)]
    for other in ((1, 0), (0, 1)):
        assert drawn != [asked((*other, index)) for index in range(60)]
    crowded = [asked((0, 0, index), boxes_of=tuple(range(10))) for index in range(60)]
    assert frozenset.union(*crowded) == set(range(10)), "no class with boxes is always left out"
    assert asked(None) == {0, 1, 7}


@pytest.mark.parametrize(
    ("phrases", "message"),
    [
        ((), r"val/3 has no phrases"),
        (("dog", "!?"), r"val/3: the phrase '!\?' has no letter or digit"),
        (("...",), "no letter or digit"),
        (("",), "no letter or digit"),
        (("dog", "red circle left of blue cup"), r"val/3: a phrase has 6 .* 5 fit .* of 8 .*max_tokens.*'red circle"),
    ],
)
@pytest.mark.parametrize("one_prompt", [False, True])
def test_unusable_phrases_raise(
    tokenizer: PreTrainedTokenizerBase, phrases: tuple[str, ...], message: str, one_prompt: bool
) -> None:
    build = Prompts(TextSpec(tokenizer, 8, (".", "?")), one_prompt)
    for _ in range(2):  # an error is not cached away
        with pytest.raises(DataError, match=message):
            build([sample("cat"), sample(*phrases, name="val/3")])


def test_a_phrase_of_unknown_tokens_is_logged_once(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    build = Prompts(TextSpec(tokenizer, 8, (".", "?")), one_prompt=False)
    for _ in range(2):
        build([sample("dog", "猫", "car?", name="val/3")])
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("val/3: all tokens of the phrase '猫' are unknown to the tokenizer")
    assert "set model.text.tokenizer" in message
    build([sample("猫?", name="val/4")])
    assert "'猫?'" in caplog.records[-1].getMessage(), "a delimiter is not a known word either"


def test_many_phrases_of_unknown_tokens_are_not_all_logged(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    for build in (Prompts(TextSpec(tokenizer, 8, (".",)), False), Expressions(TextSpec(tokenizer, 8))):
        caplog.clear()
        for number in range(30):
            build([sample(chr(ord("猫") + number), name=f"val/{number}")])
        messages = [record.getMessage() for record in caplog.records]
        assert len(messages) == 11
        assert messages[-1] == "val/10: and more phrases of unknown words, which are not reported"


def test_a_phrase_longer_than_the_text_encoder_takes(tokenizer: PreTrainedTokenizerBase) -> None:
    """Positions restart in every phrase, so that a prompt may be longer."""
    build = Prompts(TextSpec(tokenizer, 100, (".", "?"), positions=4), one_prompt=False)
    assert build([sample("red circle left", "blue circle left")]).token_ids.shape == (1, 10)
    with pytest.raises(BadSampleError, match=r"val/3: a phrase has 4 tokens, the text encoder takes 3: 'red circle"):
        build([sample("red circle left of", name="val/3")])


def test_an_expression_of_unknown_tokens_is_logged_once(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    build = Expressions(TextSpec(tokenizer, 8))
    for _ in range(2):
        build([sample("red dog"), sample("猫 犬", name="val/3"), sample("the 猫")])
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("val/3: all tokens of the phrase '猫 犬' are unknown to the tokenizer")


def test_expressions_leave_the_tokenizer_as_it_is(tokenizer: PreTrainedTokenizerBase) -> None:
    """Threads share it, and its padding would change what another thread is tokenizing."""
    text = Expressions(TextSpec(tokenizer, 8)).arrays(["red", "red dog"], ["a", "b"])
    assert text.mask.tolist() == [[True, True, True, False], [True] * 4]
    assert text.token_ids[0, 3] == tokenizer.pad_token_id
    assert tokenizer.backend_tokenizer.padding is None


def test_the_longest_phrase_that_fits(tokenizer: PreTrainedTokenizerBase) -> None:
    text = prompts(tokenizer, sample("red circle left of dog"), max_tokens=8)
    assert words(tokenizer, text) == "[CLS] red circle left of dog . [SEP]"


@pytest.mark.parametrize("missing", [".", "[SEP]"])
def test_a_tokenizer_without_special_tokens_raises(tmp_path: Path, missing: str) -> None:
    lines = [word for word in VOCABULARY.read_text().split() if word != missing]
    (tmp_path / "vocab.txt").write_text("\n".join(lines))
    tokenizer = BertTokenizer(vocab=str(tmp_path / "vocab.txt"))
    if missing == "[SEP]":
        tokenizer.sep_token = None
    with pytest.raises(ConfigError, match=r"BertTokenizer .*lacks .*model\.text\.tokenizer"):
        Prompts(TextSpec(tokenizer, 8, (".", "?")), one_prompt=False)


def test_a_phrase_is_tokenized_once_and_the_cache_can_be_pickled(tokenizer: PreTrainedTokenizerBase) -> None:
    build = Prompts(TextSpec(tokenizer, 64, (".", "?")), one_prompt=False)
    first = build([sample("dog", "cat")])
    copy = pickle.loads(pickle.dumps(build))
    for cached in (build, copy):
        cached.tokenizer = None  # type: ignore[assignment]
        assert torch.equal(cached([sample("dog", "cat", "dog")]).token_ids[:, :3], first.token_ids[:, :3])


def test_the_cache_is_bounded(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vg.data.prompt._CACHE_SIZE", 3)
    build = Prompts(TextSpec(tokenizer, 64, (".", "?")), one_prompt=False)
    for count in range(9):
        text = build([sample("dog", f"{count} dog", f"dog {count}")])
        assert words_of_phrases(tokenizer, text) == ["dog", f"{count} dog", f"dog {count}"]
    assert len(build._known) <= 3 + 3


def test_80_coco_classes_equal_the_official_prompt() -> None:
    official = golden("coco80_prompt.json")
    tokenizer = golden_tokenizer(DATA / "weights" / "bert-base-uncased-vocab.txt")
    names = list(official["positive_token_indices"])
    text = prompts(tokenizer, sample(*names))
    assert text.token_ids.shape == (1, 195)
    assert_same_phrases(text, names, official["input_ids"], official["positive_token_indices"])


def test_phrase_positions_equal_the_official_implementation() -> None:
    tokenizer = golden_tokenizer(GOLDEN / "tokenizer" / "vocab.txt")
    for case in golden("positive_maps.json")["cases"]:
        names = list(case["span_based_map"])
        text = prompts(tokenizer, sample(*names))
        token_ids = tokenizer.convert_tokens_to_ids(case["tokens"])
        assert_same_phrases(text, names, token_ids, case["span_based_map"])


def assert_same_phrases(text: Text, names: list[str], token_ids: list[int], spans: dict[str, list[int]]) -> None:
    """Compare the tokens of each phrase with the official prompt, which orders phrases differently."""
    assert sorted(text.token_ids[0].tolist()) == sorted(token_ids)
    for name, tokens in zip(names, text.phrase_tokens[0], strict=True):
        assert text.token_ids[0, tokens].tolist() == [token_ids[position] for position in spans[name]], name
        after = tokens.nonzero().max() + 1
        assert text.token_ids[0, after] == token_ids[spans[name][-1] + 1], "the full stop follows"


@pytest.mark.parametrize(
    ("caption", "row"), [("a cat", 0), ("is it a dog ? yes . cat", 1), (". cat", 0), ("cat . . dog", 0)]
)
def test_a_single_phrase_has_the_official_token_ids(caption: str, row: int) -> None:
    tokenizer = golden_tokenizer(GOLDEN / "tokenizer" / "vocab.txt")
    cases = golden("text_masks.json")["cases"]
    case = next(case for case in cases if case["captions"][row : row + 1] in ([caption], [f"{caption} ."]))
    official = [token_id for token_id in case["input_ids"][row] if token_id]
    text = prompts(tokenizer, sample(caption))
    assert text.token_ids[0].tolist() == (official if official[-2] == 1012 else [*official[:-1], 1012, official[-1]])
    if "phrase_token_masks" in case:
        closed = max(
            i for i, token_id in enumerate(official) if token_id in (1012, 1029)
        )  # tokens after it are not a phrase
        of_any_phrase = np.any(case["phrase_token_masks"][row], axis=0)[:closed]
        np.testing.assert_array_equal(text.phrase_tokens[0, 0, :closed].numpy(), of_any_phrase)


@pytest.mark.parametrize(
    "phrases", [("a", "b"), ("a cat", "a remote control"), ("it's", "u.s. flag", "t-shirt", "1.5 l")]
)
def test_concatenated_tokens_equal_the_tokens_of_the_joined_text(
    tokenizer: PreTrainedTokenizerBase, phrases: tuple[str, ...]
) -> None:
    text = prompts(tokenizer, sample(*phrases))
    order = text.phrase_tokens[0].int().argmax(dim=1).argsort().tolist()  # phrases by position
    assert text.token_ids[0].tolist() == tokenizer("".join(f"{phrases[i]}. " for i in order))["input_ids"]
