"""Rows that cannot be read: few are skipped and said, many stop the run."""

from collections import Counter
from collections.abc import Sequence
from math import ceil

from minidiff.errors import DataError

FEW = 1000  # rows that a stream is taken to have before so many have been read


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
