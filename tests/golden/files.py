"""Load values recorded from the official implementation: from this folder, or the complete set in ../shared."""

from __future__ import annotations

import json
import lzma
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file
from torch import Tensor

FOLDER = Path(__file__).parent
SHARED = Path(__file__).parents[3] / "shared" / "data" / "golden_official"  # beside the repository
SEED = 72  # of the recorded weights
HEADS = [f"{prefix}bbox_embed.{layer}." for prefix in ("transformer.decoder.", "") for layer in range(3)]


def recorded_path(name: str) -> Path:
    """Return the path of a recorded file in this folder or in ../shared; skip the test where neither has it."""
    for path in (FOLDER / name, SHARED / name):
        if path.exists():
            return path
    pytest.skip(f"{name} is not in tests/golden, and there is no {SHARED}")


def recorded_json(name: str) -> Any:
    return json.loads(recorded_path(name).read_text(encoding="utf-8"))


def recorded_tensors(name: str) -> dict[str, Tensor]:
    """Return the tensors of a recorded safetensors file (`case_a`), which is compressed in this folder."""
    compressed = FOLDER / f"{name}.safetensors.xz"
    if compressed.exists():
        return load(lzma.decompress(compressed.read_bytes()))
    return load_file(recorded_path(f"{name}.safetensors"))


def draw_weights() -> dict[str, Tensor]:
    """Return the recorded weights under their official names, drawn again from the recorded seed.

    The recording drew all tensors from one generator, in the order of weights.json: 5 MB of random bits, which do not
    compress. The few tensors that were changed after they were drawn are in weights_recorded.safetensors.xz.

    Raises:
        AssertionError: a tensor has another sum than the recorded one (this torch draws other random numbers).
    """
    generator, changed = torch.Generator().manual_seed(SEED), recorded_tensors("weights_recorded")
    weights: dict[str, Tensor] = {}
    for row in recorded_json("weights.json"):
        name, shape = row["name"], row["shape"]
        if row["draw"] == "uniform":
            weight = torch.rand(shape, generator=generator) * 0.5 + 0.5
        else:
            weight = torch.randn(shape, generator=generator)
            weight = weight / math.sqrt(row["divided_by_sqrt"]) if "divided_by_sqrt" in row else weight * row["factor"]
        weights[name] = weight = changed.get(name, weight)
        found, squares = weight.double().sum().item(), weight.double().square().sum().item()
        assert found == pytest.approx(row["sum"], rel=1e-5, abs=1e-5), name
        assert squares == pytest.approx(row["sum_of_squares"], rel=1e-6), name
    for name in [name for name in weights if name.startswith(HEADS[0])]:
        weights |= {head + name.removeprefix(HEADS[0]): weights[name] for head in HEADS}  # one head under six names
    return weights
