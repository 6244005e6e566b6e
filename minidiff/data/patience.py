"""A stream that drops is taken up again, after a while, and says so; one that stays away ends in words."""

import sys
import time
from collections.abc import Iterator

from minidiff.errors import MachineError

WAITS = (1, 2, 4, 8, 16, 32, 60, 60)  # seconds before each new attempt; a row that arrives begins them anew
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError)  # waiting does not help


def patient(rows: "datasets.IterableDataset") -> Iterator[dict]:  # noqa: F821
    """Yields the rows of one pass. After an error of the network it waits, with a line on the screen, and goes on
    behind the last row.

    Raises MachineError (MD-DATA-021) when all attempts in a row fail. Other errors are raised as they are.
    """
    failures = 0
    while True:
        try:
            for row in rows:
                yield row
                failures = 0
            return
        except OSError as error:  # also those of huggingface_hub, with 429 and the like
            if isinstance(error, PERMANENT):
                raise
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            if failures == len(WAITS):
                raise MachineError(
                    "MD-DATA-021",
                    f"The data stream dropped and {failures} new attempts failed, the last with {reason}. Nothing is "
                    "wrong with the run: it goes on from its last checkpoint with the same command. Check the network; "
                    "data.streaming=false reads from the disk what was once downloaded.",
                ) from error
            wait, failures = WAITS[failures], failures + 1
            print(
                f"the data stream dropped ({reason}); attempt {failures} of {len(WAITS)} in {wait} s",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(wait)
            rows.load_state_dict(rows.state_dict())
