"""Trains a model: compose the configuration, build the parts (`minidiff.run`), and go round the loop.

    python train.py                        # the offline lesson; `python train.py --help` lists everything
    python sample.py run=runs/shapes prompt="a large red star on a navy background"

A run lives in runs/<name>: config.yaml, metrics.jsonl, metrics.csv, log.txt, samples/, checkpoints/. Running the same
command again goes on where the last checkpoint ended.
"""

import shlex
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from minidiff.config import TRAIN_RANGES, check, check_name, entry


@entry("train")
def main(values: dict) -> None:
    train(values)


def train(values: dict) -> None:
    """Trains one run from its configuration: goes round the loop, and does what is due.

    Asked to stop by a signal, it finishes the update, saves and raises SystemExit with the signal's exit code.
    """
    from minidiff import data
    from minidiff.interrupt import Interruption, lock
    from minidiff.machine import deterministic, failures_in_words, first_process
    from minidiff.run import Run

    check(values, TRAIN_RANGES)
    check_name(values["name"])
    alone = lock(Path("runs") / values["name"]) if first_process() else nullcontext()
    with alone, data.dead_workers(), deterministic(values["deterministic"]):
        run = Run(values)
        try:
            limits = values["batch_size"], values["image_size"], run.accelerator.device
            with Interruption() as stop, failures_in_words(*limits):
                go_round(run, stop)
        finally:
            run.close()


def go_round(run: "Run", stop: "Interruption") -> None:  # noqa: F821
    """Makes every update that is still to do, and does what is due after each."""
    every = run.values["every"]
    if run.start >= run.steps:
        run.log.say(
            f"{run.folder} is trained to step {run.start} already: raise steps=, or choose another name= or resume=none"
        )
    elif run.start == 0:
        run.preview(0)
    images, clock = 0, time.monotonic()
    for step in run.updates():
        run.take(step)
        images += step.images * run.accelerator.num_processes
        due = {name: step.step % n == 0 or step.step == run.steps for name, n in every.items()}
        if due["log"] or due["validate"] or not step.finite:
            pace = images / (time.monotonic() - clock)
            numbers = {"loss": step.loss, "lr": step.lr, "grad_norm": step.grad_norm, "images_per_s": pace}
            numbers |= {"left_out": run.left_out} if run.left_out else {}
            run.log.metrics(step.step, numbers | (run.validate() if due["validate"] else {}))
            images, clock = 0, time.monotonic()
        if due["preview"]:
            run.preview(step.step)
        stopping = stop.requested(run.accelerator, failed=run.batches.error is not None)
        if due["save"] or stopping:
            run.save(step.step, last=stopping or step.step == run.steps)
        if stopping and step.step < run.steps:
            if run.batches.error is not None:
                raise run.batches.error
            again = shlex.join(["python", "train.py", *sys.argv[1:]])
            run.log.say(f"stopped by {stop.signal} after step {step.step}, and saved. To go on:\n  {again}")
            raise SystemExit(stop.exit_code)


if __name__ == "__main__":
    main()
