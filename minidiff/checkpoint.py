"""Checkpoints that are whole or not there.

    step_00001200/  model.safetensors  ema.safetensors  optimizer.safetensors  state.json  MANIFEST.json
    LATEST          the name of the folder written last, for people and scripts

A checkpoint is written beside its place (`.tmp-…`), every file is fsynced, `MANIFEST.json` states the size
and sha256 of each, and one rename puts it in place. A process killed at any instant leaves the previous
checkpoint, and rubbish that nobody looks at. A loader trusts only folders whose manifest verifies.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from minidiff.errors import CheckpointError, MachineError
from minidiff.tensor_files import PICKLES, fsync, read_tensors, refuse_pickle, write_tensors

SCHEMA = 1  # of MANIFEST.json and the files it lists
_MANIFEST = "MANIFEST.json"
_STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """What `load` returns: `tensors[part][name]` on the CPU, and the plain values of state.json."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict

    def entry(self, name: str) -> object:
        """Returns one entry of the state; raises CheckpointError (MD-CKPT-012) that names it if it is not there."""
        if name not in self.state:
            raise CheckpointError(
                "MD-CKPT-012",
                f"The state of the checkpoint of step {self.step} has no '{name}', so training cannot go on exactly. "
                "Begin a new run with its weights by init=FOLDER.",
            )
        return self.state[name]


def save(
    folder: str | Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping,
    *,
    keep_last: int | None = None,
) -> Path:
    """Writes `folder/step_XXXXXXXX`, a file per part (`tensors[part][name]`) and `state` as JSON; returns it.

    `keep_last` then prunes older ones. Raises `NumericsError` if a tensor is not finite and `MachineError` if
    the disk refuses; either way the earlier checkpoints stay as they were.
    """
    folder, place = Path(folder), Path(folder) / f"step_{step:08d}"
    temporary = folder / f".tmp-{place.name}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        temporary.mkdir()
        for part, named in tensors.items():
            write_tensors(temporary / f"{part}.safetensors", named)
        _write(temporary / _STATE, json.dumps(dict(state), indent=1))
        _write(
            temporary / _MANIFEST,
            _manifest(step, {x.name: _identity(x) for x in sorted(temporary.iterdir())}),
        )
        _put_in_place(temporary, place)
        _write(folder / ".tmp-LATEST", place.name + "\n")
        os.replace(folder / ".tmp-LATEST", folder / "LATEST")
        fsync(folder)
    except OSError as error:
        raise MachineError(
            "MD-CKPT-009",
            f"Cannot write the checkpoint {place}: {error}. The earlier checkpoints are as they were. Free "
            f"some disk space, or check the permissions of {folder}.",
        ) from error
    finally:
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
    if keep_last is not None:
        prune(folder, keep_last)
    return place


def prune(folder: str | Path, keep_last: int) -> None:
    """Deletes all but the newest `keep_last` whole checkpoints. A deletion that fails is a warning.

    Nothing is deleted unless one of those that stay verifies byte for byte.
    """
    newest_first = _candidates(Path(folder))
    kept = [x for x in newest_first if _flaw(x, check_bytes=False) is None][: max(1, keep_last)]
    if not any(_flaw(x) is None for x in kept):
        return
    for old in newest_first[newest_first.index(kept[-1]) + 1 :]:
        try:
            _delete(old)
        except OSError as error:
            warnings.warn(f"could not delete the old checkpoint {old}: {error}", stacklevel=2)


def remove_leftovers(folder: str | Path) -> None:
    """Removes what an interrupted save left in `folder`. Only for the process that owns the run."""
    for rubbish in Path(folder).glob(".tmp-*"):
        shutil.rmtree(rubbish, ignore_errors=True) if rubbish.is_dir() else rubbish.unlink(missing_ok=True)
    for replaced in Path(folder).glob("step_*.old"):
        if replaced.with_suffix("").exists():
            shutil.rmtree(replaced, ignore_errors=True)


def _put_in_place(temporary: Path, place: Path) -> None:
    """Renames a finished folder to its name. One that was there stays loadable as `.old` until then."""
    fsync(temporary)
    old = place.with_suffix(".old")
    if place.exists():  # no `.old` beside it: remove_leftovers took that
        os.rename(place, old)
    os.rename(temporary, place)
    fsync(place.parent)
    if old.exists():
        shutil.rmtree(old, ignore_errors=True)


def _delete(checkpoint: Path) -> None:
    """Renames first, so that a deletion that is interrupted cannot leave half a checkpoint."""
    rubbish = checkpoint.with_name(f".tmp-deleted-{checkpoint.name}")
    os.rename(checkpoint, rubbish)
    shutil.rmtree(rubbish)


