"""Trace a model with torch.export: programs of standard operators, with dynamic sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.modules.module import register_module_forward_hook
from tqdm import tqdm

from vg.errors import PredictionError
from vg.export.deform_attn import Form
from vg.export.networks import Detections, EndToEnd, Networks, networks
from vg.export.parity import largest_difference
from vg.export.tracing import traceable
from vg.files import replacing
from vg.inference.result import Boxes
from vg.models.base import GroundingModel

AXES: dict[str, tuple[str | int, ...]] = {
    "images": ("images", "channels", "height", "width"),
    "token_ids": ("prompts", "tokens"),
    "mask": ("prompts", "tokens"),
    "phrase_tokens": ("prompts", "phrases", "tokens"),
}
# No level of a feature pyramid of this size is a multiple of a window, so that padding is traced as well. Batches of
# one would be traced as constants.
EXAMPLE = {"images": 2, "channels": 3, "height": 150, "width": 236, "prompts": 2, "tokens": 9, "phrases": 4}
OTHER_SIZES = {"images": 1, "height": 97, "width": 64, "prompts": 1, "tokens": 5, "phrases": 1}
TOLERANCE = 1e-3  # of scores and of boxes in 0..1


class ExportedNetwork(NamedTuple):
    """A network to export."""

    network: nn.Module
    inputs: dict[str, tuple[str | int, ...]]  # name -> the names of its axes, or their size
    outputs: tuple[str, ...]
    fixed: Mapping[str, int]  # axes that are not dynamic -> their size

    def example(self, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Draw inputs; axes are those of `fixed`, then `sizes`, then EXAMPLE."""
        sizes = EXAMPLE | dict(sizes) | dict(self.fixed)
        generator = torch.Generator().manual_seed(0)
        values = {}
        for name, axes in self.inputs.items():
            shape = [axis if isinstance(axis, int) else sizes[axis] for axis in axes]
            if name == "token_ids":
                values[name] = torch.randint(5, 100, shape, generator=generator)
            elif name in ("mask", "phrase_tokens", "text_sub_sentences"):
                values[name] = torch.ones(shape, dtype=torch.bool)
            else:
                values[name] = torch.randn(shape, generator=generator)
        return values


def parts(model: GroundingModel, split: bool) -> dict[str, ExportedNetwork]:
    """Return the networks of a model: "detector", and with `split` also "text"."""
    found: Networks = networks(model.eval())
    tokens, phrases = ({name: AXES[name] for name in names} for names in (("token_ids", "mask"), found.phrase_tokens))
    if not split:
        network = EndToEnd(found.text, found.detector)
        whole = ExportedNetwork(
            network, {"images": AXES["images"], **tokens, **phrases}, Detections._fields, found.fixed
        )
        return {"detector": whole}
    text = ExportedNetwork(found.text, tokens, tuple(found.features), {})
    with torch.no_grad():
        width = found.text(*text.example({}).values())[0].shape[-1]
    features = {name: axes if len(axes) > 2 else (*axes, width) for name, axes in found.features.items()}
    inputs: dict[str, tuple[str | int, ...]] = {"images": AXES["images"], "mask": AXES["mask"], **phrases, **features}
    return {"detector": ExportedNetwork(found.detector, inputs, Detections._fields, found.fixed), "text": text}


def trace(part: ExportedNetwork, form: Form, max_tokens: int) -> ExportedProgram:
    """Trace a network; its program takes any number of images, prompts, phrases and tokens, and any image size."""
    limits = {"tokens": {"max": max_tokens}}
    names = {axis for axes in part.inputs.values() for axis in axes if isinstance(axis, str)}
    # The lower bound of an image side follows from the pyramid, so that torch determines it.
    dims: dict[str, Any] = {
        axis: Dim.DYNAMIC if axis in ("height", "width") else Dim(axis, **limits.get(axis, {})) for axis in names
    }
    dynamic = {axis: dim for axis, dim in dims.items() if axis not in part.fixed and axis != "channels"}
    shapes = tuple(
        {index: dynamic[axis] for index, axis in enumerate(axes) if axis in dynamic} for axes in part.inputs.values()
    )
    network, inputs = _Flat(part.network), tuple(part.example({}).values())
    with torch.no_grad(), _progress(network, inputs), traceable(form):
        return torch.export.export(network, inputs, dynamic_shapes=(shapes,), strict=False)


@contextmanager
def _progress(network: nn.Module, inputs: tuple[Tensor, ...]) -> Iterator[None]:
    """Show how many of the modules that the network calls have been traced, and the remaining time."""
    calls: list[nn.Module] = []
    with register_module_forward_hook(lambda module, *_: calls.append(module)):
        network(*inputs)
    with tqdm(total=len(calls), desc="trace", unit="module", leave=False) as bar:

        def advance(*_: object) -> None:
            bar.update()

        with register_module_forward_hook(advance):
            yield


class _Flat(nn.Module):
    """A network that takes its inputs as one list, which makes the shapes of all of them one list as well."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.network(*inputs))


def save_program(model: GroundingModel, path: Path, form: Form) -> float:
    """Write a program that `torch.export.load` reads; return its largest difference from the model.

    Run it with `torch.export.load(path).module(check_guards=False)`; the guards are those of the traced example.

    Raises:
        PredictionError: the difference is above TOLERANCE.
    """
    part = parts(model, split=False)["detector"]
    program = trace(part, form, max_tokens(model))
    inputs = tuple(part.example(OTHER_SIZES).values())
    with torch.no_grad():
        found, expected = (_by_image(run(*inputs)) for run in (program.module(check_guards=False), part.network))
    difference = max(max(largest_difference(*pair, (1, 1))) for pair in zip(found, expected, strict=True))
    check(difference)
    with replacing(path, is_file=True) as partial:
        torch.export.save(program, partial.with_suffix(".pt2"))
        partial.with_suffix(".pt2").rename(partial)
    return difference


def _by_image(found: tuple[Tensor, ...]) -> list[Boxes]:
    return [Boxes(*(values.numpy() for values in image)) for image in zip(*found, strict=True)]


def max_tokens(model: GroundingModel) -> int:
    """Return the longest prompt, which the position embeddings of the text encoder may limit further."""
    config = model.text.network.config  # type: ignore[union-attr]
    return min(model.text_spec.max_tokens, getattr(config, "max_position_embeddings", model.text_spec.max_tokens))


def check(difference: float) -> None:
    """Raise PredictionError if a difference is above TOLERANCE."""
    if not difference <= TOLERANCE:
        raise PredictionError(
            f"the exported model differs from PyTorch by {difference:.2g}, more than {TOLERANCE:g}; nothing was written"
        )
