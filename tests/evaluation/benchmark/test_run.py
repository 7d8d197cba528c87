"""The benchmark end to end on real images and expressions; an independent implementation checks every metric."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as masks
from pydantic import TypeAdapter

from tests.conftest import HEAD, TEXT, VISION, history
from tests.models.grounding_dino.published import TEXT as BERT
from tests.models.grounding_dino.published import bert_tokenizer
from tests.models.grounding_dino.tiny import tiny_config, tiny_model
from vg.checkpoint import write_model
from vg.cli import benchmark as benchmark_options
from vg.cli import main
from vg.cli.benchmark import interpolation
from vg.config import DataConfig, ModelOnlyConfig, RunConfig
from vg.data.refcoco.source import RefcocoConfig
from vg.data.synthetic.shapes import ShapesConfig
from vg.inference.load import load_model
from vg.inference.torch_backend import TorchBackend
from vg.models.grounding_dino.checkpoints import write_checkpoint
from vg.models.rec.config import RecConfig
from vg.training.settings import TrainConfig
from vg.training.trainer import Trainer

REAL = Path(__file__).parents[3] / ".." / "shared" / "data" / "refcoco_with_images"
needs_images = pytest.mark.skipif(not REAL.is_dir(), reason="no shared/data beside the repository")
TOP = {"refcoco": "refcoco_unc", "refcoco+": "refcocoplus_unc", "refcocog": "refcocog_umd"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random checkpoint of each family, and the second one in the format of transformers."""
    folder = tmp_path_factory.mktemp("checkpoints")
    settings = {
        "name": "rec",
        "image_size": 32,
        "vision": {"frozen": False, "architecture": VISION},
        "text": {"frozen": False, "architecture": TEXT},
        "head": HEAD,
    }
    rec = TypeAdapter(RecConfig).validate_python(settings)
    grounding_dino = tiny_model()
    paths = {name: folder / name for name in ("rec", "grounding_dino", "transformers")}
    for path in paths.values():
        path.mkdir()
    write_model(paths["rec"], rec.build(), ModelOnlyConfig(rec))
    write_model(paths["grounding_dino"], grounding_dino, ModelOnlyConfig(grounding_dino.config))
    published, tokenizer = tiny_model(text=BERT), bert_tokenizer(folder / "bert")
    write_checkpoint(published.own_state_dict(), published.config, tokenizer, paths["transformers"], "transformers")
    return paths


def benchmark(checkpoint: Path, output: Path, *options: str) -> tuple[dict[str, Any], str]:
    """Run the command; return benchmark.json and benchmark.html."""
    main(["eval", str(checkpoint), "--suite", "refcoco", "--workers", "0", "--output", str(output), *options])
    page = (output / "benchmark.html").read_text(encoding="utf-8")
    return json.loads((output / "benchmark.json").read_text()), page


def overlap(box: np.ndarray, other: np.ndarray) -> float:
    """IoU of two xyxy boxes, computed by pycocotools."""
    return float(masks.iou(*([[*xyxy[:2], *(xyxy[2:] - xyxy[:2])]] for xyxy in (box, other)), [0])[0, 0])


def expected_metrics(backend: TorchBackend, dataset: str) -> dict[str, float]:
    """The metrics of one dataset, from predictions of single samples."""
    source = RefcocoConfig(path=str(REAL / "refs.json"), split="val", dataset=dataset).build()
    tops, hits, ranked = [], defaultdict(list), defaultdict(list)
    for index in range(len(source)):
        sample = source.load(index, epoch=0)
        (prediction,) = backend.predict_samples([sample])
        overlaps = [overlap(box, sample.boxes[0]) for box in prediction.boxes.numpy().astype(float)]
        tops.append(overlaps[0])
        for limit in (1, 5, 10):
            hits[limit].append(max(overlaps[:limit]) >= 0.5)
        for threshold in (0.5, 0.75):
            matched = False
            for score, iou in zip(prediction.scores[:100].tolist(), overlaps, strict=False):
                ranked[threshold].append((-score, len(ranked[threshold]), iou >= threshold and not matched))
                matched |= iou >= threshold
    metrics = {"miou": np.mean(tops)}
    metrics |= {f"acc@{threshold}": np.mean(np.array(tops) >= threshold) for threshold in (0.5, 0.75, 0.9)}
    metrics |= {f"recall@{limit}": np.mean(values) for limit, values in hits.items()}
    for threshold, rows in ranked.items():
        true = np.cumsum([row[2] for row in sorted(rows)])
        recall, precision = true / len(tops), true / np.arange(1, len(true) + 1)
        points = [precision[recall >= point - 1e-9].max(initial=0.0) for point in np.linspace(0, 1, 101)]
        metrics[f"map@{100 * threshold:.0f}"] = np.mean(points)
    return metrics


