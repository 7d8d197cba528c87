"""Measure what cached features cost in accuracy: a trained rec model with live encoders, float32 and bf16 caches.

    python scripts/benchmarks/cache_precision.py runs/demo [--size 1200]

RUN is a run of configs/demo_rec.yaml, whose trained encoders are written to a folder, because only frozen encoders with
an id can be cached. All three are evaluated on the same unseen scenes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from vg.cache.build import build_cache
from vg.config import parse_config
from vg.distributed import new_accelerator
from vg.evaluation.evaluator import Evaluator
from vg.inference.load import open_model
from vg.models.encoders import SMALL_VOCABULARY
from vg.models.rec.model import RecModel
from vg.settings import differences

NAMES = {None: "live encoders", "no": "cache, float32", "bf16": "cache, bf16"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run of configs/demo_rec.yaml")
    parser.add_argument("--size", type=int, default=1200, help="expressions (default: %(default)s)")
    options = parser.parse_args()
    trained, config, *_ = open_model(options.run)
    assert isinstance(trained, RecModel)
    settings = differences(config.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for encoder in ("vision", "text"):
            getattr(trained, encoder).network.save_pretrained(folder / encoder)
            settings[encoder] = {"id": str(folder / encoder)}
        settings["text"]["tokenizer"] = str(SMALL_VOCABULARY)
        scenes = {"name": "shapes", "split": "test", "image_size": trained.config.image_size, "size": options.size}
        for precision, title in NAMES.items():
            cache = precision and {"folder": str(folder / "cache"), "precision": precision}
            data = {"train": scenes, "eval": scenes, "workers": 0, "cache": cache}
            measured = parse_config({"model": settings, "data": data})
            if precision:
                build_cache(measured)
            model = measured.model.build()
            model.load_own_state_dict({k: v for k, v in trained.state_dict().items() if k.startswith("head.")})
            accelerator = new_accelerator()
            result = Evaluator(measured.data, model, accelerator).run(model.to(accelerator.device).eval())
            metrics = result.flat_metrics()
            print(
                title, *(f"{key} {metrics[key]:.4f}" for key in ("acc@0.5", "acc@0.75", "acc@0.9", "miou")), flush=True
            )


if __name__ == "__main__":
    main()
