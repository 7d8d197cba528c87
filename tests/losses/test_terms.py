"""Loss terms against values computed by hand, and their gradients for boxes without area."""

from __future__ import annotations

import math

import pytest
import torch

from vg.losses import terms

TARGET = torch.tensor([0.5, 0.5, 0.5, 0.5])  # cxcywh


def test_l1_is_the_sum_over_the_coordinates() -> None:
    predicted = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.4, 0.7, 0.5, 0.1]])
    torch.testing.assert_close(terms.l1(predicted, TARGET), torch.tensor([0.0, 0.7]))


@pytest.mark.parametrize(
    ("predicted", "giou", "diou"),
    [
        ([0.5, 0.5, 0.5, 0.5], 0, 0),
        ([0.5, 0.5, 0.25, 0.5], 0.5, 0.5),  # the same center, half the width
        ([0.5, 0.5, 1, 1], 0.75, 0.75),
        # half a box to the right: IoU 1/3, no empty space in the enclosing box, 0.25 off a diagonal of sqrt(0.8125)
        ([0.75, 0.5, 0.5, 0.5], 2 / 3, 2 / 3 + 0.0625 / 0.8125),
        ([1.5, 0.5, 0.5, 0.5], 1 + 1 / 3, 1 + 1 / (1.5**2 + 0.5**2)),  # apart, with empty space of half a box between
    ],
)
def test_overlap_terms_equal_values_computed_by_hand(predicted: list[float], giou: float, diou: float) -> None:
    box = torch.tensor(predicted, dtype=torch.float32)
    assert terms.giou(box, TARGET).item() == pytest.approx(giou, abs=1e-6)
    assert terms.diou(box, TARGET).item() == pytest.approx(diou, abs=1e-6)


@pytest.mark.parametrize("term", [terms.l1, terms.giou, terms.diou])
def test_shapes_and_finite_gradients(term) -> None:
    predicted = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))
    predicted[0, 0, 2:] = 0  # no area
    predicted[0, 1] = TARGET
    predicted.requires_grad_()
    value = term(predicted, TARGET)
    value.sum().backward()
    assert value.shape == (2, 3)
    assert value.isfinite().all()
    assert predicted.grad is not None
    assert predicted.grad.isfinite().all()


@pytest.mark.parametrize("term", [terms.giou, terms.diou])
def test_disjoint_boxes_are_pulled_together(term) -> None:
    predicted = torch.tensor([0.1, 0.5, 0.1, 0.1], requires_grad=True)
    term(predicted, torch.tensor([0.9, 0.5, 0.1, 0.1])).backward()
    assert predicted.grad is not None
    assert predicted.grad[0] < 0, "gradient descent moves the box right, towards the target"


def test_token_cross_entropy_equals_values_computed_by_hand() -> None:
    positive = torch.tensor([[True, False, False, False], [True, True, False, False]])
    uniform = terms.token_cross_entropy(torch.zeros(2, 4), positive)
    torch.testing.assert_close(uniform, torch.full((2,), math.log(4)))
    confident = torch.tensor([[50.0, 0, 0, 0], [50.0, 50.0, 0, 0]])
    torch.testing.assert_close(terms.token_cross_entropy(confident, positive), torch.tensor([0.0, math.log(2)]))
    logits = torch.tensor([[1.0, 2.0, 0.0, -1.0]])
    expected = -torch.log_softmax(logits[0], 0)[[0, 2]].mean()
    assert terms.token_cross_entropy(logits, torch.tensor([[True, False, True, False]])).item() == pytest.approx(
        expected.item()
    )


def test_token_cross_entropy_of_half_precision_logits() -> None:
    logits = torch.tensor([[1000.0, -1000.0]]).half()
    value = terms.token_cross_entropy(logits, torch.tensor([[False, True]]))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(2000)


def test_no_loss_without_positive_tokens() -> None:
    positive = torch.tensor([[False, False], [True, False]])
    values = terms.token_cross_entropy(torch.zeros(2, 2), positive)
    torch.testing.assert_close(values, torch.tensor([0.0, math.log(2)]))


def test_focal_equals_values_computed_by_hand() -> None:
    logits = torch.tensor([0.0, math.log(3), math.log(3), -2.0])  # p = 1/2, 3/4, 3/4, ...
    positive = torch.tensor([True, True, False, False])
    p = 1 / (1 + math.exp(2))
    expected = [
        0.25 * 0.5**2 * math.log(2),
        0.25 * 0.25**2 * math.log(4 / 3),
        0.75 * 0.75**2 * math.log(4),
        -0.75 * p**2 * math.log(1 - p),
    ]
    torch.testing.assert_close(terms.focal(logits, positive, 0.25, 2), torch.tensor(expected))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_stays_finite_at_large_logits(gamma: float) -> None:
    logits = torch.tensor([-500.0, 500.0, -500.0, 500.0], requires_grad=True)
    positive = torch.tensor([True, True, False, False])
    loss = terms.focal(logits, positive, 0.25, gamma)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([125.0, 0.0, 0.0, 375.0]))
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([-0.25, 0.0, 0.0, 0.75]))


def aligned(cosine: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two queries and three tokens; query 0 has this cosine with tokens 0 and 2, all other pairs are orthogonal."""
    queries = torch.tensor([[[2 * cosine, 0.0, 2 * (1 - cosine**2) ** 0.5, 0.0], [0.0, 0.0, 0.0, 5.0]]])
    text = torch.tensor([[[3.0, 0.0, 0.0, 0.0], [0.0, 0.1, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]])
    return queries, text  # [1, 2, 4], [1, 3, 4]


def test_alignment_equals_values_computed_by_hand() -> None:
    queries, text = aligned(0.6)
    positive = torch.tensor([[[True, False, False], [False, False, False]]])
    valid = torch.tensor([[[True, True, False]]])  # the third token would compete with the first
    high = math.exp(0.6 / 0.5)
    expected = (math.log((high + 1) / high) + math.log((high + 1) / high)) / 2  # one other token, one other query
    value = terms.alignment(queries, text, positive, valid, 0.5)
    torch.testing.assert_close(value, torch.tensor([expected]))
    closer = terms.alignment(*aligned(0.9), positive, valid, 0.5)
    assert closer.item() < value.item()


def test_alignment_without_matches_is_zero() -> None:
    queries, text = (x.requires_grad_() for x in aligned(0.6))
    value = terms.alignment(queries, text, torch.zeros(1, 2, 3, dtype=torch.bool), torch.ones(1, 1, 3).bool(), 0.07)
    value.sum().backward()
    assert value.item() == 0
    assert queries.grad is not None
    assert queries.grad.abs().sum() == 0
