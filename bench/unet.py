"""UNet, forward and training step: diffusers' UNet2DConditionModel against ours, same weights, same inputs.

python bench/unet.py                                             # tiny and small, eager: 2 minutes on two cores
python bench/unet.py --modes compiled shipped --sizes tiny       # compiling takes a minute or two for each network

eager     both as they are
compiled  both through torch.compile, static shapes
shipped   theirs eager in float32, as it comes; ours in bfloat16, compiled where `compiled` is among the modes
"""

import argparse
from collections.abc import Callable

import torch
from folders import SIZES
from networks import (
    call_ours,
    call_theirs,
    forward,
    inputs,
    networks,
    ours_adamw,
    theirs_adamw,
    training_step,
)
from pairs import compare, parse, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "small"])
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled", "shipped"], default=["eager", "shipped"])
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--work", nargs="+", choices=["forward", "step"], default=["forward", "step"])
    parser.add_argument("--rounds", type=int, default=15, help="pairs of each comparison (a third of it for small)")
    values = parse(parser)

    for name in values.sizes:
        rounds = values.rounds if name == "tiny" else max(4, values.rounds // 3)
        for mode in values.modes:
            precisions = ["bf16"] if mode == "shipped" else values.precisions
            for precision in precisions:
                compiled = mode == "compiled" or mode == "shipped" and "compiled" in values.modes
                for work in values.work:
                    peer, ours = pair(name, mode, precision, compiled, work)
                    ratio = compare(peer, ours, rounds=rounds, warmup=2)
                    what = f"{work}, {name}, {mode}, {precision}" + (
                        ", compiled" if mode == "shipped" and compiled else ""
                    )
                    report(what, ratio, images_per_s=round(SIZES[name].batch / ratio.ours_s, 1))


def pair(name: str, mode: str, precision: str, compiled: bool, work: str) -> tuple[Callable, Callable]:
    """Returns what to time: theirs and ours, from networks of their own, so that no comparison changes the next."""
    torch._dynamo.reset()
    theirs, ours = networks(SIZES[name])
    if mode == "compiled":
        theirs.compile(dynamic=False)
    if compiled:
        ours.compile(dynamic=False)
    at, bf16 = inputs(SIZES[name]), precision == "bf16"
    if work == "forward":
        return forward(theirs, call_theirs, at, bf16 and mode != "shipped"), forward(ours, call_ours, at, bf16)
    return (
        training_step(theirs, call_theirs, at, bf16 and mode != "shipped", theirs_adamw(theirs)),
        training_step(ours, call_ours, at, bf16, ours_adamw(ours)),
    )


if __name__ == "__main__":
    main()
