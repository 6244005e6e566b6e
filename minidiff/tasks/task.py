"""What training asks of a task, whatever it learns: a loss, a score, a picture, and what to keep.

    task.model            learns, and is saved
    task.loss(batch)      →  a number to lower, and others to look at
    task.validate(batches), task.preview(batch), task.contract(recipe)

A task that keeps nothing but weights has nothing to say to the rest, which is what the methods here do.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.data import Batch, Draw


class Task:
    """The interface of a task."""

    model: nn.Module

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: torch.device) -> "Task":
        """Moves everything to a device, and returns the task."""
        self.model.to(device)
        return self

    draw: Draw | None = None  # what a loss draws for each sample number, so that other processes can do it ahead

    def loss(self, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Returns what an update lowers, and numbers to look at."""
        raise NotImplementedError

    def validate(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Returns val_loss, at randomness that is the same every time, and whatever else there is to know."""
        raise NotImplementedError

    def preview(self, batch: Batch) -> "Image.Image":  # noqa: F821
        """Returns a picture of what the model can do by now."""
        raise NotImplementedError

    def contract(self, recipe: Mapping) -> dict:
        """Returns what a checkpoint must say about the model; `recipe` is the configuration of this task."""
        raise NotImplementedError

    def restore(self, contract: Mapping) -> None:
        """Takes from a checkpoint's contract what is not weights; raises CheckpointError where they do not fit."""

    def learn_words(self, captions: Iterable[str]) -> list[str]:
        """Takes note of the captions of the training data; returns what there is to say about them."""
        return []

    def measure(self, batches: Sequence[Batch]) -> None:
        """Measures what must be known of the data before the first update."""

    def remember_in(self, folder: Path) -> str:
        """Keeps the answers of frozen networks in a folder, for other runs; returns what was found there."""
        return "not needed"

    def flush(self) -> str:
        """Writes what is kept and not yet written; returns what was made, in words ("" if nothing)."""
        return ""
