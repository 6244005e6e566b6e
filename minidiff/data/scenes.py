"""Scenes of the shapes world → rows with a PNG and its captions."""

import io
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path


def draw_scenes(
    split: str,
    parts: list[tuple[int, int]],
    image_size: int,
    seed: int,
    weights: dict[str, float],
    siblings: int,
    code: str,
) -> Iterator[dict]:
    """Yields the rows of a split from the first of each part to before its last: `datasets` shares parts out among
    processes. `code` only makes it draw anew when the drawing changed.
    """
    from PIL import Image

    from minidiff.shapes import example, render

    for i in chain.from_iterable(range(*part) for part in parts):
        scene = example(split, i, seed, weights, siblings)
        png = io.BytesIO()
        Image.fromarray(render(scene.scene, image_size)).save(png, "PNG", compress_level=1)
        descriptions = list(scene.captions[1:])  # the first is a test's prompt
        yield {"image": {"bytes": png.getvalue(), "path": None}, "captions": descriptions}


def shapes_code() -> str:
    """Fingerprints the room that draws scenes, so that `datasets` never serves pictures of an older one."""
    import minidiff.shapes

    files = sorted(Path(minidiff.shapes.__file__).parent.glob("*.py"))
    return format(zlib.crc32(b"".join(f.read_bytes() for f in files)), "08x")
