"""Scores a run: python -m minidiff.evaluate run=runs/shapes

Draws prompts of the held-out split, reads the pictures back and prints how often they show what was asked. Writes
eval.json and eval.png into the run folder.

    run=runs/RUN       a run folder, one of its checkpoints, or a Stable Diffusion folder
    n=100              prompts per category
    split=heldout      compositions never trained together; or test, train
    weights=ema        or raw
    seed=0             of the first picture
    steps= guidance=   of sampling; the run's own if not given
    candidates=1       drawn for every picture; the one that OpenCLIP finds to fit best is judged
    device=auto        or cpu, cuda, mps
    debug=false        show tracebacks
"""

import json
import sys
from pathlib import Path

from minidiff.errors import InputError, MinidiffError, did_you_mean

OPTIONS = {
    "run": str,
    "n": int,
    "split": str,
    "weights": str,
    "seed": int,
    "steps": int,
    "guidance": float,
    "candidates": int,
    "device": str,
    "debug": str,
}
DEFAULTS = {
    "n": 100,
    "split": "heldout",
    "weights": "ema",
    "seed": 0,
    "steps": None,
    "guidance": None,
    "candidates": None,
    "device": "auto",
    "debug": "false",
}


def main(arguments: list[str]) -> None:
    if not arguments or any(x in ("-h", "--help") for x in arguments):
        print(__doc__)
        return
    options = read(arguments)

    import minidiff
    from minidiff.pipeline import find_checkpoint

    place = Path(options["run"])
    foreign = minidiff.interop.is_pipeline(place)
    checkpoint = place if foreign else find_checkpoint(place)
    pipe = minidiff.load(checkpoint, weights=options["weights"], device=options["device"])
    evaluate(pipe, options, place if foreign else checkpoint.parents[1])


def read(arguments: list[str]) -> dict:
    """Returns the options of `key=value` arguments; raises InputError (MD-EVAL-001, -002) in words."""
    options = dict(DEFAULTS)
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in OPTIONS:
            raise InputError(
                "MD-EVAL-001",
                f"Unknown option '{argument}'; the options are {', '.join(OPTIONS)}.{did_you_mean(key, list(OPTIONS))}",
            )
        try:
            options[key] = OPTIONS[key](value)
        except ValueError as error:
            kind = "a whole number" if OPTIONS[key] is int else "a number"
            raise InputError("MD-EVAL-002", f"{argument}: {key} must be {kind}.") from error
    if "run" not in options:
        raise InputError("MD-EVAL-003", "Say what to score: run=runs/RUN.")
    if options["n"] < 1:
        raise InputError("MD-EVAL-002", f"n={options['n']}: at least one prompt per category is needed.")
    return options


def evaluate(pipe, options: dict, folder: Path) -> dict:
    """Scores a pipeline on the shapes world, prints the table and writes eval.json and eval.png into `folder`."""
    from minidiff.evaluate.scenes import score_scenes, summary
    from minidiff.pipeline import words
    from minidiff.shapes import CATEGORIES, example

    prompts = [example("test", 0, 0, {name: 1.0}).captions[0] for name in CATEGORIES]
    foreign = sorted({word for prompt in prompts for word in pipe.unknown_words(prompt)})
    if len(foreign) > len({word for prompt in prompts for word in words(prompt)}) / 2:  # a small run may lack a few
        raise InputError(
            "MD-EVAL-004",
            f"{folder} was not trained on the shapes world (its captions never held {', '.join(foreign[:8])}), and "
            "only there can prompt-following be decided. Train on data=shapes to be scored.",
        )
    how = {name: options[name] for name in ("steps", "guidance", "candidates")}
    calls = NetworkCalls(pipe)
    verdicts = score_scenes(
        lambda prompts, seeds: pipe.sample(prompts, seeds, **how),
        n=options["n"],
        split=options["split"],
        seed=options["seed"],
    )
    report = summary(verdicts) | {"weights": options["weights"], "split": options["split"], "seed": options["seed"]}
    settings = pipe.sampling.but(**how)
    report |= {
        "run": pipe.name,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "candidates": settings.candidates,
        "evaluations": calls.per_image(len(verdicts)),
    }
    (folder / "eval.json").write_text(json.dumps(report, indent=1))
    sheet(verdicts).save(folder / "eval.png")
    print(table(report, options["n"]))
    print(f"written: {folder / 'eval.json'}, {folder / 'eval.png'}")
    return report


class NetworkCalls:
    """Counts how many images pass through a pipeline's network."""

    def __init__(self, pipe) -> None:
        self.images = 0
        pipe.denoiser.net.register_forward_pre_hook(self._count)

    def _count(self, _, inputs: tuple) -> None:
        self.images += len(inputs[0])

    def per_image(self, n: int) -> float:
        return self.images / n


def table(report: dict, n: int) -> str:
    """Returns the scores as text."""
    from minidiff.evaluate.scenes import interval

    lines = [f"{report['run']}, {report['weights']} weights, {report['split']} split, {n} prompts per category,"]
    how = f"{report['evaluations']:.0f} network evaluations a picture, guidance {report['guidance']:g}"
    how += f", the best of {report['candidates']} in OpenCLIP's eyes" if report["candidates"] > 1 else ""
    lines += [how, ""]
    lines += [f"{'category':<18} {'exact':>6}   {'95 % interval':<13}  {'rms':>6}"]
    for name, score in report["categories"].items():
        low, high = interval(score, n)
        lines.append(f"{name:<18} {score:6.3f}   {low:.3f} … {high:.3f}  {report['rms_categories'][name]:6.3f}")
    lines += [f"{'overall':<18} {report['overall']:6.3f}   {'':<13}  {report['rms']:6.3f}", ""]
    faults = ", ".join(f"{name} {k}×" for name, k in sorted(report["wrong"].items(), key=lambda x: -x[1]))
    return "\n".join([*lines, f"wrong in single objects: {faults or 'nothing'}"])


def sheet(verdicts: list):
    """Returns a sheet with the first pictures of every category, a row each; those that are wrong are framed."""
    from minidiff.evaluate.scenes import CATEGORIES
    from minidiff.viz import grid

    shown = [v for name in CATEGORIES for v in [v for v in verdicts if v.category == name][:8]]
    missed = [i for i, v in enumerate(shown) if not v.holds]
    return grid([v.image for v in shown], [v.prompt for v in shown], columns=8, framed=missed)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except MinidiffError as error:
        if "debug=true" in sys.argv:
            raise
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
