"""Image files become RGB pictures that Qwen2-VL's image processor accepts; anything else is refused by name."""

import os

import numpy as np
from PIL import ExifTags, Image, ImageOps

MIN_SIDE = 28  # pixels: one vision token is 28 x 28
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # EPS, for one, would start another program
MAX_ASPECT_RATIO = 200  # limit of Qwen2-VL's smart_resize


def load_image(path: str | os.PathLike, *, max_image_pixels: int = 64_000_000) -> Image.Image:
    """The picture in a file as it is meant to be seen: upright, on white where it is transparent, 8-bit RGB.

    An image with a side under 28 pixels is enlarged, its shape kept, until it has 28 (as VLM-R1 does): boxes are
    relative to the image, so they stay true. Of an animation the first frame is taken.

    Args:
        path: an image file of one of `FORMATS`.
        max_image_pixels: largest width x height to decode, checked by the file's header.

    Raises:
        ValueError: no file, no image, truncated, too many pixels, longer than 200 times its width, or a mode without a
            defined white (32-bit integers and floats). Names the path and the remedy.
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
        if width * height > max_image_pixels:
            raise ValueError(
                f"{path} has {width} x {height} = {width * height} pixels; the limit is {max_image_pixels}. "
                "Scale it down."
            )
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise ValueError(
                f"{path} is {width} x {height} pixels; a side may be at most {MAX_ASPECT_RATIO} times the other. "
                "Crop it."
            )
        try:
            image = _rgb(ImageOps.exif_transpose(image))
        except Exception as error:  # decoders fail with OSError, SyntaxError, struct.error, zlib.error, IndexError ...
            raise ValueError(f"{path} cannot be decoded ({error}). Fetch it again or drop the record.") from error
    if min(image.size) < MIN_SIDE:
        factor = MIN_SIDE / min(image.size)
        image = image.resize([max(MIN_SIDE, round(side * factor)) for side in image.size], Image.Resampling.BICUBIC)
    return image


def upright_size(path: str | os.PathLike) -> tuple[int, int]:
    """Width and height in pixels of an image that `load_image` accepts: upright, and before a small one is enlarged."""
    with Image.open(path, formats=FORMATS) as image:
        width, height = image.size
        quarter_turn = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (height, width) if quarter_turn else (width, height)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255: nearly every 16-bit picture would turn white.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no defined white; save it with 8 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
