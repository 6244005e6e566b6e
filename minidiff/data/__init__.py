"""Captioned images → batches; the only door to Hugging Face `datasets`.

    shapes | parquet | folder | hub  ─►  Source(train, validation)  ─►  CaptionedImages  ─►  loader  ─►  Batch
    └────────── sources ──────────┘                                     └─ samples ────┘    └─ batches ────┘

A source is what `source` says, and `divide` sets its rows to validate on aside. From there on rows pass the same way:
decode, composite transparency on a background, resize and crop to a square (`images`), pick one caption (`captions`).
Which row and which caption the i-th sample of a run is depends on (seed, i) alone, so training resumes in the middle of
an epoch, with any number of workers, and every image is used exactly once per epoch. With `streaming`, parquet files
and hub data sets are read where they lie, by StreamedImages instead of CaptionedImages, and the order is only
approximately known (`streaming`).
"""

from minidiff.data.ahead import Ahead
from minidiff.data.bad_rows import BadRows
from minidiff.data.batches import (
    Batch,
    Draw,
    auto_workers,
    collate,
    dead_workers,
    first_batches,
    loader,
    read_batches,
    share,
)
from minidiff.data.captions import treat_empty_captions
from minidiff.data.images import BadImage, as_tensor, load_image, opaque, read_transparent, square
from minidiff.data.samples import CaptionedImages, RowReader
from minidiff.data.source import Source
from minidiff.data.sources import folder, hub, parquet, shapes
from minidiff.data.streaming import StreamedImages, resume_at, stream_readers

__all__ = ["Ahead", "BadImage", "BadRows", "Batch", "CaptionedImages", "Draw", "RowReader", "Source", "StreamedImages"]
__all__ += [
    "as_tensor",
    "auto_workers",
    "collate",
    "dead_workers",
    "first_batches",
    "folder",
    "hub",
    "load_image",
    "loader",
    "opaque",
    "parquet",
]
__all__ += [
    "read_batches",
    "read_transparent",
    "resume_at",
    "shapes",
    "share",
    "square",
    "stream_readers",
    "treat_empty_captions",
]
