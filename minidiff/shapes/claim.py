"""What a caption claims, how it is worded, and whether a scene makes it true.

A caption names some attributes and leaves the others open; what is named is what is checked. The number of things is
always checked: a picture with one thing too many does not show "a red circle". The categories and the rule for
directions are those of GenEval (Ghosh et al. 2023, "GenEval: an object-focused framework for evaluating text-to-image
alignment").
"""

import math
from dataclasses import dataclass, field, fields
from itertools import permutations

from minidiff.shapes.scene import Scene, Thing

CATEGORIES = ("single_object", "two_objects", "counting", "colour", "position", "attribute_binding")

# Relation → the direction from the second thing to the first.
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def related(first: Thing, relation: str, second: Thing) -> bool:
    """Whether `first` lies within 60° of the named direction from `second` (a diagonal neighbour is both left and
    above).
    """
    dx, dy = first.x - second.x, first.y - second.y
    along = dx * RELATIONS[relation][0] + dy * RELATIONS[relation][1]
    return along > 0.5 * math.hypot(dx, dy)


@dataclass(frozen=True, kw_only=True)
class Description:
    """What is said of one thing; `None` is left open."""

    shape: str
    colour: str | None = None
    size: str | None = None
    texture: str | None = None
    place: str | None = None

    def fits(self, thing: Thing) -> bool:
        """Whether the thing has every attribute that is named."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return all(said is None or said == getattr(thing, name) for name, said in named.items())


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a caption says of a scene: one thing, two things (perhaps with a relation from first to second), or `count`
    alike.

    The category only groups claims for scoring: two claims are equal when they say the same.
    """

    category: str = field(compare=False)
    things: tuple[Description, ...]
    count: int = 1
    relation: str | None = None
    background: str | None = None

    def holds(self, scene: Scene) -> bool:
        """Decides whether the scene shows what is claimed, and nothing more than that number of things."""
        if self.background not in (None, scene.background) or len(scene.things) != len(self.things) * self.count:
            return False
        return any(self._told_of(order) for order in permutations(scene.things))

    def _told_of(self, things: tuple[Thing, ...]) -> bool:
        described = zip(self.things * self.count, things, strict=True)
        if not all(description.fits(thing) for description, thing in described):
            return False
        return self.relation is None or related(things[0], self.relation, things[1])


# Each entry lists the ways to say one thing; a style takes the entry at its number.
STYLES = 3
WORDS = {
    "large": ("large", "big", "large"),
    "small": ("small", "little", "small"),
    "checkered": ("checkered", "checkered", "checked"),
    "left of": ("left of", "to the left of", "on the left side of"),
    "right of": ("right of", "to the right of", "on the right side of"),
    "above": ("above", "over", "above"),
    "below": ("below", "under", "beneath"),
    "and": ("and", "next to", "beside"),
    "top left": ("in the top left", "in the top left corner", "at the top left"),
    "top": ("at the top", "at the top", "on the top"),
    "top right": ("in the top right", "in the top right corner", "at the top right"),
    "left": ("on the left", "at the left", "on the left"),
    "center": ("in the center", "in the middle", "at the center"),
    "right": ("on the right", "at the right", "on the right"),
    "bottom left": ("in the bottom left", "in the bottom left corner", "at the bottom left"),
    "bottom": ("at the bottom", "at the bottom", "on the bottom"),
    "bottom right": ("in the bottom right", "in the bottom right corner", "at the bottom right"),
    "2": ("two", "2", "two"),
    "3": ("three", "3", "three"),
    "4": ("four", "4", "four"),
}
FRAMES = ("{things}", "a picture of {things}", "there {are} {things}", "an image with {things}")
FRAMES_WITH_BACKGROUND = (
    "{things} on a {background} background",
    "{background} background with {things}",
    "there {are} {things} on a {background} background",
    "{things}, {background} background",
)
WORDINGS = STYLES * len(FRAMES)


def _say(word: str, style: int) -> str:
    return WORDS[word][style] if word in WORDS else word


def _phrase(description: Description, count: int, style: int) -> str:
    adjectives = (description.size, description.texture, description.colour)
    words = [_say(word, style) for word in adjectives if word is not None]
    if count == 1:
        words.append(description.shape)
        words.insert(0, "an" if words[0][0] in "aeiou" else "a")
    else:
        words.append(description.shape + ("es" if description.shape.endswith("s") else "s"))
        words.insert(0, _say(str(count), style))
    return " ".join(words + ([_say(description.place, style)] if description.place else []))


def caption(claim: Claim, wording: int) -> str:
    """Says a claim in words; `wording`, taken modulo `WORDINGS`, picks the frame and the synonyms."""
    style, frame = divmod(wording % WORDINGS, len(FRAMES))
    link = f" {WORDS[claim.relation or 'and'][style]} "
    things = link.join(_phrase(description, claim.count, style) for description in claim.things)
    frames = FRAMES if claim.background is None else FRAMES_WITH_BACKGROUND
    are = "is" if claim.count == 1 else "are"
    return frames[frame].format(things=things, background=claim.background, are=are)
