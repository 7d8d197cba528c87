"""The set loss: names and weights of its terms, invariances, denoising queries, gradients."""

from __future__ import annotations

from copy import copy
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.losses.cases import Case, random_boxes, random_case
from vg.losses import terms
from vg.losses.config import BoxLossConfig, LossConfig, MatchingConfig
from vg.losses.set_loss import DenoisingOutput, SetLoss
from vg.types import LossName

EVERYTHING = LossConfig(diou=1.5, alignment=0.5)
Extras = dict[str, tuple[Tensor, ...]]


def extras(case: Case) -> Extras:
    """Random outputs of the encoder and of four denoising queries per prompt, and vectors with D = 8."""
    torch.manual_seed(1)
    layers, rows, queries, num_tokens = case.logits.shape
    restores = torch.stack(
        [torch.randint(-1, count, (4,)) if count else torch.full((4,), -1) for count in case.targets.counts]
    )
    return {
        "encoder": (case.logits[0].flip(1), case.boxes[0].flip(1)),
        "denoising": DenoisingOutput(torch.randn(layers, rows, 4, num_tokens), random_boxes(layers, rows, 4), restores),
        "vectors": (torch.randn(rows, queries, 8), torch.randn(rows, num_tokens, 8)),
    }


def of_rows(extra: Extras, rows: list[int]) -> Extras:
    logits, boxes, restores = extra["denoising"]
    return {
        "encoder": tuple(x[rows] for x in extra["encoder"]),
        "denoising": DenoisingOutput(logits[:, rows], boxes[:, rows], restores[rows]),
        "vectors": tuple(x[rows] for x in extra["vectors"]),
    }


def assert_same(losses: dict[LossName, Tensor], expected: dict[LossName, Tensor]) -> None:
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-5, atol=1e-6, msg=str(name))


