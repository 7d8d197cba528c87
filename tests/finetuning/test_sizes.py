"""Epochs by the number of samples, batches by the memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vg.config import RunConfig
from vg.finetuning import sizes
from vg.finetuning.recipe import Recipe, choose_recipe
from vg.finetuning.sizes import Resources, sized
from vg.training.optim import count_parameters

GIB = 2**30
OWN = choose_recipe(None, "detection", lora=False, tokenizer=None)


@pytest.mark.parametrize(
    ("memory", "batch_size", "accumulate"), [(80, 16, 1), (24, 8, 2), (8, 2, 8), (4, 1, 16), (1, 1, 16)], ids=str
)
def test_batches_fit_and_steps_have_the_samples_of_the_recipe(memory: int, batch_size: int, accumulate: int) -> None:
    config, notes = sized(OWN, 144, Resources("cuda", memory * GIB))
    assert (config.data.batch_size, config.train.accumulate) == (batch_size, accumulate)
    assert config.train.precision == "bf16"
    assert any("WARNING" in note for note in notes) == (memory < 3)
    plural = "es" * (accumulate > 1)
    assert f"{accumulate} batch{plural} per optimizer step (16 samples)" in notes[0]


def test_adapters_need_less_memory() -> None:
    """They have 8 of 179 million parameters, so more of a small GPU is left for a batch."""
    recipe = choose_recipe(None, "detection", lora=True, tokenizer=None)
    config, notes = sized(recipe, 144, Resources("cuda", 5 * GIB))
    assert config.data.batch_size == 2 > sized(OWN, 144, Resources("cuda", 5 * GIB))[0].data.batch_size
    assert "179 M parameters + 12 bytes x 8 M trained" in notes[0]


def test_a_head_on_frozen_encoders_needs_little_memory(tiny_config: Callable[..., RunConfig]) -> None:
    """It works on a few tokens per image, not on pixels."""
    config = tiny_config(data={"batch_size": 64})
    recipe = Recipe(config, "a run", epochs=10, steps=180, evaluations=20)
    parameters = count_parameters(config)[0]
    assert sized(recipe, 144, Resources("cuda", 16 * parameters + 64 * 1_000_000))[0].data.batch_size == 64
    assert sized(recipe, 144, Resources("cuda", 16 * parameters))[0].data.batch_size < 64


@pytest.mark.parametrize(
    ("processes", "batch_size", "accumulate", "samples"), [(2, 4, 2, 16), (3, 5, 1, 15), (20, 1, 1, 20)]
)
def test_processes_share_the_samples_of_a_step(processes: int, batch_size: int, accumulate: int, samples: int) -> None:
    config, notes = sized(OWN, 144, Resources("cuda", 12 * GIB, processes))
    assert (config.data.batch_size, config.train.accumulate) == (batch_size, accumulate)
    assert f"by each of {processes} processes" in notes[0]
    assert f"per optimizer step ({samples} samples in all)" in notes[0]
    steps = config.train.epochs * (144 // samples)
    assert steps >= OWN.steps
    assert any(f" {steps} steps" in note for note in notes)


@pytest.mark.parametrize(("samples", "epochs"), [(10, 180), (144, 20), (1000, 20), (100_000, 12)])
def test_epochs_follow_the_size_of_the_data(samples: int, epochs: int) -> None:
    config, _ = sized(OWN, samples, Resources("cuda", 100 * GIB))
    assert config.train.epochs == epochs
    assert config.optim.milestones == [round(0.75 * epochs)]


def test_the_memory_of_this_machine() -> None:
    device, memory = sizes.available_memory()
    assert device in ("cpu", "cuda")
    assert memory > GIB / 4
