"""Pictures arrive upright, opaque and in 8-bit RGB; what cannot is refused with its path."""

import os

import numpy as np
import pytest
from PIL import Image

from boxgrpo.trainer.data.images import load_image, upright_size


@pytest.fixture
def photo(tmp_path):
    """A 64 x 48 photo whose left half is red and right half blue."""
    image = Image.new("RGB", (64, 48), "red")
    image.paste((0, 0, 255), (32, 0, 64, 48))
    path = tmp_path / "photo.png"
    image.save(path)
    return path


def test_a_real_photo(shared):
    image = load_image(shared / "data/mig_bench/images/case076_1.jpg")
    assert image.mode == "RGB" and min(image.size) > 100


def test_missing_image(tmp_path):
    with pytest.raises(ValueError, match=r"no image at .*gone\.png.*--image_root") as caught:
        load_image(tmp_path / "gone.png")
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_what_no_photo_is_made_of_is_not_opened(tmp_path):
    """Decoding EPS starts another program; opening a pipe waits for its writer; a page says 404."""
    Image.new("RGB", (50, 50)).save(tmp_path / "a.eps")
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    for name in ("a.eps", "page.jpg"):
        with pytest.raises(ValueError, match=rf"{name} cannot be opened as an image"):
            load_image(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path):
        with pytest.raises(ValueError, match="no regular file"):
            load_image(path)


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_truncated_image(tmp_path, kind):
    path = tmp_path / f"half.{kind}"
    Image.effect_noise((128, 128), 50).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"half\.{kind} cannot be decoded.*Fetch it again") as caught:
        load_image(path)
    assert caught.value.__cause__ is not None


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


def test_exif_rotation_is_applied(photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the stored left edge is the top
    Image.open(photo).save(tmp_path / "turned.png", exif=exif)
    image = load_image(tmp_path / "turned.png")
    assert image.size == (48, 64)
    assert image.getpixel((24, 5)) == (255, 0, 0) and image.getpixel((24, 60)) == (0, 0, 255)


def test_the_upright_size_is_told_before_a_small_image_is_enlarged(tmp_path):
    exif = Image.Exif()
    for turn in range(1, 9):
        exif[0x0112] = turn
        Image.new("RGB", (20, 10)).save(tmp_path / "small.png", exif=exif)
        width, height = upright_size(tmp_path / "small.png")
        shown = load_image(tmp_path / "small.png")
        assert {width, height} == {20, 10} and shown.width / shown.height == width / height, turn


def test_sixteen_bit_grey_keeps_its_shades(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    loaded = np.asarray(load_image(tmp_path / "ramp.png"))
    assert np.abs(loaded[..., 0].astype(int) - (ramp >> 8)).max() <= 1


def test_cmyk_becomes_the_colour_it_prints(tmp_path):
    Image.new("CMYK", (40, 40), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=95)
    r, g, b = load_image(tmp_path / "print.jpg").getpixel((20, 20))
    assert r > 240 and g < 15 and b < 15


def test_a_float_image_is_refused(tmp_path):
    Image.new("F", (40, 40), 0.5).save(tmp_path / "depth.tiff")
    with pytest.raises(ValueError, match=r"depth\.tiff .*mode F has no defined white"):
        load_image(tmp_path / "depth.tiff")


def test_a_decompression_bomb_is_refused_from_its_header(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("1", (9000, 8000)).save(path)  # 72 million pixels in a few kilobytes
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ValueError, match=r"bomb\.png has 9000 x 8000 = 72000000 pixels; the limit is 64000000"):
        load_image(path)
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    ("mode", "size", "message"),
    [("1", (20000, 10000), "is over Pillow's own limit"), ("RGB", (6000, 29), "is 6000 x 29 pixels; .*200")],
    ids=["a bomb over Pillow's limit", "a strip longer than 200 to 1"],
)
def test_sizes_that_cannot_be_decoded_or_scaled_are_refused(tmp_path, mode, size, message):
    Image.new(mode, size).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match=rf"large\.png {message}"):
        load_image(tmp_path / "large.png")
