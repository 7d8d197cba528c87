"""Inference: all image types, one or more phrases, crops and the command line."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertTokenizer

import vg
from tests.models.grounding_dino.tiny import tiny_model
from vg.cli import main
from vg.data.synthetic.shapes import ShapesConfig
from vg.errors import CheckpointError, ConfigError, DataError, PredictionError
from vg.inference.images import to_array
from vg.models.base import GroundingModel
from vg.types import Batch, FittedImage, Prediction, TextSpec

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished short run, trained from the command line as `make demo` does."""
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


def test_demo_writes_metrics_and_figures(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"miou", "acc@0.5", "acc@0.75", "acc@0.9", "map@50", "map@75", "num_expressions"} <= metrics.keys()
    assert {"attribute/acc@0.5", "superlative/miou", "relation/num_expressions"} <= metrics.keys()
    assert metrics["split"] == "test"
    assert metrics["data"].startswith("shapes")
    assert metrics["protocol"]
    assert all(not isinstance(value, (dict, list)) for value in metrics.values())
    for name in ("predictions.png", "curves.png"):
        with Image.open(run / name) as image:
            assert min(image.size) > 200


def test_every_image_type_gives_the_same_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VG_PRIVATE_URLS", "1")
    pixels = scene()
    Image.fromarray(pixels).save(tmp_path / "scene.png")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/scene.png"
        images = [pixels, Image.fromarray(pixels), tmp_path / "scene.png", str(tmp_path / "scene.png"), url]
        for image in images:
            np.testing.assert_array_equal(to_array(image), pixels)
        with pytest.raises(DataError, match=r"missing\.png"):
            to_array(url.replace("scene", "missing"))
        server.shutdown()


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((4, 8, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert to_array(tmp_path / "turned.png").shape == (8, 4, 3)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("nowhere.png", "nowhere.png"),
        (np.zeros((4, 4, 2), np.uint8), r"\[4, 4, 2\]; expected"),
        (np.zeros((0, 0, 3), np.uint8), r"\[0, 0, 3\]; expected"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
    ],
)
def test_invalid_images_raise(image: object, message: str) -> None:
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


def test_demo_saves_the_scene_of_the_readme(run: Path) -> None:
    phrase = (run / "scene.txt").read_text().strip()
    assert phrase == "the red cross"
    assert f'vg predict runs/demo runs/demo/scene.png "{phrase}"' in (ROOT / "README.md").read_text()
    with Image.open(run / "scene.png") as image:
        assert image.size == (64, 64)


def test_published_calling_convention(grounder: vg.Grounder) -> None:
    """Positional as in the published notebook, or by keyword; the images can be shown."""
    pixels, model = scene(), grounder.model
    tokenizer = model.text_spec.tokenizer
    expected = vg.predict_and_crop(pixels, "the red circle", model, device="cpu", threshold=0.0)
    assert all(isinstance(part, np.ndarray) for part in (expected[0], expected[2]))
    for crop, box, drawn in (
        vg.predict_and_crop(Image.fromarray(pixels), "the red circle", model, tokenizer, lambda image: image, "cpu"),
        vg.predict_and_crop(pixels, "the red circle", model, None, lambda image: image, torch.device("cpu")),
        vg.predict_and_crop(pixels, "the red circle", model, tokenizer, None, device="cpu"),
        vg.predict_and_crop(pixels, "the red circle", model, tokenizer=tokenizer, transforms=None, device="cpu"),
    ):
        assert isinstance(crop, Image.Image)
        assert isinstance(drawn, Image.Image)
        np.testing.assert_array_equal(np.asarray(crop), expected[0])
        np.testing.assert_array_equal(np.asarray(drawn), expected[2])
        assert box == expected[1]
    other = SimpleNamespace(get_vocab=lambda: {"other": 0})
    with pytest.warns(UserWarning, match="not that of the model"):
        vg.predict_and_crop(pixels, "the red circle", model, other, None, "cpu")


def test_a_batch_equals_single_images(grounder: vg.Grounder) -> None:
    pixels = scene()
    expressions = ["the red circle", "leftmost star"]
    for single, batched in zip(
        (grounder.predict(pixels, expression) for expression in expressions),
        grounder.predict_batch([pixels, pixels], expressions),
        strict=True,
    ):
        np.testing.assert_allclose(single.boxes, batched.boxes, atol=1e-2)


@pytest.mark.parametrize("phrases", ["  ", "", [], ["red circle", ""]])
def test_empty_phrases_raise(grounder: vg.Grounder, phrases: str | list[str]) -> None:
    with pytest.raises(DataError, match="no phrase or an empty phrase"):
        grounder.predict(scene(), phrases)


def test_predict_and_crop_has_the_threshold_of_the_model(
    grounder: vg.Grounder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vg.Grounder, "threshold", lambda self, threshold: 1.0 if threshold is None else threshold)
    with pytest.raises(DataError, match="no box reaches the threshold of the model"):
        vg.predict_and_crop(scene(), "red circle", grounder)
    assert vg.predict_and_crop(scene(), "red circle", grounder, threshold=0.0)[0].size


def test_boxes_below_the_threshold_are_left_out(grounder: vg.Grounder) -> None:
    everything = grounder.predict(scene(), "red circle")
    assert len(everything.boxes) == 5
    limit = everything.scores[1].item()
    best = grounder.predict(scene(), "red circle", threshold=limit)
    assert best.scores.tolist() == everything.scores[:2].tolist(), "a score equal to the threshold is kept"
    assert best.boxes.tolist() == everything.boxes[:2].tolist()
    assert len(best.phrase_ids) == 2
    assert len(grounder.predict(scene(), "red circle", threshold=1.0).boxes) == 0
    with pytest.raises(DataError, match=r"nothing found for 'red circle': no box reaches the threshold 1\.0"):
        vg.predict_and_crop(scene(), "red circle", grounder, threshold=1.0)


@pytest.mark.parametrize("threshold", [30, -0.1, float("nan")])
def test_a_threshold_that_is_not_a_score_raises(threshold: float, grounder: vg.Grounder) -> None:
    for predict in (grounder.predict, partial(vg.predict_and_crop, model=grounder)):
        with pytest.raises(ConfigError, match=f"threshold {threshold}: expected a score or IoU from 0 to 1"):
            predict(scene(), "red circle", threshold=threshold)


@pytest.mark.parametrize("family", ["rec", "grounding_dino"])
def test_boxes_that_are_not_finite_raise(family: str, run: Path) -> None:
    model = vg.load_model(run) if family == "rec" else tiny_model()
    name, weights = next((name, weights) for name, weights in model.named_parameters() if "head" in name)
    with torch.no_grad():
        weights.fill_(torch.nan)
    with pytest.raises(PredictionError, match=f"boxes or scores .* are not finite.*: the weights {name} are not"):
        vg.Grounder(model, device="cpu").predict(scene(), "red circle")


def test_arguments_without_effect_are_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match="is a checkpoint of vg, which contains its tokenizer; leave 'words' out"):
        vg.Grounder(run, "cpu", tokenizer="words")
    with pytest.raises(CheckpointError, match="is a local path, which has no revision 'v1'"):
        vg.Grounder(run, "cpu", revision="v1")


