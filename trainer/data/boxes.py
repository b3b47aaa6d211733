"""Gold boxes of records: the unit that a file writes them in, and their conversion to 0-1000."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from boxgrpo.trainer.options import BOX_UNITS

from .example import Box, Refused, Source, checked_box, is_numbers
from .images import image_size, is_turned

LIMITS = {"fractions": 1, "percent": 100, "thousandths": 1000}  # an image's width and height in these units
UNSIZED = 1_000_000  # pixels, the assumed sides of an image that is not opened: only the corners' order is checked then
UNIT_BOXES = 200  # most boxes of a file that its unit is derived from
# Logarithms of odds: of the format's usual unit to another one, and that the chosen unit must have to the next.
USUAL, CERTAIN = 13.0, 3.0


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
    limits = [LIMITS[file.unit]] * 2 if file.unit in LIMITS else _pixel_size(image, record, file)
    if file.unit == "pixels" and numbers:
        box = [min(max(v, 0), most) if -1 < v < most + 1 else v for v, most in zip(box, [*limits, *limits])]
    return checked_box(box, (1000 / limits[0], 1000 / limits[1]), what)


def only_box(box: object, what: str) -> object:
    """The value, or of a list of lists the only one."""
    if not isinstance(box, list) or not box or not isinstance(box[0], list):
        return box
    if len(box) > 1:
        raise Refused("several_boxes", f"{what} holds {len(box)} boxes; a record has one. Make a record of each.")
    return box[0]


def likeliest_unit(boxes: Sequence[Written], usual: str) -> str:
    """The unit that a file's boxes are in; `usual` is that of its format, from which the boxes must clearly differ.

    The far corners of boxes reach into all of an image or, in a file of centred objects, three quarters of its sides;
    they are the likelier the farther out they lie. So the unit with the smallest limits that hold nearly all boxes is
    the likeliest. It must be the same one for either reach of the usual unit.

    Raises:
        ValueError: two units are about equally likely.
    """
    readings = [sorted(((_support(boxes, u, usual, reach), u) for u in BOX_UNITS), reverse=True) for reach in (1, 0.75)]
    (_, unit), *_ = readings[0]
    for (most, first), (next_most, second), *_ in readings if boxes else ():
        if first != unit or most - next_most < CERTAIN:
            corners, size = boxes[0]
            of = f" in {size[0]:g} x {size[1]:g} pixels" if size else ""
            other = second if first == unit else first
            raise ValueError(
                f"the gold boxes may be {unit} or {other} of their images: {len(boxes)} do not tell; the first is "
                f"{list(corners)}{of}. Name their unit with --box_unit (of eval_data: --eval_box_unit)."
            )
    return unit


def _support(boxes: Sequence[Written], unit: str, usual: str, reach: float) -> float:
    """Logarithm of the unit's likelihood, without what all units have in common.

    Along a side w a corner at x has the density 2x / w^2. A rare faulty box lies outside: its odds are e^-8, and
    fall with the sixth power of the distance.
    """
    total = USUAL * (unit == usual)
    for corners, size in boxes:
        ends = max(corners[::2]), max(corners[1::2])
        if unit == "pixels" == usual and not size:
            limits = [max(end, 100) for end in ends]  # as if the image were large enough
        elif unit == "pixels" and size:
            limits = [side + 1 for side in size]
        else:
            limits = [LIMITS[usual if unit == "pixels" else unit]] * 2
        beyond = sum(math.log(max(1.0, end / limit)) for end, limit in zip(ends, limits))
        if unit == usual:
            limits = [max(min(end, limit), reach * limit) for end, limit in zip(ends, limits)]
        total -= 2 * sum(map(math.log, limits)) + 6 * beyond + 8 * (beyond > 0)
    return total


def known_size(image: str, record: dict, file: Source) -> Sequence[float] | None:
    """Width and height of the image in pixels, if they can be told without a doubt."""
    try:
        return _pixel_size(image, record, file) if file.sized else None
    except Refused:
        return None


def _pixel_size(image: str, record: dict, file: Source) -> Sequence[float]:
    """Width and height of the image, upright. Where the record has them swapped, that is counted in `file.counts`.

    Raises:
        Refused: the image cannot be measured, or the record says something else.
    """
    told = [record.get(key) for key in ("width", "height")]
    told = told if is_numbers(told) and min(told) > 0 else None
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
        if is_turned(image):  # the box may have been drawn before or after the turn
            raise Refused("turned_image", f"{what} once its EXIF turns it. Save it upright, and correct the record.")
        file.counts["swapped"] += 1
    return size
