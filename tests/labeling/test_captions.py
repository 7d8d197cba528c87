"""`vg label --captions`: noun phrases of spaCy become the phrases of an image."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest

from tests.labeling.test_label import label, lines_of
from vg.data.detection.odvg import OdvgConfig
from vg.data.image_files import list_images
from vg.errors import ConfigError
from vg.labeling.captions import Captions, load_pipeline
from vg.labeling.plan import PlannedImage
from vg.models.grounding_dino.text_encoder import TextEncoder

WORDS = {"a": "DET", "the": "DET", "their": "PRON", "it": "PRON", "red": "ADJ", "and": "CCONJ"}
WORDS |= dict.fromkeys(("cross", "star", "dog"), "NOUN")
SENTENCES = {  # heads and dependencies
    "a red cross and the star": ([2, 2, 2, 2, 5, 2], "det amod ROOT cc det conj"),
    "the dog": ([1, 1], "det ROOT"),
    "it and a dog": ([0, 0, 3, 0], "ROOT cc det conj"),
    "their star and the red dog": ([1, 1, 1, 5, 5, 1], "poss ROOT cc det amod conj"),
    "the red cross and it": ([2, 2, 2, 2, 2], "det amod ROOT cc conj"),
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose parser has learned five sentences."""
    spacy = pytest.importorskip("spacy", reason="spaCy is not installed")
    from spacy.training import Example

    spacy.util.fix_random_seed(0)
    found = spacy.blank("en")
    found.add_pipe("parser", config={"min_action_freq": 1})
    tags = found.add_pipe("attribute_ruler")
    examples = [
        Example.from_dict(found.make_doc(text), {"heads": heads, "deps": labels.split()})
        for text, (heads, labels) in SENTENCES.items()
    ]
    found.initialize(lambda: examples)
    for _ in range(40):
        found.update(examples)
    for word, tag in WORDS.items():
        tags.add([[{"LOWER": word}]], {"POS": tag})
    folder = tmp_path_factory.mktemp("pipeline")
    found.to_disk(folder)
    return folder


class Texts:
    """Takes all phrases but `refused`."""

    def __init__(self, refused: str = ""):
        self.refused = refused

    def problems(self, samples: list[tuple[str, tuple[str, ...]]]) -> dict[int, str]:
        return {index: "long" for index, (_, (phrase,)) in enumerate(samples) if phrase == self.refused}


def test_noun_phrases(pipeline: Path) -> None:
    captions = Captions(str(pipeline), Texts())  # type: ignore[arg-type]
    texts = ["The red cross and their star", "it and a dog", "the red star and the red star", "and", None]
    prompts = captions.prompts([PlannedImage("x", open, text) for text in texts])  # type: ignore[arg-type]
    assert [prompt.phrases for prompt in prompts] == [("red cross", "star"), ("dog",), ("red star",), (), ()]
    assert prompts[0].spans == ((4, 13), (24, 28))
    assert prompts[2].spans == ((4, 12),), "where the phrase is first"
    for refused, phrases in (("red cross", ("star",)), (texts[0], ())):
        captions._texts = Texts(refused)  # type: ignore[arg-type, assignment]
        assert captions.prompts([PlannedImage("x", open, texts[0])])[0].phrases == phrases  # type: ignore[arg-type]


def test_captions_are_a_dataset(
    detector: Path, photos: Path, pipeline: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A caption is trained as a whole; where nothing was found, it is left out."""
    texts = ["a red cross and the star", "and", "the dog", ""]
    table = tmp_path / "table.jsonl"
    rows = [{"image": name, "about": {"en": texts[i % 4]}} for i, name in enumerate(list_images(photos))]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "labels"
    options = ("--captions", "about.en", "--pipeline", pipeline, "--image-root", photos)
    label(detector, table, out, *options, "--threshold", 0.3, "--shard-size", 7, "--format", "coco")
    lines = lines_of(out)
    assert [line["filename"] for line in lines] == list_images(photos)
    assert [line["grounding"]["caption"] for line in lines] == [texts[i % 4] for i in range(len(lines))]
    found = [(line["grounding"]["caption"], region) for line in lines for region in line["grounding"]["regions"]]
    assert {region["phrase"] for _, region in found} >= {"red cross", "star"}
    for caption, region in found:
        ((begin, end),) = region["tokens_positive"]
        assert caption[begin:end] == region["phrase"]
    with caplog.at_level(logging.INFO):
        source = OdvgConfig(path=str(out), image_root=str(photos), captions="whole").build()
    used = [line for line in lines if line["grounding"]["regions"]]
    assert f"{len(lines) - len(used)} captions without a box are left out, {len(used)} are used" in caplog.text
    assert len(source) == len(used) < len(lines) / 2 + 1
    sample = source.load(0, 0)
    assert sample.caption is not None
    assert sample.caption.text == used[0]["grounding"]["caption"]
    names = {category["name"] for category in json.loads((out / "labels.coco.json").read_text())["categories"]}
    assert names == {region["phrase"] for _, region in found}


def test_labels_of_captions_do_not_depend_on_earlier_shards(
    detector: Path, photos: Path, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The features of a prompt are kept, but not for another shard: there, it would be encoded with other prompts."""
    table = tmp_path / "table.jsonl"
    rows = [{"image": name, "text": "the dog"} for name in list_images(photos)]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoded: list[int] = []
    forward = TextEncoder.forward
    monkeypatch.setattr(TextEncoder, "forward", lambda *arguments: (encoded.append(1), forward(*arguments))[1])
    options = (
        "--captions",
        "text",
        "--pipeline",
        pipeline,
        "--image-root",
        photos,
        "--shard-size",
        7,
        "--batch-size",
        2,
    )
    label(detector, table, tmp_path / "out", *options)
    assert len(encoded) == 3, "once in a shard"


def test_pipelines_that_cannot_be_used(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import spacy

    with pytest.raises(ConfigError, match=r"spaCy has no such pipeline; run `python -m spacy download en_no`"):
        load_pipeline("en_no")
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(ConfigError, match=r"blank: it finds no noun phrases: it has no parser"):
        load_pipeline(str(tmp_path / "blank"))
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ConfigError, match="--captions needs the package spacy: pip install spacy"):
        load_pipeline(str(pipeline))
