"""Loss terms keep their structure in the log and in checkpoints; flat names are for the history only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from vg.errors import TrainingError
from vg.training.loss_log import LossLog
from vg.types import LossName

NAMES = {
    LossName("class"): "class",
    LossName("class", layer=0): "class_layer0",
    LossName("l1", "encoder"): "l1_encoder",
    LossName("giou", "denoising"): "giou_denoising",
    LossName("giou", "denoising", 3): "giou_denoising_layer3",
    LossName("alignment"): "alignment",
}


def test_flat_names() -> None:
    assert {name: str(name) for name in NAMES} == NAMES
    assert f"loss/{LossName('giou', 'denoising', 3)}" == "loss/giou_denoising_layer3"


def test_buffered_steps_survive_a_checkpoint(tmp_path: Path) -> None:
    log, other = LossLog(Accelerator(cpu=True)), LossLog(Accelerator(cpu=True))
    log.rows.append((1, {name: torch.tensor(float(i)) for i, name in enumerate(NAMES)}))
    log.rows.append((2, {name: torch.tensor(float(i + 1)) for i, name in enumerate(NAMES)}))
    torch.save(log.state(), tmp_path / "state.pt")
    other.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    other.rows.append((3, {name: torch.tensor(float(i + 2)) for i, name in enumerate(NAMES)}))
    assert other.means() == {name: pytest.approx(i + 1) for i, name in enumerate(NAMES)}
    assert all(isinstance(name, LossName) for name in other.means())


def test_non_finite_terms_are_named_as_in_the_history() -> None:
    log = LossLog(Accelerator(cpu=True))
    log.rows.append((1, {name: torch.tensor(1.0) for name in NAMES}))
    log.rows.append((2, {name: torch.tensor(float("nan")) for name in NAMES}))
    with pytest.raises(TrainingError, match=r"not finite at step 2: class = nan, class_layer0 = nan, l1_encoder = nan"):
        log.means()
