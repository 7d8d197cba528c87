"""The expressions of cached datasets in the memory of the device: a row for each token, its features or its id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vg.cache.source import CachedSource
from vg.data.prompt import Expressions

READERS = 4  # threads, each with the features of a shard
PADDING = 0  # row of a table


class TokenTable:
    """Tokens of all expressions, of which batches are selected without waiting for the device.

    Args:
        values: [1 + tokens, D] float16 or [1 + tokens] int64 on the device; the first row is padding.
        ends: cache -> [E + 1] row of the first token of each of its expressions, and the end of the last one.
        texts: a cache and the indices of its expressions; an entry of the dataset for each of them.
    """

    def __init__(self, values: Tensor, ends: Mapping[Path, np.ndarray], texts: Sequence[tuple[Path, np.ndarray]]):
        self.values = values
        self.starts = np.concatenate([ends[path][chosen] for path, chosen in texts])  # [entries]
        self.lengths = np.concatenate([ends[path][chosen + 1] for path, chosen in texts]) - self.starts

    def rows(self, entries: np.ndarray) -> np.ndarray:
        """Return the rows of these entries, [R, T], padded."""
        steps, lengths = np.arange(self.lengths[entries].max()), self.lengths[entries, None]
        return np.where(steps < lengths, self.starts[entries, None] + steps, PADDING)

    def select(self, rows: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the values [R, T, ...] of the flattened rows [R * T], and their mask [R, T], False = padding."""
        return self.values.index_select(0, rows).unflatten(0, shape), (rows != PADDING).view(shape)


def feature_table(
    sources: Mapping[Path, CachedSource], texts: Sequence[tuple[Path, np.ndarray]], device: torch.device
) -> TokenTable:
    """Read the features of all expressions; raises CacheError if they are damaged."""
    first = list(accumulate((int(source.ends[-1]) for source in sources.values()), initial=1))
    width = next(iter(sources.values())).text_width
    values = torch.empty((first[-1], width), dtype=torch.float16, device=device)
    values[PADDING] = 0
    ends = {path: start + source.ends for start, (path, source) in zip(first, sources.items(), strict=False)}

    def read(path: Path, shard: int, expressions: range) -> None:
        start = ends[path][expressions.start]
        features = torch.from_numpy(sources[path].text_shard(shard))
        values[start : start + len(features)].copy_(features)

    with ThreadPoolExecutor(READERS) as pool:
        for path, source in sources.items():
            shards = source.folder.text_shards(len(source.ends) - 1)
            list(pool.map(read, [path] * len(shards), range(len(shards)), shards))
    return TokenTable(values, ends, texts)


def id_tables(
    sources: Mapping[Path, CachedSource],
    texts: Sequence[tuple[Path, np.ndarray]],
    device: torch.device,
    tokenize: Expressions,
) -> list[TokenTable]:
    """Tokenize all expressions, for each of the text encoders; raises BadSampleError if one is too long."""
    values, ends, first = [np.array([tokenize.spec.tokenizer.pad_token_id])], {}, 1
    for path, source in sources.items():
        expressions = source.texts["expressions"]
        tokens = tokenize.arrays(expressions, [source.folder.name] * len(expressions))
        values.append(tokens.token_ids[tokens.mask])
        ends[path] = np.cumsum([first, *tokens.mask.sum(axis=1)])
        first = int(ends[path][-1])
    table = TokenTable(torch.from_numpy(np.concatenate(values)).to(device), ends, texts)
    return [table, *(id_tables(sources, texts, device, tokenize.extra) if tokenize.extra else [])]
