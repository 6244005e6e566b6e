"""Does this machine have what training needs?"""

import importlib
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator

from minidiff.doctor import Finding

NEEDED = ("torch", "torchvision", "open_clip", "datasets", "accelerate", "safetensors", "hydra", "PIL")
GIB = 2**30


def examine(folder: str = ".") -> Iterator[Finding]:
    """Yields what there is to say about Python, the libraries, the device, memory shared by workers, and the disk."""
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    advice = "" if supported else "; Hydra 1.3 works with 3.11 to 3.13: make an environment with one of these"
    yield Finding(supported, f"Python {sys.version.split()[0]}{advice}")
    yield from map(_library, NEEDED)
    yield _device()
    yield _free("/dev/shm", 0.5, "workers pass images through it: use workers=0, or docker run --shm-size=8g")
    yield _free(folder, 2.0, "a run keeps several checkpoints: free some, or set keep=1")


def _library(name: str) -> Finding:
    try:
        importlib.import_module(name)
    except ImportError as error:
        return Finding(False, f"{name} cannot be imported ({error}): pip install -e .")
    except (RuntimeError, OSError) as error:  # torchvision built for another torch, CUDA libraries that are missing
        return Finding(
            False,
            f"{name} does not go with the torch that is installed ({str(error).splitlines()[0]}): install both "
            "together, from the same place: pip install --force-reinstall torch torchvision",
        )
    package = {"hydra": "hydra-core", "PIL": "pillow", "open_clip": "open_clip_torch"}.get(name, name)
    return Finding(True, f"{package} {importlib.metadata.version(package)}")


def _device() -> Finding:
    import torch

    from minidiff.machine import resolve_device, resolve_precision

    device = resolve_device("auto")
    if device.type == "cpu" and os.path.exists("/proc/driver/nvidia/version"):
        why = "is built without CUDA" if torch.version.cuda is None else f"(CUDA {torch.version.cuda}) cannot use it"
        return Finding(
            False,
            f"there is an NVIDIA driver, but torch {torch.__version__} {why}: install the build for your driver from "
            "https://pytorch.org/get-started",
        )
    return Finding(True, f"device {device}, precision {resolve_precision('auto', device)}, {os.cpu_count()} CPU cores")


def _free(folder: str, least: float, advice: str) -> Finding:
    if not os.path.isdir(folder):
        return Finding(True, f"{folder} is not there")
    free = shutil.disk_usage(folder).free / GIB
    return Finding(free >= least, f"{free:.1f} GiB free in {folder}" + ("" if free >= least else f"; {advice}"))
