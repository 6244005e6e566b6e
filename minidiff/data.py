"""Captioned images → batches; the only door to Hugging Face `datasets`.

    shapes | parquet | folder | hub  ─►  Source(train, validation)  ─►  CaptionedImages  ─►  loader  ─►  Batch

Whatever the source, rows pass the same way: decode, composite transparency on a background, resize and crop to a
square, pick one caption. Which row and which caption the i-th sample of a run is depends on (seed, i) alone, so
training resumes in the middle of an epoch, with any number of workers, and every image is used exactly once per epoch.
"""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from minidiff.errors import DataError, InputError, did_you_mean
from minidiff.seeds import generator

# What Pillow may open: common, maintained decoders only.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 64_000_000  # larger pictures are refused from their header, before anything is decoded
MEMORY = 500_000_000  # bytes; data sets that fit, decoded, are decoded once


@dataclass(frozen=True)
class Source:
    """Rows to train on and rows to validate on, as Hugging Face `Dataset`s, and which columns to read."""

    name: str
    train: "datasets.Dataset"  # noqa: F821
    validation: "datasets.Dataset"  # noqa: F821
    image: str = "image"
    caption: str = "captions"


@dataclass(frozen=True)
class Batch:
    """`index[j]` is the place of image j in the run: the index-th sample since the start of training."""

    images: UInt8[Tensor, "b 3 h w"]
    captions: list[str]
    index: list[int]
    skipped: list[str]  # rows that could not be read, and why; each was replaced by the next row

    def x(self, device: torch.device | str = "cpu") -> Float[Tensor, "b 3 h w"]:
        """Returns the images in [−1, 1] on a device."""
        return self.images.to(device, non_blocking=True).float() / 127.5 - 1


# ---------------------------------------------------------------------------------------------------- sources


def shapes(image_size: int, n: int, validation: int, seed: int = 0, weights: dict[str, float] | None = None) -> Source:
    """Procedural scenes with exact ground truth (`minidiff.shapes`): `n` to train on, `validation` of the test split.

    Drawn once and kept in the cache of `datasets`. `weights` are the shares of the scene categories. The captions are
    descriptions: what a short prompt leaves open would only blur what the network learns of the words it does hold
    (Betker et al. 2023, DALL·E 3, train on 95 % descriptive captions for that reason).
    """
    from minidiff.shapes import WEIGHTS

    weights = dict(WEIGHTS if weights is None else weights)
    train, test = (_scenes(split, k, image_size, seed, weights) for split, k in (("train", n), ("test", validation)))
    return Source("shapes", train, test)


