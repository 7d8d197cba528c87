"""Exported models predict what the model predicts, at other sizes than those they were traced with, without torch."""

from __future__ import annotations

import collections
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vg
from tests.cache.feature_data import cached_config, write_encoders, write_expressions
from tests.conftest import TINY
from tests.models.grounding_dino.tiny import tiny_model
from tests.models.rec.test_encoders import vision
from vg.checkpoint import write_model
from vg.cli import main
from vg.config import parse_config
from vg.errors import CheckpointError, ConfigError, DataError, PredictionError
from vg.models.base import GroundingModel
from vg.models.grounding_dino import query_selection
from vg.models.grounding_dino.config import PredictConfig, ResNetConfig

REASON = "optional packages of vg export: pip install onnx onnxscript onnxruntime"
onnx = pytest.importorskip("onnx", reason=REASON)
onnxruntime = pytest.importorskip("onnxruntime", reason=REASON)
pytest.importorskip("onnxscript", reason=REASON)

from vg.export.onnx_file import write_onnx  # noqa: E402
from vg.export.parity import SelectionBackend, differences, largest_difference  # noqa: E402
from vg.inference.onnx_backend import OnnxBackend  # noqa: E402
from vg.inference.result import Boxes  # noqa: E402
from vg.inference.torch_backend import TorchBackend  # noqa: E402

SHORT = {"encoder_layers": 1, "decoder_layers": 1}  # tracing takes seconds per layer
SHAPES = {
    part: {"name": "shapes", "split": split, "image_size": 64, "size": 2}
    for part, split in (("train", "train"), ("eval", "val"))
}
PHRASES = ("hot dog", "dog", "the small red circle", "a cat", "dog")


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def assert_equal(model: GroundingModel, file: Path, phrases: Iterable[tuple[str, ...]] = (("dog",), PHRASES)) -> None:
    cases = differences(TorchBackend(model, "cpu"), file, ((64, 96), (40, 33), (90, 90)), phrases)
    for case in cases:
        assert case.largest < 1e-4, str(case)


def operators(file: Path) -> collections.Counter[str]:
    graph = onnx.load(file).graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}, "no custom operator"
    return collections.Counter(node.op_type for node in graph.node)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of rec with evaluation data."""
    folder = tmp_path_factory.mktemp("run")
    data = {"name": "shapes", "image_size": 64, "size": 3}
    config = parse_config({"model": TINY, "data": {"train": data, "eval": data | {"split": "val"}}})
    write_model(folder, config.model.build(), config)
    return folder


@pytest.fixture(scope="module")
def rec(run: Path) -> Path:
    """The rec model as an ONNX file, written by the command."""
    file = run / "rec.onnx"
    main(["export", str(run), str(file)])
    return file


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> tuple[GroundingModel, Path]:
    """A Grounding DINO with Swin, and its ONNX file."""
    file = tmp_path_factory.mktemp("onnx") / "detector.onnx"
    model = tiny_model(**SHORT)
    write_onnx(model, file)
    return model, file


def test_rec_equals_the_model(run: Path, rec: Path) -> None:
    model = vg.load_model(run)
    assert_equal(model, rec)
    assert not operators(rec)["GridSample"]


def test_a_model_of_any_number_of_objects_equals_the_model(tmp_path: Path) -> None:
    """Its boxes, after non-maximum suppression, and that nothing is an answer."""
    torch.manual_seed(5)  # random weights may give scores without order, or boxes that all count
    config = parse_config({"model": TINY | {"head": TINY["head"] | {"objects": "any"}}, "data": SHAPES})
    model = config.model.build()
    torch.nn.init.constant_(model.head.score.bias, -1)
    torch.nn.init.normal_(model.head.score.weight)
    write_onnx(model, tmp_path / "any.onnx")
    assert_equal(model, tmp_path / "any.onnx")
    ours, exported = (vg.Grounder(x, "cpu") for x in (model, str(tmp_path / "any.onnx")))
    assert ours.threshold(None) == exported.threshold(None) == 0.5
    numbers = [[len(x(image(64, 96, seed), PHRASES)) for x in (ours, exported)] for seed in range(4)]
    assert all(one == other for one, other in numbers)
    assert len({one for one, _ in numbers}) > 1, numbers


def test_grounding_dino_equals_the_model(detector: tuple[GroundingModel, Path]) -> None:
    model, file = detector
    assert_equal(model, file)
    assert not operators(file)["GridSample"]


def test_another_selection_is_a_difference(
    detector: tuple[GroundingModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch follows the tokens of the exported model, so wrong ones must show in their logits."""
    model, file = detector
    run, best_tokens = SelectionBackend.run, query_selection.best_tokens

    def worst_first(self: SelectionBackend, *arguments: Any) -> list[np.ndarray]:
        found = run(self, *arguments)
        self.selected[-1] = self.selected[-1][:, ::-1].copy()
        return found

    case = next(iter(differences(TorchBackend(model, "cpu"), file, ((64, 96),), (("dog",),), (1,))))
    assert case.largest < 1e-4
    monkeypatch.setattr(SelectionBackend, "run", worst_first)
    case = next(iter(differences(TorchBackend(model, "cpu"), file, ((64, 96),), (("dog",),), (1,))))
    assert case.selection > 0.01
    assert query_selection.best_tokens is best_tokens, "only while it compares"


