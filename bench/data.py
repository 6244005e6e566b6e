"""The data pipeline against what a model consumes: images/s, cold (decoded and resized) and remembered.

    python bench/data.py                           the lesson's network on 32 px, and the small one of bench/training.py
    python bench/data.py --json FILE               half a minute each

The peer is the training step of `python train.py` on one batch that is at hand, ours the same number of images out of
the loader, so a ratio says how many times faster pictures come than they are used. Pictures are PNGs of twice the size
in a parquet file; `captions` is the text encoder on captions that it has not seen.
"""

import argparse
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pairs

BATCH = 64
NETWORKS = {"the lesson's network": [], "channels [32, 64, 128]": ["net=small", "net.channels=[32,64,128]"]}


def pictures(file: Path, size: int) -> Iterator:
    """Returns an endless loader that remembers nothing at first."""
    from minidiff import data

    source = data.parquet(str(file))
    rows = data.CaptionedImages(source.train, source.image, source.caption, image_size=size)
    return data.loader(rows, BATCH, workers=data.auto_workers())


def consumer(file: Path, *choices: str) -> tuple[Callable[[], object], object]:
    """Returns the training step on one batch over and over, and the text encoder."""
    from minidiff.config import compose
    from minidiff.run import Run

    Path("runs/shapes").mkdir(parents=True, exist_ok=True)
    choices = ["data=parquet", f"data.path={file}", f"batch_size={BATCH}", "steps=1000000", "resume=none", *choices]
    choices += [f"every.{name}=1000000" for name in ("log", "preview", "validate", "save")]
    run = Run(compose("train", choices))
    run.batches = itertools.repeat(next(run.batches))
    steps = run.updates()
    return lambda: run.take(next(steps)), run.task.pipeline.text


def parent() -> None:
    from minidiff.data import shapes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--many", type=int, default=1, help="batches between two readings; with workers, more than wait"
    )
    values = pairs.parse(parser)
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        file, n = (
            Path(place) / "train.parquet",
            (values.rounds + 2) * values.many * BATCH * 20 // 19,
        )  # one in 20 validates
        scenes = shapes(64, n=n, validation=1).train
        scenes.to_parquet(file)
        captions = list(dict.fromkeys(caption for row in scenes["captions"] for caption in row))
        for name, choices in NETWORKS.items():
            one_step, text = consumer(file, *choices)
            cold, warm = pictures(file, 32), pictures(file, 32)
            for _ in range(n // BATCH + 1):
                next(warm)
            unseen = iter([captions[i : i + BATCH] for i in range(0, len(captions), BATCH)])

            def repeat(once: Callable) -> Callable[[], None]:
                return lambda: [once() for _ in range(values.many)] and None

            step = repeat(one_step)
            ways = {
                "cold": repeat(lambda cold=cold: next(cold)),
                "remembered": repeat(lambda warm=warm: next(warm)),
                "captions": repeat(lambda text=text, unseen=unseen: text(next(unseen))),
            }
            for way, produce in ways.items():
                ratio = pairs.compare(step, produce, rounds=values.rounds, warmup=0 if way == "cold" else 1)
                pairs.report(
                    f"data, {way}, against {name}",
                    ratio,
                    images_per_s=round(values.many * BATCH / ratio.ours_s),
                    consumed_per_s=round(values.many * BATCH / ratio.peer_s),
                )


if __name__ == "__main__":
    parent()
