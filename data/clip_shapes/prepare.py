"""Bundles a trained tiny OpenCLIP model: averaged weights, in half precision.

python train.py experiment=clip_shapes
python data/clip_shapes/prepare.py runs/clip_shapes
"""

import sys
from pathlib import Path

from minidiff import checkpoint
from minidiff.pipeline import find_checkpoint
from minidiff.tensor_files import write_tensors

if __name__ == "__main__":
    newest = find_checkpoint(sys.argv[1])
    weights = checkpoint.load(newest, ["ema"]).tensors["ema"]
    out = Path(__file__).parent / "model.safetensors"
    write_tensors(out, {name: x.half() for name, x in weights.items()})
    print(f"{newest} → {out} ({out.stat().st_size / 1e6:.1f} MB)")
