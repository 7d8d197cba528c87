"""Checkpoints: round trips, error messages for damaged files, and failed writes that leave old files unchanged."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vg.checkpoint import load_weights, new_checkpoint, read_model, read_training_state
from vg.config import RunConfig, dump_config
from vg.errors import CheckpointError, ConfigError
from vg.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def trained(tiny_config: MakeConfig) -> tuple[Trainer, Path]:
    """A trainer after a run of one step, and the checkpoint of the run."""
    config = tiny_config(train={"max_steps": 1})
    trainer = Trainer(config)
    trainer.fit()
    return trainer, Path(config.train.output) / "checkpoints" / "step_000001"


def predictions(trainer: Trainer, model: Any) -> list[tuple[Any, ...]]:
    """Predictions of a model for the evaluation data of a trainer."""
    model.eval()
    with torch.no_grad():
        found = [p for batch in trainer.evaluator.datasets[0].loader for p in model.predict(model(batch), batch)]
    return [(p.id, p.boxes.tolist(), p.scores.tolist(), p.phrase_ids.tolist(), p.phrases) for p in found]


def test_a_loaded_model_makes_the_same_predictions(trained: tuple[Trainer, Path]) -> None:
    trainer, folder = trained
    model, config = read_model(folder)
    assert config == trainer.config
    assert not model.training
    assert predictions(trainer, model) == predictions(trainer, trainer.unwrapped_model)
    phrases = ["left red circle", "the tiny blue triangle"]
    saved, original = model.text_spec.tokenizer, trainer.unwrapped_model.text_spec.tokenizer
    assert saved(phrases)["input_ids"] == original(phrases)["input_ids"]


def test_loading_a_run_folder_loads_its_best_checkpoint(trained: tuple[Trainer, Path]) -> None:
    trainer, folder = trained
    model, _ = read_model(folder.parents[1])
    assert predictions(trainer, model) == predictions(trainer, read_model(folder.parents[1] / "best")[0])


def test_overrides_when_loading(trained: tuple[Trainer, Path]) -> None:
    _, config = read_model(trained[1], ["data.eval.size=3"])
    assert config.data.eval.size == 3  # type: ignore[union-attr]


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def garbled(path: Path) -> None:
    path.write_bytes(b"\x00\xff" * 100)


@pytest.mark.parametrize("damage", [cut_short, emptied, garbled])
def test_damaged_weights_raise_an_error_with_their_path(
    trained: tuple[Trainer, Path], damage: Callable[[Path], None]
) -> None:
    trainer, folder = trained
    damage(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"step_000001/model\.safetensors is damaged or was cut short"):
        read_model(folder)
    with pytest.raises(CheckpointError, match=r"step_000001/model\.safetensors is damaged or was cut short"):
        Trainer(trainer.config, resume=True)


@pytest.mark.parametrize("damage", [cut_short, emptied, garbled])
def test_a_damaged_training_state_raises_an_error_with_its_path(
    trained: tuple[Trainer, Path], damage: Callable[[Path], None]
) -> None:
    trainer, folder = trained
    damage(folder / "training.pt")
    read_model(folder)
    with pytest.raises(CheckpointError, match=r"cannot resume from .*step_000001/training\.pt"):
        Trainer(trainer.config, resume=True)


@pytest.mark.parametrize("damage", [cut_short, emptied, garbled, Path.unlink])
@pytest.mark.parametrize("name", ["training.pt", "model.safetensors"])
def test_resuming_passes_over_a_damaged_checkpoint(
    tiny_config: MakeConfig, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], name: str
) -> None:
    config = tiny_config(train={"max_steps": 3, "save_every": 1, "keep": 2})
    Trainer(config).fit()
    checkpoints = Path(config.train.output) / "checkpoints"
    damage(checkpoints / "step_000003" / name)
    trainer = Trainer(config, resume=True)
    assert trainer.progress.step == 2
    if damage is Path.unlink:
        assert "step_000003 is ignored: model.safetensors or training.pt is missing" in caplog.text
    else:
        assert f"step_000003/{name}" in caplog.text
        assert "continuing from" in caplog.text
        assert (checkpoints / "step_000003.damaged").exists()
    trainer.fit()
    assert trainer.folder.checkpoints() == [checkpoints / "step_000002", checkpoints / "step_000003"]


def test_another_configuration_is_not_a_damaged_checkpoint(tiny_config: MakeConfig) -> None:
    config = tiny_config(train={"max_steps": 2, "save_every": 1})
    Trainer(config).fit()
    config.model.head.width = 64  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match="shape: head"):
        Trainer(config, resume=True)
    assert (Path(config.train.output) / "checkpoints" / "step_000002").exists()


def test_a_checkpoint_that_cannot_be_read_now_is_not_damaged(
    trained: tuple[Trainer, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(CheckpointError, match="Too many open files") as caught:
        Trainer(trained[0].config, resume=True)
    assert type(caught.value) is CheckpointError


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("evil",)


def test_loading_a_training_state_cannot_execute_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"progress": Malicious()}, tmp_path / "training.pt")
    with pytest.raises(CheckpointError, match=r"cannot resume from .*training\.pt"):
        read_training_state(tmp_path)
    assert not (tmp_path / "evil").exists()


def test_all_mismatched_weights_are_listed(trained: tuple[Trainer, Path]) -> None:
    trainer, folder = trained
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    del weights[names[0]]
    weights[names[1]] = torch.zeros(1, 2, 3)
    weights["surplus"] = torch.zeros(7)
    save_file(weights, folder / "model.safetensors")
    before = {name: value.clone() for name, value in trainer.unwrapped_model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(trainer.unwrapped_model, folder, trainer.config)
    for line in (
        str(folder / "model.safetensors"),
        f"missing: {names[0]}",
        f"shape: {names[1]} is (1, 2, 3), expected ",
        "unexpected: surplus (7,)",
    ):
        assert line in str(caught.value)
    assert all(value.equal(before[name]) for name, value in trainer.unwrapped_model.state_dict().items()), (
        "nothing was loaded"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, trained: tuple[Trainer, Path]) -> None:
    _, folder = trained
    weights = load_file(folder / "model.safetensors")
    name = min(weights)
    weights[name].view(-1)[0] = value
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"model.safetensors: .* not finite.*: {re.escape(name)}; .*earlier"):
        read_model(folder)


def test_missing_files_are_named(trained: tuple[Trainer, Path], tmp_path: Path) -> None:
    _, folder = trained
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"step_000001/model\.safetensors does not exist"):
        read_model(folder)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(CheckpointError, match=r"step_000001 is not a checkpoint of vg: tokenizer is missing"):
        read_model(folder)
    with pytest.raises(CheckpointError, match=r"is not a checkpoint of vg: config\.yaml is missing"):
        read_model(tmp_path)
    (folder / "training.pt").unlink()
    with pytest.raises(CheckpointError, match=r"cannot resume from .*training\.pt.*No such file"):
        read_training_state(folder)


def test_an_invalid_configuration_of_a_checkpoint_is_named(trained: tuple[Trainer, Path]) -> None:
    _, folder = trained
    (folder / "config.yaml").write_text("model: 3")
    with pytest.raises(ConfigError, match=r"step_000001/config\.yaml"):
        read_model(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("victim", ["vg.checkpoint.save_file", "torch.save", "vg.training.run_folder.write_json"])
def test_a_full_disk_leaves_earlier_checkpoints_unchanged(
    trained: tuple[Trainer, Path], monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    trainer, folder = trained
    run = folder.parents[1]
    before = contents(run)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(victim, fail)
    message = "(?s)could not write the checkpoint .*No space left on device.*Earlier checkpoints are untouched.* resume"
    with pytest.raises(CheckpointError, match=message):
        trainer.folder.save(trainer.folder.best, lambda partial: None, {}) if "json" in victim else trainer.save()
    assert contents(run) == before
    assert not list(run.rglob("*.partial")) + list(run.rglob("*.old"))
    monkeypatch.undo()
    Trainer(trainer.config, resume=True).save()


def test_a_full_disk_before_the_first_checkpoint(tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(tiny_config())

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.save", fail)
    with pytest.raises(CheckpointError, match=r"(?s)No space left on device.*and start again with --overwrite\.$"):
        trainer.save()


def test_an_error_that_is_not_about_writing_is_not_reported_as_a_full_disk(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"^DataLoader worker .* is killed") as caught,
        new_checkpoint(tmp_path / "a"),
    ):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
    assert not isinstance(caught.value, CheckpointError)
    with pytest.raises(CheckpointError, match="Permission denied"), new_checkpoint(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "Permission denied")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="needs modes of files")
def test_weights_respect_the_umask(trained: tuple[Trainer, Path]) -> None:
    trainer, folder = trained
    for umask, mode in ((0o022, 0o644), (0o027, 0o640)):
        before = os.umask(umask)
        try:
            trainer.save()
        finally:
            os.umask(before)
        assert {oct(path.stat().st_mode & 0o777) for path in folder.rglob("*") if path.is_file()} == {oct(mode)}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_everything_is_on_the_disk_before_and_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename that reaches the disk before the files leaves an empty checkpoint after a power loss."""
    events: list[str] = []
    rename = Path.rename

    def renamed(self: Path, target: Path) -> Path:
        events.append(f"{self.name} -> {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", lambda file: events.append(Path(f"/proc/self/fd/{file}").readlink().name))
    monkeypatch.setattr(Path, "rename", renamed)
    with new_checkpoint(tmp_path / "run" / "checkpoints" / "step") as partial:
        (partial / "tokenizer").mkdir()
        for name in ("model.safetensors", "tokenizer/vocabulary.txt"):
            (partial / name).write_text(name)
    middle = events.index("step.partial -> step")
    assert set(events[:middle]) == {"model.safetensors", "tokenizer", "vocabulary.txt", "step.partial"}
    assert set(events[middle + 1 :]) == {"checkpoints", "run", tmp_path.name}  # created folders need their parents


