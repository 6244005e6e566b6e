"""What a caption column may hold → clean texts."""

import unicodedata
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
    # control characters and lone surrogates: nobody wrote them, and tokenizers and files stumble over them
    kept = (" " if c.isspace() else c for c in str(value) if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs"))
    return " ".join("".join(kept).split())


def treat_empty_captions(source: "Source", policy: str) -> "Source":  # noqa: F821
    """Returns the source as it is (`unconditional`: its rows without caption teach the network what it draws without a
    prompt), or without such rows (`drop`).

    Raises DataError (MD-DATA-017) for `raise`, and if no row is left to train on.
    """
    if policy == "unconditional":
        return source
    train, validation = (
        [i for i, value in enumerate(rows[source.caption]) if _has_words(value)]
        for rows in (source.train, source.validation)
    )
    n, empty = len(source.train), len(source.train) - len(train)
    if empty and (policy == "raise" or not train):
        raise DataError(
            "MD-DATA-017",
            f"{empty} of {n} training rows of {source.name} hold no words in the column '{source.caption}', which "
            f"empty_caption={policy} does not allow. Check data.caption; or leave such rows out by empty_caption=drop, "
            "or train them without caption by empty_caption=unconditional.",
        )
    remark = (f"{empty} of {n} rows have no caption and were left out",) if empty else ()
    return replace(
        source,
        train=source.train.select(train),
        validation=source.validation.select(validation) if validation else source.validation,
        remarks=source.remarks + remark,
    )


def _has_words(value: object) -> bool:
    try:
        return texts(value) != [""]
    except UnicodeDecodeError:
        return True  # a bad row, which is skipped and counted when its turn comes
