"""Whether edits do what they should and leave the rest, decided by the parser on scenes that are known exactly.

    python bench/editing.py run=data/shapes_run              the bundled run; three minutes
    python bench/editing.py run=runs/a --pictures 300

Recolouring: a picture of one thing is noised by some strength and drawn for its own caption with another colour. How
often is the colour the new one, and how often is the thing otherwise what it was (shape, size, texture), where it was?
At strength 1 this is text to image, which is told nothing of the place.

Adding: of two things of a held-out scene one is given; the half of the picture without it is drawn anew, for the
scene's caption. How often does the picture show what the caption claims, and how often without anything given?
"""

import argparse
from dataclasses import replace

import numpy as np
import pairs
from PIL import Image

from minidiff.pipeline import Pipeline, load
from minidiff.shapes import CATEGORIES, COLOURS, Scene, caption, example, parse, render
from minidiff.shapes.claim import Claim, Description

STRENGTHS = (0.25, 0.5, 0.75, 1.0)
NEAR = 0.15  # of the picture's half width: a thing whose centre moved less is where it was


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="run=FOLDER")
    parser.add_argument("--pictures", type=int, default=100)
    values = pairs.parse(parser)
    for name in values.runs:
        pipe = load(name.removeprefix("run="), device="cpu")
        print(f"{name}\n{'recolouring':<20}{'colour':>10}{'the rest':>10}{'place':>10}{'all':>10}")
        for strength in STRENGTHS:
            found = np.mean([recoloured(pipe, i, strength) for i in range(values.pictures)], axis=0)
            print(f"{f'strength {strength}':<20}" + "".join(f"{share:>10.2f}" for share in found), flush=True)
            pairs.record(f"{name} recolouring", strength=strength, colour=found[0], rest=found[1], place=found[2])
        added = [shown for i in range(4 * values.pictures) if (shown := both_shown(pipe, i))][: values.pictures]
        given, alone = np.mean(added, axis=0)
        print(f"adding a second thing: {given:.2f} of {len(added)}, text to image {alone:.2f}\n")
        pairs.record(f"{name} adding", asked=len(added), inpainted=given, text_to_image=alone)


def picture(scene: Scene, pipe: Pipeline) -> Image.Image:
    return Image.fromarray(render(scene, pipe.space.image_size))


def recoloured(pipe: Pipeline, i: int, strength: float) -> tuple[bool, bool, bool, bool]:
    """Returns whether colour, the rest and place are as they should be, and all of them."""
    scene = example("test", i, weights={"single_object": 1.0}).scene
    (thing,) = scene.things
    new = list(COLOURS)[(list(COLOURS).index(thing.colour) + 1 + i % (len(COLOURS) - 1)) % len(COLOURS)]
    told = Description(shape=thing.shape, colour=new, size=thing.size, texture=thing.texture)
    prompt = caption(Claim(category=CATEGORIES[0], things=(told,), background=scene.background), 0)
    original = pipe.original(picture(scene, pipe), strength=strength)
    seen = parse(np.asarray(pipe(prompt, seed=i, original=original)[0])).things
    if len(seen) != 1:
        return False, False, False, False
    colour, rest = seen[0].colour == new, replace(told, colour=None).fits(seen[0])
    place = abs(seen[0].x - thing.x) < NEAR and abs(seen[0].y - thing.y) < NEAR
    return colour, rest, place, colour and rest and place


def both_shown(pipe: Pipeline, i: int) -> tuple[bool, bool] | None:
    """Returns whether the second thing was added as told, and whether both were drawn as told where nothing was given;
    None for a scene whose two things cannot be parted by the middle line.
    """
    e = example("heldout", i, weights={"two_objects": 0.5, "position": 0.5})
    claim = e.claims[0]
    first = next((t for t in e.scene.things if abs(t.x) > t.r and claim.things[0].fits(t)), None)
    others = [t for t in e.scene.things if t is not first]
    if first is None or len(claim.things) != 2 or any(t.x * first.x > 0 or abs(t.x) < t.r for t in others):
        return None
    size = pipe.space.image_size
    mask = Image.new("L", (size, size), 0)
    mask.paste(255, (size // 2, 0, size, size) if first.x < 0 else (0, 0, size // 2, size))
    given = pipe.original(picture(replace(e.scene, things=(first,)), pipe), mask=mask)
    drawn = (pipe(e.captions[0], seed=i, original=original)[0] for original in (given, None))
    return tuple(claim.holds(parse(np.asarray(image))) for image in drawn)


if __name__ == "__main__":
    main()
