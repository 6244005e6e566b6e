"""Trains a model: compose the configuration, build the parts, and go round the loop.

    python train.py                        # the offline lesson; `python train.py --help` lists everything
    python sample.py run=runs/shapes prompt="a large red star on a navy background"

A run lives in runs/<name>: config.yaml, metrics.jsonl, metrics.csv, log.txt, samples/, checkpoints/. Running the same
command again goes on where the last checkpoint ended.
"""

import time
from pathlib import Path

from minidiff.config import TRAIN_RANGES, build, check, entry, write_yaml
from minidiff.errors import CheckpointError


@entry("train")
def main(values: dict) -> None:
    train(values)


def train(values: dict) -> None:
    """Trains one run from its configuration: goes round the loop, and does what is due."""
    check(values, TRAIN_RANGES)
    run = Run(values)
    if run.start >= run.steps:
        run.log.say(
            f"{run.folder} is trained to step {run.start} already: raise steps=, or choose another name= or resume=none"
        )
    elif run.start == 0:
        run.preview(0)
    images, clock = 0, time.monotonic()
    for step in run.updates():
        run.ema.update(run.model)
        images += step.images * run.accelerator.num_processes
        due = {name: step.step % n == 0 or step.step == run.steps for name, n in values["every"].items()}
        if due["log"] or due["validate"]:
            pace = images / (time.monotonic() - clock)
            numbers = {"loss": step.loss, "lr": step.lr, "grad_norm": step.grad_norm, "images_per_s": pace}
            run.log.metrics(step.step, numbers | (run.validate() if due["validate"] else {}))
            images, clock = 0, time.monotonic()
        for row in step.skipped:
            run.log.say(f"skipped an image that cannot be read: {row}")
        if due["preview"]:
            run.preview(step.step)
        if due["save"]:
            run.save(step.step)
    run.log.close()


