"""Values that hold tensors, and move to a device together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # keeps `import vg` and the configuration free of torch
    from torch import Tensor
    from typing_extensions import Self

ALIGNMENT = 256  # bytes; alignment of CUDA allocations


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor in a Movable, a NamedTuple or a list."""
    from torch import Tensor

    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Movable):
        return replace(value, **{name: map_tensors(entry, function) for name, entry in vars(value).items()})
    if isinstance(value, list):
        return [map_tensors(entry, function) for entry in value]
    return value._make(map_tensors(entry, function) for entry in value) if hasattr(value, "_make") else value


@dataclass(frozen=True)
class Movable:
    """A value that holds tensors, which move to a device together."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy in which the function has been applied to every tensor."""
        return map_tensors(self, function)

    def to(self, device: Any, non_blocking: bool = False) -> Self:
        """Return a copy on a device; tensors that share memory, as after `pack`, are copied at once."""
        import torch

        sharing = Counter(tensor.untyped_storage()._cdata for tensor in self.tensors())
        moved: dict[int, Tensor] = {}  # [bytes] of each memory that tensors share

        def move(tensor: Tensor) -> Tensor:
            memory = tensor.untyped_storage()
            if sharing[memory._cdata] == 1:
                return tensor.to(device, non_blocking=non_blocking)
            if memory._cdata not in moved:
                whole = tensor.new_empty(0, dtype=torch.uint8).set_(memory)
                moved[memory._cdata] = whole.to(device, non_blocking=non_blocking)
            layout = tensor.storage_offset(), tensor.size(), tensor.stride()
            return tensor.new_empty(0, device=device).set_(moved[memory._cdata].untyped_storage(), *layout)

        return self.map(move)

    def pin_memory(self) -> Self:
        """Return a packed copy in page-locked memory; a DataLoader with pin_memory=True calls this."""
        return self.pack(pin_memory=True)

    def pack(self, pin_memory: bool = False) -> Self:
        """Return a copy whose tensors are parts of one block of memory."""
        import torch

        ends = [0, *accumulate(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in self.tensors())]
        block = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=pin_memory)
        starts = iter(ends)

        def place(tensor: Tensor) -> Tensor:
            start = next(starts)
            return block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)

        return self.map(place)

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in the order of `map`."""
        found: list[Tensor] = []
        self.map(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        return found
