"""The contenders of deform_attn.py: every implementation of deformable attention that is installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vg.ops import backend_info, deform_attn, deform_attn_fused, reference


@dataclass(frozen=True)
class Case:
    """Inputs of one layer; `inputs` are (value, locations, weights), or (value, offsets, logits) for the module."""

    name: str
    shapes: tuple[tuple[int, int], ...]
    points: Tensor  # reference points [B, Q, 1, 2 | 4]
    inputs: tuple[Tensor, ...]
    grad: Tensor  # of the output, [B, Q, H * D]
    module: bool

    def prepared(self, value: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return value, locations and weights, for kernels that do not compute them."""
        if not self.module:
            return value, *rest
        offsets, logits = rest
        locations = reference.sampling_locations(self.shapes, self.points, offsets)
        return value, locations, reference.attention_weights(logits, len(self.shapes))


Contender = Callable[..., Tensor]


class Explicit(torch.autograd.Function):
    """A differentiable function made of a forward and a backward function."""

    @staticmethod
    def forward(ctx: Any, forward: Callable[..., Tensor], backward: Callable[..., Any], *inputs: Tensor) -> Tensor:
        ctx.derivative = backward
        ctx.save_for_backward(*inputs)
        return forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.derivative(grad.contiguous(), *ctx.saved_tensors)


def ours(case: Case, *inputs: Tensor) -> Tensor:
    if not case.module:
        return deform_attn(inputs[0], case.shapes, *inputs[1:])
    return deform_attn_fused(inputs[0], case.shapes, case.points, *inputs[1:])


def plain_pytorch(case: Case, *inputs: Tensor) -> Tensor:
    def forward(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return reference.forward(value, case.shapes, locations, weights)

    def backward(grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        return reference.backward(grad, value, case.shapes, locations, weights)

    return Explicit.apply(forward, backward, *case.prepared(*inputs))


def tables(case: Case) -> tuple[Tensor, Tensor]:
    """Return shapes [L, 2] and first tokens [L] as tensors, which the other implementations need."""
    return _tables(case.shapes, case.grad.device)


@cache  # a model makes them once for all layers; making them waits for a GPU, so it must not be timed
def _tables(shapes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    sizes = torch.tensor(shapes, device=device)
    ends = sizes.prod(1).cumsum(0)
    return sizes, torch.cat((ends.new_zeros(1), ends[:-1]))


def transformers_module() -> Contender:
    name = "transformers.models.grounding_dino.modeling_grounding_dino"
    module = importlib.import_module(name).MultiScaleDeformableAttention()

    def run(case: Case, *inputs: Tensor) -> Tensor:
        value, *rest = case.prepared(*inputs)
        locations, weights = (x.to(value.dtype) for x in rest)  # the same dtype for all, as in a model of that dtype
        shapes, starts = tables(case)
        return module(value, shapes, list(case.shapes), starts, locations, weights, 64)

    return run


def official(package: str) -> Contender:
    """Return the CUDA kernel of Deformable DETR, which Grounding DINO has a copy of."""
    kernel = importlib.import_module(package)

    def run(case: Case, *inputs: Tensor) -> Tensor:
        shapes, starts = tables(case)

        def forward(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            return kernel.ms_deform_attn_forward(value, shapes, starts, locations, weights, 64)

        def backward(grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor) -> Any:
            return kernel.ms_deform_attn_backward(value, shapes, starts, locations, weights, grad, 64)

        return Explicit.apply(forward, backward, *(x.contiguous() for x in case.prepared(*inputs)))

    return run


def msda_triton() -> Contender:
    # Not the package's public function, which falls back to grid_sample silently if the kernel fails.
    kernel = importlib.import_module("msda_triton.frontend").triton_multiscale_deformable_attention

    def run(case: Case, *inputs: Tensor) -> Tensor:
        value, locations, weights = case.prepared(*inputs)
        return kernel(value, tables(case)[0], locations, weights, "zeros", False).flatten(2)

    return run


def flash_deform_attn() -> Contender:
    """Return the operator of DCNv4, which includes the softmax and can therefore be measured only as a module."""
    function = importlib.import_module("DCNv4.functions").FlashDeformAttnFunction

    def run(case: Case, value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        if not case.module:
            raise ValueError("needs logits")
        locations = reference.sampling_locations(case.shapes, case.points, offsets).flatten(-3).half()
        packed = torch.cat((locations, logits.half()), -1)
        return function.apply(value.half(), *tables(case), packed, 64, offsets.shape[4]).to(value.dtype)

    return run


def contenders(device: str) -> dict[str, Contender]:
    found: dict[str, Contender] = {}
    backend = backend_info()[device].name
    if backend != "reference":
        found[f"vg {backend}"] = ours
    found["vg reference"] = plain_pytorch
    peers: dict[str, Callable[[], Contender]] = {
        "transformers": transformers_module,
        "official": lambda: official("MultiScaleDeformableAttention"),
        "official (groundingdino)": lambda: official("groundingdino._C"),
        "msda-triton": msda_triton,
        "FlashDeformAttn": flash_deform_attn,
    }
    for name, make in peers.items():
        if device == "cpu" and name != "transformers":
            continue  # the other packages have CUDA kernels only
        try:
            found[name] = make()
        except (ImportError, AttributeError) as error:
            print(f"{name} is not installed: {error}")
    return found
