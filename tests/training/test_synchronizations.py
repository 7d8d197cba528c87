"""A training step makes the host wait for the device once, for the costs of the matcher, and a step of rec never."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from tests.cache.feature_data import cached_config, write_encoders, write_expressions
from tests.conftest import HEAD, TEXT, TINY
from tests.models.grounding_dino.tiny import tiny_config as tiny_grounding_dino
from tests.training.synchronizations import synchronizations
from vg.cache.build import build_cache
from vg.config import RunConfig
from vg.losses import matcher
from vg.models.base import check_finite, on_host
from vg.models.grounding_dino.config import BertConfig, DenoisingConfig, ImageConfig
from vg.movable import map_tensors
from vg.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]


MATCHING = ["vg/losses/matcher.py _to_host copy to the host"]
POOLED = {"name": "pooled", "width": 64, "layers": 2, "heads": 2, "feedforward": 128}


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use the GPU, if there is one: other tests do not."""
    if not torch.cuda.is_available():
        yield
        return
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def detection(make: MakeConfig, mix_sizes: bool) -> RunConfig:
    """Images of several sizes, with denoising queries, dropout and the losses of all layers."""
    scenes = {"name": "shapes", "split": "train", "view": "detection", "image_size": 64, "size": 20}
    config = make(data={"train": scenes, "eval": scenes, "augment": {"resize": {"shortest": [48, 64], "crop": 0.5}}})
    config.model = tiny_grounding_dino(
        text=BertConfig(architecture=TEXT),
        image=ImageConfig(shortest=64, longest=120, mix_sizes=mix_sizes),
        denoising=DenoisingConfig(num_queries=6, num_labels=8),
        dropout=0.1,
        fusion_dropout=0.1,
        fusion_drop_path=0.1,
    )
    return config


@contextmanager
def on_gpu(trainer: Trainer) -> Iterator[list[str]]:
    """Raise at every synchronization with the GPU but that of the matcher, which is counted."""
    found, to_host = [], matcher._to_host

    def counted(costs: Tensor) -> Tensor:
        found.extend(MATCHING)
        torch.cuda.set_sync_debug_mode("default")
        try:
            return to_host(costs)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matcher, "_to_host", counted)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def synchronizations_of_a_step(config: RunConfig) -> list[str]:
    trainer = Trainer(config)
    trainer.model.train()
    batches = next(trainer.data.steps(0, 0))
    trainer.model(batches[0])  # loads frozen encoders
    if trainer.accelerator.device.type == "cuda":
        trainer.step(batches)  # allocates page-locked memory and loads kernels
        with on_gpu(trainer) as found:
            trainer.step(batches)
        return found
    trainer.accelerator.state.device = torch.device("meta")
    trainer.unwrapped_model.to("meta")
    with synchronizations() as found:
        trainer.step([batch.pack().to("meta", non_blocking=trainer.accelerator.non_blocking) for batch in batches])
    return found


