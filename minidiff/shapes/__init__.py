"""Procedural captioned scenes with exact ground truth: scene → picture and captions, and picture → scene.

    example(split, index)  →  Example(scene, claims, captions)
    render(scene, px)      →  picture
    parse(picture)         →  scene          claim.holds(scene)  →  bool

Because the scene is read back from pixels, whether a generated picture follows its prompt is decided, not estimated.
"""

from minidiff.shapes.claim import CATEGORIES, WORDINGS, Claim, Description, caption
from minidiff.shapes.parse import distance, parse
from minidiff.shapes.render import render
from minidiff.shapes.sample import SPLITS, WEIGHTS, Example, example
from minidiff.shapes.scene import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, TEXTURES, Scene, Thing

__all__ = [
    "BACKGROUNDS",
    "CATEGORIES",
    "COLOURS",
    "PLACES",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "TEXTURES",
    "WEIGHTS",
    "WORDINGS",
    "Claim",
    "Description",
    "Example",
    "Scene",
    "Thing",
    "caption",
    "distance",
    "example",
    "parse",
    "render",
]
