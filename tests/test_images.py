"""Pictures as the internet has them."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from minidiff.data.images import MAX_PIXELS, BadImage, load_image, read_image

WHITE = (255, 255, 255)


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> dict:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


def photo(size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def centre(source: dict, size: int = 16) -> list[int]:
    return load_image(source, size, WHITE)[:, size // 2, size // 2].tolist()


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds almost nothing: a bomb costs its sender a few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


JPEG, PNG = encoded(photo(), "JPEG")["bytes"], encoded(photo())["bytes"]
BROKEN = {
    "B1_jpeg_cut_in_half": JPEG[: len(JPEG) // 2],
    "B1_jpeg_without_its_end": JPEG[:-10],
    "B1_png_cut_in_half": PNG[: len(PNG) // 2],
    "B1_png_with_a_flipped_bit": PNG[:500] + bytes([PNG[500] ^ 16]) + PNG[501:],
    "B2_html_as_jpeg": b"<html><body>404</body></html>",
    "B2_a_zero": b"\0",
    "B5_eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "B5_fits": b"SIMPLE  =                    T".ljust(2880),
    "B5_psd": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 10, 10, 8, 3),
    "B5_text_chunk_bomb": (lambda c: PNG[:33] + c + PNG[33:])(
        (lambda body: struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body)))(
            b"a\0\0" + zlib.compress(b" " * 2_000_000)
        )
    ),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
def test_broken_pictures_are_refused_with_a_reason(data):
    with pytest.raises(BadImage, match=r"\w{3}"):
        load_image({"bytes": data, "path": None}, 16, WHITE)


@pytest.mark.parametrize("source", [None, {"bytes": None, "path": None}, {"bytes": b"", "path": None}])
def test_B2_no_image_is_said(source):
    with pytest.raises(BadImage, match="there is no image"):
        load_image(source, 16, WHITE)


def test_B2_a_file_that_is_gone(tmp_path):
    with pytest.raises(BadImage, match="FileNotFoundError"):
        load_image({"bytes": None, "path": str(tmp_path / "gone.png")}, 16, WHITE)


@pytest.mark.parametrize("side", [8_001, 12_000, 20_000, 2**31 - 1])
def test_B4_T7_a_bomb_is_refused_from_its_header(side, monkeypatch, recwarn):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    assert side**2 > MAX_PIXELS
    with pytest.raises(BadImage, match="more than 64 million pixels"):
        load_image({"bytes": png_header(side, side), "path": None}, 16, WHITE)
    assert not recwarn.list
    assert Image.MAX_IMAGE_PIXELS is not None and not ImageFile.LOAD_TRUNCATED_IMAGES  # nor are Pillow's own guards off


@pytest.mark.parametrize("mode, hidden", [("RGBA", (200, 0, 0, 0)), ("LA", (9, 0)), ("PA", None)])
def test_B6_hidden_colours_stay_hidden(mode, hidden):
    if mode == "PA":  # a palette with a transparent entry
        picture = Image.new("P", (16, 16), 0)
        picture.putpalette([200, 0, 0])
        source = encoded(picture, transparency=0)
    else:
        source = encoded(Image.new(mode, (16, 16), hidden))
    assert load_image(source, 16, (1, 2, 3)).flatten(1).unique(dim=1).flatten().tolist() == [1, 2, 3]


def test_B6_half_transparent_is_half_background():
    assert centre(encoded(Image.new("RGBA", (16, 16), (255, 0, 0, 128)))) == [255, 127, 127]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_B7_exif_turns_the_picture_once(orientation, kind):
    upright = Image.new("RGB", (20, 12), "black")
    upright.paste("white", (0, 0, 10, 6))  # the upper left quarter
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that undoes the orientation
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(inverse[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    quality = {} if kind == "PNG" else {"quality": 100}
    shown = read_image(encoded(stored, kind, exif=exif, **quality), WHITE)
    assert shown.size == (20, 12)
    corners = [shown.getpixel(p)[0] > 128 for p in ((3, 2), (16, 2), (3, 9), (16, 9))]
    assert corners == [True, False, False, False]


def test_B8_sixteen_bits_are_scaled_not_clipped():
    ramp = np.tile(np.linspace(0, 65535, 16).astype(np.uint16), (16, 1))
    shown = load_image(encoded(Image.fromarray(ramp)), 16, WHITE)[0, 0]
    assert shown[0] == 0 and shown[-1] == 255 and abs(int(shown[8]) - 136) <= 1
    big_endian = Image.fromarray(ramp).tobytes()
    assert len(big_endian) == 512
    tiff = load_image(encoded(Image.fromarray(ramp.astype(np.int32)), "TIFF"), 16, WHITE)[0, 0]
    assert tiff.tolist() == shown.tolist()


@pytest.mark.parametrize("low, high, first, last", [(0.0, 1.0, 0, 255), (0.25, 0.75, 64, 191), (-3.0, 500.0, 0, 255)])
def test_B8_floats_are_scaled_by_their_range(low, high, first, last):
    ramp = np.tile(np.linspace(low, high, 16, dtype=np.float32), (16, 1))
    shown = load_image(encoded(Image.fromarray(ramp), "TIFF"), 16, WHITE)[0, 0]
    assert (shown[0], shown[-1]) == (first, last)


def test_B8_floats_that_are_not_finite_are_refused():
    broken = np.full((16, 16), np.nan, dtype=np.float32)
    with pytest.raises(BadImage, match="not finite"):
        load_image(encoded(Image.fromarray(broken), "TIFF"), 16, WHITE)


def test_B9_cmyk_is_converted():
    assert centre(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "TIFF"))[0] > 200
    red, green, blue = centre(encoded(Image.new("RGB", (16, 16), "red").convert("CMYK"), "JPEG", quality=100))
    assert red > 200 and green < 60 and blue < 60


def test_B9_lab_is_converted():
    grey = Image.new("LAB", (16, 16), (128, 128, 128))  # in Pillow's LAB, a and b are 0 at 128 and 0 by turns
    red, green, blue = centre(encoded(grey, "TIFF"))
    assert max(red, green, blue) > 60


def test_B9_a_colour_profile_is_obeyed_and_a_broken_one_ignored():
    picture = Image.new("RGB", (16, 16), (200, 40, 40))
    plain = centre(encoded(picture))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.abs(np.subtract(centre(encoded(picture, icc_profile=srgb)), plain)).max() <= 2
    xyz = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()  # not a profile for RGB
    assert centre(encoded(picture, icc_profile=xyz)) == plain
    assert centre(encoded(picture, icc_profile=b"not a profile")) == plain
    # swap the red and the green primary of the profile: what was red is green now
    at = {tag: srgb.index(tag) for tag in (b"rXYZ", b"gXYZ")}
    swapped = bytearray(srgb)
    swapped[at[b"rXYZ"] : at[b"rXYZ"] + 4], swapped[at[b"gXYZ"] : at[b"gXYZ"] + 4] = b"gXYZ", b"rXYZ"
    red, green, _ = centre(encoded(picture, icc_profile=bytes(swapped)))
    assert green > 150 > red


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_B10_an_animation_is_its_first_frame(kind):
    frames = [Image.new("RGB", (16, 16), c) for c in ("red", "lime", "blue")]
    moving = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, loop=0)
    red, green, blue = centre(moving)
    assert red > 240 and green < 10 and blue < 10


@pytest.mark.parametrize("size", [(1, 1), (3, 20), (2000, 4), (300, 29)])
def test_B11_tiny_and_stretched_pictures_are_refused(size):
    with pytest.raises(BadImage, match="too small|too long"):
        load_image(encoded(Image.new("RGB", size)), 16, WHITE)


@pytest.mark.parametrize("size", [(4, 4), (5, 50), (17, 31)])
def test_B11_what_is_left_gives_a_whole_square(size):
    assert load_image(encoded(Image.new("RGB", size, "red")), 16, WHITE).shape == (3, 16, 16)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA"])
def test_B12_every_mode_comes_out_as_rgb(mode):
    assert load_image(encoded(Image.new(mode, (16, 16))), 16, WHITE).shape == (3, 16, 16)
