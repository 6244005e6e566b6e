"""Being stopped, and not being started twice.

    with lock(folder), Interruption() as stop:
        for step in fit(...):
            if stop.requested(accelerator):      # SIGINT, SIGTERM or SIGUSR1 has come
                save(); raise SystemExit(stop.exit_code)

A signal only leaves a note, so that an update is never cut in half; the loop reads the note between two updates.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from minidiff.errors import InputError

# Ctrl-C; the scheduler wants the machine back; the scheduler will start the same job again.
EXIT_CODES = {name: code for name, code in (("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 0)) if hasattr(signal, name)}
FAILED = "an error in the data"  # of some process of the run, which says more
REASONS = EXIT_CODES | {FAILED: 6}


class Interruption:
    """Notes the first of SIGINT, SIGTERM and SIGUSR1 while its `with` block runs; handlers set before still run.

    A second Ctrl-C raises KeyboardInterrupt at once. Outside the main thread, where Python allows no handlers, nothing
    is noted.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._before: dict[str, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._before = {name: signal.signal(getattr(signal, name), self._note) for name in EXIT_CODES}
        return self

    def __exit__(self, *exception: object) -> None:
        for name, handler in self._before.items():
            signal.signal(getattr(signal, name), handler)
        self._before = {}

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM, 0 for SIGUSR1, which is how a scheduler announces that it will requeue; 6
        where another process failed.
        """
        return REASONS[self.signal]

    def requested(self, accelerator: "accelerate.Accelerator", failed: bool = False) -> bool:  # noqa: F821
        """Whether any process of the run was asked to stop, or has `failed` and will not get through another update;
        all of them hear the same answer at the same update.
        """
        if failed and self.signal is None:
            self.signal = FAILED
        if accelerator.num_processes == 1:
            return self.signal is not None
        import torch

        names = [None, *REASONS]
        mine = torch.tensor([names.index(self.signal)], device=accelerator.device)
        heard = names[int(accelerator.gather(mine).max())]
        if heard is not None:  # else what came to this process while it asked the others is for the next update
            self.signal = heard
        return heard is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == "SIGINT" and self.signal is not None:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal = name
            # not print: the signal may have come in the middle of one
            os.write(2, f"\n{name}: finishing this update, then saving. Ctrl-C once more quits at once.\n".encode())
        before = self._before.get(name)
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)


@contextmanager
def lock(folder: str | Path) -> Iterator[None]:
    """Holds a run folder for this process; the system lets go of it when the process ends, however it ends.

    Raises InputError (MD-RUN-001) if another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise InputError(
                "MD-RUN-001",
                f"{folder} is being trained by another process ({file.read().strip() or 'unknown'}). Two would "
                "overwrite each other's checkpoints: wait for it, stop it, or choose another name=.",
            ) from error
        except OSError:  # a file system without locks
            yield
            return
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        yield
