"""How good a model is: `python -m minidiff.evaluate run=runs/RUN`.

    scenes      the shapes world: does a picture show what its prompt claims? Decided by an exact parser
    pictures    every other world: how near do pictures come to real ones? Estimated, in the eyes of OpenCLIP

Both take a function `draw(prompts, seeds)` that makes pictures, and return a `Judgement`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

Draw = Callable[[Sequence[str], Sequence[int]], Tensor]  # prompts, seeds → pictures (n, 3, h, w) in [−1, 1]


class Judgement(NamedTuple):
    """What was found: numbers for eval.json, lines for the screen, a sheet, and all pictures ("drawn", "real")."""

    report: dict
    lines: list[str]
    sheet: "Image.Image"  # noqa: F821
    pictures: Mapping[str, "Sequence[Image.Image]"]  # noqa: F821
