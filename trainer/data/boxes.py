"""Gold boxes of records: the unit that a file writes them in, and their conversion to 0-1000."""

import contextlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from boxgrpo.trainer.options import BOX_UNITS

from .example import EMPTY, Box, Refused, Source, checked_box, is_numbers
from .images import image_size, orientation

LIMITS = {"fractions": 1, "percent": 100, "thousandths": 1000}  # an image's width and height in these units
SIZES = ("width", "height")  # of an image in pixels, as a record may tell them
UNSIZED = 1_000_000  # pixels, the assumed sides of an image that is not opened: only the corners' order is checked then
UNIT_BOXES = 200  # most boxes of a file that its unit is derived from
PARTLY = 0.1  # share of files whose boxes reach only a part of a side
# Odds that a box is faulty and lies outside its image, and the most such boxes in a file; in the usual unit one may.
OUTSIDE, MOST_OUTSIDE = 1e-3, 0.1
CERTAIN = 100_000  # times that a unit is likelier than the next if the boxes tell it
# The format's usual unit is taken where it is LIKELIER times likelier than the next one. In a file of fewer than FEW
# boxes it is also taken where no other one is LIKELIER times likelier.
LIKELIER, FEW = 10, 10


class Written(NamedTuple):
    """A box as its record has it."""

    corners: Sequence[float]
    size: tuple[float, float] | None  # width and height of its image in pixels; None: unknown


def gold_box(box: object, image: str, file: Source, what: str, record: dict) -> Box | Written:
    """Convert a record's box to 0-1000 by `file.unit`; unit "auto": return it unchanged, with its image's size.

    A box that extends beyond the image by less than a pixel is clipped: annotations are rounded, sizes are whole.

    Args:
        box: the value, as `only_box` takes it.
        image: path of the image that the box lies in.
        what: the value's name in messages.
        record: may hold the image's `width` and `height`.

    Raises:
        Refused: it breaks a rule of gold boxes, or its image cannot be measured.
    """
    box = only_box(box, what)
    numbers = is_numbers(box) and len(box) == 4
    if file.unit == "auto" and numbers:
        return Written(box, known_size(image, record, file))
    if numbers and file.unit != "fractions" and max(box) <= 1 and (file.unit == "pixels" or any(v % 1 for v in box)):
        raise Refused("fractions", f"{what} is {box}, within 0-1; the file's boxes are in {file.unit}. Write it so.")
    # Where nothing is told, an image need not be opened for other units than pixels.
    measured = file.unit not in LIMITS or tells_size(record)
    size = pixel_size(image, record, file) if measured else None
    limits = [LIMITS[file.unit]] * 2 if file.unit in LIMITS else size
    if file.unit == "pixels" and numbers:
        box = [min(max(v, 0), most) if -1 < v < most + 1 else v for v, most in zip(box, [*limits, *limits])]
    try:
        return checked_box(box, (1000 / limits[0], 1000 / limits[1]), what)
    except Refused as refused:
        if refused.reason != "box_outside":
            raise
        other = "thousandths" if file.unit == "pixels" else "pixels"
        remedy = (
            f"If the file's boxes are {other}, not {file.unit}: --box_unit {other} (of eval_data: --eval_box_unit)."
        )
        with contextlib.suppress(Refused):
            if file.unit == "pixels" and orientation(image) >= 5:
                remedy = f"EXIF turns the image: if the box is that of the unturned one, turn it too. {remedy}"
        raise Refused(refused.reason, f"{refused} {remedy}") from refused


def only_box(box: object, what: str) -> object:
    """The value, or of a list of lists the only one."""
    if not isinstance(box, list) or not box or not isinstance(box[0], list):
        return box
    if len(box) > 1:
        raise Refused("several_boxes", f"{what} holds {len(box)} boxes; a record has one. Make a record of each.")
    return box[0]


