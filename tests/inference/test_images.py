"""Arguments that are not images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import vg
from tests.inference.bright import Bright
from vg.errors import DataError

TENSOR = torch.zeros(3, 8, 8)


@pytest.mark.parametrize(
    ("images", "number", "name"),
    [
        (TENSOR, 0, "Tensor"),
        ([np.zeros((8, 8, 3), np.uint8), TENSOR], 1, "Tensor"),
        (iter([np.zeros((8, 8, 3), np.uint8), TENSOR]), 1, "Tensor"),
        ([None], 0, "NoneType"),
    ],
    ids=["tensor", "list", "stream", "none"],
)
def test_other_types_are_refused(images: Any, number: int, name: str) -> None:
    message = rf"image {number} is of type {name}; expected a path, a URL, a PIL image, .* NumPy array \[H, W, 3\]"
    with pytest.raises(DataError, match=message):
        list(vg.Grounder(Bright(), device="cpu")(images, "square"))
