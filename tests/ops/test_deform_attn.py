"""The selected implementation of deformable attention against grid_sample, numerical gradients and recorded values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from tests.golden.files import recorded_tensors
from tests.ops.cases import (
    DEVICES,
    DTYPES,
    Shapes,
    assert_near,
    by_grid_sample,
    fused,
    gradients,
    plain,
)
from vg.ops import deform_attn, deform_attn_fused, reference

SHAPES: Shapes = ((5, 7), (3, 4), (1, 1))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


# ---- values and gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shapes", "sizes"),
    [
        (((9, 11), (5, 6), (3, 3), (2, 2)), {"B": 2, "Q": 37, "H": 8, "D": 32, "P": 4}),  # as in Grounding DINO
        (((9, 11), (5, 6), (3, 3), (2, 2)), {"B": 2, "Q": 142, "H": 8, "D": 32, "P": 4}),  # queries are the pixels
        (SHAPES, {"B": 3, "Q": 7, "H": 3, "D": 30, "P": 1}),
        (((1, 9), (9, 1), (1, 1), (2, 1), (1, 2)), {"B": 1, "Q": 11, "H": 2, "D": 16, "P": 8}),
        (((6, 5),), {"B": 2, "Q": 13, "H": 1, "D": 64, "P": 3}),
        (((4, 6), (2, 3)), {"B": 1, "Q": 1, "H": 5, "D": 1, "P": 2}),
    ],
    ids=["main", "encoder", "odd", "thin", "one_level", "one_channel"],
)
def test_equals_grid_sample(shapes: Shapes, sizes: dict[str, int], dtype: torch.dtype, device: str) -> None:
    inputs = plain(shapes, dtype=dtype, device=device, **sizes)
    value, locations, weights = inputs
    output = deform_attn(value, shapes, locations, weights)
    expected = by_grid_sample(value, shapes, locations, weights)
    assert output.dtype == dtype
    assert_near(output, expected, dtype)
    for found, target in zip(gradients(output, inputs), gradients(expected, inputs), strict=True):
        assert found.dtype == target.dtype
        assert_near(found, target, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_coordinates_are_exact_on_large_maps(dtype: torch.dtype, device: str) -> None:
    """Above 128, bfloat16 coordinates would be whole pixels; float32 has a resolution of 2e-5 pixels."""
    times = 10 if dtype == torch.float32 else 1
    shapes = ((3, 301), (257, 2))
    inputs = plain(shapes, B=1, Q=50, H=1, D=32, P=4, dtype=dtype, device=device)
    output, expected = deform_attn(inputs[0], shapes, *inputs[1:]), by_grid_sample(inputs[0], shapes, *inputs[1:])
    assert_near(output, expected, dtype, times)
    for found, target in zip(gradients(output, inputs), gradients(expected, inputs), strict=True):
        assert_near(found, target, dtype, times)


@pytest.mark.parametrize("D", [1, 3, 8, 30, 32, 64])
@pytest.mark.parametrize(("L", "P"), [(1, 4), (2, 1), (3, 8), (4, 4), (5, 1)])
def test_numerical_gradients(D: int, L: int, P: int, device: str) -> None:
    shapes = ((3, 4), (2, 3), (1, 5), (3, 1), (2, 2))[:L]
    value, *rest = plain(shapes, B=1, Q=2, H=2, D=D, P=P, device=device)
    assert torch.autograd.gradcheck(
        lambda v, *x: deform_attn(v, shapes, *x), (value, *rest), fast_mode=D > 1 or L > 2, nondet_tol=1e-12
    )


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize(("D", "P"), [(1, 3), (32, 4)])
def test_numerical_gradients_fused(D: int, P: int, coordinates: int, shared: bool, device: str) -> None:
    value, *rest = fused(SHAPES, coordinates, shared, B=1, Q=3, H=2, D=D, P=P, device=device)
    function = lambda v, *x: deform_attn_fused(v, SHAPES, *x)  # noqa: E731
    assert torch.autograd.gradcheck(function, (value, *rest), fast_mode=D > 3 or shared, nondet_tol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("coordinates", [2, 4])
def test_fused_equals_softmax_locations_and_sampling(
    coordinates: int, shared: bool, dtype: torch.dtype, device: str
) -> None:
    shapes = ((9, 11), (5, 6), (3, 3), (2, 2))
    inputs = fused(shapes, coordinates, shared, Q=11, H=8, D=32, dtype=dtype, device=device)
    value, points, offsets, logits = inputs
    if coordinates == 2:
        location = points[:, :, None, :, None] + offsets / points.new_tensor([(w, h) for h, w in shapes])[:, None]
    else:
        box = points[:, :, None, :, None]
        location = box[..., :2] + offsets / 4 * box[..., 2:] / 2
    weights = logits.softmax(-1).view(location.shape[:-1])
    output, expected = deform_attn_fused(value, shapes, *inputs[1:]), by_grid_sample(value, shapes, location, weights)
    assert output.dtype == dtype
    assert_near(output, expected, dtype)
    for found, target in zip(gradients(output, inputs), gradients(expected, inputs), strict=True):
        assert found.dtype == target.dtype
        assert_near(found, target, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_offsets_logits_and_weights(dtype: torch.dtype, device: str) -> None:
    """They give the same results as after a cast to float32, and their gradients have their dtype."""
    value, points, offsets, logits = fused(SHAPES, dtype=dtype, device=device)
    half = [x.detach().to(dtype).requires_grad_() for x in (offsets, logits)]
    full = [x.detach().float().requires_grad_() for x in half]
    output, expected = (deform_attn_fused(value, SHAPES, points, *x) for x in (half, full))
    assert_near(output, expected, dtype)
    for found, target in zip(gradients(output, tuple(half)), gradients(expected, tuple(full)), strict=True):
        assert found.dtype == dtype
        assert_near(found, target, dtype)

    value, locations, weights = plain(SHAPES, dtype=dtype, device=device)
    half_weights = weights.detach().to(dtype).requires_grad_()
    output = deform_attn(value, SHAPES, locations, half_weights)
    assert_near(output, deform_attn(value, SHAPES, locations, half_weights.float()), dtype)
    assert gradients(output, (half_weights,))[0].dtype == dtype
    mixed = deform_attn_fused(value, SHAPES, points, half[0], full[1])  # both are converted to float32
    assert_near(mixed, expected, dtype)


def test_outputs_and_gradients_equal_the_official_code(device: str) -> None:
    golden = {name: tensor.to(device) for name, tensor in recorded_tensors("msda_fp64").items()}
    shapes = tuple((h, w) for h, w in golden["spatial_shapes_hw"].tolist())
    names = ("value", "sampling_locations", "attention_weights")
    inputs = tuple(golden[x].requires_grad_() for x in ("value", "sampling_locations_xy", "attention_weights"))
    output = deform_attn(inputs[0], shapes, *inputs[1:])
    torch.testing.assert_close(output, golden["output"], rtol=1e-12, atol=1e-12)
    for name, found in zip(names, torch.autograd.grad(output, inputs, golden["grad_output"]), strict=True):
        torch.testing.assert_close(found, golden[f"grad_{name}"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("coordinates", [2, 4])
def test_attention_module_equals_the_official_code(coordinates: int, device: str) -> None:
    """The linear layers of the official attention module around our fused form."""
    golden = {name: x.to(device) for name, x in recorded_tensors("msda_module_fp64").items()}

    def project(x: Tensor, name: str, *shape: int) -> Tensor:
        y = linear(x, golden[f"param.{name}.weight"], golden[f"param.{name}.bias"])
        return y.unflatten(-1, shape) if shape else y

    value = project(golden["value"], "value_proj").masked_fill(golden["key_padding_mask"][..., None], 0)
    output = deform_attn_fused(
        value.unflatten(-1, (4, 8)),
        tuple((h, w) for h, w in golden["spatial_shapes_hw"].tolist()),
        golden[f"ref_{coordinates}d"],
        project(golden["query"], "sampling_offsets", 4, 4, 3, 2),
        project(golden["query"], "attention_weights", 4, 12),
    )
    expected = golden[f"output_ref_{coordinates}d"]
    torch.testing.assert_close(project(output, "output_proj"), expected, rtol=1e-12, atol=1e-12)


# ---- layouts, selected gradients, determinism ---------------------------------------------------------------------


def _strided(x: Tensor, dim: int) -> Tensor:
    """Return a tensor equal to x with twice its stride along a dimension, and NaN between its entries."""
    return (
        torch.stack((x, torch.full_like(x, float("nan"))), dim=dim + 1)
        .flatten(dim, dim + 1)
        .index_select(dim, torch.arange(2 * x.shape[dim], device=x.device))[
            (slice(None),) * dim + (slice(None, None, 2),)
        ]
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [30, 32])
def test_results_do_not_depend_on_the_memory_layout(D: int, dtype: torch.dtype, device: str) -> None:
    inputs = plain(SHAPES, Q=7, D=D, dtype=dtype, device=device)
    value, locations, weights = (x.detach() for x in inputs)
    expected = deform_attn(inputs[0], SHAPES, *inputs[1:])
    expected_grads = gradients(expected, inputs)
    by_head = value.transpose(1, 2).contiguous().transpose(1, 2)
    layouts = [
        (by_head, locations, weights),
        (value.flip(0).flip(0).transpose(2, 3).contiguous().transpose(2, 3), locations, weights),
        (_strided(value, 3), _strided(locations, 5), _strided(weights, 4)),
        (_strided(value, 1), _strided(locations, 1), _strided(weights, 2)),
        (value, locations.transpose(1, 2).contiguous().transpose(1, 2), weights.mT.contiguous().mT),
    ]
    for layout in layouts:
        layout = tuple(x.requires_grad_() for x in layout)
        output = deform_attn(layout[0], SHAPES, *layout[1:])
        assert torch.equal(output, expected)
        for found, grad in zip(gradients(output, layout), expected_grads, strict=True):
            assert_near(found, grad, dtype)

    weight = torch.randn(expected.shape, device=device).to(dtype)
    expected_grads = torch.autograd.grad(expected, inputs, weight, retain_graph=True)
    transposed = weight.transpose(0, 2).contiguous().transpose(0, 2)
    found_grads = torch.autograd.grad(expected, inputs, transposed, retain_graph=True)
    for found, grad in zip(found_grads, expected_grads, strict=True):
        assert_near(found, grad, dtype)
    expected_grads = torch.autograd.grad(expected, inputs, torch.ones_like(expected), retain_graph=True)
    one = torch.ones((), dtype=dtype, device=device).expand_as(expected)
    for found, grad in zip(torch.autograd.grad(expected, inputs, one), expected_grads, strict=True):
        assert_near(found, grad, dtype)


@pytest.mark.parametrize("coordinates", [2, 4])
def test_expanded_reference_points(coordinates: int, device: str) -> None:
    """The gradient of one point that `expand` repeats for all levels is the sum over levels."""
    value, points, offsets, logits = fused(SHAPES, coordinates, shared=True, D=32, dtype=torch.float32, device=device)
    inputs = (value, points, offsets, logits)
    expected = deform_attn_fused(value, SHAPES, points, offsets, logits)
    output = deform_attn_fused(value, SHAPES, points.expand(-1, -1, 3, -1), offsets, logits)
    assert_near(output, expected, torch.float32)
    for found, target in zip(gradients(output, inputs), gradients(expected, inputs), strict=True):
        assert_near(found, target, torch.float32)
    sliced = torch.cat((points, points), -1).detach()[..., :coordinates].requires_grad_()
    assert torch.equal(deform_attn_fused(value, SHAPES, sliced, offsets, logits), expected)


@pytest.mark.parametrize("D", [3, 32])
def test_every_subset_of_gradients(D: int, device: str) -> None:
    for make, call in ((plain, deform_attn), (fused, deform_attn_fused)):
        inputs = make(SHAPES, D=D, dtype=torch.float32, device=device)
        all_gradients = gradients(call(inputs[0], SHAPES, *inputs[1:]), inputs)
        for subset in range(1, 2 ** len(inputs)):
            needs = [bool(subset >> index & 1) for index in range(len(inputs))]
            some = [x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
            found = gradients(call(some[0], SHAPES, *some[1:]), tuple(x for x in some if x.requires_grad))
            expected = [grad for grad, need in zip(all_gradients, needs, strict=True) if need]
            for one, other in zip(found, expected, strict=True):
                assert_near(one, other, torch.float32)


def test_gradients_that_are_not_needed_are_empty(device: str) -> None:
    value, locations, weights = (x.detach() for x in plain(SHAPES, dtype=torch.float32, device=device))
    grad = torch.ones(2, 5, 16, device=device)
    sizes = [size for shape in SHAPES for size in shape]
    operator = torch.ops.vg.deform_attn_backward
    found = operator(grad, value, sizes, locations, weights, [False, True, False])
    assert [tuple(x.shape) for x in found] == [(0,), tuple(locations.shape), (0,)]


def test_deterministic_mode_is_bit_equal_for_any_number_of_threads(device: str) -> None:
    sizes = {"B": 2, "Q": 150, "H": 4, "D": 32, "dtype": torch.float32, "device": device}
    shapes = ((12, 14), (6, 7))
    runs = []
    before = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    try:
        for threads in (1, 2, 4, 1, 1):
            torch.set_num_threads(threads)
            for make, call in ((plain, deform_attn), (fused, deform_attn_fused)):
                inputs = make(shapes, **sizes)
                output = call(inputs[0], shapes, *inputs[1:])
                runs.append((output, *gradients(output, inputs)))
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(False)
    for index, run in enumerate(runs):
        assert all(torch.equal(one, other) for one, other in zip(run, runs[index % 2], strict=True))


def test_cannot_be_differentiated_twice(device: str) -> None:
    inputs = plain(SHAPES, device=device)
    (grad,) = torch.autograd.grad(deform_attn(inputs[0], SHAPES, *inputs[1:]).sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated twice"):
        grad.sum().backward()


def test_reference_points_of_an_empty_level_are_divided_by_one() -> None:
    points = torch.zeros(1, 1, 2, 2)
    assert reference.offset_scale(((0, 0), (2, 4)), points, 4)[:, 0].tolist() == [[1, 1], [0.25, 0.5]]
