"""Examples: a scene, what may be claimed of it, and captions, as a pure function of (seed, split, index).

`train` and `test` differ by their random stream only. `heldout` scenes hold a composition that neither of them ever
shows: a colour with a shape, or two shapes in one picture, each well known on its own.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from minidiff.errors import InputError, did_you_mean
from minidiff.shapes.claim import CATEGORIES, RELATIONS, WORDINGS, Claim, Description, caption, related
from minidiff.shapes.scene import BACKGROUNDS, COLOURS, OFFSET, RADIUS, SHAPES, Scene, Thing

SPLITS = ("train", "test", "heldout")
HELDOUT_COLOURED = {
    ("red", "diamond"),
    ("orange", "star"),
    ("yellow", "cross"),
    ("green", "circle"),
    ("cyan", "square"),
    ("blue", "triangle"),
    ("purple", "ring"),
    ("pink", "star"),
}
HELDOUT_TOGETHER = {frozenset({"circle", "cross"}), frozenset({"square", "star"}), frozenset({"ring", "triangle"})}

WEIGHTS = {
    "single_object": 0.4,
    "two_objects": 0.12,
    "counting": 0.12,
    "colour": 0.12,
    "position": 0.12,
    "attribute_binding": 0.12,
}
CAPTIONS = 6
FULL = 0.7  # share of captions, after the prompt, that tell all there is to see
LINKS = ("relation", "place", "none")  # two things are told apart by a relation, by their places, or not at all
GAP = 0.14  # between the circles around two things: more than two pixels at 32 px
JITTER = 0.06  # of a centre, either way
STRETCH = 0.08  # of a radius, either way

Kind = tuple[str, str]  # colour, shape


@dataclass(frozen=True)
class Example:
    """A scene with true claims about it, `captions[i]` wording `claims[i]`. The first is its category's test prompt."""

    category: str
    scene: Scene
    claims: tuple[Claim, ...]
    captions: tuple[str, ...]


def example(
    split: str, index: int, seed: int = 0, weights: Mapping[str, float] = WEIGHTS, siblings: int = 1
) -> Example:
    """Makes example `index` of a split. `weights` maps categories to their share; categories left out do not occur.

    Each `siblings` examples in succession share category, background, colours and, in half of the families, shape. They
    differ in the rest: texture, size, place, number, and which of two shapes has which colour. Families of the category
    `position` are twins: every second scene is the one before with all things at opposite places, so that the relation
    between them, which all captions tell, is true of one and false of the other.

    Raises InputError (MD-SHAPES-001, MD-SHAPES-002) for an unknown split or category.
    """
    if split not in SPLITS:
        known = ", ".join(SPLITS)
        raise InputError(
            "MD-SHAPES-001",
            f"The shapes data has no split '{split}'; its splits are {known}.{did_you_mean(split, list(SPLITS))}",
        )
    for name in weights:
        if name not in CATEGORIES:
            known = ", ".join(CATEGORIES)
            raise InputError(
                "MD-SHAPES-002",
                f"The weights of the shapes data name the category '{name}', which does not exist; "
                f"the categories are {known}.{did_you_mean(name, list(CATEGORIES))}",
            )
    rng = family = np.random.default_rng((seed, SPLITS.index(split), index))
    if siblings > 1:
        family = np.random.default_rng((seed, SPLITS.index(split), index // siblings, siblings))
    category = _pick(family, weights)
    twins = siblings > 1 and category == "position"
    if twins and index % siblings % 2:
        first = np.random.default_rng((seed, SPLITS.index(split), index - 1))
        scene = _at_opposite_places(_scene(first, family, category, heldout=split == "heldout"))
    else:
        scene = _scene(rng, family, category, heldout=split == "heldout")
    claims = [_prompt(rng, category, scene)]
    for _ in range(CAPTIONS - 1):
        detail = 1.0 if rng.random() < FULL else 0.5
        claims.append(_claim(rng, category, scene, detail, links=("relation",) if twins else LINKS))
    captions = tuple(caption(claim, int(rng.integers(WORDINGS))) for claim in claims)
    return Example(category, scene, tuple(claims), captions)


def _pick(rng: np.random.Generator, weights: Mapping[str, float]) -> str:
    """Draws a key in proportion to its weight."""
    edges = np.cumsum(list(weights.values()))
    return list(weights)[int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))]


def _any(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]


# ---------------------------------------------------------------------------------------------------- scenes


def novelty(kinds: list[Kind]) -> tuple[int, int]:
    """Counts the held-out compositions among the (colour, shape) kinds of a scene: colour with shape, and shape with
    shape.
    """
    coloured = sum(kind in HELDOUT_COLOURED for kind in kinds)
    together = sum(frozenset({a[1], b[1]}) in HELDOUT_TOGETHER for a, b in pairwise(kinds))
    return coloured, together


def _kinds(rng: np.random.Generator, number: int, wanted: tuple[int, int], colours: tuple[str, ...]) -> list[Kind]:
    """Draws the colours and shapes of a scene with `number` kinds until they hold exactly the novelty that is
    wanted.
    """
    while True:
        kinds = [(_any(rng, colours), _any(rng, SHAPES)) for _ in range(number)]
        alike = number == 2 and (kinds[0][0] == kinds[1][0] or kinds[0][1] == kinds[1][1])
        if not alike and novelty(kinds) == wanted:
            return kinds


