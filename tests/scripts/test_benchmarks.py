"""The benchmark scripts at a tiny size: their comparisons, errors, outputs and requirements."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.models.grounding_dino.published import BERT, random_model
from vg.config import dump_config, load_config
from vg.errors import ConfigError
from vg.losses.config import LossConfig

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def benchmark() -> Any:
    from scripts.benchmarks import grounding_dino

    return grounding_dino


@pytest.fixture(scope="module")
def config() -> transformers.GroundingDinoConfig:
    words = {"vocab_size": 3100, "max_position_embeddings": 64}
    return random_model(text_config=transformers.BertConfig(**BERT | words)).config


@pytest.fixture(scope="module")
def models(benchmark: ModuleType, config: transformers.GroundingDinoConfig) -> tuple[Any, Any]:
    theirs = benchmark.model_of_transformers(config)
    return theirs, benchmark.model_of_vg(theirs)


def test_prompts_have_the_length_of_coco_prompts(benchmark: ModuleType) -> None:
    def shape(images: int, phrases: int) -> tuple[int, ...]:
        return tuple(benchmark.prompts(benchmark.Case(images, phrases)).shape)

    assert shape(1, 80) == (1, 195)
    assert shape(4, 1) == (4, 5)
    case = benchmark.Case(2, 20)
    rows = [tuple(row) for index in range(3) for row in benchmark.prompts(case, index).tolist()]
    assert len(set(rows)) == 6, "every image and every call has different words"
    assert {row.count(1012) for row in rows} == {20}
    assert {(row[0], row[-1]) for row in rows} == {(101, 102)}


def test_outputs_are_compared_and_differences_are_an_error(benchmark: ModuleType, models: tuple[Any, Any]) -> None:
    theirs, ours = models
    case = benchmark.Case(2, 3, size=(96, 128))
    found = benchmark.differences(case, theirs, ours)
    assert found["same query at the same rank"] > 0.5
    for name in ("encoder.layers.1.fusion.image_gate", "decoder.layers.0.text_attention.value.weight"):
        weights = ours.get_parameter(name)
        before = weights.detach().clone()
        torch.nn.init.uniform_(weights)
        faults = benchmark.faults_of(case, benchmark.differences(case, theirs, ours))
        assert any("logits differ by more than 0.0001 from transformers" in fault for fault in faults)
        weights.data = before
    assert benchmark.faults_of(case, benchmark.differences(case, theirs, ours)) == []
    assert benchmark.faults_of(case, {"boxes": float("nan")}) == [
        f"{case}: boxes differ by more than 0.0001 from transformers: nan"
    ]


def test_new_prompts_are_encoded_and_equal_prompts_are_cached(benchmark: ModuleType, models: tuple[Any, Any]) -> None:
    theirs, ours = models
    encoded: list[int] = []
    handle = ours.text.network.register_forward_hook(lambda *_: encoded.append(1))
    case = benchmark.Case(1, 2, size=(96, 128))
    forwards = benchmark.forwards(theirs, ours)
    runs = {name: benchmark.call(case, name, forwards[name]) for name in forwards}
    counts = {}
    for name, run in runs.items():
        encoded.clear()
        for _ in range(3):
            run()
        counts[name] = len(encoded)
    handle.remove()
    assert counts == {"transformers": 0, "vg, new prompt": 3, "vg, same prompt": 1}


@pytest.fixture
def run_main(
    config: transformers.GroundingDinoConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[[ModuleType, str], tuple[dict[str, Any], str]]:
    """Run a benchmark on small images -> its JSON and what it printed."""

    def run(module: ModuleType, options: str) -> tuple[dict[str, Any], str]:
        path = tmp_path / "results.json"
        command = f"benchmark --device cpu --threads 1 --size 96 128 --no-memory {options} --json {path}"
        monkeypatch.setattr(sys, "argv", command.split())
        module.main(config)
        return json.loads(path.read_text()), capsys.readouterr().out

    return run


def test_table_and_json_have_a_row_per_case_and_contender(benchmark: ModuleType, run_main: Any) -> None:
    found, table = run_main(benchmark, "--rounds 2 --images 1 2 --phrases 2")
    assert table.count("vg, same prompt") == 4
    assert [(row["images"], row["dtype"], row["contender"]) for row in found["results"]] == [
        (images, dtype, contender)
        for images in (1, 2)
        for dtype in ("float32", "bfloat16")
        for contender in ("transformers", "vg, new prompt", "vg, same prompt")
    ]
    assert all(row["seconds"] > 0 and row["rounds"] == 2 and row["peak_bytes"] is None for row in found["results"])
    assert [row["images"] for row in found["differences"]] == [1, 2]


def test_transformers_may_fail_and_vg_may_not(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no such kernel\nand more")

    def fine(*_: Any) -> None: ...

    case = benchmark.Case(1, 1, size=(8, 8))
    rows = benchmark.measure(None, case, {"transformers": broken, "vg, new prompt": fine}, 1, memory=False)
    assert [row["contender"] for row in rows] == ["vg, new prompt"]
    benchmark.print_table(case, rows)
    assert "transformers fails: RuntimeError: no such kernel\n" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="no such kernel"):
        benchmark.measure(None, case, {"transformers": fine, "vg, new prompt": broken}, 1, memory=False)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory of a call needs Linux")
def test_memory_is_measured_in_a_separate_process(
    benchmark: ModuleType, config: transformers.GroundingDinoConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "forwards", None)  # the other process does not use this one
    peak = benchmark.peak_bytes(config, benchmark.Case(1, 2, size=(640, 640)), "vg, new prompt", None)
    assert peak > 2**20


def test_training_step_benchmark_reports_all_contenders(run_main: Any) -> None:
    from scripts.benchmarks import training_step as training

    found, table = run_main(training, "--rounds 1 --dtype bfloat16")
    assert [row["contender"] for row in found["results"]] == ["transformers", "vg", "vg, checkpointing"]
    assert all(row["samples_per_second"] == 2 / row["seconds"] for row in found["results"])
    assert found["results"][0]["times_as_fast"] == 1
    assert table.count("samples/s") == 3


def test_training_steps_have_equal_losses_and_update_weights(
    benchmark: ModuleType, config: transformers.GroundingDinoConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts.benchmarks import training_step as training

    theirs = benchmark.model_of_transformers(config)
    ours = benchmark.model_of_vg(theirs)
    case = benchmark.Case(2, 3, size=(96, 128))
    everyone = training.contenders(theirs, ours)
    terms = training.losses(case, theirs, ours)
    assert terms.keys() == {"class", "l1", "giou"}
    assert training.loss_faults(terms) == []
    assert training.loss_faults({"l1": (float("nan"), 1.0)}) == ["the l1 loss is nan, that of transformers 1.0000"]
    monkeypatch.setattr(ours.config, "loss", LossConfig())  # class weight 1 instead of 2
    assert training.loss_faults(training.losses(case, theirs, ours))[0].startswith("the class loss is")

    for name, (model, _, optimizer) in everyone.items():
        before = [weights.detach().clone() for weights in model.parameters()]
        assert training.call(case, everyone[name])().isfinite()
        assert any(not torch.equal(x, y) for x, y in zip(before, model.parameters(), strict=True))
        trained = {id(weights) for group in optimizer.param_groups for weights in group["params"]}
        assert trained == {id(weights) for weights in model.parameters() if weights.requires_grad}, name
    plain, checkpointing = (
        everyone[name].model.encoder.checkpointing for name in (training.VG, training.CHECKPOINTING)
    )
    assert (plain, checkpointing) == (False, True)


def test_ablation_rows_differ_and_their_commands_repeat_them(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts.benchmarks import ablate_rec

    rows = [[ablate_rec.SMALL, *overrides] for overrides in ablate_rec.ROWS.values()]
    configs = [load_config(ablate_rec.CONFIG, overrides) for overrides in rows]
    assert len({json.dumps(asdict(config), default=str) for config in configs}) == len(configs)
    small = tmp_path / "small.yaml"
    overrides = ["data.eval.size=20", "data.train.size=640", "data.batch_size=4"]
    small.write_text(dump_config(load_config(ablate_rec.CONFIG, overrides)))
    monkeypatch.setattr(ablate_rec, "TIMED", 3)
    pooled = next(reversed(ablate_rec.ROWS))
    options = ["--minutes", "0.002", "--seeds", "2", "--only", pooled, "--json", str(tmp_path / "rows.json")]
    monkeypatch.setattr(sys, "argv", ["ablate_rec.py", "--config", str(small), *options])
    ablate_rec.main()
    row, second = json.loads((tmp_path / "rows.json").read_text())
    assert (row["row"], row["split"], row["num_expressions"]) == (pooled, "test", 20)
    assert (row["seed"], second["seed"], second["steps"]) == (0, 1, row["steps"])
    repeated = load_config(small, row["overrides"])
    assert repeated.model.head.name == "pooled"  # type: ignore[union-attr]
    assert repeated.train.max_steps == row["steps"] == row["step"]
    output = capsys.readouterr().out
    assert f"OMP_NUM_THREADS={torch.get_num_threads()} vg train {small}" in output
    assert f"| {pooled} | {row['steps']} | {100 * row['acc@0.5']:.1f} |" in output
    mean = 50 * (row["acc@0.5"] + second["acc@0.5"])
    assert f"| {pooled} | {row['steps']} | {mean:.1f} ± " in output


def test_faults_and_nan_of_transformers_do_not_end_the_training_benchmark(
    config: transformers.GroundingDinoConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts.benchmarks import training_step as training

    path = tmp_path / "results.json"
    command = "benchmark --device cpu --threads 1 --rounds 2 --size 96 128 --images 1 --no-memory --json"
    monkeypatch.setattr(sys, "argv", [*command.split(), str(path)])
    loss = training.loss_of_transformers
    monkeypatch.setattr(training, "loss_of_transformers", lambda *inputs: loss(*inputs) * float("nan"))
    monkeypatch.setattr(training, "loss_faults", lambda terms: ["the class loss is wrong"])
    with pytest.raises(SystemExit, match="the class loss is wrong"):
        training.main(config)
    found = json.loads(path.read_text())
    assert found["faults"] == ["the class loss is wrong"]
    assert {
        row["contender"]: row["loss_is_finite"] for row in found["results"] if row["contender"] != "transformers"
    } == {
        "vg": True,
        "vg, checkpointing": True,
    }
    assert all(row["rounds"] == 2 for row in found["results"] if row["contender"] != "transformers")

    def fails(*_: Any) -> None:
        raise ValueError("matrix contains invalid numeric entries")

    monkeypatch.setattr(training, "losses", fails)
    with pytest.raises(SystemExit, match="the comparison with transformers failed"):
        training.main(config)
    assert len(json.loads(path.read_text())["results"]) >= 2


def test_all_tensors_of_the_checkpointing_model_are_on_the_device(models: tuple[Any, Any]) -> None:
    from scripts.benchmarks import training_step as training

    ours = copy.deepcopy(models[1]).to("meta")
    model = training.with_checkpointing(ours)
    tensors = dict(model.named_buffers()) | dict(model.named_parameters())
    assert any("relative_position_index" in name for name in tensors)
    assert [name for name, tensor in tensors.items() if not tensor.is_meta] == []
    assert {id(p) for p in model.parameters()} == {id(p) for p in ours.parameters()}


def test_the_clock_of_a_gpu_starts_when_all_kernels_are_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.benchmarks.deform_attn import Clock

    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("record")

        def elapsed_time(self, other: object) -> float:
            return 1.0

    clock = Clock("cpu", False)
    clock.l2 = torch.zeros(1)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append(f"sleep {cycles}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    assert clock.milliseconds(lambda: calls.append("call")) == 1.0
    assert calls == ["call", "sleep 10000000", "record", "call", "record", "synchronize"]


def test_wrong_text_positions_of_transformers_are_corrected(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.models.grounding_dino import modeling_grounding_dino

    from scripts.benchmarks.text_positions import FUNCTION, SINES, correct_text_positions

    right = getattr(modeling_grounding_dino, FUNCTION)
    special = torch.tensor([101, 102, 1012, 1029])

    def wrong(input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """As in transformers 5.17: a delimiter counts from itself."""
        mask, positions = right(input_ids, special)
        return mask, positions.masked_fill(torch.isin(input_ids, special), 0)

    module = ModuleType("modeling")
    setattr(module, SINES, getattr(modeling_grounding_dino, SINES))
    setattr(module, FUNCTION, right)
    assert not correct_text_positions(module)
    assert getattr(module, FUNCTION) is right
    setattr(module, FUNCTION, wrong)
    assert correct_text_positions(module)
    assert not correct_text_positions(module)
    assert "wrong before 5.23" in capsys.readouterr().out
    choices = torch.tensor([2000, 2001, 2002, 1012, 1029])
    words = choices[torch.randint(5, (50, 12), generator=torch.Generator().manual_seed(0))]
    ids = torch.cat((torch.full((50, 1), 101), words, torch.full((50, 1), 102)), dim=1)
    ids[0, 9:] = 0  # padding
    for found, expected in zip(getattr(module, FUNCTION)(ids), right(ids, special), strict=True):
        assert torch.equal(found, expected)
    sines = getattr(module, SINES)(torch.tensor([[1]]), num_pos_feats=4)
    assert torch.equal(sines, getattr(modeling_grounding_dino, SINES)(torch.tensor([[1.0]]), num_pos_feats=4))


def test_the_data_path_is_measured_without_a_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts.benchmarks import rec_cache
    from tests.cache.feature_data import VISION

    monkeypatch.setitem(rec_cache.ENCODERS, "vision", VISION | {"hidden_size": 64})
    arguments = ["--data-only", "--images", "4", "--batch-size", "14", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["rec_cache.py", *arguments])
    rec_cache.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if "expressions/s" in line]
    assert [line.split(",")[0] for line in lines] == 2 * ["files", "files", "in memory"]


def test_attention_of_short_sequences_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts.benchmarks import short_attention

    monkeypatch.setattr(short_attention, "reuse_freed_memory", lambda: True)  # both are for the whole process
    monkeypatch.setattr(short_attention, "use_fast_products", lambda: True)
    arguments = ["--tokens", "25", "50", "--rounds", "4", "--threads", str(torch.get_num_threads())]
    monkeypatch.setattr(sys, "argv", ["short_attention.py", *arguments])
    short_attention.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if " x " in line]
    assert [row[0] for row in rows] == ["| 96 x 25", "| 48 x 50"]
    monkeypatch.setattr(short_attention, "use_fast_products", lambda: False)
    with pytest.raises(SystemExit, match="this CPU does not use oneDNN"):
        short_attention.main()


def test_an_evaluation_is_measured_with_and_without_shared_images(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts.benchmarks import rec_evaluation
    from tests.cache.feature_data import VISION
    from tests.conftest import TEXT

    monkeypatch.setattr(rec_evaluation, "ENCODERS", {"vision": VISION, "text": TEXT})
    monkeypatch.setattr(sys, "argv", ["rec_evaluation.py", "--images", "2", "--rounds", "1"])
    rec_evaluation.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if "expressions/s" in line]
    assert [line.split(":")[0] for line in lines] == ["an image once per batch", "an image per expression"]


def test_the_cost_of_operators_is_counted() -> None:
    """Operations by the formulas of a transformer layer; bytes of inputs and outputs, and none for views."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from scripts.benchmarks.training_cost import OperatorCounter, RecCost
    from tests.cache.feature_data import VISION
    from tests.conftest import TEXT

    with FakeTensorMode(), OperatorCounter(0.5, 0.5) as counter:
        a, b = torch.zeros(8, 16), torch.zeros(16, 4)
        counter.cost *= 0
        c = (a @ b).mT.unsqueeze(0)
        assert c.device.type == "cpu"
    assert (counter.cost.flops, counter.cost.bytes) == (2 * 8 * 16 * 4, 4 * (8 * 16 + 16 * 4 + 8 * 4))
    assert counter.cost.seconds == counter.cost.bytes / (0.5 * 3.35e12), "limited by its bytes"

    encoders = {"vision": VISION, "text": TEXT}
    overrides = [f"model.{name}={json.dumps({'id': None, 'architecture': value})}" for name, value in encoders.items()]
    head = "{name: dense, width: 32, layers: 2, heads: 2, feedforward: 64, loss: {giou: 0}}"
    overrides += ["model.image_size=64", f"model.head={head}", "data.cache={folder: cache}", "data.augment={}"]
    config = load_config(SCRIPTS.parent / "configs" / "rec" / "refcoco_dense.yaml", overrides)
    cost = RecCost(config, 6, 0.5, 0.7)
    width, feedforward = 32, 64
    linear = 2 * (4 * width * width + 2 * width * feedforward)  # of a token
    text = 6 * (linear + 4 * 6 * width)
    assert cost.encode_text(3, "no").flops == 3 * text + 3 * 2 * width * width  # and the pooler, of one token
    cells, tokens = 16, 16 + 6
    projected = 2 * width * width
    evaluated = cells * projected + 6 * projected + 2 * tokens * (linear + 4 * tokens * width)
    evaluated += cells * 2 * (width + width * width + 4 * width)
    assert cost.evaluate(5, True, "bf16").flops == 5 * evaluated
    step, peak = cost.step(2, 8, cached=True)
    assert 2.5 * 8 * evaluated < step.flops < 3.5 * 8 * evaluated, "the backward pass is two to two and a half forward"
    assert peak > 4 * cost.model.num_parameters() + 8 * cost.model.num_parameters(trainable_only=True)
    live, _ = cost.step(8, 8, cached=False)
    images, _, _ = cost.encode_images(8, "bf16")
    assert live.flops == pytest.approx(step.flops + images.flops + cost.encode_text(8, "bf16").flops, rel=0.05)


