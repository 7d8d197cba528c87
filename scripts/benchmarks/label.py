"""Measure what `vg label` costs beyond forward passes, and kill its workers at random moments.

    python scripts/benchmarks/label.py [--images 10000] [--kills 5] [--workers 1 2 3] [--engines torchrun array ray]

Small drawn scenes and a small Grounding DINO with random weights, one thread per process. The labels of every row must
equal those of an undisturbed run, byte by byte. The overhead is that of one process: labeling a folder and forward
passes of the same batches, prepared beforehand, run in turn, and the medians of the ratios are reported. On a busy
machine, compare CPU times.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
LABEL = ("-m", "vg", "label")
CLOCKS = {
    "elapsed": time.perf_counter,
    "CPU of the main thread, beside which images are read": time.thread_time,
    "CPU of all threads": time.process_time,
}
PHRASES = ("circle", "square", "triangle", "star", "cross", "diamond")


def contents(folder: Path) -> dict[str, bytes]:
    """Name and content of every file."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run_quietly(words: list[str], out: Path, *options: str) -> None:
    """Label with one worker; `words` are model, data and options."""
    start(["python", *LABEL], words, out, *options).wait()


def start(program: list[str], words: list[str], out: Path, *options: str) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, *program[1:], *words[:2], str(out), *words[2:], *options]
    return subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class Killed:
    """Workers of one engine, one of which is killed.

    Args:
        engine: "torchrun", "array" (one of its workers is started) or "ray".
        seed: of the moment and of the worker; of an array, worker `seed` modulo `workers` is started.
    """

    def __init__(self, engine: str, workers: int, words: list[str], out: Path, seed: int):
        self.out, self.engine = out, engine
        self.random = random.Random(seed)
        if engine == "torchrun":
            launcher = ["python", "-m", "torch.distributed.run", "--nproc_per_node", str(workers)]
            self.process = start([*launcher, *LABEL], words, out)
        elif engine == "array":
            shard = f"{seed % workers}/{workers}"
            self.process = start(["python", *LABEL], words, out, "--shard", shard)
        else:
            self.process = start(["python", *LABEL], words, out, "--engine", "ray", "--workers", str(workers))

    def kill_after(self, num_shards: int, seconds: float = 0.05) -> bool:
        """Wait until there are more shards than now, and a random time; then kill one worker, if any is left."""
        wanted = self._num_shards() + num_shards
        while self._num_shards() < wanted and self.process.poll() is None:
            time.sleep(0.002)
        time.sleep(self.random.uniform(0, seconds))
        if self.process.poll() is not None:
            return False
        try:
            self.random.choice(self._workers()).send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:  # it has just ended
            return False
        return True

    def wait(self) -> int:
        """Return the exit status."""
        return self.process.wait(timeout=600)

    def _num_shards(self) -> int:
        return len(list(self.out.glob("*.jsonl")))

    def _workers(self) -> list[psutil.Process]:
        own = psutil.Process(self.process.pid)
        if self.engine == "array":
            return [own]
        begin = "ray::MapWorker" if self.engine == "ray" else sys.executable
        return [p for p in own.children(recursive=True) if p.cmdline()[:1] and p.cmdline()[0].startswith(begin)] or [
            own
        ]


def write_scenes(folder: Path, split: str, count: int, side: int) -> Path:
    """Draw scenes as JPEG files with their true boxes: the folder `split`, split.jsonl and the file of its classes."""
    import numpy as np
    from PIL import Image

    from vg.data.synthetic.scenes import FORMS, draw, random_scene

    (folder / split).mkdir(parents=True)
    forms = list(FORMS)
    with (folder / f"{split}.jsonl").open("w") as truth:
        for index in range(count):
            scene = random_scene(np.random.default_rng((split == "val", index)), side)
            name = f"{index:06d}.jpg"
            Image.fromarray(draw(scene)).save(folder / split / name, quality=90)
            instances = [
                {"bbox": [*map(float, item.box)], "label": forms.index(item.form), "category": item.form}
                for item in scene.objects
            ]
            line = {"filename": name, "height": side, "width": side, "detection": {"instances": instances}}
            truth.write(json.dumps(line) + "\n")
    (folder / "label_map.json").write_text(json.dumps(dict(enumerate(forms))))
    return folder / split


def write_model(folder: Path) -> None:
    """Write the Grounding DINO of the demo with random weights."""
    import torch

    from vg import checkpoint
    from vg.config import load_config

    torch.manual_seed(0)
    config = load_config(ROOT / "configs/demo_grounding_dino.yaml")
    folder.mkdir(parents=True)
    checkpoint.write_model(folder, config.model.build(pretrained=False), config)


