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
    """Loads a run folder or a checkpoint folder as a `Pipeline`; see `minidiff.pipeline.load`."""
    from minidiff.pipeline import load as load_pipeline  # here, so that `import minidiff` stays light

    return load_pipeline(path, weights, device)
