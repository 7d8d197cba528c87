"""Run the RefCOCO benchmark on any number of processes.

    accelerate launch scripts/benchmark_refcoco.py CHECKPOINT [...]
    python scripts/benchmark_refcoco.py runs/mine --data DATA --datasets refcoco,refcoco+ --splits val

Same as `vg eval CHECKPOINT --suite refcoco`, with the same options.
"""

import sys

from vg.cli import main

if __name__ == "__main__":
    main(["eval", *sys.argv[1:], "--suite", "refcoco"])
