"""Deformable attention as an operator of torch: tracing, compilation, autocast, DDP and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ops.cases import DEVICES, assert_near, fused, gradients, plain
from vg.ops import deform_attn, deform_attn_fused

SHAPES = ((5, 7), (3, 4), (1, 1))
SIZES = [size for shape in SHAPES for size in shape]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


# ---- tracing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    value, *rest = plain(SHAPES, D=32, dtype=dtype, device=device)
    deform_attn(value, SHAPES, *rest)  # loads the kernels
    _opcheck("deform_attn", value, rest, [True, False, True])


@pytest.mark.parametrize(("coordinates", "shared"), [(2, False), (4, True)])
def test_opcheck_fused(coordinates: int, shared: bool, device: str) -> None:
    value, *rest = fused(SHAPES, coordinates, shared, D=3, dtype=torch.float32, device=device)
    deform_attn_fused(value, SHAPES, *rest)
    _opcheck("deform_attn_fused", value, rest, [True, True, False, True])


def _opcheck(name: str, value: Tensor, rest: list[Tensor], needs: list[bool]) -> None:
    operator = getattr(torch.ops.vg, name)
    torch.library.opcheck(operator, (value, SIZES, *rest))
    value, *rest = (x.detach() for x in (value, *rest))
    grad = torch.randn(operator(value, SIZES, *rest).shape, device=value.device).to(value.dtype)
    torch.library.opcheck(getattr(torch.ops.vg, f"{name}_backward"), (grad, value, SIZES, *rest, needs))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("form", ["plain", "fused"])
def test_compiles_without_graph_breaks(form: str, dynamic: bool, device: str) -> None:
    torch._dynamo.reset()
    make, call = (plain, deform_attn) if form == "plain" else (fused, deform_attn_fused)

    def function(value: Tensor, shapes: tuple[tuple[int, int], ...], *rest: Tensor) -> Tensor:
        return call(value * 2, shapes, *rest).sin()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=dynamic)
    for shapes, Q in ((SHAPES, 5), (((6, 9), (4, 3), (2, 2)), 7)):
        inputs: tuple[Any, ...] = make(shapes, Q=Q, dtype=torch.float32, device=device)
        expected, found = (f(inputs[0], shapes, *inputs[1:]) for f in (function, compiled))
        assert_near(found, expected, torch.float32)
        for one, other in zip(gradients(found, inputs, False), gradients(expected, inputs), strict=True):
            assert_near(one, other, torch.float32)
    assert counter.frame_count == (1 if dynamic else 2)  # a new resolution recompiles only if static


def test_sizes_beyond_32_bits_are_traced() -> None:
    with FakeTensorMode():
        value = torch.empty(2, 2**22, 16, 64, dtype=torch.bfloat16, requires_grad=True)
        locations, weights = torch.empty(2, 2**20, 16, 1, 4, 2), torch.empty(2, 2**20, 16, 1, 4)
        output = deform_attn(value, ((2**11, 2**11),), locations, weights)
        assert output.shape == (2, 2**20, 1024)
        assert output.dtype == torch.bfloat16
        output.sum().backward()
        assert value.grad is not None
        assert value.grad.shape == value.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_graph() -> None:
    value, *rest = (x.detach() for x in plain(SHAPES, D=32, dtype=torch.float32, device="cuda"))
    expected = deform_attn(value, SHAPES, *rest)  # also the warm-up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = deform_attn(value, SHAPES, *rest)
    output.zero_()
    graph.replay()
    assert torch.equal(output, expected)


# ---- training -----------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A layer as in a model, with all inputs from linear layers."""

    def __init__(self, dim: int = 32):
        super().__init__()
        self.value, self.offsets, self.logits = nn.Linear(dim, dim), nn.Linear(dim, 2 * 3 * 4 * 2), nn.Linear(dim, 24)

    def forward(self, tokens: Tensor, queries: Tensor, points: Tensor) -> Tensor:
        B, Q = queries.shape[:2]
        value = self.value(tokens).unflatten(-1, (2, -1))  # [B, S, 2, 16]
        offsets = self.offsets(queries).view(B, Q, 2, 3, 4, 2)
        return deform_attn_fused(value, SHAPES, points, offsets, self.logits(queries).view(B, Q, 2, 12))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, device: str) -> None:
    """The layers run in half precision; the operator computes as it does without autocast."""
    torch.manual_seed(0)
    layer = Layer().to(device)
    tokens, queries = torch.randn(2, 48, 32, device=device), torch.randn(2, 5, 32, device=device)
    points = torch.rand(2, 5, 1, 4, device=device, requires_grad=True)
    with torch.autocast(device, dtype):
        output = layer(tokens, queries, points)
        value, offsets, logits = (
            f(x) for f, x in ((layer.value, tokens), (layer.offsets, queries), (layer.logits, queries))
        )
    assert output.dtype == value.dtype == offsets.dtype == dtype
    inputs = (value.view(2, 48, 2, 16), SHAPES, points, offsets.view(2, 5, 2, 3, 4, 2), logits.view(2, 5, 2, 12))
    assert torch.equal(output, deform_attn_fused(*inputs))
    output.float().square().sum().backward()
    assert points.grad is not None
    assert points.grad.dtype == torch.float32
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_locations_keep_float32_under_autocast(device: str) -> None:
    shapes = ((1, 301),)
    value, locations, weights = plain(shapes, H=1, D=32, dtype=torch.bfloat16, device=device)
    with torch.autocast(device, torch.bfloat16):
        output = deform_attn(value, shapes, locations, weights)
    assert torch.equal(output, deform_attn(value, shapes, locations, weights))


