"""One side of a comparison in a process of its own, so that memory, allocator and caches are its own.

The parent makes a `Side` of a function's name and calls it as often as it likes (`pairs.compare` takes it as it is);
the child builds what the function returns, and runs that once per call.

    def peer(folder): ...; return run               # in bench/NAME.py, which ends in  sides.main(globals(), parent)
    side = Side(__file__, "peer", folder); side(); side.peak_mib()
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


class Side:
    """Calls in a child process what `function(*arguments)` of `script` returns; arguments are texts."""

    def __init__(self, script: str, function: str, *arguments: object) -> None:
        command = [sys.executable, script, "--side", function, *map(str, arguments)]
        environment = {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "HF_HUB_OFFLINE": "1", **os.environ}
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._ask("ready")

    def __call__(self) -> None:
        self._ask("run")

    def peak_mib(self) -> float:
        """Returns how much memory (MiB) all calls so far needed at most, beyond what was there before; if they
        used a GPU, what their tensors took there.
        """
        return round(int(self._ask("peak")) / 1024, 1)

    def close(self) -> None:
        self._child.stdin.close()
        self._child.wait()

    def _ask(self, what: str) -> str:
        try:
            self._child.stdin.write(what + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # the next line says it better
        answer = self._child.stdout.readline()
        if not answer:
            raise SystemExit(f"{' '.join(self._child.args)} has ended with {self._child.wait()}; its message is above.")
        return answer.strip()


def main(functions: dict[str, Callable], parent: Callable[[], None]) -> None:
    """Runs a script: as a child if the command line begins with --side, else as the parent."""
    if sys.argv[1:2] != ["--side"]:
        return parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    run = functions[sys.argv[2]](*sys.argv[3:])
    before = _memory("VmRSS")
    for line in sys.stdin:
        if line == "run\n":
            run()
        print(_gpu_memory() or _memory("VmHWM") - before if line == "peak\n" else "done", file=answers, flush=True)


def _gpu_memory() -> int:
    """Returns the most that this process' tensors took on a GPU, in KiB; 0 if it used none."""
    torch = sys.modules["torch"]
    return torch.cuda.max_memory_allocated() // 1024 if torch.cuda.is_initialized() else 0


def _memory(kind: str) -> int:
    """Returns a line of /proc/self/status in KiB; the first call resets the high-water mark (0 where there is none)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    if kind == "VmRSS":
        Path("/proc/self/clear_refs").write_text("5")
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(kind))
