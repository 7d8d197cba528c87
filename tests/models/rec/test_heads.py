"""The two heads of the rec family: shapes, gradients, padding, positive tokens, losses and ranking of the boxes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vg import boxes as box_ops
from vg.models.rec.config import DenseHeadConfig, DenseLossConfig, HeadConfig, PooledHeadConfig, PooledLossConfig
from vg.models.rec.heads import DenseHead, DenseOutput, PooledHead, PooledOutput
from vg.models.rec.layers import rotary_encoding, token_centers
from vg.types import Features

GRID = (3, 4)
VISION_WIDTH, TEXT_WIDTH, PREFIX = 24, 16, 5
SIZES = {"width": 32, "layers": 2, "heads": 2, "feedforward": 48, "dropout": 0.0}
HEADS = {
    "pooled": PooledHeadConfig(**SIZES, loss=PooledLossConfig(diou=1, l1=5, giou=2)),
    "dense": DenseHeadConfig(**SIZES, loss=DenseLossConfig(diou=1)),
}
heads = pytest.mark.parametrize("config", HEADS.values(), ids=HEADS)


def build(config: HeadConfig) -> PooledHead | DenseHead:
    torch.manual_seed(0)
    return config.build(VISION_WIDTH, TEXT_WIDTH)


def tokens(samples: int = 4, words: int = 6) -> Features:
    """Return the input of a head; the first sample has all words, every further one a word less."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(samples, PREFIX + GRID[0] * GRID[1], VISION_WIDTH, generator=generator)
    text = torch.randn(samples, words, TEXT_WIDTH, generator=generator)
    return Features(image, GRID, text, torch.arange(words) < words - torch.arange(samples)[:, None])


def some_boxes(samples: int = 4) -> tuple[Tensor, Tensor]:
    """Return one box for each expression, [R, 1, 4], and its mask."""
    generator = torch.Generator().manual_seed(2)
    return torch.rand(samples, 1, 4, generator=generator) * 0.4 + 0.3, torch.ones(samples, 1, dtype=torch.bool)


def rows_of(features: Features, rows: slice) -> Features:
    return features._replace(image=features.image[rows], text=features.text[rows], text_mask=features.text_mask[rows])


@heads
def test_shapes(config: HeadConfig) -> None:
    head = build(config)
    output = head(tokens())
    boxes, scores = head.select_boxes(output)
    if config.name == "pooled":
        assert output.boxes.shape == (4, 4)
        assert boxes.shape == (4, 1, 4)
        assert (scores == 1).all()
    else:
        assert output.logits.shape == (4, 12)
        assert output.boxes.shape == (4, 12, 4)
        assert output.centers.shape == (12, 2)
        assert boxes.shape == (4, config.num_boxes, 4)
    assert scores.shape == boxes.shape[:2]
    assert all(value.dtype == torch.float32 for value in (*output, boxes, scores))


@heads
def test_every_parameter_has_a_gradient(config: HeadConfig) -> None:
    head = build(config)
    losses = head.loss(head(tokens()), *some_boxes())
    assert set(losses) == {"diou", "l1", "giou"} | ({"token"} if config.name == "dense" else set())
    sum(losses.values()).backward()
    assert [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []


@heads
def test_text_padding_has_no_effect(config: HeadConfig) -> None:
    head = build(config).eval()
    features = tokens()
    text, mask = torch.as_tensor(features.text), features.text_mask
    padding = torch.full((4, 3, TEXT_WIDTH), 9.0), mask.new_zeros(4, 3)
    longer = features._replace(
        text=torch.cat((text, padding[0]), dim=1), text_mask=torch.cat((mask, padding[1]), dim=1)
    )
    filled = features._replace(text=text.masked_fill(~mask.unsqueeze(-1), 7.0))
    for plain, padded, other in zip(head(features), head(longer), head(filled), strict=True):
        torch.testing.assert_close(padded, plain)
        torch.testing.assert_close(other, plain)


@heads
def test_loss_is_the_mean_over_samples(config: HeadConfig) -> None:
    """Two processes with half of the batch each compute the gradient of one process with the whole batch."""
    head = build(config)
    target, mask = some_boxes()
    whole = head.loss(head(tokens()), target, mask)
    halves = [head.loss(head(rows_of(tokens(), rows)), target[rows], mask[rows]) for rows in (slice(2), slice(2, 4))]
    for name, value in whole.items():
        torch.testing.assert_close((halves[0][name] + halves[1][name]) / 2, value)


def test_switched_off_terms_are_absent() -> None:
    head = build(PooledHeadConfig(**SIZES))
    assert set(head.loss(head(tokens()), *some_boxes())) == {"diou"}


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0.5, 0.5, 1.0, 1.0), list(range(12))),  # the whole image
        ((0.25, 1 / 3, 0.3, 0.4), [0, 1, 4, 5]),  # four centers inside
        ((0.25, 0.5, 0.5, 0.1), [4, 5]),  # a flat one
        ((0.63, 0.52, 0.01, 0.01), [6]),  # around a center or nearly so
        ((0.98, 0.98, 0.02, 0.02), [11]),  # between centers: the nearest one
        ((0.0, 0.0, 1e-6, 1e-6), [0]),
    ],
)
def test_positive_tokens(box: tuple[float, ...], expected: list[int]) -> None:
    positive = DenseHead.positive_tokens(token_centers(GRID), torch.tensor([box]))
    assert positive.shape == (1, 12)
    assert positive[0].nonzero().flatten().tolist() == expected


