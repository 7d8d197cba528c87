"""Train on any number of processes: accelerate launch scripts/train.py CONFIG [KEY=VALUE ...] [--resume]."""

import sys

from vg.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
