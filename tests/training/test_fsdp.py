"""FSDP2 in two processes: training equals DDP, and its checkpoints are exact, resumable and readable by any run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import NO_DROPOUT
from tests.models.grounding_dino.tiny import tiny_config as tiny_grounding_dino
from tests.models.grounding_dino.tiny import tiny_model
from tests.training.test_data import write_coco
from tests.training.test_distributed import launch
from vg.checkpoint import SHARDS, TRAINING, read_model
from vg.config import RunConfig, dump_config
from vg.errors import CheckpointError, ConfigError, DamagedCheckpointError
from vg.models.grounding_dino.model import GroundingDino
from vg.training.fsdp import check_launch
from vg.training.sharded_state import files_of, read_shards
from vg.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]

# Trains with DDP, then with FSDP2, restores and saves once more, and resumes from the first checkpoint.
SCRIPT = """
import os, shutil, sys
import torch
from vg.config import load_config
from vg.distributed import shut_down
from vg.training.fsdp import gather_full, is_sharded
from vg.training.trainer import Trainer

def state(trainer):
    weights = [*trainer.unwrapped_model.state_dict().values(), *trainer.state.ema.averages]
    moments = [value for entry in trainer.optimizer.state.values() for value in entry.values()]
    return [gather_full(tensor).clone() for tensor in (*weights, *moments)]

def train(output, resume=False):
    config = load_config("config.yaml")
    config.train.output = output
    trainer = Trainer(config, resume=resume, overwrite=not resume)
    trainer.fit()
    return trainer

assert not is_sharded(train("ddp").model)
os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
trainer = train("fsdp")
assert is_sharded(trainer.model)
expected = state(trainer)
trainer.save()
trainer.restore()
assert all(map(torch.equal, expected, state(trainer)))
if trainer.accelerator.is_main_process:
    shutil.copytree("fsdp", "resumed")
    shutil.copytree("fsdp", "alone")
    shutil.rmtree("resumed/checkpoints/step_000006")
trainer.save()
assert all(map(torch.equal, expected, state(train("resumed", resume=True))))
shut_down()
"""


@pytest.fixture(params=["rec", "grounding_dino", "adapters"])
def config(request: pytest.FixtureRequest, tiny_config: MakeConfig, tmp_path: Path) -> RunConfig:
    """Six steps with clipping, averaged weights and a frozen encoder; evaluated batches do not divide evenly."""
    train: dict[str, Any] = {"max_steps": 6, "epochs": 9, "log_every": 1, "save_every": 3, "ema": 0.9}
    data: dict[str, Any] = {"batch_size": 4, "eval_batch_size": 2, "augment": {"flip": 0.5}}
    if request.param != "grounding_dino":
        lora = {"lora": {"targets": ["text"], "train_also": ["head"]}} if request.param == "adapters" else {}
        config = tiny_config(model=NO_DROPOUT, data=data, train=train, optim={"lr": 1e-4} | lora)
        config.model.vision.frozen = True  # type: ignore[union-attr]
        return config
    coco = {"name": "coco", "path": write_coco(tmp_path / "data", "train", range(1, 10))}
    data |= {"train": coco, "eval": coco, "batch_size": 2, "eval_batch_size": 3}
    config = tiny_config(data=data, train=train | {"accumulate": 2}, optim={"lr": 1e-4, "freeze": ["text"]})
    config.model = tiny_grounding_dino(encoder_layers=2, decoder_layers=2, gradient_checkpointing=True)
    return config


@pytest.mark.filterwarnings("ignore:.*training samples")
def test_fsdp_equals_ddp_and_resumes_exactly(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(config))
    (tmp_path / "train.py").write_text(SCRIPT)
    output = launch(tmp_path)
    assert "FSDP2: 2 processes share weights" in output
    assert "DDP: each of 2 processes has all weights" in output

    runs = ("ddp", "fsdp", "resumed")
    rows = [[json.loads(line) for line in (tmp_path / run / "history.jsonl").open()] for run in runs]
    for ddp, fsdp in zip(*rows[:2], strict=True):
        assert fsdp == pytest.approx(ddp, rel=1e-6, abs=1e-6)
    assert rows[1] == rows[2]
    last = "checkpoints/step_000006"
    for folder in ("best", last):
        ddp, fsdp, resumed = (load_file(tmp_path / run / folder / "model.safetensors") for run in runs)
        for name, weights in ddp.items():
            # Keys have no gradient but rounding errors from a bias, nor logits of a softmax, and AdamW amplifies these.
            tolerance = 1e-4 if name.endswith(("key.bias", "score.bias")) else 1e-6
            torch.testing.assert_close(fsdp[name], weights, rtol=0, atol=tolerance, msg=name)
            assert torch.equal(resumed[name], fsdp[name])
    assert len(list((tmp_path / "fsdp" / last / SHARDS).iterdir())) == 2
    assert not (tmp_path / "ddp" / last / SHARDS).exists()
    best, _ = read_model(tmp_path / "fsdp")
    assert not best.training

    # One process without FSDP2 reads the shards.
    config.train.output = str(tmp_path / "alone")
    alone = Trainer(config, resume=True)
    expected = torch.load(tmp_path / "ddp" / last / TRAINING, weights_only=True)
    moments = [entry["exp_avg"] for entry in alone.optimizer.state_dict()["state"].values()]
    for own, entry in zip(moments, expected["optimizer"]["state"].values(), strict=True):
        torch.testing.assert_close(own, entry["exp_avg"], rtol=1e-4, atol=1e-5)
    assert alone.state.ema is not None
    for own, average in zip(alone.state.ema.averages, expected["ema"]["averages"], strict=True):
        torch.testing.assert_close(own, average, rtol=0, atol=1e-4)


# After step 4, weights of one process are not finite.
BROKEN = """
import os, sys
import torch
from vg.config import load_config
from vg.distributed import shut_down
from vg.models.base import check_finite_weights
from vg.training.trainer import Trainer

