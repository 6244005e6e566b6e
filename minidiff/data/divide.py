"""Rows → rows to train on and rows to validate on, by a column or by lot; from here on they are a `Source`."""

from dataclasses import replace

import numpy as np

from minidiff.data.held import Keeps
from minidiff.data.source import Source, files_shuffled, first_rows, undecoded
from minidiff.errors import DataError, did_you_mean

HELD = 256  # rows of a stream that are kept for validation
HEAD = 1024  # first rows that they are drawn from


def divide(
    name: str,
    rows: "datasets.Dataset | datasets.IterableDataset",  # noqa: F821
    image: str,
    caption: str,
    column: str | None,
    train: str,
    validation: str,
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
            held = first_rows(files_shuffled(rows, seed=0), HEAD).shuffle(seed=0)
            held = held.select(range(HELD if len(held) == HEAD else max(min(1, len(held)), len(held) // 20)))
            keeps = replace(keeps, held=frozenset(map(keeps.digest, held)))
        else:
            held = first_rows(rows.filter(replace(keeps, wanted=validation)), HELD)
    except (OSError, TypeError, ValueError, AttributeError) as error:  # damaged files, or a column of something else
        raise DataError(
            "MD-DATA-023",
            f"The first rows of {name} cannot be read as a stream ({type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]}). Check data.image, and that the files are whole.",
        ) from error
    if len(held) == 0:
        raise _no_rows(name if keeps.column is None else f"{name}, {keeps.column}='{validation}',")
    return rows.filter(keeps), held


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
