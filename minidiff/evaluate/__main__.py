"""Scores a run: python -m minidiff.evaluate run=runs/shapes

Draws pictures for held-out prompts, prints how good they are, and writes eval.json and eval.png into the run folder.

On the shapes world it is decided: every picture is read back, and shows what was asked or does not. A run that was
trained on other pictures is compared with those it held out, in the eyes of OpenCLIP: CLIP score, R-precision and CMMD.
A Stable Diffusion folder draws shapes, or what is named by data=parquet data.path=… and the like, as train.py has it.

    run=runs/RUN       a run folder, one of its checkpoints, or a Stable Diffusion folder
    n=                 prompts per category (100); of other worlds, pictures (500, or as many as there are)
    split=heldout      compositions never trained together; or test, train. Of other worlds, heldout or train
    weights=ema        or raw
    seed=0             of the first picture
    steps= guidance=   of sampling; the run's own if not given
    candidates=1       drawn for every picture; the one that OpenCLIP finds to fit best is judged
    eyes=              MODEL/WEIGHTS of OpenCLIP that look at pictures of other worlds; the run's own if not given
    batch_size=64      pictures drawn at once
    save=false         true: all pictures go to eval/drawn and eval/real in the run folder, for other measures
    device=auto        or cpu, cuda, mps
    debug=false        show tracebacks
"""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from minidiff.errors import InputError, MinidiffError, did_you_mean
from minidiff.redact import redact

OPTIONS = {
    "run": str,
    "n": int,
    "split": str,
    "weights": str,
    "seed": int,
    "steps": int,
    "guidance": float,
    "candidates": int,
    "eyes": str,
    "batch_size": int,
    "save": str,
    "device": str,
    "debug": str,
}
DEFAULTS = {
    "n": None,
    "split": "heldout",
    "weights": "ema",
    "seed": 0,
    "steps": None,
    "guidance": None,
    "candidates": None,
    "eyes": None,
    "batch_size": 64,
    "save": "false",
    "device": "auto",
    "debug": "false",
}
PROMPTS, PICTURES = 100, 500  # of a category; of another world
SHAPES = "minidiff.data.shapes"  # the source whose pictures can be read back


def main(arguments: list[str]) -> None:
    if not arguments or any(x in ("-h", "--help") for x in arguments):
        print(__doc__)
        return
    data = [x for x in arguments if x.startswith(("data=", "data."))]
    options = read([x for x in arguments if x not in data])

    import minidiff
    from minidiff import checkpoint as checkpoints
    from minidiff.config import compose
    from minidiff.pipeline import find_checkpoint

    place = Path(options["run"])
    foreign = minidiff.interop.is_pipeline(place)
    checkpoint = place if foreign else find_checkpoint(place)
    pipe = minidiff.load(checkpoint, weights=options["weights"], device=options["device"])
    values = None
    if data:
        values = compose("train", data)
    elif not foreign:  # the bundled run keeps no configuration, and neither may others that were handed on
        values = checkpoints.load(checkpoint, []).state.get("config")
    evaluate(pipe, options, place if foreign else checkpoint.parents[1], values)


def read(arguments: Sequence[str]) -> dict:
    """Returns the options of `key=value` arguments; raises InputError (MD-EVAL-001 to -003) in words."""
    options = dict(DEFAULTS)
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in OPTIONS:
            raise InputError(
                "MD-EVAL-001",
                f"Unknown option '{argument}'; the options are {', '.join(OPTIONS)}, and data=… with all that "
                f"train.py takes below it.{did_you_mean(key, list(OPTIONS))}",
            )
        try:
            options[key] = OPTIONS[key](value)
        except ValueError as error:
            kind = "a whole number" if OPTIONS[key] is int else "a number"
            raise InputError("MD-EVAL-002", f"{argument}: {key} must be {kind}.") from error
    if "run" not in options:
        raise InputError("MD-EVAL-003", "Say what to score: run=runs/RUN.")
    for key in ("n", "batch_size"):
        if options[key] is not None and options[key] < 1:
            raise InputError("MD-EVAL-002", f"{key}={options[key]}: it must be at least 1.")
    if options["save"] not in ("true", "false"):
        raise InputError("MD-EVAL-002", f"save={options['save']}: it must be true or false.")
    return options


