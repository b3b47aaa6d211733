"""Pictures arrive upright, opaque and in 8-bit RGB; what cannot is refused with its path."""

import os

import numpy as np
import pytest
from PIL import Image

from boxgrpo.trainer.data.images import image_size, load_image


def drawn(mode, size):
    """A function that writes such an image to a path."""
    return lambda path: Image.new(mode, size).save(path)


def truncated(path):
    Image.effect_noise((128, 128), 50).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("gone.png", lambda path: None, "There is no image at .*--image_root"),
        ("pipe.png", os.mkfifo, "is no regular file"),  # opening it would wait for its writer
        ("folder.png", os.mkdir, "is no regular file"),
        ("a.eps", drawn("RGB", (50, 50)), "cannot be opened as an image"),  # decoding it would start another program
        ("page.jpg", lambda path: path.write_text("<html>404</html>"), "cannot be opened as an image"),
        ("half.png", truncated, "cannot be decoded.*Fetch it again"),
        ("half.jpg", truncated, "cannot be decoded.*Fetch it again"),
        ("depth.tiff", drawn("F", (40, 40)), "mode F has no defined white"),
        ("strip.png", drawn("RGB", (6000, 29)), "is 6000 x 29 pixels; .*200"),
        ("larger_bomb.png", drawn("1", (20000, 10000)), "is over Pillow's own limit"),
    ],
)
def test_what_is_no_usable_image_is_refused(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        load_image(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_a_decompression_bomb_is_refused_from_its_header(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("1", (9000, 8000)).save(path)  # 72 million pixels in a few kilobytes
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"bomb\.png has 9000 x 8000 = 72000000 pixels; the limit is 64000000"):
        load_image(path)


@pytest.mark.parametrize(("size", "enlarged"), [((20, 10), (56, 28)), ((28, 28), (28, 28)), ((100, 7), (400, 28))])
def test_an_image_under_28_pixels_is_enlarged_in_its_shape(tmp_path, size, enlarged):
    Image.new("RGB", size, "green").save(tmp_path / "small.png")
    image = load_image(tmp_path / "small.png")
    assert image.size == enlarged
    assert image.getpixel((enlarged[0] // 2, 14)) == (0, 128, 0)


def test_transparency_lies_on_white(tmp_path):
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 20, 40))
    image.save(tmp_path / "alpha.png")
    image.quantize().save(tmp_path / "palette.png")
    Image.new("LA", (40, 40), (0, 0)).save(tmp_path / "grey.png")
    for name in ("alpha.png", "palette.png"):
        loaded = load_image(tmp_path / name)
        assert loaded.mode == "RGB"
        assert loaded.getpixel((5, 5)) == (255, 0, 0) and loaded.getpixel((35, 5)) == (255, 255, 255)
    assert load_image(tmp_path / "grey.png").getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_turned_photo_is_shown_and_measured_upright(tmp_path, turn):
    """Its size is measured before it is enlarged."""
    exif = Image.Exif()
    exif[0x0112] = turn
    image = Image.new("RGB", (20, 10), "red")
    image.paste("blue", (10, 0, 20, 10))
    image.save(tmp_path / "small.png", exif=exif)
    width, height = image_size(tmp_path / "small.png")
    shown = load_image(tmp_path / "small.png")
    assert (width, height) == ((20, 10) if turn < 5 else (10, 20)) and shown.width / shown.height == width / height
    assert (shown.getpixel((5, 5)) == (255, 0, 0)) == (turn in (1, 4, 5, 6))  # the red half is left or above


def test_sixteen_bit_grey_keeps_its_shades(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    loaded = np.asarray(load_image(tmp_path / "ramp.png"))
    assert np.abs(loaded[..., 0].astype(int) - (ramp >> 8)).max() <= 1


def test_cmyk_becomes_the_colour_it_prints(tmp_path):
    Image.new("CMYK", (40, 40), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=95)
    r, g, b = load_image(tmp_path / "print.jpg").getpixel((20, 20))
    assert r > 240 and g < 15 and b < 15
