"""Handwritten digits as a second world beside the drawn one (scenes.py): the same tasks about scans of real digits.

The scans are a part of scikit-learn: 1,797 of 8x8 pixels in 17 grey levels, from UCI's "Optical Recognition of
Handwritten Digits" (Alpaydin and Kaynak). Each stands on a square of white paper. An object's kind is its digit; its
scan is another one in each image. An eighth of the scans is in held-out scenes alone. Levels differ as in scenes.py,
but each has all ten digits.
"""

import functools
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from .scenes import OTHERS, STEP, Sketch
from .shapes import Box

SCANS = "datasets/data/digits.csv.gz"  # in the package
PAPER, INK = (240, 240, 240), (25, 25, 60)


@dataclass(frozen=True)
class Digit:
    """A kind of object, as `Kind` is one."""

    digit: int
    scan: int = field(default=-1, compare=False)  # its row in `load_scans`; -1: not shown yet
    colour = PAPER

    def __str__(self):
        return str(self.digit)

    def paint(self, image: Image.Image, box: Box) -> None:
        """Fill `box`, in pixels, with the scan; x2 and y2 are excluded."""
        ink = Image.fromarray((load_scans()[self.scan, :64] * (255 / 16)).astype(np.uint8).reshape(8, 8))
        image.paste(PAPER, box)
        image.paste(INK, box, ink.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.BICUBIC))


@functools.cache
def load_scans() -> np.ndarray:
    """(1797, 65) uint8, a scan in each row: 8x8 grey levels from 0, paper, to 16, ink, and its digit.

    The package's file is read, the package is not imported.

    Raises:
        ValueError: it is not installed.
    """
    package = find_spec("sklearn")
    if package is None:
        remedy = "Install it (pip install 'scikit-learn>=1.5')"
        raise ValueError(f"the scans of digits are a part of scikit-learn, which is not installed. {remedy}.")
    return np.loadtxt(Path(package.origin).parent / SCANS, delimiter=",", dtype=np.uint8)


@functools.cache
def find_scans(digit: int, held_out: bool) -> list[int]:
    """The scans of a digit that held-out scenes, or all others, may show."""
    rows = enumerate(load_scans())
    return [k for k, row in rows if row[64] == digit and (zlib.crc32(row[:64].tobytes()) % 8 == 0) == held_out]


class DigitSketch(Sketch):
    """The random choices of one scene of digits."""

    noun, without = "digit", ("reasoning", "correspondence")  # these compare colours and shapes
    held_out = False

    def __init__(self, rng: random.Random, level: int):
        self.rng, self.level, self.shown = rng, level, set()
        self.kinds = [Digit(digit) for digit in rng.sample(range(10), 10)]

    def others(self, subject: Digit, accept: Callable[[Digit], bool] = lambda kind: True) -> list[Digit]:
        return [self.take(accept) for _ in range(self.rng.randint(*OTHERS[self.level]))]

    def sides(self) -> tuple[int, int]:
        return (self.rng.randrange(2, 5, STEP[self.level]),) * 2

    def show(self, kind: Digit) -> Digit:
        """The digit by a scan that the scene has not shown yet."""
        scan = self.rng.choice([k for k in find_scans(kind.digit, self.held_out) if k not in self.shown])
        self.shown.add(scan)
        return replace(kind, scan=scan)

    def vary(self, subject: Digit) -> Digit:
        return self.take()


class HeldOutDigits(DigitSketch):
    held_out = True


WORLDS = {"drawn": (Sketch, Sketch), "digits": (DigitSketch, HeldOutDigits)}  # of training and of held-out scenes
