"""Rows → samples → batches: an endless sequence in which sample number i is a function of (seed, i)."""

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import ceil
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from minidiff.data.captions import texts
from minidiff.data.images import BadImage, load_image
from minidiff.data.source import undecoded
from minidiff.errors import DataError, InputError, MachineError, MinidiffError
from minidiff.seeds import generator

MEMORY = 500_000_000  # bytes; data sets that fit, decoded, are decoded once
FEW = 1000  # rows that a stream is taken to have before so many have been read
IN_A_ROW = 100  # rows that cannot be read, one after the other, before we stop looking for a good one


@dataclass(frozen=True)
class Batch:
    """`index[j]` is the place of image j in the run: the index-th sample since the start of training."""

    images: UInt8[Tensor, "b 3 h w"]
    captions: list[str]
    index: list[int]
    skipped: list[str]  # rows that could not be read, and why; each was replaced by the next row
    rows: list[int] = field(default_factory=list)  # of the data set, where it has numbered rows
    position: tuple[int, dict] | None = None  # of a stream: the worker, and where it goes on after this batch

    def x(self, device: torch.device | str = "cpu") -> Float[Tensor, "b 3 h w"]:
        """Returns the images in [−1, 1] on a device."""
        return self.images.to(device, non_blocking=True).float() / 127.5 - 1

    def pin_memory(self) -> "Batch":
        """Lets a GPU fetch the images while it computes; the loader calls this."""
        return replace(self, images=self.images.pin_memory())


class Sample(NamedTuple):
    image: UInt8[Tensor, "3 s s"]
    caption: str
    index: int
    skipped: list[str]
    row: int | None  # None: the source does not number its rows


@dataclass(frozen=True)
class RowReader:
    """How one row of any source becomes a picture and a caption."""

    image: str  # column
    caption: str  # column
    image_size: int
    background: Sequence[int] = (255, 255, 255)  # what transparency shows
    seed: int = 0

    def read(self, row: dict) -> tuple[UInt8[Tensor, "3 s s"], list[str]]:
        """Returns the picture and all captions; raises BadImage or UnicodeDecodeError for a row to be skipped."""
        return load_image(row[self.image], self.image_size, self.background), texts(row[self.caption])

    def pick(self, captions: list[str], *place: int) -> str:
        """Returns one of the captions, drawn by (seed, place)."""
        if len(captions) == 1:
            return captions[0]
        return captions[int(torch.randint(len(captions), (), generator=generator(self.seed, "caption", *place)))]


