"""Gold boxes of records, brought to 0-1000."""

from .example import Box, Source, checked_box, is_numbers
from .images import image_size

UNSIZED = 1_000_000  # pixels, the assumed sides of an image that is not opened: only the corners' order is checked then


def pixel_box(box: object, path: str, file: Source, what: str, record: dict | None = None) -> Box:
    """Convert a box in pixels of the image at `path` to 0-1000. `record` may hold the image's width and height.

    A box that extends beyond the image by less than a pixel is clipped: annotations are rounded, sizes are whole.
    """
    size = [(record or {}).get(key) for key in ("width", "height")]
    if not is_numbers(size) or min(size) <= 0:
        size = image_size(path) if file.sized else (UNSIZED, UNSIZED)
    if is_numbers(box) and len(box) == 4:
        limits = (*size, *size)
        box = [min(max(v, 0), most) if -1 < v < most + 1 else v for v, most in zip(box, limits)]
    return checked_box(box, (1000 / size[0], 1000 / size[1]), what)