def test_unknown_words_are_reported_once(grounder: vg.Grounder, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        grounder.predict(scene(), "猫 猫")
    (message,) = [record.getMessage() for record in caplog.records]
    assert "all tokens of the phrase '猫 猫' are unknown to the tokenizer" in message


class Output(NamedTuple):
    batch: Batch


class Echo(GroundingModel):
    """A model of many phrases that ignores the image and predicts one box per phrase."""

    text_spec = TextSpec(
        BertTokenizer(vocab=str(Path(vg.__file__).parent / "models/small_vocabulary.txt")), 8, (".", "?")
    )
    image_spec = FittedImage(32, 48)

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def load_tokenizer(self, folder: str) -> None: ...

    def forward(self, batch: Batch) -> Output:
        return Output(batch)

    def loss(self, output: Output, batch: Batch) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def batch_weight(self, batch: Batch) -> int:
        raise NotImplementedError

    def predict(self, output: Output, batch: Batch) -> list[Prediction]:
        in_prompt = output.batch.text.phrase_tokens.any(dim=2)  # [R, P]
        predictions = []
        for i, target in enumerate(batch.targets):
            phrase_ids = in_prompt[batch.text.sample_ids == i].any(dim=0).nonzero().squeeze(1)
            boxes, scores = torch.tensor([[0.0, 0, 4, 4]]).expand(len(phrase_ids), 4), 1 / (1 + phrase_ids.float())
            predictions.append(Prediction(target.id, boxes, scores, phrase_ids, target.phrases))
        return predictions


def test_phrases_are_returned_verbatim() -> None:
    phrases = ["  Dog.", "red CIRCLE", "dog", "a blue cup", "car?"]
    grounder = vg.Grounder(Echo(), device="cpu")
    prediction = grounder.predict(scene(), phrases)
    assert prediction.phrases == tuple(phrases)
    assert prediction.phrase_ids.tolist() == [0, 1, 2, 3, 4], "including those of additional prompts"
    assert grounder.predict(scene(), phrases, threshold=0.4).phrase_ids.tolist() == [0, 1]


def test_each_image_of_a_batch_has_its_own_phrases() -> None:
    pixels = scene()
    first, second = vg.Grounder(Echo(), device="cpu").predict_batch([pixels, pixels[:40]], ["dog", ["car", "red cup"]])
    assert (first.phrases, second.phrases) == (("dog",), ("car", "red cup"))
    assert (len(first.boxes), len(second.boxes)) == (1, 2)
    with pytest.raises(ValueError, match="1 entries in phrases for 2 images"):
        vg.Grounder(Echo(), device="cpu").predict_batch([pixels, pixels], ["dog"])


def test_unusable_phrase_raises() -> None:
    with pytest.raises(DataError, match=r"'\?!' has no letter or digit"):
        vg.Grounder(Echo(), device="cpu").predict(scene(), ["dog", "?!"])


def test_an_expression_model_answers_each_phrase_by_itself(grounder: vg.Grounder) -> None:
    phrases = ["red circle", "blue square", "red circle"]
    together = grounder(scene(), phrases)
    assert together.labels == phrases, "the best box of each, in their order"
    for number, phrase in enumerate(phrases):
        single = grounder(scene(), phrase)
        np.testing.assert_allclose(together.boxes[number], single.boxes[0], atol=1e-3)
    everything = grounder.predict(scene(), phrases)
    assert len(everything) == 3 * len(grounder.predict(scene(), "red circle"))
    assert (np.diff(everything.scores) <= 0).all()


def test_images_of_several_expressions_are_encoded_once(grounder: vg.Grounder, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    encode = grounder.model.encode_images
    monkeypatch.setattr(
        grounder.model, "encode_images", lambda images: (encoded.append(len(images)), encode(images))[1]
    )
    assert len(grounder([scene(), scene()], ["red circle", "blue square", "star"])) == 2
    assert encoded == [2]


def test_load_model(run: Path) -> None:
    assert not vg.load_model(run).training
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        vg.load_model(ROOT / "vg")


def test_command_line(run: Path, tmp_path: Path) -> None:
    image, drawn = tmp_path / "scene.png", tmp_path / "drawn.png"
    Image.fromarray(scene()).save(image)
    assert "left" in vg_command("predict", str(run), str(image), "red circle", "--output", str(drawn))
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
        (["eval", "{run}", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["eval", "{empty}"], "not a checkpoint"),
        (["predict", "{run}", "nowhere.png", "red circle"], "nowhere.png"),
    ],
)
def test_command_line_errors(
    arguments: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """User errors print one message and exit with a failing status, without a traceback."""
    with pytest.raises(SystemExit) as stopped:
        main([argument.format(run=run, empty=tmp_path) for argument in arguments])
    assert stopped.value.code not in (0, None)
    assert message in f"{stopped.value.code} {capsys.readouterr().err}"


def test_command_line_help_does_not_import_torch() -> None:
    code = "import sys, vg; from vg.cli import new_parser; new_parser().format_help(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


def test_public_names() -> None:
    for name in vg.__all__:
        assert getattr(vg, name) is not None
    with pytest.raises(AttributeError, match="Grounder"):
        vg.grounder  # noqa: B018
