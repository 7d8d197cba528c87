"""Memory and time of the COCO metrics for as many predictions as an evaluation of COCO or LVIS has.

python scripts/benchmarks/evaluation_memory.py lvis --images 5000

Boxes and scores are random; a third of the predicted boxes are near an object. Each case needs a process of its own,
because the peak of the memory is that of the whole process.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
from torch import Tensor

from scripts.benchmarks.machine import machine
from vg.boxes import from_pixels
from vg.metrics import CocoMetric
from vg.types import Prediction, Target

CASES = {"coco": (80, 7), "lvis": (1203, 11), "one": (1, 3)}  # classes, ground-truth boxes per image
SIZE = (480, 640)


def peak() -> float:
    """Return the largest resident memory of this process so far in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def boxes(count: int) -> Tensor:
    """Draw [count, 4] boxes xyxy in pixels."""
    corner = torch.rand(count, 2) * torch.tensor([400.0, 300.0])
    return torch.cat((corner, corner + 8 + torch.rand(count, 2) * 150), dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--kept", type=int, default=300, help="predicted boxes per image")
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    machine("cpu")
    num_classes, num_boxes = CASES[args.case]
    phrases = tuple(f"class {index}" for index in range(num_classes))
    torch.manual_seed(0)
    metric, before, seconds = CocoMetric(), peak(), 0.0
    for start in range(0, args.images, args.batch_size):
        predictions, targets = [], []
        for image in range(start, min(start + args.batch_size, args.images)):
            true, ids = boxes(num_boxes), (num_classes * torch.rand(num_boxes) ** 3).long()  # some classes are common
            found, labels = boxes(args.kept), (num_classes * torch.rand(args.kept) ** 3).long()
            near = torch.randint(num_boxes, (args.kept // 3,))
            found[: len(near)], labels[: len(near)] = true[near] + torch.randn(len(near), 4) * 5, ids[near]
            scores = torch.rand(args.kept).sort(descending=True).values
            predictions.append(Prediction(f"{image}", found, scores, labels, phrases))
            targets.append(Target(f"{image}", SIZE, phrases, from_pixels(true, SIZE), ids))
        begin = time.perf_counter()
        metric.update(predictions, targets)
        seconds += time.perf_counter() - begin
    print(f"update:  {seconds:6.1f} s, peak {peak():.2f} GB ({before:.2f} GB before)", flush=True)
    begin = time.perf_counter()
    metrics = metric.compute().metrics
    print(f"compute: {time.perf_counter() - begin:6.1f} s, peak {peak():.2f} GB, ap {metrics['ap']:.12f}")


if __name__ == "__main__":
    main()
