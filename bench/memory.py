"""Peak memory of a training step: diffusers' UNet2DConditionModel against ours, each in a process of its own.

    python bench/memory.py

What is measured: the highest resident memory while three updates are made (weights, gradients, AdamW's moments and all
that lives between forward and backward), less what the process held before it built the network. glibc is told to give
freed memory back at once, to both alike, so that the figure is what is in use and not what was used before. On a GPU,
the most that tensors took there (--device cuda).
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from folders import SIZES
from networks import call_ours, call_theirs, inputs, networks, ours_adamw, theirs_adamw, training_step
from pairs import parse, record

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "small"])
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    values = parse(parser)
    for name in values.sizes:
        for precision in values.precisions:
            peer, ours = (in_a_process(who, name, precision, values.device) for who in ("theirs", "ours"))
            print(
                f"{name}, {precision}: peer {peer:.0f} MiB, ours {ours:.0f} MiB, ours/peer {ours / peer:.2f}",
                flush=True,
            )
            record(f"peak memory, {name}, {precision}", peer_mib=peer, ours_mib=ours, ours_over_peer=ours / peer)


def in_a_process(who: str, name: str, precision: str, device: str) -> float:
    done = subprocess.run(
        [sys.executable, __file__, "--measure", who, name, precision, device],
        env=os.environ | GIVE_BACK,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(who: str, name: str, precision: str, device: str) -> float:
    """Returns MiB: the peak of this process over three updates, less what it held before."""
    updates(who, "tiny", precision, device)  # libraries load their code at first use; that is not what a network needs
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        updates(who, name, precision, device)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    updates(who, name, precision, device)
    return (_status("VmHWM") - before) / 1024


def updates(who: str, name: str, precision: str, device: str) -> None:
    theirs, ours = networks(SIZES[name], device)
    at, bf16 = inputs(SIZES[name], device), precision == "bf16"
    if who == "theirs":
        del ours
        step = training_step(theirs, call_theirs, at, bf16, theirs_adamw(theirs))
    else:
        del theirs
        step = training_step(ours, call_ours, at, bf16, ours_adamw(ours))
    for _ in range(3):
        step()


def _status(key: str) -> int:
    """Returns a line of the kernel's account of this process, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(measure(*sys.argv[2:]))
    else:
        main()
