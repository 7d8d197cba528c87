"""Prompt targets: every prompt gets the boxes whose phrase it contains."""

from __future__ import annotations

import torch

from vg.data.collate import prompt_targets
from vg.types import Batch, PromptTargets, Target, Text


def target(phrase_ids: list[int], crowd: list[bool] | None = None) -> Target:
    boxes = torch.arange(len(phrase_ids)).view(-1, 1).expand(-1, 4) / 10
    return Target(
        id="x",
        size=(10, 10),
        phrases=("a", "b", "c"),
        boxes=boxes.clone(),
        phrase_ids=torch.tensor(phrase_ids, dtype=torch.long),
        crowd=None if crowd is None else torch.tensor(crowd),
    )


def text(phrases: list[dict[int, list[int]]], sample_ids: list[int], num_tokens: int = 6) -> Text:
    """One prompt per dict, which maps a phrase to its tokens."""
    phrase_tokens = torch.zeros(len(phrases), 3, num_tokens, dtype=torch.bool)
    for row, tokens in enumerate(phrases):
        for phrase, columns in tokens.items():
            phrase_tokens[row, phrase, columns] = True
    ones = torch.ones(len(phrases), num_tokens)
    return Text(ones.long(), ones.bool(), phrase_tokens, torch.tensor(sample_ids))


def test_phrases_of_an_image_in_several_prompts() -> None:
    """Phrase 1 of the second image is in its second prompt, phrase 2 is in neither."""
    prompts = text([{0: [1], 1: [3, 4]}, {0: [2]}, {1: [1, 2]}], [0, 1, 1])
    found = prompt_targets(prompts, [target([1]), target([1, 0, 2, 1, 0])])
    assert found.counts == (1, 2, 2)
    assert found.boxes.shape == (3, 2, 4)
    assert found.positive_map.shape == (3, 2, 6)
    assert found.mask.tolist() == [[True, False], [True, True], [True, True]]
    torch.testing.assert_close(found.boxes[:, :, 0], torch.tensor([[0.0, 0.0], [0.1, 0.4], [0.0, 0.3]]))
    assert found.phrase_ids[found.mask].tolist() == [1, 0, 0, 1, 1]
    assert found.positive_map[0, 0].nonzero().flatten().tolist() == [3, 4]
    assert [row.nonzero().flatten().tolist() for row in found.positive_map[1]] == [[2], [2]]
    assert [row.nonzero().flatten().tolist() for row in found.positive_map[2]] == [[1, 2], [1, 2]]
    assert not found.positive_map[~found.mask].any()


def test_crowd_regions_are_left_out() -> None:
    found = prompt_targets(text([{0: [1]}, {0: [1]}], [0, 1]), [target([0, 0], [True, False]), target([0])])
    assert found.counts == (1, 1)
    torch.testing.assert_close(found.boxes[:, 0, 0], torch.tensor([0.1, 0.0]))


def test_images_without_boxes() -> None:
    prompts = text([{0: [1]}, {0: [1]}], [0, 1])
    found = prompt_targets(prompts, [target([]), target([0])])
    assert found.counts == (0, 1)
    assert found.mask.tolist() == [[False], [True]]
    found = prompt_targets(prompts, [target([]), target([])])
    assert found.counts == (0, 0)
    assert found.boxes.shape == (2, 0, 4)
    assert found.positive_map.shape == (2, 0, 6)
    assert found.mask.shape == (2, 0)


def test_a_batch_moves_its_prompt_targets_and_keeps_the_counts_on_the_host() -> None:
    prompts, targets = text([{0: [1]}, {0: [1]}], [0, 1]), [target([0]), target([0, 0])]
    of_prompts = prompt_targets(prompts, targets)
    batch = Batch(torch.zeros(2, 3, 4, 4), ((4, 4),) * 2, prompts, targets, of_prompts, torch.arange(2)).to("meta")
    assert all(x.device.type == "meta" for x in batch.prompt_targets[:4])
    assert batch.prompt_targets.counts == (1, 2)


def test_prompt_targets_without_boxes() -> None:
    prompts = text([{0: [1]}, {0: [1]}], [0, 1])
    computed = prompt_targets(prompts, [target([]), target([])])
    empty = PromptTargets.without_boxes(prompts)
    assert empty.counts == computed.counts
    for found, expected in zip(empty[:4], computed[:4], strict=True):
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
