"""Runs the workers of `vg label`: this process is one of several, or Ray has them."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from vg.errors import ConfigError, UserError
from vg.labeling.worker import Counts, Labeler, LabelSettings
from vg.machine import use_fast_products


def worker_of(shard: str | None) -> tuple[int, int]:
    """Return the index of this worker from 0 on, and the number of workers.

    Args:
        shard: "i/n" of an array job, i from 0 on. The processes that torchrun starts, if any, divide it further.

    Raises:
        ConfigError: not of that form, or i is not below n.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", shard or "0/1")
    if not found or int(found[1]) >= int(found[2]):
        raise ConfigError(f"--shard {shard}: expected i/n with i from 0 to n - 1, such as 0/8 for the first of 8")
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return int(found[1]) * size + rank, int(found[2]) * size


def label(settings: LabelSettings, index: int, num_workers: int) -> tuple[Counts, dict[str, str] | None]:
    """Label the missing ones of the shards index, index + num_workers, ...; return counts and the data to train with.

    The latter is None as long as shards of other workers are missing.

    Raises:
        UserError: see Labeler.
    """
    labeler = Labeler(settings)
    shards = labeler.folder.missing(range(index, len(labeler.plan), num_workers))
    shown = int(os.environ.get("LOCAL_RANK", 0)) == 0  # of the workers that share a terminal
    counts = _sum(labeler.run(shards), labeler, shards, shown)
    return counts, labeler.finish()


def label_on_ray(settings: LabelSettings, num_workers: int | None) -> tuple[Counts, dict[str, str] | None]:
    """Label the missing shards by workers of Ray, one per GPU of the cluster by default; returns as `label`.

    The cluster is that of the environment variable RAY_ADDRESS, or else this machine. Data, model and output are paths
    that all machines of the cluster share.

    Raises:
        ConfigError: Ray is not installed.
        UserError: see Labeler.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError("--engine ray needs the package ray: pip install 'ray[data]'") from error
    settings = absolute(settings)  # workers may run in another folder
    labeler = Labeler(settings if settings.checkpoint.endswith(".onnx") else replace(settings, device="cpu"))
    shards = labeler.folder.missing(range(len(labeler.plan)))
    ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level="error")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    gpus = 0 if settings.device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
    rows = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=max(1, len(shards)))
    rows = rows.map_batches(
        _Actor,
        fn_constructor_args=(settings,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=num_workers or max(1, gpus)),
        num_gpus=min(1, gpus),
    )
    counts = _sum(map(_counts_of, rows.iter_rows() if shards else ()), labeler, shards, True)
    return counts, labeler.finish()


def absolute(settings: LabelSettings) -> LabelSettings:
    """Return the settings with paths that do not depend on the working directory."""
    paths: dict[str, Any] = {"output": os.path.abspath(settings.output)}
    for name in ("checkpoint", "data", "image_root", "pipeline", "tokenizer"):
        value = getattr(settings, name)
        if value is not None and (os.path.exists(value) or (name == "data" and "://" not in value)):
            paths[name] = os.path.abspath(value)
    return replace(settings, **paths)


class _Actor:
    """A worker of Ray: holds the model, and labels one shard at a call."""

    def __init__(self, settings: LabelSettings):
        self._settings = settings
        self._labeler: Labeler | None = None

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[str]]:
        """Return counts or the message of a UserError as JSON: Ray does not preserve exceptions."""
        try:
            if self._labeler is None:
                if not self._settings.checkpoint.endswith(".onnx"):
                    use_fast_products()
                self._labeler = Labeler(self._settings)
            counts = Counts()
            for batch in self._labeler.run(rows["shard"].tolist()):
                counts.add(batch)
            return {"json": [json.dumps(vars(counts))]}
        except UserError as error:
            return {"json": [json.dumps(str(error))]}


def _counts_of(row: dict[str, str]) -> Counts:
    """Return the counts of an actor; raises UserError if it did."""
    if isinstance(found := json.loads(row["json"]), str):
        raise UserError(found)
    return Counts(**found | {"phrases": Counter(found["phrases"])})


def _sum(found: Iterator[Counts], labeler: Labeler, shards: list[int], shown: bool) -> Counts:
    """Add up counts as they come, with a progress bar."""
    counts, start = Counts(), time.perf_counter()
    total = sum(map(labeler.plan.size, shards))
    with tqdm(total=total, unit="image", dynamic_ncols=True, disable=not shown) as bar:
        for some in found:
            counts.add(some)
            bar.update(some.images + some.skipped)
    counts.total = time.perf_counter() - start
    return counts
