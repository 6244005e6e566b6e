"""Whether a run hears relations: of prompts such as "a red star left of a blue ring", how many pictures show both
things as told, and in how many of these they also stand as told.

    python bench/relations.py run=data/shapes_run          the bundled run; a minute
    python bench/relations.py run=runs/a run=runs/b --prompts 300 --split test

A relation drawn by lot would hold in a third of the pictures: each of the four covers 120° of the directions. The
prompts are those of the category `position` of `minidiff.evaluate` that tell of two things.
"""

import argparse
from dataclasses import replace

import numpy as np
import pairs

from minidiff.pipeline import load, to_pil
from minidiff.shapes import example, parse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="run=FOLDER")
    parser.add_argument("--prompts", type=int, default=300, help="of which about three quarters tell of two things")
    parser.add_argument("--split", default="heldout")
    values = pairs.parse(parser)
    asked = [example(values.split, i, weights={"position": 1.0}) for i in range(values.prompts)]
    asked = [e for e in asked if e.claims[0].relation]
    print(f"{'':<28}{'asked':>8}{'both':>8}{'relation':>10}")
    for name in values.runs:
        pipe = load(name.removeprefix("run="), device="cpu")
        prompts = [e.captions[0] for e in asked]
        images = pipe.sample(prompts, range(len(asked)))
        told = [(e.claims[0], parse(np.asarray(to_pil(image)))) for e, image in zip(asked, images, strict=True)]
        both = sum(replace(claim, relation=None).holds(scene) for claim, scene in told)
        right = sum(claim.holds(scene) for claim, scene in told)
        print(f"{name:<28}{len(asked):>8}{both:>8}{right:>10}", flush=True)
        pairs.record(name, asked=len(asked), both_things=both, relation_too=right, split=values.split)


if __name__ == "__main__":
    main()