def test_the_cost_of_trained_and_of_two_text_encoders_is_counted() -> None:
    from scripts.benchmarks.training_cost import RecCost
    from tests.cache.feature_data import VISION
    from tests.conftest import TEXT

    encoders = {"vision": VISION, "text": TEXT}
    overrides = [f"model.{name}={json.dumps({'id': None, 'architecture': value})}" for name, value in encoders.items()]
    head = "{name: dense, width: 32, layers: 1, heads: 2, feedforward: 64, loss: {giou: 0}}"
    overrides += ["model.image_size=64", f"model.head={head}", "data.cache={folder: cache}", "data.augment={}"]

    def cost(*more: str) -> RecCost:
        path = SCRIPTS.parent / "configs" / "rec" / "refcoco_dense.yaml"
        return RecCost(load_config(path, [*overrides, *more]), 6, 0.5, 0.7)

    frozen, _ = cost().step(2, 8, cached=True)
    trained = cost("model.text.frozen=false")
    text = trained.encode_text(8, "bf16").flops
    assert 2 * text < trained.step(2, 8, cached=True)[0].flops - frozen.flops < 3.5 * text

    extra = json.dumps({"id": None, "architecture": TEXT, "frozen": True})
    two = cost(f"model.extra_text={extra}")
    assert two.text_shape == (2 * 6, 2 * 32)
    assert two.encode_text(8, "bf16").flops == 2 * text
    assert two.step(2, 8, cached=True)[0].flops > frozen.flops
    assert cost("model.head.objects=any").step(2, 8, cached=False)[0].flops > frozen.flops
    with pytest.raises(ConfigError, match=r"train\.minutes=5 is the duration already"):
        cost("train.minutes=5")
