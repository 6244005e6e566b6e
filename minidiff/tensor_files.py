"""Files of named tensors, from which no code can run: the only door to safetensors.

What is written has reached the disk when the call returns; what is read is whole and finite, or an error says why not.
Nothing is ever unpickled.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from minidiff.errors import CheckpointError, NumericsError
from minidiff.state import plain_name

PICKLES = {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"}


def write_tensors(file: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes one safetensors file and fsyncs it; `metadata` goes into its header.

    Raises `NumericsError` if a tensor is not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    file = Path(file)
    # contiguous copies: tied weights cannot share memory in a file, and nothing may change while we write
    tensors = {
        plain_name(name): x.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, x in tensors.items()
    }
    if broken := _not_finite(tensors):
        raise NumericsError(
            "MD-CKPT-010",
            f"Refused to write {file.name}: {broken} holds NaN or infinite values. The earlier checkpoints "
            f"are still good; resume from the last one with a lower optim.lr or with precision=fp32.",
        )
    try:
        save_file(tensors, file, None if metadata is None else dict(metadata))
    except SafetensorError as error:
        raise OSError(str(error)) from error
    file.chmod(file.parent.stat().st_mode & 0o666)  # safetensors writes 0600, which a group's other members cannot read
    fsync(file)


def read_tensors(file: str | Path) -> dict[str, Tensor]:
    """Reads one safetensors file to the CPU, names without wrapper prefixes.

    Raises `CheckpointError` for a missing or damaged file, a pickle, or a tensor that is not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(file)
    try:
        tensors = {plain_name(name): x for name, x in load_file(file).items()}
    except FileNotFoundError as error:
        raise CheckpointError("MD-CKPT-013", f"{file} does not exist. Name a safetensors file that does.") from error
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        refuse_pickle(file)
        raise CheckpointError(
            "MD-CKPT-014",
            f"{file} is damaged or not a safetensors file ({error}). Copy or download it again.",
        ) from error
    if broken := _not_finite(tensors):
        raise CheckpointError(
            "MD-CKPT-007",
            f"The tensor {broken} in {file} holds NaN or infinite values, so the model would only make noise "
            f"or black images. Use an earlier checkpoint.",
        )
    return tensors


def map_tensors(file: str | Path) -> "safetensors.safe_open":  # noqa: F821
    """Opens a safetensors file to read parts of it where they lie; raises `CheckpointError` for a damaged one."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError("MD-CKPT-014", f"{file} is damaged or not a safetensors file ({error}).") from error


def read_metadata(file: str | Path) -> dict[str, str]:
    """Returns the plain texts in the header of a safetensors file that `read_tensors` has accepted."""
    from safetensors import safe_open

    with safe_open(file, "pt") as f:
        return f.metadata() or {}


def refuse_pickle(file: Path) -> None:
    """Raises `CheckpointError` if `file` is a pickle, by its name or its first bytes."""
    with open(file, "rb") as f:
        pickled = file.suffix in PICKLES or f.read(4).startswith((b"\x80", b"PK\x03\x04"))
    if pickled:
        raise CheckpointError(
            "MD-CKPT-003",
            f"{file} is a pickle, and loading a pickle can run any code hidden in it. minidiff reads only "
            f"safetensors. Ask its author for a .safetensors file, or convert it on a machine with nothing to lose.",
        )


def fsync(path: Path) -> None:
    """Returns when a file's bytes, or a folder's entries, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle to a folder
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    return next((name for name, x in tensors.items() if x.is_floating_point() and not x.isfinite().all()), None)