def evaluate(pipe: "Pipeline", options: dict, folder: Path, values: dict | None = None) -> dict:  # noqa: F821
    """Scores a pipeline by the world of a training configuration `values` (None: the shapes world); prints the table
    and writes eval.json and eval.png into `folder`.
    """
    how = {name: options[name] for name in ("steps", "guidance", "candidates")}
    calls, draw = NetworkCalls(pipe), partial(pipe.sample, batch_size=options["batch_size"], **how)
    place = {"split": options["split"], "seed": options["seed"]}
    if values is None or values["data"]["_target_"] == SHAPES:
        from minidiff.evaluate.scenes import judge_scenes

        found = judge_scenes(draw, n=options["n"] or PROMPTS, **place)
    else:
        from minidiff.evaluate.pictures import judge_pictures, real_pictures

        if options["split"] not in ("heldout", "train"):
            raise InputError("MD-EVAL-002", f"split={options['split']}: of pictures, it must be heldout or train.")
        eyes = named_eyes(options["eyes"], pipe) if options["eyes"] else pipe.agreement
        real = real_pictures(values, options["split"], options["n"] or PICTURES, pipe.space.image_size)
        found = judge_pictures(draw, real, eyes, options["seed"])
    settings = pipe.sampling.but(**how)
    report = found.report | place | {"weights": options["weights"], "run": pipe.name}
    report |= {name: getattr(settings, name) for name in how}
    report["evaluations"] = calls.images / len(found.pictures["drawn"])
    (folder / "eval.json").write_text(json.dumps(report, indent=1))
    found.sheet.save(folder / "eval.png")
    print("\n".join([headline(report), "", *found.lines]))
    print(f"written: {folder / 'eval.json'}, {folder / 'eval.png'}")
    if options["save"] == "true":
        write(found.pictures, folder / "eval")
    return report


class NetworkCalls:
    """Counts how many images pass through a pipeline's network."""

    def __init__(self, pipe) -> None:
        self.images = 0
        pipe.denoiser.net.register_forward_pre_hook(self._count)

    def _count(self, _, inputs: tuple) -> None:
        self.images += len(inputs[0])


def named_eyes(name: str, pipe: "Pipeline") -> "Agreement":  # noqa: F821
    """Returns the OpenCLIP model MODEL/WEIGHTS, where the weights are one of OpenCLIP's tags or a safetensors file."""
    from minidiff.text import Agreement

    model, _, weights = name.partition("/")
    if not weights:
        raise InputError("MD-EVAL-002", f"eyes={name}: it must be MODEL/WEIGHTS, such as ViT-L-14/openai.")
    kind = "weights" if weights.endswith(".safetensors") else "pretrained"
    return Agreement(model, **{kind: weights}, device=pipe.device)


def headline(report: dict) -> str:
    """Returns what was scored, and how it was drawn."""
    best = f", the best of {report['candidates']} in OpenCLIP's eyes" if report["candidates"] > 1 else ""
    return (
        f"{report['run']}, {report['weights']} weights, {report['split']} split, {report['evaluations']:.0f} network "
        f"evaluations a picture, guidance {report['guidance']:g}{best}"
    )


def write(pictures: dict, folder: Path) -> None:
    """Writes pictures as PNG files, in place of those that were there, and says what else may judge them."""
    for name, some in pictures.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for old in (folder / name).glob("*.png"):
            old.unlink()
        for i, picture in enumerate(some):
            picture.save(folder / name / f"{i:05d}.png")
        print(f"written: {len(some)} pictures in {folder / name}")
    if "real" in pictures:
        size = min(1000, len(pictures["real"]))
        print(
            f"FID and KID: pip install -e '.[eval]' and fidelity --fid --kid --kid-subset-size {size} --input1 "
            f"{folder / 'drawn'} --input2 {folder / 'real'} (of fewer than 2048 pictures, FID depends on their number)"
        )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except MinidiffError as error:
        if "debug=true" in sys.argv:
            raise
        print(redact(str(error)), file=sys.stderr)
        sys.exit(error.exit_code)
