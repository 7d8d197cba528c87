"""Compare an exported model with PyTorch: boxes and scores of images of several sizes, phrases and batches.

Grounding DINO starts from the image tokens with the best scores, and learns one query per rank. Where two tokens score
nearly the same, rounding decides which is first, and all that follows depends on it. So the two are compared in two
steps: the scores of the tokens that each selects, and the boxes that both find from the tokens of the exported model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from vg.inference.onnx_backend import OnnxBackend
from vg.inference.result import Boxes
from vg.inference.torch_backend import TorchBackend
from vg.models.base import GroundingModel
from vg.models.grounding_dino import query_selection
from vg.models.grounding_dino.model import GroundingDino
from vg.types import TextArrays

SIZES = ((120, 160), (200, 150), (180, 180))  # (height, width) of images, which are resized as the model needs
PHRASES = (
    ("dog",),
    ("the red circle on the left", "cat", "a small blue square"),
    tuple(f"{color} {shape}" for color in ("red", "green", "blue") for shape in ("circle", "square", "star", "ring")),
)
BATCHES = (1, 2)


class Difference(NamedTuple):
    """Largest differences of one case."""

    size: tuple[int, int]
    num_phrases: int
    batch: int
    boxes: float  # in 0..1 of the image
    scores: float
    selection: float  # of the logits of the selected tokens, relative to those above 1; 0 without a selection

    @property
    def largest(self) -> float:
        return max(self.boxes, self.scores, self.selection)

    def __str__(self) -> str:
        height, width = self.size
        case = f"{width} x {height}, {self.num_phrases} phrases, batch of {self.batch}"
        return f"{case}: boxes differ by {self.boxes:.1e}, scores by {self.scores:.1e}"


def differences(
    expected: TorchBackend,
    file: Path,
    sizes: Iterable[tuple[int, int]] = SIZES,
    phrases: Iterable[tuple[str, ...]] = PHRASES,
    batches: Iterable[int] = BATCHES,
) -> Iterator[Difference]:
    """Yield the differences of all combinations of sizes, phrases and batches, on noise."""
    random = np.random.default_rng(0)
    exported = SelectionBackend(file)
    for size, words, batch in product(sizes, phrases, batches):
        images = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in range(batch)]
        exported.selected.clear()
        found = exported.predict(exported.prepare(images, [words] * batch))
        with _selecting(exported.selected) as selection, _all_boxes(expected.model):
            candidates = expected.predict(expected.prepare(images, [words] * batch))
        boxes, scores = zip(
            *(largest_difference(*pair, size) for pair in zip(found, candidates, strict=True)), strict=True
        )
        yield Difference(size, len(words), batch, max(boxes), max(scores), max(selection, default=0.0))


@contextmanager
def _selecting(tokens: list[np.ndarray]) -> Iterator[list[float]]:
    """Select these tokens in PyTorch, [B, Q] per prompt; yields the differences of their logits from the best ones."""
    found: list[float] = []
    rows = iter([indices for image in zip(*tokens, strict=True) for indices in image])  # by image, then by prompt

    def select(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        best = scores.topk(count, dim=1).values
        indices = torch.from_numpy(np.stack([next(rows) for _ in scores])).to(scores.device)  # [R, Q]
        values = scores.gather(1, indices)
        relative = (values - best).abs() / best.abs().clamp(min=1)
        relative = relative.nan_to_num(nan=torch.inf).where(values != best, 0)  # equal infinities do not differ
        found.append(float(relative.max()))
        return values, indices

    with patch.object(query_selection, "best_tokens", select):
        yield found


@contextmanager
def _all_boxes(model: GroundingModel) -> Iterator[None]:
    """Let a Grounding DINO predict every query for every phrase."""
    if isinstance(model, GroundingDino):
        config = replace(model.config.predict, top_k=sys.maxsize, threshold=0.0, nms=None)
        with patch.object(model.config, "predict", config):
            yield
    else:
        yield


class SelectionBackend(OnnxBackend):
    """A model in ONNX Runtime that returns all boxes, and keeps which image tokens Grounding DINO selects.

    Raises:
        The errors of OnnxBackend.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self.settings = replace(self.settings, threshold=0.0, nms=None)
        self.selected: list[np.ndarray] = []  # [B, Q] int64 per prompt
        if self.takes_many:
            self.session = _with_selection(path)

    def run(self, pixels: np.ndarray, text: TextArrays) -> list[np.ndarray]:
        boxes, scores, phrase_ids, *selected = super().run(pixels, text)
        self.selected += selected
        return [boxes, scores, phrase_ids]


def _with_selection(path: Path) -> Any:
    """Open a network with one more output: the indices of its first top-k."""
    import onnx
    import onnxruntime

    model = onnx.load(path)
    indices = next(node.output[1] for node in model.graph.node if node.op_type == "TopK")
    model.graph.output.append(onnx.helper.make_tensor_value_info(indices, onnx.TensorProto.INT64, None))
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def largest_difference(found: Boxes, candidates: Boxes, size: tuple[int, int]) -> tuple[float, float]:
    """Return the largest difference of boxes (0..1 of an image of this height and width) and of scores.

    Scores are compared rank by rank. Each box is compared with the most similar candidate of its phrase, because ranks
    are arbitrary among equal scores.
    """
    count = len(found.scores)
    if count > len(candidates.scores) or (not count and len(candidates.scores)):
        return np.inf, np.inf
    scale = np.array((*size[::-1], *size[::-1]), np.float32)
    worst = 0.0
    for phrase_id in np.unique(found.phrase_ids):
        a, b = (Boxes(*(x[boxes.phrase_ids == phrase_id] for x in boxes)) for boxes in (found, candidates))
        distance = np.abs(a.boxes[:, None] / scale - b.boxes / scale).max(axis=-1)  # [K, C]
        distance = np.maximum(distance, np.abs(a.scores[:, None] - b.scores))
        worst = max(worst, float(distance.min(axis=1, initial=np.inf).max()))
    return worst, float(np.abs(found.scores - candidates.scores[:count]).max(initial=0.0))
