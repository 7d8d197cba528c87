"""Errors of reading, loading and writing checkpoints name the reason and the tensors or settings."""

from __future__ import annotations

import errno
import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.models.grounding_dino.published import BERT, random_model, write_tokenizer
from tests.models.grounding_dino.test_checkpoints import LEARNED, MM, model
from tests.models.grounding_dino.tiny import tiny_model
from vg.checkpoint import write_model
from vg.cli import main
from vg.config import ModelOnlyConfig
from vg.errors import CheckpointError
from vg.models.grounding_dino.checkpoints import load_into, read_checkpoint, write_checkpoint
from vg.models.grounding_dino.checkpoints.write import DELIMITER_IDS
from vg.models.grounding_dino.config import BertConfig, ClassHeadConfig


@pytest.fixture
def official(tmp_path: Path) -> Path:
    source = model()
    write_checkpoint(source.own_state_dict(), source.config, None, tmp_path / "official.pth", "official")
    return tmp_path / "official.pth"


def changed(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Change the tensors of a file."""
    stored = torch.load(path, weights_only=True)
    change(stored["model"])
    torch.save(stored, path)
    return path


def reading(path: Path | str, bert: Any = BERT) -> str:
    """Return the error message of reading a checkpoint."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path, bert)
    return str(caught.value)


def test_paths_without_a_checkpoint(tmp_path: Path) -> None:
    assert reading(tmp_path / "no.pth") == f"{tmp_path}/no.pth does not exist"
    assert "nobody/nothing (the checkpoint, or model.weights) is neither a local path nor" in reading("nobody/nothing")
    assert "contains neither config.json (transformers) nor config.yaml (vg)" in reading(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "grounding-dino"}))
    assert reading(tmp_path) == f"{tmp_path}: the folder contains no model.safetensors"
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "detr"}))
    assert "config.json is of another architecture: detr" in reading(tmp_path)
    (tmp_path / "config.json").unlink()
    for content in ("model: {name: rec}", "data: 3", "", "model: ["):
        (tmp_path / "config.yaml").write_text(content)
        assert f"{tmp_path}: config.yaml is not that of a Grounding DINO" in reading(tmp_path)
    (tmp_path / "config.yaml").write_text("model: {name: rec}")
    assert "but of rec, which has one format" in reading(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert str(tmp_path) in reading(tmp_path)


def test_weights_that_are_not_finite_are_named(official: Path) -> None:
    def diverge(weights: dict[str, Tensor]) -> None:
        weights["transformer.level_embed"][0] = torch.nan

    message = reading(changed(official, diverge))
    assert message.startswith(f"{official}: the weights are not finite (NaN or Inf): transformer.level_embed;")


def test_files_that_are_not_checkpoints(tmp_path: Path, official: Path) -> None:
    (tmp_path / "notes.pth").write_text("# Notes")
    assert "notes.pth: cannot be loaded" in reading(tmp_path / "notes.pth")
    whole = official.read_bytes()
    official.write_bytes(whole[: len(whole) // 2])
    message = reading(official)
    assert "official.pth: cannot be loaded" in message
    assert "weights_only" not in message
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00")
    assert "cut.safetensors: " in reading(tmp_path / "cut.safetensors")
    for content in ([1, 2], {"epoch": 3}, {}, {"model": {}}):
        torch.save(content, tmp_path / "other.pth")
        assert "not a checkpoint: neither a dictionary of tensors, nor one as `model` or `state_dict`" in reading(
            tmp_path / "other.pth"
        )
    torch.save({"backbone.conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}, tmp_path / "other.pth")
    assert "in any known format: its 2 tensors are backbone.conv1.weight, fc.bias, ..." in reading(
        tmp_path / "other.pth"
    )


def test_missing_and_unknown_tensors_are_all_listed(official: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["feat_map.bias"], tensors["transformer.encoder.fusion_layers.1.gamma_v"]
        tensors["surplus.weight"] = torch.zeros(3)

    message = reading(changed(official, change))
    assert "official.pth: the official checkpoint is incomplete or of another architecture" in message
    assert "missing: feat_map.bias" in message
    assert "missing: transformer.encoder.fusion_layers.1.gamma_v" in message
    assert "unknown: surplus.weight" in message
    assert len(message.splitlines()) == 4
    changed(official, lambda tensors: tensors.update({f"surplus.{number}": torch.zeros(1) for number in range(50)}))
    message = reading(official)
    assert len(message.splitlines()) == 22
    assert message.endswith("and 33 more")


def test_a_tensor_under_two_names_must_be_equal(official: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["bbox_embed.1.layers.2.bias"] = torch.ones(4)

    found = reading(changed(official, change))
    assert "should be equal: bbox_embed.1.layers.2.bias and transformer.decoder.bbox_embed.1.layers.2.bias" in found


def test_variants_that_cannot_be_detected(official: Path, tmp_path: Path) -> None:
    stored = torch.load(official, weights_only=True)["model"]
    torch.save({name: tensor for name, tensor in stored.items() if "input_proj.2." not in name}, tmp_path / "odd.pth")
    assert f"{tmp_path}/odd.pth: stages ([2, 3]) must be ascending and end with 4" in reading(tmp_path / "odd.pth")
    message = reading(official, {})
    assert "the text encoder has width 32, but its number of attention heads cannot be detected" in message
    assert "--tokenizer" in message
    changed(official, lambda tensors: tensors.pop("transformer.tgt_embed.weight"))
    assert reading(official) == f"{official}: the tensor transformer.tgt_embed.weight is missing"
    changed(official, lambda tensors: tensors.pop("backbone.0.patch_embed.proj.weight"))
    assert "the backbone is neither a Swin transformer nor a ResNet" in reading(official)
    random_model(encoder_n_points=2).save_pretrained(tmp_path / "hf")
    assert "encoder_n_points and decoder_n_points must be the same" in reading(tmp_path / "hf")


def test_tensors_with_unexpected_shapes(official: Path) -> None:
    def widen(tensors: dict[str, Tensor]) -> None:
        tensors["transformer.encoder.text_layers.0.linear1.bias"] = torch.zeros(99)

    message = reading(changed(official, widen))
    assert "shape: encoder.layers.0.text.feedforward.0.bias is (99,), expected (32,)" in message

    def narrow(tensors: dict[str, Tensor]) -> None:
        tensors["input_proj.1.0.weight"] = torch.zeros(64, 7, 1, 1)

    assert "the input projections expect [32, 7, 128] channels" in reading(changed(official, narrow))


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"num_queries": 21}, "num_queries: 21 in the configuration, 20 in the checkpoint"),
        ({"encoder_layers": 3}, "encoder_layers: 3 in the configuration, 2 in the checkpoint"),
        ({"classes": ClassHeadConfig(bias=True)}, "classes: ClassHeadConfig"),
        ({"classes": ClassHeadConfig(similarity="cosine", scale="learned")}, "classes: ClassHeadConfig"),
        ({"fusion": "gated"}, "fusion: gated in the configuration, bidirectional in the checkpoint"),
    ],
)
def test_a_checkpoint_of_another_variant(official: Path, settings: dict[str, Any], difference: str) -> None:
    other = model(**settings)
    before = {name: tensor.clone() for name, tensor in other.own_state_dict().items()}
    with pytest.raises(CheckpointError, match=r"official\.pth is another variant of the model") as caught:
        load_into(other, official)
    assert difference in str(caught.value)
    assert all(tensor.equal(before[name]) for name, tensor in other.own_state_dict().items()), "nothing was loaded"


def test_all_differences_are_listed(official: Path) -> None:
    other = model(num_queries=21, heads=8)
    other.config.backbone = replace(other.config.backbone, window=5)
    with pytest.raises(CheckpointError) as caught:
        load_into(other, official)
    assert all(part in str(caught.value) for part in ("num_queries: 21", "heads: 8", "backbone.window: 5"))


def test_one_head_per_layer_cannot_become_shared(tmp_path: Path) -> None:
    source = model(shared_heads=False)
    write_checkpoint(source.own_state_dict(), source.config, None, tmp_path / "own.pth", "official")
    with pytest.raises(CheckpointError, match="shared_heads: True in the configuration, False in the checkpoint"):
        load_into(model(), tmp_path / "own.pth")


def test_another_text_encoder(official: Path) -> None:
    text = BertConfig(architecture={"model_type": "bert", "type_vocab_size": 2} | BERT | {"vocab_size": 1041})
    with pytest.raises(CheckpointError, match=r"official\.pth: the weights do not fit(.|\n)*word_embeddings"):
        load_into(model(text=text), official)


@pytest.mark.parametrize(
    ("settings", "format", "reason"),
    [
        ({"fusion": "gated"}, "mmdet", r"gated fusion \(model.fusion\)"),
        ({"classes": ClassHeadConfig("cosine", "learned")}, "mmdet", "cosine similarity"),
        ({"classes": ClassHeadConfig(bias=True)}, "mmdet", "class logits of scale `one` with a bias"),
        ({"classes": ClassHeadConfig(scale="width")}, "mmdet", "class logits of scale `width` without a bias"),
        (LEARNED, "transformers", "class logits of scale `learned` without a bias"),
        (LEARNED, "official", "class logits of scale `learned` without a bias"),
        (MM, "official", "class logits of scale `width` with a bias"),
        ({"points": 2}, "official", "model.points other than 4"),
        (
            {"position_temperature": 10.0},
            "mmdet",
            "model.points other than 4 or model.position_temperature other than 20",
        ),
        ({"position_temperature": 0.5}, "transformers", "position temperature 0.5"),
    ],
)
def test_unsupported_models_of_a_format(tmp_path: Path, settings: dict[str, Any], format: Any, reason: str) -> None:
    source = model(**settings)
    with pytest.raises(CheckpointError, match=f"the {format} format does not support {reason}"):
        write_checkpoint(source.own_state_dict(), source.config, None, tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


def test_weights_that_do_not_fit_the_configuration(tmp_path: Path) -> None:
    source = model()
    weights = source.own_state_dict()
    with pytest.raises(CheckpointError, match=r"does not support extra\.weight"):
        write_checkpoint(weights | {"extra.weight": torch.zeros(1)}, source.config, None, tmp_path / "x", "mmdet")
    rest = {name: tensor for name, tensor in weights.items() if name != "text.projection.bias"}
    with pytest.raises(CheckpointError, match=r"the weights lack text\.projection\.bias"):
        write_checkpoint(rest, source.config, None, tmp_path / "x", "mmdet")
    with pytest.raises(CheckpointError, match="needs a tokenizer"):
        write_checkpoint(weights, source.config, None, tmp_path, "transformers")


@pytest.mark.parametrize("family", ["grounding_dino", "mm_grounding_dino"])
def test_transformers_has_constant_delimiters(family: str) -> None:
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    assert modeling.SPECIAL_TOKENS == DELIMITER_IDS


def test_another_vocabulary_than_that_of_bert(tmp_path: Path) -> None:
    """transformers would not split its prompts, so all predictions would be wrong."""
    source = tiny_model(points=4)
    run, spec = tmp_path / "run", source.text_spec
    run.mkdir()
    write_model(run, source, ModelOnlyConfig(source.config))
    message = converting(run, tmp_path / "hf", "--to", "transformers")
    assert "splits prompts at the token ids [101, 102, 1012, 1029] of bert-base-uncased" in message
    assert "of the tokenizer are [2, 3, 41, 46]" in message
    assert "Write another format: official and mmdetection" in message
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    with pytest.raises(CheckpointError, match="does not support this vocabulary"):
        write_checkpoint(source.own_state_dict(), source.config, spec.tokenizer, tmp_path, "transformers")
    main(["convert", str(run), str(tmp_path / "official.pth"), "--to", "official"])


def converting(*arguments: object) -> str:
    """Return the message that `vg convert` exits with."""
    with pytest.raises(SystemExit) as caught:
        main(["convert", *map(str, arguments)])
    return str(caught.value.code)


def test_convert_command_exits_with_a_message(official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bert").mkdir()
    write_tokenizer(tmp_path / "bert")
    options = ("--tokenizer", tmp_path / "bert")
    absent = f"error: {tmp_path}/no.pth does not exist; {tmp_path} contains bert, official.pth"
    assert converting(tmp_path / "no.pth", tmp_path / "out", "--to", "vg") == absent
    assert "official.pth exists; choose another path" in converting(official, official, "--to", "mmdet")
    assert official.exists()

    (tmp_path / "bert" / "tokenizer.json").unlink()
    (tmp_path / "bert" / "vocab.txt").unlink()
    message = converting(official, tmp_path / "out", "--to", "vg", *options)
    assert str(tmp_path / "bert") in message
    assert "pass the folder or Hub id of the BERT that the model was trained with: --tokenizer" in message
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(f"word{number}" for number in range(2000)))
    message = converting(official, tmp_path / "out", "--to", "transformers", *options)
    assert "does not fit this checkpoint, whose text encoder has 1040" in message

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.save", fail)
    assert "No space left on device" in converting(official, tmp_path / "out" / "mm.pth", "--to", "mmdet", *options)
    assert not list(tmp_path.rglob("*.partial")) + list(tmp_path.rglob("mm.pth"))


def test_an_unsupported_format_leaves_no_files(tmp_path: Path) -> None:
    source = model(**MM)
    write_checkpoint(source.own_state_dict(), source.config, None, tmp_path / "mm.pth", "mmdet")
    (tmp_path / "bert").mkdir()
    write_tokenizer(tmp_path / "bert")
    options = ("--tokenizer", tmp_path / "bert")
    message = converting(tmp_path / "mm.pth", tmp_path / "out.pth", "--to", "official", *options)
    assert (
        message
        == "error: the official format does not support class logits of scale `width` with a bias (model.classes)"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"mm.pth", "bert"}


def test_a_converted_checkpoint_has_no_data_config(official: Path, tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    write_tokenizer(tmp_path / "bert")
    main(["convert", str(official), str(tmp_path / "vg"), "--to", "vg", "--tokenizer", str(tmp_path / "bert")])
    with pytest.raises(SystemExit, match="is a model without a data config"):
        main(["eval", str(tmp_path / "vg")])
    with pytest.raises(SystemExit, match=r"data\.train: Field required"):
        main(["eval", str(tmp_path / "vg"), "data.eval.name=shapes"])


def test_tensors_without_names(tmp_path: Path) -> None:
    for stored in ({1: torch.zeros(1)}, torch.zeros(2), {}):
        torch.save(stored, tmp_path / "no.pth")
        assert "neither a dictionary of tensors" in reading(tmp_path / "no.pth")


def test_another_clamp_of_logits_is_reported(official: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = model()
    other = replace(source.config, logit_eps=(1e-3, 1e-5)).build(pretrained=False)
    load_into(other, official)
    assert "logit_eps" not in caplog.text, "files of other libraries do not contain it"
    (tmp_path / "vg").mkdir()
    write_model(tmp_path / "vg", source, ModelOnlyConfig(source.config))
    load_into(other, tmp_path / "vg")
    assert "model.logit_eps is (0.001, 1e-05), the checkpoint has (0.001, 0.001)" in caplog.text
