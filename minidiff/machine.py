"""What this machine can do: device, precision, compilation. Decisions are words, so that nothing falls back
silently.
"""

import os

import torch

from minidiff.errors import InputError, MachineError


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


def resolve_precision(precision: str, device: torch.device) -> str:
    """Returns fp32, bf16 or fp16. `auto` takes bf16 where the hardware multiplies it, and fp32 elsewhere."""
    if precision == "fp16" and device.type != "cuda":
        raise InputError(
            "MD-ENV-003", f"precision=fp16 works on CUDA only, and this run is on {device}. Use bf16 or fp32."
        )
    if precision != "auto":
        return precision
    fast = {
        "cuda": torch.cuda.is_bf16_supported,
        "cpu": torch.ops.mkldnn._is_mkldnn_bf16_supported,
        "mps": lambda: False,
    }
    return "bf16" if fast[device.type]() else "fp32"


def open_accelerator(device: str, precision: str, accumulate: int) -> tuple["accelerate.Accelerator", str]:  # noqa: F821
    """Returns accelerate's Accelerator for this process, and the precision it computes in."""
    chosen = resolve_device(device)
    # accelerate reads these when it is created; a device that was asked for must be the one that is used
    os.environ.setdefault("ACCELERATE_USE_CPU", str(chosen.type == "cpu").lower())
    from accelerate import Accelerator

    name = resolve_precision(precision, chosen)
    mixed = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[name]
    accelerator = Accelerator(cpu=chosen.type == "cpu", mixed_precision=mixed, gradient_accumulation_steps=accumulate)
    return accelerator, name


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
