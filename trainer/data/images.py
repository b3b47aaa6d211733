"""Image files: a record's paths, their sizes from the headers, and loading as RGB."""

import functools
import os
import re

import numpy as np
from PIL import ExifTags, Image, ImageOps

from .example import Refused, Source

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # not EPS: Pillow starts another program for it
MIN_SIDE = 28  # pixels: one vision token is 28 x 28
MAX_ASPECT_RATIO = 200  # limit of Qwen2-VL's smart_resize
MAX_IMAGE_PIXELS = 64_000_000  # largest width x height to decode, checked by the file's header
_PLAIN = re.compile(r"(?:[^/.\0][^/\0]*/)*[^/.\0][^/\0]*")  # no part is empty or begins with a dot


def resolve_images(images: object, file: Source, *, name: str = "images") -> tuple[str, ...]:
    """Paths of a record's images; `name` is the record's key for them."""
    if not isinstance(images, list) or not images:
        raise Refused("no_images", f"{name} is {images!r:.80}; a list of at least one path is needed.")
    root, paths = file.root, []
    for image in images:
        if not isinstance(image, str) or not image or "\0" in image:
            raise Refused("no_images", f"image is {image!r:.80}; a path is needed.")
        full = os.path.join(root, image)
        if not _PLAIN.fullmatch(image):  # a plain path needs no resolving, and a file may name millions of images
            # Links are not resolved: the owner of the root made them. A ".." comes from the record's author.
            full = os.path.abspath(full)
            if file.bounded and os.path.commonpath([root, full]) != root:
                raise Refused("image_outside_root", f"image {image!r} lies outside --image_root {root}. Correct it.")
        paths.append(full)
    return tuple(paths)


@functools.lru_cache(maxsize=4096)
def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """Width and height in pixels from the file's header, turned upright, before `load_image` enlarges a small image."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            turned = _quarter_turned(image)
    except FileNotFoundError as error:
        raise Refused("missing_image", f"there is no image at {path}, whose size is needed. Fetch it.") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Refused("image_unreadable", f"the size of {path} cannot be read ({error}). Fetch it again.") from error
    return (height, width) if turned else (width, height)


def is_turned(path: str | os.PathLike) -> bool:
    """Whether the EXIF orientation of a readable image swaps its sides."""
    with Image.open(path, formats=FORMATS) as image:
        return _quarter_turned(image)


def _quarter_turned(image: Image.Image) -> bool:
    return image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)


def load_image(path: str | os.PathLike) -> Image.Image:
    """Load an image as 8-bit RGB, turned upright by its EXIF orientation, with white behind transparent pixels.

    An image with a side under 28 pixels is enlarged until it has 28, in the same aspect ratio (as VLM-R1 does); boxes
    are relative to the image, so they stay valid. Of an animation the first frame is used.

    Raises:
        ValueError: no file, not one of `FORMATS`, truncated, too many pixels, an aspect ratio above 200, or a mode
            without a defined white (32-bit integers and floats). The message names the path and the remedy.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for its writer
        raise ValueError(f"{path} is no regular file. Replace it or drop the record.")
    try:
        image = Image.open(path, formats=FORMATS)
    except FileNotFoundError as error:
        raise ValueError(f"There is no image at {path}. Check the record's path and --image_root.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{path} is over Pillow's own limit ({error}). Scale it down or drop the record.") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be opened as an image ({error}). Replace it or drop the record.") from error
    with image:
        width, height = image.size
        if width * height > MAX_IMAGE_PIXELS:
            raise ValueError(
                f"{path} has {width} x {height} = {width * height} pixels; the limit is {MAX_IMAGE_PIXELS}. "
                "Scale it down."
            )
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise ValueError(
                f"{path} is {width} x {height} pixels; a side may be at most {MAX_ASPECT_RATIO} times the other. "
                "Crop it."
            )
        try:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):
                # Pillow's own conversion clips at 255: nearly every 16-bit picture would turn white.
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise ValueError(f"mode {image.mode} has no defined white; save it with 8 bits a channel")
            elif image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
        except Exception as error:  # decoders fail with OSError, SyntaxError, struct.error, zlib.error, IndexError ...
            raise ValueError(f"{path} cannot be decoded ({error}). Fetch it again or drop the record.") from error
    return image if min(image.size) >= MIN_SIDE else image.resize(enlarged(image.size), Image.Resampling.BICUBIC)


def enlarged(size: tuple[int, int]) -> list[int]:
    """`size` (pixels), scaled up in the same aspect ratio if a side is under `MIN_SIDE`."""
    factor = max(1.0, MIN_SIDE / min(size))
    return [max(MIN_SIDE, round(side * factor)) for side in size]