def test_a_new_box_term_may_be_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CONTRIBUTING.md adds for a loss term, a field of BoxLossConfig and an entry of BOX_TERMS, is sufficient."""
    field = copy(BoxLossConfig.__dataclass_fields__["l1"])
    field.name = "center"
    monkeypatch.setitem(BoxLossConfig.__dataclass_fields__, "center", field)
    monkeypatch.setattr(BoxLossConfig, "center", 2.0, raising=False)
    monkeypatch.setitem(terms.BOX_TERMS, "center", terms.l1)
    case = random_case()
    losses = SetLoss(LossConfig(l1=0, giou=0))(*case)
    assert {name.term for name in losses} == {"class", "center"}
    monkeypatch.setattr(BoxLossConfig, "center", 0.0)
    with pytest.raises(ValueError, match=r"give one of diou, l1, giou, center a positive weight: .*no gradient"):
        LossConfig(l1=0, giou=0)


def test_the_class_term_has_a_weight() -> None:
    """Nothing else trains the bias of the class head, and DDP needs a gradient for every parameter."""
    with pytest.raises(ValueError, match="class_weight must be positive"):
        LossConfig(class_weight=0)


def test_one_term_per_loss_layer_and_component() -> None:
    case = random_case()
    outputs = [("", 0), ("", 1), ("", None), ("encoder", None)]
    outputs += [("denoising", 0), ("denoising", 1), ("denoising", None)]
    losses = SetLoss(EVERYTHING)(*case, **extras(case))
    names = {LossName(term, *output) for term in ("class", "diou", "l1", "giou") for output in outputs}
    assert set(losses) == names | {LossName("alignment")}
    assert all(loss.shape == () and loss.isfinite() and loss > 0 for loss in losses.values())
    last = SetLoss(EVERYTHING)(case.logits[-1:], case.boxes[-1:], *case[2:])
    assert_same(last, {name: losses[name] for name in map(LossName, ("class", "diou", "l1", "giou"))})


def test_layers_take_no_operations_of_their_own() -> None:
    """On a GPU the start of an operation takes longer than a loss term."""

    class Count(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.operations += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for layers in (2, 6):
        case = random_case(layers=layers)
        with Count() as count:
            losses = SetLoss(LossConfig())(*case)
        assert len(losses) == 3 * layers
        counts.append(count.operations)
    assert counts[0] == counts[1]


def test_weights_and_factors() -> None:
    case = random_case()
    unit = SetLoss(LossConfig(class_weight=1, diou=1, l1=1, giou=1, alignment=1))(*case, **extras(case))
    weights = {"class_weight": 2, "diou": 9, "l1": 3, "giou": 4, "alignment": 8}
    weighted = SetLoss(LossConfig(**weights, auxiliary=5, encoder=6, denoising=7))(*case, **extras(case))
    for name, value in unit.items():
        expected = ({"class": 2} | weights)[name.term]
        expected *= 1 if name.layer is None else 5
        expected *= {"": 1, "encoder": 6, "denoising": 7}[name.component]
        torch.testing.assert_close(weighted[name], expected * value)


@pytest.mark.parametrize(
    ("off", "gone"),
    [
        ({"auxiliary": 0.0}, "layer"),
        ({"denoising": 0.0}, "denoising"),
        ({"alignment": 0.0}, "alignment"),
        ({"l1": 0.0}, "l1"),
        ({"giou": 0.0}, "giou"),
        ({"diou": 0.0}, "diou"),
    ],
)
def test_zero_weight_removes_a_term(off: dict[str, float], gone: str) -> None:
    case = random_case()
    values = {field.name: getattr(EVERYTHING, field.name) for field in fields(EVERYTHING)}
    everything = SetLoss(EVERYTHING)(*case, **extras(case))
    assert any(gone in str(name) for name in everything)
    losses = SetLoss(LossConfig(**(values | off)))(*case, **extras(case))
    assert_same(losses, {name: value for name, value in everything.items() if gone not in str(name)})


def test_perfect_predictions_have_no_loss_and_errors_have_the_expected_one() -> None:
    case = random_case(layers=1)
    boxes = case.boxes.clone()
    logits = torch.full_like(case.logits, -20.0)
    for row, count in enumerate(case.targets.counts):
        boxes[0, row, :count] = case.targets.boxes[row, :count]
        logits[0, row, :count][case.targets.positive_map[row, :count]] = 20.0
    perfect = SetLoss(LossConfig())(logits, boxes, *case[2:])
    assert all(value.item() == pytest.approx(0, abs=1e-5) for value in perfect.values())
    logits[0, 0, 0] = -20.0
    boxes[0, 0, 1, 0] += 0.1
    worse = SetLoss(LossConfig())(logits, boxes, *case[2:])
    num_boxes, num_tokens = sum(case.targets.counts), case.targets.positive_map[0, 0].sum()
    torch.testing.assert_close(worse[LossName("class")], 0.25 * 20 * num_tokens / num_boxes)
    torch.testing.assert_close(worse[LossName("l1")], torch.tensor(5 * 0.1 / num_boxes))


def test_padding_is_ignored() -> None:
    case, garbage = random_case(counts=(3, 1), lengths=(9, 9)), torch.nan
    everything = SetLoss(EVERYTHING)(*case, **extras(case))
    extra = extras(case)
    logits, boxes, restores = extra["denoising"]
    garbage_logits = logits.masked_fill(~case.mask.unsqueeze(1), garbage)
    extra["denoising"] = DenoisingOutput(garbage_logits, boxes, restores)
    extra["encoder"] = extra["encoder"][0].masked_fill(~case.mask.unsqueeze(1), garbage), extra["encoder"][1]
    filled = case.logits.masked_fill(~case.mask.unsqueeze(1), garbage)
    assert_same(SetLoss(EVERYTHING)(filled, *case[1:], **extra), everything)

    cut = {
        "encoder": (extra["encoder"][0][..., :9], extra["encoder"][1]),
        "denoising": DenoisingOutput(logits[..., :9], boxes, restores),
        "vectors": (extra["vectors"][0], extra["vectors"][1][:, :9]),
    }
    assert_same(SetLoss(EVERYTHING)(*case.cut(), **cut), everything)


def test_padded_queries_have_no_effect() -> None:
    """A small image in a batch with a larger one has rows that are no queries; row 0 has more boxes than queries."""
    case = random_case(counts=(6, 2, 0), lengths=(9, 11, 5), queries=4)
    extra = extras(case)
    del extra["denoising"]
    expected = SetLoss(EVERYTHING)(*case, **extra)
    padding = random_case(counts=(6, 2, 0), lengths=(9, 11, 5), queries=3)
    minus_infinity = torch.full_like(padding.logits, -torch.inf)
    order = [4, 0, 1, 5, 2, 3, 6]  # among the queries, which the matcher must not depend on
    logits = torch.cat((case.logits, minus_infinity), dim=2)[:, :, order]
    perfect = case.targets.boxes[None, :, :3].expand(3, -1, -1, -1)
    boxes = torch.cat((case.boxes, perfect), dim=2)[:, :, order]
    vectors = torch.cat((extra["vectors"][0], extra["vectors"][1][:, :3]), dim=1)[:, order], extra["vectors"][1]
    encoder = (
        torch.cat((extra["encoder"][0], minus_infinity[0]), dim=1)[:, order],
        torch.cat((extra["encoder"][1], perfect[0]), dim=1)[:, order],
    )
    padded = SetLoss(EVERYTHING)(logits, boxes, *case[2:], encoder=encoder, vectors=vectors)
    assert_same(padded, expected)


def test_order_is_irrelevant() -> None:
    case, order = random_case(), [2, 0, 3, 1]
    expected = SetLoss(EVERYTHING)(*case, **extras(case))
    assert_same(SetLoss(EVERYTHING)(*case.rows(order), **of_rows(extras(case), order)), expected)
    queries = torch.randperm(8)
    shuffled = SetLoss(LossConfig())(case.logits[:, :, queries], case.boxes[:, :, queries], *case[2:])
    assert_same(shuffled, SetLoss(LossConfig())(*case))


def test_micro_batches_equal_the_whole_batch() -> None:
    """Every micro-batch divides by its own boxes; sums of micro-batches over all boxes equal the whole batch."""
    case, extra = random_case(), extras(random_case())
    whole = SetLoss(EVERYTHING)(*case, **extra)
    micro_batches = [[0], [1], [2, 3]]
    counts = [sum(case.rows(rows).targets.counts) for rows in micro_batches]
    restored = [int((of_rows(extra, rows)["denoising"][2] >= 0).sum()) for rows in micro_batches]
    assert counts == [3, 0, 6]
    losses = [SetLoss(EVERYTHING)(*case.rows(rows), **of_rows(extra, rows)) for rows in micro_batches]
    merged = {}
    for name in whole:
        divisors = restored if name.component == "denoising" else counts
        sums = [loss[name] * max(1, divisor) for loss, divisor in zip(losses, divisors, strict=True)]
        merged[name] = torch.stack(sums).sum() / sum(divisors)
    assert_same(merged, whole)


def test_denoising_terms_equal_the_loss_functions() -> None:
    """Their assignment replaces matching, -1 is background; sums are divided by the number of denoised boxes."""
    case = random_case(counts=(3, 1), lengths=(9, 9), layers=1)
    logits, boxes = torch.randn(1, 2, 4, 11), random_boxes(1, 2, 4)
    restores = torch.tensor([[2, -1, 0, -1], [-1, 0, -1, -1]])
    losses = SetLoss(LossConfig())(*case, denoising=DenoisingOutput(logits, boxes, restores))
    l1 = giou = focal = torch.tensor(0.0)
    for row in range(2):
        for query, box in enumerate(restores[row].tolist()):
            named = case.targets.positive_map[row, box] if box >= 0 else torch.zeros(11, dtype=torch.bool)
            focal = focal + terms.focal(logits[0, row, query, :9], named[:9], 0.25, 2).sum()
            if box >= 0:
                l1 = l1 + terms.l1(boxes[0, row, query], case.targets.boxes[row, box])
                giou = giou + terms.giou(boxes[0, row, query], case.targets.boxes[row, box])
    torch.testing.assert_close(losses[LossName("class", "denoising")], focal / 3)
    torch.testing.assert_close(losses[LossName("l1", "denoising")], 5 * l1 / 3)
    torch.testing.assert_close(losses[LossName("giou", "denoising")], 2 * giou / 3)


def test_without_boxes_all_terms_exist_and_have_gradients() -> None:
    case = random_case(counts=(0, 0), lengths=(5, 7)).cut()
    logits = case.logits.requires_grad_()
    queries = torch.zeros(3, 2, 0, 7, requires_grad=True)
    denoising = DenoisingOutput(queries, torch.zeros(3, 2, 0, 4), torch.zeros(2, 0, dtype=torch.long))
    vectors = torch.randn(2, 8, 4), torch.randn(2, 7, 4)
    losses = SetLoss(EVERYTHING)(*case, denoising=denoising, vectors=vectors)
    assert len(losses) == 4 * (3 + 3) + 1
    assert {name for name, loss in losses.items() if loss > 0} == {LossName("class", layer=i) for i in (None, 0, 1)}
    torch.stack(list(losses.values())).sum().backward()
    assert logits.grad is not None
    assert logits.grad[case.mask[None, :, None].expand_as(logits)].all()
    assert logits.grad[~case.mask[None, :, None].expand_as(logits)].abs().sum() == 0
    assert queries.grad is not None


def test_more_boxes_than_queries_divides_by_the_boxes() -> None:
    """Open-GroundingDino would divide the class term by the three matched boxes."""
    case = random_case(counts=(6,), lengths=(5,), queries=3, layers=1)
    case.logits[..., :5] = -20.0
    losses = SetLoss(LossConfig())(*case)
    assert losses[LossName("class")].item() >= 0.25 * 20 * 3 / 6 * 0.99, (
        "three queries have at least one positive token each"
    )
    assert losses[LossName("class")].item() <= 0.25 * 20 * 3 * 5 / 6


def test_gradients_reach_matched_boxes_and_all_real_tokens_only() -> None:
    case = random_case(counts=(2, 0), lengths=(6, 4), queries=5, layers=1)
    logits, boxes = case.logits.requires_grad_(), case.boxes.requires_grad_()
    torch.stack(list(SetLoss(LossConfig())(logits, boxes, *case[2:]).values())).sum().backward()
    assert logits.grad is not None
    assert boxes.grad is not None
    assert boxes.grad.isfinite().all()
    assert (boxes.grad[0].abs().sum(dim=-1) > 0).sum(dim=1).tolist() == [2, 0]
    assert torch.equal(logits.grad[0] != 0, case.mask.unsqueeze(1).expand(-1, 5, -1))


def test_full_precision_under_autocast() -> None:
    case = random_case(queries=40)
    expected = SetLoss(EVERYTHING)(*case, **extras(case))
    with torch.autocast("cpu", torch.bfloat16):
        losses = SetLoss(EVERYTHING)(*case, **extras(case))
    assert all(torch.equal(losses[name], value) for name, value in expected.items())
    half = SetLoss(LossConfig())(case.logits.bfloat16(), case.boxes.bfloat16(), *case[2:])
    assert all(value.dtype == torch.float32 for value in half.values())


def test_recipes_differ_by_settings_only() -> None:
    assert LossConfig() == LossConfig(class_weight=1, l1=5, giou=2, matching=MatchingConfig("sum", 2, 5, 2))
    case = random_case()
    other = SetLoss(LossConfig(class_weight=2, matching=MatchingConfig("mean", 1)))(*case)
    assert other.keys() == SetLoss(LossConfig())(*case).keys()