def test_phrases_in_several_prompts(detector: tuple[GroundingModel, Path]) -> None:
    """The tokens of a prompt are limited; the boxes of an image come from all of its prompts."""
    model, file = detector
    many = tuple(
        f"{a} {b} {c}" for a in ("red", "blue", "green") for b in ("small", "big") for c in ("dog", "cat", "box")
    )
    backend = OnnxBackend(file)
    (group,) = backend.prepare([image(64, 96)], [many]).groups
    assert len(group.text.mask) > 1
    limited = TorchBackend(model, "cpu")
    limited.collate.texts.max_tokens = backend.settings.max_tokens  # type: ignore[union-attr]
    for case in differences(limited, file, ((64, 96),), (many,)):
        assert case.largest < 1e-4, str(case)


def test_grid_sample_form_split_with_max_scores(tmp_path: Path) -> None:
    predict = PredictConfig(score="max", top_k=15, threshold=0.3, nms=0.7)
    backbone = ResNetConfig(depths=[1, 1, 1, 1], widths=[8, 16, 24, 32])
    model = tiny_model(**SHORT, backbone=backbone, predict=predict)
    file = tmp_path / "split.onnx"
    write_onnx(model, file, "grid-sample", split=True)
    assert_equal(model, file)
    assert operators(file)["GridSample"] == 2 * model.config.levels  # type: ignore[union-attr]
    assert not operators(tmp_path / "split.text.onnx")["GridSample"]
    expected, found = (grounder(image(64, 96), PHRASES) for grounder in (vg.Grounder(model, "cpu"), vg.Grounder(file)))
    assert expected.labels == found.labels, "threshold and NMS are applied"
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=0.01)
    backend = OnnxBackend(file)
    encoded = []
    session = backend.text_session
    backend.text_session = type(
        "Counting",
        (),
        {
            "run": lambda self, *x: encoded.append(1) or session.run(*x),
            "get_outputs": lambda self: session.get_outputs(),
        },
    )()
    for seed in range(3):
        backend.predict(backend.prepare([image(64, 96, seed)], [PHRASES]))
    assert len(encoded) == 1, "a prompt that repeats is encoded once"
    (tmp_path / "split.text.onnx").unlink()
    with pytest.raises(CheckpointError, match=r"split\.text\.onnx does not exist"):
        OnnxBackend(file)


def test_files_of_different_exports_are_refused(run: Path, rec: Path, tmp_path: Path) -> None:
    file, text = tmp_path / "split.onnx", tmp_path / "split.text.onnx"
    write_onnx(vg.load_model(run), file, split=True)
    assert len(vg.Grounder(file)(image(64, 64), "dog")) == 1
    encoder = onnx.load(text)
    encoder.metadata_props[0].value = "the digest of other weights"
    other = encoder.SerializeToString()
    del encoder.metadata_props[:]
    for content in (other, encoder.SerializeToString(), rec.read_bytes(), file.read_bytes()):
        text.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"split\.text\.onnx is not the text .*split\.onnx: copy both files"):
            vg.Grounder(file)


