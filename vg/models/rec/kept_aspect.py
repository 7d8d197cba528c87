"""Image sizes in whole cells of an encoder at nearly the aspect ratio of the image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

from vg.types import ImageSpec


@dataclass(frozen=True)
class KeptAspectImage(ImageSpec):
    """Resize to as many cells as a square of `side` pixels has, or slightly fewer, close to the aspect ratio."""

    side: int
    stride: int  # pixels per side of a cell, at most `side`

    def resized(self, height: int, width: int, shortest: int | None = None) -> tuple[int, int]:
        """Return multiples of the stride; of the nearest ones, those with the nearest aspect ratio."""
        max_cells = (self.side // self.stride) ** 2
        exact = math.sqrt(max_cells * height / width), math.sqrt(max_cells * width / height)  # rows, columns
        near = [{min(max(1, side), max_cells) for side in (math.floor(x), math.ceil(x))} for x in exact]
        grids = [(rows, columns) for rows, columns in product(*near) if rows * columns <= max_cells]
        rows, columns = min(grids, key=lambda grid: abs(math.log(grid[0] * width / (grid[1] * height))))
        return rows * self.stride, columns * self.stride
