"""What a frozen network once computed, kept on the disk for the next run: key → a vector of float32.

    FOLDER/text/IDENTITY/*.safetensors       captions → embeddings       (`text.TextEncoder.remember_in`)
    FOLDER/latents/IDENTITY/*.safetensors    pictures → latents          (`tasks.diffusion.TextToImage.remember_in`)

IDENTITY hashes the network's weights, a key hashes what it was given, so nothing can be stale. A file is written beside
its place, fsynced and renamed, and never changed after that: processes may share a folder, and one that is killed
leaves rubbish that nobody reads. Files are memory-mapped; every vector that is read is checked. A damaged file is
deleted, and what it held is computed again. The whole folder may be deleted at any time.
"""

import hashlib
import os
import uuid
import zlib
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from minidiff.tensor_files import map_tensors, write_tensors

BYTES = 64_000_000  # of new vectors that are written together; what is not yet written, a kill costs


def cache_folder(wanted: str) -> Path | None:
    """Returns the folder that cache=auto, none or a path means; auto is `minidiff` in the user's cache."""
    if wanted == "none":
        return None
    if wanted != "auto":
        return Path(wanted).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minidiff"


def content_key(x: Tensor) -> bytes:
    """Returns the hash of a CPU tensor's numbers."""
    return hashlib.sha256(x.contiguous().numpy().tobytes()).digest()


class Cache:
    """One folder of vectors. `found` counts those that were there when it was opened, `made` those that came."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made, self.trouble = folder, 0, ""
        self._where: dict[bytes, tuple[Path, int, int, int]] = {}  # file, begin, end, check sum
        self._open: dict[Path, "safetensors.safe_open"] = {}  # noqa: F821
        self._new: dict[bytes, Tensor] = {}
        self._bytes = 0  # of _new
        for file in sorted(folder.glob("*.safetensors")):
            self._map(file)
        self.found = len(self._where)

    def get(self, key: bytes) -> Float[Tensor, " n"] | None:
        """Returns the vector, or None if it is not here or damaged."""
        if key in self._new or key not in self._where:
            return self._new.get(key)
        file, begin, end, check = self._where[key]
        try:
            row = self._open[file].get_slice("rows")[begin:end]
        except Exception:  # safetensors has its own errors, of several kinds
            row = torch.empty(0)
        if _check(row) == check:
            return row
        self._drop(file)
        return None

    def __setitem__(self, key: bytes, row: Float[Tensor, " n"]) -> None:
        """Keeps a vector of float32 from the CPU; what is not finite is not kept beyond this process."""
        self._new[key] = row
        self._bytes += 4 * len(row)
        self.made += 1
        if self._bytes > BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes what is new. A disk that refuses is `trouble`: then nothing more is kept."""
        rows = {key: row for key, row in self._new.items() if row.isfinite().all()}
        self._new, self._bytes = {}, 0
        if not rows or self.trouble:
            return
        temporary = self.folder / f".tmp-{uuid.uuid4().hex}"
        file = self.folder / f"{uuid.uuid4().hex}.safetensors"
        ends = torch.tensor([len(row) for row in rows.values()]).cumsum(0)
        table = {
            "keys": torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).reshape(-1, 32),
            "ends": ends,
            "checks": torch.tensor([_check(row) for row in rows.values()]),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            checks = {"table": str(_check(*table.values()))}
            write_tensors(temporary, table | {"rows": torch.cat(list(rows.values()))}, checks)
            os.replace(temporary, file)
        except OSError as error:
            self.trouble = f"{self.folder} cannot be written ({error})"
            temporary.unlink(missing_ok=True)
            return
        self._map(file)

    def _map(self, file: Path) -> None:
        try:
            mapped = map_tensors(file)
            keys, ends, checks = (mapped.get_tensor(name) for name in ("keys", "ends", "checks"))
            if str(_check(keys, ends, checks)) != (mapped.metadata() or {}).get("table"):
                return self._drop(file)
        except Exception:  # safetensors has its own errors, of several kinds
            return self._drop(file)
        self._open[file] = mapped
        names = keys.numpy().tobytes()
        bounds = [0, *ends.tolist()]
        for i, check in enumerate(checks.tolist()):
            self._where[names[32 * i : 32 * i + 32]] = (file, bounds[i], bounds[i + 1], check)

    def _drop(self, file: Path) -> None:
        self._where = {key: place for key, place in self._where.items() if place[0] != file}
        self._open.pop(file, None)
        file.unlink(missing_ok=True)


def _check(*tensors: Tensor) -> int:
    return zlib.crc32(b"".join(x.contiguous().numpy().tobytes() for x in tensors))