LIMITED = """
import resource, signal, sys
from pathlib import Path
from vg.checkpoint import CheckpointError
from vg.config import load_config
from vg.training.trainer import Trainer

trainer = Trainer(load_config("config.yaml"), resume=True)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing past the limit raises an error, as on a full disk
for limit in sys.argv[1:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    try:
        trainer.save()
    except CheckpointError as error:
        print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on file sizes")
def test_a_real_limit_of_the_file_size(trained: tuple[Trainer, Path], tmp_path: Path) -> None:
    trainer, folder = trained
    before = contents(folder)
    weights = (folder / "model.safetensors").stat().st_size
    assert (folder / "training.pt").stat().st_size > weights + 1000
    (tmp_path / "config.yaml").write_text(dump_config(trainer.config))
    limits = [str(weights // 2), str(weights + 1000)]  # the weights do not fit, or only the training state does not
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, *limits],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("could not write the checkpoint") == 2
    assert contents(folder) == before
    assert not list(folder.parents[1].rglob("*.partial"))


def test_the_old_folder_is_kept_until_the_new_one_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "step"

    def write(text: str, error: BaseException | None = None) -> None:
        with new_checkpoint(folder) as partial:
            (partial / f"{text}.txt").write_text(text)
            if error:
                raise error

    write("first")
    assert contents(folder) == {"first.txt": b"first"}
    with pytest.raises(KeyboardInterrupt):  # like kill -9: nothing cleans up
        write("killed", KeyboardInterrupt())
    assert contents(folder) == {"first.txt": b"first"}
    write("second")
    assert contents(folder) == {"second.txt": b"second"}
    with pytest.raises(CheckpointError, match="could not write the checkpoint"):
        write("failed", OSError(errno.EROFS, "Read-only file system"))
    with pytest.raises(TypeError):
        write("a bug", TypeError("a bug is not a full disk"))
    assert contents(folder) == {"second.txt": b"second"}
    write("third")
    assert [path.name for path in folder.parent.iterdir()] == ["step"]


def test_leftovers_of_a_crash_are_no_checkpoints(trained: tuple[Trainer, Path]) -> None:
    trainer, folder = trained
    for name in ("step_000002.partial", "step_000003.old"):
        shutil.copytree(folder, folder.with_name(name))
    assert trainer.folder.checkpoints() == [folder]
    trainer.progress.step = 2
    trainer.save()
    assert trainer.folder.checkpoints() == [folder, folder.with_name("step_000002")]


def test_a_kill_while_an_old_checkpoint_is_removed(tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some files of the checkpoint are removed already: it is not complete, and the resumed run removes the rest."""
    config = tiny_config(train={"max_steps": 2, "save_every": 1, "keep": 1})

    def killed(folder: Path, **_: Any) -> None:
        (Path(folder) / "model.safetensors").unlink(missing_ok=True)
        if "step_000001" in str(folder) and (Path(folder) / "training.pt").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        Trainer(config).fit()
    monkeypatch.undo()
    trainer = Trainer(config, resume=True)
    checkpoints = Path(config.train.output) / "checkpoints"
    assert trainer.folder.checkpoints() == [checkpoints / "step_000002"] == list(checkpoints.iterdir())
    (checkpoints / "step_000003").mkdir()
    (checkpoints / "step_000003" / "training.pt").touch()
    assert trainer.folder.checkpoints() == [checkpoints / "step_000002"], "without weights it is not complete"


def test_files_of_checkpoints(trained: tuple[Trainer, Path]) -> None:
    trainer, folder = trained
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "model.safetensors", "tokenizer", "training.pt"}
    best = folder.parents[1] / "best"
    assert {path.name for path in best.iterdir()} == {
        "config.yaml",
        "model.safetensors",
        "tokenizer",
        "validation.json",
    }
    assert json.loads((best / "validation.json").read_text())["step"] == 1
    assert (folder / "config.yaml").read_text() == dump_config(trainer.config)
