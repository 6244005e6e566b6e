"""The training loop, as a generator: one optimizer update per step, and everything else is the caller's.

    for step in fit(...):        # the caller logs, previews, validates, saves
        ...

Devices, autocast, gradient accumulation and several processes come from `accelerate`. An update whose loss or gradient
is not finite is left out: weights and optimizer stay as they are, bit for bit, and the sample numbers go on.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.data import Batch
from minidiff.errors import NumericsError

PATIENCE = 3  # updates in a row that may be left out before the run stops
SPIKE = 4.0  # how many times the usual loss is worth a word


@dataclass(frozen=True)
class Step:
    """What one optimizer update did. Tensors stay on the device until they are read."""

    step: int  # updates done so far, those left out included
    loss: Float[Tensor, ""]  # mean over the update's micro-batches and processes
    grad_norm: Float[Tensor, ""]  # before clipping
    lr: float
    images: int  # in this update, on this process
    skipped: list[str]  # rows that could not be read
    rows: list[int] = field(default_factory=list)  # rows of the data set in this update, on this process
    finite: bool = True  # False: the update was left out


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
    """Yields after every update from `start` + 1 to `steps`; `accelerator` says how many micro-batches make one.

    Raises NumericsError (MD-NUM-001) after PATIENCE updates in a row that were not finite.
    """
    model.train()
    failures, last_finite = 0, math.nan
    for step in range(start, steps):
        lr = learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        value, rows, skipped = _backward(model, loss, batches, accelerator)
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), clip)
        # Reading it waits for the device, once an update: what was applied could not be taken back. Gradients and
        # loss are those of all processes, so that all decide alike.
        finite = bool((value + grad_norm).isfinite())
        if finite or accelerator.scaler is not None:  # fp16's scaler leaves overflows out itself, and learns from them
            optimizer.step()
        optimizer.zero_grad()
        yield Step(step + 1, value, grad_norm, lr, len(rows), skipped, rows, finite)
        overflow = accelerator.scaler is not None and bool(value.isfinite())
        failures = 0 if finite or overflow else failures + 1
        last_finite = value.item() if finite else last_finite
        if failures == PATIENCE:
            raise _not_finite(step + 1, value, grad_norm, lr, last_finite, rows)


def _backward(
    model: nn.Module,
    loss: Callable,
    batches: Iterator[Batch],
    accelerator: "accelerate.Accelerator",  # noqa: F821
) -> tuple[Float[Tensor, ""], list[int], list[str]]:
    """Adds up the gradients of one update's micro-batches; returns the mean loss, the rows, and rows left out."""
    total, rows, skipped = 0.0, [], []
    micro = accelerator.gradient_accumulation_steps
    for _ in range(micro):
        batch = next(batches)
        # Forward and backward both: between processes, gradients are exchanged with the last micro-batch only.
        with accelerator.accumulate(model), accelerator.autocast():
            value, _ = loss(batch)
            accelerator.backward(value)
        total = total + value.detach() / micro
        rows += batch.rows or batch.index
        skipped += batch.skipped
    return accelerator.reduce(total, "mean"), rows, skipped


def _not_finite(
    step: int, loss: Tensor, grad_norm: Tensor, lr: float, last_finite: float, rows: list[int]
) -> NumericsError:
    named = ", ".join(map(str, rows[:16])) + (f" and {len(rows) - 16} more" if len(rows) > 16 else "")
    return NumericsError(
        "MD-NUM-001",
        f"{PATIENCE} updates in a row were not finite, the last at step {step}: loss {loss.item()}, gradient norm "
        f"{grad_norm.item()}, lr {lr:g}; the last finite loss was {last_finite:g}. None of the {PATIENCE} was applied, "
        f"and the last checkpoint is finite. Rows of the last update: {named}. If the same rows fail again, look at "
        "them; otherwise lower optim.lr, lengthen optim.warmup, or train with precision=fp32.",
    )


class UsualLoss:
    """Tells a finite loss that is far above the usual one: the median of the last 100, once there are 20.

    Nothing is done about it: a spike may be one strange batch, and leaving it out would hide the strange data.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=100)
        self._high = False  # whether the last one was a spike: a series of them is one

    def before_spike(self, loss: float) -> float | None:
        """Takes note of a loss; returns the usual one where this begins a spike, and None elsewhere."""
        usual = median(self._recent) if len(self._recent) >= 20 else math.inf
        begins = loss > SPIKE * usual and not self._high
        self._high = loss > SPIKE * usual
        self._recent.append(loss)
        return usual if begins else None