@needs_images
@pytest.mark.parametrize("family", ["rec", "grounding_dino", "transformers"])
def test_table_json_and_page(
    family: str, checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = ["--splits", "val"] if family == "rec" else ["--datasets", "refcoco", "--splits", "val"]
    results, page = benchmark(checkpoints[family], tmp_path, "--data", str(REAL), *splits, "--batch-size", "1")
    shown = capsys.readouterr().out
    assert [split["key"] for split in results["parts"]] == (list(TOP) if family == "rec" else ["refcoco"])
    if family != "transformers":
        backend = TorchBackend(load_model(checkpoints[family]), "cpu")
        if family == "grounding_dino":
            backend.model.config.predict.score = "max"
        for split in results["parts"]:
            expected = expected_metrics(backend, TOP[split["key"]])
            assert {name: split[name] for name in expected} == pytest.approx(expected, abs=1e-6)
        model = backend.model
        assert results["model"]["parameters"] == sum(weights.numel() for weights in model.parameters())
        trained = sum(weights.numel() for weights in model.parameters() if weights.requires_grad)
        assert results["model"]["trainable_parameters"] == trained
    for split in results["parts"]:
        assert (split["partition"], split["split"]) == ("umd" if split["key"] == "refcocog" else "unc", "val")
        assert split["official"] == "no", "a subset of a split is not official"
        assert split["expressions_per_second"] * split["seconds"] == pytest.approx(split["num_expressions"])
        assert split["images_per_second"] * split["seconds"] == pytest.approx(split["num_images"]) == pytest.approx(1)
        for labels in split["slices"].values():
            counts, mious = ([s[name] for s in labels.values()] for name in ("num_expressions", "miou"))
            assert sum(counts) == split["num_expressions"]
            mean = np.average(mious, weights=counts)
            assert mean == pytest.approx(split["miou"])
        assert split["intervals"] == {}, "one image has no variance between images"
    assert ("best probability over its tokens" in shown) == (family != "rec")
    assert "* not the complete official split" in shown
    assert re.search(r"MaPPER +86\.03", shown)
    assert re.search(rf"this checkpoint +{100 * results['parts'][0]['acc@0.5']:.2f}\*", shown)
    assert f"{results['parts'][0]['miou']:.4f}" in shown
    assert f"{results['parts'][0]['miou']:.4f}" in page
    assert page.count("data:image/jpeg;base64,") >= len(results["parts"])
    assert not re.search(r"(src|href)=\"(?!data:)", page), "the page is self-contained"
    for split in results["parts"]:
        assert split["data"] in page


def write_tests(data: Path) -> list[str]:
    """Write the real images as testA and testB; return the options that evaluate on them."""
    rows = json.loads((REAL / "refs.json").read_text())
    data.mkdir()
    (data / "images").symlink_to((REAL / "images").resolve())
    for row, split in zip(rows, ["testA", "testB", "testB"] * 8, strict=False):
        row |= {"dataset": "refcoco_unc", "split": split}
    (data / "refs.json").write_text(json.dumps(rows))
    return ["--data", str(data), "--datasets", "refcoco", "--splits", "testA,testB"]


@needs_images
def test_testa_and_testb_are_pooled(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    results, page = benchmark(checkpoints["rec"], tmp_path / "out", *write_tests(tmp_path / "data"))
    one, other = results["parts"]
    (pooled,) = results["pooled"]
    weights = one["num_expressions"], other["num_expressions"]
    assert pooled["num_expressions"] == sum(weights) == 22
    for name in ("miou", "acc@0.5", "recall@10"):
        assert pooled[name] == pytest.approx(np.average([one[name], other[name]], weights=weights))
    assert (pooled["split"], pooled["official"]) == ("testA + testB", "no")
    low, high = pooled["intervals"]["miou"]
    assert low < pooled["miou"] < high
    assert "0.6196" in page
    assert "0.2173" in page


@needs_images
def test_two_processes_give_the_same_metrics(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    options = [*write_tests(tmp_path / "data"), "--batch-size", "3", "--workers", "0"]
    script = Path(__file__).parents[3] / "scripts" / "benchmark_refcoco.py"

    def launched(processes: int) -> dict[str, Any]:  # not in this process, whose arithmetic may differ
        output = tmp_path / str(processes)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [str(script), str(checkpoints["rec"]), *options, "--output", str(output)]
        subprocess.run(command, env=os.environ | {"ACCELERATE_USE_CPU": "true"}, check=True, capture_output=True)
        return json.loads((output / "benchmark.json").read_text())

    alone, together = launched(1), launched(2)
    assert together["device"].startswith("2 x cpu")
    assert together["pooled"] == alone["pooled"]
    for one, two in zip(alone["parts"], together["parts"], strict=True):
        assert two["slices"] == one["slices"]
        assert two["map@50"] == one["map@50"]


def write_grefs(folder: Path) -> None:
    """gRefCOCO in miniature: expressions of one object, two objects and no object."""
    folder.mkdir(parents=True)
    image = {"id": 520199, "file_name": "COCO_train2014_000000520199.jpg"}
    boxes = {1: [364.57, 96.53, 155.07, 215.67], 2: [56.45, 111.94, 185.17, 268.9]}
    annotations = [{"id": id, "image_id": 520199, "category_id": 1, "bbox": box} for id, box in boxes.items()]
    (folder / "instances.json").write_text(json.dumps({"images": [image], "annotations": annotations}))
    refs = [
        {"ref_id": ref_id, "ann_id": ids, "image_id": 520199, "split": "val", "sentences": [{"sent": sent}]}
        for ref_id, (ids, sent) in enumerate([([1], "pink shirt"), ([1, 2], "both women"), ([-1], "the dog")])
    ]
    (folder / "grefs(unc).json").write_text(json.dumps(refs))


@needs_images
def test_generalized_expressions(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    write_grefs(tmp_path / "grefcoco")
    options = ["--data", str(tmp_path), "--images", str(REAL / "images"), "--datasets", "grefcoco", "--splits", "val"]
    results, page = benchmark(checkpoints["rec"], tmp_path / "out", *options)
    (split,) = results["parts"]
    assert (split["num_expressions"], split["num_absent"]) == (3, 1)
    assert {"f1", "n_acc", "t_acc", "auc"} <= split.keys()
    assert split["protocol"].startswith("all boxes that score at least 0.7")
    assert split["slices"]["words"]["1-2"]["num_expressions"] == 3
    assert "F1=1" in page


@needs_images
def test_grounding_dino_is_trained_on_generalized_expressions(tmp_path: Path) -> None:
    write_grefs(tmp_path / "grefcoco")
    source = RefcocoConfig(path=str(tmp_path / "grefcoco"), split="val", image_root=str(REAL / "images"))
    config = RunConfig(
        model=tiny_config(),
        data=DataConfig(train=source, eval=source, batch_size=3, workers=0),
        train=TrainConfig(max_steps=2, epochs=2, output=str(tmp_path / "run"), log_every=1, trackers=[]),
    )
    results = Trainer(config).fit()
    assert (results["num_expressions"], results["num_absent"]) == (3, 1)
    assert 0 <= results["f1"] <= 1
    losses = [row["loss"] for row in history(config) if "loss" in row]
    assert len(losses) == 2
    assert np.isfinite(losses).all()


@needs_images
def test_limited_splits_are_not_official(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    options = ["--data", str(REAL), "--datasets", "refcoco", "--splits", "val", "--limit", "2"]
    results, _ = benchmark(checkpoints["rec"], tmp_path, *options)
    assert results["parts"][0]["num_expressions"] == 2
    assert results["parts"][0]["official"] == "no"


@needs_images
def test_a_run_keeps_its_score_and_precision_and_parts_have_folders_of_their_own(tmp_path: Path) -> None:
    model, run = tiny_model(), tmp_path / "run"
    scenes = ShapesConfig(size=2)
    config = RunConfig(model=model.config, data=DataConfig(scenes, scenes), train=TrainConfig(precision="bf16"))
    run.mkdir()
    write_model(run, model, config)
    data = ["--data", str(REAL), "--datasets", "refcoco", "--workers", "0"]
    main(["eval", str(run), "--suite", "refcoco", *data, "--splits", "val", "--limit", "1"])
    results = json.loads((run / "eval/suite=refcoco,datasets=refcoco,splits=val,limit=1/benchmark.json").read_text())
    assert results["precision"] == "bf16"
    assert results["model"]["answers"].endswith("the mean probability over its tokens")
    assert not (run / "benchmark.json").exists(), "a part must not replace the results of the whole suite"
    assert interpolation(run) is None
    (run / "interpolation.json").write_text('{"best": 0.5, "results": []}')
    assert interpolation(run) == 0.5


@needs_images
def test_a_bad_first_sample_is_skipped_on_request(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    options = write_tests(tmp_path / "data")
    rows = json.loads((tmp_path / "data" / "refs.json").read_text())
    first = next(row for row in rows if row["split"] == "testB")
    wrong = [row | {"image": "missing.jpg"} if row is first else row for row in rows]
    (tmp_path / "data" / "refs.json").write_text(json.dumps(wrong))
    with pytest.raises(SystemExit, match=r"missing\.jpg"):
        benchmark(checkpoints["rec"], tmp_path / "out", *options)
    results, _ = benchmark(checkpoints["rec"], tmp_path / "out", *options, "--bad-samples", "skip")
    assert ["num_skipped" in part for part in results["parts"]] == [False, True]


@needs_images
def test_expressions_that_are_too_long_are_found_first_and_skipped_on_request(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = write_tests(tmp_path / "data")
    rows = json.loads((tmp_path / "data" / "refs.json").read_text())
    row = next(row for row in rows if row["split"] == "testB")
    row["sent"] = "left " * 300
    (tmp_path / "data" / "refs.json").write_text(json.dumps(rows))

    def evaluate_nothing(*_: Any) -> None:
        raise AssertionError("lengths are checked before anything is evaluated")

    with monkeypatch.context() as patched:
        patched.setattr("vg.evaluation.evaluator.DatasetEvaluator.predict", evaluate_nothing)
        with pytest.raises(SystemExit) as stopped:
            benchmark(checkpoints["rec"], tmp_path / "out", *options)
    message = r"cannot take 1 of \d+ samples:.*testB.*302 tokens.*left left.*--bad-samples skip"
    assert re.search(message, str(stopped.value), re.DOTALL)
    results, page = benchmark(checkpoints["rec"], tmp_path / "out", *options, "--bad-samples", "skip")
    one, other = results["parts"]
    (pooled,) = results["pooled"]
    assert ("num_skipped" in one, other["num_skipped"], pooled["num_skipped"]) == (False, 1, 1)
    assert other["official"] == "no"
    assert one["num_expressions"] + other["num_expressions"] == pooled["num_expressions"] == 21
    assert other["expressions_per_second"] * other["seconds"] == pytest.approx(other["num_expressions"])
    for labels in other["slices"].values():
        assert sum(values["num_expressions"] for values in labels.values()) == other["num_expressions"]
        mean = np.average([v["miou"] for v in labels.values()], weights=[v["num_expressions"] for v in labels.values()])
        assert mean == pytest.approx(other["miou"])
    assert "<th>skipped</th>" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--suite", "refcoco", "--datasets", "refcocos"],
            "--datasets: 'refcocos' is not one of refcoco, refcoco\\+, refcocog",
        ),
        (["--suite", "refcoco", "--splits", "dev"], "'dev' is not one of val, testA, testB, test"),
        (["--suite", "refcoco", "--data", "away"], "--data: away is not a folder"),
        (["--suite", "refcoco", "--limit", "0"], "--limit: expected at least 1 expression, got 0"),
        (["--suite", "refcoco", "--batch-size", "0"], "--batch-size 0: expected at least 1"),
        (["--suite", "refcoco", "--workers", "-1"], "--workers -1: expected at least 0"),
        (["--suite", "refcoco", "--data", "."], r"(?s)refcoco val is not in .*hf download jxu124/refcoco-benchmark"),
        (["--suite", "refcoco", "--data", ".", "--datasets", "grefcoco"], r"(?s)not all .*grefs\(unc\).json"),
        (
            ["--suite", "refcoco"],
            r"(?s)jxu124/refcoco-benchmark \(path\) is neither a local path nor .*--data:.*refs\(unc\).p.*train2014",
        ),
        (["--bad-samples", "skip"], "--bad-samples belongs to a benchmark"),
        (["--data", "."], "--data belongs to a benchmark: add --suite refcoco"),
    ],
)
def test_errors_of_options_and_data(
    options: list[str], message: str, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["eval", str(checkpoints["rec"]), *options])
    assert re.search(message, str(stopped.value))


def test_every_option_of_a_benchmark_needs_a_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    add_arguments = benchmark_options.add_arguments

    def with_new(parser: argparse.ArgumentParser) -> None:
        add_arguments(parser)
        parser.add_argument("--new")

    monkeypatch.setattr(benchmark_options, "add_arguments", with_new)
    with pytest.raises(SystemExit, match="--new belongs to a benchmark: add --suite refcoco"):
        main(["eval", "nowhere", "--new", "3"])


@needs_images
def test_errors_of_checkpoints(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    data = ["--suite", "refcoco", "--data", str(REAL), "--datasets", "refcoco", "--splits", "val"]
    with pytest.raises(SystemExit, match=r"(?s)transformers:.*heads .* must .* divide width \(3\)"):
        main(["eval", str(checkpoints["transformers"]), "model.width=3", *data])
    with pytest.raises(SystemExit, match="contains neither config"):
        main(["eval", str(tmp_path), *data])
