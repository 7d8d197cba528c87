"""Phrases of a prompt: names, alternatives and sampled negatives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.data.detection.detection_files import write_coco
from vg.data import CocoConfig, OdvgConfig
from vg.data.detection.vocabulary import Vocabulary, VocabularyConfig
from vg.errors import DataError

NAMES = [f"thing {number}" for number in range(200)]


def phrases(names: list[str], **settings) -> list[str]:
    return list(Vocabulary(names, VocabularyConfig(**settings), "x.json").phrases)


def test_closed_set_prompts_have_every_class():
    vocabulary = Vocabulary(["cat", "dog", "hot dog"], VocabularyConfig(), "x.json")
    for labels in ([2, 0, 2], []):
        prompt, ids = vocabulary.prompt(np.array(labels, np.int64), epoch=3, index=5)
        assert prompt == ("cat", "dog", "hot dog")
        assert ids.tolist() == labels
        assert ids.dtype == np.int64


def test_names_become_natural_language():
    names = ["traffic_light", "bow_(weapon)", "bow_(ribbon)", "TV  set", "(odd)", "crane_(machine)"]
    assert phrases(names) == ["traffic light", "bow weapon", "bow ribbon", "TV set", "odd", "crane"]
    assert phrases(names, lower=True)[3] == "tv set"
    assert phrases(names, clean=False)[:2] == ["traffic_light", "bow_(weapon)"]
    assert Vocabulary(names, VocabularyConfig(), "x").names == tuple(names), "names are unchanged"
    assert phrases(["WBC", "RBC"], phrases={"WBC": "white blood cell"}) == ["white blood cell", "RBC"]


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        ([], {}, "x.json: there are no classes"),
        (["cat", "cat"], {}, "'cat' and 'cat' have the same phrase 'cat'.* merge or rename one$"),
        (
            ["hot_dog", "Hot dog"],
            {},
            "'hot_dog' and 'Hot dog' have the same phrase.*, or set vocabulary.phrases",
        ),
        (["cat", "__"], {}, "'__' has no word"),
        (["cat"], {"phrases": {"dog": "hound"}}, r"vocabulary.phrases has \['dog'\], the classes are 'cat'"),
        (["cat", "dog"], {"phrases": {"dog": "cat"}}, "have the same phrase 'cat'"),
    ],
)
def test_errors(names, settings, message):
    with pytest.raises(DataError, match=message):
        phrases(names, **settings)


def test_alternatives_are_drawn_except_names_of_other_classes():
    names = ["cup/mug", "dog", "hound/dog"]
    assert phrases(names) == names, "off by default"
    assert phrases(names, alternatives=True) == ["cup", "dog", "hound"], "closed-set prompts use the first"
    vocabulary = Vocabulary(names, VocabularyConfig(negatives=3, alternatives=True), "x")
    drawn = [vocabulary.prompt(np.array([0]), 0, index) for index in range(40)]
    seen = {prompt[ids[0]] for prompt, ids in drawn}
    assert seen == {"cup", "mug"}
    assert vocabulary.names == tuple(names), "drawing changes no names"


def test_negatives_as_in_mm_grounding_dino():
    vocabulary = Vocabulary(NAMES, VocabularyConfig(negatives=85, full=0.5), "x")
    labels = np.array([5, 150, 5, 7])
    full, counts = 0, []
    for index in range(400):
        prompt, ids = vocabulary.prompt(labels, 0, index)
        assert [prompt[id] for id in ids] == [NAMES[label] for label in labels]
        assert len(set(prompt)) == len(prompt)
        counts.append(len(prompt) - 3)
        full += counts[-1] >= 80
    assert max(counts) <= 85
    assert min(counts) < 10
    assert 0.4 < full / 400 < 0.65, "half of them full, and a few others nearly full"
    first = [vocabulary.prompt(labels, 0, index)[1][0] for index in range(400)]
    assert len(set(first)) > 60, "the phrases of boxes are anywhere among the others: denoising learns their positions"


def test_a_prompt_depends_on_seed_epoch_and_index_only():
    def prompt(seed: int, epoch: int, index: int):
        return Vocabulary(NAMES, VocabularyConfig(negatives=20, seed=seed), "x").prompt(np.array([3]), epoch, index)[0]

    vocabulary = Vocabulary(NAMES, VocabularyConfig(negatives=20), "x")
    vocabulary.prompt(np.array([9]), 7, 7)
    assert vocabulary.prompt(np.array([3]), 1, 2)[0] == prompt(0, 1, 2)
    assert len({prompt(0, 0, 0), prompt(1, 0, 0), prompt(0, 1, 0), prompt(0, 0, 1)}) == 4


def test_few_classes_and_no_boxes():
    vocabulary = Vocabulary(["cat", "dog"], VocabularyConfig(negatives=85, full=1), "x")
    prompt, ids = vocabulary.prompt(np.zeros(0, np.int64), 0, 0)
    assert set(prompt) == {"cat", "dog"}
    assert ids.shape == (0,)
    one = Vocabulary(["cat"], VocabularyConfig(negatives=1, full=0), "x")
    assert one.prompt(np.zeros(0, np.int64), 0, 0)[0] == ("cat",), "at least one phrase"


def test_only_some_classes_are_used(tmp_path: Path) -> None:
    """Boxes of the other classes are left out, ids for result files stay those of the annotations."""
    config = CocoConfig(path=str(write_coco(tmp_path)), vocabulary=VocabularyConfig(only=["hot dog", "cat"]))
    source = config.build()
    assert source.category_ids == {"cat": 3, "hot dog": 90}
    assert source.num_classes == 2
    sample = source.load(0, epoch=0)
    assert sample.phrases == ("cat", "hot dog")
    assert sample.phrase_ids.tolist() == [1, 0, 0]  # the traffic lights are gone
    with pytest.raises(DataError, match=r"vocabulary.only has \['zebra'\], the classes are 'cat'"):
        CocoConfig(path=config.path, vocabulary=VocabularyConfig(only=["zebra"])).build()
    row = {"filename": "a.png", "height": 40, "width": 60}
    instances = [{"bbox": [0, 0, 9, 9], "label": 0, "category": "cat"}, {"bbox": [1, 1, 9, 9], "label": 1}]
    (tmp_path / "a.jsonl").write_text(json.dumps(row | {"detection": {"instances": instances}}))
    (tmp_path / "labels.json").write_text('{"0": "cat", "1": "dog"}')
    odvg = OdvgConfig(path=str(tmp_path / "a.jsonl"), label_map=str(tmp_path / "labels.json"))
    odvg.vocabulary = VocabularyConfig(only=["dog"])
    sample = odvg.build().load(0, epoch=0)
    assert (sample.phrases, sample.boxes.tolist(), sample.phrase_ids.tolist()) == (("dog",), [[1, 1, 9, 9]], [0])