class CaptionedImages(Dataset):
    """The endless stream of samples of a run: item i is the i-th sample, with the rows that had to be skipped."""

    def __init__(
        self,
        rows: "datasets.Dataset",  # noqa: F821
        image: str,  # column
        caption: str,  # column
        *,
        image_size: int,
        background: Sequence[int] = (255, 255, 255),
        seed: int = 0,
        shuffle: bool = True,  # False: in order, and always the first caption
        together: int = 1,  # rows in succession that shuffling keeps side by side
    ) -> None:
        self.rows = undecoded(rows, image).select_columns([image, caption])
        self.reader = RowReader(image, caption, image_size, tuple(background), seed)
        self.shuffle, self.together = shuffle, together
        self.without_caption = 0  # rows, known after `all_captions`
        self._memory: dict[int, tuple[Tensor, list[str]]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Sample:
        epoch, place = divmod(i, len(self.rows))
        row = int(_order(self.reader.seed, epoch, len(self.rows), self.together)[place]) if self.shuffle else place
        skipped: list[str] = []
        for k in range(min(len(self.rows), IN_A_ROW)):  # a row that cannot be read gives way to the next one
            at = (row + k) % len(self.rows)
            try:
                picture, captions = self._read(at)
            except (BadImage, UnicodeDecodeError) as error:
                skipped.append(f"row {at}{self._path(at)}: {error}")
                continue
            caption = self.reader.pick(captions, epoch, at) if self.shuffle else captions[0]
            return Sample(picture, caption, i, skipped, at)
        raise none_readable(skipped, f"{len(self.rows)} rows")

    def all_captions(self) -> list[str]:
        """Returns every distinct caption, in order of appearance, and counts the rows `without_caption`."""
        found: dict[str, None] = {}
        for value in self.rows[self.reader.caption]:
            try:
                captions = texts(value)
            except UnicodeDecodeError:
                continue  # the row is skipped when its turn comes
            found.update(dict.fromkeys(captions))
            self.without_caption += captions == [""]
        return list(found)

    def _read(self, row: int) -> tuple[UInt8[Tensor, "3 s s"], list[str]]:
        """Returns the picture and the captions of a row, from memory if all pictures together are small."""
        if row in self._memory:
            return self._memory[row]
        read = self.reader.read(self.rows[row])
        if len(self.rows) * 3 * self.reader.image_size**2 <= MEMORY:
            self._memory[row] = read
        return read

    def _path(self, row: int) -> str:
        path = (self.rows[row][self.reader.image] or {}).get("path")
        return f" ({path})" if path else ""


def none_readable(skipped: Sequence[str], where: str) -> DataError:
    """Returns the error for rows in succession of which none could be read."""
    return DataError(
        "MD-DATA-007",
        f"None of {len(skipped)} rows in succession (of {where}) can be read; the first: {skipped[0]}. "
        "Check data.image; `python -m minidiff.doctor` looks at all of them.",
    )


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, n: int, together: int) -> Tensor:
    """Returns the rows of an epoch in their order; a remainder that fills no group comes last."""
    groups = torch.randperm(n // together, generator=generator(seed, "order", epoch))
    shuffled = (groups[:, None] * together + torch.arange(together)).flatten()
    return torch.cat([shuffled, torch.arange(len(shuffled), n)])


class BadRows:
    """Counts the rows that could not be read, says some of them, and stops the run when there are too many.

    `rows` is None for a stream, which has as many rows as have been read, and FEW at the least.
    """

    def __init__(self, rows: int | None, share: float) -> None:
        self.rows, self.share = rows, share
        self._seen: dict[str, str] = {}  # row -> why

    def note(self, skipped: Sequence[str], read: int = 0) -> list[str]:
        """Returns what is to be said of newly skipped rows: the first and every 1000th. `read` counts all rows so far.

        Raises DataError (MD-DATA-011) when more distinct rows than the allowed share were bad.
        """
        say = []
        for text in skipped:
            row, _, why = text.partition(": ")
            if row in self._seen:
                continue
            self._seen[row] = why
            if len(self._seen) % 1000 == 1:
                say.append(
                    f"warning: skipped {text} ({len(self._seen)} bad row(s) so far; the next one took its place)"
                )
        total = max(FEW, read) if self.rows is None else self.rows
        if len(self._seen) > ceil(total * self.share):
            raise DataError(
                "MD-DATA-011",
                f"{len(self._seen)} of {total} rows cannot be read, more than max_bad={self.share:g} allows: "
                f"{self.reasons()}. Mend or remove them (`python -m minidiff.doctor` lists all), or raise max_bad.",
            )
        return say

    def reasons(self) -> str:
        """Returns the ten most frequent reasons, each with its count and a row."""
        kinds = Counter(why.split(" (")[0] for why in self._seen.values())
        example = {why.split(" (")[0]: row for row, why in reversed(self._seen.items())}
        return "; ".join(f"{n} × {why} (such as {example[why]})" for why, n in kinds.most_common(10))

    def __len__(self) -> int:
        return len(self._seen)


# ---------------------------------------------------------------------------------------------------- batches


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

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __getitem__(self, places: list[int]) -> Batch | MinidiffError:
        i = places[0]
        try:
            items = []
            for i in places:
                items.append(self.data[i])
            return collate(items)
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
    data: CaptionedImages, batch_size: int, *, start: int = 0, workers: int = 0, rank: int = 0, ranks: int = 1
) -> Iterator[Batch]:
    """Yields batches for ever, beginning with sample number `start` of the run; order and content do not depend on
    `workers`.
    """
    return read_batches(_Reader(data), workers, _Places(batch_size, start, rank, ranks))


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
