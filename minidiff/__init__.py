"""minidiff: text-to-image diffusion from scratch. `minidiff.load(run)` gives a pipeline; the README, the reading
order.
"""

from pathlib import Path

from minidiff.resources import bundled

__version__ = "0.1.0"
__all__ = ["bundled", "load"]


def load(path: str | Path, weights: str = "ema", device: str = "auto"):
    """Loads a run folder or a checkpoint folder as a `Pipeline`; see `minidiff.pipeline.load`."""
    from minidiff.pipeline import load as load_pipeline  # here, so that `import minidiff` stays light

    return load_pipeline(path, weights, device)
