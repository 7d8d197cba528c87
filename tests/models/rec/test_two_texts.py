"""Two text encoders with tokenizers of their own: CLIP and SigLIP as published, joined tokens, checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from tests.models.rec.test_encoders import PATCHES
from tests.models.rec.test_encoders import TEXT as TOWER
from tests.models.rec.test_model import HEADS, TEXT, TINY_VISION, batch_for
from vg.checkpoint import read_model, write_model
from vg.cli.check import _token_counter
from vg.config import ModelOnlyConfig
from vg.data.prompt import Expressions
from vg.data.synthetic.shapes import ShapesConfig
from vg.errors import BadSampleError, ConfigError
from vg.export.networks import networks
from vg.inference.grounder import Grounder
from vg.models.rec.config import BgeConfig, RecConfig, VisionEncoderConfig
from vg.models.rec.model import RecModel
from vg.models.settings import ExtraTextEncoderConfig

EXPRESSIONS = ["red star", "the large blue circle on the left", "square"]


def write_tower(folder: Path, model_type: str) -> str:
    """Write a CLIP or SigLIP with a tokenizer of few words: CLIP pads with its end token, SigLIP has no begin."""
    torch.manual_seed(2)
    towers = {"vision_config": PATCHES, "text_config": TOWER | {"max_position_embeddings": 24}}
    AutoModel.from_config(AutoConfig.for_model(model_type, **towers)).save_pretrained(folder)
    words = ["<pad>", "<unk>", "<s>", "</s>", *sorted({word for text in EXPRESSIONS for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "<s> $A </s>" if model_type == "clip" else "$A </s>"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 2), ("</s>", 3)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    pad = "</s>" if model_type == "clip" else "<pad>"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, padding_side="left", model_input_names=["input_ids"], **special
    ).save_pretrained(folder)
    return str(folder)


def two_texts(folder: Path, model_type: str = "clip", head: str = "dense", frozen: bool = True) -> RecConfig:
    return RecConfig(
        image_size=64,
        max_tokens=24,
        vision=VisionEncoderConfig(architecture=TINY_VISION, frozen=False),
        text=BgeConfig(architecture=TEXT | {"hidden_size": 48}, frozen=False),
        extra_text=ExtraTextEncoderConfig(id=write_tower(folder, model_type), frozen=frozen),
        head=HEADS[head],
    )


@pytest.mark.parametrize("model_type", ["clip", "siglip", "siglip2"])
def test_towers_encode_as_in_transformers(tmp_path: Path, model_type: str) -> None:
    """SigLIP is run on all its positions, without a mask; CLIP pads with its end token."""
    model = two_texts(tmp_path, model_type).build().eval()
    whole, tokenizer = AutoModel.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    padding = {"padding": "max_length", "max_length": 24} if model_type != "clip" else {"padding": True}
    inputs = tokenizer(EXPRESSIONS, padding_side="right", return_tensors="pt", return_attention_mask=True, **padding)
    counts = inputs["attention_mask"].sum(dim=1).tolist()
    if model_type != "clip":  # as published, whose processors return no mask
        del inputs["attention_mask"]
    with torch.no_grad():
        expected = whole.text_model(**inputs).last_hidden_state
        text = Expressions(model.text_spec).arrays(EXPRESSIONS, EXPRESSIONS).tensors()
        tokens, mask = model.encode_text(text)
        alone, _ = model.encode_text(Expressions(model.text_spec).arrays(EXPRESSIONS[2:], ["one"]).tensors())
    assert text.extra is not None
    first, width = text.mask.shape[1], 48
    assert tokens.shape == (3, first + max(counts), 48 + 32)
    assert mask.equal(torch.cat((text.mask, text.extra.mask), dim=1))
    assert text.extra.mask.sum(dim=1).tolist() == counts
    for row, count in enumerate(counts):
        torch.testing.assert_close(tokens[row, first : first + count, width:], expected[row, :count])
    torch.testing.assert_close(alone[0, -counts[2] :], tokens[2, first : first + counts[2]])
    assert not tokens[:, first:, :width].any()
    assert not tokens[:, :first, width:].any()


@pytest.mark.parametrize("model_type", ["clip", "siglip", "siglip2"])
@pytest.mark.parametrize("head", HEADS)
def test_family_contract(tmp_path: Path, model_type: str, head: str) -> None:
    torch.manual_seed(0)
    model = two_texts(tmp_path, model_type, head, frozen=False).build()
    batch = batch_for(model)
    sum(model.loss(model(batch), batch).values()).backward()  # type: ignore[union-attr]
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"vision", "text", "extra_text", "head"}
    for moved in (batch.to("cpu"), batch.pack()):
        for one, other in zip(model.eval()(moved), model(batch), strict=True):
            assert one.equal(other)
    single = ShapesConfig(split="test", image_size=64).build().load(1, 0)
    boxes = model.predict(model(alone := batch_for(model, 2)), alone)[1].boxes
    assert alone.targets[1].id == single.id
    torch.testing.assert_close(boxes, model.predict(model(batch), batch)[1].boxes, rtol=1e-4, atol=1e-3)


def test_both_tokenizers_are_saved_and_loaded(tmp_path: Path) -> None:
    config = two_texts(tmp_path / "clip")
    torch.manual_seed(0)
    model = config.build().eval()
    (tmp_path / "run").mkdir()
    write_model(tmp_path / "run", model, ModelOnlyConfig(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "clip" / name).unlink()
    loaded, read = read_model(tmp_path / "run")
    assert read.model == config
    assert isinstance(loaded, RecModel)
    assert loaded.external == ("extra_text",)
    assert loaded.text_spec.extra is not None
    assert model.text_spec.extra is not None
    assert loaded.text_spec.extra.tokenizer.get_vocab() == model.text_spec.extra.tokenizer.get_vocab()
    assert loaded.num_parameters() == model.num_parameters()
    image = ShapesConfig(split="test", image_size=64).build().load(0, 0).image
    found, expected = (
        grounder.predict(image, "red star", threshold=0.0)
        for grounder in (Grounder(str(tmp_path / "run")), Grounder(model))
    )
    np.testing.assert_allclose(found.boxes, expected.boxes)
    started = replace(config, weights=str(tmp_path / "run")).build()
    assert started.text_spec.extra.tokenizer.get_vocab() == model.text_spec.extra.tokenizer.get_vocab()


def test_one_encoder_has_no_files_of_a_second_one(tmp_path: Path) -> None:
    config = replace(two_texts(tmp_path), extra_text=None)
    model = config.build(pretrained=False)
    assert model.text_spec.extra is None
    assert not any(name.startswith("extra") for name in model.state_dict())
    (tmp_path / "run").mkdir()
    write_model(tmp_path / "run", model, ModelOnlyConfig(config))
    assert not (tmp_path / "run" / "tokenizer" / "extra").exists()
    assert read_model(tmp_path / "run")[1].model == config


def test_errors_name_the_second_encoder(tmp_path: Path) -> None:
    config = two_texts(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.max_tokens=30, but the text encoder has 24 positions"):
        replace(config, max_tokens=30).build()
    with pytest.raises(ConfigError, match=r"model\.extra_text: .* is of the type dinov3_vit, which is not supported"):
        replace(config, extra_text=ExtraTextEncoderConfig(architecture=TINY_VISION)).build()
    with pytest.raises(ConfigError, match=r"model\.extra_text cannot be exported yet"):
        networks(config.build())
    texts = Expressions(replace(config, max_tokens=4).build().text_spec)
    assert texts.extra is not None
    texts.spec = replace(texts.spec, max_tokens=64)
    long = EXPRESSIONS[1]
    assert texts.problems([("one", ("square",)), ("two", (long,))]).keys() == {1}
    with pytest.raises(BadSampleError, match="two: the expression has 9 tokens, the model takes 4"):
        texts.arrays([long], ["two"])


def test_the_check_counts_the_tokens_of_both(tmp_path: Path) -> None:
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]))
    spelled = ExtraTextEncoderConfig(architecture=TEXT, tokenizer=str(tmp_path / "vocab.txt"))
    for config, expected in ((RecConfig(), [2]), (RecConfig(extra_text=spelled), [7])):
        count = _token_counter(replace(config, text=BgeConfig(id=None, architecture=TEXT)))
        assert count is not None
        assert count(["red star"]) == expected
    unknown = replace(spelled, tokenizer="nobody/missing")
    assert _token_counter(RecConfig(text=BgeConfig(id=None, architecture=TEXT), extra_text=unknown)) is None
