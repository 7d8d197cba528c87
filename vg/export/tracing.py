"""What torch.export cannot trace with symbolic image sizes is replaced during tracing by equal, traceable code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from inspect import unwrap
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.models.swin import modeling_swin

import vg.ops  # noqa: F401 - defines the operator
from vg.export.deform_attn import Form, deform_attn_fused


@contextmanager
def traceable(form: Form) -> Iterator[None]:
    """Replace vg's operator by standard ones, and what would fix the sizes of the example in the program."""
    with ExitStack() as stack:
        for network, pad in (
            (modeling_swin.SwinPatchEmbeddings, _pad_image),
            (modeling_swin.SwinPatchMerging, _pad_to_even),
            (modeling_swin.SwinLayer, _pad_to_windows),
        ):
            stack.enter_context(patch.object(network, "maybe_pad", pad))
        stack.enter_context(_Operators(form))
        yield


class _Operators(TorchFunctionMode):
    """Replaces operators while a model runs."""

    def __init__(self, form: Form):
        super().__init__()
        self.form = form

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.vg.deform_attn_fused, torch.ops.vg.deform_attn_fused.default):
            with self:  # it uses some of the following
                return deform_attn_fused(self.form, *args)
        # These two compare sizes with those of the example.
        if function is torch.baddbmm:
            bias, a, b = args
            return bias + a @ b
        if function is torch.Tensor.take_along_dim:
            x, index, dim = args
            shape = list(x.shape)
            shape[dim] = index.shape[dim]
            return x.gather(dim, index.expand(shape))
        if function is torch.Tensor.new_tensor:  # symbols would become the sizes of the example
            return _stacked(args[1], args[0].dtype)
        # The layout of its output depends on the kernel. On some CPUs it has a wrapper (vg.machine).
        if function is unwrap(F.scaled_dot_product_attention):
            return _attention(*args, **kwargs or {})
        return function(*args, **kwargs or {})


def _stacked(values: Any, dtype: torch.dtype) -> Tensor:
    if isinstance(values, (list, tuple)):
        return torch.stack([_stacked(value, dtype) for value in values])
    return torch.scalar_tensor(values, dtype=dtype)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Compute F.scaled_dot_product_attention without dropout."""
    scores = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.mT
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min) if is_bool else scores + attn_mask
    return scores.softmax(dim=-1) @ value


# Padding of Swin without a branch on the size. Written as a multiple, sizes stay short expressions: as a remainder,
# tracing takes more than ten minutes.


def _missing(size: Any, multiple: int) -> Any:
    return (size + multiple - 1) // multiple * multiple - size


def _pad_image(self: nn.Module, x: Tensor, height: Any, width: Any) -> Tensor:
    rows, columns = self.patch_size  # type: ignore[misc]
    return F.pad(x, (0, _missing(width, columns), 0, _missing(height, rows)))


def _pad_to_even(self: nn.Module, x: Tensor, height: Any, width: Any) -> Tensor:
    return F.pad(x, (0, 0, 0, _missing(width, 2), 0, _missing(height, 2)))


def _pad_to_windows(self: nn.Module, x: Tensor, height: Any, width: Any) -> tuple[Tensor, tuple[int, ...]]:
    window: Any = self.window_size
    padded = F.pad(x, (0, 0, 0, _missing(width, window), 0, _missing(height, window)))
    return padded, (0, 0, 0, 1, 0, 1)  # not zero: always cut the padding off again
