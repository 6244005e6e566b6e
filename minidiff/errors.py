"""What went wrong, in words: every failure a user can cause is one clear paragraph with a stable code.

A message says what failed, where (file, row, key), why, and what to do. `train.py`, `sample.py` and
`python -m minidiff.evaluate` print it without a traceback (unless `debug=true`) and leave with the exit code of its
kind.
"""


class MinidiffError(Exception):
    """A failure that the user can act on. `code` is stable and listed in docs/errors.md."""

    exit_code = 1

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"[{code}] {message}")
        self.code = code

    def __reduce__(self) -> tuple:
        code, message = self.code, str(self).removeprefix(f"[{self.code}] ")
        return type(self), (code, message)  # so that it comes whole out of a loader's process


class InputError(MinidiffError):
    """A key, value or argument that the user gave is wrong."""

    exit_code = 2


class DataError(MinidiffError):
    """The training data cannot be read as asked."""

    exit_code = 3


class CheckpointError(MinidiffError):
    """A run folder or checkpoint is missing, damaged or of another model."""

    exit_code = 4


class NumericsError(MinidiffError):
    """Training produced values that are not finite."""

    exit_code = 5


class MachineError(MinidiffError):
    """The machine lacks something: a device, memory, disk, pretrained weights, the network."""

    exit_code = 6


def did_you_mean(word: str, known: list[str]) -> str:
    """Returns " Did you mean 'x'?" for the known word nearest to `word`, or an empty string."""
    import difflib

    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""
