"""Encoders and tokenizers: every possible location, an error if one is missing, and no code of a checkpoint."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from vg.errors import ConfigError
from vg.models.encoders import SMALL_VOCABULARY, Encoder, cached_token_counter, load_tokenizer, read_tokenizer
from vg.models.settings import TextEncoderConfig

ROOT = Path(__file__).parents[2]
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
    with pytest.raises(ConfigError, match=r"nowhere.*model\.text\.tokenizer"):
        cached_token_counter(TextEncoderConfig(architecture=ARCHITECTURE, tokenizer=str(tmp_path / location)))
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


CODE = """
from pathlib import Path
Path("{ran}").touch()
from transformers import BertConfig, BertModel, BertTokenizer
class Config(BertConfig):
    model_type = "hostile"
class Model(BertModel):
    config_class = Config
class Tokenizer(BertTokenizer): ...
"""


def test_code_of_a_checkpoint_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would ask on the standard input, where "y" runs the code."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the standard input"))
    folder, ran = tmp_path / "encoder", tmp_path / "ran"
    load_tokenizer(TextEncoderConfig(architecture=ARCHITECTURE)).save_pretrained(str(folder))
    (folder / "hostile.py").write_text(CODE.format(ran=ran))
    code = {"AutoConfig": "hostile.Config", "AutoModel": "hostile.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "hostile", "auto_map": code}))
    tokenizer = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["hostile.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    settings = TextEncoderConfig(id=str(folder))
    for attempt in (
        lambda: Encoder(settings, pretrained=True),
        lambda: load_tokenizer(settings),
        lambda: read_tokenizer(str(folder)),
    ):
        with pytest.raises(ConfigError, match=r"cannot be loaded|no tokenizer") as error:
            attempt()
        assert "trust_remote_code" not in str(error.value)
        assert "vg never runs" in str(error.value)
    assert not ran.exists()


def test_all_loaders_refuse_code() -> None:
    """Every call of a loader of transformers passes trust_remote_code=False."""
    calls = 0
    for file in (ROOT / "vg").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("from_pretrained", "from_config"):
                values = {keyword.arg: keyword.value for keyword in node.keywords}
                assert ast.dump(values.get("trust_remote_code", node)) == "Constant(value=False)", (file, node.lineno)
                calls += 1
    assert calls > 4
