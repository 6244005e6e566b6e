"""Which words the tiny OpenCLIP model hears: how often a picture fits its own caption better than any with one thing
changed.

    python bench/words.py                                     the bundled model, held-out compositions; a minute
    python bench/words.py --weights runs/clip.safetensors --noise 0.05

One thing alone: its caption tells shape and colour, and with `told all` also size, texture, place and background; the
attribute in question runs through all its values. Two things: their colours are exchanged ("a red star and a blue ring"
→ "a blue star and a red ring"), or their order around a relation ("… left of …"), which chance gets right half of the
time.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pairs
import torch
from denoising import pictures

from minidiff.shapes import COLOURS, PLACES, SHAPES, SIZES, TEXTURES, Claim, Description, Scene, caption, example
from minidiff.text import Agreement, tiny

VALUES = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": SIZES,
    "texture": TEXTURES,
    "place": PLACES,
}


def of_one_thing(scene: Scene, name: str, *, told_all: bool) -> tuple[list[str], int]:
    """Returns captions that differ in one attribute of the only thing, and which of them is true."""
    thing = scene.things[0]
    named = {"shape", "colour", name} | (VALUES.keys() if told_all else set())
    true = Description(**{n: getattr(thing, n) for n in named})
    background = scene.background if told_all else None
    told = [replace(true, **{name: value}) for value in VALUES[name]]
    claims = [Claim(category="single_object", things=(thing,), background=background) for thing in told]
    return [caption(claim, 0) for claim in claims], VALUES[name].index(getattr(thing, name))


def colours_exchanged(claim: Claim) -> Claim:
    one, two = claim.things
    return replace(claim, things=(replace(one, colour=two.colour), replace(two, colour=one.colour)))


def order_exchanged(claim: Claim) -> Claim:
    return replace(claim, things=claim.things[::-1])


def share_right(
    agreement: Agreement, scenes: Sequence[Scene], asked: Sequence[tuple[list[str], int]], sd: float
) -> float:
    """Returns how often the true one of (captions, true) fits its scene's picture, with noise on it, best."""
    right = []
    for i, (picture, (captions, true)) in enumerate(zip(pictures(scenes, px=32), asked, strict=True)):
        picture = picture + sd * torch.randn(picture.shape, generator=torch.Generator().manual_seed(i))
        fit = agreement(picture.expand(len(captions), -1, -1, -1), captions)
        right.append(int(fit.argmax()) == true)
    return float(np.mean(right))


def of_two_things(category: str, change: Callable[[Claim], Claim], split: str, n: int) -> tuple[list[Scene], list]:
    """Returns scenes of two things, and of each the prompt's caption and a false one."""
    examples = [e for e in (example(split, i, weights={category: 1.0}) for i in range(n)) if len(e.scene.things) == 2]
    claims = [e.claims[0] for e in examples]
    return [e.scene for e in examples], [([caption(c, 0), caption(change(c), 0)], 0) for c in claims]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="a safetensors file; without: the bundled one")
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--split", default="heldout")
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation of noise on the pictures")
    values = pairs.parse(parser)
    agreement = tiny(values.weights).agreement()
    alone = [example(values.split, i, weights={"single_object": 1.0}).scene for i in range(values.scenes)]
    for name in VALUES:
        for told_all in (False, True):
            asked = [of_one_thing(scene, name, told_all=told_all) for scene in alone]
            show(f"{name}{', told all' if told_all else ''}", share_right(agreement, alone, asked, values.noise))
    changes = {
        "colours of two exchanged": ("attribute_binding", colours_exchanged),
        "order around a relation": ("position", order_exchanged),
    }
    for name, (category, change) in changes.items():
        scenes, asked = of_two_things(category, change, values.split, values.scenes)
        show(name, share_right(agreement, scenes, asked, values.noise))


def show(name: str, share: float) -> None:
    print(f"{name:<28} {share:.3f}", flush=True)
    pairs.record(name, right=share)


if __name__ == "__main__":
    main()
