"""Samples → batches, made here or in worker processes; order and content do not depend on their number."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from minidiff.data.samples import CaptionedImages, Sample
from minidiff.errors import DataError, InputError, MachineError, MinidiffError

Draw = Callable[[Sequence[int]], tuple[Tensor, ...]]  # sample numbers → random tensors, a row each


@dataclass(frozen=True)
class Batch:
    """`index[j]` is the place of image j in the run: the index-th sample since the start of training."""

    images: UInt8[Tensor, "b 3 h w"]
    captions: list[str]
    index: list[int]
    skipped: list[str]  # rows that could not be read, and why; each was replaced by the next row
    rows: list[int] = field(default_factory=list)  # of the data set, where it has numbered rows
    position: tuple[int, dict] | None = None  # of a stream: the worker, and where it goes on after this batch
    draws: tuple[Tensor, ...] | None = None  # of the samples, where the process that read them drew (see `loader`)

    def x(self, device: torch.device | str = "cpu") -> Float[Tensor, "b 3 h w"]:
        """Returns the images in [−1, 1] on a device."""
        return self.images.to(device, non_blocking=True).float() / 127.5 - 1

    def pin_memory(self) -> "Batch":
        """Lets a GPU fetch the tensors while it computes; the loader calls this."""
        draws = self.draws and tuple(x.pin_memory() for x in self.draws)
        return replace(self, images=self.images.pin_memory(), draws=draws)


class _Places(Sampler):
    """Batches of sample numbers from `start` on, for ever; each rank takes its slice of every global batch."""

    def __init__(self, batch_size: int, start: int, rank: int, ranks: int) -> None:
        self.batch_size, self.start, self.rank, self.ranks = batch_size, start, rank, ranks

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start + self.rank * self.batch_size
        while True:
            yield list(range(first, first + self.batch_size))
            first += self.batch_size * self.ranks


class _Reader(Dataset):
    """Reads whole batches, and returns an error as a value: a process cannot raise our errors in another one."""

    def __init__(self, data: Dataset, draw: Draw | None = None) -> None:
        self.data, self.draw = data, draw

    def __getitem__(self, places: list[int]) -> Batch | MinidiffError:
        i = places[0]
        try:
            items = []
            for i in places:
                items.append(self.data[i])
            return replace(collate(items), draws=self.draw and self.draw(places))
        except MinidiffError as error:
            return error
        except Exception as error:
            worker = get_worker_info()
            who = f"worker {worker.id}" if worker else "the main process"
            return DataError(
                "MD-DATA-010",
                f"{who} could not read sample {i} of the run, row {i % len(self.data)} of its epoch's order "
                f"({type(error).__name__}: {error}). If the file is there and whole, try workers=0 debug=true.",
            )


def collate(items: Sequence[Sample]) -> Batch:
    """Joins samples to a batch."""
    images, captions, index, skipped, rows = zip(*items, strict=True)
    numbered = [row for row in rows if row is not None]
    return Batch(torch.stack(images), list(captions), list(index), [s for one in skipped for s in one], numbered)


def _as_it_is(batch: Batch | MinidiffError) -> Batch | MinidiffError:
    return batch


def _start_worker(worker: int) -> None:
    """Ctrl-C and a scheduler's warning go to all processes of a job; the trainer decides what becomes of it."""
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def loader(
    data: CaptionedImages,
    batch_size: int,
    *,
    start: int = 0,
    workers: int = 0,
    rank: int = 0,
    ranks: int = 1,
    draw: Draw | None = None,
) -> Iterator[Batch]:
    """Yields batches for ever, beginning with sample number `start` of the run; order and content do not depend on
    `workers`. `draw` makes random numbers of sample numbers alone, so the workers can do that, too: noise for a GPU's
    batches takes one process longer than the GPU.
    """
    return read_batches(_Reader(data, draw), workers, _Places(batch_size, start, rank, ranks))


def read_batches(data: Dataset, workers: int, sampler: Sampler | None = None) -> Iterator[Batch]:
    """Yields the batches that `data` makes, here or in worker processes; raises an error that came instead of one."""
    batches = DataLoader(
        data,
        batch_size=None,  # the items are batches already
        sampler=sampler,
        collate_fn=_as_it_is,
        num_workers=workers,
        worker_init_fn=_start_worker,
        pin_memory=torch.cuda.is_available(),
    )
    try:
        for batch in batches:
            if isinstance(batch, MinidiffError):
                raise batch
            yield batch
    except (ConnectionError, EOFError) as error:  # a worker died while it sent, and nobody has been told yet
        time.sleep(1)  # until the signal of its death comes, at which PyTorch raises an error of its own
        raise RuntimeError("the connection to a DataLoader worker broke") from error


@contextmanager
def dead_workers() -> Iterator[None]:
    """Says in words that a worker was killed, which PyTorch may notice anywhere in the training loop."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise MachineError(
            "MD-DATA-012",
            f"A process that decodes images has died ({' '.join(str(error).split())}), most often because the machine "
            "ran out of memory or /dev/shm is small. The last checkpoint is good: run the same command again with "
            "fewer workers, or with workers=0.",
        ) from error


def first_batches(data: CaptionedImages, images: int, batch_size: int) -> list[Batch]:
    """Returns the first `images` samples (or all there are) as batches."""
    places = range(min(len(data), images))
    return [collate([data[i] for i in places[k : k + batch_size]]) for k in places[::batch_size]]


def share(batch_size: int, ranks: int, accumulate: int) -> int:
    """Returns how many of an update's images one process takes at once; raises InputError if they cannot be shared
    out.
    """
    parts = ranks * accumulate
    if batch_size % parts:
        low = batch_size // parts * parts
        raise InputError(
            "MD-DATA-020",
            f"batch_size={batch_size}, the images of one update, cannot be divided into {ranks} process(es) × "
            f"accumulate={accumulate} = {parts} equal parts. The nearest sizes that can are {low or parts} and "
            f"{low + parts}.",
        )
    return batch_size // parts


def auto_workers() -> int:
    """Returns how many processes should decode: on a small machine none, since they would take the trainer's cores."""
    cores = os.cpu_count() or 1
    return 0 if cores <= 4 else min(8, cores // 2)