def _scenes(split: str, n: int, image_size: int, seed: int, weights: dict[str, float]) -> "datasets.Dataset":  # noqa: F821
    import datasets

    features = datasets.Features({"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))})
    recipe = {
        "split": split,
        "n": n,
        "image_size": image_size,
        "seed": seed,
        "weights": weights,
        "code": _shapes_code(),
    }
    with _quiet():
        return datasets.Dataset.from_generator(_draw_scenes, features=features, gen_kwargs=recipe)


def _draw_scenes(
    split: str, n: int, image_size: int, seed: int, weights: dict[str, float], code: str
) -> Iterator[dict]:
    from PIL import Image

    from minidiff.shapes import example, render

    for i in range(n):
        scene = example(split, i, seed, weights)
        png = io.BytesIO()
        Image.fromarray(render(scene.scene, image_size)).save(png, "PNG", compress_level=1)
        descriptions = list(scene.captions[1:])  # the first is a test's prompt
        yield {"image": {"bytes": png.getvalue(), "path": None}, "captions": descriptions}


def _shapes_code() -> str:
    """Fingerprints the room that draws scenes, so that `datasets` never serves pictures of an older one."""
    import zlib
    from pathlib import Path

    import minidiff.shapes

    files = sorted(Path(minidiff.shapes.__file__).parent.glob("*.py"))
    return format(zlib.crc32(b"".join(f.read_bytes() for f in files)), "08x")


def parquet(
    path: str,
    image: str = "image",
    caption: str = "captions",
    split_column: str | None = None,
    train_split: str = "train",
    validation_split: str = "test",
) -> Source:
    """Rows of parquet files (`path` may be a glob), split by a column if there is one."""
    from glob import glob

    import datasets

    files = sorted(glob(str(path), recursive=True))
    if not files:
        raise DataError(
            "MD-DATA-001",
            f"No file matches data.path={path} (seen from {os.getcwd()}). Check the path; a glob wants quotes.",
        )
    try:
        with _quiet():
            rows = datasets.Dataset.from_parquet(files)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        reason = str(error.__cause__ or error).splitlines()[0]
        raise DataError(
            "MD-DATA-009", f"data.path={path} cannot be read as parquet, or has no rows: {reason}"
        ) from error
    return _split(f"parquet {path}", rows, image, caption, split_column, train_split, validation_split)


def folder(path: str, image: str = "image", caption: str = "caption") -> Source:
    """A folder of images with a `metadata.jsonl` whose lines hold `file_name` and the caption."""
    from pathlib import Path

    import datasets

    if not Path(path).is_dir():
        raise DataError(
            "MD-DATA-002",
            f"data.path={path} is not a folder (seen from {os.getcwd()}). Name the folder that holds metadata.jsonl.",
        )
    with _quiet():
        rows = datasets.load_dataset("imagefolder", data_dir=str(path), split="train")
    return _split(f"folder {path}", rows, image, caption, None, "train", "test")


def hub(
    path: str, revision: str | None = None, image: str = "image", caption: str = "text", split: str = "train"
) -> Source:
    """A dataset of the Hugging Face Hub, `owner/name`; pin `revision` to a commit for runs that others can repeat."""
    import datasets

    try:
        with _quiet():
            rows = datasets.load_dataset(path, revision=revision, split=split)
    except (OSError, ValueError) as error:
        raise DataError(
            "MD-DATA-003",
            f"The dataset data.path={path} (split {split}) could not be read from the Hugging Face Hub or its "
            f"local cache: {str(error).splitlines()[0]} It may be misspelt, private or gated (log in with `hf auth "
            "login`), or this machine is offline. data=shapes is built in and needs no network.",
        ) from error
    return _split(f"hub {path}", rows, image, caption, None, "train", "test")


def _split(
    name: str,
    rows: "datasets.Dataset",  # noqa: F821
    image: str,
    caption: str,
    column: str | None,
    train: str,
    validation: str,  # noqa: F821
) -> Source:
    """Divides rows by a column, or sets one row in twenty (at most 512) aside for validation; checks the columns
    first.
    """
    import datasets

    for option, wanted in (("data.image", image), ("data.caption", caption), ("data.split_column", column)):
        if wanted is not None and wanted not in rows.column_names:
            raise DataError("MD-DATA-004", _missing_column(name, option, wanted, rows.features))
    if len(rows) == 0:
        raise DataError("MD-DATA-005", f"The data source {name} holds no rows. Check data.path and the split.")
    rows = rows.cast_column(image, datasets.Image(decode=False))
    if column is None:
        parts = {} if len(rows) < 2 else rows.train_test_split(min(512, max(1, len(rows) // 20)), seed=0)
        return Source(name, parts.get("train", rows), parts.get("test", rows), image, caption)
    labels = np.array(rows[column])
    chosen = []
    for option, wanted in (("data.train_split", train), ("data.validation_split", validation)):
        at = np.flatnonzero(labels == wanted)
        if len(at) == 0:
            known = sorted(set(labels.tolist()))
            raise DataError(
                "MD-DATA-006",
                f"No row of {name} has {column}='{wanted}' ({option}); the values there are "
                f"{known}.{did_you_mean(wanted, known)}",
            )
        chosen.append(rows.select(at))
    return Source(name, *chosen, image, caption)


def _missing_column(name: str, option: str, wanted: str, features: dict) -> str:
    import datasets

    def fits(feature: object) -> bool:
        return (
            isinstance(feature, datasets.Image) if option == "data.image" else not isinstance(feature, datasets.Image)
        )

    columns = ", ".join(
        f"{key} ({type(f).__name__ if not hasattr(f, 'dtype') else f.dtype})" for key, f in features.items()
    )
    guesses = [key for key, f in features.items() if fits(f)]
    likely = did_you_mean(wanted, guesses)
    if not likely and option == "data.caption":
        likely = next(
            (f" Did you mean '{key}'?" for key in guesses if key in ("caption", "captions", "text", "prompt")), ""
        )
    if not likely and option == "data.image" and guesses:
        likely = f" Did you mean '{guesses[0]}'?"
    return f"The data source {name} has no column '{wanted}' ({option}). Its columns are: {columns}.{likely}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the progress bars of `datasets` off our own screen."""
    import datasets

    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


# ---------------------------------------------------------------------------------------------------- rows → batches


class CaptionedImages(torch.utils.data.Dataset):
    """The endless stream of samples of a run: item i is (image, caption, i, rows that had to be skipped)."""

    def __init__(
        self,
        rows: "datasets.Dataset",  # noqa: F821
        image: str,  # column
        caption: str,  # column
        *,
        image_size: int,
        background: Sequence[int] = (255, 255, 255),  # what transparency shows
        seed: int = 0,
        shuffle: bool = True,  # False: in order, and always the first caption
    ) -> None:
        import datasets

        self.rows = rows.cast_column(image, datasets.Image(decode=False)).select_columns([image, caption])
        self.image, self.caption = image, caption
        self.image_size, self.background = image_size, tuple(background)
        self.seed, self.shuffle = seed, shuffle
        self._memory: dict[int, tuple[Tensor, list[str]]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 s s"], str, int, list[str]]:
        epoch, place = divmod(i, len(self.rows))
        row = int(_order(self.seed, epoch, len(self.rows))[place]) if self.shuffle else place
        skipped: list[str] = []
        for k in range(len(self.rows)):  # a row that cannot be read gives way to the next one
            at = (row + k) % len(self.rows)
            try:
                picture, texts = self._read(at)
            except (OSError, ValueError, SyntaxError) as error:
                skipped.append(f"row {at}: {error}")
                continue
            return picture, self._pick(texts, epoch, at), i, skipped
        raise DataError(
            "MD-DATA-007",
            f"None of the {len(self.rows)} images can be read; the first: {skipped[0]}. Check data.image.",
        )

    def all_captions(self) -> list[str]:
        """Returns every distinct caption, in order of appearance."""
        return list(dict.fromkeys(text for value in self.rows[self.caption] for text in _texts(value)))

    def _read(self, row: int) -> tuple[UInt8[Tensor, "3 s s"], list[str]]:
        """Returns the picture and the captions of a row, from memory if all pictures together are small."""
        if row in self._memory:
            return self._memory[row]
        item = self.rows[row]
        read = load_image(item[self.image], self.image_size, self.background), _texts(item[self.caption])
        if len(self.rows) * 3 * self.image_size**2 <= MEMORY:
            self._memory[row] = read
        return read

    def _pick(self, texts: list[str], epoch: int, row: int) -> str:
        if len(texts) == 1 or not self.shuffle:
            return texts[0]
        return texts[int(torch.randint(len(texts), (), generator=generator(self.seed, "caption", epoch, row)))]


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, n: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, "order", epoch))


def _texts(value: object) -> list[str]:
    """Returns the captions of one row; a row without words gives the empty caption, which trains unconditionally."""
    if isinstance(value, dict):
        raise DataError(
            "MD-DATA-008",
            f"The caption column holds a dictionary with the keys {sorted(value)}; name a column of texts by "
            "data.caption.",
        )
    values = value if isinstance(value, list) else [value]
    return [" ".join(str(v).split()) for v in values if v is not None and str(v).strip()] or [""]


def load_image(source: dict, image_size: int, background: tuple[int, ...]) -> UInt8[Tensor, "3 image_size image_size"]:
    """Decodes {"bytes", "path"}, shows transparency on `background`, scales the shorter side and crops the centre."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(source["bytes"]) if source["bytes"] else source["path"], formats=FORMATS) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise ValueError(f"{opened.width}×{opened.height} is more than {MAX_PIXELS // 10**6} million pixels")
        picture = ImageOps.exif_transpose(opened)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, (*background, 255)), picture)
        picture = picture.convert("RGB")
    if picture.size != (image_size, image_size):
        picture = ImageOps.fit(picture, (image_size, image_size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


class _Stream(torch.utils.data.Sampler):
    """Batches of sample numbers from `start` on, for ever; each rank takes its slice of every global batch."""

    def __init__(self, batch_size: int, start: int, rank: int, ranks: int) -> None:
        self.batch_size, self.start, self.rank, self.ranks = batch_size, start, rank, ranks

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start + self.rank * self.batch_size
        while True:
            yield list(range(first, first + self.batch_size))
            first += self.batch_size * self.ranks


def collate(items: list[tuple[Tensor, str, int, list[str]]]) -> Batch:
    """Joins samples to a batch."""
    images, captions, index, skipped = zip(*items, strict=True)
    return Batch(torch.stack(images), list(captions), list(index), [s for rows in skipped for s in rows])


def loader(
    data: CaptionedImages, batch_size: int, *, start: int = 0, workers: int = 0, rank: int = 0, ranks: int = 1
) -> Iterator[Batch]:
    """Yields batches for ever, beginning with sample number `start` of the run."""
    stream = _Stream(batch_size, start, rank, ranks)
    return iter(
        torch.utils.data.DataLoader(
            data, batch_sampler=stream, collate_fn=collate, num_workers=workers, pin_memory=torch.cuda.is_available()
        )
    )


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
