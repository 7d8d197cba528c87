"""Whole captions as prompts: `captions: whole` of ODVG files, from the lines of a file to the loss."""

from __future__ import annotations

import json
import logging
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertTokenizer, PreTrainedTokenizerBase

import vg
from tests.data.detection.detection_files import REAL, write_image
from tests.models.grounding_dino.tiny import tiny_model
from vg.config import RunConfig
from vg.data.collate import Collator, prompt_targets
from vg.data.dataset import GroundingDataset
from vg.data.detection.odvg import OdvgConfig, OdvgSource
from vg.data.detection.vocabulary import VocabularyConfig
from vg.data.mixture import Mixture
from vg.data.prompt import Expressions, Prompts
from vg.data.source import checked
from vg.errors import BadSampleError, ConfigError, DataError
from vg.models.grounding_dino.config import DenoisingConfig, PredictConfig
from vg.training.trainer import Trainer
from vg.types import Caption, Sample, Text, TextSpec

VOCABULARY = Path(vg.__file__).parent / "models" / "small_vocabulary.txt"
CAPTION = "A man with a red hat, next to a man; in the café?"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return BertTokenizer(vocab=str(VOCABULARY))


def region(*spans: list[int], bbox: Any = (5, 10, 25, 30), **more: Any) -> dict[str, Any]:
    return {"bbox": list(bbox), "tokens_positive": list(spans), **more}


def line(caption: str, *regions: dict[str, Any]) -> dict[str, Any]:
    grounding = {"caption": caption, "regions": list(regions)}
    return {"filename": "a.png", "height": 40, "width": 60, "grounding": grounding}


def odvg(folder: Path, *rows: dict[str, Any], **settings: Any) -> OdvgConfig:
    write_image(folder / "a.png")
    (folder / "train.jsonl").write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    return OdvgConfig(path=str(folder / "train.jsonl"), **({"captions": "whole"} | settings))


def source(folder: Path, *rows: dict[str, Any], **settings: Any) -> OdvgSource:
    return odvg(folder, *rows, **settings).build()


def prompts(tokenizer: PreTrainedTokenizerBase, *samples: Sample, max_tokens: int = 256) -> Text:
    return Prompts(TextSpec(tokenizer, max_tokens, (".", "?")), one_prompt=True)(samples)


def words(tokenizer: PreTrainedTokenizerBase, text: Text, row: int = 0) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(text.token_ids[row, text.mask[row]].tolist()))


def words_of_phrases(tokenizer: PreTrainedTokenizerBase, text: Text, row: int = 0) -> list[str]:
    return [" ".join(tokenizer.convert_ids_to_tokens(text.token_ids[row, m].tolist())) for m in text.phrase_tokens[row]]


def captioned(text: str, *spans: tuple[tuple[int, int], ...]) -> Sample:
    boxes = np.tile(np.array([0, 0, 4, 4], np.float32), (len(spans), 1))
    phrases = tuple(f"phrase {index}" for index in range(len(spans)))
    caption = Caption(text, spans)
    return Sample("val/3", np.zeros((8, 8, 3), np.uint8), phrases, boxes, np.arange(len(spans)), caption=caption)


def test_a_sentence_longer_than_the_text_encoder_takes(tokenizer: PreTrainedTokenizerBase) -> None:
    """Positions restart in every sentence, so a caption may be longer."""
    build = Prompts(TextSpec(tokenizer, 100, (".", "?"), positions=4), one_prompt=False)
    fitting = captioned("red circle left. blue circle left? red", ((0, 3),))
    assert build([fitting]).token_ids.shape == (1, 12)
    with pytest.raises(
        BadSampleError, match=r"val/3: a sentence of the caption has 4 tokens, .* takes 3: 'red\. red ci"
    ):
        build([captioned("red. red circle left circle", ((0, 3),))])


