"""minidiff: text-to-image diffusion from scratch. `minidiff.load(run)` gives a pipeline; the README, the reading
order.
"""

from importlib import import_module
from pathlib import Path

from minidiff.resources import bundled

__version__ = "0.1.0"
__all__ = ["Cond", "bundled", "interop", "load"]


def __getattr__(name: str):
    """Fetches what needs torch when it is first used, so that `import minidiff` stays light."""
    if name == "interop":
        return import_module("minidiff.interop")
    if name == "Cond":
        return import_module("minidiff.cond").Cond
    raise AttributeError(f"module 'minidiff' has no attribute {name!r}")


def load(path: str | Path, weights: str = "ema", device: str = "auto"):
    """Loads a run folder, a checkpoint folder, or a Stable Diffusion folder in the layout of diffusers as a `Pipeline`.

    A run has two sets of `weights`, "ema" and "raw"; other folders have one. Raises as `minidiff.pipeline.load` and
    `minidiff.interop.load_pipeline` do.
    """
    from minidiff import interop, pipeline  # here, so that `import minidiff` stays light
    from minidiff.machine import keep_memory, resolve_device

    device = resolve_device(device)
    keep_memory(device)
    if interop.is_pipeline(path):
        return interop.load_pipeline(path).to(device)
    return pipeline.load(path, weights, str(device))
