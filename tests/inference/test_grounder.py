"""Asking a trained model: pictures in all forms, crops, the command line and the notebook."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

import vg
from vg.__main__ import main
from vg.checkpoint import CheckpointError
from vg.data.shapes import ShapesConfig
from vg.data.source import DataError
from vg.inference.grounder import to_array

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of a second, made by the command line as `make demo` does it."""
    folder = tmp_path_factory.mktemp("demo")
    tiny = [
        "model.vision.architecture={model_type: dinov3_convnext, hidden_sizes: [16, 32], depths: [1, 1]}",
        "model.head={name: dense, width: 32, layers: 1, heads: 2, feedforward: 64}",
        *("data.train.size=32", "data.eval.size=6", "data.workers=0", "train.epochs=1", "train.max_steps=2"),
        *("train.eval_every=2", "train.save_every=2", f"train.output={folder / 'run'}"),
    ]
    vg_command("demo", *tiny)
    return folder / "run"


def vg_command(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "vg", *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def grounder(run: Path) -> vg.Grounder:
    return vg.Grounder(run, device="cpu")


def scene() -> np.ndarray:
    return ShapesConfig(split="test").build().load(0, 0).image


def test_demo_leaves_what_it_promises(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"miou", "acc@0.5", "acc@0.75", "acc@0.9", "map@50", "map@75", "num_expressions"} <= metrics.keys()
    assert {"attribute/acc@0.5", "superlative/miou", "relation/num_expressions"} <= metrics.keys()
    assert metrics["split"] == "test"
    assert metrics["data"].startswith("shapes")
    assert metrics["protocol"]
    assert all(not isinstance(value, (dict, list)) for value in metrics.values())
    for picture in ("predictions.png", "curves.png"):
        with Image.open(run / picture) as image:
            assert min(image.size) > 200


def test_every_form_of_picture_gives_the_same_pixels(tmp_path: Path) -> None:
    pixels = scene()
    Image.fromarray(pixels).save(tmp_path / "scene.png")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/scene.png"
        forms = [pixels, Image.fromarray(pixels), tmp_path / "scene.png", str(tmp_path / "scene.png"), url]
        for form in forms:
            np.testing.assert_array_equal(to_array(form), pixels)
        with pytest.raises(DataError, match=r"missing\.png"):
            to_array(url.replace("scene", "missing"))
        server.shutdown()


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    pixels = np.zeros((4, 8, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert to_array(tmp_path / "turned.png").shape == (8, 4, 3)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("nowhere.png", "nowhere.png"),
        (np.zeros((4, 4), np.uint8), r"\[4, 4\] uint8"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
    ],
)
def test_no_picture(image: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        to_array(image)


def test_predict_and_crop(grounder: vg.Grounder) -> None:
    pixels = scene()
    crop, box, drawn = vg.predict_and_crop(pixels, "the red circle", grounder)
    assert drawn.shape == pixels.shape
    assert not np.array_equal(drawn, pixels)
    left, top, right, bottom = box
    assert 0 <= left < right <= pixels.shape[1]
    assert 0 <= top < bottom <= pixels.shape[0]
    assert abs(crop.shape[0] - (bottom - top)) <= 1.5
    assert abs(crop.shape[1] - (right - left)) <= 1.5


def test_a_batch_gives_what_single_pictures_give(grounder: vg.Grounder) -> None:
    pixels = scene()
    expressions = ["the red circle", "leftmost star"]
    for single, batched in zip(
        (grounder.predict(pixels, expression) for expression in expressions),
        grounder.predict_batch([pixels, pixels], expressions),
        strict=True,
    ):
        np.testing.assert_allclose(single.boxes, batched.boxes, atol=1e-2)


def test_an_empty_expression(grounder: vg.Grounder) -> None:
    with pytest.raises(DataError, match="empty"):
        grounder.predict(scene(), "  ")


def test_load_model(run: Path) -> None:
    assert not vg.load_model(run).training
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        vg.load_model(ROOT / "vg")


def test_command_line(run: Path, tmp_path: Path) -> None:
    picture, drawn = tmp_path / "scene.png", tmp_path / "drawn.png"
    Image.fromarray(scene()).save(picture)
    assert "left" in vg_command("predict", str(run), str(picture), "red circle", "--output", str(drawn))
    assert drawn.exists()
    out = tmp_path / "evaluation"
    assert "attribute" in vg_command("eval", str(run), "--output", str(out), "data.eval.split=val", "data.eval.size=9")
    assert json.loads((out / "metrics.json").read_text())["num_expressions"] == 9
    assert "optim:" in vg_command("config", str(run / "config.yaml"), "optim.lr=3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "{run}/config.yaml"], "--resume"),
        (["train", "{run}/config.yaml", "--resume", "train.output={empty}"], "nothing to resume"),
        (["train", "{run}/config.yaml", "optim.lrr=3"], "did you mean `lr`"),
        (
            ["train", "{run}/config.yaml", "train.output={empty}/x", "optim.groups={{visn: {{lr: 1}}}}"],
            "near names: vision",
        ),
        (["train", "{run}/config.yaml", "train.output={empty}/x", "train.trackers=[nonsense]"], "capability: nonsense"),
        (["eval", "{run}", "data.eval.splt=val"], "did you mean `split`"),
        (["eval", "{run}", "--nonsense"], "unrecognised arguments: --nonsense"),
        (["eval", "{empty}"], "not a checkpoint"),
        (["predict", "{run}", "nowhere.png", "red circle"], "nowhere.png"),
    ],
)
def test_command_line_errors(
    arguments: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One message and a failing exit status, no traceback."""
    with pytest.raises(SystemExit) as stopped:
        main([argument.format(run=run, empty=tmp_path) for argument in arguments])
    assert stopped.value.code not in (0, None)
    assert message in f"{stopped.value.code} {capsys.readouterr().err}"


def test_start_is_fast_because_torch_is_not_imported() -> None:
    code = "import sys, vg; from vg.__main__ import _parser; _parser().format_help(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


def test_public_names() -> None:
    for name in vg.__all__:
        assert getattr(vg, name) is not None
    with pytest.raises(AttributeError, match="Grounder"):
        vg.grounder  # noqa: B018


def test_notebook_runs(run: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(ROOT / "notebooks" / "predict_and_crop.ipynb", as_version=4)
    environment = {**os.environ, "VG_MODEL": str(run), "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path)}
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute(cwd=str(ROOT / "notebooks"), env=environment)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
