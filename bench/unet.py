"""UNet, forward and training step: diffusers' UNet2DConditionModel against ours, same weights, same inputs.

python bench/unet.py                                             # tiny and small, eager: 2 minutes on two cores
python bench/unet.py --modes compiled shipped --sizes tiny       # compiling takes a minute or two for each network

eager     both as they are
compiled  both through torch.compile, static shapes
graphs    both through torch.compile with mode="reduce-overhead": CUDA graphs, on a GPU
shipped   theirs eager in float32, as it comes; ours in bfloat16, compiled where `compiled` is among the modes
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from folders import SIZES, Size
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
from pairs import compare, matmul_flops, parse, report
from torch.utils.flop_counter import FlopCounterMode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "small"])
    parser.add_argument(
        "--modes", nargs="+", choices=["eager", "compiled", "graphs", "shipped"], default=["eager", "shipped"]
    )
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--work", nargs="+", choices=["forward", "step"], default=["forward", "step"])
    parser.add_argument("--rounds", type=int, default=15, help="pairs of each comparison (a third of it for small)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--batch", type=int, help="instead of the size's own, to fill a GPU")
    values = parse(parser)
    peak = matmul_flops(values.device) if values.device == "cuda" else None

    for name in values.sizes:
        size = replace(SIZES[name], batch=values.batch or SIZES[name].batch)
        rounds = values.rounds if name == "tiny" or peak else max(4, values.rounds // 3)
        for mode in values.modes:
            precisions = ["bf16"] if mode == "shipped" else values.precisions
            for precision in precisions:
                compiled = mode == "compiled" or mode == "shipped" and "compiled" in values.modes
                for work in values.work:
                    peer, ours = pair(size, values.device, mode, precision, compiled, work)
                    ratio = compare(peer, ours, rounds=rounds, warmup=2)
                    what = f"{work}, {name}, {mode}, {precision}" + (
                        ", compiled" if mode == "shipped" and compiled else ""
                    )
                    facts = {"images_per_s": round(size.batch / ratio.ours_s, 1)}
                    if peak and work == "step":  # the share of what matrix products alone reach (bf16)
                        facts["mfu"] = round(training_flops(size, values.device) / ratio.ours_s / peak, 3)
                    report(f"{what}, {size.batch} at once", ratio, **facts)


def training_flops(size: Size, device: str) -> int:
    """Counts the floating-point operations of one update's forward and backward."""
    net, at = networks(size, device)[1], inputs(size, device)
    with FlopCounterMode(display=False) as counter:
        call_ours(net, at).sum().backward()
    return counter.get_total_flops()


def pair(size: Size, device: str, mode: str, precision: str, compiled: bool, work: str) -> tuple[Callable, Callable]:
    """Returns what to time: theirs and ours, from networks of their own, so that no comparison changes the next."""
    torch._dynamo.reset()
    theirs, ours = networks(size, device)
    how = {"dynamic": False} | ({"mode": "reduce-overhead"} if mode == "graphs" else {})
    if mode in ("compiled", "graphs"):
        theirs.compile(**how)
    if compiled or mode == "graphs":
        ours.compile(**how)
    at, bf16 = inputs(size, device), precision == "bf16"
    if work == "forward":
        return forward(theirs, call_theirs, at, bf16 and mode != "shipped"), forward(ours, call_ours, at, bf16)
    return (
        training_step(theirs, call_theirs, at, bf16 and mode != "shipped", theirs_adamw(theirs)),
        training_step(ours, call_ours, at, bf16, ours_adamw(ours)),
    )


if __name__ == "__main__":
    main()