def test_rank_is_sorted_and_inside_bounds() -> None:
    head = build(DenseHeadConfig(**SIZES, num_boxes=30))
    boxes, scores = head.select_boxes(head(tokens()))
    assert boxes.shape == (4, 12, 4)  # no more than there are tokens
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    assert ((scores >= 0) & (scores <= 1)).all()
    corners = box_ops.cxcywh_to_xyxy(boxes)
    assert (corners[..., 2:] > corners[..., :2]).all()


def test_an_inverted_box_becomes_empty() -> None:
    """An untrained head predicts such boxes; valid boxes are unchanged."""
    signs = torch.tensor([[1, 1, -1, 1], [1, 1, 1, -1], [1, 1, -1, -1], [1, 1, 1, 1]])
    inverted = signs * torch.tensor([0.5, 0.4, 0.2, 0.3])
    boxes, _ = build(HEADS["pooled"]).select_boxes(PooledOutput(inverted))
    assert boxes[3, 0].equal(inverted[3])
    corners = box_ops.to_pixels(boxes[:, 0], (60, 80))  # [4, 4]
    assert (corners[:, 2:] >= corners[:, :2]).all()
    assert box_ops.area(corners).tolist()[:3] == [0, 0, 0]
    torch.testing.assert_close(corners[0], torch.tensor([40.0, 15.0, 40.0, 33.0]))


def test_rank_scores_are_expected_ious() -> None:
    """Two objects: four tokens predict the left one, two the right one; one token predicts a third box."""
    left, right, alone = [0.2, 0.5, 0.3, 0.8], [0.7, 0.5, 0.2, 0.4], [0.5, 0.95, 0.05, 0.05]
    probability = torch.tensor([[0.15, 0.15, 0.15, 0.15, 0.18, 0.18, 0.04]])
    proposals = torch.tensor([[left] * 4 + [right] * 2 + [alone]])
    output = DenseOutput(probability.log(), proposals, torch.rand(7, 2))
    boxes, scores = build(DenseHeadConfig(**SIZES, num_boxes=4)).select_boxes(output)
    torch.testing.assert_close(boxes[0, :3], torch.tensor([left, right, alone]))  # each object once
    torch.testing.assert_close(scores, torch.tensor([[0.60, 0.36, 0.04, 0.0]]))


def test_rank_score_is_one_if_one_token_has_all_weight() -> None:
    logits = torch.zeros(1, 12)
    logits[0, 3] = 50.0
    output = DenseOutput(logits, some_boxes(12)[0].transpose(0, 1), token_centers(GRID))
    boxes, scores = build(HEADS["dense"]).select_boxes(output)
    torch.testing.assert_close(boxes[0, 0], output.boxes[0, 3])
    torch.testing.assert_close(scores[0, 0], torch.tensor(1.0))


def test_box_centers_are_relative_to_their_token() -> None:
    head = build(HEADS["dense"])
    torch.nn.init.zeros_(head.box[-1].weight)
    torch.nn.init.zeros_(head.box[-1].bias)
    output = head(tokens())
    torch.testing.assert_close(output.boxes[0, :, :2], token_centers(GRID))


def test_rotary_encoding_depends_on_relative_positions_only() -> None:
    head_width = 16
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.view_as_complex(torch.randn(head_width // 2, 2, generator=generator)) for _ in range(2))
    positions = torch.tensor([[0.1, 0.2], [0.4, 0.3], [0.5, 0.6], [0.8, 0.7]])  # 0 -> 1 equals 2 -> 3
    rotation = torch.view_as_complex(rotary_encoding(positions, head_width))
    products = [(query * rotation[a] * (key * rotation[b]).conj()).real.sum() for a, b in ((0, 1), (2, 3), (1, 0))]
    torch.testing.assert_close(products[0], products[1])
    assert not torch.isclose(products[0], products[2])  # the opposite direction differs


@heads
def test_mixed_precision(config: HeadConfig) -> None:
    head = build(config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = head(tokens())
    exact = head(tokens())
    torch.testing.assert_close(output.boxes, exact.boxes, atol=0.03, rtol=0.1)
    assert not torch.equal(output.boxes, output.boxes.bfloat16().float()), "boxes of 8 bits are too coarse"
    assert output.boxes.dtype == torch.float32


def test_width_must_be_divisible_by_heads() -> None:
    with pytest.raises(ValueError, match=r"width \(36\) must be a multiple of 4 x heads \(2\)"):
        DenseHeadConfig(width=36, heads=2)
    with pytest.raises(ValueError, match=r"width \(36\) must be a multiple of heads \(8\)"):
        PooledHeadConfig(width=36, heads=8)
