"""The rec family: the published sizes, encoders from ids, folders and settings, frozen and trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, BertTokenizer

from tests.conftest import TEXT
from vg.config import load_config
from vg.data.collate import Collator
from vg.data.synthetic.shapes import ShapesConfig
from vg.errors import ConfigError
from vg.models.encoders import SMALL_VOCABULARY
from vg.models.rec.config import BgeConfig, DenseHeadConfig, PooledHeadConfig, RecConfig, VisionEncoderConfig
from vg.models.rec.encoders import VisionEncoder

CONFIGS = sorted((Path(__file__).parents[3] / "configs").rglob("*.yaml"))

PUBLISHED = {  # the architecture behind each id that our configurations name
    "facebook/dinov3-vitb16-pretrain-lvd1689m": {
        "model_type": "dinov3_vit",
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "num_register_tokens": 4,
    },
    "BAAI/bge-small-en-v1.5": {
        "model_type": "bert",
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "facebook/dinov3-vitl16-pretrain-lvd1689m": {
        "model_type": "dinov3_vit",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "num_register_tokens": 4,
    },
    "BAAI/bge-base-en-v1.5": {
        "model_type": "bert",
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
}
TINY_VISION = {
    "model_type": "dinov3_vit",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "patch_size": 16,
    "num_register_tokens": 4,
}
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
    """A finite loss, a gradient for every trainable parameter, and predictions inside the picture, best first."""
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
def test_vision_encoders_give_a_grid(architecture: dict, prefix: int) -> None:
    encoder = VisionEncoder(VisionEncoderConfig(architecture=architecture), pretrained=True)
    tokens, grid = encoder(torch.zeros(2, 3, 64, 96))
    stride = 16 if architecture is TINY_VISION else 8
    assert grid == (64 // stride, 96 // stride)
    assert tokens.shape == (2, prefix + grid[0] * grid[1], 32)


def test_frozen_encoder_stays_as_it_is() -> None:
    config = tiny()
    config.vision.frozen = True
    model = config.build().train()
    assert not model.vision.training
    assert not model.vision.network.training
    assert model.text.training
    batch = batch_for(model)
    sum(model.loss(model(batch), batch).values()).backward()
    assert all(p.grad is None and not p.requires_grad for p in model.vision.parameters())
    assert any(key.startswith("vision.") for key in model.own_state_dict())  # random: it has to be saved


def pretrained_folders(path: Path) -> tuple[str, str]:
    vision, text = path / "vision", path / "text"
    AutoModel.from_config(AutoConfig.for_model(**TINY_VISION)).save_pretrained(vision)
    AutoModel.from_config(AutoConfig.for_model(**TEXT)).save_pretrained(text)
    BertTokenizer(vocab=str(SMALL_VOCABULARY)).save_pretrained(text)
    return str(vision), str(text)


def test_encoders_from_folders(tmp_path: Path) -> None:
    """The path that Hub ids take: weights and tokenizer are read, and frozen ones are not saved again."""
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


def test_a_trained_encoder_is_saved(tmp_path: Path) -> None:
    vision, text = pretrained_folders(tmp_path)
    config = RecConfig(
        image_size=64,
        vision=VisionEncoderConfig(id=vision, frozen=False),
        text=BgeConfig(id=text),
        head=HEADS["dense"],
    )
    assert any(key.startswith("vision.") for key in config.build().own_state_dict())


def test_weights_that_do_not_fit_are_all_named() -> None:
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
def test_encoder_settings_that_contradict(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionEncoderConfig(**settings)


def test_an_expression_without_a_box_teaches_nothing() -> None:
    """As gRefCOCO has them."""
    model = RecConfig(
        vision=VisionEncoderConfig(architecture=TINY_VISION), text=BgeConfig(architecture=TEXT), image_size=32
    ).build()
    samples = [ShapesConfig(split="val").build().load(index, 0) for index in range(2)]
    batch = Collator(model.image_spec, model.text_spec)(samples)
    batch.targets[1] = replace(batch.targets[1], boxes=torch.zeros(0, 4), phrase_ids=torch.zeros(0, dtype=torch.long))
    with pytest.raises(ConfigError, match="shapes/val/000001/0 has 0 boxes, rec learns from expressions with one"):
        model.loss(model(batch), batch)


def test_a_prediction_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    model = tiny().build().eval()
    together = batch_for(model, 6)
    source = ShapesConfig(split="test", image_size=64).build()
    alone = Collator(model.image_spec, model.text_spec)([source.load(3, 0)])
    first = model.predict(model(together), together)[3]
    second = model.predict(model(alone), alone)[0]
    np.testing.assert_allclose(first.boxes.detach(), second.boxes.detach(), atol=1e-3)
    np.testing.assert_allclose(first.scores.detach(), second.scores.detach(), atol=1e-5)