def likeliest_unit(boxes: Sequence[Written], usual: str) -> tuple[str, bool]:
    """The unit that a file's boxes are in, and whether they tell it; if not, it is `usual`, that of their format.

    Boxes within 0-1 are fractions. Of the other units that hold nearly all boxes, the likeliest is taken if it is so
    by far; bench/studies/box_units.py measures the errors. One record alone tells only fractions.

    Raises:
        ValueError: two units are about equally likely.
    """
    boxes = [box for box in boxes if box.corners[0] < box.corners[2] and box.corners[1] < box.corners[3]]
    boxes, records = [*{str(box): box for box in boxes}.values()], len(boxes)  # one written twice tells no more
    boxes = [box for box in boxes if box.size] or boxes
    sized = bool(boxes and boxes[0].size)
    units = [unit for unit in BOX_UNITS if boxes and (sized or unit != "pixels")]
    limits: dict[str, np.ndarray] = {}
    for unit in sorted(units, key=lambda unit: unit != usual):
        sides = np.array([size if unit == "pixels" else [LIMITS[unit]] * 2 for _, size in boxes], dtype=float)
        if not any(np.array_equal(sides, others) for others in limits.values()):  # else both give the same gold boxes
            limits[unit] = sides
    ends = np.array([corners[2:] for corners, _ in boxes], dtype=float)
    found = {unit: _log_likelihood(ends, sides, unit, int(unit == usual)) for unit, sides in limits.items()}
    found = {unit: value for unit, value in found.items() if value is not None}
    if "fractions" in found:
        return "fractions", True
    if not found or (usual == "pixels" and not sized) or (len(boxes) == 1 and (usual in found or records == 1)):
        return usual, False
    (unit, most), (second, next_most) = [*sorted(found.items(), key=lambda item: -item[1]), (usual, -math.inf)][:2]
    if most - next_most > math.log(CERTAIN):
        return unit, True
    lead = found.get(usual, -math.inf) - (next_most if unit == usual else most)
    if lead > math.log(LIKELIER) or (len(boxes) < FEW and lead > -math.log(LIKELIER)):
        return usual, False
    corners, size = boxes[0]
    of = f" in {size[0]:g} x {size[1]:g} pixels" if size else ""
    raise ValueError(
        f"the gold boxes may be {unit} or {second} of their images: {len(boxes)} do not tell; the first is "
        f"{list(corners)}{of}. Name their unit with --box_unit (of eval_data: --eval_box_unit)."
    )


def _log_likelihood(ends: np.ndarray, limits: np.ndarray, unit: str, least_outside: int) -> float | None:
    """Logarithm of the unit's likelihood, without what all units have in common; None: too many boxes lie outside.

    A far corner at the share s of a side has the density 2s. In a tenth of files the boxes reach only up to a share r
    of the side, of density 2r: there a corner has the density 2s / r^2, and n of them about the integral of 2r / r^2n.

    Args:
        ends: (n, 2) far corners as they are written.
        limits: (n, 2) width and height of the images in the unit.
        least_outside: number of boxes that may always lie outside.
    """
    slack = {"pixels": 1, "fractions": 0.05}.get(unit, 0)  # annotations are rounded, sizes are whole
    ends = np.where(ends < limits + slack, np.minimum(ends, limits), ends)
    inside = (ends <= limits).all(axis=1)
    if not (count := inside.sum()) or len(ends) - count > max(least_outside, MOST_OUTSIDE * len(ends)):
        return None
    total = (len(ends) - count) * math.log(OUTSIDE) - 2 * np.log(np.maximum(ends, limits)).sum()
    for reach in (ends / limits)[inside].max(axis=0).clip(1e-9):
        part = math.log(2 * PARTLY / (2 * count - 1)) - (2 * count - 2) * math.log(reach)
        total += np.logaddexp(math.log(1 - PARTLY), part)
    return total


def known_size(image: str, record: dict, file: Source) -> Sequence[float] | None:
    """Width and height of the image in pixels, if they can be told without a doubt."""
    try:
        return pixel_size(image, record, file) if file.sized else None
    except Refused:
        return None


def pixel_size(image: str, record: dict, file: Source) -> Sequence[float]:
    """Width and height of the image, upright. Where the record has them swapped, that is counted in `file.counts`.

    Raises:
        Refused: the image cannot be measured, or the record says something else.
    """
    told = _told_size(record)
    if not file.sized:
        return told or (UNSIZED, UNSIZED)
    try:
        size = image_size(image)
    except Refused as refused:
        if told and refused.reason == "missing_image":
            return told
        raise
    if told and told != [*size]:
        what = f"width and height are {told[0]:g} and {told[1]:g}; {image} is {size[0]} x {size[1]} pixels"
        if told[::-1] != [*size]:
            raise Refused("size_contradicts", f"{what}. Correct them, and the box if it belongs to another image.")
        if orientation(image) >= 5:  # the box may have been drawn before or after the turn
            raise Refused("turned_image", f"{what} once its EXIF turns it. Save it upright, and correct the record.")
        file.counts["swapped"] += 1
    file.counts["turned"] += orientation(image) > 1
    return size


def tells_size(record: dict) -> bool:
    """Whether the record has a width or a height of its image."""
    return any(record.get(key) not in EMPTY for key in SIZES)


def _told_size(record: dict) -> list[float] | None:
    """The record's own width and height, numbers or their text; None: it has neither.

    Raises:
        Refused: they are anything else.
    """
    told = [record.get(key) for key in SIZES]
    if not tells_size(record):
        return None
    with contextlib.suppress(TypeError, ValueError):
        told = [value[0] if isinstance(value, list) and len(value) == 1 else value for value in told]
        sizes = [float(value) for value in told if not isinstance(value, bool)]
        if len(sizes) == 2 and all(0 < size < 1e9 for size in sizes):
            return sizes
    rule = "both are numbers of pixels, or neither is given"
    raise Refused("bad_size", f"width and height are {told[0]!r:.40} and {told[1]!r:.40}; {rule}. Correct them.")
