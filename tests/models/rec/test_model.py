"""The rec family: published sizes, settings, encoders from ids, folders and architectures, frozen and trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, BertTokenizer

from tests.cache.feature_data import VISION as TINY_VISION
from tests.conftest import TEXT
from tests.models.rec.published import PUBLISHED
from vg.checkpoint import write_model
from vg.config import ModelOnlyConfig, load_config, parse_config
from vg.data.collate import Collator
from vg.data.synthetic.shapes import ShapesConfig
from vg.errors import CheckpointError, ConfigError
from vg.models.encoders import SMALL_VOCABULARY
from vg.models.rec.config import BgeConfig, DenseHeadConfig, PooledHeadConfig, RecConfig, VisionEncoderConfig
from vg.models.rec.vision import VisionEncoder
from vg.types import Text

CONFIGS = sorted((Path(__file__).parents[3] / "configs").rglob("*.yaml"))

TINY_CONVNEXT = {"model_type": "dinov3_convnext", "hidden_sizes": [16, 32], "depths": [1, 1]}
TINY_RESNET = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
HEADS = {
    "pooled": PooledHeadConfig(width=32, layers=1, heads=2, feedforward=64),
    "dense": DenseHeadConfig(width=32, layers=1, heads=2, feedforward=64),
}


@pytest.fixture
def ids_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        AutoConfig, "from_pretrained", lambda name, **_: AutoConfig.for_model(**PUBLISHED[name]), raising=True
    )


def tiny(head: str = "dense", **settings: object) -> RecConfig:
    return RecConfig(
        image_size=64,
        vision=VisionEncoderConfig(architecture=TINY_VISION, frozen=False),
        text=BgeConfig(architecture=TEXT, frozen=False),
        head=HEADS[head],
        **settings,
    )


def batch_for(model, size: int = 4):
    source = ShapesConfig(split="test", image_size=64).build()
    return Collator(model.image_spec, model.text_spec)([source.load(index, 0) for index in range(size)])


def test_published_model_has_the_published_size(ids_without_network: None) -> None:
    with torch.device("meta"):
        model = RecConfig().build(pretrained=False)
    assert model.num_parameters() == 144_968_836
    assert model.num_parameters(trainable_only=True) == 25_948_420


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_builds(path: Path, ids_without_network: None) -> None:
    config = load_config(path)
    with torch.device("meta"):
        model = config.model.build(pretrained=False)
    assert model.num_parameters(trainable_only=True) > 0


@pytest.mark.parametrize("head", HEADS)
def test_family_contract(head: str) -> None:
    """A finite loss, a gradient for every trainable parameter, and predictions inside the image, best first."""
    torch.manual_seed(0)
    model = tiny(head).build()
    batch = batch_for(model)
    output = model(batch)
    loss = sum(model.loss(output, batch).values())
    assert loss.isfinite()
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    for prediction, target in zip(model.eval().predict(model(batch), batch), batch.targets, strict=True):
        assert prediction.id == target.id
        boxes, (height, width) = prediction.boxes, target.size
        assert (boxes >= 0).all()
        assert (boxes[:, 0::2] <= width).all()
        assert (boxes[:, 1::2] <= height).all()
        assert (prediction.scores[:-1] >= prediction.scores[1:]).all()
        assert prediction.phrase_ids.shape == prediction.scores.shape


@pytest.mark.parametrize(
    ("architecture", "prefix"),
    [(TINY_VISION, 5), (TINY_CONVNEXT, 1), (TINY_RESNET, 0)],
    ids=["vit", "convnext", "resnet"],
)
def test_vision_encoders_return_a_grid(architecture: dict, prefix: int) -> None:
    encoder = VisionEncoder(VisionEncoderConfig(architecture=architecture), pretrained=True)
    tokens, grid = encoder(torch.zeros(2, 3, 64, 96))
    stride = 16 if architecture is TINY_VISION else 8
    assert grid == (64 // stride, 96 // stride)
    assert tokens.shape == (2, prefix + grid[0] * grid[1], 32)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_of_text_has_no_effect(implementation: str) -> None:
    config = RecConfig.tiny()
    architecture = config.text.architecture | {"attn_implementation": implementation}
    model = replace(config, text=replace(config.text, architecture=architecture)).build(pretrained=False).eval()
    ids = torch.tensor([[101, 103, 104, 102], [101, 102, 0, 0]])
    with torch.no_grad():
        padded = model.encode_text(Text(ids, ids > 0, ids > 0, torch.arange(2)))[0][1, :2]
        alone = model.encode_text(Text(ids[1:, :2], ids[1:, :2] > 0, ids[1:, :2] > 0, torch.arange(1)))[0][0]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-6)


def test_a_frozen_encoder_is_not_trained() -> None:
    config = tiny()
    config.vision.frozen = True
    model = config.build().train()
    assert not model.vision.training
    assert not model.vision.network.training
    assert model.text.training
    batch = batch_for(model)
    sum(model.loss(model(batch), batch).values()).backward()
    assert all(p.grad is None and not p.requires_grad for p in model.vision.parameters())
    assert any(key.startswith("vision.") for key in model.own_state_dict())  # random weights must be saved


def pretrained_folders(path: Path) -> tuple[str, str]:
    vision, text = path / "vision", path / "text"
    AutoModel.from_config(AutoConfig.for_model(**TINY_VISION)).save_pretrained(vision)
    AutoModel.from_config(AutoConfig.for_model(**TEXT)).save_pretrained(text)
    BertTokenizer(vocab=str(SMALL_VOCABULARY)).save_pretrained(text)
    return str(vision), str(text)


def test_encoders_from_folders(tmp_path: Path) -> None:
    """As Hub ids: weights and tokenizer are read, and weights of frozen encoders are not saved."""
    vision, text = pretrained_folders(tmp_path)
    config = RecConfig(
        image_size=64, vision=VisionEncoderConfig(id=vision), text=BgeConfig(id=text), head=HEADS["dense"]
    )
    model, again = config.build(), config.build()
    assert model.external == ("vision", "text")
    assert all(key.startswith("head.") for key in model.own_state_dict())
    assert torch.equal(
        model.vision.network.state_dict()["norm.weight"], again.vision.network.state_dict()["norm.weight"]
    )
    again.load_own_state_dict(model.own_state_dict())
    batch = batch_for(model)
    for mine, other in zip(model.eval()(batch), again.eval()(batch), strict=True):
        assert torch.equal(mine, other)


def pretrained_config(folder: Path) -> RecConfig:
    vision, text = pretrained_folders(folder)
    return RecConfig(image_size=64, vision=VisionEncoderConfig(id=vision), text=BgeConfig(id=text), head=HEADS["dense"])


def test_frozen_pretrained_encoders_are_loaded_at_first_use(tmp_path: Path) -> None:
    model = pretrained_config(tmp_path).build().train()
    assert [encoder.is_loaded for encoder in (model.vision, model.text)] == [False, False]
    assert all(name.startswith("head.") for name, _ in model.named_parameters())
    sizes = model.num_parameters(), model.num_parameters(trainable_only=True)
    batch = batch_for(model)
    state = torch.get_rng_state()
    with torch.inference_mode():
        model.encode(batch)
    assert torch.get_rng_state().equal(state), "a resumed run loads them at another step"
    assert [encoder.is_loaded for encoder in (model.vision, model.text)] == [True, True]
    assert (model.num_parameters(), model.num_parameters(trainable_only=True)) == sizes
    encoder_weights = [*model.vision.parameters(), *model.text.parameters()]
    assert not any(p.is_inference() or p.requires_grad for p in encoder_weights)
    assert not any(encoder.network.training for encoder in (model.vision, model.text))
    assert sizes[0] == sizes[1] + sum(p.numel() for p in encoder_weights)
    sum(model.loss(model(batch), batch).values()).backward()
    assert all(p.grad is not None for p in model.head.parameters())


def test_encoders_are_loaded_to_the_device_and_dtype_of_the_model(tmp_path: Path) -> None:
    model = pretrained_config(tmp_path).build().to(torch.float64)
    assert model.vision.network.state_dict()["norm.weight"].dtype == torch.float64
    assert model.state_dict().keys() > model.own_state_dict().keys()
    moved = pretrained_config(tmp_path).build().to("meta")
    assert moved.vision.network.device.type == "meta"


def test_a_missing_encoder_is_an_error_at_construction(tmp_path: Path) -> None:
    config = pretrained_config(tmp_path)
    config.vision.id = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"nowhere \(model\.vision\.id\) does not exist"):
        config.build()


def test_a_trained_encoder_is_saved(tmp_path: Path) -> None:
    vision, text = pretrained_folders(tmp_path)
    config = RecConfig(
        image_size=64,
        vision=VisionEncoderConfig(id=vision, frozen=False),
        text=BgeConfig(id=text),
        head=HEADS["dense"],
    )
    assert any(key.startswith("vision.") for key in config.build().own_state_dict())


def test_all_weights_that_do_not_fit_are_listed() -> None:
    model = tiny().build()
    weights = model.own_state_dict()
    weights["extra"] = torch.zeros(3)
    weights["head.norm.weight"] = torch.zeros(7)
    del weights["head.norm.bias"]
    with pytest.raises(
        ValueError, match=r"missing: head\.norm\.bias.*\n.*shape: head\.norm\.weight is \(7,\).*\n.*unexpected: extra"
    ):
        model.load_own_state_dict(weights)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"id": None}, "give `id`"),
        ({"id": "mine", "architecture": TINY_VISION}, "not both"),
        ({"architecture": {"hidden_size": 8}}, "model_type"),
    ],
)
def test_contradictory_encoder_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionEncoderConfig(**settings)


def test_an_expression_without_a_box_is_an_error() -> None:
    """gRefCOCO has such expressions."""
    model = RecConfig(
        vision=VisionEncoderConfig(architecture=TINY_VISION), text=BgeConfig(architecture=TEXT), image_size=32
    ).build()
    samples = [ShapesConfig(split="val").build().load(index, 0) for index in range(2)]
    batch = Collator(model.image_spec, model.text_spec)(samples)
    batch.targets[1] = replace(batch.targets[1], boxes=torch.zeros(0, 4), phrase_ids=torch.zeros(0, dtype=torch.long))
    with pytest.raises(ConfigError, match="shapes/val/000001/0 has 0 boxes, but rec trains on expressions with one"):
        model.loss(model(batch), batch)


def test_a_prediction_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    model = tiny().build().eval()
    batch = batch_for(model, 6)
    source = ShapesConfig(split="test", image_size=64).build()
    alone = Collator(model.image_spec, model.text_spec)([source.load(3, 0)])
    first = model.predict(model(batch), batch)[3]
    second = model.predict(model(alone), alone)[0]
    np.testing.assert_allclose(first.boxes.detach(), second.boxes.detach(), atol=1e-3)
    np.testing.assert_allclose(first.scores.detach(), second.scores.detach(), atol=1e-5)


def test_max_tokens_above_the_positions_of_the_text_encoder() -> None:
    config = RecConfig.tiny()
    config.max_tokens = 100
    with pytest.raises(ConfigError, match=r"model.max_tokens=100, but the text encoder has 64 positions; set .*=64 or"):
        config.build(pretrained=False)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("image_size=0", r"model\.image_size: .*greater than 0"),
        ("image_size=-224", r"model\.image_size: .*greater than 0"),
        ("max_tokens=0", r"model\.max_tokens: .*greater than 0"),
        ("head.width=0", r"model\.head\.width: .*greater than 0"),
        ("head.layers=-1", r"model\.head\.layers: .*greater than 0"),
        ("head.heads=0", r"model\.head\.heads: .*greater than 0"),
        ("head.feedforward=0", r"model\.head\.feedforward: .*greater than 0"),
        ("head.dropout=-0.1", r"model\.head\.dropout: .*greater than or equal to 0"),
        ("head.dropout=1", r"model\.head\.dropout: .*less than 1"),
        ("head.loss.diou=-1", r"model\.head\.loss\.diou: .*greater than or equal to 0"),
        ("head.loss.l1=.inf", r"model\.head\.loss\.l1: .*finite"),
        ("head.loss.giou=.nan", r"model\.head\.loss\.giou: "),
    ],
)
@pytest.mark.parametrize("head", HEADS)
def test_impossible_settings_are_refused_by_name(tmp_path: Path, head: str, override: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{name: rec, head: {head}}}\ndata: {{train: {{name: shapes}}, eval: {{name: shapes}}}}\n")
    load_config(path)
    with pytest.raises(ConfigError, match=message):
        load_config(path, [f"model.{override}"])


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"name": "dense", "num_boxes": 0}, r"model\.head\.num_boxes: .*greater than 0"),
        ({"name": "dense", "loss": {"token": -1}}, r"model\.head\.loss\.token: .*greater than or equal to 0"),
        ({"name": "dense", "loss": {"token": 0}}, r"model\.head\.loss: .*token must be positive: .*no gradient"),
        ({"name": "dense", "loss": {"l1": 0, "giou": 0}}, r"model\.head\.loss: .*give one of diou, l1, giou a"),
        ({"name": "pooled", "loss": {"diou": 0}}, r"model\.head\.loss: .*give one of diou, l1, giou a positive"),
        ({"name": "pooled", "width": 36, "heads": 8}, r"model\.head.*: .*width \(36\) must be a multiple of heads"),
    ],
)
def test_impossible_heads_are_refused_by_name(head: dict, message: str) -> None:
    data = {"train": {"name": "shapes"}, "eval": {"name": "shapes"}}
    with pytest.raises(ConfigError, match=message):
        parse_config({"model": {"name": "rec", "head": head}, "data": data})


def test_a_run_starts_from_the_weights_of_another(tmp_path: Path) -> None:
    config = RecConfig.tiny()
    trained = config.build()
    write_model(tmp_path, trained, ModelOnlyConfig(config))
    started = replace(config, weights=str(tmp_path)).build()
    for name, tensor in started.own_state_dict().items():
        assert tensor.equal(trained.own_state_dict()[name]), name
    assert replace(config, weights="gone").rebuild().num_parameters() == trained.num_parameters()
    with pytest.raises(CheckpointError, match=r"(?s)model\.weights: .*missing: head\."):
        replace(config, weights=str(tmp_path), head=PooledHeadConfig(width=32, layers=1, heads=2)).build()
    with pytest.raises(CheckpointError, match=r"gone.*does not exist"):
        replace(config, weights="gone").build()


def test_weights_of_another_meaning_are_refused(tmp_path: Path) -> None:
    """The shapes of the weights depend neither on the number of heads nor on which layers of the encoder are read."""
    config = RecConfig.tiny()
    config.vision = VisionEncoderConfig(architecture=TINY_VISION | {"num_hidden_layers": 2}, frozen=True)
    write_model(tmp_path, config.build(), ModelOnlyConfig(config))
    assert isinstance(config.head, DenseHeadConfig)
    config = replace(config, weights=str(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"config\.yaml has other settings.*: model\.head\.heads=2 there, 4 here$"
    ):
        replace(config, head=replace(config.head, heads=4)).build()
    replace(config, vision=replace(config.vision, layers=[2])).build()
    with pytest.raises(CheckpointError, match=r"model\.vision\.layers=\[2\] there, \[1\] here"):
        replace(config, vision=replace(config.vision, layers=[1])).build()
    (tmp_path / "config.yaml").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.yaml is not the configuration of a rec"):
        config.build()
