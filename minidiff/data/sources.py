"""The four places that captioned images come from, each as a `Source`: shapes, parquet, folder and hub."""

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minidiff.data.divide import divide
from minidiff.data.scenes import draw_scenes, shapes_code
from minidiff.data.source import Source
from minidiff.errors import DataError

PART = 1000  # scenes that a process draws before it takes others


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
    parts = [(i, min(i + PART, n)) for i in range(0, n, PART)]
    recipe = {
        "split": split,
        "parts": parts,
        "image_size": image_size,
        "seed": seed,
        "weights": weights,
        "siblings": siblings,
        "code": shapes_code(),
    }
    # elsewhere a process begins anew, and would run a caller's script again
    processes = min(len(parts), os.cpu_count() or 1) if sys.platform == "linux" else 1
    with _quiet():
        return datasets.Dataset.from_generator(
            draw_scenes, features=features, gen_kwargs=recipe, num_proc=processes if processes > 1 else None
        )


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
    return divide(f"parquet {path}", rows, image, caption, *columns, buffer_size=buffer_size if streaming else None)


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
    return divide(f"folder {path}", rows, image, caption, None, "train", "test", remarks)


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
        return divide(f"hub {path}@{commit}", rows, image, caption, None, "train", "test", buffer_size=buffered)
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
    return divide(f"hub {path}@{commit}", rows, image, caption, None, "train", "test", remarks, buffered)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the progress bars of `datasets` off our own screen."""
    import datasets

    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
