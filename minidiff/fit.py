"""The training loop, as a generator: one optimizer update per step, and everything else is the caller's.

    for step in fit(...):        # the caller logs, previews, validates, saves
        ...

Devices, autocast, gradient accumulation and several processes come from `accelerate`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.data import Batch


@dataclass(frozen=True)
class Step:
    """What one optimizer update did. Tensors stay on the device until they are read."""

    step: int  # updates done so far
    loss: Float[Tensor, ""]  # mean over the update's micro-batches
    grad_norm: Float[Tensor, ""]  # before clipping
    lr: float
    images: int  # in this update, on this process
    skipped: list[str]  # rows that could not be read


def fit(
    model: nn.Module,
    loss: Callable[[Batch], tuple[Tensor, dict[str, Tensor]]],
    batches: Iterator[Batch],
    optimizer: torch.optim.Optimizer,
    accelerator: "accelerate.Accelerator",  # noqa: F821
    *,
    steps: int,
    start: int,
    learning_rate: Callable[[int], float],  # of the update's number, so that resuming needs no scheduler state
    clip: float,
) -> Iterator[Step]:
    """Yields after every update from `start` + 1 to `steps`; `accelerator` says how many micro-batches make one."""
    model.train()
    micro = accelerator.gradient_accumulation_steps
    for step in range(start, steps):
        lr = learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        total, images, skipped = 0.0, 0, []
        for _ in range(micro):
            batch = next(batches)
            with accelerator.accumulate(model), accelerator.autocast():
                value, _ = loss(batch)
                accelerator.backward(value)
            total = total + value.detach() / micro
            images += len(batch.index)
            skipped += batch.skipped
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        yield Step(step + 1, total, grad_norm, lr, images, skipped)


def warmup_cosine(step: int, *, steps: int, lr: float, warmup: int) -> float:
    """Returns the learning rate of update `step`: linear up to `lr` in `warmup` updates, then half a cosine to 0."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
