"""Hungarian matching: costs by hand, exhaustive search, batching, and non-finite costs."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from tests.losses.cases import Case, random_case
from vg.losses.config import LossConfig, MatchingConfig
from vg.losses.matcher import _finite, match, match_costs

SUM = LossConfig()
MEAN = LossConfig(matching=MatchingConfig(class_cost="mean", class_weight=1))
BOTH_COSTS = pytest.mark.parametrize("config", [SUM, MEAN], ids=["sum", "mean"])


def assert_cheapest(cost: Tensor, assignment: Tensor) -> None:
    """cost [Q, N], assignment [Q]: no other assignment of as many boxes costs less."""
    queries = (assignment >= 0).nonzero().flatten().tolist()
    matched = assignment[queries].tolist()
    assert len(set(matched)) == len(matched) == min(cost.shape)
    small = cost if cost.shape[0] >= cost.shape[1] else cost.T  # [many, few]
    cheapest = min(
        small[list(rows), range(small.shape[1])].sum() for rows in permutations(range(len(small)), min(cost.shape))
    )
    assert cost[queries, matched].sum().item() == pytest.approx(cheapest.item(), rel=1e-5)


def test_class_costs_equal_values_computed_by_hand() -> None:
    case = random_case(counts=(1,), lengths=(3,), queries=1, layers=1)
    case.targets.positive_map[:] = False
    case.targets.positive_map[0, 0, :2] = True
    case.logits[0, 0, 0, :3] = torch.tensor([0.2, -0.4, 1.5])
    p = case.logits[0, 0, 0, :3].sigmoid()
    positive, negative = -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log()
    only = {"l1": 0.0, "giou": 0.0, "class_weight": 1.0}
    for class_cost, expected in (
        ("sum", positive[0] + positive[1] + negative[2]),
        ("mean", (positive[0] - negative[0] + positive[1] - negative[1]) / 2),
    ):
        config = LossConfig(matching=MatchingConfig(class_cost=class_cost, **only))  # type: ignore[arg-type]
        torch.testing.assert_close(match_costs(*case, config)[0, 0, 0, 0], expected)


@BOTH_COSTS
def test_no_assignment_is_cheaper(config: LossConfig) -> None:
    case = random_case(counts=(3, 0, 4, 1), queries=6)
    found, costs = match(*case, config), match_costs(*case, config)
    assert found.shape == (3, 4, 6)
    assert found.dtype == torch.int64
    for layer in range(3):
        for row, count in enumerate(case.targets.counts):
            assert_cheapest(costs[layer, row, :, :count], found[layer, row])


@BOTH_COSTS
def test_more_boxes_than_queries(config: LossConfig) -> None:
    case = random_case(counts=(6,), lengths=(9,), queries=3)
    found, costs = match(*case, config), match_costs(*case, config)
    assert (found >= 0).all()
    for layer in range(3):
        assert_cheapest(costs[layer, 0, :, :6], found[layer, 0])


@BOTH_COSTS
def test_a_batch_equals_single_prompts(config: LossConfig) -> None:
    """Whatever the padding of tokens and boxes contains."""
    case = random_case()
    batched = match(*case, config)
    for layer in range(3):
        for row in range(4):
            single_case = case.rows([row]).cut()
            single = match(
                single_case.logits[layer : layer + 1], single_case.boxes[layer : layer + 1], *single_case[2:], config
            )
            assert torch.equal(single[0, 0], batched[layer, row])
    logits = case.logits.masked_fill(~case.mask.unsqueeze(1), torch.nan)
    assert torch.equal(match(logits, *case[1:], config), batched)


@BOTH_COSTS
@pytest.mark.parametrize("count", [2, 6])
def test_padded_queries_are_not_matched(config: LossConfig, count: int) -> None:
    """Although their boxes are perfect, and if there are more boxes than other queries."""
    case = random_case(counts=(count,), lengths=(9,), queries=8)
    real, padding = [0, 2, 5, 6], [1, 3, 4, 7]
    expected = match(case.logits[:, :, real], case.boxes[:, :, real], *case[2:], config)
    case.logits[:, :, padding] = -torch.inf
    case.boxes[:, :, padding] = case.targets.boxes[None, :, :1]
    found = match(*case, config)
    assert torch.equal(found[:, :, real], expected)
    assert (found[:, :, padding] == -1).all()
    assert ((found >= 0).sum(dim=-1) == min(count, 4)).all()


def test_no_boxes_at_all() -> None:
    found = match(*random_case(counts=(0, 0), lengths=(4, 5)), SUM)
    assert (found == -1).all()
    empty = random_case(counts=(0, 0), lengths=(4, 5)).cut()
    assert empty.targets.boxes.shape == (2, 0, 4)
    assert (match(*empty, SUM) == -1).all()


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_costs_rank_last(garbage: float) -> None:
    """The boxes are matched with the four finite queries, as if there were no other queries."""
    case = random_case(counts=(4,), lengths=(9,), queries=8)
    good = [0, 3, 4, 6]
    bad = [1, 2, 5, 7]
    case.boxes[:, :, bad] = garbage
    case.logits[:, :, good[0], :9] = -30.0  # terrible, but finite
    expected = match(case.logits[:, :, good], case.boxes[:, :, good], *case[2:], SUM)
    found = match(*case, SUM)
    assert torch.equal(found[:, :, good], expected)
    assert (found[:, :, bad] == -1).all()


def test_non_finite_queries_are_matched_if_too_few_are_finite() -> None:
    case = random_case(counts=(4,), lengths=(9,), queries=5)
    case.logits[:, :, 1:4, 0] = torch.nan
    found = match(*case, SUM)
    assert (found[:, :, [0, 4]] >= 0).all(), "finite queries are matched"
    assert ((found >= 0).sum(dim=-1) == 4).all()
    costs = match_costs(*case, SUM)
    for layer in range(3):
        two = found[layer, 0, [0, 4]]
        chosen = costs[layer, 0, [0, 4], two].sum()
        assert all(chosen <= costs[layer, 0, 0, a] + costs[layer, 0, 4, b] + 1e-5 for a, b in permutations(range(4), 2))
    nothing_left = match(torch.full_like(case.logits, torch.nan), *case[1:], SUM)
    assert ((nothing_left >= 0).sum(dim=-1) == 4).all()


def test_lower_costs_elsewhere_do_not_justify_a_non_finite_pair() -> None:
    """The diagonal costs zero except for its non-finite last entry; the best finite assignment costs 200."""
    cost = np.array([[0, 100, 100], [100, 0, 100], [100, 100, np.nan]], dtype=np.float32)
    queries, matched = linear_sum_assignment(_finite(cost))
    assert cost[queries, matched].sum() == 200


def test_autocast_changes_nothing_and_no_gradient_is_kept() -> None:
    case: Case = random_case(queries=40)
    case.logits.requires_grad_()
    expected, costs = match(*case, SUM), match_costs(*case, SUM)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(match(*case, SUM), expected)
        assert torch.equal(match_costs(*case, SUM), costs)
    assert not expected.requires_grad
    assert costs.isfinite().all()
