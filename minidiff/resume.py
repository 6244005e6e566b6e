"""Going on with a run is going on with *that* run: from which checkpoint, and what may have changed since."""

from collections.abc import Mapping
from pathlib import Path

from minidiff import checkpoint
from minidiff.errors import CheckpointError

# A change of these makes another run: other weights, another meaning of them, or another sequence of samples.
FIXED = ("seed", "batch_size", "image_size", "background", "net", "space", "text", "process", "objective")
# These may differ without being worth a word. `data` is compared by its content, `task` is made of other groups.
FREE = ("name", "every", "keep", "device", "workers", "resume", "allow_change", "debug", "log", "task", "data", "init")
FREE += ("cache",)


def checkpoint_to_resume(run: Path, wanted: str) -> Path | None:
    """Returns the checkpoint that `resume=wanted` means for a run's folder, or None to start at step 0.

    Raises CheckpointError (MD-CKPT-024, MD-CKPT-025) if there is none where one was asked for, or none that is whole.
    """
    if wanted == "none":
        return None
    folder = run / "checkpoints"
    there = ", ".join(sorted(p.name for p in folder.glob("step_*"))) or "none"
    if wanted == "auto":
        newest = checkpoint.latest(folder)
        if newest is None and there != "none":
            raise CheckpointError(
                "MD-CKPT-025",
                f"{folder} holds checkpoints ({there}), and none of them can be used: the warning above says why "
                "(damaged, or of another version of minidiff). Restore one from a copy, or go on with the version "
                "that wrote it; or start anew with resume=none, or under another name=.",
            )
        return newest
    if not Path(wanted).is_dir():
        raise CheckpointError(
            "MD-CKPT-024", f"resume={wanted} is not a checkpoint folder. Checkpoints of {run}: {there}."
        )
    return Path(wanted)


def require_same_run(saved: Mapping, now: Mapping, *, allow_change: bool) -> list[str]:
    """Compares the saved state with {"config", "data"} of now; returns what changed and may change, in words.

    Raises CheckpointError (MD-CKPT-026) if the data or a key in FIXED changed, unless `allow_change`.
    """
    before, after = _flat(saved.get("config", {})), _flat(now["config"])
    changed = {
        key: f"{key} was {before.get(key)} and is {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key.split(".")[0] not in FREE
    }
    fixed = [text for key, text in changed.items() if key.split(".")[0] in FIXED]
    if "data" in saved and saved["data"] != now["data"]:
        fixed.append(f"the training data were {saved['data']} and are {now['data']}")
    if fixed and not allow_change:
        raise CheckpointError(
            "MD-CKPT-026",
            f"The checkpoint belongs to another run than the one asked for: {'; '.join(fixed)}. Restore these, train "
            "under another name=, or say allow_change=true to go on regardless (the result is then neither run's).",
        )
    return fixed + [text for key, text in changed.items() if text not in fixed]


def _flat(node: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(node, Mapping):
        return {prefix.rstrip("."): node}
    return {key: value for name, child in node.items() for key, value in _flat(child, f"{prefix}{name}.").items()}