os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
trainer = Trainer(load_config("config.yaml"))
step = trainer.step
weights = next(p for p in trainer.unwrapped_model.head.parameters() if len(p) > 1)  # both processes have rows

def broken(batches):
    terms = step(batches)
    if trainer.progress.step == 3 and not trainer.progress.restored:
        if trainer.accelerator.process_index == 1:
            weights.to_local().detach().fill_(float("inf"))
        try:
            check_finite_weights({"weights": weights})
        except ValueError:
            sys.stdout.write("refused\\n")
    return terms

trainer.step = broken
trainer.fit()
sys.stdout.write(f"restored {trainer.progress.restored} at step {trainer.progress.step}\\n")
del trainer, step, weights
shut_down()
"""


def test_all_processes_restore_weights_that_are_not_finite_in_one(tiny_config: MakeConfig, tmp_path: Path) -> None:
    train = {"on_nan": "skip", "epochs": 9, "max_steps": 6, "save_every": 2, "eval_every": 6}
    (tmp_path / "config.yaml").write_text(dump_config(tiny_config(train=train)))
    (tmp_path / "train.py").write_text(BROKEN)
    output = launch(tmp_path)
    assert output.count("refused") == output.count("restored 1 at step 6") == 2


def test_a_missing_or_damaged_shard_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "step_000001"
    (folder / SHARDS).mkdir(parents=True)
    for index in range(2):
        save_file({"ema.averages.0": torch.full((2, 3), float(index))}, folder / SHARDS / f"{index}.safetensors")
    state, layouts = {"ema": {"averages": [None]}, "shards": files_of(folder)}, {"ema.averages.0": torch.zeros(4, 3)}
    with pytest.raises(CheckpointError, match=r"does not match the configuration: ema.averages.0 is \(2, 3\)"):
        read_shards(folder, state, layouts)
    file = folder / SHARDS / "1.safetensors"
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(DamagedCheckpointError, match="cannot resume from"):
        read_shards(folder, state, layouts)
    file.unlink()
    with pytest.raises(DamagedCheckpointError, match="must have 2 files"):
        read_shards(folder, state, layouts)


@pytest.mark.parametrize(
    ("options", "section", "values", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "train", {}, "DeepSpeed is not supported: choose FSDP version 2"),
        ({"FSDP_VERSION": "1"}, "train", {}, "FSDP version 1 is not supported: launch with --fsdp_version 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "train", {}, "--fsdp_offload_params false"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "train", {}, "--fsdp_activation_checkpointing false"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, "train", {}, "--fsdp_reshard_after_forward true"),
        ({}, "optim", {"algorithm": "muon"}, "optim.algorithm=adamw"),
        ({}, "train", {"compile": True}, "train.compile=false"),
        ({}, "train", {"precision": "fp16"}, "train.precision=bf16"),
    ],
)
def test_unsupported_combinations_are_refused(
    tiny_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, str],
    section: str,
    values: dict[str, Any],
    message: str,
) -> None:
    config = tiny_config(**{section: values})
    check_launch(config)
    for name, value in ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} | options).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        Trainer(config)


def test_shards_on_a_full_disk_are_removed(tiny_config: MakeConfig) -> None:
    folder = Trainer(tiny_config()).folder

    def fail(shards: Path) -> None:
        (shards / "part").write_bytes(b"1")
        raise CheckpointError("could not write")

    with pytest.raises(CheckpointError, match="could not write"):
        folder.save(folder.path / "checkpoints" / "step_000001", lambda path: None, write_shards=fail)
    assert not list((folder.path / "checkpoints").iterdir())


def test_a_backbone_that_runs_for_each_image_size_is_gathered_once() -> None:
    def names(model: GroundingDino) -> set[str]:
        return {type(layer).__name__ for layer in model.layers_to_shard()}

    model = tiny_model()
    assert names(model) == {"BertEmbeddings", "BertLayer", "FeatureEnhancerLayer", "DecoderLayer"}
    model.config.image.mix_sizes = True
    assert "SwinStage" in names(model)
