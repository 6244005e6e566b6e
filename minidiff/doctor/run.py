"""Does this run learn, and does what it learned sample?"""

import json
import math
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import torch
from torch import Tensor

from minidiff import checkpoint
from minidiff.config import build
from minidiff.data import Batch, CaptionedImages, first_batches
from minidiff.doctor import Finding
from minidiff.ema import EMA
from minidiff.fit import fit
from minidiff.machine import open_accelerator
from minidiff.pipeline import ImageNoise, Pipeline, find_checkpoint, load

UPDATES = 60  # in which one batch must be learned


def examine(path: str) -> Iterator[Finding]:
    """Yields what there is to say about a run folder or a checkpoint folder of a text-to-image run."""
    folder = find_checkpoint(path)
    checkpoint.verify(folder)
    state = checkpoint.load(folder, []).state
    values, pipeline = state["config"], load(folder, device="cpu")
    yield Finding(True, f"{folder} is whole")
    yield from _metrics(Path(path) / "metrics.jsonl")
    yield _ema(values, state["ema_updates"], pipeline)
    yield _terminal(pipeline)
    yield _exact(pipeline)
    source = build(values["data"])
    rows = CaptionedImages(
        source.head(64), source.image, source.caption, image_size=values["image_size"], shuffle=False
    )
    (batch,) = first_batches(rows, images=16, batch_size=16)
    yield _range(pipeline.space.encode(batch.x()))
    yield _overfits(values, batch)


def _metrics(file: Path) -> Iterator[Finding]:
    if not file.is_file():
        return
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    bad = [row["step"] for row in rows if not math.isfinite(row.get("loss", 0.0))]
    first = f" (first: {bad[0]})" if bad else ""
    yield Finding(not bad, f"{len(rows)} lines of metrics, {len(bad)} not finite{first}")


def _ema(values: dict, updates: int, pipeline: Pipeline) -> Finding:
    ema = EMA(pipeline.denoiser.net, values["ema"])
    ema.updates = updates
    share = ema.initial_share()
    advice = "" if share < 0.05 else "; its pictures are noise: train longer, lower ema=, or sample with weights=raw"
    return Finding(share < 0.05, f"{share:.1%} of the averaged weights are still the random initial ones{advice}")


def _terminal(pipeline: Pipeline) -> Finding:
    process = pipeline.denoiser.process
    t = torch.tensor(process.t_max, dtype=torch.float64)
    left = float(process.alpha(t) / process.sigma(t))
    text = f"at its noisiest time the process keeps alpha/sigma = {left:.3g} of the picture"
    return Finding(left < 0.1, text + ("" if left < 0.1 else "; sampling starts from noise that training never showed"))


def _exact(pipeline: Pipeline) -> Finding:
    """Samples with a denoiser that knows the answer: what is missing then is the sampler's fault, not the network's."""
    process, how = pipeline.denoiser.process, pipeline.sampling
    x0 = torch.rand((1, *pipeline.space.shape), generator=torch.Generator().manual_seed(0)) * 2 - 1

    def knows(xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = process.alpha(torch.as_tensor(t).double()), process.sigma(torch.as_tensor(t).double())
        return x0, (xt - alpha.to(xt) * x0) / sigma.to(xt)

    noise, times = ImageNoise([0]), how.grid(process, how.steps)
    x = process.sigma(times[0]).float() * noise(torch.empty_like(x0))
    *_, last = how.sampler(knows, x, times, process, noise)
    error = float((last.xt - x0).abs().max())
    return Finding(error < 1e-2, f"with an exact denoiser the sampler misses the picture by at most {error:.1g}")


def _range(x0: Tensor) -> Finding:
    low, high, spread = float(x0.min()), float(x0.max()), float(x0.std())
    good = -1.01 <= low < high <= 1.01 and 0.1 < spread < 1.2
    text = f"x0 from {low:.2f} to {high:.2f}, standard deviation {spread:.2f}"
    return Finding(good, text + ("" if good else "; expected are [-1, 1] and about 0.5: are the pictures empty?"))


def _overfits(values: dict, batch: Batch) -> Finding:
    """Trains a fresh network on one batch with fixed noise and without an average: if that fails, nothing can work."""
    torch.manual_seed(0)
    accelerator, _ = open_accelerator("cpu", "fp32", 1)
    task, optim = build(values["task"]), values["optim"]
    optimizer = build(optim["make"])(task.model, optim["lr"], optim["betas"], 0.0)
    updates = fit(
        *(task.model, task.loss, repeat(batch), optimizer, accelerator),
        steps=UPDATES,
        start=0,
        learning_rate=lambda step: optim["lr"],
        clip=optim["clip"],
    )
    losses = [float(step.loss) for step in updates]
    text = f"one batch, {UPDATES} updates: loss {losses[0]:.3g} → {losses[-1]:.3g}"
    good = losses[-1] < 0.7 * losses[0]
    return Finding(good, text + ("" if good else "; who cannot learn 16 pictures learns nothing: check optim.lr"))
