"""Pixels → scene, by analysis and synthesis: guess from simple measurements, draw the guess, keep what fits best.

The background is the median of the border. What differs from it falls into connected parts, one per thing. The area
and the centroid of a part give, for every shape, the centre and the radius that it would have to have. All shapes,
textures and colours are then drawn there and compared with the pixels; the best few are fitted more closely; the
closest wins.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from minidiff.shapes.render import MAIN_TONE, centres, coverage, render
from minidiff.shapes.scene import BACKGROUNDS, COLOURS, RADIUS, SHAPES, TEXTURES, Scene, Thing

CONTRAST = (
    0.5  # distance from the background, over RGB in [-1, 1], that makes a pixel part of a thing: 5 × noise of std 0.1
)
SMALLEST = 0.5  # area of a part, in squared radii of a small thing; what is smaller is a speck
CLOSER = 4  # hypotheses that are fitted at most,
RIVAL = 4.0  # if their error is within this factor of the least
FIRST_STEP = 0.05  # of the fit, in the units of the scene; halved `HALVINGS` times
HALVINGS = 4

# Shape → its area at radius 1, measured on its own signed distance function.
_FINE = np.meshgrid(centres(512), centres(512))
AREA = {shape: 4 * float(coverage(shape, *_FINE, 256.0).mean()) for shape in SHAPES}
TONES = np.array([COLOURS[name] for name in COLOURS], dtype=np.float32) / 127.5 - 1  # (colour, tone, rgb)
PLAIN = np.array([BACKGROUNDS[name] for name in BACKGROUNDS], dtype=np.float32) / 127.5 - 1


def parse(image: UInt8[np.ndarray, "px px 3"]) -> Scene:
    """Reads the scene back from a square RGB picture of at least 16×16 pixels. Whatever the picture, it returns the
    closest.
    """
    pixels = image.astype(np.float32) / 127.5 - 1
    px = len(pixels)
    ring = max(1, px // 32)
    border = np.concatenate(
        [pixels[:ring], pixels[-ring:], pixels[:, :ring].swapaxes(0, 1), pixels[:, -ring:].swapaxes(0, 1)], 1
    )
    seen = np.median(border.reshape(-1, 3), axis=0)
    nearest = int(np.linalg.norm(PLAIN - seen, axis=1).argmin())
    foreground = np.linalg.norm(pixels - seen, axis=2) > CONTRAST
    smallest = SMALLEST * (RADIUS["small"] * px / 2) ** 2
    parts = [part for part in _parts(foreground) if part.sum() >= smallest]
    free = foreground & ~np.any(parts, axis=0) if parts else foreground
    things = tuple(_thing(np.where(free[..., None], seen, pixels), part, parts, seen) for part in parts)
    return Scene(list(BACKGROUNDS)[nearest], things)


def distance(image: UInt8[np.ndarray, "px px 3"], scene: Scene) -> float:
    """Returns the root mean square difference, with colours in [-1, 1], between a picture and a scene drawn exactly."""
    difference = image.astype(np.float32) - render(scene, len(image))
    return float(np.sqrt(np.mean((difference / 127.5) ** 2)))


def _parts(mask: Bool[np.ndarray, "px px"]) -> list[Bool[np.ndarray, "px px"]]:
    """Returns the connected parts of a mask; pixels that touch at a corner are connected."""
    width = mask.shape[1] + 2  # with a margin, a step aside never reaches the next row
    around = [dy * width + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    parts, inside = [], np.flatnonzero(np.pad(mask, 1)).tolist()
    left = set(inside)
    for start in inside:
        if start not in left:
            continue
        left.remove(start)
        reached = [start]
        for pixel in reached:  # grows as it goes
            near = left.intersection([pixel + step for step in around])
            left -= near
            reached += near
        ys, xs = np.divmod(reached, width)
        part = np.zeros_like(mask)
        part[ys - 1, xs - 1] = True
        parts.append(part)
    return parts


def _thing(
    pixels: Float[np.ndarray, "px px 3"],
    part: Bool[np.ndarray, "px px"],
    parts: list[Bool[np.ndarray, "px px"]],
    background: Float[np.ndarray, "3"],
) -> Thing:
    """Returns the thing whose drawing comes nearest to one part of a picture."""
    px = len(pixels)
    at = centres(px)
    ys, xs = np.nonzero(part)
    others = np.any([p for p in parts if p is not part], axis=0) if len(parts) > 1 else np.zeros_like(part)
    rows = slice(max(0, ys.min() - 3), ys.max() + 4)
    columns = slice(max(0, xs.min() - 3), xs.max() + 4)
    target = pixels[rows, columns] - background
    target[others[rows, columns]] = 0
    window = _Window(target, background, at[columns], at[rows], px)

    x, y, area = at[xs].mean(), at[ys].mean(), len(xs) * (2 / px) ** 2
    guesses = []
    for shape in SHAPES:
        r = np.sqrt(area / AREA[shape])
        spots = np.array([[x, y, r * stretch] for stretch in (0.85, 0.92, 1.0)], dtype=np.float32)
        for texture, error in zip(TEXTURES, window.errors(shape, TEXTURES, spots)[0], strict=True):
            best = int(error.argmin())
            guesses.append((float(error[best]), shape, texture, spots[best]))
    guesses.sort(key=lambda guess: guess[0])
    fitted = [
        window.fit(shape, texture, spot)
        for error, shape, texture, spot in guesses[:CLOSER]
        if error <= RIVAL * guesses[0][0]
    ]
    _, shape, texture, colour, (x, y, r) = min(fitted, key=lambda fit: fit[0])
    size = "large" if r > (RADIUS["small"] + RADIUS["large"]) / 2 else "small"
    return Thing(shape, list(COLOURS)[colour], size, texture, float(x), float(y), float(r))


class _Window:
    """The pixels around one part, less the background, and how well a drawing explains them."""

    def __init__(
        self,
        target: Float[np.ndarray, "h w 3"],
        background: Float[np.ndarray, "3"],
        xs: Float[np.ndarray, " w"],
        ys: Float[np.ndarray, " h"],
        px: int,
    ) -> None:
        self.target, self.xs, self.ys, self.px = target.reshape(-1, 3), xs, ys, px
        main, second = np.moveaxis(TONES - background, 1, 0)  # (colour, rgb) each
        self.tones = np.concatenate([main, second], 1).T  # (tone·rgb, colour)
        across = (main * second).sum(1)
        self.products = np.stack([(main**2).sum(1), across, across, (second**2).sum(1)])  # (tone·tone, colour)
        self.energy = float((self.target**2).sum())

    def errors(
        self, shape: str, textures: Sequence[str], spots: Float[np.ndarray, "n 3"]
    ) -> tuple[Float[np.ndarray, "texture n"], Int[np.ndarray, "texture n"]]:
        """Returns, for things with these textures at `spots` (x, y, r), the squared error of the best colour, and that
        colour's number.

        A drawing is main·share + second·rest, so its error is a quadratic form in the tones and needs no picture per
        colour.
        """
        x, y, r = (spots[:, i, None, None] for i in range(3))
        u, v, scale = (self.xs[None, None, :] - x) / r, (self.ys[None, :, None] - y) / r, r * self.px / 2
        share = np.stack([MAIN_TONE[texture](u, v, scale) for texture in textures])
        drawn = coverage(shape, u, v, scale)[:, None] * np.stack([share, 1 - share], 2)  # (texture, n, tone, h, w)
        drawn = drawn.reshape(*drawn.shape[:3], -1)
        explained, overlaps = drawn @ self.target, drawn @ drawn.swapaxes(2, 3)
        explained, overlaps = (a.reshape(*a.shape[:2], -1) for a in (explained, overlaps))
        error = self.energy - 2 * explained @ self.tones + overlaps @ self.products
        return error.min(2), error.argmin(2)

    def fit(self, shape: str, texture: str, spot: Float[np.ndarray, "3"]) -> tuple:
        """Moves x, y and r to where the error is least, by steps that halve; returns (error, shape, texture, colour,
        spot).
        """
        moves = np.concatenate([np.zeros((1, 3)), np.eye(3), -np.eye(3)]).astype(np.float32)
        step, halvings, least = FIRST_STEP, 0, math.inf
        while True:
            spots = spot + step * moves
            spots[:, 2] = spots[:, 2].clip(0.05)
            (error,), (colour,) = self.errors(shape, [texture], spots)
            best = int(error.argmin())
            if error[best] >= least:  # rounding alone may make each of two spots look better from the other
                best = 0
            least = min(least, float(error[best]))
            spot = spots[best]
            if best == 0:
                halvings += 1
                step /= 2
                if halvings > HALVINGS:
                    return float(error[0]), shape, texture, int(colour[0]), spot
