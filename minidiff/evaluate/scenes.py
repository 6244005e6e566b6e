"""Prompt-following on the shapes world, decided: draw each prompt, read the picture back, compare with what was
claimed.

The six categories are GenEval's (Ghosh et al. 2023): single_object, two_objects, counting, colour, position and
attribute_binding. A picture counts when everything that its prompt names is right at once, and nothing is there that
should not be.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minidiff.evaluate import Draw, Judgement
from minidiff.pipeline import to_pil
from minidiff.shapes import CATEGORIES, Claim, Scene, distance, example, parse
from minidiff.viz import COLUMNS, grid

ATTRIBUTES = ("shape", "colour", "size", "texture", "place")


@dataclass(frozen=True)
class Verdict:
    """What one picture was asked to show and what it shows."""

    category: str
    prompt: str
    image: "Image.Image"  # noqa: F821
    holds: bool
    rms: float  # distance to the nearest exact scene, colours in [−1, 1]
    wrong: tuple[str, ...]  # what is wrong, for pictures of one thing


def judge_scenes(draw: Draw, *, n: int, split: str = "heldout", seed: int = 0) -> Judgement:
    """Draws `n` prompts of every category and reads the pictures back."""
    verdicts = score_scenes(draw, n=n, split=split, seed=seed)
    report = summary(verdicts)
    return Judgement(report, table(report, n), sheet(verdicts), {"drawn": [v.image for v in verdicts]})


def score_scenes(draw: Draw, *, n: int, split: str = "heldout", seed: int = 0) -> list[Verdict]:
    """Draws `n` prompts of every category and decides each picture."""
    jobs = [(name, example(split, i, 0, {name: 1.0})) for name in CATEGORIES for i in range(n)]
    seeds = [seed + i for i in range(len(jobs))]
    images = draw([task.captions[0] for _, task in jobs], seeds)
    verdicts = []
    for (category, task), image in zip(jobs, images, strict=True):
        picture = to_pil(image)
        pixels = np.asarray(picture)
        scene, claim = parse(pixels), task.claims[0]
        verdicts.append(
            Verdict(
                category, task.captions[0], picture, claim.holds(scene), distance(pixels, scene), wrong(claim, scene)
            )
        )
    return verdicts


def wrong(claim: Claim, scene: Scene) -> tuple[str, ...]:
    """Returns which named properties of a single thing the scene gets wrong; for other claims, only a wrong number of
    things.
    """
    if len(scene.things) != len(claim.things) * claim.count:
        return ("number",)
    if len(scene.things) != 1:
        return ()
    said, seen = claim.things[0], scene.things[0]
    names = [a for a in ATTRIBUTES if getattr(said, a) not in (None, getattr(seen, a))]
    return (*names, *(["background"] if claim.background not in (None, scene.background) else []))


def summary(verdicts: Sequence[Verdict]) -> dict:
    """Returns the scores (0 … 1) of the six categories, their mean, and the mean distance to exact scenes."""
    groups = {name: [v for v in verdicts if v.category == name] for name in CATEGORIES}
    categories = {name: float(np.mean([v.holds for v in group])) for name, group in groups.items()}
    return {
        "overall": float(np.mean(list(categories.values()))),
        "categories": categories,
        "rms": float(np.mean([v.rms for v in verdicts])),
        "rms_categories": {name: float(np.mean([v.rms for v in group])) for name, group in groups.items()},
        "wrong": dict(Counter(name for v in groups["single_object"] for name in v.wrong)),
        "n": len(verdicts),
    }


def interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Returns the 95 % interval of a share measured on `n` cases (Wilson 1927)."""
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def table(report: dict, n: int) -> list[str]:
    """Returns the scores as lines of text."""
    lines = [f"{n} prompts per category", "", f"{'category':<18} {'exact':>6}   {'95 % interval':<13}  {'rms':>6}"]
    for name, score in report["categories"].items():
        low, high = interval(score, n)
        lines.append(f"{name:<18} {score:6.3f}   {low:.3f} … {high:.3f}  {report['rms_categories'][name]:6.3f}")
    lines += [f"{'overall':<18} {report['overall']:6.3f}   {'':<13}  {report['rms']:6.3f}", ""]
    faults = ", ".join(f"{name} {k}×" for name, k in sorted(report["wrong"].items(), key=lambda x: -x[1]))
    return [*lines, f"wrong in single objects: {faults or 'nothing'}"]


def sheet(verdicts: Sequence[Verdict]) -> "Image.Image":  # noqa: F821
    """Returns a sheet with the first pictures of every category, a row each; those that are wrong are framed."""
    shown = [v for name in CATEGORIES for v in [v for v in verdicts if v.category == name][:COLUMNS]]
    missed = [i for i, v in enumerate(shown) if not v.holds]
    return grid([v.image for v in shown], [v.prompt for v in shown], COLUMNS, framed=missed)
