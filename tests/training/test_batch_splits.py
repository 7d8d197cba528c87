"""A training step does not depend on how its samples are split over batches and processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import NO_DROPOUT, history, run_script, scripted
from tests.models.grounding_dino.tiny import sample
from tests.models.grounding_dino.tiny import tiny_config as tiny_grounding_dino
from vg.config import RunConfig, dump_config
from vg.data.collate import Collator
from vg.training.trainer import Trainer
from vg.types import Sample

MakeConfig = Callable[..., RunConfig]

# The first step of AdamW is lr * g / (|g| + eps). At the default eps of 1e-8, entries whose gradient is only rounding
# error move by up to lr in an arbitrary direction, which can flip a discrete choice of Grounding DINO (top-k queries,
# matching) in the second step. At 1e-4, with gradients clipped to norm 1, the step is smooth in the gradient.
EPS = 1e-4
FAMILIES = ("rec", "grounding_dino")

SCRIPT = """
import sys, torch
from vg.config import load_config
from vg.distributed import shut_down
from vg.training.trainer import Trainer

def main(family):
    trainer = Trainer(load_config(f"{family}.yaml"), overwrite=True)
    for group in trainer.optimizer.param_groups:
        group["eps"] = float(sys.argv[1])
    clip, gradients = trainer.accelerator.clip_grad_norm_, []

    def record(parameters, norm):
        named = trainer.unwrapped_model.named_parameters()
        gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        return clip(parameters, norm)

    trainer.accelerator.clip_grad_norm_ = record
    trainer.fit()
    if trainer.accelerator.is_main_process:
        torch.save(gradients, f"{family}.pt")

for family in sys.argv[2:]:
    main(family)
shut_down()
"""


def configured(make: MakeConfig, family: str, batch_size: int, accumulate: int, output: Path) -> RunConfig:
    """Two steps of eight scenes with different numbers of boxes."""
    view = "detection" if family == "grounding_dino" else "expression"
    data = {
        "train": {"name": "shapes", "split": "train", "image_size": 64, "size": 16, "view": view},
        "eval": {"name": "shapes", "split": "val", "image_size": 64, "size": 2, "view": view},
    }
    config = make(
        model=NO_DROPOUT,
        data=data | {"batch_size": batch_size, "eval_batch_size": 2},
        optim={"lr": 1e-4},
        train={"output": str(output), "accumulate": accumulate, "epochs": 1, "log_every": 1},
    )
    if family == "grounding_dino":
        config.model = tiny_grounding_dino()
        config.model.loss.alignment = 0.5
    return config


def run(
    make: MakeConfig, folder: Path, processes: int, batch_size: int, accumulate: int
) -> dict[str, tuple[list[dict[str, Tensor]], list[dict[str, Any]]]]:
    """Gradients by parameter and logged losses of every step, by family; both are trained by the same processes."""
    folder.mkdir()
    configs = {family: configured(make, family, batch_size, accumulate, folder / family) for family in FAMILIES}
    for family, config in configs.items():
        (folder / f"{family}.yaml").write_text(dump_config(config))
    (folder / "train.py").write_text(SCRIPT)
    result = run_script(folder, "train.py", str(EPS), *FAMILIES, processes=processes)
    assert result.returncode == 0, result.stderr
    return {
        family: (
            torch.load(folder / f"{family}.pt", weights_only=True),
            [row for row in history(config) if "loss" in row],
        )
        for family, config in configs.items()
    }


def test_splitting_a_batch_over_processes_and_accumulation_does_not_change_a_step(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    whole = run(tiny_config, tmp_path / "whole", 1, batch_size=8, accumulate=1)
    for processes, accumulate in ((2, 2), (4, 1)):
        split = run(tiny_config, tmp_path / f"split_{processes}", processes, batch_size=2, accumulate=accumulate)
        for family in FAMILIES:
            assert_equal(whole[family], split[family])


def assert_equal(whole: tuple[Any, Any], split: tuple[Any, Any]) -> None:
    (gradients, losses), (split_gradients, split_losses) = whole, split
    assert len(losses) == len(gradients) == 2
    for expected, found in zip(losses, split_losses, strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for expected_step, found_step in zip(gradients, split_gradients, strict=True):
        assert expected_step.keys() == found_step.keys()
        largest = max(gradient.abs().max() for gradient in expected_step.values()).item()
        for name, gradient in expected_step.items():
            torch.testing.assert_close(found_step[name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("boxes", [(3, 0, 1, 2), (0, 0, 5, 1), (0, 0, 0, 0)], ids=str)
def test_images_without_boxes_contribute_the_same_in_any_split(
    tiny_config: MakeConfig, tmp_path: Path, boxes: tuple[int, ...]
) -> None:
    """A batch of images without boxes has weight 0, but its losses still count."""
    config = configured(tiny_config, "grounding_dino", 4, 1, tmp_path / "run")
    samples: list[Sample] = [sample(["red", "a big cat"], seed=i, boxes=count) for i, count in enumerate(boxes)]
    found = []
    for split in ([samples], [samples[:2], samples[2:]], [samples[:1], samples[1:3], samples[3:]]):
        trainer = Trainer(config, overwrite=True)
        collate = Collator(trainer.unwrapped_model.image_spec, trainer.unwrapped_model.text_spec, one_prompt=True)
        terms = trainer.step([collate(batch) for batch in split])
        assert terms is not None
        gradients = [state["exp_avg"] for state in trainer.optimizer.state.values()]
        found.append((torch.stack(list(terms.values())), gradients))
    assert found[0][0].sum() > 1
    for terms, gradients in found[1:]:
        torch.testing.assert_close(terms, found[0][0], rtol=1e-5, atol=1e-6)
        for gradient, expected in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_denoising_losses_of_batches_are_weighted_by_their_boxes(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """Each batch draws its own denoising queries, but their loss terms are weighted by the boxes of the batch."""
    from vg.models.grounding_dino.config import DenoisingConfig

    config = configured(tiny_config, "grounding_dino", 4, 1, tmp_path / "run")
    config.model.denoising = DenoisingConfig(num_queries=10)  # type: ignore[union-attr]
    trainer = scripted(Trainer(config), [])
    collate = Collator(trainer.unwrapped_model.image_spec, trainer.unwrapped_model.text_spec, one_prompt=True)
    batches = [collate([sample(["red", "a cat"], seed=i, boxes=count)]) for i, count in enumerate((1, 3))]
    separate: list[dict[str, Tensor]] = []
    loss = trainer.unwrapped_model.loss

    def remember(output: Any, batch: Any) -> dict[str, Tensor]:
        separate.append(loss(output, batch))
        return separate[-1]

    trainer.unwrapped_model.loss = remember  # type: ignore[method-assign]
    terms = trainer.step(batches)
    assert terms is not None
    assert any("denoising" in name for name in terms)
    for name, value in terms.items():
        torch.testing.assert_close(value, (1 * separate[0][name] + 3 * separate[1][name]).detach() / 4)