ON_META = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: torch.zeros(2).to(x.device),
    "copy_ to the host": lambda x: torch.zeros(3, 4).copy_(x),
    "copy_ to the device": lambda x: x.copy_(torch.zeros(3, 4)),
    "tensor": lambda x: torch.tensor([1.0], device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "unique": lambda x: x.unique(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "index by a mask": lambda x: x[x > 0],
    "index by a list": lambda x: x[..., [0, 2]],
    "index by a tensor of the host": lambda x: x[torch.arange(2)],
    "set by a mask": lambda x: x.__setitem__(x[:, 0] > 0, torch.zeros(1, 4)),
    "repeats": lambda x: torch.arange(3, device=x.device).repeat_interleave(x[:, 0].long()),
}


@pytest.mark.parametrize("wait", ON_META.values(), ids=ON_META)
def test_the_guard_finds_what_waits(wait: Callable[[Tensor], Any]) -> None:
    x = torch.empty(3, 4, device="meta")
    with synchronizations() as found, suppress(NotImplementedError, RuntimeError):  # sizes are unknown
        wait(x)
    assert found


def test_the_guard_leaves_what_does_not_wait() -> None:
    x = torch.empty(3, 4, device="meta", requires_grad=True)
    with synchronizations() as found:
        y = x[torch.arange(2, device="meta")].masked_fill(x[:2] > 0, 1.0).sum() * 2.0
        y.backward()
        torch.zeros(3).to("meta", non_blocking=True)
        torch.full((), 1.0, device="meta")
        torch.tensor([1.0]).item()
    assert found == []


def test_a_batch_moves_without_waiting(tiny_config: MakeConfig) -> None:
    trainer = Trainer(detection(tiny_config, mix_sizes=False))
    loader = trainer.data.loader
    assert loader.collate_fn is not None
    batch = loader.collate_fn([trainer.data.dataset[index] for index in range(4)])
    assert batch.images.dtype == torch.uint8
    assert len(set(batch.sizes)) > 1
    with synchronizations() as found:
        moved = batch.pack().to("meta", non_blocking=trainer.accelerator.non_blocking)
    assert moved.images.dtype == torch.float32
    assert found == []


@pytest.mark.parametrize("mix_sizes", [False, True])
def test_detection(tiny_config: MakeConfig, mix_sizes: bool) -> None:
    assert synchronizations_of_a_step(detection(tiny_config, mix_sizes)) == MATCHING


def test_generalized_expressions(tiny_config: MakeConfig) -> None:
    """Of no object, several and one, whose numbers of boxes differ."""
    scenes = {"name": "shapes", "image_size": 64, "size": 20, "kinds": ["absent", "several", "attribute"]}
    model = TINY | {"text": {"architecture": TEXT}, "head": HEAD | {"objects": "any"}}
    assert synchronizations_of_a_step(tiny_config(model=model, data={"train": scenes, "eval": scenes})) == []


@pytest.mark.parametrize("objects", ["one", "any"])
def test_evaluations_wait_as_often_for_a_large_batch(tiny_config: MakeConfig, objects: str) -> None:
    """For the boxes, their scores, and two types of numbers of the targets; not for every expression."""
    model = TINY | {"text": {"architecture": TEXT}, "head": HEAD | {"objects": objects}}
    types = ["absent", "several", "attribute"] if objects == "any" else ["attribute"]
    scenes = {"name": "shapes", "image_size": 64, "size": 20, "kinds": types}
    trainer = Trainer(tiny_config(model=model, data={"train": scenes, "eval": scenes}))
    dataset = trainer.evaluator.datasets[0]
    (batch, *_) = dataset.loader
    output = trainer.unwrapped_model.eval()(batch)
    dataset.metric.to("meta")
    dataset.metric.reset()
    move = lambda tensor: tensor.to("meta")  # noqa: E731
    with synchronizations() as found:
        predictions = on_host(trainer.unwrapped_model.predict(map_tensors(output, move), batch))
        check_finite(predictions, trainer.unwrapped_model)
        dataset.metric.update(predictions, on_host([target.map(move) for target in batch.targets]))
    assert len(batch) == 5
    assert len([name for name in found if "copy to the device" not in name]) == 4, found


@pytest.mark.parametrize("head", [HEAD, POOLED], ids=["dense", "pooled"])
def test_expressions(tiny_config: MakeConfig, head: dict[str, Any]) -> None:
    assert synchronizations_of_a_step(tiny_config(model=TINY | {"text": {"architecture": TEXT}, "head": head})) == []


@pytest.mark.parametrize("head", [HEAD, POOLED], ids=["dense", "pooled"])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("settings", [{}, {"keep_aspect": True, "image_size": 64}], ids=["stretched", "kept aspect"])
def test_frozen_encoders(tmp_path: Path, head: dict[str, Any], cached: bool, settings: dict[str, Any]) -> None:
    """Three expressions of an image are in a batch and share it, or its features if these are read from a cache."""
    write_expressions(tmp_path)
    write_encoders(tmp_path)
    data = {"batch_size": 15 if settings else 6, "expressions_per_image": 3}  # 15 are all images: several grids
    config = cached_config(tmp_path, {} if cached else None, data=data, model={"head": head} | settings)
    if cached:
        build_cache(config)
    assert synchronizations_of_a_step(config) == []
