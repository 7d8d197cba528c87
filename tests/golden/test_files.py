"""The recorded files of this folder are small, described, and equal to the complete recording."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.golden.files import FOLDER, SHARED, draw_weights, recorded_tensors

RECORDED = sorted(path for path in FOLDER.rglob("*") if path.suffix in (".xz", ".json", ".txt"))
needs_complete_recording = pytest.mark.skipif(not SHARED.exists(), reason=f"there is no {SHARED}")


def test_at_most_3_mb() -> None:
    assert sum(path.stat().st_size for path in RECORDED) <= 3_000_000


def test_readme_lists_every_file_with_its_size() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for path in RECORDED:
        assert f"| {path.relative_to(FOLDER).as_posix()} | {path.stat().st_size:,} |" in readme, path.name


def test_drawn_weights_have_the_recorded_sums() -> None:
    weights = draw_weights()  # which compares every sum
    assert sum(x.numel() for x in {x.data_ptr(): x for x in weights.values()}.values()) == 1_261_430
    heads = [name for name in weights if name.endswith("bbox_embed.2.layers.0.weight")]
    assert len(heads) == 2
    assert all(weights[name] is weights["transformer.decoder.bbox_embed.0.layers.0.weight"] for name in heads)


@needs_complete_recording
def test_drawn_weights_equal_the_recorded_file() -> None:
    recorded = torch.load(SHARED / "official_tiny.pth", weights_only=True)["model"]
    weights = draw_weights()
    assert {name for name in recorded if not name.endswith("relative_position_index")} == weights.keys()
    for name, weight in weights.items():  # bit-equal on x86; other processors round logarithms and sines differently
        torch.testing.assert_close(weight, recorded[name], rtol=1e-5, atol=1e-7)


@needs_complete_recording
@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name)
def test_files_equal_the_complete_recording(path: Path) -> None:
    if path.name in ("weights.json", "weights_recorded.safetensors.xz"):
        pytest.skip("made from the weight file, see test_drawn_weights_equal_the_recorded_file")
    if path.suffix != ".xz":
        assert path.read_bytes() == (SHARED / path.relative_to(FOLDER)).read_bytes()
        return
    from safetensors.torch import load_file

    name = path.name.removesuffix(".safetensors.xz")
    complete, tensors = load_file(SHARED / f"{name}.safetensors"), recorded_tensors(name)
    assert tensors.keys() <= complete.keys()
    assert all(tensor.dtype == complete[key].dtype and tensor.equal(complete[key]) for key, tensor in tensors.items())
