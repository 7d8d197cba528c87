"""Masks by a tiny random SAM and SAM 2."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Sam2Config, Sam2Model, SamConfig, SamModel

import vg
from tests.inference.bright import Bright
from vg.errors import ConfigError
from vg.inference.masks import Segmenter

DECODER = {"hidden_size": 32, "num_attention_heads": 2, "mlp_dim": 32, "iou_head_hidden_dim": 32}


@pytest.fixture(scope="module", params=["sam", "sam2"])
def sam(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    if request.param == "sam":
        vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64}
        vision |= {
            "patch_size": 16,
            "output_channels": 32,
            "mlp_dim": 16,
            "global_attn_indexes": [0],
            "window_size": 2,
            "num_pos_feats": 16,
        }
        prompt = {"hidden_size": 32, "image_size": 64, "patch_size": 16, "image_embedding_size": 4}
        network = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=DECODER))
    else:
        stages = {"embed_dim_per_stage": [8, 16, 32, 64], "blocks_per_stage": [1, 1, 2, 1]}
        backbone = {"model_type": "sam2_hiera_det_model", "hidden_size": 8, "image_size": [64, 64], **stages}
        backbone |= {"num_attention_heads": 1, "num_attention_heads_per_stage": [1, 1, 2, 2]}
        backbone |= {"window_size_per_stage": [8, 4, 8, 4], "global_attention_blocks": [3]}
        backbone |= {"window_positional_embedding_background_size": [2, 2]}
        vision = {"backbone_config": backbone, "backbone_channel_list": [64, 32, 16, 8], "fpn_hidden_size": 32}
        vision |= {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}
        prompt = {"hidden_size": 32, "image_size": 64, "patch_size": 16}
        network = Sam2Model(Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=DECODER))
    network.save_pretrained(folder)
    return str(folder)


def test_every_box_gets_a_mask(sam: str) -> None:
    image = np.zeros((90, 120, 3), np.uint8)
    image[10:40, 20:60] = image[50:80, 70:110] = 255
    grounder = vg.Grounder(Bright(), device="cpu")
    result = grounder(image, "square", masks=sam)
    assert len(result) == 2
    assert result.masks is not None
    assert result.masks.shape == (2, 90, 120)
    assert result.masks.dtype == bool
    assert result.select(np.array([1])).masks is not None
    record = result.to_dict()
    assert record["boxes"][0]["mask"]["size"] == [90, 120]
    assert result.draw().shape == image.shape
    assert grounder(np.zeros((9, 9, 3), np.uint8), "square", masks=sam).masks.shape == (0, 9, 9)


def test_masks_depend_on_their_box_only(sam: str) -> None:
    """Also in several passes of the decoder."""
    segment, random = Segmenter(sam), np.random.default_rng(0)
    image = random.integers(0, 255, (50, 70, 3), np.uint8)
    corners = random.integers(0, 30, (70, 2))
    boxes = np.concatenate((corners, corners + 15), axis=1).astype(np.float32)
    together = segment(image, boxes)
    assert np.mean(together[[0, 69]] != segment(image, boxes[[0, 69]])) < 1e-3


def test_masks_without_torch_are_an_error_before_images_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    grounder = vg.Grounder(Bright(), device="cpu")
    monkeypatch.delitem(sys.modules, "vg.inference.masks")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError, match="masks need torch: pip install torch"):
        grounder.stream("nowhere.png", "square", masks=True)


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere \(masks\) does not exist"):
        Segmenter(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="is of the type bert; choose a SAM or SAM 2 model"):
        Segmenter(str(tmp_path))
