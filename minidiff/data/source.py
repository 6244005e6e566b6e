"""What every source of captioned images is: rows to train on and rows to validate on, of Hugging Face `datasets`."""

import hashlib
from dataclasses import dataclass
from itertools import islice

from minidiff.data.held import content
from minidiff.data.patience import patient


@dataclass(frozen=True)
class Source:
    """Rows to train on and rows to validate on, as Hugging Face `Dataset`s, and which columns to read.

    A stream's training rows are an `IterableDataset`, whose length nobody knows.
    """

    name: str
    train: "datasets.Dataset | datasets.IterableDataset"  # noqa: F821
    validation: "datasets.Dataset"  # noqa: F821
    image: str = "image"
    caption: str = "captions"
    remarks: tuple[str, ...] = ()  # what the user should know before training on it
    buffer_size: int | None = None  # rows of a stream that are shuffled among themselves; None: no stream
    together: int = 1  # rows in succession that shuffling keeps side by side
    empty_caption: str = "unconditional"  # what becomes of rows without words in a stream, which come one by one

    def __len__(self) -> int:
        """Returns the number of training rows; raises TypeError for a stream."""
        return len(self.train)

    def size(self) -> str:
        """Returns how many training rows there are, in words."""
        if self.buffer_size is None:
            return f"{len(self)} images"
        return f"a stream of images, shuffled through a buffer of {self.buffer_size},"

    def head(self, n: int) -> "datasets.Dataset":  # noqa: F821
        """Returns the first training rows, at most `n`."""
        if self.buffer_size is None:
            return undecoded(self.train, self.image).select(range(min(n, len(self))))
        return first_rows(self.train, n)

    def fingerprint(self) -> str:
        """Names the training rows by their number, columns and content (of rows spread evenly over them); of a stream,
        the rows that were kept for validation stand for all.
        """
        rows = self.train if self.buffer_size is None else self.validation
        n, digest = len(rows), hashlib.sha256()
        for row in undecoded(rows, self.image).select(range(0, n, max(1, n // 64))):
            digest.update(content(row, self.image, self.caption))
        return f"{n if self.buffer_size is None else 'streamed'} rows {digest.hexdigest()[:12]}"


def first_rows(rows: "datasets.IterableDataset", n: int) -> "datasets.Dataset":  # noqa: F821
    import datasets

    fail_at_once()
    found = list(islice(patient(rows), n))
    return datasets.Dataset.from_dict({key: [x[key] for x in found] for key in rows.features}, features=rows.features)


def undecoded(rows: "datasets.Dataset", image: str) -> "datasets.Dataset":  # noqa: F821
    """Returns rows whose pictures are {"bytes", "path"}: we decode, so that nothing is decoded before it is judged."""
    import datasets

    return rows.cast_column(image, datasets.Image(decode=False))


def part_of(source: Source, seed: int, rank: int, ranks: int) -> "datasets.IterableDataset":  # noqa: F821
    """Returns the share of a stream's training rows that one process reads: its own files, if all processes can have as
    many, or else every `ranks`-th row; files come in an order of their own in every pass. Workers of the process divide
    its files further.
    """
    from datasets.distributed import split_dataset_by_node

    return split_dataset_by_node(files_shuffled(source.train, seed), rank, ranks)


def fail_at_once() -> None:
    """Leaves all waiting to `patient`: by itself, `datasets` tries 20 times in 100 s or more, without a word."""
    from datasets import config

    config.STREAMING_READ_MAX_RETRIES = config.STREAMING_OPEN_MAX_RETRIES = 1
    config.STREAMING_READ_RETRY_INTERVAL = config.STREAMING_OPEN_RETRY_INTERVAL = 0
    config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 0


def files_shuffled(rows: "datasets.IterableDataset", seed: int) -> "datasets.IterableDataset":  # noqa: F821
    """Returns the files of a stream in another order, one after the other: `datasets` would mix up to ten, whose
    threads take five seconds to end every pass.
    """
    return rows.shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=1)
