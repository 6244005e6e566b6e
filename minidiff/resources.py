"""The small data and weights that come with minidiff, in data/<name>/ of a checkout."""

from pathlib import Path


def bundled(name: str) -> Path:
    """Returns the folder of a bundled data set or model, from a plain install and from a checkout alike."""
    here = Path(__file__).parent
    for root in (here / "bundled", here.parent / "data"):
        if (root / name).is_dir():
            return root / name
    raise FileNotFoundError(f"minidiff came without its bundled folder 'data/{name}'; install it again")