def _write(file: Path, text: str) -> None:
    with open(file, "w", encoding="utf-8", newline="\n") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def load(checkpoint: str | Path, parts: Sequence[str]) -> Checkpoint:
    """Reads the named parts of one checkpoint folder, and its state, after checking every byte of them.

    Raises `CheckpointError` that names what is missing, damaged, not finite, of another schema or a pickle.
    """
    checkpoint = Path(checkpoint)
    listed = _read_manifest(checkpoint)["files"]
    if absent := [part for part in parts if f"{part}.safetensors" not in listed]:
        there = [name.removesuffix(".safetensors") for name in listed if name.endswith(".safetensors")]
        raise CheckpointError(
            "MD-CKPT-006",
            f"The checkpoint {checkpoint} has no {' and no '.join(absent)}; it holds {', '.join(there)}. "
            f"Resume from one that was saved with it, or start a new run from the weights alone.",
        )
    step = verify(checkpoint, [f"{part}.safetensors" for part in parts] + [_STATE])
    tensors = {part: read_tensors(checkpoint / f"{part}.safetensors") for part in parts}
    return Checkpoint(step, tensors, json.loads((checkpoint / _STATE).read_text(encoding="utf-8")))


def latest(folder: str | Path) -> Path | None:
    """Returns the newest checkpoint in `folder` that verifies, or None; a warning says what was skipped."""
    skipped = []
    for checkpoint in _candidates(Path(folder)):
        flaw = _flaw(checkpoint)
        if flaw is None:
            break
        skipped.append(str(flaw))
    else:
        checkpoint = None
    if skipped:
        instead = f"using {checkpoint.name}" if checkpoint else f"no checkpoint in {folder} is whole"
        warnings.warn("\n".join(skipped) + f"\n{instead}", stacklevel=2)
    return checkpoint


def verify(checkpoint: str | Path, files: Sequence[str] | None = None, *, check_bytes: bool = True) -> int:
    """Checks `files` (default: all) against the manifest (or only their sizes); returns the step.

    Raises `CheckpointError` that names the first file that is not as it was written.
    """
    checkpoint = Path(checkpoint)
    manifest = _read_manifest(checkpoint)
    for name in manifest["files"] if files is None else files:
        file, expected = checkpoint / name, manifest["files"].get(name)
        try:
            if expected is None or Path(name).name != name or not file.is_file():
                raise _damaged(checkpoint, f"{name} is missing")
            if (size := file.stat().st_size) != expected["size"]:
                raise _damaged(checkpoint, f"{name}: size {size}, expected {expected['size']}")
            if check_bytes and _identity(file) != expected:
                raise _damaged(checkpoint, f"{name}: its sha256 is not the one it was written with")
        except OSError as error:
            raise _damaged(checkpoint, f"{name}: {error}") from error
    return manifest["step"]


def _read_manifest(checkpoint: Path) -> dict:
    file = checkpoint / _MANIFEST
    if checkpoint.is_file():
        refuse_pickle(checkpoint)
    if not checkpoint.is_dir():
        raise _not_found(checkpoint)
    if not file.is_file():
        for pickle in sorted(x for x in checkpoint.iterdir() if x.is_file() and x.suffix in PICKLES):
            refuse_pickle(pickle)
        raise CheckpointError(
            "MD-CKPT-002",
            f"{checkpoint} has no {_MANIFEST}, so it is not a finished checkpoint of minidiff. Name a folder "
            f"like runs/RUN/checkpoints/step_00001000, or a run folder to take its newest.",
        )
    try:
        text = file.read_text(encoding="utf-8")
        manifest = json.loads(text)
        schema, whole = manifest["schema"], _manifest(manifest["step"], manifest["files"]) == text
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(checkpoint, f"{_MANIFEST} cannot be read") from error
    if schema != SCHEMA:
        raise CheckpointError(
            "MD-CKPT-005",
            f"{checkpoint} has schema version {schema!r}, and this minidiff reads version {SCHEMA}. Load it "
            f"with the version of minidiff that wrote it.",
        )
    if not whole:
        raise _damaged(checkpoint, f"{_MANIFEST} does not agree with its own sha256")
    return manifest


def _manifest(step: int, files: dict) -> str:
    """Returns the manifest's text, which a reader can compare as a whole: it carries its own sha256."""
    body = {"schema": SCHEMA, "step": step, "files": files}
    return json.dumps(body | {"sha256": hashlib.sha256(json.dumps(body).encode()).hexdigest()}, indent=1) + "\n"


def _identity(file: Path) -> dict:
    with open(file, "rb") as f:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}


def _flaw(checkpoint: Path, *, check_bytes: bool = True) -> CheckpointError | None:
    try:
        verify(checkpoint, check_bytes=check_bytes)
    except CheckpointError as error:
        return error
    return None


def _candidates(folder: Path) -> list[Path]:
    """Returns the checkpoint folders, newest (by number, not by name) first."""
    found = [(re.fullmatch(r"step_(\d+)(\.old)?", x.name), x) for x in folder.glob("step_*") if x.is_dir()]
    return [x for _, x in sorted(((int(m[1]), not m[2]), x) for m, x in found if m)][::-1]


def _not_found(path: Path) -> CheckpointError:
    there = ", ".join(x.name for x in _candidates(path.parent)) or "none"
    return CheckpointError("MD-CKPT-001", f"{path} does not exist. Checkpoints in {path.parent}: {there}.")


def _damaged(checkpoint: Path, why: str) -> CheckpointError:
    return CheckpointError(
        "MD-CKPT-004",
        f"{checkpoint} is damaged ({why}). Use an earlier checkpoint of the run; resume=auto finds it.",
    )
