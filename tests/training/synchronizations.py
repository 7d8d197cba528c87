"""Finds what makes the host wait for the device, on a machine without one: the meta device stands for a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vg

aten = torch.ops.aten
# Their results have a size, or are a number, that depends on values.
READS = {aten._local_scalar_dense, aten.item, aten.equal, aten.is_nonzero}
SIZES = {
    *(aten.nonzero, aten.masked_select, aten.unique_consecutive, aten.unique_dim, aten._unique, aten._unique2),
    *(aten.repeat_interleave, aten.bincount),
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


@contextmanager
def synchronizations() -> Iterator[list[str]]:
    """Yield a list of the operations in the block that would wait for a GPU, each as "vg/file.py function operation".

    Values that are read from the device are zeros, so the block runs to its end. A copy to the device waits unless it
    is non_blocking.
    """
    found: list[str] = []
    autocast = torch.autocast
    on_cpu = patch("torch.autocast", lambda kind, **options: autocast("cpu" if kind == "meta" else kind, **options))
    with on_cpu, _Functions(found), _Operations(found):
        yield found


class _Operations(TorchDispatchMode):
    """Sees reads of values, sizes that depend on values, and copies between devices, in the backward pass, too."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operation = func.overloadpacket
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if operation in READS | SIZES and any(x.is_meta for x in tensors):
            self.found.append(_where(str(operation)))
            if operation in READS:
                return torch.zeros((), dtype=tensors[0].dtype).item()
        indices = [x for x in args[1] if x is not None and x.is_meta] if operation in INDEXING else []
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            self.found.append(_where("index by a mask"))
        if operation is aten._to_copy:
            target = torch.device(kwargs.get("device") or args[0].device).type
            if target != args[0].device.type and (target == "cpu" or not kwargs.get("non_blocking")):
                self.found.append(_where(f"copy to {'the host' if target == 'cpu' else 'the device'}"))
            if target == "cpu" and args[0].is_meta:
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if operation is aten.copy_ and args[0].is_meta != args[1].is_meta:
            if args[1].is_meta:
                self.found.append(_where("copy to the host"))
                return args[0].zero_()
            if not (args[2:] or (kwargs.get("non_blocking"),))[0]:
                self.found.append(_where("copy to the device"))
        return func(*args, **kwargs)


class _Functions(TorchFunctionMode):
    """Sees values of the host that become a tensor on the device, of which the meta device makes no copy."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].is_meta:
            indices = args[1] if isinstance(args[1], tuple) else args[1:2]
            if any(isinstance(index, (list, tuple)) for index in indices):
                self.found.append(_where("index by a list"))
            if any(isinstance(index, Tensor) and not index.is_meta for index in indices):
                self.found.append(_where("index by a tensor of the host"))
        result = func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and result.is_meta:
            self.found.append(_where("tensor of host values"))
        return result


def _where(operation: str) -> str:
    """Name an operation and the function of vg that it is called in; an outer function of vg if torch calls it."""
    frame = sys._getframe(1)
    root = Path(vg.__file__).parent
    while frame is not None and not frame.f_code.co_filename.startswith(f"{root}/"):
        frame = frame.f_back  # type: ignore[assignment]
    place = f"{Path(frame.f_code.co_filename).relative_to(root.parent)} {frame.f_code.co_name} " if frame else ""
    return place + operation
