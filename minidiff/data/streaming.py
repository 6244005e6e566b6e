"""Rows that come one after the other, from files that are never here as a whole → batches, as `batches` makes them.

    rows ─► this process' share ─► this worker's share ─► shuffle buffer ─► Sample ─► Batch

What cannot be promised of a stream is the exact order: rows are shuffled among the `buffer_size` that are at hand, and
whoever resumes finds the buffer empty, so that up to that many rows are lost to the pass. Sample numbers, and with
them noise, times and dropout, go on exactly.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count

import torch
from torch.utils.data import IterableDataset, get_worker_info

from minidiff.data.batches import Batch, collate
from minidiff.data.captions import admits
from minidiff.data.held import content
from minidiff.data.images import BadImage
from minidiff.data.patience import patient
from minidiff.data.samples import IN_A_ROW, RowReader, Sample, none_readable
from minidiff.data.source import Source, fail_at_once, part_of
from minidiff.errors import DataError, MinidiffError
from minidiff.seeds import generator


class StreamedImages(IterableDataset):
    """The batches of one process (or of one of its workers), for ever; an error comes as a value, as in `batches`.

    `positions` is where each worker goes on: {"epoch": pass, "examples_iterable": place in it}, or the pass alone.
    """

    def __init__(
        self,
        source: Source,
        reader: RowReader,
        batch_size: int,
        *,
        start: int,  # number of the first sample
        rank: int,
        ranks: int,
        positions: Sequence[dict],
    ) -> None:
        self.source, self.reader, self.batch_size = source, reader, batch_size
        self.rank, self.ranks = rank, ranks
        self.first, self.stride, self.positions = start + rank * batch_size, batch_size * ranks, positions

    def __iter__(self) -> Iterator[Batch | MinidiffError]:
        fail_at_once()
        worker = get_worker_info()
        me, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        # DataLoader asks its workers in turn, so that worker w makes the batches w, w + workers, …
        begins = count(self.first + me * self.stride, workers * self.stride)
        # Made here and not before: `datasets` keeps the pass in memory that is shared with the processes to come, where
        # a worker that begins its next pass would take the others along.
        rows = part_of(self.source, self.reader.seed, self.rank, self.ranks)
        samples = self._samples(rows, (i for begin in begins for i in range(begin, begin + self.batch_size)), me)
        try:
            while True:
                batch = collate([next(samples) for _ in range(self.batch_size)])
                yield replace(batch, position=(me, rows.state_dict()))
        except MinidiffError as error:
            yield error
        except Exception as error:
            yield DataError(
                "MD-DATA-019",
                f"{self.source.name} cannot be read on ({type(error).__name__}: {error}). If the file is whole, try "
                "workers=0 debug=true.",
            )

    def _samples(self, rows: "datasets.IterableDataset", places: Iterator[int], worker: int) -> Iterator[Sample]:  # noqa: F821
        skipped: list[str] = []
        for row in self._pass_after_pass(rows, self.positions[worker]):
            try:
                picture, captions = self.reader.read(row)
            except (BadImage, UnicodeDecodeError) as error:
                skipped.append(f"{self._name(row)}: {error}")
                if len(skipped) == IN_A_ROW:
                    raise none_readable(skipped, self.source.name) from error
                continue
            i = next(places)
            yield Sample(picture, self.reader.pick(captions, i), i, skipped, None)
            skipped = []

    def _pass_after_pass(self, rows: "datasets.IterableDataset", position: dict) -> Iterator[dict]:  # noqa: F821
        """Yields this worker's rows, pass after pass, each in another order."""
        if "examples_iterable" in position:
            rows.load_state_dict(position)
        empty = 0
        for epoch in count(position["epoch"]):
            rows.set_epoch(epoch)
            empty += 1
            admitted = (row for row in patient(rows) if admits(self.source, row[self.reader.caption]))
            for row in self._shuffled(admitted, epoch):
                empty = 0
                yield row
            if empty == 2:  # one pass may have been resumed behind its last row
                raise DataError(
                    "MD-DATA-022",
                    f"{self.source.name} has no row for one of the processes that read it (rows without caption: "
                    f"empty_caption={self.source.empty_caption}). Take fewer processes, or data.streaming=false.",
                )

    def _shuffled(self, rows: Iterator[dict], epoch: int) -> Iterator[dict]:
        """Yields the rows through a buffer: each new one takes the place of one drawn by (seed, pass), which goes out.

        It lies above `patient`, so that a stream that drops costs no row.
        """
        g, size, buffer = generator(self.reader.seed, "buffer", epoch), self.source.buffer_size, []
        for row in rows:
            if len(buffer) == size:
                i = int(torch.randint(size, (), generator=g))
                row, buffer[i] = buffer[i], row
                yield row
            else:
                buffer.append(row)
        for i in torch.randperm(len(buffer), generator=g):
            yield buffer[i]

    def _name(self, row: dict) -> str:
        """Names a row by its content, since rows of a stream have no numbers: it has the same name in every pass."""
        digest = hashlib.sha256(content(row, self.reader.image, self.reader.caption)).hexdigest()[:12]
        path = (row[self.reader.image] or {}).get("path")
        return f"row {digest} ({path})" if path else f"row {digest}"


def stream_readers(source: Source, rank: int, ranks: int, workers: int) -> int:
    """Returns how many of `workers` can read, or 1 if this process reads itself: each needs a file of its own."""
    return max(1, min(workers, part_of(source, 0, rank, ranks).num_shards))


def resume_at(saved: Sequence | None, rank: int, ranks: int, readers: int, buffer_size: int) -> tuple[list[dict], str]:
    """Returns the position of each reader of this process, and in words what resuming costs.

    `saved` is what `Ahead.positions` was on every rank. With another number of processes or workers, rows are shared
    out otherwise, and a new pass begins.
    """
    if not saved:
        return [{"epoch": 0}] * readers, ""
    epochs = [place["epoch"] for one in saved for place in one]
    if [len(one) for one in saved] == [readers] * ranks:
        lost = f"up to {buffer_size * readers * ranks} rows may be lost or repeated (data.buffer_size={buffer_size})"
        return saved[rank], f"going on in a shuffled stream is approximate: {lost}"
    lost = "the rows that were left of the pass are lost, and those before it come again"
    begins = {"epoch": max(epochs) + 1}
    return [begins] * readers, f"other processes or workers read the stream now, so that it begins a new pass: {lost}"
