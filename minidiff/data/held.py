"""Which rows of a stream are kept from training: rows without numbers are known by their content."""

import hashlib
from dataclasses import dataclass
from pathlib import Path


def content(row: dict, image: str, caption: str) -> bytes:
    """Returns what makes a row this row and no other, wherever it is found."""
    picture = row[image] or {}
    return (picture.get("bytes") or Path(picture.get("path") or "").name.encode()) + repr(row[caption]).encode()


@dataclass(frozen=True)
class Keeps:
    """Whether a row of a stream is one to train on; it travels to the processes that read."""

    image: str
    caption: str
    column: str | None
    wanted: str
    held: frozenset[bytes] = frozenset()

    def __call__(self, row: dict) -> bool:
        chosen = self.column is None or row[self.column] == self.wanted
        return chosen and not (self.held and self.digest(row) in self.held)

    def digest(self, row: dict) -> bytes:
        return hashlib.sha256(content(row, self.image, self.caption)).digest()
