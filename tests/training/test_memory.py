"""The estimate of the memory of a training step."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cache.feature_data import VISION
from vg.cli import main
from vg.config import load_config
from vg.training.memory import MemoryEstimate, StorageCounter

ROOT = Path(__file__).parents[2]
REC, GROUNDING_DINO = "configs/demo_rec.yaml", "configs/demo_grounding_dino.yaml"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is measured with glibc")
@pytest.mark.parametrize(
    ("config", "batch_size", "overrides"),
    [(REC, 128, []), (GROUNDING_DINO, 12, []), (GROUNDING_DINO, 24, ["model.gradient_checkpointing=true"])],
    ids=["rec", "grounding_dino", "checkpointing"],
)
def test_estimate_is_within_15_percent_of_a_measurement(config: str, batch_size: int, overrides: list[str]) -> None:
    command = [sys.executable, "-m", "tests.training.measured_step", config, str(batch_size), *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    estimate, measured = map(int, done.stdout.split()[-2:])
    assert estimate == pytest.approx(measured, rel=0.15)


def test_settings_change_the_estimate() -> None:
    def peak(*overrides: str, batch_size: int = 4) -> int:
        small = ["model.encoder_layers=1", "model.decoder_layers=1", *overrides]
        estimate = MemoryEstimate(load_config(ROOT / GROUNDING_DINO, small))
        return estimate.step(batch_size, estimate.sizes[-1])

    plain = peak()
    assert peak("model.gradient_checkpointing=true") < plain
    assert peak("train.precision=bf16") < plain
    assert peak("train.ema=0.999") > plain
    assert peak("optim.freeze=[backbone]") < plain
    assert peak("optim.lora={targets: [backbone, encoder]}") < plain


def test_every_vision_encoder_can_be_estimated() -> None:
    """The initialization of some reads values."""
    vision = {"model_type": "dinov3_vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"intermediate_size": 64}
    config = load_config(ROOT / REC, [f"model.vision.architecture={json.dumps(vision)}", "model.vision.frozen=false"])
    estimate = MemoryEstimate(config)
    assert estimate.step(2, estimate.sizes[-1]) > estimate.weights > 0


def test_positions_without_values_are_not_kept() -> None:
    """The same vision encoder must be usable afterwards, for images of the same size."""
    architecture = VISION | {"num_hidden_layers": 1}
    overrides = [f"model.vision.architecture={json.dumps(architecture)}", "model.image_size=176"]
    estimate = MemoryEstimate(load_config(REC, overrides))
    estimate.step(1, estimate.sizes[0])
    model = load_config(REC, overrides).model.build(pretrained=False)
    tokens, _ = model.encode_images(torch.zeros(1, 3, 176, 176))  # type: ignore[operator]
    assert type(tokens.detach()) is torch.Tensor


def test_nothing_is_left_after_a_step() -> None:
    estimate = MemoryEstimate(load_config(ROOT / REC, ["train.ema=null"]))
    parameters = sum(p.nbytes for p in (*estimate.model.parameters(), *estimate.model.buffers()))
    assert estimate.weights == pytest.approx(parameters, rel=0.01)
    before = estimate.counter.now
    estimate.step(4, estimate.sizes[-1])
    assert estimate.counter.now == before


def test_counter_counts_storages_once() -> None:
    with StorageCounter() as counter:
        x = torch.zeros(1000)
        view = x[:10]
        y = x + 1
        assert counter.now == 8000
        del x, y
        assert counter.now == 4000, "a view keeps its storage"
        del view
        assert (counter.now, counter.peak) == (0, 8000)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["config", str(ROOT / REC), "--memory", "data.batch_size=8", "optim.algorithm=adamw"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["images", "batch", "of", "1", "batch", "of", "8", "batch", "of", "16"]
    assert lines[1].split()[:3] == ["64", "x", "64"]
    assert "state of the optimizer 6.61 MB" in lines[2]
