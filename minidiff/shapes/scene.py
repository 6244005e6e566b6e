"""A scene: a plain background and one to four things, each with a shape, colour, size, texture and place.

Coordinates are those of a square picture, x to the right and y down, both in [-1, 1]. Everything a caption may say
about a thing is an attribute of `Thing`, so that a caption is decided true or false by looking at the scene and at
nothing else.
"""

from dataclasses import dataclass

BACKGROUNDS = {"black": (14, 14, 18), "white": (248, 248, 248), "gray": (132, 132, 136), "navy": (20, 28, 84)}

# Colour → its main tone and the second tone of stripes and checks. The second tone is lighter where the colour is dark
# and darker where it is light, so that both stay far from every background.
COLOURS = {
    "red": ((222, 38, 38), (255, 158, 140)),
    "orange": ((248, 136, 16), (158, 70, 4)),
    "yellow": ((250, 220, 40), (176, 138, 0)),
    "green": ((24, 160, 52), (150, 232, 140)),
    "cyan": ((50, 215, 225), (0, 122, 146)),
    "blue": ((40, 92, 240), (140, 182, 255)),
    "purple": ((138, 44, 196), (210, 156, 248)),
    "pink": ((255, 130, 190), (204, 44, 122)),
}
SHAPES = ("circle", "ring", "square", "diamond", "triangle", "star", "cross")
TEXTURES = ("solid", "striped", "checkered")
SIZES = ("small", "large")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")

# Every shape fits its circle of radius r and touches it. Large things sit nearer the centre, to stay inside the
# picture.
RADIUS = {"small": 0.32, "large": 0.50}
OFFSET = {"small": 0.54, "large": 0.35}


@dataclass(frozen=True)
class Thing:
    """One object. `x`, `y` is its centre and `r` its circumradius, in units where the picture spans [-1, 1]."""

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float
    r: float

    @property
    def place(self) -> str:
        """The cell of the 3×3 grid that the centre lies in, one of `PLACES`."""
        half = OFFSET[self.size] / 2
        column = 1 + (self.x > half) - (self.x < -half)
        row = 1 + (self.y > half) - (self.y < -half)
        return PLACES[3 * row + column]


@dataclass(frozen=True)
class Scene:
    """A background, one of `BACKGROUNDS`, and the things before it. The order of the things means nothing."""

    background: str
    things: tuple[Thing, ...]
