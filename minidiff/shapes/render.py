"""Scenes → pixels, through signed distance functions.

A shape is a function d(u, v), in units of its radius, that is negative inside and grows by 1 per unit across the
boundary. A pixel whose centre lies d pixels outside is covered by `clip(1/2 - d, 0, 1)`: exact anti-aliasing along
straight edges that follow the pixel grid, close to it elsewhere. Nothing depends on the resolution but the width of
that ramp, so a scene keeps its composition at any. (Quilez, "2D distance functions".)
"""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8

from minidiff.shapes.scene import BACKGROUNDS, COLOURS, Scene, Thing

Grid = Float[np.ndarray, "..."]  # u and v may be a row and a column that broadcast against each other
Scale = Float[np.ndarray, "..."] | float  # a radius in pixels; broadcasts against a grid

RING_HOLE = 0.5  # radius of the hole
STAR_NOTCH = 0.46  # radius of the five inner corners
CROSS_ARM = 0.33  # half the width of an arm
STRIPE_PERIOD = 0.8
CHECK_CELL = 0.45


def _circle(u: Grid, v: Grid) -> Grid:
    return np.hypot(u, v) - 1


def _ring(u: Grid, v: Grid) -> Grid:
    return np.abs(np.hypot(u, v) - (1 + RING_HOLE) / 2) - (1 - RING_HOLE) / 2


def _square(u: Grid, v: Grid) -> Grid:
    return np.maximum(np.abs(u), np.abs(v)) - math.sqrt(0.5)


def _diamond(u: Grid, v: Grid) -> Grid:
    return (np.abs(u) + np.abs(v) - 1) * math.sqrt(0.5)


def _triangle(u: Grid, v: Grid) -> Grid:
    return np.maximum(v, np.abs(u) * math.sqrt(0.75) - v / 2) - 0.5


def _star(u: Grid, v: Grid) -> Grid:
    """Folds the plane onto the tenth of the star between a tip, at (1, 0), and a notch; there the edge is one line."""
    tenth = math.pi / 5
    angle = np.abs((np.arctan2(u, -v) + tenth) % (2 * tenth) - tenth)
    notch_u, notch_v = STAR_NOTCH * math.cos(tenth), STAR_NOTCH * math.sin(tenth)
    length = math.hypot(1 - notch_u, notch_v)
    rho = np.hypot(u, v)
    return ((rho * np.cos(angle) - 1) * notch_v + rho * np.sin(angle) * (1 - notch_u)) / length


def _cross(u: Grid, v: Grid) -> Grid:
    u, v = np.abs(u), np.abs(v)
    reach = math.sqrt(1 - CROSS_ARM**2)
    return np.maximum(np.minimum(u, v) - CROSS_ARM, np.maximum(u, v) - reach)


DISTANCE: dict[str, Callable[[Grid, Grid], Grid]] = {
    "circle": _circle,
    "ring": _ring,
    "square": _square,
    "diamond": _diamond,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
}


def _wave(s: Grid, period: float) -> Grid:
    """Signed distance to the nearest edge of a square wave whose positive half is centred on s = 0."""
    return period / 4 - np.abs((s + period / 2) % period - period / 2)


def _solid(u: Grid, v: Grid, scale: Scale) -> Grid:
    return np.ones_like(u + v)


def _striped(u: Grid, v: Grid, scale: Scale) -> Grid:
    return np.clip(0.5 + scale * _wave((u + v) * math.sqrt(0.5), STRIPE_PERIOD), 0, 1)


def _checkered(u: Grid, v: Grid, scale: Scale) -> Grid:
    columns = np.clip(2 * scale * _wave(u - CHECK_CELL / 2, 2 * CHECK_CELL), -1, 1)
    rows = np.clip(2 * scale * _wave(v - CHECK_CELL / 2, 2 * CHECK_CELL), -1, 1)
    return (1 + columns * rows) / 2


# Texture → the share of the main tone at (u, v), where `scale` is the thing's radius in pixels.
MAIN_TONE: dict[str, Callable[[Grid, Grid, Scale], Grid]] = {
    "solid": _solid,
    "striped": _striped,
    "checkered": _checkered,
}


def coverage(shape: str, u: Grid, v: Grid, scale: Scale) -> Grid:
    """The share, in [0, 1], of each pixel that a shape covers; `u, v` are in radii and `scale` is the radius in
    pixels.
    """
    return np.clip(0.5 - scale * DISTANCE[shape](u, v), 0, 1)


def centres(px: int) -> Float[np.ndarray, " px"]:
    """The coordinates in (-1, 1) of the pixel centres along one side of a picture."""
    return (np.arange(px, dtype=np.float32) + 0.5) * (2 / px) - 1


def _paint(canvas: Float[np.ndarray, "px px 3"], thing: Thing) -> None:
    px = len(canvas)
    at, reach = centres(px), thing.r + 2 / px
    columns = slice(*np.searchsorted(at, (thing.x - reach, thing.x + reach)))
    rows = slice(*np.searchsorted(at, (thing.y - reach, thing.y + reach)))
    u, v = np.meshgrid((at[columns] - thing.x) / thing.r, (at[rows] - thing.y) / thing.r)
    scale = thing.r * px / 2
    main, second = np.array(COLOURS[thing.colour], dtype=np.float32)
    tone = second + MAIN_TONE[thing.texture](u, v, scale)[..., None] * (main - second)
    cover = coverage(thing.shape, u, v, scale)[..., None]
    canvas[rows, columns] += cover * (tone - canvas[rows, columns])


def render(scene: Scene, px: int) -> UInt8[np.ndarray, "px px 3"]:
    """Draws a scene as an RGB picture of `px`×`px` pixels."""
    canvas = np.empty((px, px, 3), dtype=np.float32)
    canvas[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        _paint(canvas, thing)
    return np.rint(canvas).astype(np.uint8)
