"""Captioned images → batches; the only door to Hugging Face `datasets`.

    shapes | parquet | folder | hub  ─►  Source(train, validation)  ─►  CaptionedImages  ─►  loader  ─►  Batch
    └────────── sources ──────────┘                                     └────────── stream ──────────┘

Whatever the source, rows pass the same way: decode, composite transparency on a background, resize and crop to a
square (`images`), pick one caption (`captions`). Which row and which caption the i-th sample of a run is depends on
(seed, i) alone, so training resumes in the middle of an epoch, with any number of workers, and every image is used
exactly once per epoch.
"""

from minidiff.data.captions import treat_empty_captions
from minidiff.data.images import load_image
from minidiff.data.sources import Source, folder, hub, parquet, shapes
from minidiff.data.stream import (
    BadRows,
    Batch,
    CaptionedImages,
    auto_workers,
    collate,
    dead_workers,
    first_batches,
    loader,
    share,
)

__all__ = ["BadRows", "Batch", "CaptionedImages", "Source", "auto_workers", "collate", "dead_workers"]
__all__ += ["first_batches", "folder", "hub", "load_image", "loader", "parquet", "shapes", "share"]
__all__ += ["treat_empty_captions"]
