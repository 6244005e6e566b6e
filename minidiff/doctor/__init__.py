"""What is wrong with this machine, these data or this run, in words: `python -m minidiff.doctor`."""

from typing import NamedTuple


class Finding(NamedTuple):
    """One thing that was looked at."""

    good: bool
    text: str  # what was found, and what to do about it if it is not good