class Run:
    """The parts of one training run, and what the loop does with them once in a while."""

    def __init__(self, values: dict) -> None:
        import torch

        from minidiff.ema import EMA
        from minidiff.log import RunLog
        from minidiff.machine import compile_network, open_accelerator

        self.values, self.steps, self.folder = values, values["steps"], Path("runs") / values["name"]
        self.accelerator, precision = open_accelerator(values["device"], values["precision"], values["accumulate"])

        torch.manual_seed(values["seed"])  # the initial weights; all other randomness has its own place
        self.task = build(values["task"]).to(self.accelerator.device)
        self.model = self.task.model
        if self.accelerator.device.type == "cuda":
            self.model.to(memory_format=torch.channels_last)  # faster there, slower on a CPU
        optim = values["optim"]
        self.optimizer = build(optim["make"])(self.model, optim["lr"], optim["betas"], optim["weight_decay"])
        self.ema = EMA(self.model, values["ema"])
        came_from = self.find_checkpoint()
        self.start = 0 if came_from is None else self.restore(came_from)

        source, self.batches, self.validation = self.open_data()
        self.task.measure(self.validation)
        compiled = compile_network(self.model, values["compile"], self.accelerator.device)
        if self.accelerator.num_processes > 1:
            self.task.model = self.accelerator.prepare_model(self.model)
        self.optimizer = self.accelerator.prepare_optimizer(self.optimizer)

        self.log = RunLog(self.folder, values["log"]["wandb"], resume_step=self.start, steps=self.steps)
        write_yaml(values, self.folder / "config.yaml")
        self.log.say(self.preflight(source, f"{precision}, {compiled}"))
        self.log.say(f"going on from {came_from}" if came_from else "no checkpoint found, starting at step 0")

    def open_data(self):
        """Returns the source, the endless training batches from the first sample not yet seen, and the validation
        batches.
        """
        from minidiff import data

        values, ranks = self.values, self.accelerator.num_processes
        source = build(values["data"])
        part = data.share(values["batch_size"], ranks, values["accumulate"])
        look = {"image_size": values["image_size"], "background": values["background"], "seed": values["seed"]}
        train = data.CaptionedImages(source.train, source.image, source.caption, **look)
        held = data.CaptionedImages(source.validation, source.image, source.caption, **look, shuffle=False)
        self.task.learn_words(train.all_captions())
        batches = data.loader(
            train,
            part,
            start=self.start * values["batch_size"],
            workers=data.auto_workers() if values["workers"] == "auto" else values["workers"],
            rank=self.accelerator.process_index,
            ranks=ranks,
        )
        return source, batches, data.first_batches(held, images=256, batch_size=64)

    def updates(self):
        """Yields after every optimizer update that is still to do."""
        from minidiff import fit

        optim = self.values["optim"]

        def learning_rate(step: int) -> float:
            return fit.warmup_cosine(step, steps=self.steps, lr=optim["lr"], warmup=optim["warmup"])

        return fit.fit(
            self.task.model,
            self.task.loss,
            self.batches,
            self.optimizer,
            self.accelerator,
            steps=self.steps,
            start=self.start,
            learning_rate=learning_rate,
            clip=optim["clip"],
        )

    def preview(self, step: int) -> None:
        """Draws what the averaged weights can do, on the same prompts and noise every time."""
        import torch

        if not self.accelerator.is_main_process:
            return
        self.model.eval()
        with self.ema.applied(self.model), torch.compiler.set_stance("force_eager"):
            picture = self.task.preview(self.validation[0])
        self.model.train()
        file = self.folder / "samples" / f"step_{step:08d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file)
        self.log.image("samples", file)

    def validate(self) -> dict[str, float]:
        """Returns the validation loss of the raw and of the averaged weights, and the averaged one per noise level."""
        import torch

        self.model.eval()
        with torch.compiler.set_stance("force_eager"), self.accelerator.autocast():
            raw = self.task.validate(self.validation)
            with self.ema.applied(self.model):
                average = self.task.validate(self.validation)
        self.model.train()
        return average | {"val_loss": raw["val_loss"], "val_loss_ema": average["val_loss"]}

    def save(self, step: int) -> None:
        """Writes a checkpoint: weights, average, optimizer, and all that sampling must agree on."""
        from minidiff import checkpoint
        from minidiff.state import flatten_optimizer

        if not self.accelerator.is_main_process:
            return
        moments, groups = flatten_optimizer(self.optimizer, self.model)
        tensors = {"model": self.model.state_dict(), "ema": self.ema.state_dict(), "optimizer": moments}
        state = {
            "name": self.values["name"],
            "contract": self.task.contract(self.values["task"]),
            "config": self.values,
            "optimizer_groups": groups,
            "ema_updates": self.ema.updates,
        }
        checkpoint.save(self.folder / "checkpoints", step, tensors, state, keep_last=self.values["keep"])

    def find_checkpoint(self) -> Path | None:
        """Returns the checkpoint to go on from, or None to start at step 0."""
        from minidiff import checkpoint

        wanted = self.values["resume"]
        if wanted == "none":
            return None
        if wanted == "auto":
            return checkpoint.latest(self.folder / "checkpoints")
        if not Path(wanted).is_dir():
            there = ", ".join(sorted(p.name for p in (self.folder / "checkpoints").glob("step_*"))) or "none"
            raise CheckpointError(
                "MD-CKPT-024", f"resume={wanted} is not a checkpoint folder. Checkpoints of {self.folder}: {there}."
            )
        return Path(wanted)

    def restore(self, folder: Path) -> int:
        """Loads weights, average and optimizer from a checkpoint; returns its step."""
        from minidiff import checkpoint
        from minidiff.state import load_model, unflatten_optimizer

        saved = checkpoint.load(folder, ["model", "ema", "optimizer"])
        load_model(self.model, saved.tensors["model"])
        self.task.restore(saved.state["contract"])
        self.ema.load_state_dict(saved.tensors["ema"], saved.state["ema_updates"])
        groups = saved.state["optimizer_groups"]
        moments = unflatten_optimizer(self.optimizer, self.model, saved.tensors["optimizer"], groups)
        self.optimizer.load_state_dict(moments)
        return saved.step

    def preflight(self, source, computing: str) -> str:
        """Returns what is about to happen, in a few lines."""
        import torch

        values, device = self.values, self.accelerator.device
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        passes = self.steps * values["batch_size"] / len(source.train)
        rows = {
            "model": f"{type(self.model).__name__}, {parameters:.2f} M parameters",
            "device": f"{device} ({where}), {computing}, {self.accelerator.num_processes} process(es)",
            "data": f"{source.name}: {len(source.train)} images to train on, {len(source.validation)} to validate",
            "training": f"steps {self.start} to {self.steps}, {values['batch_size']} images each: {passes:.1f} passes",
            "folder": f"{self.folder} (metrics.jsonl, metrics.csv, log.txt, samples/, checkpoints/)",
        }
        return "\n".join(f"{name:>10}  {text}" for name, text in rows.items())


if __name__ == "__main__":
    main()