def _related_kinds(rng: np.random.Generator, kinds: list[Kind], alike: bool) -> list[Kind]:
    """Draws a sibling of some kinds: one gets a shape of its own unless `alike`, two may exchange their colours."""
    if len(kinds) == 1:
        return kinds if alike else _kinds(rng, 1, novelty(kinds), (kinds[0][0],))
    (one, shape), (other, other_shape) = kinds
    exchanged = [(other, shape), (one, other_shape)]
    return exchanged if novelty(exchanged) == novelty(kinds) and rng.random() < 0.5 else kinds


def _scene(rng: np.random.Generator, family: np.random.Generator, category: str, heldout: bool) -> Scene:
    background = _any(family, tuple(BACKGROUNDS))
    two = category in ("two_objects", "attribute_binding") or (category == "position" and family.random() < 0.75)
    wanted = (0, 0)
    if heldout:
        wanted = (0, 1) if two and category != "attribute_binding" else (1, 0)
    kinds = _kinds(family, 2 if two else 1, wanted, tuple(COLOURS))
    kinds = _related_kinds(rng, kinds, alike=family.random() < 0.5)
    textures = [_any(rng, ("solid", "solid", "striped", "checkered")) for _ in kinds]
    sizes = [_any(rng, ("small", "large"))]
    if two:  # two large things fit in two opposite corners only
        sizes = [("small", "small"), ("small", "large"), ("large", "small")][rng.integers(3)]
    if category == "counting":
        number = int(rng.integers(2, 5))
        kinds, textures, sizes = kinds * number, textures * number, ["small"] * number
    things = tuple(
        Thing(shape, colour, size, texture, x, y, r)
        for (colour, shape), texture, size, (x, y, r) in zip(kinds, textures, sizes, _layout(rng, sizes), strict=True)
    )
    return Scene(background, things)


def _at_opposite_places(scene: Scene) -> Scene:
    return replace(scene, things=tuple(replace(thing, x=-thing.x, y=-thing.y) for thing in scene.things))


def _layout(rng: np.random.Generator, sizes: list[str] | tuple[str, ...]) -> list[tuple[float, float, float]]:
    """Throws things (x, y, r) into cells of the grid until none is nearer than `GAP` to another."""
    while True:
        spots: list[tuple[float, float, float]] = []
        for size in sizes:
            column, row = rng.integers(-1, 2, 2).tolist()
            spots.append(throw(rng, size, column, row))
            if any(math.dist(spots[-1][:2], s[:2]) < spots[-1][2] + s[2] + GAP for s in spots[:-1]):
                break
        else:
            return spots


def throw(rng: np.random.Generator, size: str, column: int, row: int) -> tuple[float, float, float]:
    """Returns (x, y, r) of a thing thrown into a cell of the grid, whose columns and rows are −1, 0 and 1."""
    dx, dy, stretch = rng.uniform(-1, 1, 3)
    x, y = OFFSET[size] * column + JITTER * dx, OFFSET[size] * row + JITTER * dy
    return float(x), float(y), float(RADIUS[size] * (1 + STRETCH * stretch))


# ---------------------------------------------------------------------------------------------------- claims


def _described(rng: np.random.Generator, thing: Thing, names: set[str]) -> Description:
    # A plain filling is the usual case and is seldom worth a word.
    if thing.texture == "solid" and rng.random() < 0.9:
        names = names - {"texture"}
    return Description(**{name: getattr(thing, name) for name in names})


def _about(
    rng: np.random.Generator, category: str, scene: Scene, names: set[str], background: str | None, related_by: bool
) -> Claim:
    """Claims the named attributes of a scene's things, told in random order, with a true relation if `related_by`."""
    if category == "counting":
        thing = _described(rng, scene.things[0], names - {"place"})
        return Claim(category=category, things=(thing,), count=len(scene.things), background=background)
    things = [scene.things[i] for i in rng.permutation(len(scene.things))]
    relation = None
    if related_by and len(things) == 2:
        relation = _any(rng, tuple(name for name in RELATIONS if related(things[0], name, things[1])))
        names = names - {"place"}
    described = tuple(_described(rng, thing, names) for thing in things)
    return Claim(category=category, things=described, relation=relation, background=background)


def _prompt(rng: np.random.Generator, category: str, scene: Scene) -> Claim:
    """The prompt that tests a category: it names what the category is about, and little else."""
    background = None
    names = {"shape"} if category == "two_objects" else {"shape", "colour"}
    if category == "single_object":
        names |= {name for name in ("size", "texture", "place") if rng.random() < 0.5}
        background = scene.background if rng.random() < 0.5 else None
    if category == "position" and len(scene.things) == 1:
        names |= {"place"}
    return _about(rng, category, scene, names, background, related_by=category == "position")


def _claim(
    rng: np.random.Generator, category: str, scene: Scene, detail: float, links: tuple[str, ...] = LINKS
) -> Claim:
    """Names the shapes, and everything else with probability `detail`; two things are linked by one of `links`."""
    names = {"shape"} | {name for name in ("size", "texture", "colour", "place") if rng.random() < detail}
    link = _any(rng, links)
    if len(scene.things) > 1 and link == "none":
        names -= {"place"}
    background = scene.background if rng.random() < detail else None
    return _about(rng, category, scene, names, background, related_by=link == "relation")