def test_grounder_has_the_same_interface(run: Path, rec: Path, tmp_path: Path) -> None:
    images = [image(60, 80), image(48, 48, 1)]
    expected, found = vg.Grounder(run, "cpu"), vg.Grounder(rec)
    for a, b in zip(expected(images, PHRASES), found(images, PHRASES), strict=True):
        assert (a.labels, a.phrases) == (b.labels, b.phrases)
        np.testing.assert_allclose(a.boxes, b.boxes, atol=0.01)
        np.testing.assert_allclose(a.scores, b.scores, atol=1e-4)
    assert found.tokenizer("a dog")["input_ids"] == expected.tokenizer("a dog")["input_ids"]
    with pytest.raises(DataError, match="tokens"):
        found(images, "dog " * 300)
    for refused in (found.compile, lambda: found.to("cuda"), lambda: found.model):
        with pytest.raises(ConfigError, match="an ONNX model"):
            refused()
    with pytest.raises(ConfigError, match="vg export"):
        vg.Grounder(rec, dtype="fp16")
    with pytest.raises(ConfigError, match="device tpu"):
        vg.Grounder(rec, "tpu")
    foreign = tmp_path / "foreign.onnx"
    model = onnx.load(rec)
    del model.metadata_props[:]
    onnx.save(model, foreign)
    with pytest.raises(CheckpointError, match="not written by vg export"):
        vg.Grounder(foreign)
    foreign.write_bytes(b"no model")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        vg.Grounder(foreign)


def test_the_classes_are_in_the_file(tmp_path: Path) -> None:
    model = tiny_model(**SHORT).eval()
    model.classes = ("hot dog", "dog")
    write_onnx(model, tmp_path / "model.onnx")
    found, expected = vg.Grounder(tmp_path / "model.onnx"), vg.Grounder(model, "cpu")
    assert found.classes == model.classes
    assert found(image(60, 80), threshold=0).phrases == expected(image(60, 80), threshold=0).phrases == model.classes


WITHOUT_TORCH = """
import sys
import vg
from vg.cli import main
main(["predict", sys.argv[1], sys.argv[2], "a red circle", "--output", sys.argv[3]])
print(vg.Grounder(sys.argv[1])(sys.argv[2], ["dog", "cat"]))
assert "torch" not in sys.modules
"""


