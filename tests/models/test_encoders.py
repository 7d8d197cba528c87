"""Tokenizers of text encoders: every possible location, and an error if one is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vg.errors import ConfigError
from vg.models.encoders import SMALL_VOCABULARY, Encoder, load_tokenizer
from vg.models.settings import TextEncoderConfig

ARCHITECTURE = {"model_type": "bert"}


def test_tokenizers_from_all_locations(tmp_path: Path) -> None:
    small = load_tokenizer(TextEncoderConfig(architecture=ARCHITECTURE))
    small.save_pretrained(str(tmp_path))
    for location in (str(SMALL_VOCABULARY), str(tmp_path), str(tmp_path / "tokenizer.json")):
        tokenizer = load_tokenizer(TextEncoderConfig(architecture=ARCHITECTURE, tokenizer=location))
        assert tokenizer("the red star")["input_ids"] == small("the red star")["input_ids"]


@pytest.mark.parametrize("location", ["nowhere", "nowhere/vocab.txt", "nowhere/tokenizer.json"])
def test_a_missing_tokenizer_is_an_error(tmp_path: Path, location: str) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.*model\.text\.tokenizer"):
        load_tokenizer(TextEncoderConfig(architecture=ARCHITECTURE, tokenizer=str(tmp_path / location)))
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(ConfigError, match="nowhere"):  # a folder without a vocabulary
        load_tokenizer(TextEncoderConfig(architecture=ARCHITECTURE, tokenizer=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model_type": "nonsense"}, "Unrecognized model identifier: nonsense"),
        ({"model_type": "bert", "hidden_size": 30}, "hidden size"),
        ({"model_type": "bert", "hidden_size": "abc"}, "expected int"),
        ({"model_type": "bert", "vocab_size": -3}, "negative dimension"),
    ],
)
def test_wrong_architectures_name_the_setting(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)^model\.text\.architecture: .*{reason}") as caught:
        Encoder(TextEncoderConfig(architecture=values), pretrained=True)
    assert len(str(caught.value)) < 500
