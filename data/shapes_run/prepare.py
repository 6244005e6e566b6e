"""Bundles a trained run for notebooks and tests: averaged weights in half precision, and the contract, nothing else.

python train.py
python data/shapes_run/prepare.py runs/shapes
"""

import shutil
import sys
from pathlib import Path

from minidiff import checkpoint
from minidiff.pipeline import find_checkpoint

if __name__ == "__main__":
    newest = find_checkpoint(sys.argv[1])
    saved = checkpoint.load(newest, ["ema"])
    out = Path(__file__).parent / "checkpoints"
    shutil.rmtree(out, ignore_errors=True)
    tensors = {"ema": {name: x.half() for name, x in saved.tensors["ema"].items()}}
    state = {"name": saved.state["name"], "contract": saved.state["contract"]}
    print(checkpoint.save(out, saved.step, tensors, state))
