"""What a caption column may hold → clean texts."""

import unicodedata
from collections.abc import Iterable
from dataclasses import replace

from minidiff.errors import DataError


def texts(value: object) -> list[str]:
    """Returns the captions of one row; a row without words gives the empty caption, which trains unconditionally.

    Lists are opened, nested ones too; numbers are written out, bytes must be UTF-8 (UnicodeDecodeError otherwise), NaN
    (a missing number) is no caption. Raises DataError (MD-DATA-008) for dictionaries, where only the user knows which
    entry is meant.
    """
    if isinstance(value, list | tuple):
        return [text for entry in value for text in texts(entry) if text] or [""]
    return [_text(value)]


def _text(value: object) -> str:
    if isinstance(value, dict):
        raise DataError(
            "MD-DATA-008",
            f"The caption column holds a dictionary with the keys {sorted(value)}; name a column of texts by "
            "data.caption.",
        )
    if value is None or value != value:  # only NaN differs from itself
        return ""
    if isinstance(value, bytes):
        value = value.decode()
    value = str(value)
    if value.isascii() and value.isprintable():
        return " ".join(value.split())
    # control characters and lone surrogates: nobody wrote them, and tokenizers and files stumble over them
    kept = (" " if c.isspace() else c for c in value if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs"))
    return " ".join("".join(kept).split())


def treat_empty_captions(source: "Source", policy: str) -> "Source":  # noqa: F821
    """Returns the source as it is (`unconditional`: its rows without caption teach the network what it draws without a
    prompt), or without such rows (`drop`). Rows to train on of a stream are judged as they come, by `admits`.

    Raises DataError (MD-DATA-017) for `raise`, and if no row is left to train on.
    """
    if policy == "unconditional":
        return source
    validation = _with_words(source.validation[source.caption])
    held = source.validation.select(validation) if validation else source.validation
    if source.buffer_size is not None:
        remark = ("rows without caption are left out as they come, and not counted",) if policy == "drop" else ()
        return replace(source, validation=held, empty_caption=policy, remarks=source.remarks + remark)
    train, n = _with_words(source.train[source.caption]), len(source)
    empty = n - len(train)
    if empty and (policy == "raise" or not train):
        raise _refused(f"{empty} of {n} training rows of {source.name} hold", source.caption, policy)
    remark = (f"{empty} of {n} rows have no caption and were left out",) if empty else ()
    return replace(source, train=source.train.select(train), validation=held, remarks=source.remarks + remark)


def admits(source: "Source", value: object) -> bool:  # noqa: F821
    """Says whether a row of a stream, with these captions, is one to train on; raises DataError (MD-DATA-017) if it
    should not be there.
    """
    if source.empty_caption == "unconditional" or _has_words(value):
        return True
    if source.empty_caption == "raise":
        raise _refused(f"A row of {source.name} holds", source.caption, "raise")
    return False


def _refused(rows: str, column: str, policy: str) -> DataError:
    return DataError(
        "MD-DATA-017",
        f"{rows} no words in the column '{column}', which empty_caption={policy} does not allow. Check data.caption; "
        "or leave such rows out by empty_caption=drop, or train them without caption by empty_caption=unconditional.",
    )


def _with_words(column: Iterable) -> list[int]:
    return [i for i, value in enumerate(column) if _has_words(value)]


def _has_words(value: object) -> bool:
    try:
        return texts(value) != [""]
    except UnicodeDecodeError:
        return True  # a bad row, which is skipped and counted when its turn comes