def test_ddp_gives_equal_gradients(tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        layer = Layer()
        inputs = torch.randn(2, 48, 32), torch.randn(2, 5, 32), torch.rand(2, 5, 1, 2)
        layer(*inputs).sum().backward()
        expected = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
        layer.zero_grad()
        nn.parallel.DistributedDataParallel(layer)(*inputs).sum().backward()
        for parameter, grad in zip(layer.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, grad)
    finally:
        torch.distributed.destroy_process_group()


# ---- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shapes": ((5, 7), (3, 4), (1, 2))}, r"value has 48 pixels \(S\), but the levels .* have 49"),
        ({"shapes": ((5, 7), (13, 1))}, r"locations is .*it must be \[B, Q, H, L, P, 2\]"),
        ({"shapes": ((5, 7), (-3, -4), (1, 1))}, "they must be"),
        ({"shapes": torch.tensor(SHAPES)}, "shapes is a Tensor"),
        ({"shapes": (48,)}, "they must be"),
        ({"shapes": ((48, 1),) + ((0, 0),) * 16}, "at most 16"),
        ({"value": torch.zeros(2, 48, 16)}, r"value is \[2, 48, 16\]; it must be \[B, S, H, D\]"),
        ({"value": torch.zeros(2, 48, 2, 8, dtype=torch.int64)}, "value is torch.int64"),
        ({"value": torch.zeros(3, 48, 2, 8)}, r"locations is .* so \[3, 5, 2, 3, 4, 2\]"),
        ({"value": torch.zeros(2, 48, 2, 8, dtype=torch.float64)}, "must be torch.float64"),
        ({"locations": torch.zeros(2, 5, 2, 3, 4, 2).bfloat16()}, "Half precision is too coarse"),
        ({"locations": torch.zeros(2, 5, 2, 3, 4, 2).double()}, "must be torch.float32"),
        ({"locations": torch.zeros(2, 5, 2, 3, 4, 2, device="meta")}, "locations is on meta, but value is on cpu"),
        ({"locations": torch.zeros(2, 5, 2, 3, 4)}, r"locations is \[2, 5, 2, 3, 4\]"),
        ({"weights": torch.zeros(2, 5, 2, 3, 5)}, r"weights is .* so \[2, 5, 2, 3, 4\]"),
        ({"weights": torch.zeros(2, 5, 2, 3, 4, dtype=torch.int32)}, "floating dtype"),
        ({"weights": torch.zeros(2, 5, 2, 3, 4, device="meta")}, "weights is on meta"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_errors(changes: dict[str, Any], message: str) -> None:
    value, locations, weights = plain(SHAPES, dtype=torch.float32)
    given = {"value": value, "shapes": SHAPES, "locations": locations, "weights": weights}
    with pytest.raises(ValueError, match=message):
        deform_attn(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"reference_points": torch.zeros(2, 5, 3, 3)},
            r"reference_points is \[2, 5, 3, 3\]; it must be \[B, Q, L or 1",
        ),
        ({"reference_points": torch.zeros(2, 5, 2, 2)}, r"must be \[B, Q, L or 1"),
        ({"reference_points": torch.zeros(2, 5, 2)}, r"must be \[B, Q, L or 1"),
        ({"reference_points": torch.zeros(2, 5, 3, 2).half()}, "Half precision is too coarse"),
        ({"offsets": torch.zeros(2, 5, 2, 12, 2)}, r"offsets is .* \[B, Q, H, L, P, 2\]"),
        ({"logits": torch.zeros(2, 5, 2, 3, 4)}, r"logits is .* so \[2, 5, 2, 12\]"),
        ({"logits": torch.zeros(2, 5, 2, 12, device="meta")}, "logits is on meta"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_errors_of_the_fused_form(changes: dict[str, Any], message: str) -> None:
    given = dict(
        zip(("value", "reference_points", "offsets", "logits"), fused(SHAPES, dtype=torch.float32), strict=True)
    )
    with pytest.raises(ValueError, match=message):
        deform_attn_fused(shapes=SHAPES, **{**given, **changes})
