"""Compiled layers: the losses, gradients and weight names of the eager ones, and no recompilation for other sizes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.grounding_dino.tiny import batch_of, sample, tiny_model
from tests.models.grounding_dino.tiny import tiny_config as tiny_grounding_dino
from tests.training.test_data import write_coco
from vg.config import RunConfig
from vg.errors import ConfigError
from vg.training.trainer import Trainer
from vg.types import LossName

MakeConfig = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def without_compiled_code() -> None:
    torch._dynamo.reset()


@pytest.fixture
def make(tiny_config: MakeConfig, tmp_path: Path) -> MakeConfig:
    """Training of two encoder and two decoder layers in batches of one size each."""

    def make(output: str, model: dict[str, Any], **optim: Any) -> RunConfig:
        data = {"name": "coco", "path": write_coco(tmp_path / "data", "train", range(1, 15))}
        data = {"train": data, "eval": data, "batch_size": 2, "group_by_aspect_ratio": True, "one_size": True}
        train = {"output": str(tmp_path / output), "compile": output == "compiled"}
        optim |= {"lr": 0.0}  # the same weights at every step: AdamW amplifies rounding errors of zero gradients
        config = tiny_config(data=data, train=train, optim=optim)
        config.model = tiny_grounding_dino(encoder_layers=2, decoder_layers=2, **model)
        return config

    return make


def run(config: RunConfig) -> tuple[Trainer, list[dict[LossName, Tensor]]]:
    """Train an epoch, in which only the first batch compiles; return the loss terms of every step."""
    trainer, terms = Trainer(config, overwrite=True), []
    trainer.model.train()
    for index, step in enumerate(trainer.data.steps(0, 0)):
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            terms.append(trainer.step(step))
    return trainer, terms  # type: ignore[return-value]


def assert_equal_to_eager(make: MakeConfig, model: dict[str, Any], **optim: Any) -> None:
    torch._dynamo.utils.counters.clear()
    compiled, terms = run(make("compiled", model, **optim))
    assert torch._dynamo.utils.counters["frames"]["ok"] == 2, "one for the encoder, one for the decoder"
    assert not torch._dynamo.utils.counters["graph_break"]
    sizes = {batch.sizes for step in compiled.data.steps(0, 0) for batch in step}
    assert len(sizes) >= 3
    eager, expected = run(make("eager", model, **optim))
    assert torch._dynamo.utils.counters["frames"]["ok"] == 2
    for step, (own, other) in enumerate(zip(terms, expected, strict=True)):
        for name, loss in other.items():
            torch.testing.assert_close(own[name], loss, rtol=1e-5, atol=1e-5, msg=f"{name} at step {step}")
    assert list(compiled.unwrapped_model.state_dict()) == list(eager.unwrapped_model.state_dict())
    averages = [[state["exp_avg"] for state in x.optimizer.state.values()] for x in (compiled, eager)]
    for own, other in zip(*averages, strict=True):  # of the gradients
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*training samples")
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_compiled_layers_train_like_eager_ones(make: MakeConfig) -> None:
    assert_equal_to_eager(make, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_layers_have_the_same_form_of_input(dtype: torch.dtype) -> None:
    """What torch.compile compiles a layer again for."""
    model = tiny_model(encoder_layers=2, decoder_layers=2).train()
    forms: dict[type[nn.Module], list[Any]] = {}

    def note(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        forms.setdefault(type(layer), []).append(
            [(x.dtype, x.stride(), x.requires_grad, x._base is None) for x in tensors]
        )

    for layer in model.layers_to_compile():
        layer.register_forward_pre_hook(note)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        model(batch_of(model, sample(["cat"]), sample(["dog"])))
    assert len(forms) == 2
    for first, second in forms.values():
        assert first == second


@pytest.mark.filterwarnings("ignore:.*training samples")
@pytest.mark.parametrize(
    ("model", "optim", "backend"),
    [
        ({"gradient_checkpointing": True}, {}, "aot_eager"),  # faster to compile than that of Inductor
        ({}, {"lora": {"targets": ["encoder", "decoder.layers"], "train_also": ["queries"]}}, "eager"),  # traces only
    ],
    ids=["checkpointing", "lora"],
)
def test_checkpointing_and_adapters(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch, model: dict[str, Any], optim: dict[str, Any], backend: str
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    assert_equal_to_eager(make, model, **optim)


def test_a_model_without_such_layers_is_refused(tiny_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"train\.compile: only layers of grounding_dino .* train\.compile=false"):
        Trainer(tiny_config(train={"compile": True}))
