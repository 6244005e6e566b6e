"""Batches in hand: an error is known before an update is begun that it would cut."""

from collections import deque
from collections.abc import Iterator, Sequence

from minidiff.data.batches import Batch
from minidiff.errors import MinidiffError


class Ahead:
    """Holds the `n` batches of a whole update in hand.

    `error` is what will be raised when the batches in hand are used up, and `positions` says where each worker of a
    stream stood after the last batch that was taken.
    """

    def __init__(self, batches: Iterator[Batch], n: int, positions: Sequence[dict] = ()) -> None:
        self.batches, self.n = batches, n
        self.error: MinidiffError | None = None
        self.positions = list(positions)
        self._held: deque[Batch] = deque()

    def __iter__(self) -> "Ahead":
        return self

    def __next__(self) -> Batch:
        self._fill()
        if not self._held:
            raise self.error
        batch = self._held.popleft()
        if batch.position is not None:
            worker, self.positions[worker] = batch.position
        self._fill()
        return batch

    def close(self) -> None:
        self.batches.close()

    def _fill(self) -> None:
        while len(self._held) < self.n and self.error is None:
            try:
                self._held.append(next(self.batches))
            except MinidiffError as error:
                self.error = error
