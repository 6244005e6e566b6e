"""Rows → samples: an endless sequence in which sample number i is a function of (seed, i)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset

from minidiff.data.captions import texts
from minidiff.data.images import BadImage, load_image
from minidiff.data.source import undecoded
from minidiff.errors import DataError
from minidiff.seeds import generator

MEMORY = 500_000_000  # bytes; data sets that fit, decoded, are decoded once
IN_A_ROW = 100  # rows that cannot be read, one after the other, before we stop looking for a good one


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
