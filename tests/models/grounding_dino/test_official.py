"""Every intermediate value of the official implementation, from the pyramid to the boxes, for all weight files."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.models.grounding_dino.golden import FOLDER, INPUTS, golden_case, golden_model, needs_golden
from vg.models.grounding_dino.attention import inverse_sigmoid
from vg.models.grounding_dino.backbone import ImageFeatures, Neck
from vg.models.grounding_dino.model import GroundingDino
from vg.models.grounding_dino.query_selection import box_proposals
from vg.models.grounding_dino.text_encoder import sub_sentence_masks
from vg.models.layers import sine_encoding

pytestmark = needs_golden
FEATURES, LOGITS, BOXES = 5e-5, 2e-4, 1e-5  # largest differences, as the recording suggests


@pytest.fixture(scope="module", params=["official_tiny.pth", "official_tiny_module_prefix.pth", "mmdet_tiny.pth"])
def model(request: pytest.FixtureRequest) -> GroundingDino:
    return golden_model(request.param)


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape
    finite = wanted.isfinite()
    assert torch.equal(found.isfinite(), finite)
    assert (found - wanted)[finite].abs().max() <= tolerance


@pytest.mark.parametrize("name", INPUTS)
@torch.no_grad()
def test_every_intermediate(model: GroundingDino, name: str) -> None:
    batch, wanted, of_image = golden_case(name)

    image = model.encode_image(batch)
    inside = torch.ones(image.tokens.shape[:2], dtype=torch.bool) if image.mask is None else image.mask
    close(image.valid_ratios, of_image["valid_ratios"], 0)
    for level, (of_level, rows) in enumerate(zip(image.shapes, level_slices(image), strict=True)):
        assert of_level == tuple(of_image["spatial_shapes"][level].tolist())
        assert torch.equal(~inside[:, rows], of_image[f"level_mask.{level}"].bool().flatten(1))
        close(image.tokens[:, rows], of_image[f"proj_src.{level}"].flatten(2).mT, FEATURES)
        real = inside[:, rows].unsqueeze(-1)  # what stands at padding reaches nothing
        encoding = image.positions[:, rows] - model.neck.level_encoding[level]
        close(encoding * real, of_image[f"image_pe.{level}"].flatten(2).mT * real, FEATURES)

    text = model.encode_text(batch.text)
    assert torch.equal(text.sub_sentences, wanted["text_self_attention_mask"].bool())
    assert torch.equal(sub_sentence_masks(batch.text.token_ids, (101, 102, 1012, 1029))[1], wanted["position_ids"])
    close(text.tokens, wanted["text_feat"], FEATURES)

    image, text = model.encoder(image, text)
    if "encoder_memory" in wanted:
        close(image.tokens * inside.unsqueeze(-1), wanted["encoder_memory"] * inside.unsqueeze(-1), FEATURES)
    close(text.tokens, wanted["encoder_memory_text"], FEATURES)

    queries = model.queries(image, text)
    close(queries.logits, wanted["interm_pred_logits"], LOGITS)
    close(queries.boxes, wanted["enc_selected_boxes"], BOXES)
    close(queries.references.sigmoid(), wanted["reference.0"], BOXES)
    of_tokens = model.queries.class_head(model.queries.memory_norm(model.queries.memory_projection(image.tokens)), text)
    chosen = wanted["enc_topk_indices"].unsqueeze(-1)
    close(of_tokens.take_along_dim(chosen, dim=1), queries.logits, 0)  # the same tokens, in the same order

    model.decoder.train()  # which makes it answer after every layer; there is no dropout
    logits, boxes, hidden = model.decoder(queries.content, queries.references, image, text)
    model.decoder.eval()
    close(logits, wanted["pred_logits"], LOGITS)
    close(boxes, wanted["pred_boxes"], BOXES)
    close(hidden, wanted["hs.2"], FEATURES)

    output = model(batch)  # the whole, which answers after the last layer only
    close(output.logits, wanted["pred_logits"][-1:], LOGITS)
    close(output.boxes, wanted["pred_boxes"][-1:], BOXES)


@pytest.mark.parametrize("name", ["a", "c_fixedmask"])
@torch.no_grad()
def test_every_step_within_the_layers(name: str) -> None:
    model = golden_model()
    batch, wanted, _ = golden_case(name)
    found: dict[str, Tensor] = {}

    def record(key: str, part: int | None = None):
        def hook(module: object, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            found[key] = output if part is None else output[part]

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
    close(text.positions, wanted["text_pe"], FEATURES)
    compared = [key for key in found if key in wanted]
    assert len(compared) > 15
    for key in compared:
        close(found[key], wanted[key], FEATURES)


def test_masks_of_odd_captions() -> None:
    for case in json.loads((FOLDER / "text_masks.json").read_text())["cases"]:
        blocks, positions = sub_sentence_masks(torch.tensor(case["input_ids"]), (101, 102, 1012, 1029))
        if "self_attention_mask" not in case:  # no phrase is closed: the official code fails, ours sees single tokens
            assert torch.equal(blocks[0], torch.eye(blocks.shape[1], dtype=torch.bool))
            continue
        assert blocks.int().tolist() == case["self_attention_mask"]
        assert positions.tolist() == case["position_ids"]


def test_encodings_and_proposals_at_full_width() -> None:
    helpers = load_file(FOLDER / "helpers.safetensors")
    close(inverse_sigmoid(helpers["inverse_sigmoid_x"], 1e-3), helpers["inverse_sigmoid_y"], 1e-6)
    places = helpers["text_pe_position_ids"].unsqueeze(-1)
    close(sine_encoding(places, 256, 10000.0, interleaved=True), helpers["text_pe_d256"], 1e-5)
    boxes = helpers["decoder_sine_boxes"][..., (1, 0, 2, 3)]
    close(sine_encoding(boxes, 512, 10000.0, interleaved=True), helpers["decoder_sine_d256"], 1e-5)

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
    close(box_proposals(image), helpers["proposal_out_logits"], 1e-5)

    mask = ~helpers["image_pe_mask"].bool()  # [B, 5, 7]
    image = neck.flatten([levels[0], levels[1]], [[(int(m[:, 0].sum()), int(m[0].sum())), (1, 1)] for m in mask])
    found = image.positions[:, :35].mT.unflatten(2, (5, 7)) * mask.unsqueeze(1)
    close(found, helpers["image_pe_d256"] * mask.unsqueeze(1), 1e-5)


def level_slices(image: ImageFeatures) -> list[slice]:
    ends = [0]
    for rows, columns in image.shapes:
        ends.append(ends[-1] + rows * columns)
    return [slice(*pair) for pair in pairwise(ends)]
