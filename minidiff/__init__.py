"""minidiff: text-to-image diffusion from scratch. `minidiff.load(run)` gives a pipeline; the README gives the reading order."""

from pathlib import Path

__version__ = "0.1.0"


def load(path: str | Path, weights: str = "ema", device: str = "auto"):
    """Loads a run folder or a checkpoint folder as a `Pipeline`; see `minidiff.pipeline.load`."""
    from minidiff.pipeline import load as load_pipeline

    return load_pipeline(path, weights=weights, device=device)


def bundled(name: str) -> Path:
    """Returns the folder of a bundled data set or model, from a plain install and from a checkout alike."""
    here = Path(__file__).parent
    for root in (here / "bundled", here.parent / "data"):
        if (root / name).is_dir():
            return root / name
    raise FileNotFoundError(f"minidiff came without its bundled folder 'data/{name}'; reinstall the package")
