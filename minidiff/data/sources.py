"""Where captioned images come from, as rows of Hugging Face `datasets`."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from minidiff.data.held import Keeps, content
from minidiff.data.patience import patient
from minidiff.data.scenes import draw_scenes, shapes_code
from minidiff.errors import DataError, did_you_mean

HELD = 256  # rows of a stream that are kept for validation
HEAD = 1024  # first rows that they are drawn from


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
        return _here(self.train, n)

    def fingerprint(self) -> str:
        """Names the training rows by their number, columns and content (of rows spread evenly over them); of a stream,
        the rows that were kept for validation stand for all.
        """
        rows = self.train if self.buffer_size is None else self.validation
        n, digest = len(rows), hashlib.sha256()
        for row in undecoded(rows, self.image).select(range(0, n, max(1, n // 64))):
            digest.update(content(row, self.image, self.caption))
        return f"{n if self.buffer_size is None else 'streamed'} rows {digest.hexdigest()[:12]}"


def _here(rows: "datasets.IterableDataset", n: int) -> "datasets.Dataset":  # noqa: F821
    import datasets

    fail_at_once()
    found = list(islice(patient(rows), n))
    return datasets.Dataset.from_dict({key: [x[key] for x in found] for key in rows.features}, features=rows.features)


def undecoded(rows: "datasets.Dataset", image: str) -> "datasets.Dataset":  # noqa: F821
    """Returns rows whose pictures are {"bytes", "path"}: we decode, so that nothing is decoded before it is judged."""
    import datasets

    return rows.cast_column(image, datasets.Image(decode=False))


def shapes(
    image_size: int,
    n: int,
    validation: int,
    seed: int = 0,
    weights: dict[str, float] | None = None,
    siblings: int = 1,
) -> Source:
    """Procedural scenes with exact ground truth (`minidiff.shapes`): `n` to train on, `validation` of the test split.

    Drawn once and kept in the cache of `datasets`. `weights` are the shares of the scene categories. The captions are
    descriptions: what a short prompt leaves open would only blur what the network learns of the words it does hold
    (Betker et al. 2023, DALL·E 3, train on 95 % descriptive captions for that reason). `siblings` > 1 puts as many
    scenes side by side that differ in little: a contrastive model then has to listen to every word, and to their order
    (Yüksekgönül et al. 2023, "When and why vision-language models behave like bags-of-words").
    """
    from minidiff.shapes import WEIGHTS

    weights = dict(WEIGHTS if weights is None else weights)
    train, test = (
        _scenes(split, k, image_size, seed, weights, siblings) for split, k in (("train", n), ("test", validation))
    )
    return Source("shapes", train, test, together=siblings)


def _scenes(
    split: str, n: int, image_size: int, seed: int, weights: dict[str, float], siblings: int
) -> "datasets.Dataset":  # noqa: F821
    import datasets

    features = datasets.Features({"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))})
    recipe = {
        "split": split,
        "n": n,
        "image_size": image_size,
        "seed": seed,
        "weights": weights,
        "siblings": siblings,
        "code": shapes_code(),
    }
    with _quiet():
        return datasets.Dataset.from_generator(draw_scenes, features=features, gen_kwargs=recipe)


def parquet(
    path: str,
    image: str = "image",
    caption: str = "captions",
    split_column: str | None = None,
    train_split: str = "train",
    validation_split: str = "test",
    streaming: bool = False,
    buffer_size: int = 1000,
) -> Source:
    """Rows of parquet files (`path` may be a glob), split by a column if there is one.

    They are copied once into the cache of `datasets`; with `streaming` they are read where they lie, and shuffled
    among `buffer_size` rows.
    """
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
            rows = datasets.Dataset.from_parquet(files, streaming=streaming)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        reason = str(error.__cause__ or error).splitlines()[0]
        raise DataError(
            "MD-DATA-009", f"data.path={path} cannot be read as parquet, or has no rows: {reason}"
        ) from error
    columns = split_column, train_split, validation_split
    return _split(f"parquet {path}", rows, image, caption, *columns, buffer_size=buffer_size if streaming else None)


def folder(path: str, image: str = "image", caption: str = "caption") -> Source:
    """A folder of images with a `metadata.jsonl` whose lines hold `file_name` and the caption."""
    import datasets

    if not Path(path).is_dir():
        raise DataError(
            "MD-DATA-002",
            f"data.path={path} is not a folder (seen from {os.getcwd()}). Name the folder that holds metadata.jsonl.",
        )
    remarks = _check_metadata(Path(path))
    try:
        with _quiet():
            rows = datasets.load_dataset("imagefolder", data_dir=str(path), split="train")
    except (OSError, ValueError) as error:
        raise DataError(
            "MD-DATA-014",
            f"data.path={path} cannot be read as a folder of images: {str(error).splitlines()[0]} It should hold "
            "pictures and a metadata.jsonl whose lines are like "
            '{"file_name": "1.png", "caption": "a red star"}.',
        ) from error
    return _split(f"folder {path}", rows, image, caption, None, "train", "test", remarks)


def _check_metadata(root: Path) -> tuple[str, ...]:
    """Returns remarks on files without a row and rows without a file.

    Raises DataError (MD-DATA-015) if a row names a file outside of the folder, which is how somebody else's metadata
    would have a private file trained on and shown.
    """
    named, inside = set(), root.resolve()
    for file in sorted(root.rglob("metadata.jsonl")):
        for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
            try:
                name = json.loads(line).get("file_name", "") if line.strip() else None
            except (ValueError, AttributeError) as error:
                raise DataError("MD-DATA-014", f"{file}, line {number} is not a JSON object: {error}.") from error
            if name is None:
                continue
            target = file.parent / str(name)
            outside = not isinstance(name, str) or "\\" in name or "\0" in name or "://" in name
            if outside or not target.resolve().is_relative_to(inside):
                raise DataError(
                    "MD-DATA-015",
                    f"{file}, line {number} names {name!r}, which is not a file inside {root}. Only files of the "
                    "folder itself are read; correct the line, or copy the file there.",
                )
            named.add(target.resolve())
    if not named:
        return ()
    endings = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
    there = {file.resolve() for file in root.rglob("*") if file.suffix.lower() in endings}
    lists = ((there - named, "pictures have no line in metadata.jsonl"), (named - there, "lines name no picture"))
    return tuple(f"{len(x)} {what}, such as {min(x).name}" for x, what in lists if x)


# What `datasets` may read with. Its other builders unpickle (pandas), or run more than a data set needs.
BUILDERS = ("parquet", "arrow", "imagefolder", "webdataset", "json", "csv", "cache")  # cache: what one of them made


def hub(
    path: str,
    revision: str | None = None,
    image: str = "image",
    caption: str = "text",
    split: str = "train",
    streaming: bool = False,
    buffer_size: int = 1000,
) -> Source:
    """A dataset of the Hugging Face Hub, `owner/name`; pin `revision` to a commit for runs that others can repeat.

    With `streaming` nothing is kept on the disk, and rows are shuffled among `buffer_size`.
    """
    import datasets

    try:
        with _quiet():
            builder = datasets.load_dataset_builder(path, revision=revision)  # the commit is looked up here, once
            kind = type(builder).__module__.rsplit(".", 1)[-1]
            if kind not in BUILDERS:
                raise DataError(
                    "MD-DATA-016",
                    f"The dataset data.path={path} is read by the builder '{kind}', which could run code that came "
                    f"with the data. minidiff reads only {', '.join(BUILDERS)}. Convert it to parquet.",
                )
            if streaming:
                rows = builder.as_streaming_dataset(split=split)
            else:
                builder.download_and_prepare()
                rows = builder.as_dataset(split=split)
    except (OSError, ValueError) as error:
        at = f" data.revision={revision}" if revision else ""
        raise DataError(
            "MD-DATA-003",
            f"The dataset data.path={path} (split {split}) could not be read from the Hugging Face Hub or its "
            f"local cache: {str(error).splitlines()[0]} It may be misspelt, private or gated (log in with `hf auth "
            "login`), or this machine is offline: then fetch it once where there is internet, by `python -m "
            f"minidiff.doctor data=hub data.path={path}{at}`, and copy ~/.cache/huggingface/datasets (its place is "
            "$HF_DATASETS_CACHE). data=shapes is built in and needs no network.",
        ) from error
    buffered = buffer_size if streaming else None
    if kind != "cache":
        commit = str(builder.base_path or "").rpartition("@")[2][:40] or revision
        return _split(f"hub {path}@{commit}", rows, image, caption, None, "train", "test", buffer_size=buffered)
    commit = builder.hash  # of the copy that was fetched last, whatever revision was asked for
    pinned = re.fullmatch("[0-9a-f]{7,40}", revision or "")
    if pinned and not commit.startswith(revision):
        raise DataError(
            "MD-DATA-018",
            f"The Hugging Face Hub cannot be reached, and the local cache holds {path} at the commit {commit}, not at "
            f"data.revision={revision}. Go online, or train on what is there by data.revision={commit}.",
        )
    remark = f"the Hugging Face Hub cannot be reached: {path} is the local cache's copy of it, commit {commit}"
    remarks = () if pinned else (remark,)
    return _split(f"hub {path}@{commit}", rows, image, caption, None, "train", "test", remarks, buffered)


def _split(
    name: str,
    rows: "datasets.Dataset | datasets.IterableDataset",  # noqa: F821
    image: str,
    caption: str,
    column: str | None,
    train: str,
    validation: str,  # noqa: F821
    remarks: tuple[str, ...] = (),
    buffer_size: int | None = None,
) -> Source:
    """Divides rows by a column, or sets one row in twenty (at most 512) aside for validation; checks the columns
    first.
    """
    streaming = buffer_size is not None
    for option, wanted in (("data.image", image), ("data.caption", caption), ("data.split_column", column)):
        if wanted is not None and wanted not in (rows.column_names or []):
            raise DataError("MD-DATA-004", _missing_column(name, option, wanted, rows.features or {}))
    if not streaming and len(rows) == 0:
        raise _no_rows(name)
    try:
        rows = undecoded(rows, image)
    except (TypeError, ValueError) as error:  # pyarrow's errors are either
        raise DataError(
            "MD-DATA-013",
            f"The column '{image}' (data.image) of {name} holds {rows.features[image]}, not pictures: "
            f"{str(error).splitlines()[0]}",
        ) from error
    if streaming:
        parts = _set_aside(name, rows, Keeps(image, caption, column, train), validation)
        return Source(name, *parts, image, caption, remarks, buffer_size)
    if column is None:
        parts = {} if len(rows) < 2 else rows.train_test_split(min(512, max(1, len(rows) // 20)), seed=0)
        return Source(name, parts.get("train", rows), parts.get("test", rows), image, caption, remarks)
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
    return Source(name, *chosen, image, caption, remarks)


def _no_rows(name: str) -> DataError:
    return DataError("MD-DATA-005", f"The data source {name} holds no rows. Check data.path and the split.")


def _set_aside(
    name: str,
    rows: "datasets.IterableDataset",  # noqa: F821
    keeps: Keeps,
    validation: str,
) -> tuple["datasets.IterableDataset", "datasets.Dataset"]:  # noqa: F821
    """Divides a stream: the first HELD rows of the validation split; or, without a column, HELD rows drawn from the
    first HEAD (one in twenty of a shorter stream), which are known by their content and left out of training.

    Raises DataError (MD-DATA-005) if there are none, and (MD-DATA-023) if they cannot be read.
    """
    try:
        if keeps.column is None:
            held = _here(_files_shuffled(rows, seed=0), HEAD).shuffle(seed=0)
            held = held.select(range(HELD if len(held) == HEAD else max(min(1, len(held)), len(held) // 20)))
            keeps = replace(keeps, held=frozenset(map(keeps.digest, held)))
        else:
            held = _here(rows.filter(replace(keeps, wanted=validation)), HELD)
    except (OSError, TypeError, ValueError, AttributeError) as error:  # damaged files, or a column of something else
        raise DataError(
            "MD-DATA-023",
            f"The first rows of {name} cannot be read as a stream ({type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]}). Check data.image, and that the files are whole.",
        ) from error
    if len(held) == 0:
        raise _no_rows(name if keeps.column is None else f"{name}, {keeps.column}='{validation}',")
    return rows.filter(keeps), held


def part_of(source: Source, seed: int, rank: int, ranks: int) -> "datasets.IterableDataset":  # noqa: F821
    """Returns the share of a stream's training rows that one process reads: its own files, if all processes can have as
    many, or else every `ranks`-th row; files come in an order of their own in every pass. Workers of the process divide
    its files further.
    """
    from datasets.distributed import split_dataset_by_node

    return split_dataset_by_node(_files_shuffled(source.train, seed), rank, ranks)


def fail_at_once() -> None:
    """Leaves all waiting to `patient`: by itself, `datasets` tries 20 times in 100 s or more, without a word."""
    from datasets import config

    config.STREAMING_READ_MAX_RETRIES = config.STREAMING_OPEN_MAX_RETRIES = 1
    config.STREAMING_READ_RETRY_INTERVAL = config.STREAMING_OPEN_RETRY_INTERVAL = 0
    config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 0


def _files_shuffled(rows: "datasets.IterableDataset", seed: int) -> "datasets.IterableDataset":  # noqa: F821
    """Returns the files of a stream in another order, one after the other: `datasets` would mix up to ten, whose
    threads take five seconds to end every pass.
    """
    return rows.shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=1)


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
