"""Images of all kinds for a call, streams of them, and the results folder of `vg predict`."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

import vg
from tests.inference.bright import Bright
from tests.models.grounding_dino.tiny import tiny_model
from vg.checkpoint import write_model
from vg.cli import main
from vg.config import ModelOnlyConfig
from vg.errors import BadSampleError, ConfigError
from vg.inference.images import is_single, named_images, to_array

COUNT = 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of different sizes with one bright rectangle, in a folder and a subfolder."""
    for number in range(COUNT):
        path = tmp_path / "photos" / ("more" if number % 3 else "") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((60 + number, 80, 3), np.uint8)
        pixels[10:30, 5 + number : 40] = 255
        Image.fromarray(pixels).save(path)
    return tmp_path / "photos"


@pytest.fixture
def grounder() -> vg.Grounder:
    return vg.Grounder(Bright(), device="cpu")


def left_sides(results: Iterator[vg.Result]) -> list[float]:
    return sorted(round(float(result.boxes[0, 0])) for result in results)


def test_one_image_a_list_and_streams(grounder: vg.Grounder, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted(map(str, folder.rglob("*.png")))
    single = grounder(files[0], "square")
    assert isinstance(single, vg.Result)
    assert single.name == files[0]
    pixels = [to_array(file) for file in files]
    forms = (np.asarray(pixels[0]), Image.fromarray(pixels[0]), Path(files[0]).read_bytes(), Path(files[0]))
    for form in forms:
        assert is_single(form)
        np.testing.assert_array_equal(grounder(form, "square").boxes, single.boxes)
    listed = grounder([*files[:2], *forms], ("square",))
    assert [result.name for result in listed] == [*files[:2], "image 2", "image 3", "image 4", files[0]]
    expected = list(range(5, 5 + COUNT))
    monkeypatch.chdir(folder.parent)
    for several in (folder, str(folder), "photos/**/*.png", iter(files), (image for image in pixels)):
        results = grounder(several, "square", batch_size=5)
        assert iter(results) is results
        assert left_sides(results) == expected
    assert grounder([], "square") == []


def test_an_image_is_found_under_its_other_coco_name(tmp_path: Path, grounder: vg.Grounder) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "000000000716.jpg")
    assert len(grounder(tmp_path / "COCO_train2014_000000000716.jpg", "square")) == 0
    with pytest.raises(BadSampleError, match=r"717\.jpg does not exist"):
        grounder(tmp_path / "COCO_train2014_000000000717.jpg", "square")


def test_a_stream_is_lazy_and_in_order(grounder: vg.Grounder) -> None:
    drawn = 0

    def images() -> Iterator[np.ndarray]:
        nonlocal drawn
        for _ in itertools.count():
            drawn += 1
            yield np.zeros((8, 8, 3), np.uint8)

    results = grounder.stream(images(), "square", batch_size=2)
    assert [next(results).name for _ in range(3)] == ["image 0", "image 1", "image 2"]
    assert drawn <= 8


def test_frames_of_a_video(tmp_path: Path, grounder: vg.Grounder) -> None:
    path = str(tmp_path / "clip.avi")
    video = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for number in range(10):
        frame = np.zeros((48, 64, 3), np.uint8)
        frame[10:30, 4 * number : 4 * number + 20] = 255
        video.write(frame)
    video.release()
    assert not is_single(path)
    assert named_images(path, every=3)[1] == 4
    results = list(grounder.stream(path, "square", every=3))
    assert [result.name for result in results] == [f"{path}#{number}" for number in (0, 3, 6, 9)]
    assert [round(result.boxes[0, 0] / 4) for result in results] == [0, 3, 6, 9]
    (tmp_path / "broken.mp4").write_text("no video")
    with pytest.raises(BadSampleError, match=r"broken\.mp4 cannot be read"):
        grounder(tmp_path / "broken.mp4", "square")