def overhead(model: Path, images: Path, folder: Path, count: int, rounds: int) -> dict[str, float]:
    """Return the medians of the ratios of labeling and plain forward passes of the same images, by clock."""
    import torch

    from vg.data.images import read_image
    from vg.labeling.worker import Labeler, LabelSettings

    torch.set_num_threads(1)
    few = folder / "few"
    few.mkdir()
    for file in sorted(images.iterdir())[:count]:
        (few / file.name).symlink_to(file)
    phrases = dict.fromkeys(PHRASES)
    pixels = [read_image(file, file.name) for file in sorted(few.iterdir())]
    ratios: dict[str, list[float]] = {name: [] for name in CLOCKS}
    for number in range(rounds + 1):  # the first is a warm-up
        labeler = Labeler(LabelSettings(str(model), str(few), str(folder / f"few{number}"), phrases, device="cpu"))
        backend, parts = labeler.grounder.backend, [pixels[i : i + 8] for i in range(0, count, 8)]
        batches = [backend.prepare(part, [PHRASES] * len(part)) for part in parts]
        begin = {name: clock() for name, clock in CLOCKS.items()}
        for _ in labeler.run(range(len(labeler.plan))):
            pass
        middle = {name: clock() for name, clock in CLOCKS.items()}
        for batch in batches:
            backend.predict(batch)
        for name, clock in CLOCKS.items():
            ratios[name].append((middle[name] - begin[name]) / (clock() - middle[name]))
    return {name: statistics.median(values[1:]) for name, values in ratios.items()}


def kill_test(
    engine: str, workers: int, words: list[str], out: Path, kills: int, num_shards: int
) -> tuple[int, int, float]:
    """Label with up to `kills` killed workers; return these, the number of commands, and the seconds of everything."""
    begin, starts = time.perf_counter(), 0
    distance = max(1, num_shards // (kills + 1))
    left = kills
    while len(list(out.glob("*.jsonl"))) < num_shards:
        starts += 1
        killed = Killed(engine, workers, words, out, seed=100 * workers + starts)
        if left:
            left -= killed.kill_after(distance // (workers if engine == "array" else 1), seconds=1.0)
            while engine == "ray" and left and killed.process.poll() is None:  # it restarts its workers itself
                left -= killed.kill_after(distance, seconds=1.0)
        killed.wait()
        if starts > 20 * workers:
            sys.exit(f"{engine}, {workers} workers: the labels are not complete after {starts} commands")
    run_quietly(words, out)  # nothing is left to label
    return kills - left, starts, time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=128, help="of the images in pixels")
    parser.add_argument("--shard-size", type=int, default=100)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--engines", nargs="*", default=["torchrun", "array", "ray"])
    parser.add_argument("--rounds", type=int, default=5, help="of the overhead")
    parser.add_argument("--timed", type=int, default=400, help="images of the overhead")
    parser.add_argument("--scenes", type=Path, metavar="FOLDER", help="only write the images and their true boxes")
    options = parser.parse_args()
    if options.scenes:
        write_scenes(options.scenes, "train", options.images, options.side)
        write_scenes(options.scenes, "val", 300, options.side)
        return

    from scripts.benchmarks.machine import machine

    machine("cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        write_model(model)
        images = write_scenes(folder, "train", options.images, options.side)
        if options.rounds:
            for clock, ratio in overhead(model, images, folder, options.timed, options.rounds).items():
                print(f"{options.timed} images: labeling / forward passes, {clock}: {ratio:.3f}", flush=True)
        settings = ["--threshold", "0.05", "--shard-size", str(options.shard_size), "--device", "cpu"]
        words = [str(model), str(images), "-p", *PHRASES, *settings]
        num_shards = -(-options.images // options.shard_size)
        begin = time.perf_counter()
        run_quietly(words, folder / "quiet")
        quiet = contents(folder / "quiet")
        print(f"undisturbed, one worker: {num_shards} shards in {time.perf_counter() - begin:.0f} s", flush=True)
        print("| engine | workers | kills | commands | s | equal |\n|---|---:|---:|---:|---:|---|", flush=True)
        for engine in options.engines:
            for workers in options.workers:
                out = folder / f"{engine}{workers}"
                killed, starts, seconds = kill_test(engine, workers, words, out, options.kills, num_shards)
                equal = "yes" if contents(out) == quiet else "NO"
                row = f"| {engine} | {workers} | {killed} | {starts} | {seconds:.0f} | {equal} |"
                print(row, flush=True)


if __name__ == "__main__":
    main()
