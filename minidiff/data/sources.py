"""Where captioned images come from, as rows of Hugging Face `datasets`."""

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minidiff.errors import DataError, did_you_mean


@dataclass(frozen=True)
class Source:
    """Rows to train on and rows to validate on, as Hugging Face `Dataset`s, and which columns to read."""

    name: str
    train: "datasets.Dataset"  # noqa: F821
    validation: "datasets.Dataset"  # noqa: F821
    image: str = "image"
    caption: str = "captions"
    remarks: tuple[str, ...] = ()  # what the user should know before training on it
    together: int = 1  # rows in succession that shuffling keeps side by side

    def fingerprint(self) -> str:
        """Names the training rows by their number, columns and content (of rows spread evenly over them)."""
        n, digest = len(self.train), hashlib.sha256()
        for row in undecoded(self.train, self.image).select(range(0, n, max(1, n // 64))):
            image = row[self.image] or {}
            digest.update(image.get("bytes") or Path(image.get("path") or "").name.encode())
            digest.update(repr(row[self.caption]).encode())
        return f"{n} rows {digest.hexdigest()[:12]}"


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
        "code": _shapes_code(),
    }
    with _quiet():
        return datasets.Dataset.from_generator(_draw_scenes, features=features, gen_kwargs=recipe)


def _draw_scenes(
    split: str, n: int, image_size: int, seed: int, weights: dict[str, float], siblings: int, code: str
) -> Iterator[dict]:
    from PIL import Image

    from minidiff.shapes import example, render

    for i in range(n):
        scene = example(split, i, seed, weights, siblings)
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
    path: str, revision: str | None = None, image: str = "image", caption: str = "text", split: str = "train"
) -> Source:
    """A dataset of the Hugging Face Hub, `owner/name`; pin `revision` to a commit for runs that others can repeat."""
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
    if kind != "cache":
        commit = str(builder.base_path or "").rpartition("@")[2][:40] or revision
        return _split(f"hub {path}@{commit}", rows, image, caption, None, "train", "test")
    commit = builder.hash  # of the copy that was fetched last, whatever revision was asked for
    pinned = re.fullmatch("[0-9a-f]{7,40}", revision or "")
    if pinned and not commit.startswith(revision):
        raise DataError(
            "MD-DATA-018",
            f"The Hugging Face Hub cannot be reached, and the local cache holds {path} at the commit {commit}, not at "
            f"data.revision={revision}. Go online, or train on what is there by data.revision={commit}.",
        )
    remark = f"the Hugging Face Hub cannot be reached: {path} is the local cache's copy of it, commit {commit}"
    return _split(f"hub {path}@{commit}", rows, image, caption, None, "train", "test", () if pinned else (remark,))


def _split(
    name: str,
    rows: "datasets.Dataset",  # noqa: F821
    image: str,
    caption: str,
    column: str | None,
    train: str,
    validation: str,  # noqa: F821
    remarks: tuple[str, ...] = (),
) -> Source:
    """Divides rows by a column, or sets one row in twenty (at most 512) aside for validation; checks the columns
    first.
    """
    for option, wanted in (("data.image", image), ("data.caption", caption), ("data.split_column", column)):
        if wanted is not None and wanted not in rows.column_names:
            raise DataError("MD-DATA-004", _missing_column(name, option, wanted, rows.features))
    if len(rows) == 0:
        raise DataError("MD-DATA-005", f"The data source {name} holds no rows. Check data.path and the split.")
    try:
        rows = undecoded(rows, image)
    except (TypeError, ValueError) as error:  # pyarrow's errors are either
        raise DataError(
            "MD-DATA-013",
            f"The column '{image}' (data.image) of {name} holds {rows.features[image]}, not pictures: "
            f"{str(error).splitlines()[0]}",
        ) from error
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
