"""What this machine can do: device, precision, compilation. Decisions are words, so that nothing falls back
silently.
"""

import ctypes
import os
import platform
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from minidiff.errors import InputError, MachineError, NumericsError


def resolve_device(device: str) -> torch.device:
    """Returns the device that `auto`, `cpu`, `cuda` or `mps` means here; raises MachineError (MD-ENV-001)."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(name for name, there in available.items() if there))
    name = device.split(":")[0]
    if name not in available:
        raise InputError("MD-ENV-002", f"device={device} is unknown; choose auto, cpu, cuda or mps.")
    if not available[name]:
        raise MachineError(
            "MD-ENV-001",
            f"device={device} was asked for, but PyTorch {torch.__version__} sees no such device on this machine. "
            "Use device=auto or device=cpu, or install the PyTorch build for your accelerator.",
        )
    return torch.device(device)


def keep_memory(device: torch.device) -> bool:
    """Has the C library keep what tensors on a CPU free, for the next ones; returns whether it will.

    It gives large blocks back to the system at once, which hands out new ones page by page and zeroed: a sum and an
    exponential of 4 MiB took 1.2 ms instead of 4.6. The process then stays as large as it once was. glibc only.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3  # malloc.h
    largest = 2**30 if mallopt(mmap_threshold, 2**30) else 2**25  # bytes of a block; older versions take no more
    return bool(mallopt(mmap_threshold, largest) and mallopt(trim_threshold, 2**31 - 1))


def avoid_broken_kernels(device: torch.device) -> None:
    """Keeps PyTorch on CUDA from cuDNN's attention, whose backward pass gives gradients that are no numbers where keys
    are masked (pytorch issue 196678: torch 2.11 on Hopper GPUs). Its other kernels are as fast at our sizes.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def resolve_precision(precision: str, device: torch.device) -> str:
    """Returns fp32, bf16 or fp16. `auto` takes bf16 where the hardware multiplies it, and fp32 elsewhere."""
    if precision == "fp16" and device.type != "cuda":
        raise InputError(
            "MD-ENV-003", f"precision=fp16 works on CUDA only, and this run is on {device}. Use bf16 or fp32."
        )
    if precision != "auto":
        return precision
    return "bf16" if multiplies_bf16(device) else "fp32"


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16. Elsewhere it is imitated, up to twenty times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def open_accelerator(device: str, precision: str, accumulate: int) -> tuple["accelerate.Accelerator", str]:  # noqa: F821
    """Returns accelerate's Accelerator for this process, and the precision it computes in.

    Raises InputError (MD-ENV-007) if the launcher asks accelerate to divide the weights among the processes.
    """
    chosen = resolve_device(device)
    keep_memory(chosen)
    avoid_broken_kernels(chosen)
    # accelerate reads these when it is created; a device that was asked for must be the one that is used
    os.environ.setdefault("ACCELERATE_USE_CPU", str(chosen.type == "cpu").lower())
    stay_on_this_machine()
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # else a process that trains twice, such as a notebook, could not change precision
    name = resolve_precision(precision, chosen)
    mixed = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[name]
    accelerator = Accelerator(cpu=chosen.type == "cpu", mixed_precision=mixed, gradient_accumulation_steps=accumulate)
    if (kind := accelerator.distributed_type.value) in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise InputError(
            "MD-ENV-007",
            f"accelerate was configured for {kind}, which divides the weights among the processes, and minidiff's "
            "average and checkpoints need whole ones. Launch with torchrun, or with `accelerate launch --multi_gpu`.",
        )
    return accelerator, name


def from_all(value: object, accelerator: "accelerate.Accelerator") -> list:  # noqa: F821
    """Returns the `value` of every process, in their order."""
    from accelerate.utils import gather_object

    return gather_object([value])


def stay_on_this_machine() -> None:
    """Has processes that all run on this machine talk over its loopback: their exchange asks nobody who he is."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]  # Linux', macOS'
    if ranks != "1" and ranks == os.environ.get("LOCAL_WORLD_SIZE") and loopback:
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback[0])


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Where `wanted`, allows PyTorch only algorithms that give the same bits every time; some are slower.

    A CPU has no others. On CUDA, this must come before the first matrix product: cuBLAS reads its setting once.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def compile_network(net: torch.nn.Module, wanted: bool | str, device: torch.device) -> str:
    """Has a network compiled at its first call, as asked or (`auto`) on CUDA; returns what was done, in words.

    On CPUs it has not paid (docs/decisions.md). Where PyTorch cannot compile, the network stays as it is.
    """
    if not (device.type == "cuda" if wanted == "auto" else wanted):
        return "eager"
    try:  # on something small: a missing compiler would otherwise show in the middle of the first update
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # backends raise errors of their own kinds
        reason = str(error).strip().splitlines()[0]
        return f"eager (PyTorch cannot compile here: {type(error).__name__}: {reason})"
    net.compile()
    return "compiled"


def first_process() -> bool:
    """Whether this is the process that writes: the only one, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def require_space(folder: Path, parameters: int) -> None:
    """Raises MachineError (MD-ENV-005) if a checkpoint of a model of so many parameters would not fit on the disk.

    Weights, average and two moments of the optimizer, four bytes each; the one before stays until the new one is whole.
    """
    needed, free = 4 * 4 * parameters, shutil.disk_usage(folder).free
    if free < needed:
        raise MachineError(
            "MD-ENV-005",
            f"{folder} has {free / 2**20:.0f} MiB free, and one checkpoint of this model takes about "
            f"{needed / 2**20:.0f}. Free some space before training, or start in a folder on another disk.",
        )


def require_equal_weights(model: torch.nn.Module, accelerator: "accelerate.Accelerator") -> None:  # noqa: F821
    """Raises NumericsError (MD-NUM-002) that names the first parameter in which the processes of a run differ."""
    if accelerator.num_processes == 1:
        return
    # a sum of squares could hide a permutation, but not what goes wrong in practice: a process that missed an update
    sums = torch.stack([p.detach().float().square().sum() for p in model.parameters()])
    everyone = accelerator.gather(sums[None])
    if (everyone == everyone[0]).all():
        return
    first = int((everyone != everyone[0]).any(0).nonzero()[0])
    raise NumericsError(
        "MD-NUM-002",
        f"The processes of this run no longer hold the same weights; the first that differ are those of "
        f"{list(dict(model.named_parameters()))[first]}. Nothing was saved. Resume from the last checkpoint, and check "
        "that all machines run the same versions of PyTorch and minidiff.",
    )


@contextmanager
def failures_in_words(batch_size: int, image_size: int, device: torch.device) -> Iterator[None]:
    """Turns what PyTorch raises when memory runs out (MD-ENV-004) or another process of the run ends (MD-RUN-002) into
    MachineError.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
        raise MachineError(
            "MD-ENV-004",
            f"{device} ran out of memory with batch_size={batch_size} and image_size={image_size} (at most {peak:.1f} "
            "GiB were in use). Divide the updates with accumulate=2, or take a smaller batch_size; train with "
            "precision=bf16; or take a smaller image_size or network. What was saved is whole.",
        ) from error
    except (torch.distributed.DistError, RuntimeError) as error:
        lost = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "timed out", "Socket", "NCCL")
        if "RANK" not in os.environ or not any(word in str(error) for word in lost):
            raise
        raise MachineError(
            "MD-RUN-002",
            f"Another process of this run has ended or no longer answers, so process {os.environ['RANK']} stops too: "
            f"its own message says why ({str(error).splitlines()[0]}). The last checkpoint is good; run the same "
            "command again.",
        ) from error
