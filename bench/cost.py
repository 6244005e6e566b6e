"""How a training step's cost grows with width, resolution, tokens and batch: diffusers' UNet2DConditionModel and ours.

    python bench/cost.py                      # eager float32: a minute or two on two cores
    python bench/cost.py --precision bf16

Starts from the tiny network and changes one number at a time.
"""

import argparse
from dataclasses import replace

from folders import SIZES
from networks import call_ours, call_theirs, inputs, networks, ours_adamw, theirs_adamw, training_step
from pairs import compare, parse, report

TINY = replace(SIZES["tiny"], batch=4)
GRIDS = {
    "width": {w: replace(TINY, channels=(w, 2 * w, 4 * w)) for w in (32, 64, 128)},
    "resolution": {r: replace(TINY, resolution=r) for r in (8, 16, 32)},
    "tokens": {n: replace(TINY, tokens=n) for n in (16, 77, 308)},
    "batch": {b: replace(TINY, batch=b) for b in (1, 4, 16)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=7)
    values = parse(parser)
    bf16 = values.precision == "bf16"
    for grid in values.grids:
        for number, size in GRIDS[grid].items():
            (theirs, ours), at = networks(size, values.device), inputs(size, values.device)
            peer = training_step(theirs, call_theirs, at, bf16, theirs_adamw(theirs))
            mine = training_step(ours, call_ours, at, bf16, ours_adamw(ours))
            ratio = compare(peer, mine, rounds=values.rounds, warmup=2)
            report(f"step, {values.precision}, {grid} {number}", ratio)


if __name__ == "__main__":
    main()
