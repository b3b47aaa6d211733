"""The shapes of the drawn world, and how an image of them is painted."""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

Box = tuple[int, int, int, int]  # x1, y1, x2, y2; 0-1000 of the image's width and height

COLOURS = {
    "red": (220, 40, 40),
    "green": (30, 160, 70),
    "blue": (40, 90, 225),
    "yellow": (245, 190, 0),
    "purple": (150, 50, 180),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "star")
FRAME = (255, 255, 255)
PATCH = 14  # pixels, the side of Qwen2-VL's patches


class Kind(NamedTuple):
    colour: str
    shape: str

    def __str__(self):
        return f"{self.colour} {self.shape}"

    def paint(self, image: Image.Image, box: Box) -> None:
        """Fill `box`, in pixels, with the shape; x2 and y2 are excluded."""
        pen, (x1, y1, x2, y2) = ImageDraw.Draw(image), box
        x2, y2 = x2 - 1, y2 - 1  # Pillow's corners are inclusive
        if self.shape == "circle":
            pen.ellipse([x1, y1, x2, y2], fill=COLOURS[self.colour])
        else:
            corners = [(round(x1 + u * (x2 - x1)), round(y1 + v * (y2 - y1))) for u, v in OUTLINES[self.shape]]
            pen.polygon(corners, fill=COLOURS[self.colour], outline=COLOURS[self.colour])


class Thing(NamedTuple):
    kind: Kind
    box: Box


class Layout(NamedTuple):
    """One image of a scene before it is drawn; things never overlap."""

    things: tuple[Thing, ...]
    tint: tuple[int, int, int]
    framed: Thing | None = None


def _star() -> list[tuple[float, float]]:
    angles = [math.pi * k / 5 for k in range(10)]
    points = [((1, 0.45)[k % 2] * math.sin(a), -(1, 0.45)[k % 2] * math.cos(a)) for k, a in enumerate(angles)]
    (left, right), (top, bottom) = ((min(v), max(v)) for v in zip(*points))
    return [((x - left) / (right - left), (y - top) / (bottom - top)) for x, y in points]


OUTLINES = {  # corners in the unit square; every outline touches its four sides
    "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": [(0.5, 0), (1, 1), (0, 1)],
    "diamond": [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
    "cross": [(a / 3, b / 3) for a, b in ((1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2))]
    + [(a / 3, b / 3) for a, b in ((2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1))],
    "star": _star(),
}


def add_rulers(image: Image.Image) -> Image.Image:
    """Draw rulers over the image: a tick on the left and the top edge of every patch encodes its row and column.

    So every patch, of at most 13 x 13, shows its absolute position. Qwen2-VL encodes relative positions only: a large
    model can learn to infer absolute ones from the image's borders, a model that is trained for minutes cannot.
    """
    pixels = np.array(image)
    height, width = pixels.shape[:2]
    rows, columns = height // PATCH, width // PATCH
    pixels[::PATCH] = pixels[:, ::PATCH] = 255
    for row in range(rows):
        pixels[row * PATCH + 1 + (PATCH - 1) * row // rows, ::PATCH] = 0
    for column in range(columns):
        pixels[::PATCH, column * PATCH + 1 + (PATCH - 1) * column // columns] = 0
    return Image.fromarray(pixels)


def paint(layout: Layout, size: int) -> Image.Image:
    """An image of the scene, without rulers."""
    image = Image.new("RGB", (size, size), layout.tint)
    if layout.framed:  # first, so that it never covers a pixel of an object
        x1, y1, x2, y2 = (v * size // 1000 for v in layout.framed.box)
        margin = size // 28
        ImageDraw.Draw(image).rectangle(
            [max(x1 - margin, 0), max(y1 - margin, 0), min(x2 + margin, size) - 1, min(y2 + margin, size) - 1],
            outline=FRAME,
            width=max(margin // 2, 1),
        )
    for kind, box in layout.things:
        kind.paint(image, tuple(v * size // 1000 for v in box))
    return image