def test_prediction_needs_no_torch(rec: Path, tmp_path: Path) -> None:
    Image.fromarray(image(64, 96)).save(tmp_path / "image.png")
    command = [sys.executable, "-c", WITHOUT_TORCH, str(rec), str(tmp_path / "image.png"), str(tmp_path / "drawn.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 boxes" in done.stdout
    assert (tmp_path / "drawn.png").exists()


def test_int8_reports_its_loss(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["export", str(run), str(tmp_path / "int8.onnx"), "--int8"])
    assert "after int8" in capsys.readouterr().out
    assert operators_of_all_domains(tmp_path / "int8.onnx")["MatMulInteger"] > 0
    assert len(vg.Grounder(tmp_path / "int8.onnx")(image(64, 64), "dog")) == 1


def test_int8_of_a_checkpoint_on_the_hub_reports_its_loss(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(run))
    monkeypatch.setattr("vg.hub._check_network", lambda: None)
    main(["export", "somebody/found", str(tmp_path / "int8.onnx"), "--int8", "--split"])
    assert "after int8" in capsys.readouterr().out


def test_int8_of_a_run_with_cached_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_expressions(tmp_path)
    write_encoders(tmp_path)
    config = cached_config(tmp_path, {})
    folder = tmp_path / "run"
    folder.mkdir()
    write_model(folder, config.model.build(), config)
    main(["export", str(folder), str(tmp_path / "int8.onnx"), "--int8"])
    assert "after int8" in capsys.readouterr().out
    config.data.eval.path = str(tmp_path / "elsewhere")  # type: ignore[union-attr]
    write_model(folder, config.model.build(), config)
    main(["export", str(folder), str(tmp_path / "int8.onnx"), "--int8"])
    assert "the accuracy of int8 was not measured: " in capsys.readouterr().out


def operators_of_all_domains(file: Path) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in onnx.load(file).graph.node)


@pytest.mark.parametrize("model_type", ["dinov3_vit", "dinov3_convnext", "swin"])
def test_layers_and_their_projection(model_type: str, tmp_path: Path) -> None:
    encoder = {"architecture": vision(model_type), "layers": [1, 2], "mixed_width": 24}
    model = parse_config({"model": TINY | {"vision": encoder}, "data": SHAPES}).model.build().eval()
    write_onnx(model, tmp_path / "model.onnx")
    assert_equal(model, tmp_path / "model.onnx", [PHRASES])


def test_images_that_keep_their_aspect_ratio_are_refused(tmp_path: Path) -> None:
    config = parse_config({"model": TINY | {"keep_aspect": True}, "data": SHAPES})
    write_model(tmp_path, config.model.build(), config)
    for name in ("model.onnx", "model.pt2"):
        with pytest.raises(SystemExit, match=r"model\.keep_aspect=true cannot be exported yet"):
            main(["export", str(tmp_path), str(tmp_path / name)])
        assert not (tmp_path / name).exists()


def test_a_difference_is_an_error_and_leaves_no_file(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_network = OnnxBackend.run

    def wrong(self: OnnxBackend, *arguments: Any) -> list[np.ndarray]:
        boxes, scores, *rest = run_network(self, *arguments)
        return [boxes, scores + 0.01, *rest]

    monkeypatch.setattr(OnnxBackend, "run", wrong)
    with pytest.raises(SystemExit, match=r"differs from PyTorch by 0\.01"):
        main(["export", str(run), str(tmp_path / "wrong.onnx")])
    assert not list(tmp_path.iterdir())


def test_a_program_of_torch_export(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rec.pt2"
    main(["export", str(run), str(file)])
    assert "largest difference" in capsys.readouterr().out
    model = TorchBackend(vg.load_model(run), "cpu")
    images = [image(64, 64), image(64, 64, 1), image(64, 64, 2)]
    prepared = model.prepare(images, [("dog",)] * 3)
    batch = prepared.batch
    program = torch.export.load(file).module(check_guards=False)
    with torch.no_grad():
        boxes, scores, _ = program(batch.images, batch.text.token_ids[:1], batch.text.mask[:1])
    for expected, *found in zip(model.predict(prepared), boxes, scores, strict=True):
        np.testing.assert_allclose(found[0] * 64, expected.boxes, atol=0.01)
        np.testing.assert_allclose(found[1], expected.scores, atol=1e-4)


def test_wrong_options(run: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["out.bin"], r"must end with \.onnx or \.pt2"),
        (["out.pt2", "--split"], r"options of \.onnx"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["export", str(run), *arguments])


def test_largest_difference_of_boxes() -> None:
    boxes = np.array([[0, 0, 10, 10], [5, 5, 20, 20]], np.float32)
    a = Boxes(boxes, np.array([0.5, 0.4], np.float32), np.array([0, 1]))
    assert largest_difference(a, a, (100, 100)) == (0, 0)
    assert largest_difference(Boxes(*(x[:1] for x in a)), a, (100, 100)) == (0, 0), "the others are candidates"
    moved = a._replace(boxes=boxes + np.array([2, 0, 0, 0], np.float32))
    assert largest_difference(a, moved, (100, 100))[0] == pytest.approx(0.02)
    assert largest_difference(a, a._replace(phrase_ids=np.array([1, 0])), (100, 100))[0] == pytest.approx(0.1)
    assert largest_difference(a, a._replace(phrase_ids=np.array([0, 2])), (100, 100))[0] == np.inf
    equal = a._replace(scores=np.array([1, 1], np.float32))
    assert largest_difference(equal, equal._replace(boxes=boxes + 1), (100, 100))[0] == pytest.approx(0.01)
    none = Boxes(*(x[:0] for x in a))
    assert largest_difference(none, a, (100, 100)) == (np.inf, np.inf)
    assert largest_difference(a, none, (100, 100)) == (np.inf, np.inf)
    assert largest_difference(none, none, (100, 100)) == (0, 0)


def test_nan_is_an_error(rec: Path) -> None:
    backend = OnnxBackend(rec)
    prepared = backend.prepare([image(64, 64)], [("dog",)])
    prepared.groups[0].pixels[:] = np.nan
    with pytest.raises(PredictionError, match="not finite"):
        backend.predict(prepared)
