"""Two implementations of one thing, timed in turns.

A machine's speed changes while one measures (neighbours, heat, other programs), so a time means little, and a ratio of
two times means something only if both were taken in the same moment. `compare` runs peer and ours one after the other,
changes who goes first, and returns the median of the ratios of such pairs.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles

import torch

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "datasets", "denoising-diffusion-pytorch")
ROOT = Path(__file__).resolve().parents[1]

_file: Path | None = None  # where `report` appends, as --json says


@dataclass(frozen=True)
class Ratio:
    """How many times faster ours is than the peer: peer's seconds over ours, above 1 where ours is faster."""

    ratio: float  # median over the pairs
    low: float  # first quartile
    high: float  # third quartile
    peer_s: float  # medians, in seconds
    ours_s: float
    rounds: int


def compare(peer: Callable[[], object], ours: Callable[[], object], *, rounds: int, warmup: int) -> Ratio:
    """Runs both `warmup` times without and `rounds` times (at least 2) with a clock, in turns."""
    for _ in range(warmup):
        peer(), ours()
    pairs = []
    for i in range(rounds):
        if i % 2 == 0:
            a, b = seconds(peer), seconds(ours)
        else:
            b, a = seconds(ours), seconds(peer)
        pairs.append((a, b))
    low, middle, high = quantiles([a / b for a, b in pairs], n=4, method="inclusive")
    return Ratio(middle, low, high, *(median(times) for times in zip(*pairs, strict=True)), rounds)


def seconds(run: Callable[[], object]) -> float:
    """Returns how long one call takes; a GPU's work counts until it is done."""
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - start


def matmul_flops(device: str, n: int = 8192) -> float:
    """Returns how many floating-point operations a second a large bf16 matrix product makes: what there is to reach."""
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ b
    return 2 * n**3 / median(seconds(lambda: a @ b) for _ in range(10))


def report(name: str, ratio: Ratio, **facts: object) -> None:
    """Prints one line, and appends it with the machine's description to the file that --json names (JSON lines)."""
    more = "  ".join(f"{key}={value}" for key, value in facts.items())
    print(
        f"{name:<44} {ratio.ratio:5.2f}  ({ratio.low:.2f} … {ratio.high:.2f})  "
        f"peer {1e3 * ratio.peer_s:.1f} ms, ours {1e3 * ratio.ours_s:.1f} ms  {more}",
        flush=True,
    )
    record(name, **asdict(ratio), **facts)


def record(name: str, **facts: object) -> None:
    """Appends figures that are no pairs of times to the file of --json."""
    if _file is not None:
        _file.parent.mkdir(parents=True, exist_ok=True)
        with _file.open("a") as file:
            file.write(json.dumps({"name": name, **facts, "machine": machine()}) + "\n")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Reads the command line, to which it adds --json; says on what machine the figures come about."""
    global _file
    parser.add_argument("--json", type=Path, metavar="FILE", help="append every figure to this file, one a line")
    values = parser.parse_args()
    _file = values.json
    print("  ".join(f"{key}: {value}" for key, value in machine().items()), flush=True)
    return values


def machine() -> dict[str, object]:
    """Returns what a figure must be read with: hardware, threads, load, versions, commit, command."""
    facts = {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),  # programs that want the processor, this one among them
        "python": platform.python_version(),
        **{name: found for name in LIBRARIES if (found := _version(name))},
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else ""),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    return facts | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()
