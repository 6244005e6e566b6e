"""One training run: its parts, built from the configuration, and what the loop does with them once in a while.

`train.py` goes round the loop; whoever wants the parts alone (a benchmark, a notebook) makes a `Run` of a composed
configuration and takes from it what is needed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from minidiff import checkpoint, data, fit
from minidiff.cache import cache_folder
from minidiff.config import build, write_yaml
from minidiff.ema import EMA
from minidiff.errors import MachineError
from minidiff.log import NoLog, RunLog
from minidiff.machine import (
    compile_network,
    first_process,
    from_all,
    open_accelerator,
    require_equal_weights,
    require_space,
)
from minidiff.optim import DECAYS, learning_rate
from minidiff.pipeline import find_checkpoint
from minidiff.redact import redact_values
from minidiff.resume import checkpoint_to_resume, require_same_run
from minidiff.state import flatten_optimizer, load_model, unflatten_optimizer


class Run:
    """The parts of one training run, and what the loop does with them once in a while."""

    def __init__(self, values: dict) -> None:
        self.values, self.steps, self.folder = values, values["steps"], Path("runs") / values["name"]
        self.accelerator, precision = open_accelerator(values["device"], values["precision"], values["accumulate"])

        torch.manual_seed(values["seed"])  # the initial weights; all other randomness has its own place
        self.task = build(values["task"]).to(self.accelerator.device)
        self.model = self.task.model
        if first_process():
            require_space(self.folder, sum(p.numel() for p in self.model.parameters()))
        if self.accelerator.device.type == "cuda":
            self.model.to(memory_format=torch.channels_last)  # faster there, slower on a CPU
        optim = values["optim"]
        self.optimizer = build(optim["make"])(self.model, optim["lr"], optim["betas"], optim["weight_decay"])
        came_from = checkpoint_to_resume(self.folder, values["resume"])
        if came_from is None and values["init"] is not None:
            self.begin_with(values["init"])
        self.ema = EMA(self.model, values["ema"])
        self.start, self.seen, self.left_out, self.failed_saves, saved = 0, 0, 0, 0, {}
        self.usual_loss = fit.UsualLoss()
        if came_from is not None:
            saved = self.restore(came_from)

        cache = cache_folder(values["cache"])
        self.cached = "none" if cache is None else self.task.remember_in(cache)
        self.source = data.treat_empty_captions(build(values["data"]), values["empty_caption"])
        self.fingerprint = self.source.fingerprint()
        changes = self.what_changed(saved)
        self.batches, self.validation, remarks = self.open_data(saved.get("stream"))
        self.task.measure(self.validation)
        compiled = compile_network(self.model, values["compile"], self.accelerator.device)
        self.trained = self.model  # what the loop trains: wrapped when gradients come from several processes
        if self.accelerator.num_processes > 1:
            self.trained = self.accelerator.prepare_model(self.model)
        self.optimizer = self.accelerator.prepare_optimizer(self.optimizer)

        self.log = NoLog()
        if self.accelerator.is_main_process:
            self.log = RunLog(self.folder, values["log"]["wandb"], resume_step=self.start, steps=self.steps)
            write_yaml(values, self.folder / "config.yaml")
        self.log.say(self.preflight(f"{precision}, {compiled}"))
        for remark in [*self.source.remarks, *remarks, *(f"changed since the checkpoint: {x}" for x in changes)]:
            self.log.say(f"note: {remark}")
        self.log.say(f"going on from {came_from}" if came_from else "no checkpoint found, starting at step 0")

    def open_data(self, position: list | None):
        """Returns the endless training batches from the first sample not yet seen, the validation batches, and what
        there is to say about the captions and about going on with a stream at `position`.
        """
        values, source, ranks = self.values, self.source, self.accelerator.num_processes
        part = data.share(values["batch_size"], ranks, values["accumulate"])
        place = {"start": self.seen, "rank": self.accelerator.process_index, "ranks": ranks}
        workers = data.auto_workers() if values["workers"] == "auto" else values["workers"]
        look = {"image_size": values["image_size"], "background": values["background"], "seed": values["seed"]}
        held = data.CaptionedImages(source.validation, source.image, source.caption, **look, shuffle=False)
        if source.buffer_size is None:
            self.bad_rows = data.BadRows(len(source), values["max_bad"])
            train = data.CaptionedImages(source.train, source.image, source.caption, **look, together=source.together)
            remarks = self.task.learn_words(train.all_captions())
            if train.without_caption:
                rows = f"{train.without_caption} of {len(train)} rows"
                remarks.append(f"{rows} have no caption and train unconditionally")
            batches = data.Ahead(
                data.loader(train, part, workers=workers, **place, draw=self.task.draw), values["accumulate"]
            )
        else:
            self.bad_rows = data.BadRows(None, values["max_bad"])
            remarks = self.task.learn_words(held.all_captions())  # the others as they come
            readers = data.stream_readers(source, place["rank"], ranks, workers)
            positions, cost = data.resume_at(position, place["rank"], ranks, readers, source.buffer_size)
            remarks += [cost] if cost else []
            row = data.RowReader(source.image, source.caption, **look)
            train = data.StreamedImages(source, row, part, positions=positions, **place)
            batches = data.read_batches(train, readers if workers else 0)
            batches = data.Ahead(batches, values["accumulate"], positions)
        return batches, data.first_batches(held, images=256, batch_size=64), remarks

    def updates(self) -> Iterator[fit.Step]:
        """Yields after every optimizer update that is still to do."""
        optim = self.values["optim"]
        decay = DECAYS[optim["decay"]]

        def loss(batch):
            if self.source.buffer_size is not None:  # of a stream, the words are not known before
                self.task.learn_words(batch.captions)
            self.task.model = self.trained
            try:
                return self.task.loss(batch)
            finally:  # previews and validation are not for the wrapper, which would wait for the other processes
                self.task.model = self.model

        return fit.fit(
            self.trained,
            loss,
            self.batches,
            self.optimizer,
            self.accelerator,
            steps=self.steps,
            start=self.start,
            learning_rate=partial(learning_rate, steps=self.steps, lr=optim["lr"], warmup=optim["warmup"], decay=decay),
            clip=optim["clip"],
        )

    def take(self, step: fit.Step) -> None:
        """Moves the average after an update, and says what went wrong in it."""
        self.seen += self.values["batch_size"]
        rows = ", ".join(map(str, step.rows[:16])) or "unknown, since a stream does not number them"
        if step.finite:
            self.ema.update(self.model)
            if (usual := self.usual_loss.before_spike(step.loss.item())) is not None:
                self.log.say(
                    f"warning: the loss of step {step.step} is {step.loss.item():.3g}, and {usual:.3g} is usual here; "
                    f"the update was made. Its rows: {rows}. If the loss does not come down again, go back by "
                    "resume=CHECKPOINT with a lower optim.lr"
                )
        else:
            self.left_out += 1
            self.log.say(
                f"warning: step {step.step} is not finite (loss {step.loss.item()}, gradient norm "
                f"{step.grad_norm.item()}) and was left out; its rows: {rows}"
            )
        for warning in self.bad_rows.note(step.skipped, self.seen):
            self.log.say(warning)

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Evaluation mode, without compiling for the shapes that only validation and previews have."""
        self.model.eval()
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.model.train()

    def preview(self, step: int) -> None:
        """Draws what the averaged weights can do, on the same prompts and noise every time. A failure is a warning."""
        if not self.accelerator.is_main_process:
            return
        file = self.folder / "samples" / f"step_{step:08d}.png"
        try:
            with self.showing(), self.ema.applied(self.model):
                picture = self.task.preview(self.validation[0])
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file)
        except Exception as error:  # out of memory, a full disk: no picture is worth a training run
            return self.log.say(
                f"warning: no preview at step {step} ({type(error).__name__}: {error}); training goes on"
            )
        self.log.image("samples", file)

    def validate(self) -> dict[str, float]:
        """Returns the validation loss of the raw and of the averaged weights, and the averaged one per noise level."""
        with self.showing(), self.accelerator.autocast():
            raw = self.task.validate(self.validation)
            with self.ema.applied(self.model):
                average = self.task.validate(self.validation)
        return average | {"val_loss": raw["val_loss"], "val_loss_ema": average["val_loss"]}

    def save(self, step: int, *, last: bool) -> None:
        """Writes a checkpoint: weights, average, optimizer, and all that sampling and resuming must agree on.

        A disk that refuses is a warning the first time, and MachineError the second time in a row or at the end.
        """
        require_equal_weights(self.model, self.accelerator)
        self.task.flush()
        position = from_all(self.batches.positions, self.accelerator) if self.source.buffer_size is not None else None
        if not self.accelerator.is_main_process:
            return
        moments, groups = flatten_optimizer(self.optimizer, self.model)
        tensors = {"model": self.model.state_dict(), "ema": self.ema.state_dict(), "optimizer": moments}
        state = {
            "name": self.values["name"],
            "contract": self.task.contract(self.values["task"]),
            "config": redact_values(self.values),
            "data": self.fingerprint,
            "samples_seen": self.seen,
            "stream": position,
            "optimizer_groups": groups,
            "ema_updates": self.ema.updates,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }
        try:
            checkpoint.save(self.folder / "checkpoints", step, tensors, state, keep_last=self.values["keep"])
            self.failed_saves = 0
        except MachineError as error:
            self.failed_saves += 1
            if last or self.failed_saves == 2:
                raise
            self.log.say(f"warning: {error} Training goes on; a second failure in a row ends it.")

    def close(self) -> None:
        """Says how many rows were bad, stops the loader's processes and ends the log."""
        if len(self.bad_rows):
            self.log.say(f"{len(self.bad_rows)} row(s) could not be read: {self.bad_rows.reasons()}")
        if made := self.task.flush():
            self.log.say(made)
        self.batches.close()
        self.log.close()

    def restore(self, folder: Path) -> dict:
        """Loads weights, average and optimizer from a checkpoint; returns the rest of its state."""
        saved = checkpoint.load(folder, ["model", "ema", "optimizer"])
        load_model(self.model, saved.tensors["model"])
        self.task.restore(saved.entry("contract"))
        groups = saved.entry("optimizer_groups")
        self.ema.load_state_dict(saved.tensors["ema"], saved.entry("ema_updates"))
        moments = unflatten_optimizer(self.optimizer, self.model, saved.tensors["optimizer"], groups)
        self.optimizer.load_state_dict(moments)
        if self.accelerator.scaler is not None and (scaler := saved.entry("scaler")):
            self.accelerator.scaler.load_state_dict(scaler)
        self.start, self.seen = saved.step, saved.entry("samples_seen")
        return saved.state

    def begin_with(self, path: str) -> None:
        """Loads the averaged weights of another run into this one, which starts at step 0 with a fresh optimizer."""
        load_model(self.model, checkpoint.load(find_checkpoint(path), ["ema"]).tensors["ema"])

    def what_changed(self, saved: dict) -> list[str]:
        """Returns what differs from the checkpoint's run and may; what may not is an error."""
        if not saved:
            return []
        now = {"config": self.values, "data": self.fingerprint}
        return require_same_run(saved, now, allow_change=self.values["allow_change"])

    def preflight(self, computing: str) -> str:
        """Returns what is about to happen, in a few lines."""
        values, source, device = self.values, self.source, self.accelerator.device
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        passes = ""
        if source.buffer_size is None:
            passes = f": {self.steps * values['batch_size'] / len(source):.1f} passes"
        if device.type == "cuda":
            computing += (
                ", same bits every time" if values["deterministic"] else ", last bits vary (see deterministic=)"
            )
        rows = {
            "model": f"{type(self.model).__name__}, {parameters:.2f} M parameters",
            "device": f"{device} ({where}), {computing}, {self.accelerator.num_processes} process(es)",
            "data": f"{source.name}: {source.size()} to train on, {len(source.validation)} to validate",
            "training": f"steps {self.start} to {self.steps}, {values['batch_size']} images each{passes}",
            "cache": self.cached,
            "folder": f"{self.folder} (metrics.jsonl, metrics.csv, log.txt, samples/, checkpoints/)",
        }
        return "\n".join(f"{name:>10}  {text}" for name, text in rows.items())