def test_golden_values_by_hand(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Two spans of one phrase, a repeated word, equal spans, punctuation, an accent, word pieces, several boxes."""
    assert [CAPTION[begin:end] for begin, end in ((0, 5), (13, 20), (30, 35), (44, 48))] == [
        *("A man", "red hat", "a man", "café")
    ]
    row = line(
        CAPTION,
        region([0, 5], phrase="something else"),
        region([30, 35], bbox=[[7, 7, 14, 12], [30, 7, 40, 12]], phrase=None),
        region([13, 16], [0, 5]),
        region([44, 48], phrase=["not", "text"]),
        region([16, 21]),  # " hat,"
        region([0, 5], [13, 16], bbox=[35, 5, 55, 35]),  # in another order
    )
    sample = checked(source(tmp_path, row).load(0, 0))
    assert sample.phrases == ("A man", "a man (2)", "red A man", "café", "hat,")
    assert sample.phrase_ids.tolist() == [0, 1, 1, 2, 3, 4, 2]
    assert sample.caption == Caption(
        CAPTION,
        (((0, 5),), ((30, 35),), ((0, 5), (13, 16)), ((44, 48),), ((16, 21),)),
        f"{tmp_path / 'train.jsonl'}, line 1",
    )
    text = prompts(tokenizer, sample)
    assert words(tokenizer, text) == ("[CLS] a man with a red hat , next to a man ; in the c ##a ##f ##e ? . [SEP]"), (
        "a full stop is added, because only that ends a caption"
    )
    assert [row.nonzero().flatten().tolist() for row in text.phrase_tokens[0]] == [
        [1, 2],
        [10, 11],
        [1, 2, 5],
        [15, 16, 17, 18],
        [6, 7],
    ]
    assert text.sample_ids.tolist() == [0]


@pytest.mark.parametrize(
    ("caption", "spans", "prompt", "phrase"),
    [
        ("a dog.", ((2, 5),), "a dog .", "dog"),
        ("  a dog. \n", ((4, 7),), "a dog .", "dog"),
        ("a dog..", ((2, 7),), "a dog . .", "dog"),
        ("a dog? A cat", ((2, 8),), "a dog ? a cat .", "dog a"),
        ("dogs", ((0, 3),), "dog ##s .", "dog"),
        ("dogs", ((3, 4),), "dog ##s .", "##s"),
        ("a cafe\u0301 dog", ((2, 7),), "a c ##a ##f ##e dog .", "c ##a ##f ##e"),
        ("a red  dog", ((5, 8),), "a red dog .", "dog"),
        ("dog [SEP] cat", ((0, 3), (10, 13)), "dog [UNK] s ##e ##p [UNK] cat .", "dog cat"),
    ],
)
def test_prompts_and_spans(
    tokenizer: PreTrainedTokenizerBase, caption: str, spans: tuple[tuple[int, int], ...], prompt: str, phrase: str
) -> None:
    text = prompts(tokenizer, captioned(caption, spans))
    assert words(tokenizer, text) == f"[CLS] {prompt} [SEP]"
    assert words_of_phrases(tokenizer, text) == [phrase]


def positive_map(tokenizer: PreTrainedTokenizerBase, caption: str, spans: tuple[tuple[int, int], ...]) -> list[int]:
    """Follow mmdetection's `create_positive_map` (mmdet/models/detectors/glip.py)."""
    encoding = tokenizer(caption if caption.endswith(".") else f"{caption}. ")
    found: set[int] = set()
    for begin, end in spans:
        first = next((t for i in range(3) if (t := encoding.char_to_token(begin + i)) is not None), None)
        last = next((t for i in range(3) if (t := encoding.char_to_token(end - 1 - i)) is not None), None)
        if first is not None and last is not None:
            found |= set(range(first, last + 1))
    delimiters = tokenizer.convert_tokens_to_ids([".", "?"])
    return sorted(token for token in found if encoding["input_ids"][token] not in delimiters)


def test_real_sentences_equal_the_rule_of_mmdetection() -> None:
    """No shared dataset has `tokens_positive`: whole words of real expressions are the spans."""
    file = REAL / "refcoco_annotations" / "refcocog_umd_val.jsonl"
    vocabulary = REAL / "weights" / "bert-base-uncased-vocab.txt"
    if not (file.exists() and vocabulary.exists()):
        pytest.skip("real expressions or the vocabulary of BERT are not available")
    tokenizer = BertTokenizer(vocab=str(vocabulary))
    sentences = [json.loads(row)["sent"].lower().strip() for row in file.read_text().splitlines()[:1500]]
    generator = random.Random(0)
    for sentence in filter(None, sentences):
        bounds = [match.span() for match in re.finditer(r"\S*\w\S*", sentence)]
        chosen = [sorted(generator.choices(range(len(bounds)), k=2)) for _ in range(3)]
        spans = [(bounds[first][0], bounds[last][1]) for first, last in chosen]
        text = prompts(tokenizer, captioned(sentence, ((0, len(sentence)),), tuple(spans)))
        encoded = tokenizer(sentence if sentence.endswith(".") else f"{sentence}. ")
        assert text.token_ids[0].tolist() == encoded["input_ids"]
        for tokens, own in zip(text.phrase_tokens[0], (((0, len(sentence)),), tuple(spans)), strict=True):
            assert tokens.nonzero().flatten().tolist() == positive_map(tokenizer, sentence, own), (sentence, own)


def test_phrases_are_the_default(tmp_path: Path) -> None:
    row = line(CAPTION, region([0, 5], phrase="A man"), region([30, 35], phrase="a man"))
    sample = source(tmp_path, row, captions="phrases").load(0, 0)
    assert (sample.phrases, sample.caption) == (("A man",), None)
    assert OdvgConfig(path="x").captions == "phrases"


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ([{"bbox": [1, 2, 9, 9], "phrase": "a man"}], r"regions without tokens_positive: .* region 1: phrase 'a man'"),
        ([region(phrase="a man")], r"region 1: .*add tokens_positive .* or set captions: phrases"),
        ([region([0, 0])], r"region 1: tokens_positive \[\[0, 0\]\], the caption has 49 characters; correct"),
        ([region([0, 50])], r"region 1: tokens_positive \[\[0, 50\]\], the caption has 49 characters; correct"),
        ([region([20, 22])], r"spans without a letter or digit: .*region 1.*: ','; correct or remove"),
        ([region([48, 49])], r"spans without a letter or digit: .*region 1.*: '\?'; correct or remove"),
    ],
)
def test_errors_name_file_line_and_region(tmp_path: Path, regions: list[Any], message: str) -> None:
    good = region([0, 5])
    broken = source(tmp_path, line(CAPTION, good), line(CAPTION, good, *regions))
    broken.load(0, 0)
    with pytest.raises(BadSampleError, match=rf"train\.jsonl: .*line 3.*{message}|train\.jsonl: {message}"):
        broken.load(1, 0)


