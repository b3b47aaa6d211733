"""Images: where a record has them, their sizes from the headers, and loading as RGB."""

import base64
import contextlib
import functools
import io
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .example import Refused, Source

# Not EPS: Pillow starts another program for it. AVIF and HEIF (HEIC) where this Pillow reads them.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "HEIF")
MIN_SIDE = 28  # pixels, for all families
MAX_ASPECT_RATIO = 200  # limit of Qwen2-VL's smart_resize
MAX_IMAGE_PIXELS = 64_000_000  # largest width x height to decode, checked by the file's header
# A path without empty parts and parts that begin with a dot, so that it need not be resolved. Base64 has no dot.
_PLAIN = re.compile(r"(?![wW]{3}\.)(?:[^/.\0][^/\0]*/)*[^/.\0][^/\0]*\.(?:jpe?g|png|webp|bmp|gif|tiff?)")
_BASE64 = re.compile(r"(?:data:[\w.+-]+/[\w.+-]+(?:;[\w.+-]+=[\w.+-]+)*;base64,)?([A-Za-z0-9+/]{40,}={0,2})")
_BASE64_STARTS = ("data:", "/9j/", "iVBORw0KGgo", "UklGR", "Qk", "R0lGOD", "SUkq", "TU0A", "AAAA")  # of the formats
_URL = re.compile(r"([a-z][a-z0-9+-]+)://|(?://|www\.)[^/]+/", re.IGNORECASE)  # also without its scheme
MAX_NAME, MAX_PATH = 255, 4095  # bytes of a file's or folder's name and of a path, the limits of Linux
IMAGE_KEYS = ("images", "image")  # of a record
VIDEOS = (".mp4", ".m4v", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ogv")


@dataclass(frozen=True)
class Embedded:
    """An image whose file is in its record: its bytes, and a name for messages."""

    name: str
    content: bytes = field(repr=False)

    def __str__(self) -> str:
        return self.name


def listed_images(record: dict) -> list | None:
    """The list that the record has under `images` or `image`, of one where it has a single value; None, []: no image.

    Raises:
        Refused: it has both and they differ, or it has a video.
    """
    for key in ("videos", "video"):
        if record.get(key):
            raise Refused("video", f"{key} is {record[key]!r:.80}; videos are not read. Give their frames as images.")
    images, image = (
        value if value is None or isinstance(value, list) else [value] for value in map(record.get, IMAGE_KEYS)
    )
    if images and image and images != image:
        raise Refused("two_image_lists", f"image is {image!r:.80}, images {images!r:.80}. Remove one of them.")
    return images or image or images


def resolve_images(images: object, file: Source, *, name: str = "images") -> tuple[str | Embedded, ...]:
    """A record's images, one or a list. Each is a path, a file's bytes or their base64 text, or a dictionary of these.

    The dictionary has `bytes` and `path` (of which the bytes are used), or is a chat's part with `image` or
    `image_url`. `name` is the record's key for the images.
    """
    images = images if isinstance(images, list) else [images]
    if images in ([], [None]):
        raise Refused("no_images", f"{name} is {images[0] if images else images!r}; an image is needed. Add it.")
    root = file.root  # a file may name millions of images
    return tuple(
        os.path.join(root, image)
        if type(image) is str and len(image) <= MAX_NAME and image.isascii() and _PLAIN.fullmatch(image)
        else _resolve(image, file)
        for image in images
    )


def _resolve(image: object, file: Source, name: str = "") -> str | Embedded:
    for key in ("bytes", "path", "image", "image_url", "url") if isinstance(image, dict) else ():
        if image.get(key):
            return _resolve(image[key], file, str(image.get("path") or ""))
    if isinstance(image, str) and image.startswith(_BASE64_STARTS):
        image = _decode(image)
    if isinstance(image, bytes):
        return Embedded(name or f"an image of {len(image)} bytes in the record", image)
    if not isinstance(image, str) or not image or "\0" in image:
        raise Refused("no_images", f"image is {image!r:.80}; a path, bytes or base64 is needed. Correct it.")
    return _resolve_path(image, file)


def _decode(text: str) -> str | bytes:
    """The bytes of base64 text; the text itself if it may be a path."""
    why = "its letters are A-Z, a-z, 0-9, + and /"
    if coded := _BASE64.fullmatch("".join(text.split())):
        try:
            return base64.b64decode(coded[1], validate=True)
        except ValueError as error:
            why = str(error)
    elif not text.startswith("data:") and len(text) <= (1024 if "." in text else MAX_NAME):
        return text
    raise Refused("bad_base64", f"image {text!r:.40}... is not base64 ({why}). Write it again.")


def _resolve_path(image: str, file: Source) -> str:
    if image.lower().endswith(VIDEOS):
        raise Refused("video", f"image is {image!r:.80}; videos are not read. Give its frames as images.")
    url = _URL.match(image)
    if url and not url[1] and os.path.exists(os.path.join(file.root, image)):
        url = None
    if url and str(url[1]).lower() != "file":
        raise Refused("image_url", f"image is {image!r:.80}; URLs are not fetched. Download it and give its path.")
    # Links are not resolved: the owner of the root made them. A ".." comes from the record's author.
    full = os.path.abspath(os.path.join(file.root, unquote(image[url.end() :]) if url else image))
    if file.bounded and os.path.commonpath([file.root, full]) != file.root:
        raise Refused("image_outside_root", f"image {image!r:.80} lies outside --image_root {file.root}. Correct it.")
    coded = full.encode(errors="replace")
    if len(coded) > MAX_PATH or max(map(len, coded.split(b"/"))) > MAX_NAME:
        rule = f"a path has at most {MAX_PATH} bytes, a name in it {MAX_NAME}"
        raise Refused("long_path", f"image is {image!r:.40}..., of {len(image)} characters; {rule}. Correct it.")
    return full


def image_size(image: str | os.PathLike | Embedded) -> tuple[int, int]:
    """Width and height in pixels from the file's header, turned upright, before `load_image` enlarges a small image."""
    return _header(image)[:2]


def orientation(image: str | os.PathLike | Embedded) -> int:
    """The EXIF orientation of a readable image: 1 upright, 2 to 4 mirrored or upside down, from 5 on sides swapped."""
    return _header(image)[2]


def _header(image: str | os.PathLike | Embedded) -> tuple[int, int, int]:
    """Width and height of the upright image, and its EXIF orientation."""
    return _read_header(image) if isinstance(image, Embedded) else _header_of_file(image)


def _read_header(image: str | os.PathLike | Embedded) -> tuple[int, int, int]:
    try:
        with _open(image) as opened:
            width, height = opened.size
            turn = opened.getexif().get(ExifTags.Base.Orientation)
    except FileNotFoundError as error:
        raise Refused("missing_image", f"there is no image at {image}, whose size is needed. Fetch it.") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Refused("image_unreadable", f"the size of {image} cannot be read ({error}). Fetch it again.") from error
    turn = turn if turn in range(1, 9) else 1
    return (height, width, turn) if turn >= 5 else (width, height, turn)


_header_of_file = functools.lru_cache(maxsize=4096)(_read_header)


def _open(image: str | os.PathLike | Embedded) -> Image.Image:
    """The image, not yet decoded."""
    try:
        return Image.open(io.BytesIO(image.content) if isinstance(image, Embedded) else image, formats=_formats())
    except UnidentifiedImageError as error:
        with io.BytesIO(image.content) if isinstance(image, Embedded) else Path(image).open("rb") as file:
            head = file.read(12)
        if head[4:8] != b"ftyp":
            raise
        kind, package = ("AVIF", "pillow>=11.3") if head[8:] in (b"avif", b"avis") else ("HEIC", "pillow-heif")
        raise ValueError(f"it is {kind}, which needs `pip install '{package}'`") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that can be opened here."""
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def load_image(path: str | os.PathLike | Embedded) -> Image.Image:
    """Load an image as 8-bit RGB, turned upright by its EXIF orientation, with white behind transparent pixels.

    An image with a side under 28 pixels is enlarged until it has 28, in the same aspect ratio (as VLM-R1 does); boxes
    are relative to the image, so they stay valid. Of an animation the first frame is used.

    Raises:
        ValueError: no file, not one of `FORMATS`, truncated, too many pixels, an aspect ratio above 200, or a mode
            without a defined white (32-bit integers and floats). The message names the path and the remedy.
    """
    on_disk = not isinstance(path, Embedded)
    if on_disk and os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for its writer
        raise ValueError(f"{path} is no regular file. Replace it or drop the record.")
    try:
        image = _open(path)
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
