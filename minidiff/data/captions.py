"""What a caption column may hold → clean texts."""

import unicodedata

from minidiff.errors import DataError


def texts(value: object) -> list[str]:
    """Returns the captions of one row; a row without words gives the empty caption, which trains unconditionally.

    Numbers are written out, bytes must be UTF-8 (UnicodeDecodeError otherwise), NaN (a missing number) is no caption.
    Raises DataError (MD-DATA-008) for dictionaries, where only the user knows which entry is meant.
    """
    values = value if isinstance(value, list | tuple) else [value]
    return [text for text in map(_text, values) if text] or [""]


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