def test_captions_that_are_too_long_are_never_truncated(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    rows = source(tmp_path, line("A red dog", region([0, 1])), line("A red dog in a red hat", region([0, 1])))
    model = tiny_model()
    collate = Collator(model.image_spec, TextSpec(tokenizer, 9, (".", "?")), one_prompt=True)
    assert words(tokenizer, collate([rows.load(0, 0)]).text) == "[CLS] a red dog . [SEP]"
    message = (
        r"train\.jsonl, line 3: the prompt of the caption has 10 tokens, the model takes 9 .*'A red dog in a red hat'"
    )
    with pytest.raises(BadSampleError, match=message):
        collate([rows.load(1, 0)])
    skipping = GroundingDataset(rows, bad_samples="skip", collate=collate)
    with caplog.at_level(logging.WARNING):
        assert skipping[1].id == skipping[0].id
    assert skipping.bad.tolist() == [False, True]
    assert re.search(message, caplog.text)
    assert prompts(tokenizer, rows.load(1, 0), max_tokens=10).mask.sum() == 10


def test_spans_without_a_token(tokenizer: PreTrainedTokenizerBase) -> None:
    for caption, span in (("a dog.", (5, 6)), ("a  dog", (1, 3)), ("cafe\u0301 dog", (4, 5))):
        with pytest.raises(
            BadSampleError, match=rf"val/3: no token .* spans \[\[{span[0]}, {span[1]}\]\] .*'phrase 1'"
        ):
            prompts(tokenizer, captioned(caption, ((0, 4),), (span,)))


def test_unknown_words_of_a_caption_are_logged_once(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    build = Prompts(TextSpec(tokenizer, 64, (".", "?")), one_prompt=True)
    for _ in range(2):
        build([captioned("a 猫 on a dog", ((2, 3),), ((0, 3),))])
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("val/3: all tokens of the phrase 'phrase 0' are unknown to the tokenizer")


def test_a_tokenizer_without_characters_of_tokens_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    class Slow:
        is_fast = False

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    with pytest.raises(ConfigError, match=r"tokenizer Slow does not give .*captions: whole needs"):
        prompts(Slow(), captioned("a dog", ((0, 1),)))  # type: ignore[arg-type]


def test_models_of_expressions_refuse_captions(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"val/3: .*spans of a caption.*set captions: phrases"):
        Expressions(TextSpec(tokenizer, 64))([captioned("a dog", ((0, 1),))])


@pytest.mark.parametrize("spans", [(), (((0, 3),), ((0, 2),)), ((),), (((0, 9),),), (((2, 2),),)])
def test_spans_of_a_sample_are_validated(spans: Any) -> None:
    good = captioned("a red dog", ((0, 9),))
    checked(good)
    with pytest.raises(BadSampleError, match=r"val/3: spans .* each of the 1 phrases; it has 5 characters: 'a dog'"):
        checked(replace(good, caption=Caption("a dog", spans)))


def test_a_vocabulary_without_classes_is_reported(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"train\.jsonl: vocabulary is not used: it is for lines with numbered classes"
    ):
        source(tmp_path, line(CAPTION, region([0, 5])), vocabulary=VocabularyConfig(negatives=2))


CLASSES = {
    "filename": "a.png",
    "height": 40,
    "width": 60,
    "detection": {"instances": [{"bbox": [5, 10, 25, 30], "label": 1}, {"bbox": [30, 5, 50, 30], "label": 0}]},
}


def mixture(folder: Path) -> Mixture[Sample]:
    """Two numbered classes, and a caption of which the red object has no boxes of its own."""
    for name in ("classes", "captions"):
        (folder / name).mkdir()
    (folder / "map.json").write_text('{"0": "cat", "1": "dog"}')
    rows = line(CAPTION, region([0, 5]), region([30, 35], bbox=[20, 5, 40, 30]), region([13, 16], [30, 35]))
    return Mixture(
        [
            source(folder / "classes", CLASSES, label_map=str(folder / "map.json")),
            source(folder / "captions", rows),
        ]
    )


def test_a_training_step_equals_one_with_an_explicit_positive_map(tmp_path: Path) -> None:
    """A batch of a detection image and a caption, with denoising."""
    model = tiny_model(denoising=DenoisingConfig(num_queries=6, num_labels=8)).train()
    data = mixture(tmp_path)
    samples = [data.load(index, 0) for index in range(2)]
    collate = Collator(model.image_spec, model.text_spec, one_prompt=True)
    batch = collate(samples)
    tokenizer = model.text_spec.tokenizer
    encoded = tokenizer(["cat. dog. ", f"{CAPTION}. "], padding=True, return_tensors="pt")
    phrase_tokens = torch.zeros(2, 3, encoded["input_ids"].shape[1], dtype=torch.bool)
    for row, phrase, tokens in (
        *((0, 0, [1]), (0, 1, [3])),  # cat, dog
        *((1, 0, [1, 2]), (1, 1, [10, 11]), (1, 2, [5, 10, 11])),
    ):
        phrase_tokens[row, phrase, tokens] = True
    text = Text(encoded["input_ids"], encoded["attention_mask"].bool(), phrase_tokens, torch.arange(2))
    expected = replace(batch, text=text, prompt_targets=prompt_targets(text, batch.targets))
    assert words(tokenizer, batch.text, 0) == "[CLS] cat . dog . [SEP]"

    def losses(given: Any) -> tuple[dict[str, float], torch.Tensor]:
        torch.manual_seed(0)
        model.zero_grad()
        terms = model.loss(model(given), given)
        torch.stack(list(terms.values())).sum().backward()
        return {str(name): value.item() for name, value in terms.items()}, model.text.projection.weight.grad.clone()

    found, wanted = losses(batch), losses(expected)
    assert found[0] == wanted[0]
    assert torch.equal(found[1], wanted[1])
    assert found[1].abs().sum() > 0
    first, second = batch.prompt_targets.positive_map[1, :2]
    assert first.nonzero().flatten().tolist() == [1, 2]
    assert second.nonzero().flatten().tolist() == [10, 11]


def test_predictions_score_the_tokens_of_a_phrase(tmp_path: Path) -> None:
    """A caption with one phrase is not an expression, whose "max" score is over all tokens of the prompt."""
    model = tiny_model(predict=PredictConfig(score="max", top_k=1))
    sample = source(tmp_path, line(CAPTION, region([13, 20]))).load(0, 0)
    batch = Collator(model.image_spec, model.text_spec)([sample])
    with torch.no_grad():
        output = model(batch)
        (found,) = model.predict(output, batch)
    probability = output.logits[-1, 0].sigmoid()  # [Q, T]
    assert found.phrases == ("red hat",)
    torch.testing.assert_close(found.scores[0], probability[:, [5, 6]].max())
    assert probability.max() > found.scores[0]


def test_training_and_evaluation_of_a_mixture(tiny_config: Any, tmp_path: Path) -> None:
    mixture(tmp_path)
    classes, captions = (
        {"name": "odvg", "path": str(tmp_path / name / "train.jsonl"), "captions": "whole"}
        for name in ("classes", "captions")
    )
    classes |= {"label_map": str(tmp_path / "map.json"), "vocabulary": {"negatives": 1}}
    config: RunConfig = tiny_config(
        data={
            "train": {"name": "mixture", "datasets": [classes, captions]},
            "eval": captions,
            "batch_size": 2,
            "augment": {"flip": 0.5, "resize": {"shortest": [48, 64], "crop": 1.0, "crop_sides": [20, 30]}},
        },
        train={"output": str(tmp_path / "run"), "max_steps": 2},
    )
    config.model = tiny_model(denoising=DenoisingConfig(num_queries=6)).config
    trainer = Trainer(config)
    trainer.fit()
    last = [json.loads(row) for row in (tmp_path / "run" / "history.jsonl").read_text().splitlines()][-1]
    assert last["num_categories"] == 3, "equal words at two positions are two phrases"