def test_images_of_a_coco_file(folder: Path, grounder: vg.Grounder) -> None:
    images = [{"id": 7, "file_name": "00.png"}, {"id": 9, "file_name": "more/01.png"}]
    (folder / "coco.json").write_text(json.dumps({"images": images}))
    names = [str(folder / "00.png"), str(folder / "more/01.png")]
    assert [result.name for result in grounder(folder / "coco.json", "square")] == names
    (folder / "odd.json").write_text('{"images": [{"id": 1}]}')
    with pytest.raises(BadSampleError, match=r"odd\.json is not a COCO file with images that have a file_name"):
        grounder(folder / "odd.json", "square")


def test_images_of_a_dataset(folder: Path, grounder: vg.Grounder, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"label": [1, 2], "photo": sorted(map(str, folder.glob("*.png")))[:2]}
    table = datasets.Dataset.from_dict(rows).cast_column("photo", datasets.Image())
    table.to_parquet(folder / "train.parquet")
    monkeypatch.chdir(folder.parent)
    results = list(grounder("hf://datasets/photos", "square"))
    assert [result.name for result in results] == ["hf://datasets/photos#0", "hf://datasets/photos#1"]
    assert left_sides(results) == [5, 8]


def test_a_row_of_a_dataset_without_an_image(
    folder: Path, grounder: vg.Grounder, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = datasets.Dataset.from_dict({"photo": [None, str(min(folder.glob("*.png")))]})
    rows.cast_column("photo", datasets.Image()).to_parquet(folder / "train.parquet")
    monkeypatch.chdir(folder.parent)
    failed: list[str] = []
    results = grounder.stream("hf://datasets/photos", "square", failed=lambda _, error: failed.append(str(error)))
    assert [result.name for result in results] == ["hf://datasets/photos#1"]
    assert failed == ["image hf://datasets/photos#0 is missing: its row has no image; remove the row from the dataset"]


def test_unusable_images_are_reported_or_raise(folder: Path, grounder: vg.Grounder) -> None:
    (folder / "05x.jpg").write_text("broken")
    failed: list[str] = []
    results = grounder.stream(folder, "square", failed=lambda name, error: failed.append(f"{name}: {error}"))
    assert len(list(results)) == COUNT
    (message,) = failed
    assert "05x.jpg cannot be read" in message
    with pytest.raises(BadSampleError, match=r"05x\.jpg cannot be read"):
        list(grounder(folder, "square"))


@pytest.mark.parametrize(
    ("images", "message"),
    [("empty", "empty contains no images"), ("none/*.jpg", r"no file matches none/\*\.jpg")],
)
def test_nothing_to_predict_on(
    images: str, message: str, tmp_path: Path, grounder: vg.Grounder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadSampleError, match=message):
        grounder(images, "square")


def test_wrong_arguments(grounder: vg.Grounder) -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    for arguments, message in (
        ({"threshold": 2}, "threshold 2: expected"),
        ({"nms": -0.1}, "nms -0.1: expected"),
        ({"batch_size": 0}, "batch_size 0: expected at least 1"),
        ({"batch_size": "8"}, "batch_size '8': expected at least 1, an integer"),
        ({"tile": 64.5}, "tile 64.5: expected at least 1, an integer"),
        ({"overlap": "0.2"}, "overlap '0.2': expected a fraction of a tile from 0 to 0.9"),
    ):
        with pytest.raises(ConfigError, match=message):
            grounder(image, "square", **arguments)


def test_precision(grounder: vg.Grounder) -> None:
    model = tiny_model()
    image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    exact = vg.Grounder(model, "cpu").predict(image, ["dog", "cat"])
    for dtype in ("bf16", torch.bfloat16):
        found = vg.Grounder(model, "cpu", dtype=dtype).predict(image, ["dog", "cat"])
        assert found.scores.dtype == np.float32
        np.testing.assert_allclose(found.scores, exact.scores, atol=0.05)
    assert next(model.parameters()).dtype.itemsize == 4
    assert vg.Grounder(model, "cpu", dtype="fp16").backend.dtype == torch.float16
    for wrong in ("int8", "float16", torch.int8):
        with pytest.raises(ConfigError, match=f"dtype {wrong}: expected one of fp32, bf16, fp16"):
            vg.Grounder(model, "cpu", dtype=wrong)


# ---- vg predict ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detector")
    model = tiny_model()
    write_model(folder, model, ModelOnlyConfig(model.config))
    return folder


def predict(*arguments: object) -> None:
    main(["predict", *map(str, arguments), "--device", "cpu"])


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_folder_of_results(detector: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ("--crops", "--threshold", 0.01, "--format", "coco", "--format", "csv", "--output", out)
    predict(detector, folder, "-p", "dog", "hot dog", *options)
    assert len(records(out)) == COUNT
    names = {path.name for path in out.iterdir()}
    assert names == {"settings.json", "results.jsonl", "results.coco.json", "results.csv", "drawn", "crops"}
    assert len(list((out / "drawn").iterdir())) == COUNT
    assert len(list((out / "crops").iterdir())) == sum(len(record["boxes"]) for record in records(out))
    text = capfd.readouterr()
    assert f"written: {out / 'results.csv'}" in text.out
    assert f"{COUNT}/{COUNT}" in text.err


def test_json_is_all_of_standard_output(detector: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "bad.png").write_text("")
    with pytest.raises(SystemExit) as stopped:
        predict(detector, folder, "-p", "dog", "--json")
    assert stopped.value.code == 3
    output = capfd.readouterr()
    assert [json.loads(line)["image"] for line in output.out.splitlines()] == sorted(
        str(path) for path in folder.rglob("??.png")
    )
    assert "error: image" in output.err
    assert "1 image could not be used" in output.err


def test_images_from_standard_input(
    detector: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", iter([f"{folder / '00.png'}\n", "\r\n", f"{folder / 'more'}\r\n"]))
    predict(detector, "-", "-p", "dog", "--output", tmp_path / "out", "--no-draw")
    assert len(records(tmp_path / "out")) == 1 + 8
    assert not (tmp_path / "out/drawn").exists()


def test_files_of_equal_names_are_kept_apart(detector: Path, tmp_path: Path) -> None:
    for name in ("a b.png", "a_b.png", "a?b.png"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name)
    predict(detector, tmp_path, "-p", "dog", "--output", tmp_path / "out")
    assert len(list((tmp_path / "out/drawn").iterdir())) == 3


def test_an_image_that_is_given_twice_has_one_result(detector: Path, folder: Path, tmp_path: Path) -> None:
    image = folder / "00.png"
    predict(detector, image, folder, image, "-p", "dog", "--output", tmp_path / "out", "--no-draw", "--batch-size", 1)
    names = [record["image"] for record in records(tmp_path / "out")]
    assert len(names) == len(set(names)) == COUNT


def test_images_given_by_another_path_are_done(
    detector: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.chdir(folder.parent)
    (tmp_path / "link").symlink_to(folder)
    for path in (folder.name, folder, f"{folder.name}/../{folder.name}", tmp_path / "link"):
        predict(detector, path, folder / "00.png", "-p", "dog", "--output", out, "--no-draw")
        assert [record["image"] for record in records(out)] == sorted(
            str(file.relative_to(folder.parent)) for file in folder.rglob("??.png")
        )


@pytest.mark.skipif(os.name != "posix", reason="needs locks of files")
def test_two_commands_at_once_in_one_folder(detector: Path, tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for number in range(40):
        Image.new("RGB", (64, 64)).save(photos / f"{number:02d}.png")
    command = ("predict", detector, photos, "-p", "dog", "--batch-size", "1", "--no-draw", "--output", out)
    process = subprocess.Popen(
        [sys.executable, "-m", "vg", *map(str, command), "--device", "cpu"], stderr=subprocess.DEVNULL
    )
    results = out / "results.jsonl"
    try:
        while not (results.exists() and b"\n" in results.read_bytes()):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)
        with results.open("ab") as file:
            file.write(b'{"image": "torn')  # as a second command may find it
        before = results.read_bytes()
        for options in ((), ("--overwrite",)):
            with pytest.raises(
                SystemExit, match=r"another vg predict writes to .*out; wait for its end, or use another"
            ):
                predict(*command[1:], *options)
        assert results.read_bytes() == before
    finally:
        process.kill()
        process.wait()
    predict(*command[1:])
    assert [record["image"] for record in records(out)] == sorted(map(str, photos.iterdir()))
    assert {path.name for path in out.iterdir()} == {"settings.json", "results.jsonl"}


def test_coco_files_with_equal_names_of_different_images(detector: Path, tmp_path: Path) -> None:
    files = []
    for number, name in enumerate(("first", "second")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (30 + number, 20)).save(tmp_path / name / "0001.png")
        files.append(tmp_path / name / "coco.json")
        files[-1].write_text('{"images": [{"id": 1, "file_name": "0001.png"}]}')
    predict(detector, *files, "-p", "dog", "--output", tmp_path / "out")
    found = {record["image"]: record["width"] for record in records(tmp_path / "out")}
    assert found == {str(tmp_path / "first/0001.png"): 30, str(tmp_path / "second/0001.png"): 31}
    assert len(list((tmp_path / "out/drawn").iterdir())) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes")
@pytest.mark.parametrize("options", [("--no-draw", "--output"), ("--json", "--crops", "--output"), ("--json",)])
def test_a_name_that_is_not_unicode(
    options: tuple[str, ...], detector: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes((folder / "00.png").read_bytes())
    out = (tmp_path / "out",) if options[-1] == "--output" else ()
    with pytest.raises(SystemExit) as stopped:
        predict(detector, folder, "-p", "dog", *options, *out)
    assert stopped.value.code == 3
    output = capfd.readouterr()
    assert r"caf\udce9.png: its name is not valid Unicode; rename it" in output.err
    if out:
        assert len(records(*out)) == COUNT
    if "--json" in options:
        assert len(output.out.splitlines()) == COUNT


def test_other_settings_need_another_folder(detector: Path, folder: Path, tmp_path: Path) -> None:
    out = ("--output", tmp_path / "out", "--no-draw")
    predict(detector, folder, "-p", "dog", *out)
    with pytest.raises(SystemExit, match=r"has results with other settings \(phrases\): use another --output, or --ov"):
        predict(detector, folder, "-p", "cat", *out)
    predict(detector, folder, "-p", "cat", *out, "--overwrite")
    assert {phrase for record in records(tmp_path / "out") for phrase in record["phrases"]} == {"cat"}
    with pytest.raises(SystemExit, match=r"has results with other settings \(crops\)"):
        predict(detector, folder, "-p", "cat", *out, "--crops")


def test_results_of_other_weights_are_not_continued(detector: Path, folder: Path, tmp_path: Path) -> None:
    """As after more training."""
    model = tmp_path / "model"
    shutil.copytree(detector, model)
    command = (model, folder, "-p", "dog", "--output", tmp_path / "out", "--no-draw")
    predict(*command)
    predict(*command)
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if weights[name].dtype == np.float32)
    save_file({**weights, name: weights[name] + 1}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match=r"has results with other settings \(weights\)"):
        predict(*command)


def test_an_interrupted_command_is_completed(detector: Path, tmp_path: Path) -> None:
    """Killed, and its last line torn: the file equals that of an undisturbed run."""
    random = np.random.default_rng(0)
    for number in range(60):
        Image.fromarray(random.integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / f"{number:02d}.png")
    command = [sys.executable, "-m", "vg", "predict", detector, tmp_path, "-p", "dog", "cat", "--device", "cpu"]
    command += ["--no-draw", "--batch-size", "1", "--threshold", "0.01", "--format", "coco", "--output"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*map(str, command), tmp_path / "quiet"], check=True, env=environment, capture_output=True)
    results = tmp_path / "killed" / "results.jsonl"
    process = subprocess.Popen([*map(str, command), tmp_path / "killed"], env=environment, stderr=subprocess.DEVNULL)
    while not (results.exists() and results.read_bytes().count(b"\n") >= 5) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 5 <= results.read_bytes().count(b"\n") < 60
    with results.open("ab") as file:
        file.write(b'{"image": "torn')
    done = subprocess.run(
        [*map(str, command), tmp_path / "killed"], check=True, env=environment, capture_output=True, text=True
    )
    assert "images are done, continuing" in done.stderr
    for name in ("results.jsonl", "results.coco.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "quiet" / name).read_bytes()
