"""The network gives every recorded intermediate value of the official implementation, for every weight file."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.golden.files import recorded_json, recorded_tensors
from tests.models.grounding_dino.golden import DRAWN, INPUTS, golden_case, golden_model
from vg.models.grounding_dino.attention import inverse_sigmoid
from vg.models.grounding_dino.backbone import ImageFeatures, Neck
from vg.models.grounding_dino.model import GroundingDino
from vg.models.grounding_dino.query_selection import box_proposals
from vg.models.grounding_dino.text_encoder import sub_sentence_masks
from vg.models.layers import sine_encoding

FEATURES, LOGITS, BOXES = 5e-5, 2e-4, 1e-5  # tolerances that the recording suggests
FILES = [DRAWN, "official_tiny.pth", "official_tiny_module_prefix.pth", "mmdet_tiny.pth"]


@pytest.fixture(scope="module", params=FILES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GroundingDino:
    return golden_model(tmp_path_factory.mktemp("weights"), request.param)


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(found.isfinite(), finite)
    assert (found - expected)[finite].abs().max() <= tolerance


@pytest.mark.parametrize("name", INPUTS)
@torch.no_grad()
def test_outputs_of_every_module_equal_the_recorded_ones(model: GroundingDino, name: str) -> None:
    batch, expected, expected_image = golden_case(name)

    image = model.encode_image(batch)
    inside = torch.ones(image.tokens.shape[:2], dtype=torch.bool) if image.mask is None else image.mask
    assert_close(image.valid_ratios, expected_image["valid_ratios"], 0)
    for level, (shape, rows) in enumerate(zip(image.shapes, level_slices(image), strict=True)):
        assert shape == tuple(expected_image["spatial_shapes"][level].tolist())
        assert torch.equal(~inside[:, rows], expected_image[f"level_mask.{level}"].bool().flatten(1))
        assert_close(image.tokens[:, rows], expected_image[f"proj_src.{level}"].flatten(2).mT, FEATURES)
        real = inside[:, rows].unsqueeze(-1)  # the values at padded pixels are never used
        encoding = image.positions[:, rows] - model.neck.level_encoding[level]
        assert_close(encoding * real, expected_image[f"image_pe.{level}"].flatten(2).mT * real, FEATURES)

    text = model.encode_text(batch.text)
    assert torch.equal(text.sub_sentences, expected["text_self_attention_mask"].bool())
    assert torch.equal(sub_sentence_masks(batch.text.token_ids, (101, 102, 1012, 1029))[1], expected["position_ids"])
    assert_close(text.tokens, expected["text_feat"], FEATURES)

    image, text = model.encoder(image, text)
    if "encoder_memory" in expected:
        assert_close(image.tokens * inside.unsqueeze(-1), expected["encoder_memory"] * inside.unsqueeze(-1), FEATURES)
    assert_close(text.tokens, expected["encoder_memory_text"], FEATURES)

    queries = model.queries(image, text)
    assert_close(queries.logits, expected["interm_pred_logits"], LOGITS)
    assert_close(queries.boxes, expected["enc_selected_boxes"], BOXES)
    assert_close(queries.reference_logits.sigmoid(), expected["reference.0"], BOXES)
    token_logits = model.queries.class_head(
        model.queries.memory_norm(model.queries.memory_projection(image.tokens)), text
    )
    selected = expected["enc_topk_indices"].unsqueeze(-1)
    assert_close(token_logits.take_along_dim(selected, dim=1), queries.logits, 0)  # the same tokens, in the same order

    model.decoder.train()  # returns the outputs of all layers; dropout is 0
    logits, boxes, hidden = model.decoder(queries.content, queries.reference_logits, image, text)
    model.decoder.eval()
    assert_close(logits, expected["pred_logits"], LOGITS)
    assert_close(boxes, expected["pred_boxes"], BOXES)
    assert_close(hidden, expected["hs.2"], FEATURES)

    output = model(batch)  # the whole network, which returns the outputs of the last layer only
    assert_close(output.logits, expected["pred_logits"][-1:], LOGITS)
    assert_close(output.boxes, expected["pred_boxes"][-1:], BOXES)


@pytest.mark.parametrize("name", ["a", "c_fixedmask"])
@torch.no_grad()
def test_every_step_within_the_layers(name: str, tmp_path: Path) -> None:
    model = golden_model(tmp_path)
    batch, expected, _ = golden_case(name)
    found: dict[str, Tensor] = {}

    def record(key: str, index: int | None = None):
        def hook(module: object, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            found[key] = output if index is None else output[index]

        return hook

    for i, layer in enumerate(model.encoder.layers):
        layer.fusion.register_forward_hook(record(f"enc.{i}.fusion_image", 0))
        layer.fusion.register_forward_hook(record(f"enc.{i}.fusion_text", 1))
        layer.text.register_forward_hook(record(f"enc.{i}.text_layer"))
        layer.image.attention.register_forward_hook(record(f"enc.{i}.msda_out"))
        layer.image.register_forward_hook(record(f"enc.{i}.deform_layer"))
    for i, layer in enumerate(model.decoder.layers):
        layer.self_norm.register_forward_hook(record(f"dec.{i}.after_self_attn"))
        layer.text_norm.register_forward_hook(record(f"dec.{i}.after_text_attn"))
        layer.image_norm.register_forward_hook(record(f"dec.{i}.after_deform_attn"))
        layer.register_forward_hook(record(f"dec.{i}.out_unnormed"))
    model.decoder.query_position.register_forward_hook(record("dec.2.query_pos"))  # of the last layer
    model(batch)
    text = model.encode_text(batch.text)
    assert_close(text.positions, expected["text_pe"], FEATURES)
    compared = [key for key in found if key in expected]
    assert len(compared) > 15
    for key in compared:
        assert_close(found[key], expected[key], FEATURES)


def test_text_masks_of_unusual_captions() -> None:
    for case in recorded_json("text_masks.json")["cases"]:
        blocks, positions = sub_sentence_masks(torch.tensor(case["input_ids"]), (101, 102, 1012, 1029))
        if "self_attention_mask" not in case:  # no closed phrase: the official code raises
            assert torch.equal(blocks[0], torch.eye(blocks.shape[1], dtype=torch.bool))
            continue
        assert blocks.int().tolist() == case["self_attention_mask"]
        assert positions.tolist() == case["position_ids"]


def test_encodings_and_proposals_at_full_width() -> None:
    helpers = recorded_tensors("helpers")
    assert_close(inverse_sigmoid(helpers["inverse_sigmoid_x"], 1e-3), helpers["inverse_sigmoid_y"], 1e-6)
    positions = helpers["text_pe_position_ids"].unsqueeze(-1)
    assert_close(sine_encoding(positions, 256, 10000.0, interleaved=True), helpers["text_pe_d256"], 1e-5)
    boxes = helpers["decoder_sine_boxes"][..., (1, 0, 2, 3)]
    assert_close(sine_encoding(boxes, 512, 10000.0, interleaved=True), helpers["decoder_sine_d256"], 1e-5)

    shapes = tuple(map(tuple, helpers["proposal_shapes_hw"].tolist()))
    neck = Neck([8], 256, 2, temperature=20.0)
    torch.nn.init.zeros_(neck.level_encoding)
    padding = [
        mask.unflatten(1, shape)
        for mask, shape in zip(helpers["proposal_mask"].bool().split([35, 10], 1), shapes, strict=True)
    ]
    inside = [
        [(int((~mask[i])[:, 0].sum()), int((~mask[i])[0].sum())) for mask in padding] for i in range(len(padding[0]))
    ]
    levels = [torch.zeros(len(inside), 256, *shape) for shape in shapes]
    image = neck.flatten(levels, inside)
    assert_close(box_proposals(image), helpers["proposal_out_logits"], 1e-5)

    mask = ~helpers["image_pe_mask"].bool()  # [B, 5, 7]
    image = neck.flatten([levels[0], levels[1]], [[(int(m[:, 0].sum()), int(m[0].sum())), (1, 1)] for m in mask])
    found = image.positions[:, :35].mT.unflatten(2, (5, 7)) * mask.unsqueeze(1)
    assert_close(found, helpers["image_pe_d256"] * mask.unsqueeze(1), 1e-5)


def level_slices(image: ImageFeatures) -> list[slice]:
    ends = [0]
    for rows, columns in image.shapes:
        ends.append(ends[-1] + rows * columns)
    return [slice(*pair) for pair in pairwise(ends)]
