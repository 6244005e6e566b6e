"""What a run tells: metrics.jsonl, metrics.csv, log.txt in its folder, a line on the screen, W&B if asked.

The only door to wandb. Logging never stops training: whatever fails here, a full disk or a tracker without a
network, becomes one warning. Nothing that looks like a token reaches the screen, a file or a server. A NaN is
logged as NaN: a curve shows where a run broke.
"""

import csv
import io
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, SupportsFloat

from minidiff.redact import redact


class RunLog:
    """The log of one run. Use it in a `with` block, or call `close`.

    `wandb` holds what conf/log/wandb.yaml does (project, mode); None stays local. Lines logged after
    `resume_step` are dropped, so that no curve runs twice; 0 starts the curves afresh. `steps` is the run's
    last step, for the progress line.
    """

    def __init__(
        self,
        folder: str | Path,
        wandb: Mapping[str, str] | None = None,
        resume_step: int = 0,
        *,
        steps: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._jsonl, self._csv = self.folder / "metrics.jsonl", self.folder / "metrics.csv"
        self._columns: list[str] = []  # of metrics.csv
        self._step = resume_step
        self._warned: set[str] = set()
        self._progress = Progress(steps)
        self._wandb = None
        self._attempt("cannot write to the run folder", self._drop_lines_after, resume_step)
        if wandb is not None:
            self._wandb = self._attempt("W&B does not start; the log stays local", _start_wandb, self.folder, wandb)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def say(self, text: str) -> None:
        """Prints a message and keeps it in log.txt."""
        text = redact(text)
        self._progress.say(text)
        self._note(text)

    def metrics(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Logs one line of numbers at `step`. Loss per noise level goes by loss_t0 … loss_t9."""
        numbers = self._attempt("cannot read the metrics as numbers", _numbers, values) or {}
        self._step = step
        self._attempt("cannot write the metrics", self._record, {"step": step} | numbers)
        line = self._progress.line(step, numbers)
        self._attempt("cannot draw the progress line", self._progress.show, step, line)
        self._note(line)
        self._mirror(lambda run: run.log(numbers, step=step))

    def image(self, name: str, path: str | Path) -> None:
        """Logs an image file, such as a grid of samples, at the step logged last."""
        self.say(f"{name}: {path}")

        def upload(run: Any) -> None:
            import wandb

            run.log({redact(name): wandb.Image(str(path))}, step=self._step)

        self._mirror(upload)

    def close(self) -> None:
        """Ends the progress line and the W&B run."""
        self._attempt("cannot end the progress line", self._progress.close)
        self._mirror(lambda run: run.finish())
        self._wandb = None

    def _note(self, text: str) -> None:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n"
        self._attempt("cannot write log.txt", _append, self.folder / "log.txt", line)

    def _mirror(self, action: Callable[[Any], None]) -> None:
        """Does `action` with the W&B run, if there is one; the first failure ends the mirroring."""

        def or_stop() -> None:
            run, self._wandb = self._wandb, None
            action(run)
            self._wandb = run

        if self._wandb is not None:
            self._attempt("W&B failed; from here on the log stays local", or_stop)

    def _attempt(self, failure: str, action: Callable, *arguments: Any) -> Any:
        """Returns what `action` does, or None after a warning, given once for each kind of failure."""
        try:
            return action(*arguments)
        except Exception as error:  # whatever it is, a log must not end a training
            if failure not in self._warned:
                self._warned.add(failure)
                self.say(f"warning: {failure} ({type(error).__name__}: {error})")
            return None

    def _drop_lines_after(self, step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = [row for row in self._rows() if row["step"] <= step] if step else []
        _replace(self._jsonl, "".join(json.dumps(row) + "\n" for row in rows))
        self._write_csv(rows)

    def _record(self, row: dict) -> None:
        _append(self._jsonl, json.dumps(row) + "\n")
        if row.keys() <= set(self._columns):
            _append(self._csv, _csv_lines(self._columns, [row]))
        else:
            self._write_csv(self._rows())

    def _rows(self) -> list[dict]:
        """Returns the lines of metrics.jsonl; a line cut short by a kill is no line."""
        rows = []
        for line in self._jsonl.read_text(encoding="utf-8").splitlines() if self._jsonl.exists() else []:
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]

    def _write_csv(self, rows: list[dict]) -> None:
        """Writes metrics.csv as a whole: at the start, and whenever a column joins."""
        self._columns = list(dict.fromkeys(["step", *(key for row in rows for key in row)]))
        header = dict(zip(self._columns, self._columns, strict=True))
        _replace(self._csv, _csv_lines(self._columns, [header]) + _csv_lines(self._columns, rows))


class NoLog:
    """The log of the processes that are not the first: they say nothing and write nothing."""

    def say(self, text: str) -> None: ...
    def metrics(self, step: int, values: Mapping[str, SupportsFloat]) -> None: ...
    def image(self, name: str, path: str | Path) -> None: ...
    def close(self) -> None: ...


class Progress:
    """One line on the screen, such as "step 120/2000  loss 0.0831  94 images/s  ETA 3 min".

    On a terminal it stays at the bottom with a bar (rich); elsewhere each one is printed.
    """

    def __init__(self, steps: int | None) -> None:
        self.steps = steps
        self._marks: deque[tuple[float, int]] = deque(maxlen=20)  # recent (seconds, step)
        self._bar = self._task = None

    def show(self, step: int, line: str) -> None:
        if not sys.stdout.isatty():
            return self.say(line)
        if self._bar is None:
            self._start_bar()
        self._bar.update(self._task, completed=step, description=line)

    def say(self, text: str) -> None:
        """Prints `text`, above the bar if there is one. A screen that is gone or knows only ASCII is no failure."""
        try:
            encoding = sys.stdout.encoding or "utf-8"
            # while the bar is up, rich redirects stdout and puts this line above it
            print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
        except (OSError, ValueError):
            pass

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def line(self, step: int, values: Mapping[str, float | int]) -> str:
        """Returns the words for `step`, reached now; the time left follows the pace of the last lines."""
        self._marks.append((time.monotonic(), step))
        words = [f"step {step}/{self.steps}" if self.steps else f"step {step}"]
        for name in ("loss", "val_loss", "val_loss_ema"):
            if name in values:
                words.append(f"{name} {'NaN' if math.isnan(values[name]) else format(values[name], '.4g')}")
        if (pace := values.get("images_per_s")) is not None:
            words.append(f"{pace:.0f} images/s" if pace >= 10 else f"{pace:.1f} images/s")
        (then, first), (now, last) = self._marks[0], self._marks[-1]
        if self.steps and last > first:
            words.append(f"ETA {_duration((self.steps - step) * (now - then) / (last - first))}")
        return "  ".join(words)

    def _start_bar(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._bar = Progress(BarColumn(bar_width=20), TextColumn("{task.description}", markup=False))
        self._task = self._bar.add_task("", total=self.steps)
        self._bar.start()


def _start_wandb(folder: Path, settings: Mapping[str, str]) -> Any:
    import wandb

    if settings["mode"] == "online" and not wandb.login(prompt=False, verify=False):
        raise RuntimeError("no key: run `wandb login` first, or use log.wandb.mode=offline")
    private = wandb.Settings(
        save_code=False,
        disable_code=True,
        disable_git=True,
        x_disable_meta=True,  # the command line, where people paste tokens
        console="off",  # what is printed would pass by `redact`
        silent=True,
    )
    name = redact(folder.resolve().name)
    project, mode = settings["project"], settings["mode"]
    return wandb.init(project=project, mode=mode, name=name, group=name, dir=str(folder), settings=private)


def _numbers(values: Mapping[str, SupportsFloat]) -> dict[str, float | int]:
    return {redact(name): x if isinstance(x, int) else float(x) for name, x in values.items()}


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _csv_lines(columns: list[str], rows: Iterable[Mapping]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        writer.writerow([x if isinstance(x, str) else json.dumps(x) for x in cells])  # NaN as in the other file
    return text.getvalue()


def _append(file: Path, text: str) -> None:
    """Appends all of `text` or, if the disk is full, nothing."""
    data = text.encode()
    with open(file, "ab", buffering=0) as f:
        end = f.seek(0, os.SEEK_END)
        if f.write(data) != len(data):
            f.truncate(end)
            raise OSError(f"no space left for {file}")


def _replace(file: Path, text: str) -> None:
    temporary = file.with_name(f".tmp-{file.name}")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, file)
